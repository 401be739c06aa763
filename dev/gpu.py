r"""What only a GPU can show of a teacher and its training: agreement with the CPU, speed, memory, bitwise resume.

    python -m tools.gpu                                     the embedded teacher, on a GPU two minutes
    python -m tools.gpu --teacher FOLDER --parts agreement passes training --precisions bf16 --micro-batches 4 16 \
        --batch 32 --steps 12                               one of full size, such as tools.synthesise makes
    python -m tools.gpu --device cpu --precisions fp32 --micro-batches 4 --steps 8      where there is none, in small

Prints the figures of each part; all are in OUT/gpu.json.
"""

import argparse
import functools
import itertools
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from plumbing.files import BadInput, command, write_json
from plumbing.checkpoints import Saver, checkpoints
from plumbing.processes import peak_memory
from signal_ode import add_noise
from student import new_student, set_trainable
from plumbing.images import noise
from plumbing.processes import PRECISION, pick_device
from plumbing.prompts import training_prompts
from teacher import load_teacher
from dev.bench import Steps, matmul_rate, median_seconds
from dev.kill import differences


def forget_peak(device):
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def inputs(teacher, batch):
    """Noised noise, times and a condition for the teacher's U-Net."""
    eps = noise(range(batch), teacher.shape).to(teacher.device)
    t = torch.linspace(1, teacher.schedule.T, batch, device=teacher.device).long()
    prompts = training_prompts(teacher, None)
    return add_noise(eps, eps, t, teacher.schedule), t, teacher.encode([prompts[k % len(prompts)] for k in range(batch)])


def agreement(args):
    """Clean predictions of the teacher against the CPU's in float32, ||a - b|| / ||b||; and decoded pictures."""
    reference = load_teacher(args.teacher, torch.device("cpu"), torch.float32)
    x, t, condition = inputs(reference, 2)
    exact = reference.denoise(x, t, **condition)
    pictures = reference.decode(exact)
    for precision in args.precisions:
        teacher = load_teacher(args.teacher, pick_device(args.device), PRECISION[precision])
        x, t, condition = inputs(teacher, 2)
        f = teacher.denoise(x, t, **condition).cpu()
        seen = teacher.decode(exact.to(teacher.device)).cpu()
        yield {"precision": precision, "prediction": ((f - exact).norm() / exact.norm()).item(),
               "decoded picture, 255ths": (seen - pictures).abs().max().item() * 127.5}


def passes(args):
    """A training pass of the U-Net, forward and backward, in each layout, eager and with compiled blocks."""
    device = pick_device(args.device)
    for precision, compiled in itertools.product(args.precisions, (False, True) if args.compile else (False,)):
        dtype = PRECISION[precision]
        limit = matmul_rate(device, dtype)
        teacher = load_teacher(args.teacher, device, dtype)
        student = new_student(teacher, teacher.schedule.T, 1.0)
        network = student.network
        set_trainable(network)
        for block in (*network.down_blocks, network.mid_block, *network.up_blocks) if compiled else ():
            block.compile()
        for layout, batch in itertools.product((torch.contiguous_format, torch.channels_last), args.micro_batches):
            network.to(memory_format=layout)
            x, t, condition = inputs(teacher, batch)
            step = functools.partial(training_pass, student, x.to(memory_format=layout), t, condition, dtype)
            with FlopCounterMode(display=False) as counter:
                step()
            forget_peak(device)
            took = median_seconds(step, device, args.repeat)
            rate = counter.get_total_flops() / took
            yield {"precision": precision, "blocks": "compiled" if compiled else "eager",
                   "layout": str(layout).split(".")[1], "micro-batch": batch, "ms a sample": 1e3 * took / batch,
                   "TFLOP/s": rate / 1e12, "of the matrix product's": rate / limit,
                   "peak GB": peak_memory(device) / 1e9}


def training_pass(student, x, t, condition, dtype):
    with train.autocast(x.device, dtype):
        loss = student(x, t, **condition).square().mean()
    loss.backward()


def inner(*args):
    """One training in a process of its own; its last line is what was measured: seconds of steps, of what saving takes
    of them, and memory."""
    device, saving, save = pick_device(train.parse_args(args).device), [], Saver.save
    steps = Steps(device)

    def timed_save(*rest):
        began = time.perf_counter()
        save(*rest)
        saving.append(time.perf_counter() - began)
    Saver.save = timed_save
    steps.train(args)
    print(json.dumps({"steps": list(steps.seconds.values()), "peak": peak_memory(device) / 1e9, "saving": saving}))


def run(args, name, *options, kill_at=None):
    """A training by `inner`; killed once that step is saved, if asked. Returns what it measured."""
    out = args.out / "runs" / name
    child = [sys.executable, __file__, "--inner", "--teacher", args.teacher, "--out", out, "--sample-every", 0]
    child += options
    child += ["--device", args.device] if args.device else []
    with open(args.out / "runs" / f"{name}.log", "a+") as log:
        process = subprocess.Popen(list(map(str, child)), stdout=log, stderr=subprocess.STDOUT)
        while kill_at and process.poll() is None:
            if kill_at in checkpoints(out):
                process.kill()
            time.sleep(0.01)
        if process.wait() and not kill_at:
            raise BadInput(f"training failed: see {log.name}")
        log.seek(0)
        return None if kill_at else json.loads(log.read().splitlines()[-1])


def training(args):
    """Whole steps of train.py, BOOT's and matched ones, at each micro-batch; and a checkpoint's time."""
    half = args.steps // 2
    for precision, micro in itertools.product(args.precisions, args.micro_batches):
        batch = args.batch or max(args.micro_batches)
        measured = run(args, f"training-{precision}-{micro}", "--steps", args.steps, "--batch", batch, "--micro-batch",
                       micro, "--precision", precision, "--match-from", half / args.steps, "--warmup", 1,
                       "--save-every", 10**9)
        boot, matched = measured["steps"][1:half - 1], measured["steps"][half + 1:]
        yield {"precision": precision, "batch": batch, "micro-batch": micro, "s a step, BOOT": statistics.mean(boot),
               "matched": statistics.mean(matched), "peak GB": measured["peak"], "saving, s": measured["saving"][-1]}
        shutil.rmtree(args.out / "runs" / f"training-{precision}-{micro}")


def resume(args):
    """A run killed after a checkpoint and repeated, against one undisturbed: tensors of the state that differ."""
    for precision in args.precisions:
        options = ["--steps", 24, "--batch", 8, "--precision", precision, "--match-from", 0.4, "--warmup", 2,
                   "--save-every", 6]
        run(args, f"whole-{precision}", *options)
        run(args, f"killed-{precision}", *options, kill_at=12)
        stood = next(iter(checkpoints(args.out / "runs" / f"killed-{precision}")))
        run(args, f"killed-{precision}", *options)
        differ = differences(*(args.out / "runs" / f"{name}-{precision}" for name in ("whole", "killed")))
        yield {"precision": precision, "killed after step": stood, "differ": len(differ),
               "by at most": max(differ.values(), default=0.0)}


PARTS = {"agreement": agreement, "passes": passes, "training": training, "resume": resume}


def main():
    if sys.argv[1:2] == ["--inner"]:
        return inner(*sys.argv[2:])
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--teacher", default="tiny")
    p.add_argument("--out", type=Path, default=Path("runs/gpu"))
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    p.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    p.add_argument("--precisions", nargs="+", choices=list(PRECISION), default=list(PRECISION))
    p.add_argument("--micro-batches", type=int, nargs="+", default=[32])
    p.add_argument("--batch", type=int, help="of `training` (default: the largest micro-batch)")
    p.add_argument("--steps", type=int, default=60, help="of `training`, half of them matched (default: %(default)s)")
    p.add_argument("--repeat", type=int, default=10, help="of `passes` (default: %(default)s)")
    p.add_argument("--compile", action="store_true", help="`passes` also with compiled blocks")
    args = p.parse_args()
    if args.steps < 8:
        p.error("--steps is 8 or more")
    device = pick_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{args.teacher} on {name}, torch {torch.__version__}", flush=True)
    shutil.rmtree(args.out / "runs", ignore_errors=True)    # those of an earlier call
    (args.out / "runs").mkdir(parents=True)
    results = {"device": name}
    for part in args.parts:
        print(f"\n{part}: {PARTS[part].__doc__}")
        results[part] = []
        for row in PARTS[part](args):
            results[part].append(row)
            write_json(args.out / "gpu.json", results)
            print("  " + ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                                   for key, value in row.items()), flush=True)
    return None


if __name__ == "__main__":
    command(main)
