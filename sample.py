"""Pictures in one step from a student, or from its teacher to compare.

    python sample.py --prompt "a red ankle boot on a yellow background"
    python sample.py --student runs/tiny --prompt "a blue bag on a white background" --num 16 --grid
    python sample.py --prompt "a green coat on a pink background" --compare 1 10 50
"""

import argparse
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo

from teacher import (PRECISION, TINY, BadInput, command, load_student, noise, pick_device, read_prompts, sheet,
                     to_pil, write_file)


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--student", type=Path, default=TINY / "student",
                   help="folder that train.py wrote (default: the shipped one)")
    p.add_argument("--teacher", help="its teacher, where the folder it was made from has moved")
    p.add_argument("--prompt", action="append", default=[], help="may be given several times")
    p.add_argument("--label", action="append", default=[],
                   help="class of a class-conditional teacher, its name or number; may be given several times")
    p.add_argument("--prompts", type=Path, help="text file, one prompt or label a line")
    p.add_argument("--num", type=int, default=1, help="images of each prompt (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0,
                   help="of the first image; image N has seed + N, in any batch (default: %(default)s)")
    p.add_argument("--guidance", type=float,
                   help="w, for a student trained on a range (default: its middle); 1 is no guidance")
    p.add_argument("--compare", type=int, nargs="+", default=[], metavar="STEPS",
                   help="the teacher's DDIM in so many steps, left of the student's picture")
    p.add_argument("--out", type=Path, default=Path("samples"),
                   help="folder for the PNG files; those of the same seeds are replaced (default: %(default)s)")
    p.add_argument("--grid", action="store_true", help="also one sheet of all pictures, grid.png")
    p.add_argument("--batch", type=int, default=16,
                   help="images at once; halve it if you run out of memory (default: %(default)s)")
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    p.add_argument("--precision", choices=list(PRECISION), default="fp32", help="(default: %(default)s)")
    return p.parse_args()


def main():
    args = parse_args()
    prompts = args.prompt + args.label + (read_prompts(args.prompts) if args.prompts else [])
    # a shell may pass what isn't UTF-8
    prompts = [text.encode("utf-8", "replace").decode() for text in prompts]
    student = load_student(args.student, args.teacher, pick_device(args.device), PRECISION[args.precision])
    teacher, schedule, w = student.teacher, student.teacher.schedule, student.pick_guidance(args.guidance)
    takes = {"text": "--prompt", "label": "--label", None: "neither --prompt nor --label"}[teacher.kind]
    if {"text": args.label, "label": args.prompt, None: prompts}[teacher.kind]:
        raise BadInput(f"the student of teacher {teacher.spec} takes {takes}")
    if teacher.kind and not prompts:
        raise BadInput(f"nothing to paint: give {takes} TEXT, or --prompts FILE with one a line")
    for option, value, low, high in (("--num", args.num, 1, 10**6), ("--batch", args.batch, 1, 10**6),
                                     ("--seed", args.seed, 0, 2**62),
                                     *(("--compare", k, 1, schedule.T) for k in args.compare)):
        if not low <= value <= high:
            raise BadInput(f"{option} {value} is not supported: {low} to {high}")

    prompts = prompts or [""]                               # an unconditional teacher is told nothing
    if teacher.kind == "label":
        teacher.encode(prompts)                             # an unknown one is said before the first picture
    folder = args.student.resolve()
    folder = folder.parent if folder.name == "student" else folder
    name = "/".join(folder.parts[-2:])                      # no more of the path than tells students apart
    jobs = [(prompt, args.seed + n * len(prompts) + k)
            for n in range(args.num) for k, prompt in enumerate(prompts)]
    pictures = []
    for k in range(0, len(jobs), args.batch):
        texts, seeds = zip(*jobs[k:k + args.batch])
        eps, cond = noise(seeds, teacher.shape).to(teacher.device), teacher.encode(texts)
        with torch.no_grad():
            latents = [student.solve(eps, cond, schedule.grid(steps), w) for steps in args.compare]
            latents.append(student(eps, 0, cond, w))
            columns = [to_pil(teacher.decode(z)) for z in latents]
        for text, seed, *images in zip(texts, seeds, *columns):
            info = PngInfo()
            for key, value in (("prompt", text), ("seed", seed), ("guidance", w), ("student", name),
                               ("compare", args.compare or "")):
                info.add_itxt(key, str(value))
            picture, path = sheet([images]), args.out / f"{seed:06d}.png"
            write_file(path, lambda p: picture.save(p, "PNG", pnginfo=info))
            if args.grid:
                pictures.append(picture)
            print(f"{path}  {text}")
    if args.grid:
        columns = len(prompts) if len(prompts) > 1 else max(1, round(len(pictures) ** 0.5))
        rows = [pictures[k:k + columns] for k in range(0, len(pictures), columns)]
        write_file(args.out / "grid.png", lambda p: sheet(rows, 96).save(p, "PNG"))
        print(args.out / "grid.png")


if __name__ == "__main__":
    command(main)
