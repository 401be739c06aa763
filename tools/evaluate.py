"""Quality and speed of a student of the embedded teacher, beside the teacher's own DDIM sampler at 1 to 50 steps.

    python -m tools.evaluate --student runs/tiny                5,000 images; the teacher's rows are stored in tiny/
    python -m tools.evaluate --student runs/tiny --fresh        measure those again too, about an hour on 2 cores
"""

import argparse
import hashlib
import itertools
import json
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from signal_ode import solve
from teacher import TINY, BadInput, command, grid, load_student, noise, read_json, read_tensors, to_pil, write_file, write_json
from tools.judge import frechet, load_judge, prompt

STEPS = (1, 2, 4, 8, 10, 25, 50)
NUM_RMSE = 512                                                              # noises whose exact solution is kept to measure against
COLUMNS = (("frechet", ".2f"), ("precision", ".3f"), ("recall", ".3f"), ("align_seen", ".1%"), ("align_heldout", ".1%"), ("rmse", ".4f"), ("images_per_s", ".1f"))


def neighbour_radius(features, k=3):
    """Distance of every feature (N, D) to its k-th nearest other: (N,)."""
    return torch.cat([torch.cdist(part, features).kthvalue(k + 1).values for part in features.split(1000)])


def covered(a, b, radius):
    """Share of a (N, D) that lies within the radius (M,) of some b (M, D)."""
    return torch.cat([(torch.cdist(part, b) <= radius).any(1) for part in a.split(1000)]).float().mean().item()


def precision_recall(fake, real):
    """Improved precision and recall (Kynkaanniemi et al. 2019), k = 3."""
    return covered(fake, real, neighbour_radius(real)), covered(real, fake, neighbour_radius(fake))


def combinations(config, num, seed):
    """num combinations (garment, colour, background): garments in turn, colours at random, never two the same."""
    rng, pairs = random.Random(seed), list(itertools.permutations(config["colours"], 2))
    return [(config["garments"][k % len(config["garments"])], *rng.choice(pairs)) for k in range(num)]


class Evaluation:
    """One set of prompts and noises, on which any sampler is measured."""

    def __init__(self, teacher, images, w, seed, batch=250):
        self.teacher, self.w, self.batch = teacher, w, batch
        self.judge, self.config, self.real = load_judge(teacher.folder / "judge")
        self.combinations = combinations(self.config, images, seed)
        self.seeds = range(seed * 10**6, seed * 10**6 + images)
        held_out = {tuple(c) for c in self.config["held_out"]}
        self.held_out = torch.tensor([c in held_out for c in self.combinations])
        garments, colours = self.config["garments"], self.config["colours"]
        self.labels = torch.tensor([[garments.index(g), colours.index(c), colours.index(b)] for g, c, b in self.combinations])

    def inputs(self, part):
        """eps and text embeddings of a slice of the images."""
        return noise(self.seeds[part], self.teacher.shape), self.teacher.encode([prompt(*c) for c in self.combinations[part]])

    def ddim(self, steps):
        """A sampler (eps, cond) -> latents: the guided teacher in that many DDIM steps."""
        schedule = self.teacher.schedule
        return lambda eps, cond: solve(lambda x, t: self.teacher.denoise(x, t, cond, self.w), eps, schedule.grid(steps), schedule, space="x")[-1]

    def solution(self, eps, cond):
        """What the student is asked for: the Signal-ODE's end from y_T = f(eps, T), 50 steps of Heun."""
        schedule = self.teacher.schedule
        return solve(lambda x, t: self.teacher.denoise(x, t, cond, self.w), eps, schedule.grid(50), schedule, "heun")[-1]

    @torch.no_grad()
    def sample(self, sampler, num, name):
        parts = [slice(k, min(k + self.batch, num)) for k in range(0, num, self.batch)]
        return torch.cat([sampler(*self.inputs(part)) for part in tqdm(parts, name, leave=False)])

    @torch.no_grad()
    def measure(self, sampler, name, solution):
        """A row's quality figures; solution: (NUM_RMSE, ...) latents of the first noises."""
        latents = self.sample(sampler, len(self.seeds), name)
        features = torch.cat([self.judge(self.teacher.decode(part)) for part in latents.split(self.batch)])
        right = torch.stack([a.argmax(1) for a in self.judge.answers(features)], 1) == self.labels
        precision, recall = precision_recall(features, self.real)
        row = {"frechet": frechet(features, self.real), "precision": precision, "recall": recall}
        for which, mask in (("seen", ~self.held_out), ("heldout", self.held_out)):
            row[f"align_{which}"] = right[mask].all(1).float().mean().item()
            row |= {f"{attribute}_{which}": value for attribute, value in
                    zip(("garment", "colour", "background"), right[mask].float().mean(0).tolist())}
        return row | {"rmse": (latents[:len(solution)] - solution).square().mean().sqrt().item()}

    def speed(self, sampler):
        """Images per second of sampler and decoder on this machine: the median of three batches."""
        eps, cond = self.inputs(slice(0, self.batch))
        times = []
        for _ in range(3):
            began = time.perf_counter()
            with torch.no_grad():
                self.teacher.decode(sampler(eps, cond))
            times.append(time.perf_counter() - began)
        return len(eps) / sorted(times)[1]


def teacher_rows(evaluation, fresh):
    """(rows, solution) of the teacher: stored in its folder under a hash of its files and of the settings, or measured."""
    folder, digest = evaluation.teacher.folder, hashlib.sha256()
    for path in sorted(p for sub in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "judge") for p in (folder / sub).iterdir()):
        digest.update(path.read_bytes())
    digest.update(json.dumps([evaluation.w, evaluation.seeds[0], len(evaluation.seeds), STEPS, NUM_RMSE]).encode())
    path = folder / "evaluation" / digest.hexdigest()[:16]
    rows_file, solution_file = path.with_suffix(".json"), path.with_suffix(".safetensors")
    if rows_file.exists() and solution_file.exists() and not fresh:
        return read_json(rows_file), read_tensors(solution_file, dtype=torch.float32)[0]["solution"]
    print(f"measuring the teacher at w = {evaluation.w} with {len(evaluation.seeds)} images; stored in {path.parent} for next time", flush=True)
    solution = evaluation.sample(evaluation.solution, min(NUM_RMSE, len(evaluation.seeds)), "Signal-ODE solution").half()
    rows = [{"sampler": "ddim", "steps": k, "nfe": k * (1 if evaluation.w == 1 else 2)}
            | evaluation.measure(evaluation.ddim(k), f"DDIM-{k}", solution.float()) for k in STEPS]
    write_file(solution_file, lambda p: save_file({"solution": solution}, p))
    write_json(rows_file, rows)
    return rows, solution.float()


def table(rows):
    lines = ["sampler  steps  nfe  " + "  ".join(f"{name:>13}" for name, _ in COLUMNS)]
    for row in rows:
        lines.append(f"{row['sampler']:7}  {row['steps']:5}  {row['nfe']:3}  " + "  ".join(f"{format(row[name], form):>13}" for name, form in COLUMNS))
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--student", type=Path, default=TINY / "student", help="folder that train.py wrote (default: the shipped one)")
    p.add_argument("--guidance", type=float, help="w of teacher and student (default: the student's own)")
    p.add_argument("--images", type=int, default=5000, help="the Frechet distance of fewer is larger: compare like with like")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=Path, help="where the figures go, and the picture beside them (default: STUDENT/evaluation.json)")
    p.add_argument("--fresh", action="store_true", help="measure the teacher's rows again")
    args = p.parse_args()
    if args.images < 100:
        raise BadInput(f"--images {args.images} is too few for a covariance of 64 features; give 100 or more")
    student = load_student(args.student)
    ranged = isinstance(student.guidance, list)
    if args.guidance is not None and not ranged and args.guidance != student.guidance:
        raise BadInput(f"this student's guidance is fixed at {student.guidance}; --guidance {args.guidance} is for one trained on a range")
    w = args.guidance if args.guidance is not None else sum(student.guidance) / 2 if ranged else student.guidance
    if not (student.teacher.folder / "judge").is_dir():
        raise BadInput(f"teacher {student.teacher.spec} has no judge/ to measure its pictures with; the embedded teacher has")

    evaluation = Evaluation(student.teacher, args.images, w, args.seed)
    rows, solution = teacher_rows(evaluation, args.fresh)
    one_step = lambda eps, cond: student(eps, 0, cond, w)
    rows.append({"sampler": "student", "steps": 1, "nfe": 1} | evaluation.measure(one_step, "student", solution))
    samplers = [one_step if row["sampler"] == "student" else evaluation.ddim(row["steps"]) for row in rows]
    for row, sampler in zip(rows, samplers):
        row["images_per_s"] = evaluation.speed(sampler)

    print(f"{args.images} images, w = {w}; Frechet distance to {len(evaluation.real)} real test images; rmse to the Signal-ODE's solution, first "
          f"{len(solution)} noises\n{table(rows)}")
    print("the judge's own accuracy on the real test split: " + ", ".join(f"{k} {v:.1%}" for k, v in evaluation.config["accuracy"].items()))
    out = args.json or args.student / "evaluation.json"
    write_json(out, {"teacher": student.teacher.spec, "student": str(args.student), "images": args.images, "guidance": w, "rows": rows})
    with torch.no_grad():
        sheet = [to_pil(student.teacher.decode(sampler(*evaluation.inputs(slice(0, 10))))) for sampler in samplers]
    write_file(out.with_suffix(".png"), lambda path: grid(sheet).resize((3 * 320, 3 * 32 * len(sheet)), 0).save(path, "PNG"))
    print(f"{out} and {out.with_suffix('.png')}: rows as in the table, the same noises in every row")


if __name__ == "__main__":
    command(main)
