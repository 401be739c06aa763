"""A checkpoint of random weights with a published checkpoint's exact configs, tensor names, dtypes and shapes.

    python -m tools.synthesise FOLDER OUT

FOLDER holds the configs in the diffusers layout and manifest.json: {file: {"tensors": {name: [dtype, shape]}}}. A pixel
model and a small decoder need none: their config says it all.
For measuring at full size what has no download: loading, memory, speed, agreement with the reference library.
"""

import argparse
import functools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np

from plumbing.files import BadInput, command, read_json, write_file
from plumbing.weights import OLD_NAMES, WEIGHTS, init_on_meta
from model import TinyVAE, UNet

DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64}


def tensor(name, dtype, shape, rng):
    """Weights with which activations keep their size, as trained ones do; every value random."""
    if dtype == "I64":                                      # position_ids, the one thing that is no weight
        return np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    values = rng.standard_normal(shape, np.float32)
    if len(shape) == 1:
        values = values * np.float32(0.1) + np.float32("norm" in name and name.endswith("weight"))
    else:
        values *= np.float32(math.prod(shape[1:]) ** -0.5)
    return values.astype(DTYPES[dtype])


def write_tensors(tensors, seed, path):
    """A safetensors file of random tensors {name: (dtype, shape)}, one tensor in memory at a time."""
    header, offset, rng = {"__metadata__": {"format": "pt"}}, 0, np.random.default_rng(seed)
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in tensors.items():
            file.write(tensor(name, dtype, shape, rng).tobytes())


def read_manifest(source):
    """The manifest.json of a folder, or that of its only network, with attention's names of its time."""
    if (source / "manifest.json").exists():
        return read_json(source / "manifest.json")
    part = "unet/" if (source / "unet").is_dir() else ""
    config = read_json(source / part / "config.json")
    network = {"UNet2DModel": UNet, "AutoencoderTiny": TinyVAE}.get(config.get("_class_name"))
    if network is None:
        raise BadInput(f"{source} has no manifest.json, which only a UNet2DModel or AutoencoderTiny can do without")
    shapes = {name: ["F32", list(p.shape)] for name, p in blank(network, config, source).state_dict().items()}
    for old, new in OLD_NAMES.items():
        shapes = {name.replace(f".{new}.", f".{old}."): value for name, value in shapes.items()}
    return {part + WEIGHTS: {"tensors": shapes}}


def synthesise(source, out, seed=0):
    """The checkpoint folder `out` from the configs in `source`. Raises BadInput."""
    manifest = read_manifest(source)
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            (out / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / path.relative_to(source))
    for name, part in manifest.items():
        write_file(out / name, functools.partial(write_tensors, part["tensors"], seed))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", type=Path)
    p.add_argument("out", type=Path)
    args = p.parse_args()
    synthesise(args.source, args.out)
    tokenizer = args.source.parent / "clip-tokenizer"       # one vocabulary for all, kept beside the manifests
    if (args.out / "tokenizer").is_dir() and not (args.out / "tokenizer" / "vocab.json").exists():
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(tokenizer / name, args.out / "tokenizer" / name)
    print(args.out)


if __name__ == "__main__":
    command(main)
