"""The workshop, dev/. More of what it measures is in test_parity.py and test_processes.py.

- python -m dev.train_tiny makes everything in tiny/ anew, from the configs that are there.
- python -m dev.figure makes the figure of the README.
- On a GPU, the teacher's clean predictions are the CPU's in every precision, and a run that is killed and resumed is
  bitwise the undisturbed one in half precision. (In fp32 it need not be, because cuDNN adds in no fixed order.)
"""

import gzip
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, TINY, WITH_GPU
from plumbing.files import read_json
from plumbing.prompts import read_prompts
from teacher import load_teacher


def relative_files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_the_tokenizer_of_tiny_is_learned_anew(call, tmp_path):
    code, _, error = call("dev.train_tiny", "--stages", "tokenizer", "--out", tmp_path, "--work", tmp_path / "work")
    assert code == 0, error
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "prompts.txt",
                 "scheduler/scheduler_config.json"):
        read = read_json if name.endswith(".json") else read_prompts
        assert read(tmp_path / name) == read(TINY / name), name


@pytest.mark.slow
def test_all_of_tiny_is_made_anew_of_its_configs(call, tmp_path):
    """In one step each, from images of noise."""
    rng, data, out = np.random.default_rng(0), tmp_path / "data", tmp_path / "tiny"
    data.mkdir()
    for split in ("train", "t10k"):
        images, labels = rng.integers(0, 256, (200, 28, 28), np.uint8), np.arange(200, dtype=np.uint8) % 10
        for name, header, array in ("images-idx3", 16, images), ("labels-idx1", 8, labels):
            content = gzip.compress(b"\0" * header + array.tobytes())
            (data / f"{split}-{name}-ubyte.gz").write_bytes(content)
    steps = [option for part in ("vae", "decoder", "judge", "unet", "pixel") for option in (f"--{part}-steps", 1)]
    code, _, error = call("dev.train_tiny", "--data", data, "--out", out, "--work", tmp_path / "work", *steps)
    assert code == 0, error
    by_others = {path for path in relative_files(TINY) if path.suffix in (".md", ".png") or path.name == "showcase.txt"
                 or {"evaluation", "student"} & set(path.parts)}
    assert relative_files(out) == relative_files(TINY) - by_others
    for folder, spec in (out, "tiny"), (out / "pixel", "tiny-pixel"):
        assert load_teacher(folder).settings == load_teacher(spec).settings


@pytest.mark.slow
def test_the_figure_is_made(call, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, error = call("dev.figure", "--out", tmp_path / "boot.png")
    made = Image.open(tmp_path / "boot.png")
    assert code == 0 and made.size == Image.open(ROOT / "docs" / "boot.png").size, error


# ---------------------------------------------------------------------------------------------------------- on a GPU
ALLOWED = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.1}         # ||a - b|| / ||b||


@pytest.fixture(scope="module")
def run_on_gpu():
    """Run `python -m ARGS` where a GPU can be seen, or skip; returns what it prints."""
    def run(*args):
        done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, env=WITH_GPU, capture_output=True, text=True,
                              timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout
    if run("-c", "import torch; print(torch.cuda.is_available())").strip() == "False":
        pytest.skip("there is no GPU")
    return run


def test_a_gpu_agrees_with_the_cpu(run_on_gpu, tmp_path):
    run_on_gpu("-m", "dev.bench", "--agreement", "--json", tmp_path / "agreement.json")
    for precision, row in read_json(tmp_path / "agreement.json").items():
        assert row["prediction"] < ALLOWED[precision], precision


@pytest.mark.parametrize("options", ["bf16", "fp16", "fp16 --lora 8 --grad-checkpointing"])
def test_a_killed_run_resumes_bitwise(run_on_gpu, tmp_path, options):
    text = run_on_gpu("-m", "dev.kill", "--kills", 2, "--out", tmp_path, "--", "--precision", *options.split())
    assert "every state was bitwise the undisturbed one" in text
