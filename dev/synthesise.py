"""A checkpoint of random weights with a published checkpoint's exact configs, tensor names, dtypes and shapes.

    python -m dev.synthesise tests/checkpoints/sd21-base ./sd21         5.2 GB, one minute
    python train.py --teacher ./sd21 --dry-run                          takes it for Stable Diffusion 2.1

It is for measuring at full size what has no download: loading, memory, speed, agreement with the reference libraries.
The source holds the configs in the diffusers layout, and manifest.json: {file: {"tensors": {name: [dtype, shape]}}}.
A pixel model and a small decoder need no manifest, because their configs say it all. One should see the name of the
new folder; it has the published files' names and sizes.
"""

import functools
import json
import math
import shutil

import numpy as np

from model import TinyVAE, UNet
from plumbing.files import BadInput, check_new, command, new_parser, read_json, user_path, write_file
from plumbing.weights import OLD_NAMES, WEIGHTS, init_on_meta

DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64}


def read_manifest(source):
    """The manifest.json of a folder, or that of its only network, with the old names of attention. Raises BadInput."""
    if (source / "manifest.json").exists():
        return read_json(source / "manifest.json")
    part = "unet/" if (source / "unet").is_dir() else ""
    config = read_json(source / part / "config.json")
    network = {"UNet2DModel": UNet, "AutoencoderTiny": TinyVAE}.get(config.get("_class_name"))
    if network is None:
        raise BadInput(f"{source} has no manifest.json, which only a UNet2DModel or AutoencoderTiny can do without")
    tensors = {}
    for name, p in init_on_meta(network, config, source).state_dict().items():
        for old, new in OLD_NAMES.items():
            name = name.replace(f".{new}.", f".{old}.")
        tensors[name] = "F32", list(p.shape)
    return {part + WEIGHTS: {"tensors": tensors}}


def random_tensor(name, dtype, shape, rng):
    """Random weights with which activations keep their size, as trained ones do."""
    if dtype == "I64":                                      # position_ids, which are no weights
        return np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    values = rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
        values *= np.float32(math.prod(shape[1:]) ** -0.5)
    else:
        values = values * np.float32(0.1) + np.float32("norm" in name and name.endswith("weight"))
    return values.astype(DTYPES[dtype])


def write_tensors(tensors, seed, path):
    """A safetensors file of random tensors {name: (dtype, shape)}. It holds one of them in memory at a time."""
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
            file.write(random_tensor(name, dtype, shape, rng).tobytes())


def synthesise(source, out, seed=0):
    """The checkpoint folder `out` from the configs in `source`. Raises BadInput."""
    manifest = read_manifest(source)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("manifest.json"), dirs_exist_ok=True)
    for name, part in manifest.items():
        write_file(out / name, functools.partial(write_tensors, part["tensors"], seed))


def main():
    parser = new_parser(__doc__)
    parser.add_argument("source", type=user_path)
    parser.add_argument("out", type=user_path)
    args = parser.parse_args()
    check_new(args.out)
    synthesise(args.source, args.out)
    vocabulary = args.source.parent / "clip-tokenizer"      # one for all manifests, kept beside them
    for name in ("vocab.json", "merges.txt"):
        if (args.out / "tokenizer").is_dir() and not (args.out / "tokenizer" / name).exists():
            shutil.copyfile(vocabulary / name, args.out / "tokenizer" / name)
    print(args.out)


if __name__ == "__main__":
    command(main)
