"""A run's log as a picture: its losses by time, matching, the rates, the speed.

    python -m tools.curves runs/tiny                    runs/tiny/curves.png

Read while the run goes on, or after it. Every line of log.jsonl is a point; where there are more than 200, a point is
the mean of several.
"""

import argparse
import functools
import json
import math
import statistics
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from plumbing.files import BadInput, command, write_file

WIDTH, HEIGHT, MARGIN, LEGEND, POINTS = 720, 400, 64, 140, 200
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
FONT = ImageFont.load_default(14)


def read_log(path):
    """The records of a log: remarks, and lines that are torn, are left out. Raises BadInput if nothing is left."""
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


def curve(records, pick):
    """[(step, value)] of what pick(record) finds, a positive number or None; at most POINTS, means of neighbours."""
    found = [(record["step"], pick(record)) for record in records]
    found = [(step, value) for step, value in found if isinstance(value, (int, float)) and 0 < value < math.inf]
    size = math.ceil(len(found) / POINTS) or 1
    parts = [found[first:first + size] for first in range(0, len(found), size)]
    return [tuple(map(statistics.fmean, zip(*part))) for part in parts]


def curves(records, *names):
    return {name: curve(records, lambda record, name=name: record.get(name)) for name in names}


def by_time(records):
    """The bootstrap loss of each part of the times, from the clean end to the noise."""
    bins = max(len(record.get("bootstrap_by_time") or ()) for record in records)
    whole = [record for record in records if len(record.get("bootstrap_by_time") or ()) == bins]
    return {f"t to {k + 1}/{bins} T": curve(whole, lambda record, k=k: record["bootstrap_by_time"][k])
            for k in range(bins)}


def panel(title, lines, logarithmic=True):
    """An image of curves over the step. lines: {name: [(step, value)]}."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 12), title, "black", FONT)
    points = [point for line in lines.values() for point in line]
    if not points:
        draw.text((WIDTH / 2, HEIGHT / 2), "nothing yet", "grey", FONT, anchor="mm")
        return image
    scale = math.log10 if logarithmic else float
    left, right = min(step for step, _ in points), max(step for step, _ in points)
    low, high = (limit(scale(value) for _, value in points) for limit in (min, max))
    low, high = (low - 0.05, high + 0.05) if logarithmic else (0.0, 1.1 * high)

    def place(step, value):
        return (MARGIN + (step - left) / max(right - left, 1) * (WIDTH - MARGIN - LEGEND),
                HEIGHT - MARGIN - (scale(value) - low) / (high - low) * (HEIGHT - 2 * MARGIN))
    for part in (0, 0.25, 0.5, 0.75, 1):
        level = low + part * (high - low)
        value = 10**level if logarithmic else level
        y = HEIGHT - MARGIN - part * (HEIGHT - 2 * MARGIN)
        draw.line((MARGIN, y, WIDTH - LEGEND, y), "lightgrey")
        draw.text((MARGIN - 6, y), f"{value:.3g}", "black", FONT, anchor="rm")
        step = left + part * (right - left)
        x = MARGIN + part * (WIDTH - MARGIN - LEGEND)
        draw.text((x, HEIGHT - MARGIN + 8), f"{step:.0f}", "black", FONT, anchor="mt")
    for number, (name, line) in enumerate(lines.items()):
        colour, places = COLOURS[number % len(COLOURS)], [place(*point) for point in line]
        if len(places) > 1:
            draw.line(places, colour, 2, joint="curve")
        for x, y in places if len(places) < 20 else ():
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
        if line:
            draw.text((WIDTH - LEGEND + 8, MARGIN + 18 * number), name, colour, FONT)
    return image


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("run", type=Path, help="the folder that train.py writes, --out")
    p.add_argument("--out", type=Path, help="(default: curves.png in it)")
    args = p.parse_args()
    records, out = read_log(args.run / "log.jsonl"), args.out or args.run / "curves.png"
    panels = [panel("bootstrap loss by time", by_time(records)),
              panel("losses", curves(records, "bootstrap", "boundary", "matching", "critic")),
              panel("learning rate, norms of the gradients", curves(records, "lr", "grad_norm", "critic_grad_norm")),
              panel("samples a second", curves(records, "samples_per_s"), logarithmic=False)]
    image = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT))
    for number, part in enumerate(panels):
        image.paste(part, (number % 2 * WIDTH, number // 2 * HEIGHT))
    write_file(out, functools.partial(image.save, format="PNG"))
    print(out)


if __name__ == "__main__":
    command(main)
