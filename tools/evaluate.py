"""Quality and speed of a student of an embedded teacher, beside the teacher's own DDIM in 1 to 50 steps.

    python -m tools.evaluate --student runs/tiny                    5,000 images, half a minute
    python -m tools.evaluate --student runs/tiny --refine 1 2 4     also refined by so many steps of the teacher
    python -m tools.evaluate --student runs/tiny --limited          the teacher guided as in matching in all its rows
    python -m tools.evaluate --student runs/tiny --fresh            measure the teacher again too, half an hour
    python -m tools.evaluate --seed 1 --steps 50 --sweep            other noises and prompts, less of the teacher

For a student of another teacher give --inception or --clip: then tools/fidelity.py measures as papers do.

The teacher is guided by the student's scale w, at all times. Its fifty steps have two more rows. In the one called
"limited" it is guided as in matching, only where alpha_t >= 0.288; a matched student learned from that teacher. In the
other it is guided by the scale at which its Frechet distance is smallest. The teacher's rows are measured once for each
scale, seed and number of images, and are stored in its folder. The columns:

    w, nfe                      guidance scale; network passes an image
    frechet                     Frechet distance to real test images, by the features of tools.judge
    to_teacher, drift           from the teacher's fifty steps, guided at all times: the Frechet distance, and the
                                largest change of a channel's mean or standard deviation, in 1/255
    precision, recall           share of the images that look like real ones, and of real ones that look like an image
    align_seen, align_heldout   share of the images with all attributes right, for prompts of the training and others
    rmse                        to the Signal-ODE's solution from the same noise, for the first few hundred noises
    images_per_s                not timed row by row, but computed from one step and one decoding, timed just now
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import random
import time
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from tqdm import tqdm

from matching import LEAST_SIGNAL, limited_guidance
from plumbing.files import (NOT_OURS, BadInput, command, new_parser, parsing, read_json, user_path, user_spec,
                            write_file, write_json)
from plumbing.hub import TINY
from plumbing.images import image_grid, noise, read_about, save_png, to_pil
from plumbing.processes import PRECISION, pick_device, torchrun
from plumbing.weights import read_tensors
from signal_ode import solve
from student import REFINE_FROM, load_student
from tools import fidelity
from tools.judge import frechet, load_judge, moments, precision_recall, prompt

STEPS = (1, 2, 4, 8, 10, 25, 50)
SWEEP, SWEEP_STEPS = (1.0, 1.5, 2.0, 2.5), 10               # scales among which the teacher's best is looked for
EXACT = 2**17                               # numbers of the exact solutions that are stored to measure rmse against
COLUMNS = {"frechet": ".2f", "to_teacher": ".2f", "drift": ".1f", "precision": ".3f", "recall": ".3f",
           "align_seen": ".1%", "align_heldout": ".1%", "rmse": ".4f", "images_per_s": ".1f"}
COLUMNS_EXPLAINED = __doc__.partition("The columns:\n\n")[2].rstrip()


def judge_folder(teacher):
    """The judge of an embedded teacher, its own or the one they share. Raises BadInput."""
    for folder in (teacher.folder / "judge", teacher.folder.parent / "judge"):
        if folder.is_dir():
            return folder
    raise BadInput(f"teacher {teacher.spec} has no judge/ to measure its images with, as the embedded ones have: give "
                   "--inception or --clip (docs/evaluating.md)")


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
        self.real = read_tensors(folder / "reference.safetensors", dtype=torch.float32)["features"]
        self.combinations = combinations(self.config, images, seed)
        if self.teacher.labels:                             # it is told the garment alone; its colours are free
            self.combinations = [(garment,) for garment, _, _ in self.combinations]
        self.num_exact = min(images, EXACT // math.prod(self.teacher.shape))
        self.seeds = range(seed * 10**6, seed * 10**6 + images)
        held_out = {tuple(c) for c in self.config["held_out"]}
        self.held_out = torch.tensor([c in held_out for c in self.combinations])
        words = [self.config["garments"], self.config["colours"], self.config["colours"]]
        self.labels = torch.tensor([[known.index(word) for known, word in zip(words, c)] for c in self.combinations])

    def inputs(self, part):
        """eps and condition of a slice of the images."""
        eps = noise(self.seeds[part], self.teacher.shape).to(self.teacher.device)
        return eps, self.teacher.encode([c[0] if len(c) == 1 else prompt(*c) for c in self.combinations[part]])

    # ------------------------------------------------------------------------------------------------ samplers
    def ddim(self, steps, w=None, limited=False):
        """The teacher in that many DDIM steps, guided by w (None: as the student is), limited or not."""
        return functools.partial(self.run_ddim, steps, limited, w=self.w if w is None else w)

    def run_ddim(self, steps, limited, eps, **condition):
        schedule, denoise = self.teacher.schedule, self.teacher.denoise
        if limited:
            denoise = functools.partial(limited_guidance, denoise, schedule=schedule)
        return solve(denoise, eps, schedule.grid(steps), schedule, space="x", **condition)[-1]

    def one_step(self, refine=0):
        """The student, refined by so many steps of the teacher."""
        return functools.partial(self.student.refine, steps=refine, w=self.w)

    def solution(self):
        """What BOOT's student learns: the Signal-ODE's end from y_T = f(eps, T), in 50 steps of Heun's method."""
        grid = self.teacher.schedule.grid(50)
        return functools.partial(self.teacher.solve, grid=grid, solver="heun", space="y", w=self.w)

    # ------------------------------------------------------------------------------------------------ measures
    @torch.no_grad()
    def sample(self, sampler, num, name):
        """Latents (num, C, h, w) of the first noises. name: what the bar says."""
        parts = [slice(k, min(k + self.batch, num)) for k in range(0, num, self.batch)]
        inputs = (self.inputs(part) for part in tqdm(parts, name, leave=False))
        return torch.cat([sampler(eps, **condition) for eps, condition in inputs])

    @torch.no_grad()
    def images(self, sampler):
        """The first ten, for people."""
        eps, condition = self.inputs(slice(0, 10))
        return to_pil(self.teacher.decode(sampler(eps, **condition), self.seeds))

    @torch.no_grad()
    def measure(self, sampler, name, reference=None, solution=None):
        """(a row's figures of quality, the moments of its features). reference: the moments of the teacher's features;
        solution: the exact samples of the first noises."""
        latents = self.sample(sampler, len(self.seeds), name)
        features, channels = [], []
        for part in (slice(k, k + self.batch) for k in range(0, len(latents), self.batch)):
            images = self.teacher.decode(latents[part], self.seeds[part])
            features.append(self.judge(images))
            channels.append(torch.stack([images, images.square()]).cpu().double().mean((3, 4)))        # (2, B, 3)
        features = torch.cat(features)
        answers = [a.argmax(1).cpu() for a in self.judge.answers(features)]
        features = features.cpu()
        own = moments(features)
        precision, recall = precision_recall(features, self.real)
        mean, square = torch.cat(channels, 1).mean(1)
        row = {"frechet": frechet(own, moments(self.real)), "precision": precision, "recall": recall,
               "to_teacher": None if reference is None else frechet(own, reference),
               **self.alignment(answers), "channel_mean": mean.tolist(),
               "channel_std": (square - mean**2).sqrt().tolist(), "rmse": None}
        if solution is not None:
            row["rmse"] = (latents[:len(solution)].cpu() - solution).square().mean().sqrt().item()
        return row, own

    def alignment(self, answers):
        """The shares of the images with the right attributes, by name. answers: of each attribute, (N,)."""
        right = torch.stack(answers[:self.labels.shape[1]], 1) == self.labels
        shares = {}
        for which, mask in (("seen", ~self.held_out), ("heldout", self.held_out)):
            shares[f"align_{which}"] = right[mask].all(1).float().mean().item() if mask.any() else None
            if mask.any():
                each = right[mask].float().mean(0).tolist()
                shares |= {f"{name}_{which}": share for name, share in zip(("garment", "colour", "background"), each)}
        return shares

    @torch.no_grad()
    def seconds(self, function):
        """Seconds an image of a function of (eps, **condition), on this machine: the median of three batches."""
        eps, condition = self.inputs(slice(0, self.batch))
        times = []
        for _ in range(4):                                                  # the first is not counted
            began = time.perf_counter()
            function(eps, **condition).sum().item()                         # .item() waits for a GPU
            times.append(time.perf_counter() - began)
        return sorted(times[1:])[1] / len(eps)


# ------------------------------------------------------------------------------------------------ the teacher's rows
def passes(steps, w):
    """Network passes of so many of the teacher's steps."""
    return steps * (1 if w == 1 else 2)


def stored(evaluation, *settings):
    """The path, without suffix, in the teacher's folder, of what is measured with its files and with these settings."""
    folder, digest = evaluation.teacher.folder, hashlib.sha256()
    parts = [folder / name for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")]
    for part in (*parts, judge_folder(evaluation.teacher)):
        for path in sorted(p for p in part.glob("*") if p.is_file()):
            digest.update(path.read_bytes())
    settings = [*settings, evaluation.teacher.negative_prompt, evaluation.seeds[0], len(evaluation.seeds)]
    digest.update(json.dumps(settings).encode())
    return folder / "evaluation" / digest.hexdigest()[:16]


def read_rows(path):
    """The rows of a file by (w, steps); none if there is no such file."""
    rows = read_json(path, list) if path.exists() else []
    with parsing(path):
        return {(row["guidance"], row["steps"]): {"limited": False, **row} for row in rows}


def add_row(evaluation, rows, path, w, steps, reference=None, solution=None, limited=False):
    """Measure the teacher at w in so many steps, unless that is known. A row is stored at once, so that an interrupted
    measurement goes on. Returns the moments of its features, if it was measured."""
    if (w, steps) in rows:
        return None
    name = f"DDIM-{steps}, w = {w}{', limited' if limited else ''}"
    print(f"measuring the teacher on {len(evaluation.seeds)} images, for {path.parent}: {name}", flush=True)
    row, own = evaluation.measure(evaluation.ddim(steps, w, limited), name, reference, solution)
    rows[w, steps] = {"sampler": "ddim", "guidance": w, "limited": limited, "steps": steps,
                      "nfe": passes(steps, w)} | row
    store(write_json, path, list(rows.values()))
    return own


def teacher_rows(evaluation, steps, fresh):
    """(rows, reference, solution) of the teacher, guided at all times at the student's scale. `rows`: by (w, steps) for
    these numbers of steps and for the most. `reference`: the moments of its features in the most steps. `solution`:
    exact samples of the first noises."""
    w, most = evaluation.w, STEPS[-1]
    path = stored(evaluation, w, evaluation.num_exact)
    path, tensors_path = path.with_suffix(".json"), path.with_suffix(".safetensors")
    rows = read_rows(path) if tensors_path.exists() and not fresh else {}
    if rows:
        tensors = read_tensors(tensors_path)
    else:
        solution = evaluation.sample(evaluation.solution(), evaluation.num_exact, "Signal-ODE solution").half().cpu()
        mean, covariance = add_row(evaluation, rows, path, w, most, solution=solution.float())
        tensors = {"solution": solution, "mean": mean, "covariance": covariance}
        store(write_file, tensors_path, functools.partial(save_file, tensors))
    reference, solution = (tensors["mean"], tensors["covariance"]), tensors["solution"].float()
    for k in steps:
        add_row(evaluation, rows, path, w, k, reference, solution)
    return rows, reference, solution


def limited_rows(evaluation, steps, reference, solution, fresh):
    """The teacher's rows by (w, steps) at the student's scale, guided as in matching."""
    path = stored(evaluation, evaluation.w, evaluation.num_exact, "limited", LEAST_SIGNAL).with_suffix(".json")
    rows = {} if fresh else read_rows(path)
    for k in steps:
        add_row(evaluation, rows, path, evaluation.w, k, reference, solution, limited=True)
    return rows


def best_rows(evaluation, rows, sweep, fresh):
    """The teacher's row in the most steps at the best scale of a sweep; no row if that is the student's scale. If the
    sweep has one scale, that is taken. If it has several, they are compared in SWEEP_STEPS steps with the student's
    scale, which `rows` has."""
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


def store(write, path, content, needed=False):
    """write(path, content). If nothing can be written there, this is a warning, because the figures are printed all the
    same; or BadInput, if a person has named the file."""
    try:
        write(path, content)
    except BadInput as error:
        if needed:
            raise
        warnings.warn(f"{error}: measured, but not kept", stacklevel=2)


# --------------------------------------------------------------------------------------------------------- the table
def drift(row, aim):
    """The largest change of a channel's mean or standard deviation from the aim's, in 1/255."""
    pairs = ((a, b) for key in ("channel_mean", "channel_std") for a, b in zip(row[key], aim[key]))
    return 127.5 * max(abs(a - b) for a, b in pairs)


def table(rows):
    """The rows as lines of text, with a heading."""
    lines = ["sampler       steps    w  nfe  " + "  ".join(f"{name:>13}" for name in COLUMNS)]
    for row in rows:
        figures = ["-" if row[name] is None else format(row[name], form) for name, form in COLUMNS.items()]
        name = row["sampler"] + (" limited" if row["limited"] else "")
        lines.append(f"{name:12}  {row['steps']:5}  {row['guidance']:3g}  {row['nfe']:3}  "
                     + "  ".join(f"{figure:>13}" for figure in figures))
    return "\n".join(lines)


def name_rows(grid, names):
    """The image with names at equal distances left of it."""
    font = ImageFont.load_default(16)
    margin = 16 + max(round(font.getlength(name)) for name in names)
    named = Image.new("RGB", (margin + grid.width, grid.height), "white")
    named.paste(grid, (margin, 0))
    for row, name in enumerate(names):
        ImageDraw.Draw(named).text((8, (row + 0.5) * grid.height / len(names)), name, "black", font, anchor="lm")
    return named


def usual_place(student, teacher):
    """Where the figures of a student are kept: in its folder or, of one that is shipped or the hub's, under runs/."""
    folder = Path(student)
    if not folder.is_dir() or folder.resolve().is_relative_to(TINY.resolve()):
        folder = Path("runs") / f"{Path(teacher.spec).name}-shipped"
    return folder / "evaluation.json"


def parse_args():
    p = new_parser(__doc__)
    p.add_argument("--student", type=user_spec, default=TINY / "student",
                   help="folder that train.py wrote (default: the shipped one)")
    p.add_argument("--teacher", type=user_spec, help="its teacher, if the folder it was made from has moved")
    p.add_argument("--guidance", type=float,
                   help="w of teacher and student, for a student trained on a range (default: its middle)")
    p.add_argument("--images", type=int,
                   help="the Frechet distance of fewer is larger: compare like with like (default: 5000; 2000 for the "
                        "pixel teacher, whose passes take longer)")
    p.add_argument("--seed", type=int, default=0, help="another has other noises and prompts")
    p.add_argument("--steps", type=int, nargs="+", default=STEPS, choices=STEPS, help="which of the teacher's rows")
    p.add_argument("--limited", action="store_true",
                   help="guide the teacher as in matching in these rows: at other times than alpha_t >= "
                        f"{LEAST_SIGNAL} not at all")
    p.add_argument("--sweep", type=float, nargs="*", default=SWEEP, metavar="W",
                   help=f"scales among which the teacher's best in {SWEEP_STEPS} steps gets a row in {STEPS[-1]}; one "
                        "is taken as it is, none skips the row (default: %(default)s)")
    p.add_argument("--refine", type=int, nargs="+", default=[], metavar="STEPS",
                   help="rows of the student refined by so many steps of the teacher")
    p.add_argument("--decoder", type=user_spec,
                   help="folder or hub id of a small decoder (AutoencoderTiny), for the student's rows")
    p.add_argument("--json", type=user_path,
                   help="where the figures go, and the sheet of images beside them "
                        "(default: STUDENT/evaluation.json; for a shipped student or one of a hub in runs/)")
    p.add_argument("--fresh", action="store_true", help="measure the teacher's rows again")
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    option = p.add_argument_group("as papers measure, for any teacher (tools/fidelity.py)").add_argument
    option("--inception", type=user_path,
           help="file of Inception's weights for torch-fidelity: FID, KID, precision, recall")
    option("--clip", type=user_path, help="folder of a CLIP for transformers: CLIP score")
    option("--prompts", type=user_path, help="text file, one prompt or label a line (default: those of the training)")
    option("--real", type=user_path, help="folder of real images, to which distances are taken as well")
    option("--size", type=int, help="scale and cut all images to so many pixels a side before Inception sees them")
    option("--pictures", type=user_path, default=Path("runs/pictures"),
           help="folder where they are kept (default: %(default)s)")
    option("--batch", type=int, default=16, help="pictures at once (default: %(default)s)")
    option("--precision", choices=list(PRECISION), default="fp32", help="of the networks (default: %(default)s)")
    return p.parse_args()


def check_options(args, student, w):
    """Raise BadInput for options that this student's teacher does not take."""
    most = student.teacher.schedule.T // REFINE_FROM
    if args.images < 100:
        raise BadInput(f"--images {args.images} is too few for a covariance of 64 features; give 100 or more")
    if args.limited and w == 1:
        raise BadInput("--limited changes nothing at w = 1, which is no guidance")
    for k in args.refine:
        if not 0 < k <= most:
            raise BadInput(f"--refine {k} is not supported: 1 to {most}")


def all_teacher_rows(evaluation, args):
    """(rows of the table, the row of the most steps, reference, solution) of the teacher."""
    w, most = evaluation.w, STEPS[-1]
    sweep = args.sweep if evaluation.teacher.uncond is not None else []     # without guidance there is one scale
    steps = [] if args.limited else list(args.steps)
    if len(sweep) > 1:
        steps.append(SWEEP_STEPS)
    measured, reference, solution = teacher_rows(evaluation, steps, args.fresh)
    if args.limited:
        limited = limited_rows(evaluation, args.steps, reference, solution, args.fresh)
        rows = [limited[w, k] for k in args.steps] + [measured[w, most]]
    else:
        rows = [measured[w, k] for k in args.steps]
        if w != 1:
            rows.append(limited_rows(evaluation, [most], reference, solution, args.fresh)[w, most])
    return rows + best_rows(evaluation, measured, sweep, args.fresh), measured[w, most], reference, solution


def check_ours(path):
    """Raise BadInput if there is a file at this path that this command did not write."""
    with contextlib.suppress(BadInput):
        if not os.path.lexists(path) or {"teacher", "student", "images", "guidance", "rows"} <= read_json(path).keys():
            return
    raise BadInput(f"{path} {NOT_OURS}")


def as_papers_measure(student, args, w, out):
    """Print and write the figures of tools.fidelity."""
    if out.name == "evaluation.json":
        raise BadInput(f"--json {out} is the name of a judge's figures: give another")
    check_ours(out)
    if args.decoder:
        student.teacher.use_decoder(args.decoder)
    measured = fidelity.evaluate(student, args, w)
    if measured:
        rows, lines = measured
        print("\n".join(lines))
        store(write_json, out, {"teacher": student.teacher.spec, "student": str(args.student), "images": args.images,
                                "guidance": w, "weights": student.fingerprint, "size": args.size, "seed": args.seed,
                                "precision": args.precision, "decoder": args.decoder, "rows": rows,
                                "prompts": str(args.prompts or ""), "real": str(args.real or ""),
                                "inception": str(args.inception or ""), "clip": str(args.clip or "")},
              needed=args.json is not None)


def main():
    args = parse_args()
    _, _, local_rank = torchrun()
    if args.precision != "fp32" and not (args.inception or args.clip):
        raise BadInput("--precision is for --inception and --clip: a judge's figures are of fp32")
    for option in ("prompts", "real", "size"):
        if getattr(args, option) and not (args.inception or args.clip):
            raise BadInput(f"--{option} is for --inception and --clip")
    student = load_student(args.student, args.teacher, pick_device(args.device, local_rank), PRECISION[args.precision])
    teacher, w = student.teacher, student.pick_guidance(args.guidance)
    if args.images is None:
        args.images = 2000 if teacher.vae is None else 5000
    out = args.json or usual_place(args.student, teacher)
    if args.inception or args.clip:
        as_papers_measure(student, args, w, args.json or out.with_stem("fidelity"))
        return
    judge_folder(teacher)                                   # without one there is other advice than on options
    check_options(args, student, w)
    if out.suffix.lower() == ".png":
        raise BadInput(f"--json {out} is the name of the sheet of images beside it: call it .json")
    check_ours(out)
    read_about(out.with_suffix(".png"))                     # refuses to replace somebody's file
    evaluation = Evaluation(student, args.images, w, args.seed)
    student_images = evaluation.images(evaluation.one_step())   # first: a broken student is known before the others
    rows, aim, reference, solution = all_teacher_rows(evaluation, args)
    sheet = [evaluation.images(evaluation.ddim(k, limited=args.limited)) for k in STEPS]

    def decode(eps, **_):
        return teacher.decode(eps)
    one_pass = evaluation.seconds(evaluation.ddim(1)) / passes(1, w)
    one_step, decoding = evaluation.seconds(evaluation.one_step()), evaluation.seconds(decode)
    for row in rows:
        row["images_per_s"] = 1 / (row["nfe"] * one_pass + decoding)
    if args.decoder:                                        # from here on, for the student
        teacher.use_decoder(args.decoder)
        decoding, student_images = evaluation.seconds(decode), evaluation.images(evaluation.one_step())
    for k in (0, *args.refine):
        row, _ = evaluation.measure(evaluation.one_step(k), f"student, refined by {k}", reference, solution)
        refining = passes(k, w)
        rows.append({"sampler": "student", "guidance": w, "limited": False, "steps": 1 + k, "nfe": 1 + refining} | row)
        rows[-1]["images_per_s"] = 1 / (one_step + refining * one_pass + decoding)
    for row in rows:
        row["drift"] = drift(row, aim)

    print(f"{args.images} images, w = {w}\n{table(rows)}\n{COLUMNS_EXPLAINED}")
    halves = frechet(*(moments(evaluation.real[half::2]) for half in (0, 1)))
    print(f"two halves of the {len(evaluation.real)} real test images: frechet {halves:.1f}")
    if teacher.vae is not None and "autoencoder" in evaluation.config:
        print(f"real test images through the autoencoder alone: frechet {evaluation.config['autoencoder']:.1f}")
    accuracy = evaluation.config["accuracy"]
    print(f"the judge is right about real test images: {', '.join(f'{k} {v:.1%}' for k, v in accuracy.items())}")
    store(write_json, out, {"teacher": teacher.spec, "student": str(args.student), "images": args.images, "guidance": w,
                            "weights": student.fingerprint, "decoder": args.decoder, "judge": accuracy, "rows": rows},
          needed=args.json is not None)
    grid = name_rows(image_grid([*sheet, student_images], 96), [f"DDIM-{k}" for k in STEPS] + ["student"])
    store(functools.partial(save_png, about={}), out.with_suffix(".png"), grid, needed=args.json is not None)
    print(f"{out} and {out.with_suffix('.png')}: rows as in the table, the same noises in every row")


if __name__ == "__main__":
    command(main)
