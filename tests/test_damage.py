"""Damage by machine: whatever befalls a file of a teacher, a student or a run.

A command then does its work, or ends with one sentence and exit code 2. A missing, unexpected or mis-shaped tensor is
always refused. What a refused run has saved stays as it is. Most of the damage is slow;
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
from safetensors import safe_open
from safetensors.torch import load_file, save

from conftest import PROMPTS, TINY
from forks import train_forked

SEED, COUNT = (int(os.environ.get(name, value)) for name, value in (("DAMAGE_SEED", 0), ("DAMAGE_COUNT", 350)))
FAST = 9                     # one in so many is not slow
VALUES = [None, True, "x", -1, 0, 1.5, 1e300, [], {}, [[]]]
CONTENTS = [b"", b"[" * 100_000, '{"caf\xe9": 1}'.encode("latin-1")]
TEXTS = ["", "x", "-1", "1e3", "null", "[]", "{}", "[" * 100_000]
NO_TEACHER = shutil.ignore_patterns("judge", "decoder", "student", "evaluation", "pixel", "*.png", "*.md")


# ----------------------------------------------------- kinds of damage: to a file's bytes, for which they return others
def truncated(rng, path):
    return path.read_bytes()[:rng.randrange(path.stat().st_size)]


def flipped(rng, path):
    """One to eight bits; of tensors, half of the time in the header."""
    content = bytearray(path.read_bytes())
    end = 2000 if path.suffix == ".safetensors" and rng.random() < 0.5 else len(content)
    for bit in [rng.randrange(8 * end) for _ in range(rng.randint(1, 8))]:
        content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


def swapped(rng, path):
    other = rng.choice([p for p in sorted(path.parent.parent.rglob("*")) if p.is_file() and p != path])
    there, here = other.read_bytes(), path.read_bytes()
    other.unlink()
    other.write_bytes(here)
    return there


def replaced(rng, path):
    return rng.choice([*CONTENTS, rng.randbytes(rng.randint(1, 5000)), json.dumps(rng.choice(VALUES)).encode()])


def missing(rng, path):
    return None


def made_a_folder(rng, path):
    return None


def made_a_file(rng, path):
    return b"x"


# ------------------------------------------------------------------------ to an entry of JSON, at any depth; to tensors
def mistyped(rng, container, key):
    container[key] = rng.choice(VALUES)


def without_key(rng, container, key):
    del container[key]


def wrong_dtype(rng, tensors, name, metadata):
    tensors[name] = tensors[name].to(rng.choice([torch.int64, torch.bool]))


def wrong_shape(rng, tensors, name, metadata):
    """A dimension of one, which would broadcast."""
    dim = rng.choice([dim for dim, size in enumerate(tensors[name].shape) if size > 1])
    tensors[name] = tensors[name].narrow(dim, 0, 1).contiguous()


def without_tensor(rng, tensors, name, metadata):
    del tensors[name]


def another_tensor(rng, tensors, name, metadata):
    tensors[f"{name}.x"] = torch.ones(2)


def not_finite(rng, tensors, name, metadata):
    tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = rng.choice([math.nan, math.inf])


def wrong_metadata(rng, tensors, name, metadata):
    metadata[rng.choice(sorted(metadata) or ["step"])] = rng.choice(TEXTS)


def without_metadata(rng, tensors, name, metadata):
    metadata.clear()


KINDS = {
    "*": [*[truncated, flipped] * 3, *[replaced] * 4, swapped, missing, made_a_folder, made_a_file],
    "*.json*": [*[mistyped] * 9, *[without_key] * 2],
    "*.safetensors": [*[wrong_metadata] * 2, without_metadata, wrong_dtype, wrong_shape, without_tensor, another_tensor,
                      not_finite]}
DAMAGE = [(pattern, kind) for pattern, kinds in KINDS.items() for kind in kinds]
NOTICED = {wrong_dtype, wrong_shape, without_tensor, another_tensor}        # by every command that reads the file
OF_STATE = {wrong_metadata, without_metadata}               # noticed there


def entries(value):
    """(container, key) of everything in a JSON value, at any depth."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from entries(value[key])


def damage(pattern, kind, rng, path):
    """Do it, to a file of its own where there was a link. Returns the entry or the tensor."""
    key = ""
    if pattern == "*.json*":
        whole = json.loads(path.read_text())
        container, key = rng.choice(list(entries(whole)))
        kind(rng, container, key)
        content = json.dumps(whole).encode() + b"\n"
    elif pattern == "*.safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
        key = rng.choice(sorted(tensors))
        kind(rng, tensors, key, metadata)
        content = save(tensors, metadata or None)
    else:
        content = kind(rng, path)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind is made_a_folder:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    return key


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


def choose_command(rng, name, copy, out, path):
    """(command, options, what it shall leave) for the copy of a folder in which this path is damaged."""
    if name == "run" and rng.random() < (0.3 if "student" in path.parts else 0.9):
        left = [copy / "student", copy / "state" / "step_3"]
        return "train", ["--batch", 4, "--steps", 3, "--samples", 0, "--out", copy], left
    if "teacher" not in name:
        return "sample", ["--student", copy, "--prompt", PROMPTS[0], "--out", out], [out / "000000.png"]
    line = ["--teacher", copy, "--batch", 2, "--samples", 1, "--out", out]
    if rng.random() < 0.95:
        return "train", [*line, "--dry-run"], []
    return "train", [*line, "--steps", 1], [out / "student", out / "state" / "step_1", out / "samples" / "step_1.png"]


def saved(folder):
    """The bytes of student/ and state/, which a refused command leaves as they are."""
    return {path: path.read_bytes() for part in ("student", "state") for path in (folder / part).rglob("*")
            if path.is_file() and path.name != ".lock"}


def is_whole(path):
    if path.suffix == ".png":
        Image.open(path).load()
        return True
    return all(tensor.isfinite().all() for file in path.glob("*.safetensors") for tensor in load_file(file).values())


@pytest.mark.parametrize("number", [
    pytest.param(number, marks=[pytest.mark.slow] if number % FAST else []) for number in range(COUNT)])
def test_damage_costs_one_sentence_at_most(call, originals, tmp_path, number):
    rng, copy, out = random.Random(f"{SEED} {number}"), tmp_path / "copy", tmp_path / "out"
    name = list(originals)[number % len(originals)]
    pattern, kind = DAMAGE[number // len(originals) % len(DAMAGE)]
    shutil.copytree(originals[name], copy, copy_function=link, ignore=NO_TEACHER if "teacher" in name else None)
    paths = [p for p in sorted([copy, *copy.rglob(pattern)]) if p.is_dir() == (kind is made_a_file)]
    path = rng.choice([p for p in paths if p.name != ".lock"])
    key = damage(pattern, kind, rng, path)
    command, options, left = choose_command(rng, name, copy, out, path.relative_to(copy))
    about = (f"DAMAGE_SEED={SEED} [{number}]: {name}, {path.relative_to(tmp_path)} {kind.__name__} {key}; "
             f"{command} {' '.join(map(str, options))}")
    before = saved(copy)
    code, _, stderr = call(command, *options)
    read = name != "run" or ("state" if command == "train" else "student") in path.parts
    refused = read and (kind in NOTICED or kind in OF_STATE and "state" in path.parts)
    said = [line for line in re.split("[\r\n]+", stderr) if not re.match(r"warning: | *\d+%.*\]$| *$", line)]
    assert code in (2, 2 * refused), f"{about}: exit code {code} {stderr}"
    assert [line[:7] for line in said] == ["error: "] * (code == 2), f"{about}: {stderr}"
    assert code == 2 or all(map(is_whole, left)), f"{about}: what it left is not whole"
    assert code == 0 or saved(copy) == before, f"{about}: refused, but the checkpoint has changed"
