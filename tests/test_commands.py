"""Every command of train.py, sample.py, tools/, lab/ and dev/ ends bad input with one sentence and exit code 2.

Without a traceback, and before it has written anything. A machine whose memory does not suffice gets a sentence, too.
The commands that the pages show have options that exist.
"""

import re
import runpy
import shlex
import shutil
import sys
from argparse import ArgumentParser

import pytest
import torch
from PIL import Image

from conftest import ROOT, copy_tiny
from dev.commands import IS_OLD, IS_PATTERN, PAGES, commands_of, why_not
from plumbing.files import command

COMMANDS = [path for folder in (".", "tools", "lab", "dev") for path in sorted((ROOT / folder).glob("*.py"))
            if "command(main)" in path.read_text(encoding="utf-8")]


@pytest.fixture
def bad(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.fixture
def script(monkeypatch, capsys):
    """A function: a command's file and options -> its exit code and what it says on stderr. It runs as __main__."""
    monkeypatch.chdir(ROOT)

    def script(path, *options):
        monkeypatch.setattr(sys, "argv", [str(path), *options])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        return stop.value.code, capsys.readouterr().err
    return script


@pytest.mark.parametrize("line, message", [
    ("train --teacher nosuch", "'nosuch' is neither a name (tiny"),
    ("train --steps 1 2", "unrecognized arguments: 2"),
    ("train --guidance 5:2", "argument --guidance: 5:2 is neither a number nor LO:HI"),
    ("train --lr -1", "--lr = -1.0 is not supported: a number from 0 to 10"),
    ("train --input-time 1001", "--input-time = 1001 is not supported: a whole number from 1 to 1000"),
    ("train --batch 0", "--batch = 0 is not supported: a whole number from 1 to 1000000"),
    ("train --shard", "--shard splits the networks over several processes: start it with torchrun"),
    ("train --batch 10 --micro-batch 4", "--micro-batch 4 does not divide 10"),
    ("train --prompts {bad}/empty.txt", "empty.txt holds no prompt"),
    ("train --prompts {bad}/latin1.txt", "latin1.txt is not UTF-8 text (byte 3)"),
    ("train --prompts {bad}/none.txt", "none.txt is missing"),
    ("train --out {bad}/file/run", "can't write"),
    ("train --device nosuch", "--device nosuch is not available"),
    ("sample", "takes --prompt TEXT, or --prompts FILE"),
    ("sample --student tiny/pixel --label bag --label hat", "has no class 'hat': "),
    ("sample --prompt x --decoder tiny/vae", "AutoencoderKL"),
    ("sample --prompt x --student {bad}", "holds no student"),
    ("sample --prompt x --teacher {bad}", "holds no model in the diffusers layout: there is no scheduler_config.json"),
    ("sample --prompts none.txt", "none.txt is missing"),
    ("sample --prompt x --num 2 --seed 1 2", "--num = 2 is not supported: 1 to 1000000, or 1 with several seeds"),
    ("sample --prompt x --seed 5:3", "--seed: 5:3 is not supported: a number from 0 to 2^62"),
    ("sample --prompt x --seed -1", "--seed: -1 is not supported"),
    ("sample --prompt x --guidance 40", "--guidance 40.0 is not supported by this student"),
    ("sample --prompt x --compare 4 1001", "--compare = 1001 is not supported: a whole number from 1 to 1000"),
    ("sample --prompt x --out {bad}/file", "can't write"),
    ("sample --prompt x --prompt y --out two.png", "is one file, for 2 images: give a folder"),
    ("sample --prompt x --out 2.jpg", "a .png file"),
    ("tools/interpolate --prompt x --seed 1 2 --guidance 1 2 3", "is not supported by this student"),
    ("tools/interpolate --prompt x --prompt y --prompt z --seed 1 2", "but these are 2, 3 and 1"),
    ("tools/interpolate --student tiny/pixel --label bag --label coat", "between two labels"),
    ("tools/interpolate --prompt x --seed 1 2 --frames 1", "--frames = 1 is not supported: 2 to 9999"),
    ("tools/interpolate --prompt x --seed 1 2 --out a.png", "take a folder"),
    ("tools/evaluate --images 5", "--images 5 is too few"),
    ("tools/export --out {bad}", "is there, and not empty: give a new name"),
    ("tools/export --student tiny/pixel --lora 8", "--lora and --single-file are for students of Stable Diffusion"),
    ("tools/export --lora 0", "--lora 0 is neither a rank"),
    ("tools/export --lora 1 --single-file --out {bad}/pytorch_lora_weights", "would have the name of the LoRA"),
    ("tools/export --private", "--private goes with --push"),
    ("tools/curves {bad}", "log.jsonl: No such file"),
    ("dev/bench --teacher nosuch", "'nosuch' is neither a name (tiny"),
    ("dev/synthesise {bad} {bad}/run", "is missing"),
    ("dev/train_tiny --data {bad} --out {bad}/new --work {bad}", "apt-get install dataset-fashion-mnist")])
def test_bad_input_is_one_sentence_and_exit_code_2(script, bad, line, message):
    name, *options = line.format(bad=bad).split()
    out = ["--out", str(bad / "run")] if name in ("train", "tools/export") and "--out" not in options else []
    code, said = script(f"{name}.py", *options, *out)
    error = said[said.index("error: "):]                    # argparse says before it how the command is used
    assert code == 2 and message in error and error.count("\n") == 1, said
    assert not (bad / "run").exists()


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_command_says_how_it_is_run(script, path):
    code, said = script(path, "--nonsense")
    assert code == 2 and re.search(r"error: .*(--nonsense|required)", said), said


@pytest.mark.parametrize("line, names", [
    ("train --teacher tiny-pixel --steps 1 --out {out}",
     "config.json log.jsonl samples/step_1.png student/config.json state/step_1/checkpoint.json state/step_1.new/x"),
    ("sample --prompt x --num 2 --out {out}", "x_000001.png"), ("sample --prompt x --grid --out {out}", "grid.png"),
    ("sample --prompt x --out {out}/a.png", "a.png"), ("sample --prompt x --grid --out {out}/a.png", "a.png"),
    ("tools/interpolate --prompt x --frames 2 --grid --out {out}",
     "grid.png frame_0001.png frame_0300.png interpolation.webp"),
    ("tools/evaluate --images 100 --json {out}/a.json", "a.json a.png"), ("tools/export --out {out}", "a"),
    ("tools/curves {bad} --out {out}/a.png", "a.png"), ("dev/bench --json {out}/a.json", "a.json"),
    ("dev/kill --out {out}", "killed/config.json whole/config.json"), ("dev/figure --out {out}/a.png", "a.png"),
    ("lab/toy --out {out}/a.png", "a.png"), ("lab/frontier --out {out}/a.png", "a.png"),
    ("dev/synthesise tests/checkpoints/taesd {out}", "config.json"),
    ("dev/train_tiny --stages tokenizer --work {bad} --out {out}", "model_index.json prompts.txt"),
    ("dev/train_tiny --stages vae --data {bad} --work {out} --out {bad}/new", "vae.pt")])
def test_what_this_project_did_not_write_is_never_replaced(script, bad, line, names):
    """Nor deleted: whatever has a name that a command would write."""
    out = bad / "out"
    (bad / "log.jsonl").write_text('{"step": 10, "lr": 1.0}\n')
    Image.new("RGB", (8, 8)).save(bad / "image.png")
    Image.new("RGB", (8, 8)).save(bad / "image.webp")
    for file in names.split():
        for content in (b"", b"notes", b'{"lr": 1}', *(path.read_bytes() for path in bad.glob("image.*"))):
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            (out / file).write_bytes(content)
            program, *options = line.format(out=out, bad=bad).split()
            code, said = script(f"{program}.py", *options)
            assert code == 2 and len(re.findall("^error: .*(was not made by|is there, and not)", said, re.M)) == 1, said
            assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == {out / file: content}, file
            shutil.rmtree(out)


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "samples", "student"])
def test_a_link_that_leads_nowhere_is_somebodys_too(script, bad, name):
    (bad / "out").mkdir()
    (bad / "out" / name).symlink_to("gone")
    code, said = script("train.py", "--teacher", "tiny-pixel", "--steps", "1", "--out", str(bad / "out"))
    assert code == 2 and f"{name} was not made by this project" in said and [*(bad / "out").iterdir()] == [
        bad / "out" / name]


def test_a_teachers_folder_is_no_place_for_its_student(script, tmp_path):
    """A pixel model may lie flat in a folder."""
    flat = copy_tiny(tmp_path / "flat", "pixel")
    for part in ("unet", "scheduler"):
        for path in (flat / part).iterdir():
            path.rename(flat / path.name)
        (flat / part).rmdir()
    (flat / "model_index.json").unlink()
    before = {path: path.read_bytes() for path in flat.rglob("*") if path.is_file()}
    code, said = script("train.py", "--teacher", str(flat), "--out", str(flat))
    assert code == 2 and f"{flat}/config.json was not made by this project" in said
    assert {path: path.read_bytes() for path in flat.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("line", [
    "train --out ~nosuchuser/x", "train --teacher ~nosuchuser/x", "train --prompts ~nosuchuser/x",
    "sample --prompt x --student ~nosuchuser/x", "sample --prompt x --out ~nosuchuser/x",
    "tools/evaluate --json ~nosuchuser/x", "tools/export --out ~nosuchuser/x", "tools/curves ~nosuchuser/x"])
def test_a_home_folder_that_is_not_there_is_one_sentence(script, line):
    name, *options = line.split()
    code, said = script(f"{name}.py", *options)
    assert code == 2 and "~nosuchuser/x: there is no such user" in said.splitlines()[-1]


def test_a_home_folder_is_found_in_every_path(script, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    copy_tiny(tmp_path / "teacher", "pixel")
    (tmp_path / "p.txt").write_text("bag\n")
    for line in ("train.py --teacher=~/teacher --prompts=~/p.txt --steps=1 --batch=1 --samples=0 --out=~/r",
                 "sample.py --student=~/r --teacher=~/teacher --label=bag --out=~/png",
                 "tools/export.py --student=~/r --out=~/x"):
        program, *options = line.split()
        monkeypatch.setattr(sys, "argv", [program, *options])
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert (tmp_path / "png" / "bag_000000.png").exists() and (tmp_path / "x" / "README.md").exists()
    assert not (ROOT / "~").exists()


def test_a_safe_path_leaves_out_no_module(run, monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    for name in ("train.py", "sample.py"):
        assert "--teacher" in run(name, "--help").stdout


def test_out_of_memory_says_what_to_do(capsys):
    with pytest.raises(SystemExit, match="2"):
        command(lambda: torch.empty(2**50))
    assert capsys.readouterr().err.startswith("error: out of memory, give half the --micro-batch")


class Parsed(Exception):
    pass


@pytest.mark.parametrize("page", PAGES)
def test_the_options_of_every_command_of_the_pages_exist(page, call, monkeypatch):
    """Each is run as far as its options are read. `python -m dev.commands` runs them to the end."""
    parse = ArgumentParser.parse_args

    def parse_and_stop(parser, args=None, namespace=None):
        parse(parser, args, namespace)
        raise Parsed
    monkeypatch.setattr(ArgumentParser, "parse_args", parse_and_stop)
    for text in commands_of(page):
        if why_not(text) in (IS_PATTERN, IS_OLD) or "ComfyUI" in text:
            continue
        words = shlex.split(text)
        script = next((k for k, word in enumerate(words) if word.endswith(".py")), None)
        name = words[script].removesuffix(".py") if script else words[words.index("-m") + 1]
        if name == "http.server":
            continue
        name = "lab.__main__" if name == "lab" else name
        rest = words[script + 1:] if script else words[words.index("-m") + 2:]
        with pytest.raises(Parsed):
            call(name, *rest)
            raise AssertionError(text)
