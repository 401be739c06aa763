"""Quality and speed of a student of the embedded teacher, beside the teacher's own DDIM at 1 to 50 steps.

    python -m tools.evaluate --student runs/tiny                    5,000 images, half a minute
    python -m tools.evaluate --student runs/tiny --refine 1 2 4     and refined by so many steps of the teacher
    python -m tools.evaluate --student runs/tiny --fresh            measure the teacher again too, half an hour
    python -m tools.evaluate --seed 1 --steps 50 --sweep            other noises and prompts, less of the teacher

The teacher's rows are measured once for each guidance, seed and number of images, and stored in its folder: at the
student's scale w, and with the most steps also at the scale at which its pictures are best.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import operator
import random
import sys
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from plumbing.files import BadInput, command, read_json, write_file, write_json
from plumbing.hub import TINY
from plumbing.weights import read_tensors
from student import REFINE_FROM, load_student
from plumbing.images import image_grid, noise, to_pil
from plumbing.processes import pick_device
from tools.judge import frechet, load_judge, moments, prompt

STEPS = (1, 2, 4, 8, 10, 25, 50)
SWEEP, SWEEP_STEPS = (1.0, 1.5, 2.0, 2.5), 10               # where the teacher's best scale is sought
EXACT = 2**17                               # numbers of exact solutions that are kept to measure against
COLUMNS = (("frechet", ".2f"), ("to_teacher", ".2f"), ("drift", ".1f"), ("precision", ".3f"), ("recall", ".3f"),
           ("align_seen", ".1%"), ("align_heldout", ".1%"), ("rmse", ".4f"), ("images_per_s", ".1f"))


def neighbour_radius(features, k=3):
    """Distance of every feature (N, D) to its k-th nearest other: (N,)."""
    return torch.cat([torch.cdist(part, features).kthvalue(k + 1).values for part in features.split(1000)])


def covered(a, b, radius):
    """Share of a (N, D) that lies within the radius (M,) of some b (M, D)."""
    inside = [(torch.cdist(part, b) <= radius).any(1) for part in a.split(1000)]
    return torch.cat(inside).float().mean().item()


def precision_recall(fake, real):
    """Improved precision and recall (Kynkaanniemi et al. 2019), k = 3."""
    return covered(fake, real, neighbour_radius(real)), covered(real, fake, neighbour_radius(fake))


def judge_folder(teacher):
    """The judge of an embedded teacher, its own or the one they share. Raises BadInput."""
    for folder in (teacher.folder / "judge", teacher.folder.parent / "judge"):
        if folder.is_dir():
            return folder
    raise BadInput(f"teacher {teacher.spec} has no judge/ to measure its pictures with; the embedded ones have")


def combinations(config, num, seed):
    """num combinations (garment, colour, background): garments in turn, random colours, never two alike."""
    rng, pairs = random.Random(seed), list(itertools.permutations(config["colours"], 2))
    return [(config["garments"][k % len(config["garments"])], *rng.choice(pairs)) for k in range(num)]


class Evaluation:
    """One set of prompts and noises, on which any sampler is measured: a callable (eps, **condition) -> latents."""

    def __init__(self, student, images, w, seed, batch=250):
        self.student, self.teacher, self.w, self.batch = student, student.teacher, w, batch
        folder = judge_folder(self.teacher)
        self.judge, self.config = load_judge(folder, self.teacher.device)
        reference = folder / "reference.safetensors"
        self.real = read_tensors(reference, dtype=torch.float32)[0]["features"]
        self.real_moments = moments(self.real)
        self.combinations = combinations(self.config, images, seed)
        if self.teacher.labels:                    # told the garment alone; its colours are free
            self.combinations = [(garment,) for garment, _, _ in self.combinations]
        self.num_exact = min(images, EXACT // math.prod(self.teacher.shape))
        self.seeds = range(seed * 10**6, seed * 10**6 + images)
        held_out = {tuple(c) for c in self.config["held_out"]}
        self.held_out = torch.tensor([c in held_out for c in self.combinations])
        garments, colours = self.config["garments"], self.config["colours"]
        self.labels = torch.tensor([[words.index(word) for words, word in zip((garments, colours, colours), c)]
                                    for c in self.combinations])

    def inputs(self, part):
        """eps and condition of a slice of the images."""
        eps = noise(self.seeds[part], self.teacher.shape).to(self.teacher.device)
        return eps, self.teacher.encode([c[0] if len(c) == 1 else prompt(*c) for c in self.combinations[part]])

    def ddim(self, steps, w=None):
        """The teacher, guided by w or else as the student is, in that many DDIM steps, as a sampler."""
        return functools.partial(self.teacher.solve, grid=self.teacher.schedule.grid(steps),
                                 w=self.w if w is None else w)

    def one_step(self, refine=0):
        """The student, refined by so many steps of the teacher, as a sampler."""
        return functools.partial(self.student.refine, steps=refine, w=self.w)

    def solution(self):
        """The student's aim, as a sampler: the Signal-ODE's end from y_T = f(eps, T), 50 steps of Heun."""
        return functools.partial(self.ddim(50), solver="heun", space="y")

    @torch.no_grad()
    def sample(self, sampler, num, name):
        parts = [slice(k, min(k + self.batch, num)) for k in range(0, num, self.batch)]
        inputs = (self.inputs(part) for part in tqdm(parts, name, leave=False))
        return torch.cat([sampler(eps, **condition) for eps, condition in inputs])

    @torch.no_grad()
    def pictures(self, sampler):
        """The first ten, for people."""
        eps, condition = self.inputs(slice(0, 10))
        return to_pil(self.teacher.decode(sampler(eps, **condition), self.seeds))

    @torch.no_grad()
    def measure(self, sampler, name, reference=None, solution=None):
        """A row's figures of quality, and the moments of its features. reference: the moments of those of the teacher's
        pictures; solution: the exact samples of the first noises."""
        latents = self.sample(sampler, len(self.seeds), name)
        parts = [slice(k, k + self.batch) for k in range(0, len(latents), self.batch)]
        features, channels = [], []
        for part in parts:
            images = self.teacher.decode(latents[part], self.seeds[part])
            features.append(self.judge(images))
            channels.append(torch.stack([images, images.square()]).cpu().double().mean((3, 4)))        # (2, B, 3)
        features = torch.cat(features)
        answers = [a.argmax(1).cpu() for a in self.judge.answers(features)]
        right = torch.stack(answers[:self.labels.shape[1]], 1) == self.labels
        features = features.cpu()
        own = moments(features)
        precision, recall = precision_recall(features, self.real)
        row = {"frechet": frechet(own, self.real_moments), "precision": precision, "recall": recall}
        row["to_teacher"] = None if reference is None else frechet(own, reference)
        for which, mask in (("seen", ~self.held_out), ("heldout", self.held_out)):
            if not mask.any():
                row[f"align_{which}"] = None
                continue
            row[f"align_{which}"] = right[mask].all(1).float().mean().item()
            row |= {f"{attribute}_{which}": value for attribute, value in
                    zip(("garment", "colour", "background"), right[mask].float().mean(0).tolist())}
        mean, square = torch.cat(channels, 1).mean(1)
        row |= {"channel_mean": mean.tolist(), "channel_std": (square - mean**2).sqrt().tolist(), "rmse": None}
        if solution is not None:
            row["rmse"] = (latents[:len(solution)].cpu() - solution).square().mean().sqrt().item()
        return row, own

    @torch.no_grad()
    def seconds(self, function):
        """Seconds an image of a function of (eps, **condition), on this machine: the median of three batches."""
        eps, condition = self.inputs(slice(0, self.batch))
        times = []
        for _ in range(4):                                                  # the first is not counted
            began = time.perf_counter()
            function(eps, **condition).sum().item()                                # .item() waits for a GPU
            times.append(time.perf_counter() - began)
        return sorted(times[1:])[1] / len(eps)


def passes(steps, w):
    """Network passes of so many of the teacher's steps."""
    return steps * (1 if w == 1 else 2)


def stored(evaluation, *settings):
    """The path, without suffix, in the teacher's folder, of what is measured with its files and with these settings."""
    folder, digest = evaluation.teacher.folder, hashlib.sha256()
    for part in (*(folder / name for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")),
                 judge_folder(evaluation.teacher)):
        for path in sorted(p for p in part.glob("*") if p.is_file()):
            digest.update(path.read_bytes())
    settings = [*settings, evaluation.teacher.negative_prompt, evaluation.seeds[0], len(evaluation.seeds)]
    digest.update(json.dumps(settings).encode())
    return folder / "evaluation" / digest.hexdigest()[:16]


def read_rows(path):
    """The rows of a file by (w, steps); none if there is no such file."""
    rows = read_json(path, list) if path.exists() else []
    return {(row["guidance"], row["steps"]): row for row in rows}


def add_row(evaluation, rows, path, w, steps, reference=None, solution=None):
    """Measure the teacher at w in so many steps, unless that is known. A row is stored at once, so that an interrupted
    measurement goes on. Returns the moments of its pictures, if it was measured."""
    if (w, steps) in rows:
        return None
    row, own = evaluation.measure(evaluation.ddim(steps, w), f"DDIM-{steps}, w = {w}", reference, solution)
    rows[w, steps] = {"sampler": "ddim", "guidance": w, "steps": steps, "nfe": passes(steps, w)} | row
    store(write_json, path, list(rows.values()))
    return own


def teacher_rows(evaluation, steps, fresh):
    """(rows, reference, solution) of the teacher at the student's scale: its rows by (w, steps), of so many steps and
    of the most; the moments of its pictures in the most; exact samples of the first noises."""
    w, most = evaluation.w, STEPS[-1]
    path = stored(evaluation, w, evaluation.num_exact)
    path, tensors_path = path.with_suffix(".json"), path.with_suffix(".safetensors")
    rows = read_rows(path) if tensors_path.exists() and not fresh else {}
    if not {(w, k) for k in (*steps, most)} <= rows.keys():
        print(f"measuring the teacher on {len(evaluation.seeds)} images, and storing it in {path.parent}", flush=True)
    if rows:
        tensors, _ = read_tensors(tensors_path)
    else:
        solution = evaluation.sample(evaluation.solution(), evaluation.num_exact, "Signal-ODE solution").half().cpu()
        mean, covariance = add_row(evaluation, rows, path, w, most, solution=solution.float())
        tensors = {"solution": solution, "mean": mean, "covariance": covariance}
        store(write_file, tensors_path, lambda p: save_file(tensors, p))
    reference, solution = (tensors["mean"], tensors["covariance"]), tensors["solution"].float()
    for k in steps:
        add_row(evaluation, rows, path, w, k, reference, solution)
    return rows, reference, solution


def best_rows(evaluation, rows, sweep, fresh):
    """The teacher in the most steps at the best scale of a sweep: one row, or none where that is the student's scale. A
    sweep of one is taken as it is; that of several looks for it in SWEEP_STEPS, in which rows has the student's."""
    w, path = evaluation.w, stored(evaluation, "sweep").with_suffix(".json")
    others, swept = [scale for scale in sweep if scale != w], read_rows(path)
    if fresh:
        swept = {(scale, k): row for (scale, k), row in swept.items() if scale not in others}
    best = sweep[0] if sweep else w
    if len(sweep) > 1:
        for scale in others:
            add_row(evaluation, swept, path, scale, SWEEP_STEPS)
        candidates = swept | rows
        best = min((w, *others), key=lambda scale: candidates[scale, SWEEP_STEPS]["frechet"])
    if best == w:
        return []
    add_row(evaluation, swept, path, best, STEPS[-1])
    return [swept[best, STEPS[-1]]]


def store(write, path, content):
    """write(path, content) or, where nothing can be written, a warning: the figures are printed all the same."""
    try:
        write(path, content)
    except BadInput as error:
        warnings.warn(f"{error}: measured, but not kept", stacklevel=2)


def drift(row, aim):
    """How far the channels' means and standard deviations are from the aim's: the largest, in 255ths."""
    pairs = ((a, b) for key in ("channel_mean", "channel_std") for a, b in zip(row[key], aim[key]))
    return 127.5 * max(abs(a - b) for a, b in pairs)


def table(rows):
    lines = ["sampler  steps    w  nfe  " + "  ".join(f"{name:>13}" for name, _ in COLUMNS)]
    for row in rows:
        figures = "  ".join(f"{'-' if row[name] is None else format(row[name], form):>13}" for name, form in COLUMNS)
        lines.append(f"{row['sampler']:7}  {row['steps']:5}  {row['guidance']:3g}  {row['nfe']:3}  {figures}")
    return "\n".join(lines)


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--student", default=TINY / "student",
                   help="folder that train.py wrote (default: the shipped one)")
    p.add_argument("--teacher", help="its teacher, where the folder it was made from has moved")
    p.add_argument("--guidance", type=float,
                   help="w of teacher and student, for a student trained on a range (default: its middle)")
    p.add_argument("--images", type=int,
                   help="the Frechet distance of fewer is larger: compare like with like (default: 5000; 2000 for the "
                        "pixel teacher, whose passes take longer)")
    p.add_argument("--seed", type=int, default=0, help="another has other noises and prompts")
    p.add_argument("--steps", type=int, nargs="+", default=STEPS, choices=STEPS, help="which of the teacher's rows")
    p.add_argument("--sweep", type=float, nargs="*", default=SWEEP, metavar="W",
                   help=f"scales of which the teacher's best in {SWEEP_STEPS} steps has a row in {STEPS[-1]}; one is "
                        "taken as it is, none skips the row (default: %(default)s)")
    p.add_argument("--refine", type=int, nargs="+", default=[], metavar="STEPS",
                   help="rows of the student refined by so many steps of the teacher")
    p.add_argument("--decoder", help="folder or hub id of a small decoder (AutoencoderTiny), for the student's rows")
    p.add_argument("--json", type=Path,
                   help="where the figures go, and the picture beside them "
                        "(default: STUDENT/evaluation.json; for a shipped student or one of a hub in runs/)")
    p.add_argument("--fresh", action="store_true", help="measure the teacher's rows again")
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    return p.parse_args()


def main():
    args = parse_args()
    student = load_student(args.student, args.teacher, pick_device(args.device))
    teacher, w = student.teacher, student.pick_guidance(args.guidance)
    if args.images is None:
        args.images = 2000 if teacher.vae is None else 5000
    if args.images < 100:
        raise BadInput(f"--images {args.images} is too few for a covariance of 64 features; give 100 or more")
    for k in args.refine:
        if not 0 < k <= teacher.schedule.T // REFINE_FROM:
            raise BadInput(f"--refine {k} is not supported: 1 to {teacher.schedule.T // REFINE_FROM}")
    sweep = args.sweep if teacher.uncond is not None else []        # without guidance there is one scale
    evaluation = Evaluation(student, args.images, w, args.seed)
    last_row = evaluation.pictures(evaluation.one_step())   # first, as it may be broken: the others can take an hour
    needed = {*args.steps, SWEEP_STEPS} if len(sweep) > 1 else args.steps
    measured, reference, solution = teacher_rows(evaluation, sorted(needed), args.fresh)
    rows = [measured[w, k] for k in args.steps] + best_rows(evaluation, measured, sweep, args.fresh)
    aim = measured[w, STEPS[-1]]
    pictures = [evaluation.pictures(evaluation.ddim(k)) for k in STEPS]
    timed = (evaluation.ddim(1), evaluation.one_step(), lambda eps, **_: teacher.decode(eps))
    step, one, decode = map(evaluation.seconds, timed)
    own_decode = decode
    if args.decoder:                                        # from here on, for the student
        teacher.use_decoder(args.decoder)
        own_decode, last_row = evaluation.seconds(timed[2]), evaluation.pictures(evaluation.one_step())
    for k in (0, *args.refine):
        row, _ = evaluation.measure(evaluation.one_step(k), f"student, refined by {k}", reference, solution)
        rows.append({"sampler": "student", "guidance": w, "steps": 1 + k, "nfe": 1 + passes(k, w)} | row)
    one_pass = step / passes(1, w)
    for row in rows:
        if row["sampler"] == "ddim":
            row["images_per_s"] = 1 / (decode + row["nfe"] * one_pass)
        else:
            row["images_per_s"] = 1 / (own_decode + one + (row["nfe"] - 1) * one_pass)
        row["drift"] = drift(row, aim)

    halves = frechet(*(moments(evaluation.real[half::2]) for half in (0, 1)))
    print(f"{args.images} images, w = {w}; Frechet distance to {len(evaluation.real)} real test images, two halves "
          f"of which are {halves:.1f} apart, and to the teacher's {STEPS[-1]} steps; drift of the channels' mean and "
          f"spread from those, in 255ths; rmse to the Signal-ODE's solution on the first {len(solution)} noises; "
          f"images/s from one step and one decoding, timed now\n{table(rows)}")
    if teacher.vae is not None and "autoencoder" in evaluation.config:
        print(f"Frechet distance of real images to themselves through the autoencoder alone: "
              f"{evaluation.config['autoencoder']:.1f}")
    accuracy = evaluation.config["accuracy"]
    shares = ", ".join(f"{k} {v:.1%}" for k, v in accuracy.items())
    print(f"the judge's own accuracy on the real test split: {shares}")
    path = Path(args.student)
    ours = path.is_dir() and TINY.resolve() not in path.resolve().parents
    folder = path if ours else Path("runs") / f"{Path(teacher.spec).name}-shipped"
    out = args.json or folder / "evaluation.json"
    keep = operator.call if args.json else store             # who names a file wants it
    keep(write_json, out, {"teacher": teacher.spec, "student": str(args.student), "images": args.images,
                           "guidance": w, "decoder": args.decoder, "judge": accuracy, "rows": rows})
    grid = image_grid([*pictures, last_row], 96, [f"DDIM-{k}" for k in STEPS] + ["student"])
    keep(write_file, out.with_suffix(".png"), functools.partial(grid.save, format="PNG"))
    print(f"{out} and {out.with_suffix('.png')}: rows as in the table, the same noises in every row")


if __name__ == "__main__":
    command(main)
