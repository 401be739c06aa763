"""Damage by machine: whatever befalls a file of a teacher, a student or a run, a command does its work, or ends with
one sentence and exit code 2. DAMAGE_SEED=1 DAMAGE_COUNT=5000 python -m pytest tests/test_damage.py draws other damage.
"""

import functools
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
from safetensors.torch import load_file, save_file

from plumbing.hub import TINY

SEED, COUNT = (int(os.environ.get(name, value)) for name, value in (("DAMAGE_SEED", 0), ("DAMAGE_COUNT", 350)))
PROMPT = "a red ankle boot on a yellow background"
VALUES = [None, True, "x", -1, 0, 1.5, 1e300, [], {}, [[]]]
TEXTS = ["", "x", "-1", "1e3", "null", "[]", "{}", "[" * 100_000]
NO_TEACHER = shutil.ignore_patterns("judge", "decoder", "student", "evaluation", "pixel", "*.png", "*.md", "showcase.txt")


def rewrite(path, content):
    """New content, bytes or text, in a file of its own where there was a link. The kinds of damage are functions of
    the random numbers and the path, and may return what they did."""
    path.unlink()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def truncated(rng, path):
    content = path.read_bytes()
    rewrite(path, content[:rng.randrange(len(content))])


def emptied(rng, path):
    rewrite(path, b"")


def flipped(rng, path):
    """One to eight bits; of tensors, half of the time in the header."""
    content = bytearray(path.read_bytes())
    end = 2000 if path.suffix == ".safetensors" and rng.random() < 0.5 else len(content)
    bits = [rng.randrange(8 * end) for _ in range(rng.randint(1, 8))]
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
    rewrite(path, bytes(content))
    return f"bits {bits}"


def swapped(rng, path):
    other = rng.choice([p for p in sorted(path.parent.parent.rglob("*")) if p.is_file() and p != path])
    here, there = path.read_bytes(), other.read_bytes()
    rewrite(path, there)
    rewrite(other, here)
    return f"with {other.name}"


def missing(rng, path):
    path.unlink()


def made_a_folder(rng, path):
    path.unlink()
    path.mkdir()


def made_a_file(rng, path):
    shutil.rmtree(path)
    path.write_text("x")


def scrambled(rng, path):
    rewrite(path, rng.randbytes(rng.randint(1, 5000)))


def in_latin_1(rng, path):
    rewrite(path, '{"caf\xe9": 1}\n'.encode("latin-1"))


def replaced(rng, path):
    value = rng.choice(VALUES)
    rewrite(path, json.dumps(value) + "\n")
    return f"by {value!r}"


def nested(rng, path):
    rewrite(path, "[" * 100_000)


def entries(value):
    """(container, key) of everything in a JSON value, at any depth."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from entries(value[key])


def in_json(change):
    """A change(rng, container, key) as damage to any entry of a JSON file."""
    @functools.wraps(change)
    def damage(rng, path):
        whole = json.loads(path.read_text())
        container, key = rng.choice(list(entries(whole)))
        change(rng, container, key)
        rewrite(path, json.dumps(whole) + "\n")
        return f"{key}: {container[key]!r}" if key in container else key
    return damage


@in_json
def mistyped(rng, container, key):
    container[key] = rng.choice(VALUES)


@in_json
def without_key(rng, container, key):
    del container[key]


def in_tensors(change):
    """A change(rng, tensors, name, metadata) as damage to a safetensors file; name is that of any tensor."""
    @functools.wraps(change)
    def damage(rng, path):
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
        name = rng.choice(sorted(tensors))
        change(rng, tensors, name, metadata)
        path.unlink()
        save_file(tensors, path, metadata or None)
        return f"{name} {metadata}"[:200]
    return damage


@in_tensors
def wrong_dtype(rng, tensors, name, metadata):
    tensors[name] = tensors[name].to(rng.choice([torch.int64, torch.bool]))


@in_tensors
def wrong_shape(rng, tensors, name, metadata):
    """A dimension of one, which would broadcast."""
    dim = rng.choice([dim for dim, size in enumerate(tensors[name].shape) if size > 1])
    tensors[name] = tensors[name].narrow(dim, 0, 1).contiguous()


@in_tensors
def without_tensor(rng, tensors, name, metadata):
    del tensors[name]


@in_tensors
def another_tensor(rng, tensors, name, metadata):
    tensors[f"{name}.x"] = torch.ones(2)


@in_tensors
def not_finite(rng, tensors, name, metadata):
    tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = rng.choice([math.nan, math.inf])


@in_tensors
def wrong_metadata(rng, tensors, name, metadata):
    metadata[rng.choice(sorted(metadata) or ["step"])] = rng.choice(TEXTS)


@in_tensors
def without_metadata(rng, tensors, name, metadata):
    metadata.clear()


KINDS = {
    "*": [*[truncated, flipped] * 2, emptied, swapped, missing, made_a_folder, made_a_file, scrambled, in_latin_1],
    "*.json*": [*[mistyped] * 9, *[without_key, replaced] * 2, nested],
    "*.safetensors": [*[flipped, wrong_metadata] * 2, without_metadata, wrong_dtype, wrong_shape, without_tensor,
                      another_tensor, not_finite]}
DAMAGE = [(pattern, kind) for pattern, kinds in KINDS.items() for kind in kinds]
NOTICED = {wrong_dtype, wrong_shape, without_tensor, another_tensor}        # by every command that reads the file
OF_STATE = {wrong_metadata, without_metadata}               # noticed there


@pytest.fixture(scope="module")
def originals(run, tmp_path_factory):
    """name -> folder: what is damaged, in copies."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = run("train.py", "--batch", 4, "--steps", 2, "--sample-every", 0, "--out", out)
    assert done.returncode == 0, done.stderr
    return {"teacher": TINY, "run": out, "pixel teacher": TINY / "pixel", "student": TINY / "student",
            "student of a run": out / "student"}


@pytest.fixture
def space(tmp_path):
    """A folder that goes with its test: a state has 41 MB."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def link(source, copy):
    """A link, but for the log, which is appended to; all else is replaced by renaming."""
    (shutil.copy if source.endswith(".jsonl") else os.symlink)(source, copy)


def choose_command(rng, name, copy, out, path):
    """(command, options, what it shall leave) for the copy of a folder in which this path is damaged."""
    if name == "run" and rng.random() < (0.3 if "student" in path.parts else 0.9):
        left = [copy / "student", copy / "state" / "step_3"]
        return "train", ["--batch", 4, "--steps", 3, "--sample-every", 0, "--out", copy], left
    if "teacher" not in name:
        return "sample", ["--student", copy, "--prompt", PROMPT, "--out", out], [out / "000000.png"]
    train = ["--teacher", copy, "--batch", 2, "--out", out]
    if rng.random() < 0.95:
        return "train", [*train, "--dry-run"], []
    left = [out / "student", out / "state" / "step_1", out / "samples" / "step_1.png"]
    return "train", [*train, "--steps", 1, "--sample-every", 1], left


def checkpoint(folder):
    """The bytes of student/ and state/, which a refused command leaves as they are."""
    return {path: path.read_bytes() for part in ("student", "state") for path in (folder / part).rglob("*")
            if path.is_file()}


def is_whole(path):
    if path.suffix == ".png":
        Image.open(path).load()
        return True
    return all(tensor.isfinite().all() for file in path.glob("*.safetensors") for tensor in load_file(file).values())


@pytest.mark.parametrize("number", range(COUNT))
def test_damage_costs_one_sentence_at_most(call, originals, space, number):
    rng, copy, out = random.Random(f"{SEED} {number}"), space / "copy", space / "out"
    name = list(originals)[number % len(originals)]
    pattern, kind = DAMAGE[number // len(originals) % len(DAMAGE)]
    shutil.copytree(originals[name], copy, copy_function=link, ignore=NO_TEACHER if "teacher" in name else None)
    path = rng.choice([p for p in sorted([copy, *copy.rglob(pattern)]) if p.is_dir() == (kind is made_a_file)])
    said = kind(rng, path)
    command, options, left = choose_command(rng, name, copy, out, path.relative_to(copy))
    about = (f"DAMAGE_SEED={SEED} [{number}]: {name}, {path.relative_to(space)} {kind.__name__} {said or ''}; "
             f"{command} {' '.join(map(str, options))}")
    before = checkpoint(copy)
    try:
        code, _, stderr = call(command, *options)
        whole = code == 2 or all(map(is_whole, left))
    except BaseException as error:
        raise AssertionError(f"{about}: {error!r:.500}") from error
    part = "state" if command == "train" else "student"
    read = name != "run" or part in path.parts
    refused = read and (kind in NOTICED or kind in OF_STATE and "state" in path.parts)
    said = [line for line in re.split("[\r\n]+", stderr) if not re.match(r"warning: | *\d+%.*\]$| *$", line)]
    same = code == 0 or checkpoint(copy) == before
    assert code in (2, 2 * refused), f"{about}: exit code {code} {stderr}"
    assert [line[:7] for line in said] == ["error: "] * (code == 2), f"{about}: {stderr}"
    assert whole, f"{about}: what it left is not whole"
    assert same, f"{about}: refused, but the checkpoint has changed"
