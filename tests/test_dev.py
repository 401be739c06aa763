"""The workshop, dev/. What it measures is in test_parity.py, test_processes.py and test_gpu.py.

- python -m dev.train_tiny makes everything in tiny/ anew, from the configs that are there.
- python -m dev.figure makes the figure of the README.
"""

import gzip
import json

import numpy as np
import pytest
from conftest import ROOT, TINY
from PIL import Image

from teacher import load_teacher


def relative_files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_the_tokenizer_of_tiny_is_learned_anew(call, tmp_path):
    code, _, error = call("dev.train_tiny", "--stages", "tokenizer", "--out", tmp_path, "--work", tmp_path / "work")
    assert code == 0, error
    for name in ("tokenizer/vocab.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((TINY / name).read_text()), name
    for name in ("tokenizer/merges.txt", "prompts.txt"):
        assert (tmp_path / name).read_text() == (TINY / name).read_text(), name


@pytest.mark.slow
def test_all_of_tiny_is_made_anew_of_its_configs(call, tmp_path):
    """In one step each, from images of noise."""
    rng, data, out = np.random.default_rng(0), tmp_path / "data", tmp_path / "tiny"
    data.mkdir()
    for split, num in ("train", 200), ("t10k", 100):
        images, labels = rng.integers(0, 256, (num, 28, 28), np.uint8), np.arange(num, dtype=np.uint8) % 10
        for kind, header, array in ("images-idx3", 16, images), ("labels-idx1", 8, labels):
            with gzip.open(data / f"{split}-{kind}-ubyte.gz", "wb") as file:
                file.write(b"\0" * header + array.tobytes())
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
