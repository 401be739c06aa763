"""The paper's figures and its ablations, on the embedded teachers. docs/paper.md shows them.

    python -m dev.paper pathways                            docs/paper/pathways.png: consistency models, and BOOT
    python -m dev.paper ends                                docs/paper/ends.png: DDIM, Signal-ODE and student, one noise
    python -m dev.paper uncurated --unconditional runs/unconditional       docs/paper/uncurated.png: seeds 0 to 9
    python -m dev.paper ablations                           a table; ten short runs, an hour of two cores

The first three take seconds to a minute. The unconditional student is of the pixel teacher's empty class, number 10. It
is not shipped; these two lines train it in twenty minutes:

    echo 10 > empty.txt
    python train.py --teacher tiny-pixel --prompts empty.txt --guidance 1 --steps 650 --out runs/unconditional

The other students are the shipped ones, which BOOT trained and matching after it. It needs matplotlib.
"""

import re
import sys
from pathlib import Path

import torch

import train
from dev.figure import make_cells
from plumbing.files import command, new_parser, user_spec
from plumbing.hub import TINY
from plumbing.images import noise, to_pil
from plumbing.run import Run
from signal_ode import solve
from student import load_student
from tools.evaluate import Evaluation, teacher_rows
from tools.plotting import new_figure, save_figure

FOLDER = Path("docs/paper")
PROMPTS = ["a red ankle boot on a yellow background", "a green coat on a pink background",
           "a blue bag on a white background", "a purple sneaker on an orange background"]
DRAW, STEPS = train.draw, 600
SHORT = ["--match", "0", "--steps", str(STEPS), "--samples", "0", "--every", str(STEPS)]
ABLATIONS = {
    "the default: boundary loss, uniform times, Heun, K = 10": [],
    "no boundary loss": ["--beta", "0"],
    "boundary loss of weight 1": ["--beta", "1"],
    "progressive times": [],
    "Euler, K = 10": ["--solver", "euler"],
    "Euler, K = 20, with as many teacher calls from T to 0": ["--solver", "euler", "--num-steps", "20"],
    "K = 5": ["--num-steps", "5"],
    "K = 20": ["--num-steps", "20"],
    "K = 50": ["--num-steps", "50"],
    "input time T, as in the paper": ["--input-time", "1000"]}


def show_rows(name, rows, columns=()):
    """Draw docs/paper/NAME.png: rows of images, {text: list of PIL images}, with the texts left of them. columns: texts
    above."""
    count, path = max(map(len, rows.values())), FOLDER / f"{name}.png"
    figure = new_figure(path, figsize=(2.6 + 0.85 * count, 0.4 + 0.95 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), count + 1, squeeze=False, width_ratios=[2.6, *[0.85] * count])
    for y, (text, images) in enumerate(rows.items()):
        axes[y, 0].text(0, 0.5, text, va="center", fontsize=9, transform=axes[y, 0].transAxes)
        for x, image in enumerate(images, 1):
            axes[y, x].imshow(image, interpolation="nearest")
            if y == 0 and columns:
                axes[y, x].set_title(columns[x - 1], fontsize=9)
    for axis in axes.flat:
        axis.axis("off")
    save_figure(figure, path)


@torch.no_grad()
def pathways():
    """Figure 2: a consistency model goes from every point of a path to its end, BOOT from its beginning to every point.
    The consistency model is the exact one: where the teacher's sampler ends."""
    times, (x, y, g), _ = make_cells(PROMPTS[0], seed=14)
    show_rows("pathways", {
        "consistency model\nreads $x_t$, a point of the path ...": x,
        "... and says where the path ends:\none answer": x[-1:] * len(times),
        "BOOT\nreads the noise $\\epsilon$, where it begins ...": x[:1] * len(times),        # x_T is the noise
        "... and says each point's signal $y_t$\n(the shipped student)": g,
        "the teacher's $y_t$": y}, [f"t = {t}" for t in times])


@torch.no_grad()
def ends():
    """Figure 4: the same noise and prompt by DDIM, by the Signal-ODE and by the student."""
    student = load_student()
    teacher, w, prompts = student.teacher, student.pick_guidance(), PROMPTS * 50
    eps, condition, schedule = noise(range(200), teacher.shape), teacher.encode(prompts), teacher.schedule
    ddim, ode = (solve(teacher.denoise, eps, schedule.grid(50), schedule, space=space, w=w, **condition)[-1]
                 for space in "xy")
    g = student(eps, 0, **condition)
    images = {name: teacher.decode(latents) for name, latents in (("ddim", ddim), ("ode", ode), ("student", g))}

    def distance(a, b):
        return (127.5 * (images[a] - images[b])).square().mean().sqrt().item()
    show_rows("ends", {
        "DDIM, 50 steps": to_pil(images["ddim"][:8]),
        f"Signal-ODE, 50 steps: {distance('ode', 'ddim'):.1f} of 255\nfrom DDIM (RMS of 200 images)":
            to_pil(images["ode"][:8]),
        f"student, one step: {distance('student', 'ode'):.1f}\nfrom the Signal-ODE": to_pil(images["student"][:8])})


@torch.no_grad()
def uncurated(folder):
    """Figures 5 and 6: seeds 0 to 9 of the pixel teacher, without and with a class, and of the text teacher, in 50, 10
    and one DDIM steps, and of their students in one."""
    rows = {}
    for kind, where, prompt in (("no condition", folder, "10"), ("class", TINY / "pixel" / "student", "ankle boot"),
                                ("text", TINY / "student", PROMPTS[0])):
        student = load_student(where)
        teacher, w = student.teacher, student.pick_guidance()
        eps, condition = noise(range(10), teacher.shape), teacher.encode([prompt] * 10)
        for steps in (50, 10, 1):
            x = teacher.solve(eps, teacher.schedule.grid(steps), w=w, **condition)
            rows[f"{kind}: DDIM, {steps} step{'' if steps == 1 else 's'}"] = to_pil(teacher.decode(x))
        rows[f"{kind}: student, 1 step"] = to_pil(teacher.decode(student(eps, 0, **condition)))
    show_rows("uncurated", rows)


def progressive(seed, step, samples, shape, T, num_prompts, guidance):
    """train.draw with times from the part of 1..T that has been reached, which grows from T down as the run goes on."""
    prompt, eps, t, *rest = DRAW(seed, step, samples, shape, T, num_prompts, guidance)
    reached = min(1.0, (step + 1) / STEPS)
    return prompt, eps, T - ((T - t) * reached).long(), *rest


def ablations():
    """Train and measure each of ABLATIONS with BOOT alone, and print a table."""
    print("| BOOT alone, 600 steps | Fréchet distance | recall | alignment | RMSE to the ODE |\n|---|---|---|---|---|")
    for name, options in ABLATIONS.items():
        out = Path("runs/ablations") / re.sub(r"\W+", "_", name)
        train.draw = progressive if name == "progressive times" else DRAW
        args = train.parse_args([*SHORT, *options, "--out", str(out)])
        with Run(args) as run:
            train.train(args, run)
        if run.interrupted:
            sys.exit(130)
        evaluation = Evaluation(load_student(out), 5000, 3.0, 0)
        _, *reference = teacher_rows(evaluation, [50], False)
        row, _ = evaluation.measure(evaluation.one_step(), name, *reference)
        print(f"| {name} | {row['frechet']:.1f} | {row['recall']:.3f} | {row['align_seen']:.1%} | {row['rmse']:.3f} |",
              flush=True)


def main():
    p = new_parser(__doc__)
    p.add_argument("what", choices=["pathways", "ends", "uncurated", "ablations"])
    p.add_argument("--unconditional", type=user_spec, default="runs/unconditional", help="for `uncurated`, see above")
    args = p.parse_args()
    if args.what == "pathways":
        pathways()
    elif args.what == "ends":
        ends()
    elif args.what == "uncurated":
        uncurated(args.unconditional)
    else:
        ablations()


if __name__ == "__main__":
    command(main)
