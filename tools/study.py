"""Which recipe is best: the embedded student, trained in many ways; one table and one plot.

    python -m tools.study                       what is not there yet, 8 minutes a row, the last one two hours; the same
                                                command goes on
    python -m tools.study --only weight noisier the rows whose names begin so

Each row is `train.py` with other options, or with a function of it replaced (VARIANTS). Rows that agree until matching
begins share that part. Results are kept in runs/study by a hash of recipe and matching loss; two rows at once, a core
each. plot.png there has quality against the network evaluations of training: a sample's pass is one, with its gradient
to the input two, to the weights three.
"""

import argparse
import functools
import hashlib
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.modules.module import register_module_forward_pre_hook

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # for `python tools/NAME.py`, too
import train
from checkpoint import BadInput, command, read_json, write_file, write_json
from model import UNet
from run import INFO, Saver, checkpoints
from signal_ode import like, noisy
from student import load_student
from tools.evaluate import STEPS, Evaluation, drift, teacher_rows

ROOT = Path(__file__).resolve().parent.parent
BASE = {"sample-every": 0}                      # train.py's defaults for tiny: 585 steps of BOOT, 715 matched ones
LATER = ("steps", "match", "match_from", "match_guidance", "match_until", "critic_lr", "critic_updates")
# name, options beyond BASE, variant
RECIPES = (
    ("BOOT alone", {"match": 0}, ""),
    ("the defaults", {}, ""),
    ("BOOT's losses in every step", {}, "path1"),
    ("BOOT's losses dropped", {}, "alone"),
    ("no BOOT's loss at the clean end", {}, "noclean"),
    ("weight 1", {"match": 1}, ""),
    ("weight 4", {"match": 4}, ""),
    ("weight by gradient norms", {"match": 1}, "adaptive"),
    ("critic's rate 2e-5", {"critic-lr": 2e-5}, ""),
    ("critic's rate 1e-4", {"critic-lr": 1e-4}, ""),
    ("critic's rate 5e-4", {"critic-lr": 5e-4}, ""),
    ("critic's rate falling", {}, "falling"),
    ("critic's rate 1e-4, falling", {"critic-lr": 1e-4}, "falling"),
    ("both rates halved", {"match-lr": 5e-5, "critic-lr": 2.5e-5}, ""),
    ("both rates doubled", {"match-lr": 2e-4, "critic-lr": 1e-4}, ""),
    ("2 critic updates", {"critic-updates": 2, "steps": 2015, "match-from": 0.2903}, ""),
    ("5 critic updates", {"critic-updates": 5, "steps": 4160, "match-from": 0.1406}, ""),
    ("Adam's beta_1 = 0.9", {}, "momentum"),
    ("Adam's beta_1 = 0.9, critic's rate 5e-4", {"critic-lr": 5e-4}, "momentum"),
    ("guidance 1 + 0.5 (w - 1)", {"match-guidance": 0.5}, ""),
    ("guidance 1 + 0.75 (w - 1)", {"match-guidance": 0.75}, ""),
    ("guidance at all times", {"match-until": 1}, ""),
    ("guidance up to 0.5 T", {"match-until": 0.5}, ""),
    ("cleaner times", {}, "times2"),
    ("noisier times", {}, "times.5"),
    ("the difference of the scores", {}, "difference"),
    ("the difference of the scores, guidance 1 + 0.75 (w - 1)", {"match-guidance": 0.75}, "difference"),
    ("that difference, of length one", {}, "unit"),
    ("hard boundary", {}, "hard"),
    ("matching from an early step on", {"match-from": 0.1}, ""),
    ("15 target steps", {"num-steps": 15}, ""),
    ("Euler, 20 target steps", {"num-steps": 20, "solver": "euler"}, ""),
    ("ten times the default length", {"steps": 13000, "match-from": 0.45, "save-every": 650}, "watched"),
)
CONSTANTS = ("INPUT_NOISE", "BOUNDARY_EVERY", "PATH_EVERY", "BETA_1", "MATCH_BETA_1", "MATCH_TIMES")
COLUMNS = (("frechet", ".1f"), ("precision", ".3f"), ("recall", ".3f"), ("align_seen", ".1%"), ("align_heldout", ".1%"))
LOCKS = {}


def constant(name, value):
    """A variant that replaces a constant or function of train.py."""
    return lambda: setattr(train, name, value)


def times(power):
    """tau of u ** power: more of the clean times for powers above 1."""
    uniform = train.match_time
    return constant("match_time", lambda u, T: uniform(u**power, T))


def difference_loss(x, teacher, critic, n, tau, schedule, clip=None, unit_length=False, **condition):
    """The loss of Diff-Instruct, SwiftBrush and DMD in place of SiD's: 1/2 || x - stopgrad[x - d] ||^2, whose gradient
    is d = h - f, up to a factor that of KL(student || teacher); in units of |x - f|, or with d of length one. And h."""
    x_tau = noisy(x.detach(), n, tau, schedule)
    whole_h = critic(x_tau, tau, **condition)
    with torch.no_grad():
        f = teacher(x_tau, tau, **condition)
        d = (whole_h if clip is None else whole_h.clamp(-1.5 * clip, 1.5 * clip)) - f
        unit = d.square().flatten(1).mean(1).sqrt() if unit_length else (x - f).abs().flatten(1).mean(1)
        target = x - d / like(unit, x)
    return 0.5 * (x - target).square().flatten(1).mean(1), whole_h


def hard_boundary():
    """PID's boundary (Tee et al. 2024, arXiv 2411.08378): g is f(eps, T) at T by construction, and not by a loss."""
    losses = train.boot_losses

    def boot_losses(student, teacher, eps, t, s, schedule, _, *settings, **condition):
        with torch.no_grad():
            start = teacher(eps, torch.full_like(t, schedule.T), **condition)

        def pinned(eps, t, **condition):
            share = like(t / schedule.T, eps)
            return share * start + (1 - share) * student(eps, t, **condition)
        return losses(pinned, teacher, eps, t, s, schedule, slice(0), *settings, **condition)
    train.boot_losses = boot_losses


def adaptive_weight():
    """The weight of L_M by gradient norms at the last layer, those of L_BS over those of L_M, averaged over steps."""
    boot, matching, seen = train.boot_losses, train.matching_loss, {}

    def norm(loss):
        [gradient] = torch.autograd.grad(loss.mean(), seen["last"], retain_graph=True)
        return gradient.norm().item()

    def boot_losses(student, *args, **condition):
        seen["last"] = student.network.conv_out.weight
        L_BS, L_BC = boot(student, *args, **condition)
        size = norm(L_BS)
        seen["path"] = 0.95 * seen.get("path", size) + 0.05 * size
        return L_BS, L_BC

    def matching_loss(*args, **condition):
        loss, h = matching(*args, **condition)
        size = norm(loss)
        seen["match"] = 0.95 * seen.get("match", size) + 0.05 * size
        return seen.get("path", size) / seen["match"] * loss, h
    train.boot_losses, train.matching_loss = boot_losses, matching_loss


def no_clean_end():
    """BOOT's loss without the samples whose s is the clean end, g(eps, 0), which is matched instead."""
    losses = train.boot_losses

    def boot_losses(student, teacher, eps, t, s, *args, **condition):
        L_BS, L_BC = losses(student, teacher, eps, t, s, *args, **condition)
        return L_BS * (s > 0), L_BC
    train.boot_losses = boot_losses


def falling():
    """The critic's rate falls as the student's does."""
    new, rate, made = train.new_optimizer, train.learning_rate, []

    def new_optimizer(*args):
        made.append(new(*args))
        return made[-1]

    def learning_rate(step, args, match_from):
        lr = rate(step, args, match_from)
        if step >= match_from:
            made[1].param_groups[0]["lr"] = args.critic_lr * lr / args.match_lr
        return lr
    train.new_optimizer, train.learning_rate = new_optimizer, learning_rate


def watched():
    """The student of every checkpoint is kept, to be measured: does a long run collapse?"""
    save = Saver.save

    def save_and_keep(self, state, student, step):
        save(self, state, student, step)
        self.wait()
        shutil.copytree(self.out / "student", self.out / f"step_{step}", dirs_exist_ok=True)
    Saver.save = save_and_keep


VARIANTS = {
    "difference": constant("matching_loss", difference_loss),
    "unit": constant("matching_loss", functools.partial(difference_loss, unit_length=True)),
    "hard": hard_boundary, "adaptive": adaptive_weight, "noclean": no_clean_end,
    "watched": watched, "falling": falling,
    "": lambda: None, "path1": constant("PATH_EVERY", 1), "alone": constant("PATH_EVERY", math.inf),
    "momentum": constant("MATCH_BETA_1", 0.9), "times2": times(2), "times.5": times(0.5),
}


def inner(job, args):
    """One training or evaluation, in a process of its own."""
    if "evaluate" in job:
        student = load_student(job["evaluate"])
        evaluation = Evaluation(student, 5000, student.pick_guidance(), 0)
        rows, reference, solution = teacher_rows(evaluation, STEPS[-1:], fresh=False)
        aim = rows[evaluation.w, STEPS[-1]]
        row, _ = evaluation.measure(evaluation.one_step(), "student", reference, solution)
        return write_json(Path(job["result"]), row | {"aim": aim["frechet"], "drift": drift(row, aim)})
    VARIANTS[job.get("variant", "")]()
    save, passes = Saver.save, Path(job["passes"])
    count = read_json(passes) if passes.exists() else {"passes": 0}

    def hook(module, inputs):
        if isinstance(module, UNet):
            gradient = 1 if inputs[0].requires_grad else 2              # to the input alone, or to the weights as well
            count["passes"] += len(inputs[0]) * (1 + gradient * torch.is_grad_enabled())

    def save_and_count(self, state, student, step):
        save(self, state, student, step)
        self.wait()
        write_json(passes, count)                           # with the state: what is lost of a run is not counted
        if step == job.get("until"):
            sys.exit()
    register_module_forward_pre_hook(hook)
    Saver.save, sys.argv = save_and_count, ["train.py", *args]
    return command(train.main)


def call(folder, threads, job, *args):
    """Do a job in a process of its own, whose output goes to the folder's log.txt."""
    job |= {"passes": str(folder / "passes.json")}
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(folder / "log.txt", "a") as log:
        done = subprocess.run([sys.executable, "-m", "tools.study", "--inner", json.dumps(job), "--",
                               *map(str, args)], env=env, cwd=ROOT, stdout=log, stderr=log)
    if done.returncode:
        raise BadInput(f"a row failed: see {folder / 'log.txt'}")


def texts(row):
    return [f"{row[key]:{form}}" for key, form in COLUMNS]


def settings(options):
    """What train.py makes of the options, defaults and all, and its constants."""
    args = vars(train.parse_args(flags(options))) | {name: getattr(train, name) for name in CONSTANTS}
    return {name: str(value) for name, value in args.items() if name not in ("out", "device", "dry_run", "shard")}


def digest(*what):
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def flags(options):
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def begin(work, folder, options, variant, threads):
    """Give the folder the state in which matching begins, of a recipe that is the same until there, or trained now."""
    args = train.parse_args(flags(options))
    match_from = max(round(args.match_from * args.steps), args.warmup)
    until = match_from - args.warmup                                        # where the critic begins to learn
    if until == 0 or not args.match:
        return
    early = variant if variant == "hard" else ""
    prefix = work / f"until-{digest({k: v for k, v in settings(options).items() if k not in LATER}, match_from, early)}"
    with LOCKS.setdefault(prefix, threading.Lock()):
        if until not in checkpoints(prefix):
            prefix.mkdir(parents=True, exist_ok=True)
            saving = {**options, "save-every": math.gcd(until, 100)}
            call(prefix, threads, {"until": until, "variant": early}, *flags(saving), "--out", prefix)
    shutil.copy(prefix / "passes.json", folder)
    state = folder / "state" / f"step_{until}"
    half = shutil.copytree(checkpoints(prefix)[until], state.with_suffix(".new"), dirs_exist_ok=True)
    info = read_json(half / INFO)
    info["options"] |= {name: getattr(args, name) for name in LATER}
    write_json(half / INFO, info)
    half.rename(state)


def measure(work, recipe, seed, threads):
    """The figures of one recipe and seed: those in its folder, or trained and evaluated now."""
    name, options, variant = recipe
    options = {**BASE, **options, "seed": seed}
    folder = work / digest(settings(options), variant, inspect.getsource(train.matching_loss))
    result = folder / "evaluation.json"
    if not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "recipe.json", {"name": name, "options": options, "variant": variant})
        if not checkpoints(folder):
            begin(work, folder, options, variant, threads)
        call(folder, threads, {"variant": variant}, *flags(options), "--out", folder)
        for student in (*folder.glob("step_*"), folder / "student"):
            call(folder, threads, {"evaluate": str(student), "result": str(student / "evaluation.json")})
        (folder / "student" / "evaluation.json").rename(result)
        shutil.rmtree(folder / "state")
    on_the_way = {path.parent.name: read_json(path) for path in folder.glob("step_*/evaluation.json")}
    return read_json(result) | read_json(folder / "passes.json") | {"on_the_way": on_the_way}


def attempt(*row):
    """What measure returns, or the error that it ends with: the other rows go on."""
    try:
        return measure(*row)
    except BadInput as error:
        return error


def plot(path, rows):
    """A PNG: the Frechet distance of each row, by its number, over its network evaluations, on a logarithmic scale; the
    teacher's is a line."""
    (width, height), margin, font = (960, 640), 56, ImageFont.load_default(16)
    image = Image.new("RGB", (width, height), "white")
    drawing = ImageDraw.Draw(image)
    aim = rows[0]["aim"]
    xs, ys = [math.log10(row["passes"] / 1e6) for row in rows], [row["frechet"] for row in rows]
    left, right, low, high = min(xs) - 0.02, max(xs) + 0.02, min(*ys, aim) - 1, max(*ys, aim) + 1

    def place(x, y):
        return (margin + (x - left) / (right - left) * (width - 2 * margin),
                margin + (high - y) / (high - low) * (height - 2 * margin))
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = left + share * (right - left), low + share * (high - low)
        x, y = place(*value)
        drawing.line((margin, y, width - margin, y), "lightgrey")
        drawing.text((x, height - margin + 8), f"{10 ** value[0]:.2f}", "black", font, anchor="mt")
        drawing.text((margin - 8, y), f"{value[1]:.1f}", "black", font, anchor="rm")
    drawing.text((width / 2, height - 8), "million network evaluations in training", "black", font, anchor="mb")
    drawing.text((8, 8), "Frechet distance of the student's one step; blue: the teacher's fifty", "black", font)
    drawing.line((*place(left, aim), *place(right, aim)), "blue")
    for number, (x, y) in enumerate(zip(xs, ys), 1):
        drawing.text(place(x, y), str(number), "black", font, anchor="mm")
    write_file(path, functools.partial(image.save, format="PNG"))


def main():
    if sys.argv[1:2] == ["--inner"]:
        return inner(json.loads(sys.argv[2]), sys.argv[4:])
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="beginnings of the names of the rows")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="of each row (default: 0)")
    p.add_argument("--work", type=Path, default=Path("runs/study"), help="(default: %(default)s)")
    p.add_argument("--jobs", type=int, default=2, help="rows at once (default: %(default)s)")
    args = p.parse_args()
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    rows = [(recipe, seed) for recipe in RECIPES if recipe[0].startswith(tuple(args.only)) for seed in args.seeds]
    if not rows:
        raise BadInput(f"no row's name begins with {' or '.join(args.only)}")
    print("| | recipe | seed | Frechet distance | precision | recall | alignment, seen | held out | evaluations, M |")
    print("|---|---|---|---|---|---|---|---|---|")
    with ThreadPoolExecutor(args.jobs) as pool:
        results = []
        measured = pool.map(lambda row: attempt(args.work.absolute(), *row, threads), rows)
        for ((name, *_), seed), row in zip(rows, measured):
            if isinstance(row, BadInput):
                print(f"| | {name} | {seed} | {row} | | | | | |", flush=True)
                continue
            results.append(row)
            for step, figures in sorted(row["on_the_way"].items(), key=lambda item: int(item[0].split("_")[1])):
                print(f"| | {name}, {step} | {seed} | {' | '.join(texts(figures))} | |")
            passes = f"{row['passes'] / 1e6:.2f}"
            print(f"| {len(results)} | {name} | {seed} | {' | '.join(texts(row))} | {passes} |", flush=True)
    if results:
        plot(args.work / "plot.png", results)
    if len(results) < len(rows):
        raise BadInput(f"{len(rows) - len(results)} of {len(rows)} rows failed")
    return None


if __name__ == "__main__":
    command(main)
