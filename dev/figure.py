"""The figure that teaches BOOT in one look, from the embedded teacher and the shipped student.

    python -m dev.figure                                    writes docs/boot.png

All cells belong to one noise eps and one prompt. Columns are times, from T to 0. One should see three rows. The first
has the teacher's DDIM states x_t, which are noisy until the end. The second has the states y_t of the Signal-ODE, on
the same trajectory, which are never noisy. The third has the student g(eps, t): each cell is one pass, close to the y_t
above it. Below them is one step of training: the teacher makes the target for g(eps, s) from g(eps, t).

Latents are decoded as they are. x_t has about unit variance at every t, and the decoder shows its noise as coloured
blobs. The student is tiny/student, which was trained by BOOT, then matched and refined. Every fifth step of matching
still has BOOT's losses, so its g(eps, t) follows y_t. Only g(eps, 0) is matched and refined: it is sharper than BOOT
alone makes it, and for other seeds it differs more from y_0. The step drawn is Euler's over two columns, T / 3;
train.py takes Heun's over T / 10. Needs matplotlib.
"""

from pathlib import Path

import torch

from plumbing.files import command, new_parser, user_path
from plumbing.images import noise, to_pil
from signal_ode import add_noise, signal_step, solve
from student import load_student
from tools.plotting import new_figure, save_figure

COLUMNS = 7
STEPS = 48                  # of the teacher; every eighth state is shown
FROM, TO = 2, 4             # the columns between which a step is drawn
ROWS = (("$x_t$", "the sampler's state, from $x_T = \\epsilon$,\ndecoded: noisy until the end"),
        ("$y_t$", "the Signal-ODE, from $y_T = f(\\epsilon, T)$:\nnever noisy"),
        (r"$g(\epsilon, t)$", "the student: every cell\nis one pass from $\\epsilon$"))
BLUE, GREY = "#0b5cad", "#555555"


@torch.no_grad()
def make_cells(prompt, seed):
    """(times, rows, step): the rows x_t, y_t and g(eps, t) of PIL images; the x_t and the target of one step."""
    student = load_student()
    teacher, w = student.teacher, student.pick_guidance()
    eps, condition, schedule = noise([seed], teacher.shape), teacher.encode([prompt]), teacher.schedule
    every, grid = STEPS // (COLUMNS - 1), schedule.grid(STEPS)
    times = grid[::every]
    x, y = (solve(teacher.denoise, eps, grid, schedule, space=space, w=w, **condition)[::every] for space in "xy")
    g = [student(eps, t, **condition) for t in times]
    t, s = times[FROM], times[TO]
    x_t = add_noise(g[FROM], eps, t, schedule)
    y_s = signal_step(g[FROM], teacher.denoise(x_t, t, w=w, **condition), t, s, schedule)
    *rows, step = (to_pil(teacher.decode(torch.cat(states))) for states in (x, y, g, [x_t, y_s]))
    return times, rows, step


def draw(figure, times, rows, step):
    """Its unit is a cell; the rows' names are left of x = 0."""
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-2.3, 7.0), ylim=(4.55, -0.36), autoscale_on=False)
    axes.axis("off")

    def show(image, x, y):
        axes.imshow(image, extent=(x, x + 0.94, y + 0.94, y), interpolation="nearest", aspect="auto")

    def arrow(start, end):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": BLUE, "lw": 2, "mutation_scale": 14})

    def write(x, y, text, size=9, color=GREY, ha="left"):
        axes.text(x, y, text, size=size, color=color, va="center", ha=ha, linespacing=1.3)

    names = [f"t = {t}" for t in times]
    names[0], names[TO] = f"t = T = {times[0]}", f"s = {times[TO]}"
    for k, name in enumerate(names):
        stepping = k in (FROM, TO)
        write(k + 0.47, -0.15, name, color=BLUE if stepping else GREY, ha="center")
        for y, row in enumerate(rows):
            show(row[k], k, y)
        if stepping:
            axes.plot((k, k + 0.94, k + 0.94, k, k), (2, 2, 2.94, 2.94, 2), color=BLUE, lw=2)
    write(-2.2, -0.15, r"one noise $\epsilon$, one prompt")
    for y, (name, text) in enumerate(ROWS):
        write(-2.2, y + 0.24, name, 16, "black")
        write(-2.2, y + 0.68, text)

    # One bootstrap step: g(eps, t) is noised, the teacher steps on from there, and g(eps, s) learns the result.
    show(step[0], FROM, 3.55)
    show(step[1], TO, 3.55)
    arrow((FROM + 0.47, 2.97), (FROM + 0.47, 3.53))
    arrow((FROM + 0.98, 4.02), (TO - 0.03, 4.02))
    arrow((TO + 0.47, 3.53), (TO + 0.47, 2.98))
    write(FROM + 0.6, 3.25, "noised by the same $\\epsilon$:\n$x_t = \\alpha_t\\,g + \\sigma_t\\,\\epsilon$",
          color=BLUE)
    write(FROM + 1.47, 3.87, "the teacher's", color=BLUE, ha="center")
    write(FROM + 1.47, 4.17, "step", color=BLUE, ha="center")
    write(TO + 0.6, 3.25, "the bootstrap loss:\n$g(\\epsilon, s)$ learns the target", color=BLUE)
    write(TO + 1.03, 4.02, "the target for $g(\\epsilon, s)$:\n$y_t + (1 - r)\\,(f(x_t, t) - y_t)$\n"
          "with $y_t = g(\\epsilon, t)$", color=BLUE)
    arrow((0.47, 3.5), (0.47, 2.98))
    write(0.47, 3.75, "the boundary loss:\n$g(\\epsilon, T)$ learns $f(\\epsilon, T)$,\nthe start of row $y_t$",
          color=BLUE, ha="center")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=user_path, default=Path("docs/boot.png"))
    parser.add_argument("--prompt", default="a red ankle boot on a yellow background")
    parser.add_argument("--seed", type=int, default=14)
    args = parser.parse_args()
    figure = new_figure(args.out, figsize=(9, 4.7), dpi=200)
    draw(figure, *make_cells(args.prompt, args.seed))
    save_figure(figure, args.out)


if __name__ == "__main__":
    command(main)
