"""Pictures in one step from a student, or from its teacher to compare.

    python sample.py --prompt "a red ankle boot on a yellow background"
    python sample.py --student runs/tiny --prompt "a blue bag on a white background" --num 16 --grid
    python sample.py --prompt "a green coat on a pink background" --compare 1 10 50 --refine 2
"""

import argparse
import functools
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from checkpoint import TINY, BadInput, command, write_file
from student import REFINE_FROM, load_student
from teacher import PRECISION, image_grid, noise, pick_device, read_prompts, readable, to_pil

def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    option = p.add_argument
    option("--student", default=TINY / "student", help="what train.py wrote (default: the shipped one)")
    option("--teacher", help="its teacher's folder, if that has moved since the training")
    option("--prompt", action="append", default=[], help="may be given several times")
    option("--label", action="append", default=[], help="a class, its name or number; may be given several times")
    option("--prompts", type=Path, help="text file, one prompt or label a line")
    option("--num", type=int, default=1, help="images of each prompt (default: %(default)s)")
    option("--seed", type=int, default=0, help="of the first image; image N has seed + N, in any batch (default: 0)")
    option("--guidance", type=float, help="w, for a student trained on a range (default: its middle); 1 is no guidance")
    option("--refine", type=int, default=0, metavar="STEPS", help="steps of the teacher after the student's, from time "
           "T / 5 on: more detail, at two passes a step (default: %(default)s)")
    option("--compare", type=int, nargs="+", default=[], metavar="STEPS", help="the teacher's DDIM, left of it")
    option("--out", type=Path, default=Path("samples"), help="folder for the PNG files, of which those of the same "
           "seeds are replaced, or the name.png of a single picture or sheet (default: %(default)s)")
    option("--grid", action="store_true", help="also one sheet of all pictures, grid.png")
    option("--batch", type=int, default=16, help="images at once; halve it if you run out of memory (default: 16)")
    option("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    option("--precision", choices=list(PRECISION), default="fp32", help="(default: %(default)s)")
    return p.parse_args()

def check(args, prompts, teacher):
    """Raise BadInput for options out of range, and for prompts that the teacher does not take. Returns the file of the
    only picture or of the sheet, if --out names one, else None."""
    takes = f"--{teacher.takes}" if teacher.takes else "neither --prompt nor --label"
    if (args.label and teacher.takes != "label") or (args.prompt and teacher.takes != "prompt") or (
            prompts and teacher.takes is None):
        raise BadInput(f"the student of teacher {teacher.spec} takes {takes}")
    if teacher.takes and not prompts:
        raise BadInput(f"nothing to paint: give {takes} TEXT, or --prompts FILE with one a line")
    for option, value, low, high in (("--num", args.num, 1, 10**6), ("--batch", args.batch, 1, 10**6),
                                     ("--seed", args.seed, 0, 2**62),
                                     ("--refine", args.refine, 0, teacher.schedule.T // REFINE_FROM),
                                     *(("--compare", k, 1, teacher.schedule.T) for k in args.compare)):
        if not low <= value <= high:
            raise BadInput(f"{option} {value} is not supported: {low} to {high}")
    if teacher.labels:
        teacher.encode(prompts)                             # an unknown one is said before the first picture
    if args.out.is_dir() or args.out.suffix.lower() not in Image.registered_extensions():
        return None
    num = args.num * max(1, len(prompts))
    if args.out.suffix.lower() != ".png":
        raise BadInput(f"--out {args.out} is not supported: pictures are .png files")
    if num > 1 and not args.grid:
        raise BadInput(f"--out {args.out} is one file, for {num} pictures: add --grid for a sheet, or give a folder")
    return args.out

def save_png(path, picture, about):
    """Write a PNG file with text chunks that say what it is."""
    info = PngInfo()
    for key, value in about.items():
        info.add_itxt(key, str(value).encode("utf-8", "replace").decode())
    write_file(path, functools.partial(picture.save, format="PNG", pnginfo=info))

@torch.no_grad()
def main():
    args = parse_args()
    prompts = [readable(text) for text in args.prompt + args.label]
    prompts += read_prompts(args.prompts) if args.prompts else []
    student = load_student(args.student, args.teacher, pick_device(args.device), PRECISION[args.precision])
    teacher, w = student.teacher, student.pick_guidance(args.guidance)
    file = check(args, prompts, teacher)
    prompts = prompts or [""]                               # an unconditional teacher is told nothing

    folder = Path(args.student).resolve()
    folder = folder.parent if folder.name == "student" else folder
    about = {"guidance": w, "student": "/".join(folder.parts[-2:]), "compare": args.compare or "",
             "refine": args.refine or ""}
    jobs = [(prompt, args.seed + n * len(prompts) + k)
            for n in range(args.num) for k, prompt in enumerate(prompts)]
    pictures = []
    for k in range(0, len(jobs), args.batch):
        texts, seeds = zip(*jobs[k:k + args.batch])
        eps, condition = noise(seeds, teacher.shape).to(teacher.device), teacher.encode(texts)
        latents = [teacher.solve(eps, teacher.schedule.grid(steps), w=w, **condition) for steps in args.compare]
        latents.append(student.refine(eps, args.refine, w=w, **condition))
        columns = [to_pil(teacher.decode(z, seeds)) for z in latents]
        for text, seed, *images in zip(texts, seeds, *columns):
            picture, path = image_grid([images]), file or args.out / f"{seed:06d}.png"
            if args.grid:
                pictures.append(picture)
            if not (args.grid and file):
                save_png(path, picture, {"prompt": text, "seed": seed, **about})
                print(f"{path}  {text}")
    if args.grid:
        across = len(prompts) if len(prompts) > 1 else max(1, round(len(pictures) ** 0.5))
        grid = image_grid([pictures[k:k + across] for k in range(0, len(pictures), across)], 96)
        path = file or args.out / "grid.png"
        save_png(path, grid, {"prompt": "\n".join(prompts), "seed": f"{jobs[0][1]} to {jobs[-1][1]}", **about})
        print(path)

if __name__ == "__main__":
    command(main)
