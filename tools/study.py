"""Which recipe is best: trains the embedded student in many ways, one table and one plot.

    python -m tools.study                       every row that is not there yet, hours on 2 cores; the same command resumes
    python -m tools.study --only default path   the rows whose names begin so
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # for `python tools/NAME.py`, too
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from checkpoint import command, read_json, write_file, write_json
from student import load_student
from tools.evaluate import Evaluation

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {}
MATCHING = ("match", "match-from", "match-guidance", "match-until", "critic-lr", "critic-updates")


def constant(name, value):
    """A variant that replaces a constant of train.py."""
    return lambda: setattr(train, name, value)


def betas(beta_1, beta_2):
    """Adam's betas, of both networks."""
    def patch():
        new = train.new_optimizer

        def new_optimizer(*args):
            optimizer = new(*args)
            optimizer.param_groups[0]["betas"] = (beta_1, beta_2)
            return optimizer
        train.new_optimizer = new_optimizer
    return patch


def times(power):
    """tau of u ** power: more of the clean times for powers above 1."""
    def patch():
        lo, hi = (max(1, round(share * 1000)) for share in train.MATCH_TIMES)
        train.match_time = lambda u, T: (lo + u**power * (hi - lo + 1)).long().clamp(max=hi)
    return patch


def matching_alone():
    """No loss of BOOT's, once its own steps are over."""
    zero = lambda student, teacher, eps, *_, **__: torch.zeros(len(eps), requires_grad=True)
    train.bootstrap_loss = train.boundary_loss = zero


VARIANTS = {
    "alone": matching_alone,
    "": lambda: None,
    "path2": constant("PATH_EVERY", 2), "path4": constant("PATH_EVERY", 4), "path_none": constant("PATH_EVERY", 10**9),
    "beta0": betas(0.0, 0.99), "beta.5": betas(0.5, 0.99),
    "times2": times(2), "times.5": times(0.5),
    "wide": constant("MATCH_TIMES", (0.001, 1.0)), "narrow": constant("MATCH_TIMES", (0.02, 0.7)),
}


def inner(job, args):
    """One training or evaluation, in a process of its own."""
    if "evaluate" in job:
        student = load_student(job["evaluate"])
        evaluation = Evaluation(student, job.get("images", 5000), student.pick_guidance(), job.get("seed", 0))
        row, _ = evaluation.measure(evaluation.one_step(), "student")
        return write_json(Path(job["result"]), row)
    VARIANTS[job.get("variant", "")]()
    if "until" in job:
        save = train.save

        def save_and_stop(out, student, state, step, options):
            save(out, student, state, step, options)
            if step == job["until"]:
                sys.exit()
        train.save = save_and_stop
    sys.argv = ["train.py", *args]
    command(train.main)


def digest(thing):
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:12]


def call(folder, threads, *args):
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(folder / "log.txt", "a") as log:
        subprocess.run([sys.executable, *map(str, args)], check=True, env=env, cwd=ROOT, stdout=log, stderr=log)


def flags(options):
    return [str(x) for key, value in options.items() for x in (f"--{key}", value)]


def measure(work, name, options, variant, seed, threads):
    """The figures of one recipe, from its folder, or trained and evaluated now."""
    options = {"steps": 1100, "match-from": 0.6364, "sample-every": 0, "seed": seed} | options
    folder = work / digest([options, variant])
    result = folder / "evaluation.json"
    if not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "recipe.json", {"name": name, "options": options, "variant": variant})
        warmup = options.get("warmup", 50)
        until = round(options["match-from"] * options["steps"]) - warmup
        common = {k: v for k, v in options.items() if k not in MATCHING}
        prefix = work / ("prefix-" + digest([common, until, variant if variant.startswith("beta") else ""]))
        if options.get("match") != 0 and not (folder / train.STATE).exists():
            with LOCKS.setdefault(prefix, threading.Lock()):
                if not (prefix / train.STATE).exists():
                    prefix.mkdir(parents=True, exist_ok=True)
                    job = {"until": until, "variant": variant if variant.startswith("beta") else ""}
                    call(prefix, threads, "-m", "tools.study", "--inner", json.dumps(job), "--", "--out", prefix,
                         *flags(options | {"save-every": until}))
            # the state, as if this recipe had made it
            call(folder, threads, "-m", "tools.study", "--inner", json.dumps({"until": 0}), "--", "--out", folder,
                 "--dry-run", *flags(options))
            with safe_open(prefix / train.STATE, "pt") as file:
                metadata = file.metadata()
            theirs = json.loads(metadata["options"])
            for key in MATCHING:
                key_ = key.replace("-", "_")
                if key in options:
                    theirs[key_] = type(theirs[key_])(options[key])
                else:
                    theirs[key_] = {"match": 1.0, "match_from": 0.6, "match_guidance": 0.75, "match_until": 0.7,
                                    "critic_lr": 2e-4, "critic_updates": 1}[key_]
            metadata["options"] = json.dumps(theirs)
            tensors = load_file(prefix / train.STATE)
            write_file(folder / train.STATE, lambda path: save_file(tensors, path, metadata))
        call(folder, threads, "-m", "tools.study", "--inner", json.dumps({"variant": variant}), "--", "--out", folder,
             *flags(options))
        call(folder, threads, "-m", "tools.study", "--inner", json.dumps({"evaluate": str(folder), "result": str(result)}),
             "--")
        (folder / train.STATE).unlink()
    return read_json(result)


def main():
    if "--inner" in sys.argv:
        k = sys.argv.index("--inner")
        return inner(json.loads(sys.argv[k + 1]), sys.argv[k + 3:])
    p = argparse.ArgumentParser()
    p.add_argument("--work", type=Path, default=Path("runs/study"))
    p.add_argument("--recipes", type=Path)
    p.add_argument("--jobs", type=int, default=2)
    args = p.parse_args()
    recipes = json.loads(args.recipes.read_text())
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [(r, pool.submit(measure, args.work.absolute(), r[0], r[1], r[2], r[3], threads)) for r in recipes]
        for r, future in futures:
            try:
                row = future.result()
            except Exception as error:
                print(r, error)
                continue
            print(f"{r[0]:40} {r[3]} {row['frechet']:6.2f} {row['precision']:.3f} {row['recall']:.3f} {row['align_seen']:.3f} {row['align_heldout']:.3f} {[round(127.5 * c, 1) for c in row['channel_mean'] + row['channel_std']]}", flush=True)
    return None


if __name__ == "__main__":
    main()
