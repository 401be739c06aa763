"""Prompts: read from a file, composed from word lists, encoded.

    prompts = training_prompts(teacher, args.prompts)       # a file's, the teacher's own, or 100,000 composed ones
    encode = encode_by_number(teacher, prompts)
    condition = encode([3, 14])                             # of prompts 3 and 14, on the CPU if they were encoded once
"""

import random
from pathlib import Path

import torch

from plumbing.files import BadInput, read_json, read_text

FEW = 2**11         # so many prompts, or fewer, are encoded once
PART = 64           # so many are encoded together


def read_prompts(path):
    """The lines of a UTF-8 prompt file, but for blank ones and comments, which begin with #. Raises BadInput."""
    if Path(path).suffix.lower() in (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"):
        raise BadInput(f"{path} is not read as {Path(path).suffix}: give a plain text file, one prompt a line")
    lines = read_text(path).split("\n")                      # other separators belong to the prompt
    prompts = [line.strip(" \t") for line in lines if line.strip() and not line.strip().startswith("#")]
    if not prompts:
        raise BadInput(f"{path} holds no prompt; it takes one a line")
    return prompts


def compose_prompts(num=100_000, seed=0):
    """num distinct prompts from the word lists of prompts.json, a function of the seed."""
    words, rng, prompts = read_json(Path(__file__).parent / "prompts.json"), random.Random(seed), {}
    while len(prompts) < num:                               # a dict keeps them distinct and in order
        scene = " ".join(map(rng.choice, rng.choice(words["scenes"])))
        prompts[rng.choice(words["styles"]).format(scene)] = True
    return list(prompts)


def training_prompts(teacher, path=None):
    """The prompts or labels to train on: those of a file, the teacher's own, or composed ones. Raises BadInput."""
    own = teacher.folder / "prompts.txt"
    if path and not teacher.condition_type:
        raise BadInput(f"teacher {teacher.spec} is unconditional: --prompts has no meaning for it")
    if path or own.exists():
        prompts = read_prompts(path or own)
        if teacher.labels:
            teacher.encode(prompts)                         # an unknown label is found now, not in an hour
        return prompts
    if teacher.labels:
        return [name for name in teacher.labels if name]
    return compose_prompts() if teacher.condition_type else [""]


def encode_by_number(teacher, prompts):
    """A function that takes a list of numbers, and returns the teacher's condition of the prompts with these numbers.
    A few prompts are encoded now, and kept on the CPU: the text encoder is not needed again. The last bits depend on
    how many are encoded together, so all processes encode the same parts of 64."""
    def encode(texts):
        parts = [teacher.encode(texts[first:first + PART]) for first in range(0, len(texts), PART)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if len(prompts) > FEW:
        return lambda numbers: encode([prompts[k] for k in numbers])
    encoded = {name: value.cpu() for name, value in encode(prompts).items()}
    return lambda numbers: {name: value[numbers] for name, value in encoded.items()}
