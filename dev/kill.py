"""Kill training at random moments, again and again: is the state bitwise that of an undisturbed run?

    python -m tools.kill                                20 kills of one process, 5 min on two cores
    python -m tools.kill --processes 2 --kills 10       one of two at a time, which torchrun has to restart; Linux

Small batches of the embedded teacher, with matching, and a checkpoint after every second step, so that many a kill
meets one. A moment is drawn from the whole of an undisturbed run, its start included.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from plumbing.files import BadInput, command
from plumbing.checkpoints import checkpoints, load

ROOT = Path(__file__).resolve().parent.parent
RUN = ("train.py", "--batch", 8, "--warmup", 2, "--match-from", 0.5, "--save-every", 2, "--sample-every", 0)
PATIENCE = 120          # seconds in which a job with a killed process must have ended well


def start(out, args):
    """A job: python, or torchrun with several processes, which restarts them up to three times."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}", "--max-restarts=3")
    line = [sys.executable, *(torchrun if args.processes > 1 else ()), *RUN, "--steps", args.steps, "--out", out]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "output.txt", "a") as log:
        return subprocess.Popen(list(map(str, line)), cwd=ROOT, stdout=log, stderr=log,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def workers(process):
    """The numbers of torchrun's processes, which it may still have to start."""
    while process.poll() is None:
        if found := Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            return [int(number) for number in found]
        time.sleep(0.01)
    return []


def read_state(out):
    """{name: tensor} of a run's last checkpoint, whichever processes wrote it."""
    folder = next(iter(checkpoints(out).values()))
    saved = dcp.HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in saved.items()}
    load(folder, state)
    return state


def differences(out, other):
    """{name: largest difference} of the tensors of two runs' states that are not bitwise equal."""
    ours, theirs = read_state(out), read_state(other)
    return {name: (tensor - theirs[name]).abs().max().item() for name, tensor in ours.items()
            if not tensor.equal(theirs[name])}


def finish(process, out, seconds=None):
    """Wait for a job, which must end well. Raises BadInput."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise BadInput(f"not at its end {seconds} seconds after the kill: see {out / 'output.txt'}") from None
    if code:
        raise BadInput(f"exit code {code}: see {out / 'output.txt'}")


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--steps", type=int, default=30)
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    p.add_argument("--out", type=Path, help="(default: a temporary folder)")
    args = p.parse_args()
    draw, out = random.Random(args.seed), args.out or Path(tempfile.mkdtemp())
    began = time.time()
    finish(start(out / "whole", args), out / "whole")
    took = time.time() - began
    print(f"undisturbed: {took:.0f} s")
    kills = 0
    while kills < args.kills:
        shutil.rmtree(out / "killed", ignore_errors=True)
        ended = False
        while not ended:
            process, moment = start(out / "killed", args), draw.uniform(0, took)
            time.sleep(moment)
            victims = workers(process) if args.processes > 1 else [process.pid]
            ended = process.poll() is not None or kills == args.kills or not victims
            if not ended:
                with contextlib.suppress(ProcessLookupError):               # it has just ended by itself
                    os.kill(draw.choice(victims), signal.SIGKILL)
                kills += 1
                print(f"kill {kills} after {moment:.1f} s", end="", flush=True)
            killed = time.time()
            if args.processes > 1 or ended:
                finish(process, out / "killed", PATIENCE)
                print(f"; at its end {time.time() - killed:.0f} s later" if not ended else "", flush=True)
                ended = True
            else:
                process.wait()
                print()
        if wrong := differences(out / "whole", out / "killed"):
            raise BadInput(f"after {kills} kills {len(wrong)} tensors of the state are others: {out / 'killed'}")
    print(f"{kills} kills: every state was bitwise the undisturbed one")


if __name__ == "__main__":
    command(main)
