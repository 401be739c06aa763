"""What people have on disk and what they type: folders of many makers, wrong pictures, terminals, pipes, paths."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
import tools.evaluate
from plumbing.files import BadInput, read_json, write_json
from plumbing.hub import TINY
from plumbing.weights import WEIGHTS
from conftest import ROOT
from student import load_student
from plumbing.prompts import read_prompts
from teacher import load_teacher

PROMPT = "a red ankle boot on a yellow background"
PAINT = ["--prompt", PROMPT, "--prompt", "a blue coat on a white background"]


@pytest.fixture
def copy(tmp_path):
    """A private copy of the embedded teacher."""
    others = shutil.ignore_patterns("judge", "student", "evaluation", "pixel")
    return shutil.copytree(TINY, tmp_path / "teacher", ignore=others)


@pytest.fixture
def student(tmp_path):
    """A private copy of the shipped student."""
    return shutil.copytree(TINY / "student", tmp_path / "student")


def edit(path, **changes):
    write_json(path, read_json(path) | changes)


def scale(path, factor, part=""):
    """Multiply the weights whose name begins with part."""
    save_file({name: tensor.float() * (factor if name.startswith(part) else 1)
               for name, tensor in load_file(path).items()}, path)


def resize(folder, num):
    """Give a text encoder so many more embeddings, as resize_token_embeddings does."""
    path, name = folder / "text_encoder" / "model.safetensors", "text_model.embeddings.token_embedding.weight"
    weights = load_file(path)
    weights[name] = torch.cat([weights[name], weights[name][:num]])
    save_file(weights, path)
    edit(folder / "text_encoder" / "config.json", vocab_size=len(weights[name]))


def test_added_tokens_and_embeddings_must_be_equally_many(copy, tiny):
    first = len(tiny.tokenizer.vocab)
    (copy / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<cat-toy>": first}))
    with pytest.raises(BadInput, match=f"vocab_size = {first} is not supported: {first + 1}, the tokens of"):
        load_teacher(copy)
    resize(copy, 1)
    teacher = load_teacher(copy)
    assert first in teacher.tokenizer(["a <cat-toy>"])[0].tolist()
    assert torch.equal(teacher.encode([PROMPT])["text"], tiny.encode([PROMPT])["text"])
    (copy / "tokenizer" / "added_tokens.json").unlink()
    with pytest.raises(BadInput, match=f"vocab_size = {first + 1} is not supported: {first}, the tokens of"):
        load_teacher(copy)


def test_a_folder_saved_by_todays_library_is_the_same_teacher(copy, tiny):
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(copy / "tokenizer")
    shutil.rmtree(copy / "tokenizer")
    tokenizer.save_pretrained(copy / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(copy / "text_encoder")
    encoder.save_pretrained(copy / "text_encoder")
    assert not (copy / "tokenizer" / "vocab.json").exists()
    assert torch.equal(load_teacher(copy).encode([PROMPT, ""])["text"], tiny.encode([PROMPT, ""])["text"])


@pytest.mark.parametrize("source, change, message", [
    ("pixel", {"vqvae": ["diffusers", "VQModel"]}, "vqvae = .*'VQModel'.* is not supported"),
    ("pixel", {"vae": ["diffusers", "AutoencoderKL"]}, "a UNet2DModel on latents is not supported"),
    ("", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae = .*'AutoencoderTiny'.* is not supported: AutoencoderKL"),
    ("", {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "text_encoder_2 = .* is not supported"),
    ("", {"unet": ["diffusers", "UNet2DModel"]}, "_class_name = .*UNet2DConditionModel' is not supported: UNet2DModel"),
    ("", {"safety_checker": ["x", "StableDiffusionSafetyChecker"], "image_encoder": [None, None]}, None)])
def test_model_index_says_what_a_folder_is(tmp_path, source, change, message):
    others = shutil.ignore_patterns("judge", "student", "evaluation", "pixel")
    folder = shutil.copytree(TINY / source, tmp_path / "t", ignore=others)
    index = folder / "model_index.json"
    write_json(index, (read_json(index) if index.exists() else {"unet": ["diffusers", "UNet2DModel"]}) | change)
    if message is None:
        assert load_teacher(folder).shape == (4, 8, 8)
        return
    with pytest.raises(BadInput, match=message):
        load_teacher(folder)


@pytest.mark.parametrize("path, change, message", [
    ("scheduler/scheduler_config.json", {"beta_start": None}, "beta_start None is not supported"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 1000.0}, "num_train_timesteps 1000.0 is not supported"),
    ("scheduler/scheduler_config.json", {"clip_sample": "no"}, "clip_sample = 'no' is not supported"),
    ("model_index.json", {"id2label": ["cat"]}, r"id2label = \['cat'\] is not supported"),
    ("unet/config.json", {"sample_size": [32]}, r"sample_size = \[32\] is not supported"),
    ("unet/config.json", {"num_class_embeds": "11"}, "num_class_embeds = '11' is not supported")])
def test_a_value_of_the_wrong_kind_is_one_sentence(call, tmp_path, path, change, message):
    folder = shutil.copytree(TINY / "pixel", tmp_path / "t", ignore=shutil.ignore_patterns("student", "evaluation"))
    write_json(folder / path, (read_json(folder / path) if (folder / path).exists() else {}) | change)
    code, _, error = call("train", "--teacher", folder, "--out", tmp_path / "run")
    assert code == 2 and re.search(message, error) and error.count("\n") == 1, error


@pytest.mark.parametrize("name, change", [("pixel", {"sample_size": [32, 32]}), ("pixel", {"act_fn": "swish"}), (
    "", {"only_cross_attention": [False, False], "cross_attention_dim": [64, 64], "layers_per_block": [1, 1]})])
def test_values_that_mean_the_same_are_not_refused(tmp_path, name, change, tiny):
    others = shutil.ignore_patterns("judge", "student", "evaluation", "pixel")
    folder = shutil.copytree(TINY / name, tmp_path / "t", ignore=others)
    config = read_json(folder / "unet" / "config.json")
    change |= {"layers_per_block": [config["layers_per_block"]] * 2} if "layers_per_block" in change else {}
    edit(folder / "unet" / "config.json", **change)
    teacher, whole = load_teacher(folder), load_teacher(TINY / name)
    eps, words = torch.randn(1, *whole.shape), [PROMPT if name == "" else "bag"]
    assert teacher.fingerprint == whole.fingerprint and torch.equal(
        teacher.denoise(eps, 500, **teacher.encode(words)), whole.denoise(eps, 500, **whole.encode(words)))


def test_a_picture_may_be_wider_than_high(tmp_path):
    folder = shutil.copytree(TINY / "pixel", tmp_path / "t", ignore=shutil.ignore_patterns("student", "evaluation"))
    edit(folder / "unet" / "config.json", sample_size=[16, 32])
    teacher = load_teacher(folder)
    assert teacher.shape == (3, 16, 32)
    assert teacher.denoise(torch.randn(1, *teacher.shape), 500, **teacher.encode(["bag"])).shape == (1, 3, 16, 32)


@pytest.mark.parametrize("part", ["network", "VAE"])
def test_pictures_that_are_not_finite_are_not_painted(call, copy, student, tmp_path, part):
    edit(student / "student.json", teacher=str(copy))
    scale(student / WEIGHTS if part == "network" else copy / "vae" / WEIGHTS, 1e5,
          ("" if part == "network" else "decoder.") + "mid_block.resnets.1.conv2")
    paint = ["--student", student, "--prompt", PROMPT, "--seed", 7, "--out", tmp_path / "png"]
    code, _, error = call("sample", *paint, "--precision", "fp16")
    assert code == 2 and f"the picture of seed 7 is not finite, its {part} overflows in fp16: " in error, error
    assert "take --precision fp32 or bf16" in error
    assert not (tmp_path / "png").exists()
    assert call("sample", *paint, "--precision", "bf16")[0] == 0


def test_evaluation_of_a_broken_student_is_one_sentence(call, student, tmp_path):
    scale(student / WEIGHTS, torch.inf, "conv_out")
    code, _, error = call("tools.evaluate", "--student", student, "--images", 123, "--json", tmp_path / "e.json")
    assert code == 2 and "the picture of seed 0 is not finite, its network overflows in fp32" in error


def test_lines_of_a_prompt_file_end_at_newlines_only(tmp_path):
    prompts = ["a\u2028b", "c\x0bd\x0ce", "f\x1cg\x1dh\x1ei", "j\x85k", "l\u2029", "m"]
    (tmp_path / "p.txt").write_bytes("\r\n".join([*prompts[:3], "", " \t", *prompts[3:]]).encode())
    assert read_prompts(tmp_path / "p.txt") == prompts


@pytest.fixture
def quick(student, tmp_path, monkeypatch):
    """A function: (path beside the teacher's folder) -> options of an evaluation that takes seconds."""
    monkeypatch.setattr(tools.evaluate, "STEPS", (1, 2))
    monkeypatch.setattr(tools.evaluate, "EXACT", 2**10)
    others = shutil.ignore_patterns("student", "evaluation", "pixel")
    teacher = shutil.copytree(TINY, tmp_path / "tiny", ignore=others)
    return ["--student", student, "--teacher", teacher, "--images", 100, "--sweep"]


def test_evaluation_on_a_disk_that_cannot_be_written_warns_and_goes_on(call, quick, student, tmp_path):
    (tmp_path / "tiny" / "evaluation").write_text("in the way")
    (student / "evaluation.json").mkdir()
    code, out, error = call("tools.evaluate", *quick)
    assert code == 0 and "student      1    3    1" in out and error.count("measured, but not kept") == 3, error
    code, _, error = call("tools.evaluate", *quick, "--json", tmp_path / "tiny" / "evaluation" / "e.json")
    assert code == 2 and "can't write" in error


def test_the_small_decoder_is_for_the_students_rows_alone(call, quick, tmp_path):
    rows = []
    for name, options in (("own", ()), ("small", ("--decoder", TINY / "decoder"))):
        assert call("tools.evaluate", *quick, *options, "--json", tmp_path / f"{name}.json")[0] == 0
        rows.append(json.loads((tmp_path / f"{name}.json").read_text())["rows"])
    assert rows[0][0]["frechet"] == rows[1][0]["frechet"] and rows[0][-1]["frechet"] != rows[1][-1]["frechet"]


def test_rows_of_evaluations_picture_have_names(call, quick, tmp_path):
    assert call("tools.evaluate", *quick, "--json", tmp_path / "e.json")[0] == 0
    picture = Image.open(tmp_path / "e.png")
    margin = picture.width - 960
    assert margin > 40 and picture.height == 96 * 3
    for row in range(3):
        name = picture.crop((0, 96 * row, margin, 96 * (row + 1))).convert("L")
        assert name.getextrema()[0] < 100 and name.getpixel((0, 0)) == 255


def test_tools_run_as_files_too(run):
    for name in ("evaluate", "export", "bench", "gpu", "study", "synthesise", "train_tiny"):
        done = run(f"tools/{name}.py", "--help")
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def paint(tmp_path, shell, **env):
    line = f"{sys.executable} sample.py --prompt '🦝 on a boot' --num 20 --batch 5 --out {tmp_path / 'png'} {shell}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, env={**os.environ, **env}, timeout=120)
    assert len(list((tmp_path / "png").glob("*.png"))) == 20, done.stderr
    return done


def test_a_terminal_that_lacks_a_character_gets_its_escape(tmp_path):
    done = paint(tmp_path, "", PYTHONIOENCODING="cp1252")
    assert done.returncode == 0 and done.stdout.count(b"\\U0001f99d on a boot") == 20


@pytest.mark.parametrize("shell", ["| head -1", "2>&1 | head -1", ">&-", "2>&-", "| true"])
def test_all_is_painted_whoever_listens(tmp_path, shell):
    done = paint(tmp_path, f"{shell}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr, done.stderr


def test_a_prompt_that_is_not_utf8_is_painted_with_a_warning(run, tmp_path):
    done = run("sample.py", "--prompt", os.fsdecode(b"caf\xe9"), "--out", tmp_path)
    assert done.returncode == 0 and "is not UTF-8 text" in done.stderr, done.stderr
    assert Image.open(tmp_path / "000000.png").text["prompt"] == "caf\ufffd"


def test_out_may_name_the_file_of_one_picture_or_sheet(call, tmp_path):
    code, out, error = call("sample", "--prompt", PROMPT, "--out", tmp_path / "new" / "picture.png")
    assert code == 0 and Image.open(tmp_path / "new" / "picture.png").text["prompt"] == PROMPT, error
    code, _, error = call("sample", *PAINT, "--out", tmp_path / "two.png")
    assert code == 2 and "is one file, for 2 pictures: add --grid for a sheet, or give a folder" in error
    assert call("sample", *PAINT, "--grid", "--out", tmp_path / "two.png")[0] == 0
    sheet = Image.open(tmp_path / "two.png")
    assert sheet.size == (192, 96) and sheet.text["seed"] == "0 to 1" and sheet.text["prompt"].startswith(PROMPT)
    code, _, error = call("sample", "--prompt", PROMPT, "--out", tmp_path / "picture.jpg")
    assert code == 2 and "pictures are .png files" in error
    (tmp_path / "folder.png").mkdir()
    assert call("sample", "--prompt", PROMPT, "--out", tmp_path / "folder.png")[0] == 0
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"new/picture.png", "two.png", "folder.png/000000.png", "folder.png/index.jsonl"}


def test_a_mistyped_path_is_not_asked_for_at_the_hub(call, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "fetch", lambda *_: pytest.fail("the hub was asked"))
    code, _, error = call("train", "--teacher", "tiny/pixle", "--out", tmp_path / "run")
    assert code == 2 and "tiny/pixle does not exist" in error and "did you mean tiny/pixel?" in error
    code, _, error = call("train", "--teacher", TINY / "pixle", "--out", tmp_path / "run")
    assert code == 2 and f"did you mean {TINY / 'pixel'}?" in error
    code, _, error = call("train", "--teacher", "sd-21", "--out", tmp_path / "run")
    assert code == 2 and "did you mean sd21?" in error
    code, _, error = call("train", "--teacher", TINY / "nothing-like-it", "--out", tmp_path / "run")
    assert code == 2 and "did you mean" not in error
    code, _, error = call("sample", "--student", "tiny/studnet", "--prompt", PROMPT)
    assert code == 2 and "did you mean tiny/student?" in error


@pytest.mark.parametrize("spec, repo, revision", [
    ("https://huggingface.co/some/body", "some/body", None), ("https://huggingface.co/some/body/", "some/body", None),
    ("http://hf.co/some/body/tree/main", "some/body", "main"), ("some/body/", "some/body", None),
    ("https://www.huggingface.co/some/body/tree/refs%2Fpr%2F1/unet?x=1#y", "some/body", "refs/pr/1"),
    ("https://huggingface.co/some/body.v2?library=x", "some/body.v2", None), ("some/body@v1", "some/body", "v1")])
def test_addresses_of_the_hub_are_understood(monkeypatch, spec, repo, revision):
    asked = []
    monkeypatch.setattr(checkpoint, "fetch", lambda *what: asked.append(what) or TINY)
    assert checkpoint.resolve(spec) == (TINY, spec.rstrip("/"))
    load_student(spec)
    assert asked == [(repo, revision)] * 2 and checkpoint.last_name(spec) == repo.split("/")[1]


def test_trailing_slashes_of_names_and_folders(tmp_path, monkeypatch):
    assert checkpoint.resolve(f"{TINY}/pixel/") == checkpoint.resolve(TINY / "pixel")
    monkeypatch.chdir(tmp_path)
    assert checkpoint.resolve("tiny/") == checkpoint.resolve("tiny") and checkpoint.is_embedded("tiny/")
    (tmp_path / "sd21").mkdir()                             # a folder, though sd21 is a name
    assert checkpoint.resolve("sd21/")[0].resolve() == tmp_path / "sd21"


def test_a_hub_id_of_which_a_folder_has_the_owners_name(tmp_path, monkeypatch):
    """What the message advises leads to a teacher that is found again."""
    (tmp_path / "google").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "fetch", lambda *_: TINY)
    with pytest.raises(BadInput, match="if the hub's google/ddpm is meant, give its address, http") as caught:
        checkpoint.resolve("google/ddpm")
    spec = checkpoint.resolve(re.search(r"http\S+", str(caught.value))[0])[1]
    assert checkpoint.resolve(spec) == (TINY, spec)


@pytest.mark.parametrize("spec", ["https://civitai.com/models/4384", "https://huggingface.co/gpt2", "a/b/c"])
def test_other_addresses_are_refused(spec):
    with pytest.raises(BadInput, match="nor a hub id"):
        checkpoint.resolve(spec)


@pytest.mark.parametrize("spec", ["v1-5.safetensors", "a/x.ckpt", "https://huggingface.co/a/b/blob/main/x.safetensors"])
def test_a_single_file_gets_the_sentence_that_helps(call, tmp_path, spec):
    for line in (["train", "--teacher", spec, "--out", tmp_path], ["sample", "--prompt", "x", "--student", spec]):
        code, _, error = call(*line)
        assert code == 2 and "is one file, not a folder" in error and "from_single_file" in error, error
