"""A run's log as an image: losses by time, losses, rates and norms, speed.

    python -m tools.curves runs/tiny                        writes runs/tiny/curves.png

It reads log.jsonl while the run goes on, or after it. Where a curve has more than 200 points, each point that is drawn
is the mean of several. It needs matplotlib.
"""

import json
import math
import statistics

from plumbing.files import BadInput, command, new_parser, user_path
from tools.plotting import new_figure, save_figure

MOST = 200              # points of a curve


def read_log(path):
    """The records of a log. Remarks and torn lines are skipped. Raises BadInput if nothing is left."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    if not records:
        raise BadInput(f"{path} has no record of a step: train at least ten")
    return records


def pick(records, *names):
    """{name: its values over the records}, None where a record lacks it."""
    return {name: [record.get(name) for record in records] for name in names}


def by_time(records):
    """The bootstrap loss of each part of the times, from the clean end to the noise."""
    found = [record.get("bootstrap_by_time") or [] for record in records]
    bins = max(map(len, found))
    return {f"t up to {k + 1}/{bins} T": [losses[k] if len(losses) == bins else None for losses in found]
            for k in range(bins)}


def draw(axes, title, steps, curves, scale="log"):
    """Draw curves, {name: values at the steps}. What a logarithmic axis cannot show is left out."""
    for name, values in curves.items():
        points = [(step, value) for step, value in zip(steps, values)
                  if isinstance(value, (int, float)) and 0 < value < math.inf]
        size = math.ceil(len(points) / MOST)
        means = [map(statistics.fmean, zip(*points[k:k + size])) for k in range(0, len(points), size or 1)]
        if means:
            axes.plot(*zip(*means), label=name, linewidth=1, marker="." if len(means) < 20 else None)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.set_yscale(scale)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))         # beside the curves


def main():
    p = new_parser(__doc__)
    p.add_argument("run", type=user_path, help="the folder that train.py writes, --out")
    p.add_argument("--out", type=user_path, help="the PNG file (default: curves.png in the run's folder)")
    args = p.parse_args()
    if args.out and args.out.suffix.lower() != ".png":
        raise BadInput(f"--out {args.out} is no .png file")
    records, out = read_log(args.run / "log.jsonl"), args.out or args.run / "curves.png"
    steps = [record["step"] for record in records]
    figure = new_figure(out, figsize=(14, 8), layout="constrained")
    times, losses, rates, speed = figure.subplots(2, 2).flat
    draw(times, "bootstrap loss by time", steps, by_time(records))
    draw(losses, "losses", steps, pick(records, "bootstrap", "boundary", "matching", "critic", "refining"))
    draw(rates, "learning rate, gradient norms", steps, pick(records, "lr", "grad_norm", "critic_grad_norm"))
    draw(speed, "samples a second", steps, pick(records, "samples_per_s"), "linear")
    speed.set_ylim(bottom=0)
    save_figure(figure, out)


if __name__ == "__main__":
    command(main)
