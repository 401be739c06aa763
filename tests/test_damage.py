"""Damage by machine: whatever befalls a file of a teacher, a student or a run.

A command then does its work, or ends with one sentence and exit code 2. A missing, unexpected or mis-shaped tensor, and
any damage of a run's state, is always refused. What a refused run has saved stays as it is. Most of the damage is slow;
`DAMAGE_SEED=1 DAMAGE_COUNT=5000 python -m pytest -m "" tests/test_damage.py` draws other damage.
"""

import json
import math
import os
import random
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save

from conftest import PROMPTS, TINY, slow
from forks import train_forked

SEED, COUNT = (int(os.environ.get(name, value)) for name, value in (("DAMAGE_SEED", 0), ("DAMAGE_COUNT", 350)))
FAST = 9                     # one in so many is not slow
VALUES = [None, True, "x", -1, 0, 1.5, 1e300, [], {}, [[]]]
NO_TEACHER = shutil.ignore_patterns("judge", "decoder", "student", "evaluation", "pixel", "*.png", "*.md")


# ------------------------------------------- kinds of damage: of a file's bytes, for which they return others or none
def truncated(rng, content):
    return content[:rng.randrange(len(content))]


def flipped(rng, content):
    """One to eight bits, half of the time near the beginning, where tensors have their header."""
    content, end = bytearray(content), len(content)
    for bit in rng.choices(range(8 * rng.choice([end, min(end, 2000)])), k=rng.randint(1, 8)):
        content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


def replaced(rng, content):
    values = [json.dumps(value).encode() for value in VALUES]
    return rng.choice([b"", b"[" * 100_000, '{"caf\xe9": 1}'.encode("latin-1"), rng.randbytes(1000), *values])


def missing(rng, content):
    return None


def changed_entry(rng, content):
    """An entry of JSON, at any depth, gets another value or goes."""
    whole = json.loads(content)
    container, key = rng.choice(list(entries(whole)))
    container[key] = rng.choice(VALUES)
    if rng.random() < 0.2:
        del container[key]
    return json.dumps(whole).encode() + b"\n"


def entries(value):
    """(container, key) of everything in a JSON value, at any depth."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from entries(value[key])


def misfit(rng, content):
    """A tensor of another type, or of one row or column that would broadcast; one too few, one too many."""
    tensors = load(content)
    name = rng.choice(sorted(name for name, tensor in tensors.items() if tensor.numel() > 1))
    dim, tensor = rng.choice([dim for dim, size in enumerate(tensors[name].shape) if size > 1]), tensors.pop(name)
    return save(tensors | rng.choice([{}, {name: tensor, f"{name}.x": torch.ones(2)}, {name: tensor.to(torch.int64)},
                                      {name: tensor.narrow(dim, 0, 1).contiguous()}]))


def not_finite(rng, content):
    tensors = load(content)
    tensor = tensors[rng.choice(sorted(tensors))].view(-1)
    tensor[rng.randrange(len(tensor))] = rng.choice([math.nan, math.inf])
    return save(tensors)


DAMAGE = [*[("*", kind) for kind in (truncated, flipped, replaced, missing) * 2], *[("*.json*", changed_entry)] * 6,
          *[("*.safetensors", kind) for kind in (misfit, misfit, not_finite)]]


# -------------------------------------------------------------------------------------------------------- what befalls
@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """name -> folder: what is damaged, in copies."""
    out = tmp_path_factory.mktemp("whole") / "run"
    codes, printed = train_forked(out, 1, "--batch", 4, "--steps", 2, "--samples", 0)
    assert codes == [0], printed
    return {"teacher": TINY, "run": out, "pixel teacher": TINY / "pixel", "student": TINY / "student",
            "student of a run": out / "student"}


def link(source, copy):
    """A link, but for the log, which is appended to; all else is replaced by renaming."""
    (shutil.copy if source.endswith(".jsonl") else os.symlink)(source, copy)


def choose_command(rng, name, copy, out):
    if "teacher" in name:
        part = ["--steps", 1] if rng.random() < 0.05 else ["--dry-run"]
        return "train", "--teacher", copy, "--batch", 2, "--samples", 1, "--out", out, *part
    if name == "run" and rng.random() < 0.7:
        return "train", "--batch", 4, "--steps", 3, "--samples", 0, "--out", copy
    return "sample", "--student", copy, "--prompt", PROMPTS[0], "--out", out


def files(folder, *parts):
    """{path: bytes} of the files in these parts of a folder."""
    return {path: path.read_bytes() for part in parts for path in (folder / part).rglob("*")
            if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("number", [slow(number) if number % FAST else number for number in range(COUNT)])
def test_damage_costs_one_sentence_at_most(call, originals, tmp_path, number):
    rng, copy, out = random.Random(f"{SEED} {number}"), tmp_path / "copy", tmp_path / "out"
    name = list(originals)[number % len(originals)]
    pattern, kind = DAMAGE[number // len(originals) % len(DAMAGE)]
    shutil.copytree(originals[name], copy, copy_function=link, ignore=NO_TEACHER if "teacher" in name else None)
    path = rng.choice([path for path in sorted(copy.rglob(pattern)) if path.is_file() and path.stat().st_size])
    content = kind(rng, path.read_bytes())
    path.unlink()                                           # the link
    if content is not None:
        path.write_bytes(content)
    command = choose_command(rng, name, copy, out)
    about = f"DAMAGE_SEED={SEED} [{number}]: {name}, {path.relative_to(copy)} {kind.__name__}; {command}"
    before, inside = files(copy, "student", "state"), path.relative_to(copy).parts
    code, _, stderr = call(*command)
    of_state = command[0] == "train" and "state" in inside
    refused = of_state or kind is misfit and (name != "run" or command[0] == "sample" and "student" in inside)
    said = [line for line in re.split("[\r\n]+", stderr) if not re.match(r"warning: | *\d+%.*\]$| *$", line)]
    assert code in (2, 2 * refused), f"{about}: exit code {code} {stderr}"
    assert [line[:7] for line in said] == ["error: "] * (code == 2), f"{about}: {stderr}"
    assert code == 0 or files(copy, "student", "state") == before, f"{about}: refused, but the checkpoint has changed"
    for made in out.rglob("*.png"):
        Image.open(made).load()
    assert all(tensor.isfinite().all() for made in out.rglob("*.safetensors") for tensor in load_file(made).values())
