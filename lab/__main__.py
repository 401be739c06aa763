"""Data-free one-step distillers of the embedded teacher side by side: one loop, one budget, one table.

    python -m lab                                           every method; what is measured already is kept
    python -m lab --only BOOT "SiD, a = 1.2" --seeds 0 1
    python -m lab --limited                                 the teacher guided as in matching
    python -m lab --budget 0.25                             a quarter of the evaluations, in all of it
    python -m lab --table                                   what is measured, best first
    python -m lab.frontier                                  what is measured, drawn beside the teacher

Each method (lab/methods.py) gets as many network evaluations as train.py's default run (lab/loop.py says how they are
counted). First its three rates are tried at half of them, with seed 0; if the highest is the best, one that is three
times as high as well. The best by Frechet distance is then taken with all of them, for every seed. Each run is a line
of lab/results.jsonl. So a killed table goes on with the lines that it lacks, and several processes can share the work,
each with its own --only. Whoever changes a method has to remove its lines.
"""

import inspect
import json
import math
import time
from pathlib import Path

from lab.loop import BUDGET, W, distil
from lab.methods import (METHODS, SCORES, boot, boot_hard, critics, direction, random_points, stage, teacher_paths)
from plumbing.configs import Number, check
from plumbing.files import BadInput, command, new_parser, parsing
from plumbing.processes import pick_device
from teacher import load_teacher
from tools.evaluate import Evaluation, teacher_rows

RESULTS, IMAGES = Path(__file__).parent / "results.jsonl", 5000
FIGURES = {"frechet": ".1f", "to_teacher": ".1f", "precision": ".3f", "recall": ".3f", "align_seen": ".1%",
           "align_heldout": ".1%"}
COLUMNS = ("method", "rate", "seeds", *FIGURES, "steps", "networks", "lines")


def read_lines(path):
    """The lines of a file as dicts; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def share_of_budget(share):
    """Network evaluations. Raises BadInput."""
    with parsing("lab"):
        check("--budget", share, [Number(float, 0.001, 1000)])
    return round(share * BUDGET)


def measured(args, name, rate, seed, budget, trial=False):
    """The line of one run, which is made unless it is there. trial: of a rate."""
    key = {"method": name, "limited": args.limited, "rate": rate, "seed": seed, "budget": budget, "trial": trial}
    for line in read_lines(RESULTS):
        if key.items() <= line.items():
            return line
    teacher, began = load_teacher("tiny", args.device), time.time()
    image_of, lab = distil(METHODS[name], teacher, rate, seed, budget, args.limited)
    line = key | {"evaluations": lab.spent, "steps": lab.step, "seconds": round(time.time() - began)}
    try:
        evaluation = Evaluation(lab.g, IMAGES, W, 0)
        _, reference, _ = teacher_rows(evaluation, [50], False)
        row, _ = evaluation.measure(image_of, name, reference)
        line |= {column: row[column] for column in FIGURES}
    except BadInput as error:                               # images that are not finite
        line |= dict.fromkeys(FIGURES, math.inf) | {"error": str(error)}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(line, flush=True)
    return line


def run(args, name):
    """All runs of a method: its rates at half the budget, then the best of them with every seed."""
    rates, tried = list(METHODS[name].rates), []
    for rate in rates:
        tried.append(measured(args, name, rate, 0, args.budget // 2, trial=True))
        best = min(tried, key=lambda line: line["frechet"])["rate"]
        if len(tried) == len(METHODS[name].rates) and best == max(rates):
            rates.append(3 * best)
    for seed in args.seeds:
        measured(args, name, best, seed, args.budget)


def groups(budget):
    """{(method, limited, rate): its lines, one for each seed} of what is measured with so many evaluations."""
    found = {}
    for line in read_lines(RESULTS):
        if line["budget"] == budget and not line["trial"]:
            found.setdefault((line["method"], line["limited"], line["rate"]), []).append(line)
    return found


def table(budget):
    """Markdown, a row for each method, the best first: means over its seeds, and the range of the Frechet distance."""
    rows = []
    for (name, limited, rate), lines in groups(budget).items():
        method, means = METHODS[name], {c: sum(line[c] for line in lines) / len(lines) for c in (*FIGURES, "steps")}
        cells = {c: format(means[c], form) for c, form in FIGURES.items()}
        distances = [line["frechet"] for line in lines]
        cells["frechet"] += f" ({min(distances):.1f} to {max(distances):.1f})"
        cells |= {"method": f"{name}, limited" if limited else name, "rate": f"{rate:g}",
                  "seeds": len(lines), "steps": round(means["steps"]), "networks": method.networks,
                  "lines": sum(len(inspect.getsource(part).splitlines()) for part in parts(name))}
        rows.append((means["frechet"], [str(cells[c]) for c in COLUMNS]))
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells for _, cells in sorted(rows))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def parts(name):
    """The functions that make a method, but for those of signal_ode.py and matching.py."""
    helpers = {"regression": (teacher_paths,), "progressive": (teacher_paths, random_points, stage),
               "consistency": (teacher_paths, random_points), "TBCM": (teacher_paths, random_points),
               "BOOT, then matching": (boot,), "FreeFlow's form": (boot_hard,), "TwinFlow without images": (direction,)}
    return METHODS[name].losses, *helpers.get(name, ()), *((critics, direction) if name in SCORES else ())


def main():
    parser = new_parser(__doc__)
    option = parser.add_argument
    option("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
           help=f"of these methods: {'; '.join(METHODS)} (default: all)")
    option("--seeds", type=int, nargs="+", default=[0, 1, 2])
    option("--limited", action="store_true", help="guide the teacher where alpha_t >= 0.288 alone")
    option("--budget", type=float, default=1.0, metavar="SHARE",
           help="network evaluations, as a share of train.py's default run (default: %(default)s)")
    option("--table", action="store_true", help="print what is measured, and train nothing")
    option("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    args = parser.parse_args()
    args.device, args.budget = pick_device(args.device), share_of_budget(args.budget)
    for name in [] if args.table else args.only:
        run(args, name)
    print(table(args.budget))


if __name__ == "__main__":
    command(main)
