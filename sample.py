"""Pictures in one step from a student, or from its teacher to compare.

    python sample.py --prompt "a red ankle boot on a yellow background"
    python sample.py --student runs/tiny --prompt "a blue bag on a white background" --num 16 --grid
    python sample.py --prompt "a green coat on a pink background" --compare 1 10 50
"""

import argparse
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo

from signal_ode import solve
from teacher import TINY, BadInput, command, grid, load_student, noise, pick_device, to_pil, write_file
from train import read_prompts


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--student", type=Path, default=TINY / "student", help="folder that train.py wrote (default: the shipped one)")
    p.add_argument("--teacher", help="its teacher, where the folder it was made from has moved")
    p.add_argument("--prompt", action="append", default=[], help="may be given several times")
    p.add_argument("--prompts", type=Path, help="text file, one prompt a line")
    p.add_argument("--num", type=int, default=1, help="images of each prompt")
    p.add_argument("--seed", type=int, default=0, help="of the first image; image N has seed + N, in any batch")
    p.add_argument("--guidance", type=float, help="w, for a student trained on a range (default: its middle); 1 is no guidance")
    p.add_argument("--compare", type=int, nargs="+", default=[], metavar="STEPS", help="the teacher's DDIM in so many steps, left of the student's picture")
    p.add_argument("--out", type=Path, default=Path("samples"), help="folder for the PNG files")
    p.add_argument("--grid", action="store_true", help="also one sheet of all pictures, grid.png")
    p.add_argument("--batch", type=int, default=16, help="images at once; halve it if you run out of memory")
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    return p.parse_args()


def main():
    args = parse_args()
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    if not prompts:
        raise BadInput("no prompt: give --prompt TEXT, or --prompts FILE with one a line")
    for name, value in (("--num", args.num), ("--batch", args.batch), *(("--compare", k) for k in args.compare)):
        if value < 1:
            raise BadInput(f"{name} {value} is not supported: 1 or more")
    device = pick_device(args.device)
    student = load_student(args.student, args.teacher, device, {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision])
    teacher, schedule = student.teacher, student.teacher.schedule
    ranged = isinstance(student.guidance, list)
    if args.guidance is not None and not (ranged and student.guidance[0] <= args.guidance <= student.guidance[1]):
        accepted = f"{student.guidance[0]} to {student.guidance[1]}" if ranged else f"{student.guidance}, the scale it was trained for"
        raise BadInput(f"--guidance {args.guidance} is not supported by this student: {accepted}")
    w = args.guidance if args.guidance is not None else sum(student.guidance) / 2 if ranged else student.guidance
    grids = [schedule.grid(k) for k in args.compare]

    jobs = [(prompt, args.seed + n * len(prompts) + k) for n in range(args.num) for k, prompt in enumerate(prompts)]
    sheet = []
    for k in range(0, len(jobs), args.batch):
        texts, seeds = zip(*jobs[k:k + args.batch])
        eps, cond = noise(seeds, teacher.shape).to(device), teacher.encode(texts)
        with torch.no_grad():
            rows = [to_pil(teacher.decode(z)) for z in (
                *(solve(lambda x, t: teacher.denoise(x, t, cond, w), eps, g, schedule, space="x")[-1] for g in grids),
                student(eps, 0, cond, w))]
        for text, seed, *images in zip(texts, seeds, *rows):
            info = PngInfo()
            for key, value in (("prompt", text), ("seed", seed), ("guidance", w), ("student", args.student), ("compare", args.compare or "")):
                info.add_itxt(key, str(value))
            path = args.out / f"{seed:06d}.png"
            write_file(path, lambda p: grid([images]).save(p, "PNG", pnginfo=info))
            print(f"{path}  {text}")
            sheet.append(grid([images]))
    if args.grid:
        columns = len(prompts) if len(prompts) > 1 else max(1, round(len(sheet) ** 0.5))
        write_file(args.out / "grid.png", lambda p: grid([sheet[k:k + columns] for k in range(0, len(sheet), columns)]).save(p, "PNG"))
        print(args.out / "grid.png")


if __name__ == "__main__":
    command(main)
