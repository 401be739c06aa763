"""The measures that papers use, by torch-fidelity and CLIP, of a student of a teacher that is not embedded.

- tools.evaluate prints FID, KID, precision, recall and CLIP score, with random networks from local files.
- The same call again makes no picture. Two processes share the work.
- torch-fidelity's own command line says the same of the same folders.
- A missing file of weights is one sentence with the place to get it.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import PROMPTS, ROOT, TINY
from plumbing.files import read_json
from test_export import random_student

pytestmark = pytest.mark.slow
# torch-fidelity needs torchvision, which may not fit the torch that is here: then a copy of both for these tests alone
OWN = ROOT / ".ci" / "fidelity"
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(OWN)])}
RANDOM_NETWORKS = """
import sys
import torch
from torch_fidelity import feature_extractor_inceptionv3 as inception
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
torch.manual_seed(0)
small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
config = CLIPConfig(text_config=dict(small, vocab_size=600), vision_config=dict(small, image_size=32, patch_size=8),
                    projection_dim=16)
CLIPModel(config).save_pretrained(sys.argv[2])
CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(sys.argv[2])
load = inception.FeatureExtractorInceptionV3.load_state_dict
inception.torch.load = lambda *args, **kwargs: None
inception.FeatureExtractorInceptionV3.load_state_dict = lambda self, weights: torch.save(self.state_dict(), sys.argv[1])
inception.FeatureExtractorInceptionV3("random", ["2048"], sys.argv[1])
"""


def python(*args):
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, env=ENV, capture_output=True, text=True)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(folder, the arguments of tools.evaluate) of a random student, with networks and real images."""
    if python("-c", "import torch_fidelity, transformers").returncode:
        pytest.skip("torch-fidelity, with a torchvision, or transformers is not installed")
    folder = tmp_path_factory.mktemp("fidelity")
    student = random_student(folder, "sd15", 3.0)
    done = python("-c", RANDOM_NETWORKS, folder / "inception.pth", folder / "clip")
    assert done.returncode == 0, done.stderr
    for path in (TINY / "tokenizer").iterdir():
        (folder / "clip" / path.name).write_bytes(path.read_bytes())
    (folder / "real").mkdir()
    random = np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / "real" / f"{k}.jpg")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, "a bag"]))
    return folder, ["-m", "tools.evaluate", "--student", student, "--prompts", folder / "prompts.txt", "--images", 12,
                    "--steps", 4, "--batch", 4, "--pictures", folder / "pictures", "--real", folder / "real",
                    "--size", 32, "--inception", folder / "inception.pth", "--clip", folder / "clip"]


def test_a_student_of_any_teacher_is_measured_as_papers_do(measured):
    folder, command = measured
    done = python(*command)
    assert done.returncode == 0, done.stderr
    rows = read_json(folder / "student" / "fidelity.json")["rows"]
    assert [(row["sampler"], row["reference"]) for row in rows] == [
        ("student", "teacher"), ("student", "real"), ("teacher", "real")]
    for row in rows:
        assert row["fid"] > 0 and 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1 and -1 < row["clip"] < 1
        assert f"{row['fid']:.2f}" in done.stdout
    pictures = {path: path.stat().st_mtime_ns for path in (folder / "pictures").glob("*/*.png")}
    assert len(pictures) == 24 and "12 images of 3 prompts, w = 3" in done.stdout

    again = python("-m", "torch.distributed.run", "--nproc_per_node=2", *command)
    assert again.returncode == 0 and read_json(folder / "student" / "fidelity.json")["rows"] == rows, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "pictures").glob("*/*.png")} == pictures

    student, teacher = sorted((folder / "pictures").iterdir(), reverse=True)
    for own, (one, other) in zip(rows, ((student, teacher), (student, folder / "real"), (teacher, folder / "real"))):
        theirs = python("-m", "torch_fidelity.fidelity", "--input1", one, "--input2", other, "--fid", "--kid", "--prc",
                        "--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path",
                        folder / "inception.pth", "--kid-subset-size", 12, "--samples-resize-and-crop", 32, "--json",
                        "--no-cache")
        assert theirs.returncode == 0, theirs.stderr
        found = json.loads(theirs.stdout)
        assert found["frechet_inception_distance"] == pytest.approx(own["fid"], rel=1e-6)
        assert found["kernel_inception_distance_mean"] == pytest.approx(own["kid"], rel=1e-6)
        assert (found["precision"], found["recall"]) == (own["precision"], own["recall"])


def test_other_pictures_are_made_anew_and_shared(measured):
    folder, command = measured
    options = ["--seed", 100, "--json", folder / "other.json"]
    done = python("-m", "torch.distributed.run", "--nproc_per_node=2", *command[:-8], "--clip", folder / "clip",
                  *options)
    assert done.returncode == 0, done.stderr
    rows = read_json(folder / "other.json")["rows"]
    assert [(row["sampler"], row["reference"]) for row in rows] == [("student", None), ("teacher", None)]
    assert len(list((folder / "pictures").glob("*/*.png"))) in (24, 48)


@pytest.mark.parametrize("option, value, message", [
    ("--inception", "none.pth", "torch-fidelity/releases/download"), ("--clip", "none", "huggingface.co/openai"),
    ("--clip", "tiny/text_encoder", "lacks the files of its tokenizer"), ("--real", "docs", "4 or more")])
def test_what_is_missing_is_said_with_its_place(call, option, value, message):
    there = ("--inception", "README.md", "--size", 64) if option == "--real" else ()
    code, _, error = call("tools.evaluate", *there, option, value)
    assert code == 2 and message in error and error.count("\n") == 1


def test_damaged_files_are_named_before_a_picture_is_made(measured):
    folder, command = measured
    shutil.copytree(folder / "real", folder / "damaged")
    shutil.copytree(folder / "clip", folder / "half a clip")
    whole = (folder / "damaged" / "3.jpg").read_bytes()
    (folder / "damaged" / "3.jpg").write_bytes(whole[:len(whole) // 2])
    os.truncate(folder / "half a clip" / "model.safetensors", 1000)
    os.truncate(shutil.copy(folder / "inception.pth", folder / "half.pth"), 10**6)
    options = ["--pictures", folder / "none"]
    for option, value, name in (("--real", "damaged", "3.jpg is damaged"), ("--clip", "half a clip", "half a clip"),
                                ("--inception", "half.pth", "half.pth cannot be opened")):
        done = python(*command, *options, option, folder / value)
        assert done.returncode == 2 and name in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (folder / "none").exists()


def test_a_teacher_without_a_judge_says_what_to_give(call, tmp_path):
    code, _, error = call("tools.evaluate", "--student", random_student(tmp_path, "sd15"), "--images", 100)
    assert code == 2 and "give --inception or --clip" in error
