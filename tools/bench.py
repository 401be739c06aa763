"""Loading and one forward pass against the reference library diffusers: time, memory, agreement.

    python -m tools.bench                                   the embedded teacher's U-Net
    python -m tools.bench --unet FOLDER --repeat 3          any U-Net's folder: config.json and weights

Needs `pip install diffusers`. Loading is timed in processes of its own, the forward pass in one; ours and theirs in
turn, medians.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from model import UNet
from teacher import PRECISION, TINY, BadInput, command, load_module, pick_device, read_json


def reference(folder):
    """The reference library's class for a folder."""
    try:
        import diffusers
    except ImportError:
        raise BadInput("the reference library is not installed: pip install diffusers") from None
    return getattr(diffusers, read_json(folder / "config.json")["_class_name"])


LOADERS = {
    "ours": lambda folder, device, dtype: load_module(UNet, folder, device, dtype),
    "diffusers": lambda folder, device, dtype:
        reference(folder).from_pretrained(folder, torch_dtype=dtype).to(device).requires_grad_(False)}


def resident():
    """Bytes of this process in memory now: the page counts of statm, its second field."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_loading(which, folder, device, dtype):
    """In a process of its own: seconds to load, and until every weight was read; peak memory over the start."""
    if which == "diffusers":
        reference(folder)                                   # its imports are not counted
    before = resident()
    began = time.perf_counter()
    network = LOADERS[which](folder, device, dtype)
    loaded = time.perf_counter()
    sum(p.sum().item() for p in network.parameters())
    read = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    size = sum(p.nbytes for p in network.parameters())
    print(json.dumps({"load": loaded - began, "read": read - began, "peak": peak / size, "size": size}))


def inputs(network, size, batch, device, dtype):
    """Arguments for ours and for theirs: positional sample and index, the condition by name."""
    config, rng = network.config, torch.Generator().manual_seed(0)
    size = size or config["sample_size"]
    x = torch.randn(batch, config["in_channels"], size, size, generator=rng).to(device, dtype)
    t = torch.randint(1000, (batch,), generator=rng).to(device)
    if config.get("_class_name") == "UNet2DModel":
        label = torch.zeros(batch, dtype=torch.int64, device=device) if config.get("num_class_embeds") else None
        return (x, t), {"label": label}, {"class_labels": label}
    text = torch.randn(batch, 77, config["cross_attention_dim"], generator=rng).to(device, dtype)
    return (x, t), {"text": text}, {"encoder_hidden_states": text}


@torch.no_grad()
def measure_forward(folder, device, dtype, size, batch, repeat, compiled):
    """Medians of one forward pass of both, in turn, and the largest difference over the largest value."""
    networks = {name: load(folder, device, dtype) for name, load in LOADERS.items()}
    args, mine, yours = inputs(networks["ours"], size, batch, device, dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    calls = {"ours": lambda n: n(*args, **mine), "diffusers": lambda n: n(*args, **yours).sample}
    if compiled:
        networks = {name: torch.compile(network) for name, network in networks.items()}
    times, outputs = {name: [] for name in networks}, {}
    for _ in range(repeat + 2):                             # the first two are not counted
        for name, network in networks.items():
            wait()
            began = time.perf_counter()
            outputs[name] = calls[name](network).float()
            wait()
            times[name].append(time.perf_counter() - began)
    a, b = outputs["ours"], outputs["diffusers"]
    error = ((a - b).abs().max() / b.abs().max()).item()
    return {name: statistics.median(values[2:]) for name, values in times.items()}, error


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--unet", type=Path, default=TINY / "unet", help="folder of config.json and weights")
    p.add_argument("--precision", choices=list(PRECISION), default="fp32")
    p.add_argument("--size", type=int, help="height and width of the sample (default: the config's)")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument("--compile", action="store_true", help="also time both under torch.compile")
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    p.add_argument("--loading", choices=list(LOADERS), help=argparse.SUPPRESS)
    args = p.parse_args()
    device, dtype = pick_device(args.device), PRECISION[args.precision]
    if args.loading:
        return measure_loading(args.loading, args.unet, device, dtype)
    reference(args.unet)                                    # not there: said before anything is measured
    rows = {name: [] for name in LOADERS}
    for _ in range(args.repeat):
        for name in LOADERS:
            child = [sys.executable, "-m", "tools.bench", "--unet", args.unet, "--precision", args.precision,
                     "--device", str(device), "--loading", name]
            done = subprocess.run(list(map(str, child)), capture_output=True, text=True)
            if done.returncode:
                raise BadInput(f"loading with {name} failed: {done.stderr.strip()[-500:] or done.returncode}")
            rows[name].append(json.loads(done.stdout.splitlines()[-1]))
    size = rows["ours"][0]["size"] / 1e9
    print(f"{args.unet}, {size:.2f} GB in {args.precision} on {device}, medians of {args.repeat}")
    for name, measured in rows.items():
        load, read, peak = (statistics.median(row[key] for row in measured) for key in ("load", "read", "peak"))
        print(f"{name:9}  load {load:6.2f} s, every weight read {read:6.2f} s, peak memory {peak:.2f} x the size")
    for compiled in (False, True) if args.compile else (False,):
        medians, error = measure_forward(args.unet, device, dtype, args.size, args.batch, args.repeat, compiled)
        print(f"forward{' compiled' * compiled}: ours {medians['ours']:.4f} s, diffusers {medians['diffusers']:.4f} s, "
              f"ratio {medians['ours'] / medians['diffusers']:.3f}, difference {error:.1e} of the largest value")


if __name__ == "__main__":
    command(main)
