"""Run the commands of README and docs, on small substitutes, and list those that are not run, with the reason.

    python -m dev.commands                                  all of them, about a quarter of an hour of two cores
    python -m dev.commands README.md docs/running.md        those of these pages

It takes the lines of the blocks of code that begin with python or torchrun, in the order of the pages, and runs them in
a copy of the last commit, so nothing here changes. The embedded teacher stands for Stable Diffusion there, two
processes for eight, and four steps for a training. Whether the options of all commands exist is a test:
tests/test_commands.py.
"""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plumbing.files import BadInput, command, new_parser
from plumbing.hub import ROOT

PAGES = ["README.md", *sorted(glob.glob("docs/*.md", root_dir=ROOT)), "tiny/README.md"]
SUBSTITUTES = [
    (r"--teacher (\./)?sd21\b", "--teacher tiny"), (r"--nproc_per_node=8", "--nproc_per_node=2"),
    (r"madebyollin/taesd", "tiny/decoder"), (r"tiny/prompts\.txt|many\.txt", "tiny/showcase.txt"),
    (r"--num (16|64)", "--num 4"), (r"--seed 0:6", "--seed 0:1"), (r"--device cuda", "--device cpu")]
MADE = {"sd21": "", "range": "--guidance 2:4", "ddpm-cifar10": ""}      # runs that the pages take for granted
SHORT = "--steps 4 --warmup 1 --match-from 0.5 --every 2 --samples 2 --batch 4"
IS_PATTERN, IS_OLD = "is a pattern, which has no values", "has options of an earlier commit"
NOT_RUN = [
    (r"FOLDER|OWNER|OPTIONS|\bPRICE\b", IS_PATTERN),
    (r"--push|--nnodes", "needs an account, or a second machine; tests have a hub and a cluster of their own"),
    (r"--match-guidance", IS_OLD),
    (r"ComfyUI", "needs ComfyUI: dev.comfy runs it"),
    (r"http\.server|tools\.demo", "serves until it is stopped; tests/test_pages.py visits the pages"),
    (r"train_tiny$|--stages|--fresh|dev\.kill|dev\.paper ablations|lab (?!--table)|--measure", "takes an hour or more"),
    (r"dev\.bench|dev\.synthesise", "is for the size of Stable Diffusion; tests run it on a small one"),
    (r"dev\.paper uncurated", "needs a student that takes twenty minutes"),
    (r"coco", "needs weights and images; tests/test_fidelity.py runs it on small ones"),
    (r"tools\.plan", "counts for minutes; tests/test_plan.py has it")]


def commands_of(page):
    """The commands of a page's blocks of code, one by one, without their comments."""
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s#(?=\s)", line)[0].split("&&"):
                words = part.split()
                if re.match(r"(python|torchrun)\b", part.strip()):
                    yield " ".join(words)


def substitute(text):
    """The command that stands for one of a page."""
    for pattern, replacement in SUBSTITUTES:
        text = re.sub(pattern, replacement, text)
    return f"{text} {SHORT}" if "train.py" in text else text


def why_not(text):
    """The reason why a command is not run, or None."""
    return next((reason for pattern, reason in NOT_RUN if re.search(pattern, text)), None)


def run(text, folder):
    """Run a command; returns the end of what it said, or None if it went well. A training begins anew."""
    words = shlex.split(text)
    if "train.py" in words:
        out = folder / (words[words.index("--out") + 1] if "--out" in words else "runs/tiny")
        if not out.resolve().is_relative_to(folder.resolve()):
            raise BadInput(f"--out {out} is outside of the copy: {text}")
        shutil.rmtree(out, ignore_errors=True)
    program = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
    done = subprocess.run([*program, *words[1:]], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return None if done.returncode == 0 else (done.stderr + done.stdout).strip()[-300:] or "no word"


def main():
    p = new_parser(__doc__)
    p.add_argument("pages", nargs="*", default=PAGES)
    args = p.parse_args()
    skipped, failed, seen = [], [], set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "x"], cwd=folder, input=archive.stdout, check=True)
        for name, options in MADE.items():
            if error := run(f"python train.py --out runs/{name} {options} {SHORT}", folder):
                raise BadInput(error)
        for page in args.pages:
            for text in commands_of(page):
                reason, own = why_not(text), substitute(text)
                if reason:
                    skipped.append(f"{page}: {text}\n    {reason}")
                if reason or own in seen:
                    continue
                seen.add(own)
                began, error = time.time(), run(own, folder)
                print(f"{'FAILED' if error else 'ran'} {time.time() - began:4.0f} s  {own}", flush=True)
                if error:
                    failed.append(f"{page}: {text}\n    {error}")
    print(f"\n{len(seen) - len(failed)} ran, {len(failed)} failed, {len(skipped)} not run:\n")
    print("\n".join([*failed, *skipped]))
    sys.exit(len(failed) > 0)


if __name__ == "__main__":
    command(main)
