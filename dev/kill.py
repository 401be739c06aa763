"""Kill training at random moments, again and again: is its state bitwise that of an undisturbed run?

    python -m dev.kill                                      20 kills of one process, 5 minutes on two cores
    python -m dev.kill --processes 2 --kills 10             one of two at a time, which torchrun restarts; Linux
    python -m dev.kill --kills 2 -- --precision bf16        with options of train.py

A run is of the embedded teacher, in small batches, with matching. It saves a checkpoint after every second step, so
that many kills meet one. A moment is drawn from the length of an undisturbed run, its start included. One should see
each kill, and at the end that every state was the same. If one differs, the command names its folder and fails.
"""

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

from plumbing.checkpoints import checkpoints, load
from plumbing.files import BadInput, check_new, command, new_parser, user_path
from plumbing.hub import ROOT

RUN = ("train.py", "--batch", 8, "--warmup", 2, "--match-from", 0.5, "--every", 2, "--samples", 0)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--max-restarts=3")
PATIENCE = 120          # seconds in which torchrun must have brought a job with a killed process to its end


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
    if ours.keys() != theirs.keys():
        raise BadInput(f"{out} and {other} do not hold the same tensors: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    return {name: (tensor - theirs[name]).abs().max().item() for name, tensor in ours.items()
            if not tensor.equal(theirs[name])}


def start(out, args):
    """A job: python, or torchrun with several processes, which restarts them up to three times."""
    line = [sys.executable, *RUN, "--steps", args.steps, "--out", out, *args.options]
    if args.processes > 1:
        line[1:1] = [*TORCHRUN, f"--nproc_per_node={args.processes}"]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "output.txt", "a") as log:
        return subprocess.Popen(list(map(str, line)), cwd=ROOT, stdout=log, stderr=log,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(job, out, seconds=None):
    """Wait for a job, which must end well. Raises BadInput."""
    try:
        code = job.wait(seconds)
    except subprocess.TimeoutExpired:
        job.terminate()
        raise BadInput(f"not at its end {seconds} seconds after the kill: see {out / 'output.txt'}") from None
    if code:
        raise BadInput(f"exit code {code}: see {out / 'output.txt'}")


def victims(job, args):
    """The processes of a job that train, none if it has ended: itself, or torchrun's children, once there are any."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    found = []
    while job.poll() is None and not found:
        found = [job.pid] if args.processes == 1 else list(map(int, children.read_text().split()))
        time.sleep(0.01)
    return found


def train_and_kill(out, args, length, draw, most):
    """A run that is killed at moments up to its undisturbed length, and started again after each, until it is whole.
    Returns how often it was killed, `most` times at most."""
    kills = 0
    while True:
        job, moment = start(out, args), draw.uniform(0, length)
        time.sleep(moment)
        alive = victims(job, args)
        if not alive or kills == most:
            finish(job, out)
            return kills
        with contextlib.suppress(ProcessLookupError):       # it ends at this moment
            os.kill(draw.choice(alive), signal.SIGKILL)
        kills += 1
        print(f"a kill after {moment:.1f} s", flush=True)
        if args.processes > 1:
            finish(job, out, PATIENCE)
            return kills
        job.wait()


def main():
    parser = new_parser(__doc__)
    option = parser.add_argument
    option("--processes", type=int, default=1)
    option("--kills", type=int, default=20)
    option("--steps", type=int, default=30)
    option("--seed", type=int, default=0, help="of the moments")
    option("--out", type=user_path, help="(default: a temporary folder)")
    option("options", nargs="*", help="after --: train.py's, such as -- --precision bf16")
    args = parser.parse_args()
    draw, out = random.Random(args.seed), args.out or Path(tempfile.mkdtemp())
    check_new(out)
    whole, killed = out / "whole", out / "killed"
    began = time.time()
    finish(start(whole, args), whole)
    length = time.time() - began
    print(f"undisturbed: {length:.0f} s")
    kills = 0
    while kills < args.kills:
        shutil.rmtree(killed, ignore_errors=True)
        kills += train_and_kill(killed, args, length, draw, args.kills - kills)
        if wrong := differences(whole, killed):
            raise BadInput(f"after {kills} kills {len(wrong)} tensors of the state differ, by up to "
                           f"{max(wrong.values()):.1e}: {killed}")
    print(f"{kills} kills: every state was bitwise the undisturbed one")


if __name__ == "__main__":
    command(main)
