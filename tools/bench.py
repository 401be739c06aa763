"""Loading and one forward pass against the reference libraries: time, memory, agreement.

    python -m tools.bench                                   the embedded teacher: U-Net, VAE, text encoder
    python -m tools.bench --teacher FOLDER --repeat 3       any teacher's folder
    python -m tools.bench --teacher FOLDER --parts vae      some of its networks

Needs `pip install diffusers transformers`. Loading is timed in processes of their own, the forward pass in one; ours
and theirs in turn, medians.
"""

import argparse
import importlib
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # for `python tools/NAME.py`, too
from checkpoint import STEM, TINY, BadInput, command, load_module, read_json
from model import VAE, TextEncoder, UNet
from teacher import PRECISION, pick_device

# part -> our class, the stem of its weights' file, the library that has the reference
PARTS = {"unet": (UNet, STEM, "diffusers"), "vae": (VAE, STEM, "diffusers"),
         "text_encoder": (TextEncoder, "model", "transformers")}


def ours(part, folder, device, dtype):
    network, stem, _ = PARTS[part]
    return load_module(network, folder, device, dtype, stem)


def reference(part, folder):
    """The reference library's class for a folder."""
    config, library = read_json(folder / "config.json"), PARTS[part][2]
    try:
        return getattr(importlib.import_module(library), config.get("_class_name") or config["architectures"][0])
    except ImportError:
        raise BadInput(f"the reference library is not installed: pip install {library}") from None


def theirs(part, folder, device, dtype):
    return reference(part, folder).from_pretrained(folder, torch_dtype=dtype).to(device).eval().requires_grad_(False)


LOADERS = {"ours": ours, "theirs": theirs}


def memory(field, device):
    """Bytes of this process: VmRSS now, VmHWM at its highest (getrusage's is the parent's too); or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) if field == "VmRSS" else torch.cuda.max_memory_allocated(device)
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure_loading(which, part, folder, device, dtype):
    """In a process of its own: seconds to load, and until every weight was read; peak memory over the start."""
    if which == "theirs":
        reference(part, folder)                             # its imports are not counted
    before = memory("VmRSS", device)
    began = time.perf_counter()
    network = LOADERS[which](part, folder, device, dtype)
    loaded = time.perf_counter()
    sum(p.sum().item() for p in network.parameters())
    read = time.perf_counter()
    peak = memory("VmHWM", device) - before
    size = sum(p.nbytes for p in network.parameters())
    print(json.dumps({"load": loaded - began, "read": read - began, "peak": peak / size, "size": size}))


def passes(part, config, size, batch, device, dtype):
    """One forward pass of ours and of theirs on the same random input, as functions of the network."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=rng).to(device, dtype)
    if part == "text_encoder":
        ids = torch.randint(config["vocab_size"], (batch, config["max_position_embeddings"]), generator=rng).to(device)
        return lambda n: n(ids), lambda n: n(ids).last_hidden_state
    if part == "vae":
        side = size or config["sample_size"] // 2 ** (len(config["block_out_channels"]) - 1)
        z = draw(batch, config["latent_channels"], side, side)
        return lambda n: n.decode(z), lambda n: n.decode(z / n.config.scaling_factor).sample
    side = size or config["sample_size"]
    x, t = draw(batch, config["in_channels"], side, side), torch.randint(1000, (batch,), generator=rng).to(device)
    if config["_class_name"] == "UNet2DModel":
        label = torch.zeros(batch, dtype=torch.int64, device=device) if config.get("num_class_embeds") else None
        return lambda n: n(x, t, label=label), lambda n: n(x, t, class_labels=label).sample
    text = draw(batch, 77, config["cross_attention_dim"])
    return lambda n: n(x, t, text=text), lambda n: n(x, t, encoder_hidden_states=text).sample


@torch.no_grad()
def measure_forward(part, folder, device, dtype, size, batch, repeat, compiled):
    """Medians of one forward pass of both, in turn, and the largest difference over the largest value."""
    networks = {name: load(part, folder, device, dtype) for name, load in LOADERS.items()}
    calls = dict(zip(LOADERS, passes(part, networks["ours"].config, size, batch, device, dtype)))
    if compiled:
        calls = {name: torch.compile(call) for name, call in calls.items()}
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
    times, outputs = {name: [] for name in networks}, {}
    for _ in range(repeat + 1):                             # the first is not counted
        for name, network in networks.items():
            wait()
            began = time.perf_counter()
            outputs[name] = calls[name](network).float()
            wait()
            times[name].append(time.perf_counter() - began)
    a, b = outputs["ours"], outputs["theirs"]
    error = ((a - b).abs().max() / b.abs().max()).item()
    return {name: statistics.median(values[1:]) for name, values in times.items()}, error


def bench(part, folder, args):
    """Print what is measured of one network."""
    device, dtype = pick_device(args.device), PRECISION[args.precision]
    reference(part, folder)                                 # not there: said before anything is measured
    rows = {name: [] for name in LOADERS}
    for _ in range(args.repeat):
        for name in LOADERS:
            child = [sys.executable, "-m", "tools.bench", "--teacher", args.teacher, "--parts", part,
                     "--precision", args.precision, "--device", str(device), "--loading", name]
            done = subprocess.run(list(map(str, child)), capture_output=True, text=True)
            if done.returncode:
                raise BadInput(f"loading {folder}, {name}, failed: {done.stderr.strip().splitlines()[-1:]}")
            rows[name].append(json.loads(done.stdout.splitlines()[-1]))
    size = rows["ours"][0]["size"] / 1e9
    print(f"{folder}, {size:.2f} GB in {args.precision} on {device}, medians of {args.repeat}")
    for name, measured in rows.items():
        load, read, peak = (statistics.median(row[key] for row in measured) for key in ("load", "read", "peak"))
        print(f"  {name:6}  load {load:6.2f} s, every weight read {read:6.2f} s, peak memory {peak:.2f} x the size")
    for compiled in (False, True) if args.compile else (False,):
        medians, error = measure_forward(part, folder, device, dtype, args.size, args.batch, args.repeat, compiled)
        a, b = medians.values()
        print(f"  forward{' compiled' * compiled}: ours {a:.4f} s, theirs {b:.4f} s, ratio {a / b:.3f}, "
              f"difference {error:.1e} of the largest value", flush=True)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--teacher", type=Path, default=TINY, help="its folder, in the diffusers layout (default: tiny)")
    p.add_argument("--parts", nargs="+", choices=list(PARTS), help="which networks (default: all there are)")
    p.add_argument("--precision", choices=list(PRECISION), default="fp32")
    p.add_argument("--size", type=int, help="height and width of sample or latents (default: the config's)")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument("--compile", action="store_true", help="also time both under torch.compile")
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    p.add_argument("--loading", choices=list(LOADERS), help=argparse.SUPPRESS)
    args = p.parse_args()
    if min(args.repeat, args.batch, args.size or 1) < 1:
        p.error("--repeat, --batch and --size are 1 or more")
    folders = {part: args.teacher / part for part in PARTS if (args.teacher / part).is_dir()}
    folders = {"unet": args.teacher} | folders              # the pixel models keep theirs at the root
    for part in args.parts or folders:
        if part not in folders:
            raise BadInput(f"{args.teacher} has no {part}/")
        if args.loading:
            measure_loading(args.loading, part, folders[part], pick_device(args.device), PRECISION[args.precision])
        else:
            bench(part, folders[part], args)


if __name__ == "__main__":
    command(main)
