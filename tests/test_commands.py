"""Every command of train.py, sample.py, tools/ and dev/ ends bad input with one sentence and exit code 2.

Without a traceback, and before it has written anything. A machine whose memory does not suffice gets a sentence, too.
"""

import re
import runpy
import sys

import pytest
import torch

from conftest import ROOT
from plumbing.files import command

COMMANDS = [path for folder in (ROOT, ROOT / "tools", ROOT / "dev") for path in sorted(folder.glob("*.py"))
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
    ("train --guidance 5:2", "--guidance 5:2 is neither a number nor LO:HI"),
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
    ("tools/export --out {bad}", "is not empty: give a new folder"),
    ("tools/export --student tiny/pixel --lora 8", "--lora and --single-file are for students of Stable Diffusion"),
    ("tools/export --lora 0", "--lora 0 is neither a rank"),
    ("tools/export --private", "--private goes with --push"),
    ("tools/curves {bad}", "log.jsonl: No such file"),
    ("dev/bench --teacher nosuch", "'nosuch' is neither a name (tiny"),
    ("dev/synthesise {bad} {bad}/run", "is missing"),
    ("dev/train_tiny --data {bad} --out {bad} --work {bad}", "apt-get install dataset-fashion-mnist")])
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


def test_out_of_memory_says_what_to_do(capsys):
    with pytest.raises(SystemExit, match="2"):
        command(lambda: torch.empty(2**50))
    assert capsys.readouterr().err.startswith("error: out of memory, give half the --micro-batch")
