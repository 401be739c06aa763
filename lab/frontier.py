"""What is measured of the laboratory's methods, beside the teacher's own frontier, as an image.

    python -m lab.frontier                                  draws docs/frontier.png of what is measured
    python -m lab.frontier --budget 0.25                    of the methods' runs with a quarter of the evaluations
    python -m lab.frontier --measure                        first the teacher at each scale, half an hour a line

A teacher has no single quality. With more guidance its images are truer to their prompts and less varied. So its fifty
steps are measured at scales from 1.5 to 5, guided at all times, and guided as in matching ("limited"). That gives two
curves, of Frechet distance and of recall over alignment (the share of the images with all attributes right). A method
that is only worth another scale of the teacher lies on a curve; a better one lies beyond it. The methods' points are
means over seeds, and their bars go from the worst seed to the best. The teacher's lines are kept in lab/teacher.jsonl.
It needs matplotlib.
"""

import itertools
import json
from pathlib import Path

from lab.__main__ import FIGURES, IMAGES, groups, read_lines, share_of_budget
from lab.loop import W
from plumbing.files import BadInput, command, new_parser, user_path
from plumbing.hub import TINY
from plumbing.processes import pick_device
from student import load_student
from tools.evaluate import Evaluation, limited_rows, teacher_rows
from tools.plotting import new_figure, save_figure

TEACHER = Path(__file__).parent / "teacher.jsonl"
SCALES = 1.5, 2.0, 3.0, 4.0, 5.0
LEAST_ALIGNMENT, MOST_DISTANCE, LEAST_RECALL = 0.8, 45, 0.4        # what the image shows


def measure_teacher(evaluation):
    """Append the teacher's lines that lab/teacher.jsonl lacks."""
    known = {(line["w"], line["limited"]) for line in read_lines(TEACHER)}
    rows, *reference = teacher_rows(evaluation, [50], False)
    stored = {False: rows, True: limited_rows(evaluation, [50], *reference, False)}         # at the scale W
    for limited, w in itertools.product((True, False), SCALES):
        if (w, limited) in known:
            continue
        row = stored[limited].get((w, 50))
        if row is None:
            row, _ = evaluation.measure(evaluation.ddim(50, w, limited), f"w = {w}, limited: {limited}")
        line = {"w": w, "limited": limited} | {figure: row[figure] for figure in FIGURES if figure != "to_teacher"}
        with open(TEACHER, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


def draw(axes, figure, title, shown, students, methods):
    """One panel: a figure over alignment. shown: its limits; students: {name: row}; methods: {name: lines}."""
    for limited, label in ((False, "teacher, 50 steps"), (True, "teacher, 50 steps, limited")):
        lines = sorted((line for line in read_lines(TEACHER) if line["limited"] == limited), key=lambda line: line["w"])
        axes.plot([line["align_seen"] for line in lines], [line[figure] for line in lines], "-o", label=label)
        for line in lines:
            axes.annotate(f"w = {line['w']:g}", (line["align_seen"], line[figure]), (4, 4), fontsize=7,
                          textcoords="offset points")
    for name, row in students.items():
        axes.plot([row["align_seen"]], [row[figure]], "k*", markersize=12, label=name)
    for number, (name, lines) in enumerate(methods.items(), 1):
        x, y = ([line[column] for line in lines] for column in ("align_seen", figure))
        centre = sum(x) / len(x), sum(y) / len(y)
        axes.plot([min(x), max(x)], [centre[1]] * 2, "grey", linewidth=0.8)
        axes.plot([centre[0]] * 2, [min(y), max(y)], "grey", linewidth=0.8)
        inside = LEAST_ALIGNMENT <= centre[0] and shown[0] <= centre[1] <= shown[1]
        axes.plot(*centre, ".", color="grey", label=f"{number}: {name}{'' if inside else ' (outside)'}")
        if inside:
            axes.annotate(str(number), centre, (3, -9), fontsize=8, textcoords="offset points")
    axes.set(title=title, xlabel="alignment, combinations seen in training", xlim=(LEAST_ALIGNMENT, 1), ylim=shown)
    axes.grid(alpha=0.3)


def main():
    p = new_parser(__doc__)
    p.add_argument("--measure", action="store_true", help="measure the teacher where that is lacking")
    p.add_argument("--students", type=user_path, nargs="*", default=[TINY / "student"],
                   help="students to be drawn as stars (default: the shipped one)")
    p.add_argument("--budget", type=float, default=1.0, metavar="SHARE", help="as of python -m lab")
    p.add_argument("--out", type=user_path, default=Path("docs/frontier.png"), help="(default: %(default)s)")
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    args = p.parse_args()
    figure = new_figure(args.out, figsize=(14, 6), layout="constrained")
    device, students = pick_device(args.device), {}
    if args.measure:
        measure_teacher(Evaluation(load_student(TINY / "student", None, device), IMAGES, W, 0))
    elif not TEACHER.exists():
        raise BadInput(f"{TEACHER} is missing: give --measure, for hours")
    for folder in args.students:
        student = load_student(folder, "tiny", device)
        student.pick_guidance(W)
        evaluation = Evaluation(student, IMAGES, W, 0)
        name = "/".join(folder.resolve().parts[-2:])
        students[name], _ = evaluation.measure(evaluation.one_step(), name)
    methods = {name + (", limited" if limited else ""): lines
               for (name, limited, _), lines in sorted(groups(share_of_budget(args.budget)).items())}
    distance, recall = figure.subplots(1, 2)
    draw(distance, "frechet", "Frechet distance to real images: lower is better", (15, MOST_DISTANCE), students,
         methods)
    draw(recall, "recall", "recall: higher is better", (LEAST_RECALL, 0.9), students, methods)
    recall.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, args.out)


if __name__ == "__main__":
    command(main)
