"""Pictures in one step from a student, or from its teacher to compare.

    python sample.py --prompt "a red ankle boot on a yellow background"
    python sample.py --student runs/tiny --prompt "a blue bag on a white background" --num 16 --grid
    python sample.py --prompt "a green coat on a pink background" --compare 1 10 50 --refine 2
    python sample.py --prompt "a green coat on a pink background" --seed 3 8 --interpolate
    torchrun --nproc_per_node=8 -- sample.py --student runs/sd21 --prompts many.txt --out samples/many

The same command again skips the pictures that are there, whole; sheets and films are made anew.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from plumbing.files import BadInput, command, parsing, write_file
from plumbing.hub import TINY
from REMOVED import slerp
from signal_ode import append_dims
from student import REFINE_FROM, load_student
from plumbing.images import image_grid, noise, to_pil
from plumbing.processes import PRECISION, pick_device, torchrun
from plumbing.prompts import read_prompts, readable

FEW = 64                # so many pictures or less are named one by one
MOST = 10**7            # pictures of a call
WRITERS = max(1, (os.cpu_count() or 1) // 4)                # threads that encode PNG files beside the computation
PACING = 3              # times that the pace of a film is measured and mended
FRAME_MS = 60           # of a film

def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    option = p.add_argument_group("what").add_argument
    option("--student", default=TINY / "student", help="what train.py wrote (default: the shipped one)")
    option("--teacher", help="its teacher's folder, if that has moved since the training")
    option("--prompt", action="append", default=[], help="may be given several times")
    option("--label", action="append", default=[], help="a class, its name or number; may be given several times")
    option("--prompts", type=Path, help="text file, one prompt or label a line, thousands if you like")
    option("--num", type=int, default=1, help="images of each prompt (default: %(default)s)")
    option("--seed", type=seeds, nargs="+", default=[range(1)], metavar="SEED", help="one number: of the first image; "
           "image N has seed + N, in any batch. Several, or ranges LO:HI: each prompt from each of them (default: 0)")
    option("--guidance", type=float, nargs="+", metavar="W", help="for a student trained on a range (default: its "
           "middle), one or several; 1 is no guidance")
    option("--refine", type=int, default=0, metavar="STEPS", help="steps of the teacher after the student's, from time "
           "T / 5 on: more detail, at two passes a step (default: %(default)s)")
    option("--compare", type=int, nargs="+", default=[], metavar="STEPS", help="the teacher's DDIM, left of it")
    option("--interpolate", type=int, nargs="?", const=48, metavar="FRAMES", help="so many pictures on the way from "
           "the first of the given seeds, prompts or scales past the others to the last, and a film of them, "
           "interpolation.webp (default: 48, from one seed to the next)")
    option = p.add_argument_group("where to").add_argument
    option("--out", type=Path, default=Path("samples"), help="folder for the PNG files, and for index.jsonl, a line "
           "for each; or the name.png of a single picture or sheet (default: %(default)s)")
    option("--grid", action="store_true", help="also one sheet of all pictures, grid.png; of a film a row")
    option = p.add_argument_group("machine").add_argument
    option("--batch", type=int, default=16, help="images at once; halve it if you run out of memory (default: 16)")
    option("--decoder", help="folder or hub id of a small decoder of the same latents (AutoencoderTiny, such as "
           "madebyollin/taesd), for the teacher's own: most of a picture's time is in that")
    option("--compile", action="store_true", help="torch.compile the networks that paint: minutes at first")
    option("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    option("--precision", choices=list(PRECISION), default="fp32", help="(default: %(default)s)")
    return p.parse_args()

def seeds(text):
    """The numbers that N or LO:HI stands for."""
    low, colon, high = text.partition(":")
    try:
        found = range(int(low), int(high if colon else low) + 1)
    except ValueError:
        found = range(0)
    if not found or not 0 <= found[0] <= found[-1] <= 2**62:
        raise argparse.ArgumentTypeError(f"--seed {text} is not supported: numbers from 0 to 2^62, or LO:HI of them")
    return found

class Job(NamedTuple):
    """A picture: the name of its file, and what it depends on."""
    file: str
    prompt: str
    seed: int
    guidance: float

def list_jobs(num, seeds, prompts, scales):
    """The pictures in the order of a sheet: num of each prompt with seeds that count on from the only one, or one from
    each of several seeds; at each of the scales."""
    if len(seeds) > 1:
        rows = [[seed] * len(prompts) for seed in seeds]
    else:
        rows = [range(seeds[0] + n * len(prompts), seeds[0] + (n + 1) * len(prompts)) for n in range(num)]
    jobs, digits = [], len(str(len(prompts) - 1))
    for row in rows:
        for k, (prompt, seed) in enumerate(zip(prompts, row)):
            which = f"-{k:0{digits}}" if len(seeds) > 1 and len(prompts) > 1 else ""
            for w in scales:
                scale = f"-w{w}" if len(scales) > 1 else ""
                jobs.append(Job(f"{seed:06d}{which}{scale}.png", prompt, seed, w))
    return jobs

def check_options(args, world):
    """Raise BadInput for options that are out of range or at odds."""
    for option, value, low, high in (("--num", args.num, 1, 10**6), ("--batch", args.batch, 1, 10**6),
                                     ("--interpolate", args.interpolate, 2, 9999)):
        if value is not None and not low <= value <= high:
            raise BadInput(f"{option} {value} is not supported: {low} to {high}")
    if args.num > 1 and sum(map(len, args.seed)) > 1:
        raise BadInput("--num counts on from one --seed: give one, or several without --num")
    if args.interpolate and (args.compare or args.num > 1):
        raise BadInput("--interpolate makes a film of the student's pictures: without --compare and --num")
    if world > 1 and (args.grid or args.interpolate):
        raise BadInput("--grid and --interpolate are for one process")
    if is_file(args.out) and args.out.suffix.lower() != ".png":
        raise BadInput(f"--out {args.out} is not supported: pictures are .png files")
    if is_file(args.out) and args.interpolate:
        raise BadInput(f"--out {args.out} is one file: --interpolate takes a folder")

def is_file(out):
    """Whether --out names a picture, and not a folder."""
    return not out.is_dir() and out.suffix.lower() in Image.registered_extensions()

def check_prompts(args, prompts, teacher):
    """Raise BadInput for prompts and steps that the teacher does not take."""
    takes = f"--{teacher.condition_type}" if teacher.condition_type else "neither --prompt nor --label"
    wrong = {"prompt": args.label, "label": args.prompt, None: prompts}[teacher.condition_type]
    if wrong:
        raise BadInput(f"the student of teacher {teacher.spec} takes {takes}")
    if teacher.condition_type and not prompts:
        raise BadInput(f"nothing to paint: give {takes} TEXT, or --prompts FILE with one a line")
    for option, value, low, high in (("--refine", args.refine, 0, teacher.schedule.T // REFINE_FROM),
                                     *(("--compare", k, 1, teacher.schedule.T) for k in args.compare)):
        if not low <= value <= high:
            raise BadInput(f"{option} {value} is not supported: {low} to {high}")
    for prompt in set(prompts) if teacher.labels else ():
        teacher.class_number(prompt)                        # an unknown one is said before the first picture

def paint(student, args, eps, w, condition, seeds=None):
    """Pictures of B noises, each a list of PIL images: the teacher's, one for every --compare, and the student's.
    w: (B,). seeds: for the message about one that is not finite."""
    teacher = student.teacher
    w = w if student.ranged else student.guidance           # a number, which may be 1: then one pass is enough
    latents = [teacher.solve(eps, teacher.schedule.grid(steps), w=w, **condition) for steps in args.compare]
    latents.append(student.refine(eps, args.refine, w=w, **condition))
    return list(zip(*(to_pil(teacher.decode(z, seeds)) for z in latents)))

def text_chunks(about):
    """What a PNG file says of a picture: texts by key, as they are read again."""
    return {key: str(value).encode("utf-8", "replace").decode() for key, value in about.items()}

def save_png(path, picture, texts):
    """Write a PNG file with text chunks that say what it is. A killed process leaves no part of one under its name, but
    it is not waited for until it is on disk, which would take longer than the picture: `whole` looks again."""
    info, buffer, temporary = PngInfo(), io.BytesIO(), path.with_name(path.name + ".new")
    for key, value in texts.items():
        info.add_itxt(key, value)
    picture.save(buffer, format="PNG", pnginfo=info, compress_level=1)      # a tenth larger, in two thirds of the time
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)               # a full disk gets its space back
        raise BadInput(f"can't write {path}: {error.strerror}") from None

def whole(path, texts):
    """The picture in a file, if it is undamaged and depends on what these text chunks say, else None. The name of the
    student does not matter: its weights do."""
    try:
        with Image.open(path) as picture:
            picture.verify()                                # its checksums, which load() ignores
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError):              # what Pillow has for a broken file
        return None
    said = picture.info | {"student": texts["student"]}
    return picture if texts.items() <= said.items() else None

def read_index(path):
    """{file: line} of an index.jsonl. Raises BadInput."""
    if not path.exists():
        return {}
    with parsing(path):
        lines = path.read_text(encoding="utf-8").split("\n")     # other separators belong to the prompt
        return {json.loads(line)["file"]: line for line in lines if line}

def write_index(path, lines, jobs, about):
    """Write index.jsonl: a line for each picture of these, and for those of other calls that still lie beside them."""
    lines = {name: line for name, line in lines.items() if (path.parent / name).exists()}
    lines |= {job.file: json.dumps(job._asdict() | about, ensure_ascii=False) for job in jobs}
    text = "".join(f"{lines[name]}\n" for name in sorted(lines))
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

def paint_jobs(student, args, jobs, about, folder, rank=0, world=1):
    """Paint the jobs, or this process's share of them, into the folder, or with None into nothing but memory, and skip
    those that are there. Returns {job: picture}, but only with --grid."""
    teacher, kept, conditions, there = student.teacher, {}, {}, set()
    if folder and folder.is_dir():
        there = set(os.listdir(folder))
    size = min(args.batch, len(jobs))                       # the last batch is filled up: one shape, the same last bits
    distinct = list(dict.fromkeys(job.prompt for job in jobs))
    order = {prompt: k for k, prompt in enumerate(distinct)}
    jobs = sorted(jobs, key=lambda job: order[job.prompt])  # so that each prompt is encoded once
    batches = [jobs[k:k + size] for k in range(0, len(jobs), size)]
    batches = batches[len(batches) * rank // world:len(batches) * (rank + 1) // world]
    bar = tqdm(total=sum(map(len, batches)), unit=" images", disable=rank > 0 or len(batches) < 2,
               mininterval=1 if sys.stderr.isatty() else 60)
    writing = deque()
    with bar, ThreadPoolExecutor(WRITERS) as writers:
        for batch in batches:
            texts = {job: text_chunks(job._asdict() | about) for job in batch}
            found = {job: whole(folder / job.file, texts[job]) for job in batch if job.file in there}
            missing = [job for job in batch if not found.get(job)]
            if missing:                                     # of the whole batch, as its last bits depend on its size
                filled = batch + batch[-1:] * (size - len(batch))
                seeds, w = [job.seed for job in filled], torch.tensor([job.guidance for job in filled])
                prompts, first = [job.prompt for job in filled], order[batch[0].prompt]
                conditions = {prompt: c for prompt, c in conditions.items() if order[prompt] >= first}
                if any(prompt not in conditions for prompt in prompts):             # then the next ones, too
                    new = [prompt for prompt in distinct[first:first + 2 * size] if prompt not in conditions]
                    for prompt, *values in zip(new, *(encoded := teacher.encode(new)).values()):
                        conditions[prompt] = dict(zip(encoded, values))
                condition = {name: torch.stack([conditions[prompt][name] for prompt in prompts])
                             for name in conditions[prompts[0]]}
                eps = noise(seeds, teacher.shape).to(teacher.device)
                painted = dict(zip(batch, paint(student, args, eps, w.to(teacher.device), condition, seeds)))
                for job in missing:
                    found[job] = image_grid([painted[job]])
                    if folder:
                        writing.append(writers.submit(save_png, folder / job.file, found[job], texts[job]))
            while len(writing) > 2 * size:
                writing.popleft().result()
            if args.grid:
                kept |= found
            bar.update(len(batch))
        for written in writing:
            written.result()
    return kept

def save_sheet(path, kept, jobs, across, about):
    """Write the sheet of all pictures, {job: picture}, so many in a row."""
    cells, prompts = [kept[job] for job in jobs], dict.fromkeys(job.prompt for job in jobs)
    numbers, scales = [job.seed for job in jobs], dict.fromkeys(job.guidance for job in jobs)
    run = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    said = {"prompt": "\n".join(prompts), "guidance": " ".join(map(str, scales)),
            "seed": f"{numbers[0]} to {numbers[-1]}" if run else " ".join(map(str, dict.fromkeys(numbers)))}
    grid = image_grid([cells[k:k + across] for k in range(0, len(cells), across)], 96)
    save_png(path, grid, text_chunks(said | about))
    print(path)

def between(u, eps, w, condition):
    """Noise (F, C, h, w), scale (F,) and condition at places u (F,) between corners 0, 1, ...: noise goes on a great
    circle, scale and text go straight."""
    k = u.long().clamp(max=len(eps) - 2)
    share = (u - k).float().to(eps.device)
    mixed = {name: torch.lerp(c[k], c[k + 1], append_dims(share, c[k])) if c.is_floating_point() else c[k]
             for name, c in condition.items()}
    return slerp(eps[k], eps[k + 1], share), torch.lerp(w[k], w[k + 1], share), mixed

def film(student, args, u, corners):
    """(pictures at places u between the corners, distances (F - 1,) of neighbours)."""
    pictures, distances, before = [], [], None
    for part in u.split(args.batch):
        eps, w, condition = between(part, **corners)
        latents = student.refine(eps, args.refine, w=w if student.ranged else student.guidance, **condition)
        images = student.teacher.decode(latents).cpu()                                          # (B, 3, H, W)
        row = images if before is None else torch.cat([before, images])
        distances += row.diff(dim=0).flatten(1).norm(dim=1).tolist()
        pictures, before = pictures + to_pil(images), images[-1:]
    return pictures, np.array(distances)

def walk(student, args, seeds, prompts, scales, about):
    """Paint --interpolate pictures on the way from the first of the seeds, prompts and scales past the others to the
    last, at the picture's own pace: neighbours are equally far apart. Writes them, and a film there and back."""
    teacher, frames = student.teacher, args.interpolate
    if len(seeds) == len(prompts) == len(scales) == 1:
        seeds = [seeds[0], seeds[0] + 1]
    stops = max(len(seeds), len(prompts), len(scales))
    if {len(seeds), len(prompts), len(scales)} - {1, stops}:
        raise BadInput(f"--interpolate goes on in seeds, prompts and scales at once, but these are {len(seeds)}, "
                       f"{len(prompts)} and {len(scales)}: give as many of each, or one")
    if stops > frames:
        raise BadInput(f"--interpolate {frames} is not supported: {stops} or more, to pass {stops} of them")
    if teacher.labels and len(prompts) > 1:
        raise BadInput("--interpolate: there is nothing between two labels; give one, and several --seed")
    passed = [part * stops if len(part) == 1 else part for part in (seeds, prompts, scales)]
    corners = {"eps": noise(passed[0], teacher.shape).to(teacher.device),
               "w": torch.tensor(passed[2], device=teacher.device), "condition": teacher.encode(passed[1])}

    u = torch.linspace(0, stops - 1, frames, dtype=torch.float64)
    pictures, distances = film(student, args, u, corners)
    for _ in range(PACING):                                 # each time closer to equal distances
        way = np.append(0.0, distances.cumsum() / max(distances.sum(), 1e-9))
        u = torch.from_numpy(np.interp(np.linspace(0, 1, frames), way, u.numpy()))
        pictures, distances = film(student, args, u, corners)

    said = {"prompt": "\n".join(prompts), "seed": " to ".join(map(str, seeds)),
            "guidance": " to ".join(map(str, scales)), **about}
    for old in args.out.glob("frame_[0-9][0-9][0-9][0-9].png"):         # of a longer film
        old.unlink()
    for k, picture in enumerate(pictures):
        texts = text_chunks(said | {"place": f"{u[k].item():.4f} of {stops - 1}"})
        save_png(args.out / f"frame_{k:04d}.png", picture, texts)
    if args.grid:
        save_png(args.out / "grid.png", image_grid([pictures], 96), text_chunks(said))
    first, *rest = [image_grid([[picture]], 96) for picture in pictures + pictures[-2:0:-1]]
    write_file(args.out / "interpolation.webp", functools.partial(
        first.save, format="WEBP", save_all=True, append_images=rest, duration=FRAME_MS, loop=0, quality=90))
    print(args.out / "interpolation.webp")

def compile_networks(student, args):
    """What paints is compiled when it is first called."""
    student.network.compile()
    if student.teacher.vae is not None:
        student.teacher.vae.decode = torch.compile(student.teacher.vae.decode)
    if args.compare or args.refine:
        student.teacher.unet.compile()

@torch.no_grad()
def main():
    args = parse_args()
    rank, world, local_rank = torchrun()
    check_options(args, world)
    prompts = [readable(text) for text in args.prompt + args.label]
    prompts += read_prompts(args.prompts) if args.prompts else []
    num = max(args.num, sum(map(len, args.seed))) * max(1, len(prompts)) * len(args.guidance or [None])
    if num > MOST:
        raise BadInput(f"{num} pictures are more than a call makes, {MOST}: give fewer seeds or prompts")
    if is_file(args.out) and num > 1 and not args.grid:
        raise BadInput(f"--out {args.out} is one file, for {num} pictures: add --grid for a sheet, or give a folder")
    student = load_student(args.student, args.teacher, pick_device(args.device, local_rank), PRECISION[args.precision])
    teacher, scales = student.teacher, [student.pick_guidance(w) for w in dict.fromkeys(args.guidance or [None])]
    check_prompts(args, prompts, teacher)
    seeds = list(dict.fromkeys(seed for part in args.seed for seed in part))
    prompts = prompts or [""]                               # an unconditional teacher is told nothing
    if args.decoder:
        teacher.use_decoder(args.decoder)
    if args.compile:
        compile_networks(student, args)

    name = Path(args.student).resolve()
    name = name.parent if name.name == "student" else name
    about = {"student": "/".join(name.parts[-2:]), "weights": student.fingerprint, "decoder": teacher.decoder or "",
             "precision": args.precision, "compare": args.compare or "", "refine": args.refine or ""}
    jobs = list_jobs(args.num, seeds, prompts, scales)
    across = len(scales) if len(scales) > 1 else len(prompts)
    across = across if across > 1 else max(1, round(len(jobs) ** 0.5))
    if args.interpolate:
        walk(student, args, seeds, prompts, scales, about)
    elif is_file(args.out) and args.grid:
        save_sheet(args.out, paint_jobs(student, args, jobs, about, None), jobs, across, about)
    elif is_file(args.out):
        paint_jobs(student, args, [jobs[0]._replace(file=args.out.name)], about, args.out.parent)
        print(f"{args.out}  {prompts[0]}")
    else:
        lines = read_index(args.out / "index.jsonl") if rank == 0 else {}
        kept = paint_jobs(student, args, jobs, about, args.out, rank, world)
        if rank == 0:
            write_index(args.out / "index.jsonl", lines, jobs, about)
            said = [f"{args.out / job.file}  {job.prompt}" for job in jobs]
            print("\n".join(said) if len(jobs) <= FEW else f"{len(jobs)} pictures in {args.out}")
        if args.grid:
            save_sheet(args.out / "grid.png", kept, jobs, across, about)

if __name__ == "__main__":
    command(main)
