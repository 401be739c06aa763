"""sample.py: many pictures, in any order and number of processes; films; what is skipped, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from plumbing.hub import TINY
from conftest import ROOT

PROMPT, OTHER = "a red ankle boot on a yellow background", "a blue bag on a white background"


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "index.jsonl"}


def index(folder):
    return [json.loads(line) for line in (folder / "index.jsonl").read_text(encoding="utf-8").split("\n") if line]


def sample(call, *options):
    code, printed, error = call("sample", *options)
    assert code == 0, error
    return printed


def test_seeds_are_numbers_and_ranges_and_each_prompt_is_painted_from_each(call, tmp_path):
    sample(call, "--prompt", PROMPT, "--prompt", OTHER, "--seed", 7, "10:12", "--out", tmp_path / "many")
    names = [f"{seed:06d}-{k}.png" for seed in (7, 10, 11, 12) for k in range(2)]
    assert sorted(files(tmp_path / "many")) == names
    assert [(line["file"], line["seed"], line["prompt"]) for line in index(tmp_path / "many")] == [
        (name, int(name[:6]), (PROMPT, OTHER)[int(name[7])]) for name in names]
    sample(call, "--prompt", OTHER, "--seed", 11, "--out", tmp_path / "one")
    assert abs(pixels(tmp_path / "one" / "000011.png") - pixels(tmp_path / "many" / "000011-1.png")).max() <= 1


def test_each_prompt_is_encoded_once(call, tmp_path, monkeypatch):
    from teacher import Teacher
    seen = []

    def encode(teacher, prompts):
        seen.extend(prompts)
        return original(teacher, prompts)
    original = Teacher.encode
    monkeypatch.setattr(Teacher, "encode", encode)
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([PROMPT, OTHER, PROMPT, "a pink dress on a blue background"]))
    sample(call, "--prompts", path, "--num", 9, "--batch", 4, "--out", tmp_path)
    asked = sorted(prompt for prompt in seen if prompt)     # beside the empty one
    assert len(files(tmp_path)) == 37 and asked == sorted({PROMPT, OTHER, "a pink dress on a blue background"})


def test_the_same_command_skips_what_is_whole_and_paints_what_is_not(call, tmp_path):
    command = ("--prompt", PROMPT, "--prompt", OTHER, "--num", 5, "--batch", 4, "--out", tmp_path)
    sample(call, *command)
    first, times = files(tmp_path), {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "000003.png").write_bytes(first["000003.png"][:-100])              # as a machine's crash leaves it,
    (tmp_path / "000005.png").write_bytes(first["000005.png"][:-100] + bytes(100))  # or so
    (tmp_path / "000008.png").unlink()
    (tmp_path / "000009.png").write_bytes(first["000001.png"])                      # another picture
    sample(call, *command)
    assert files(tmp_path) == first
    touched = {path.name for path in tmp_path.glob("*.png") if path.stat().st_mtime_ns != times[path.name]}
    assert touched == {"000003.png", "000005.png", "000008.png", "000009.png"}
    sample(call, "--prompt", OTHER, "--num", 2, "--out", tmp_path)                  # the same names, something else
    assert Image.open(tmp_path / "000000.png").text["prompt"] == OTHER
    assert [line["prompt"] for line in index(tmp_path)] == [OTHER, OTHER, *(2 * [PROMPT, OTHER] * 2)]


def test_a_killed_command_goes_on_to_the_same_pictures(tmp_path):
    command = [sys.executable, "sample.py", "--prompts", "tiny/prompts.txt", "--batch", "8", "--out"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for kill_at in (40, 700):
        process = subprocess.Popen([*command, tmp_path / "killed"], cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
        while len(list((tmp_path / "killed").glob("*.png"))) < kill_at and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    for name in ("killed", "whole"):
        subprocess.run([*command, tmp_path / name], cwd=ROOT, env=env, check=True, capture_output=True)
    (tmp_path / "killed").joinpath("stray.new").touch()
    for path in (tmp_path / "killed").glob("*.new"):        # of a picture that was being written
        path.unlink()
    whole = files(tmp_path / "whole")
    assert len(whole) == 1512 and files(tmp_path / "killed") == whole
    assert (tmp_path / "killed" / "index.jsonl").read_text() == (tmp_path / "whole" / "index.jsonl").read_text()


def test_two_processes_share_the_pictures_that_one_makes(tmp_path):
    command = ["sample.py", "--prompts", "tiny/showcase.txt", "--num", "5", "--batch", "8", "--out"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command, tmp_path / "one"], cwd=ROOT, env=env, check=True, capture_output=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    subprocess.run([*torchrun, *command, tmp_path / "two"], cwd=ROOT, env=env, check=True, capture_output=True)
    assert len(files(tmp_path / "one")) == 40 and files(tmp_path / "two") == files(tmp_path / "one")


PIXEL = ("--student", "tiny/pixel", "--label", "ankle boot")


@pytest.mark.parametrize("given, first, last", [
    (("--prompt", PROMPT, "--seed", 3, 8), ("--prompt", PROMPT, "--seed", 3), ("--prompt", PROMPT, "--seed", 8)),
    (("--prompt", PROMPT, "--prompt", OTHER, "--seed", 3), ("--prompt", PROMPT, "--seed", 3), ("--prompt", OTHER,
     "--seed", 3)),
    (("--prompt", PROMPT, "--seed", 1, 2, 5), ("--prompt", PROMPT, "--seed", 1), ("--prompt", PROMPT, "--seed", 5)),
    (PIXEL, (*PIXEL, "--seed", 0), (*PIXEL, "--seed", 1))])
def test_an_interpolation_begins_and_ends_where_it_should_and_moves_smoothly(call, tmp_path, given, first, last):
    sample(call, *given, "--interpolate", 24, "--out", tmp_path / "film")
    sample(call, *first, "--out", tmp_path / "first.png")
    sample(call, *last, "--out", tmp_path / "last.png")
    frames = [pixels(path) for path in sorted((tmp_path / "film").glob("frame_*.png"))]
    assert len(frames) == 24
    assert abs(frames[0] - pixels(tmp_path / "first.png")).max() <= 1
    assert abs(frames[-1] - pixels(tmp_path / "last.png")).max() <= 1
    steps = [((a - b) ** 2).mean() ** 0.5 for a, b in zip(frames, frames[1:])]
    assert 0 < np.median(steps) and max(steps) < 3 * np.median(steps)
    film = Image.open(tmp_path / "film" / "interpolation.webp")
    assert film.n_frames == 46 and film.size[0] >= 96       # there and back


@pytest.mark.parametrize("options, message", [
    (("--prompt", PROMPT, "--num", 2, "--seed", 1, 2), "--num counts on from one --seed"),
    (("--prompt", PROMPT, "--seed", "5:3"), "--seed 5:3 is not supported"),
    (("--prompt", PROMPT, "--seed", "x"), "--seed x is not supported"),
    (("--prompt", PROMPT, "--seed", "5:"), "--seed 5: is not supported"),
    (("--prompt", PROMPT, "--seed", "0:4000000000"), "more than a call makes"),
    (("--prompt", PROMPT, "--seed", "0:9", "--interpolate", 3), "10 or more"),
    (("--prompt", PROMPT, "--num", 2, "--interpolate", 3), "without --compare and --num"),
    (("--prompt", PROMPT, "--interpolate", 0), "--interpolate 0 is not supported: 2 to"),
    (("--prompt", PROMPT, "--guidance", 3, 4), "--guidance 4.0 is not supported by this student"),
    (("--prompt", PROMPT, "--interpolate", 1), "--interpolate 1 is not supported: 2 to"),
    (("--prompt", PROMPT, "--interpolate", "--compare", 4), "without --compare"),
    (("--prompt", PROMPT, "--prompt", OTHER, "--seed", 1, 2, 3, "--interpolate"), "3, 2 and 1"),
    (("--student", TINY / "pixel", "--label", "bag", "--label", "coat", "--interpolate"), "nothing between two labels"),
    (("--student", TINY / "pixel", "--label", "bag", "--decoder", TINY / "decoder"), "it needs no decoder"),
    (("--prompt", PROMPT, "--decoder", TINY / "vae"), "AutoencoderKL"),
    (("--prompt", PROMPT, "--interpolate", 4, "--out", "film.png"), "--interpolate takes a folder")])
def test_what_can_not_be_is_one_sentence(call, options, message):
    code, _, error = call("sample", *options)
    assert code == 2 and message in error and "Traceback" not in error


def test_compiled_networks_paint(call, tmp_path, monkeypatch):
    """By dynamo alone: what inductor makes of it is torch's, and takes a minute."""
    compiled = []

    def compile(function, **_):
        compiled.append(function.__name__)
        return original(function, backend="eager")
    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    sample(call, "--prompt", PROMPT, "--out", tmp_path / "plain.png")
    sample(call, "--prompt", PROMPT, "--compile", "--out", tmp_path / "compiled.png")
    assert abs(pixels(tmp_path / "plain.png") - pixels(tmp_path / "compiled.png")).max() <= 1
    assert compiled == ["_call_impl", "decode"]


def test_bench_paints_as_many_pictures_as_it_says(call, tmp_path):
    code, printed, error = call("tools.bench", "--pictures", 35, "--repeat", 1, "--json", tmp_path / "pictures.json")
    found = json.loads((tmp_path / "pictures.json").read_text())
    assert code == 0 and "35 pictures, 16 at once" in printed and 0 < found["ratio"], error


def test_the_small_decoder_paints_nearly_the_same(call, tmp_path):
    for name, options in (("own", ()), ("small", ("--decoder", TINY / "decoder"))):
        sample(call, "--prompt", PROMPT, "--num", 8, *options, "--out", tmp_path / name)
    errors = [pixels(tmp_path / "own" / name) - pixels(tmp_path / "small" / name) for name in files(tmp_path / "own")]
    assert 0 < np.mean(np.square(errors)) ** 0.5 < 10       # of 255
    assert len({Image.open(tmp_path / name / "000000.png").text["decoder"] for name in ("own", "small")}) == 2


def test_an_index_keeps_what_lies_beside_and_a_broken_one_is_said_first(call, tmp_path):
    sample(call, "--prompt", "a bag\u2028of three", "--num", 2, "--out", tmp_path)
    (tmp_path / "000001.png").unlink()
    sample(call, "--prompt", PROMPT, "--seed", 5, "--out", tmp_path)
    assert [line["file"] for line in index(tmp_path)] == ["000000.png", "000005.png"]
    (tmp_path / "index.jsonl").write_text('{"file": "000')
    code, _, error = call("sample", "--prompt", PROMPT, "--seed", 9, "--out", tmp_path)
    assert code == 2 and "index.jsonl" in error and not (tmp_path / "000009.png").exists()
