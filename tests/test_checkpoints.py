"""Published checkpoints: their exact tensors, how files are read and written, and teachers without text.

- The networks of published configs have exactly the published tensors, or the published number of parameters.
- Weights in the file's own precision are not copied; an interrupted write leaves the old file.
- An unconditional teacher clips; a class-conditional one takes names and numbers, and guides; a student starts as each.
- Both go from training to image.
"""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from conftest import CHECKPOINTS, edit
from dev.synthesise import synthesise
from model import TextEncoder, UNet, VAE
from plumbing.files import BadInput, read_json, write_file
from plumbing.images import noise
from plumbing.weights import read_tensors, remap_key
from student import load_student, new_student
from teacher import load_teacher

@pytest.fixture
def pixel(tmp_path):
    """A function: config changes -> the folder of DDPM in small, with random weights, all at the root."""
    def make(**change):
        source, published = tmp_path / "configs", CHECKPOINTS / "ddpm-cifar10-32"
        small = {"sample_size": 16, "norm_num_groups": 8, "block_out_channels": [16, 16, 32, 32], "layers_per_block": 1}
        edit(source / "config.json", **read_json(published / "unet" / "config.json") | small | change)
        edit(source / "scheduler_config.json", **read_json(published / "scheduler" / "scheduler_config.json"))
        synthesise(source, tmp_path / "pixel")
        return tmp_path / "pixel"
    return make


# ------------------------------------------------------------------------------------------------------------ the files
@pytest.mark.parametrize("name", [path.parent.name for path in sorted(CHECKPOINTS.glob("*/manifest.json"))])
def test_networks_have_exactly_the_published_tensors(name):
    for file, part in read_json(CHECKPOINTS / name / "manifest.json").items():
        folder = file.split("/")[0]
        network = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}[folder]
        with torch.device("meta"):
            ours = network(read_json(CHECKPOINTS / name / folder / "config.json")).state_dict()
        theirs = {remap_key(key): shape for key, (_, shape) in part["tensors"].items() if "position_ids" not in key}
        assert {key: list(p.shape) for key, p in ours.items()} == theirs


@pytest.mark.parametrize("name, published", [("ddpm-cifar10-32", 35.7), ("ddpm-256", 113.7)])
def test_published_configs_without_manifest_have_the_published_size(name, published):
    with torch.device("meta"):
        network = UNet(read_json(CHECKPOINTS / name / "unet" / "config.json"))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == published


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_weights_in_the_files_own_precision_are_not_copied(tmp_path):
    """Loaded and read through, 64 MB are still pages of the file; only what is written to becomes one's own."""
    def own():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    save_file({"a": torch.zeros(2**24)}, tmp_path / "a.safetensors")
    before = own()
    tensor = read_tensors(tmp_path / "a.safetensors", dtype=torch.float32)["a"]
    assert tensor.max() == 0 and own() - before < 8
    tensor += 1
    assert own() - before > 56 and read_tensors(tmp_path / "a.safetensors")["a"].max() == 0


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(BadInput, match="No space left on device"):
        write_file(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------------------------------- teachers without text
def test_unconditional_teacher_clips_and_student_starts_as_its_equal(pixel):
    teacher = load_teacher(pixel())
    assert teacher.condition_type is None and teacher.shape == (3, 16, 16) and teacher.clip == 1.0
    student, eps = new_student(teacher, 400, 1.0), noise([0, 1], teacher.shape)
    assert teacher.encode(["", ""]) == {} and student.network.config["class_embed_type"] == "timestep"
    assert teacher.denoise(eps, 1000).abs().max() == 1      # 157 times a rounding error, clipped
    with torch.no_grad():
        x = teacher.schedule.sigma(400).float() * eps
        assert torch.equal(student(eps, 7).clamp(-1, 1), teacher.denoise(x, 400))
    with pytest.raises(BadInput, match="no empty condition to lead away from: --guidance 1"):
        new_student(teacher, 400, 3.0)


def test_class_conditional_teacher_takes_names_and_numbers(pixel):
    folder = pixel(num_class_embeds=3, resnet_time_scale_shift="scale_shift")
    edit(folder / "model_index.json", id2label={"0": "cat", "1": "dog", "2": ""})
    teacher = load_teacher(folder)
    assert teacher.condition_type == "label" and teacher.encode(["dog", "0", ""])["label"].tolist() == [1, 0, 2]
    assert teacher.uncond["label"].tolist() == [2]
    with pytest.raises(BadInput, match="has no class 'cow': cat, dog"):
        teacher.encode(["cow"])
    eps, pets = noise([0, 1], teacher.shape), teacher.encode(["cat", "dog"])
    f = teacher.denoise(eps, 20, **pets)
    assert not torch.equal(f[0], teacher.denoise(eps, 20, **teacher.encode(["dog", "cat"]))[0]) and f.abs().max() <= 1
    teacher.clip = None
    f, f_empty = teacher.denoise(eps, 20, **pets), teacher.denoise(eps, 20, **teacher.encode(["", ""]))
    assert torch.allclose(teacher.denoise(eps, 20, 1.5, **pets), f_empty + 1.5 * (f - f_empty), rtol=1e-4, atol=1e-4)
    student = new_student(teacher, 400, [1.0, 2.0])
    with torch.no_grad():
        x = teacher.schedule.sigma(400).float() * eps
        assert torch.equal(student(eps, 0, 1.5, **pets), teacher.denoise(x, 400, **pets))


@pytest.mark.parametrize("classes", [None, 3])
def test_pixel_teacher_from_training_to_image(pixel, call, tmp_path, classes):
    folder, out = pixel(num_class_embeds=classes), tmp_path / "run"
    options = ["--batch", 4, "--ema", 0, "--grad-checkpointing", "--every", 2, "--num-steps", 5]
    code, said, error = call("train", "--teacher", folder, "--out", out, "--steps", 2, *options)
    assert code == 0 and ("--label 0" in said) == bool(classes), error
    assert Image.open(out / "samples" / "step_2.png").size == (8 * 96, 2 * 96)
    named = re.search(r"sample.py (--student.*)", said)[1].split()
    code, said, error = call("sample", *named, "--out", tmp_path / "png", "--num", 2)
    assert code == 0 and Image.open(tmp_path / "png" / "000001.png").size == (16, 16), error
    assert load_student(out).teacher.condition_type == ("label" if classes else None)
    code, said, error = call("train", "--teacher", folder, "--out", out, "--steps", 3, *options)
    assert code == 0 and "resuming at step 2" in said, error                # without an average to restore
    code, _, error = call("sample", "--student", out, "--prompts", "README.md" if classes is None else "none.txt")
    assert code == 2 and ("takes neither --prompt nor --label" in error or "none.txt is missing" in error)
    if classes is None:
        code, _, error = call("train", "--teacher", folder, "--prompts", "README.md", "--out", tmp_path / "told")
        assert code == 2 and "is unconditional" in error
