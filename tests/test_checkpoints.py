"""Published checkpoints: their exact tensors, the ways they are filed, and pixel teachers from command to picture."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from plumbing.files import BadInput
from plumbing.hub import TINY
from plumbing.weights import WEIGHTS, read_tensors, remap_key, weight_files
from conftest import CHECKPOINTS
from model import TextEncoder, UNet, VAE
from student import load_student, new_student, save_student
from plumbing.images import noise
from teacher import load_teacher
from dev.synthesise import synthesise

PIXEL = {"_class_name": "UNet2DModel", "in_channels": 3, "out_channels": 3, "block_out_channels": [16, 32],
         "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": None, "sample_size": 16,
         "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
         "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
SCHEDULER = {"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
             "clip_sample": True, "num_train_timesteps": 1000, "prediction_type": "epsilon"}


@pytest.fixture
def pixel(tmp_path):
    """A function: config changes -> the folder of a small pixel teacher with random weights, all at the root."""
    def make(**change):
        source = tmp_path / "configs"
        source.mkdir()
        (source / "config.json").write_text(json.dumps({**PIXEL, **change}))
        (source / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
        synthesise(source, tmp_path / "pixel")
        return tmp_path / "pixel"
    return make


@pytest.mark.parametrize("name", ["sd21-base", "sd21-768-v", "sd15", "ddpm-butterflies-128"])
def test_networks_have_exactly_the_published_tensors(name):
    for file, part in json.loads((CHECKPOINTS / name / "manifest.json").read_text()).items():
        folder = file.split("/")[0]
        network = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}[folder]
        with torch.device("meta"):
            ours = network(json.loads((CHECKPOINTS / name / folder / "config.json").read_text())).state_dict()
        theirs = {remap_key(key): shape for key, (_, shape) in part["tensors"].items() if "position_ids" not in key}
        assert {key: list(p.shape) for key, p in ours.items()} == theirs


@pytest.mark.parametrize("name", ["ddpm-cifar10-32", "ddpm-256"])
def test_published_configs_without_manifest_are_supported(name):
    with torch.device("meta"):
        network = UNet(json.loads((CHECKPOINTS / name / "unet" / "config.json").read_text()))
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert round(millions, 1) == {"ddpm-cifar10-32": 35.7, "ddpm-256": 113.7}[name]     # as published


@pytest.mark.parametrize("filed", ["sharded", "fp16"])
def test_sharded_and_half_precision_files_load(tiny, tmp_path, filed):
    copy = shutil.copytree(TINY, tmp_path / "t", ignore=shutil.ignore_patterns("judge", "student", "evaluation"))
    weights = load_file(copy / "unet" / WEIGHTS)
    (copy / "unet" / WEIGHTS).unlink()
    stem, names = WEIGHTS.removesuffix(".safetensors"), sorted(weights)
    if filed == "sharded":
        for k, part in enumerate((names[::2], names[1::2])):
            save_file({n: weights[n] for n in part}, copy / "unet" / f"{stem}-{k + 1:05}-of-00002.safetensors")
    else:
        save_file(weights, copy / "unet" / f"{stem}.fp16.safetensors")
    assert len(weight_files(copy / "unet")) == (2 if filed == "sharded" else 1)
    other = load_teacher(copy)
    assert other.fingerprint == tiny.fingerprint
    assert torch.equal(other.unet.mid_block.resnets[0].conv1.weight, tiny.unet.mid_block.resnets[0].conv1.weight)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_weights_in_the_files_own_precision_are_not_copied(tmp_path):
    """Loaded and read through, 64 MB are still pages of the file; only what is written to becomes one's own."""
    own = lambda: int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    save_file({"a": torch.zeros(2**24)}, tmp_path / "a.safetensors")
    before = own()
    tensor = read_tensors(tmp_path / "a.safetensors", dtype=torch.float32)[0]["a"]
    assert tensor.max() == 0 and own() - before < 8
    tensor += 1
    assert own() - before > 56 and read_tensors(tmp_path / "a.safetensors")[0]["a"].max() == 0


def test_unconditional_teacher_clips_and_student_starts_as_its_equal(pixel):
    teacher = load_teacher(pixel())
    assert teacher.condition_type is None and teacher.shape == (3, 16, 16) and teacher.clip == 1.0
    student, eps, condition = new_student(teacher, 400, 1.0), noise([0, 1], teacher.shape), teacher.encode(["", ""])
    assert condition == {}
    assert student.network.config["class_embed_type"] == "timestep"         # diffusers opens it as it is
    f = teacher.denoise(eps, 1000)
    assert f.abs().max() == 1                               # 157 times a rounding error, clipped
    with torch.no_grad():
        x = teacher.schedule.sigma(400).float() * eps
        assert torch.equal(student(eps, 7).clamp(-1, 1), teacher.denoise(x, 400))
    with pytest.raises(BadInput, match="no empty condition to lead away from: --guidance 1"):
        new_student(teacher, 400, 3.0)


def test_class_conditional_teacher_takes_names_and_numbers(pixel):
    folder = pixel(num_class_embeds=3, resnet_time_scale_shift="scale_shift")
    (folder / "model_index.json").write_text(json.dumps({"id2label": {"0": "cat", "1": "dog", "2": ""}}))
    teacher = load_teacher(folder)
    assert teacher.condition_type == "label" and teacher.encode(["dog", "0", ""])["label"].tolist() == [1, 0, 2]
    with pytest.raises(BadInput, match="has no class 'cow': cat, dog"):
        teacher.encode(["cow"])
    eps, pets = noise([0, 1], teacher.shape), teacher.encode(["cat", "dog"])
    swapped, empty = ({"label": torch.tensor(label)} for label in ([1, 0], [2, 2]))
    assert teacher.uncond["label"].tolist() == [2]
    f = teacher.denoise(eps, 20, **pets)
    assert not torch.equal(f[0], teacher.denoise(eps, 20, **swapped)[0])
    assert f.abs().max() <= 1
    teacher.clip = None
    f, f_empty = teacher.denoise(eps, 20, **pets), teacher.denoise(eps, 20, **empty)
    assert torch.allclose(teacher.denoise(eps, 20, 1.5, **pets), f_empty + 1.5 * (f - f_empty), rtol=1e-4, atol=1e-4)
    student = new_student(teacher, 400, [1.0, 2.0])
    with torch.no_grad():
        x = teacher.schedule.sigma(400).float() * eps
        assert torch.equal(student(eps, 0, 1.5, **pets), teacher.denoise(x, 400, **pets))


@pytest.mark.parametrize("classes", [None, 3])
def test_pixel_teacher_from_training_to_picture(pixel, call, tmp_path, classes):
    folder, out = pixel(num_class_embeds=classes), tmp_path / "run"
    options = ["--steps", 2, "--batch", 4, "--ema", 0, "--grad-checkpointing", "--sample-every", 2, "--num-steps", 5]
    code, said, error = call("train", "--teacher", folder, "--out", out, *options)
    assert code == 0, error
    assert "tools.evaluate" not in said and ("--label 0" in said) == bool(classes)
    assert Image.open(out / "samples" / "step_2.png").size == (8 * 96, 2 * 96)
    named = re.search(r"sample.py (--student.*)", said)[1].split()
    code, said, error = call("sample", *named, "--out", tmp_path / "png", "--num", 2)
    assert code == 0 and Image.open(tmp_path / "png" / "000001.png").size == (16, 16), error
    assert load_student(out).teacher.condition_type == ("label" if classes else None)
    code, said, error = call("train", "--teacher", folder, "--out", out, *options[:1], 3, *options[2:])
    assert code == 0 and "resuming at step 2" in said, error                # without an average to restore
    if classes is None:
        for name, given in (("train", ["--teacher", folder, "--prompts", "README.md"]),
                            ("sample", ["--student", out, "--prompts", "README.md"])):
            code, _, error = call(name, *given, "--out", tmp_path / "told")
            assert code == 2 and ("is unconditional" in error or "neither --prompt nor --label" in error)


def test_unconditional_teacher_on_trained_weights(call, tmp_path):
    """The embedded pixel teacher's class "" moved into a bias: an unconditional network, from training to picture."""
    folder = shutil.copytree(TINY / "pixel", tmp_path / "t", ignore=shutil.ignore_patterns("student", "evaluation"))
    weights = {name: tensor.float() for name, tensor in load_file(folder / "unet" / WEIGHTS).items()}
    weights["time_embedding.linear_2.bias"] += weights.pop("class_embedding.weight")[10]
    save_file(weights, folder / "unet" / WEIGHTS)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"num_class_embeds": None}))
    teacher, whole = load_teacher(folder), load_teacher("tiny-pixel")
    eps = noise([0, 1], teacher.shape)
    for t in (1000, 500, 20):
        f, f_class = teacher.denoise(eps, t), whole.denoise(eps, t, **whole.encode(["", ""]))
        assert teacher.condition_type is None and torch.allclose(f, f_class, atol=1e-4)
    code, _, error = call("train", "--teacher", folder, "--out", tmp_path / "run", "--steps", 2, "--batch", 4,
                          "--sample-every", 0)
    assert code == 0, error
    code, _, error = call("sample", "--student", tmp_path / "run", "--out", tmp_path / "png")
    assert code == 0 and Image.open(tmp_path / "png" / "000000.png").size == (32, 32), error


@pytest.mark.parametrize("given, message", [
    (["--prompt", "x"], "takes --label"), (["--label", "9"], "has no class '9': 0, 1, 2"),
    ([], "nothing to paint: give --label")])
def test_sample_refuses_the_wrong_kind_of_condition(pixel, call, tmp_path, given, message):
    save_student(tmp_path / "student", new_student(load_teacher(pixel(num_class_embeds=3)), 400, 1.0))
    code, _, error = call("sample", "--student", tmp_path, "--out", tmp_path / "png", *given)
    assert code == 2 and message in error
