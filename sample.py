"""Pictures in one step from a student, or from its teacher to compare.

    python sample.py --prompt "a red ankle boot on a yellow background"
    python sample.py --student runs/tiny --prompt "a blue bag on a white background" --num 16 --grid
    python sample.py --prompt "a green coat on a pink background" --compare 1 10 50 --refine 2
    python sample.py --prompt "a green coat on a pink background" --seed 3 8 --interpolate
    torchrun --nproc_per_node=8 -- sample.py --student runs/sd21 --prompts many.txt --out samples/many

The same command again skips the pictures that are there, whole.
"""

import argparse
import collections
import functools
import io
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from checkpoint import TINY, BadInput, command, write_file
from signal_ode import like
from student import REFINE_FROM, load_student
from teacher import (PRECISION, image_grid, noise, pick_device, read_prompts, readable, slerp, to_pil, torchrun)

FEW = 64                # so many pictures or less are named one by one
PACING = 3              # times that the pace of an interpolation is measured and mended
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
    option("--interpolate", type=int, nargs="?", const=48, metavar="FRAMES", help="so many pictures on the way between "
           "those that were asked for, whatever they differ in: --seed, prompt or --guidance; and a film of them, "
           "interpolation.webp (default: 48, from the seed to the next one)")
    option = p.add_argument_group("where to").add_argument
    option("--out", type=Path, default=Path("samples"), help="folder for the PNG files and index.jsonl, which says "
           "what they are; or the name.png of a single picture or sheet (default: %(default)s)")
    option("--grid", action="store_true", help="also one sheet of all pictures, grid.png; of a film a row")
    option = p.add_argument_group("machine").add_argument
    option("--batch", type=int, default=16, help="images at once; halve it if you run out of memory (default: 16)")
    option("--decoder", help="folder or hub id of a small decoder of the same latents (AutoencoderTiny, such as "
           "madebyollin/taesd), for the teacher's own: most of a picture's time is in that")
    option("--compile", action="store_true", help="torch.compile the networks: a minute or more at first")
    option("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    option("--precision", choices=list(PRECISION), default="fp32", help="(default: %(default)s)")
    return p.parse_args()

def seeds(text):
    """The numbers that N or LO:HI stands for."""
    low, _, high = text.partition(":")
    try:
        found = range(int(low), int(high or low) + 1)
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
    """The pictures in the order of a grid: num of each prompt with seeds that count on from the only one, or one from
    each of several seeds; at each of the scales."""
    rows = [[seeds[0] + n * len(prompts) + k for k in range(len(prompts))] for n in range(num)]
    if len(seeds) > 1:
        rows = [[seed] * len(prompts) for seed in seeds]
    jobs = []
    for row in rows:
        for k, (prompt, seed) in enumerate(zip(prompts, row)):
            which = f"-{k:0{len(str(len(prompts) - 1))}}" if len(seeds) > 1 and len(prompts) > 1 else ""
            for w in scales:
                scale = f"-w{w:g}" if len(scales) > 1 else ""
                jobs.append(Job(f"{seed:06d}{which}{scale}.png", prompt, seed, w))
    return jobs

def check(args, prompts, teacher, world):
    """Raise BadInput for options out of range or at odds, and for prompts that the teacher does not take."""
    takes = f"--{teacher.takes}" if teacher.takes else "neither --prompt nor --label"
    if (args.label and teacher.takes != "label") or (args.prompt and teacher.takes != "prompt") or (
            prompts and teacher.takes is None):
        raise BadInput(f"the student of teacher {teacher.spec} takes {takes}")
    if teacher.takes and not prompts:
        raise BadInput(f"nothing to paint: give {takes} TEXT, or --prompts FILE with one a line")
    for option, value, low, high in (("--num", args.num, 1, 10**6), ("--batch", args.batch, 1, 10**6),
                                     ("--refine", args.refine, 0, teacher.schedule.T // REFINE_FROM),
                                     *(("--compare", k, 1, teacher.schedule.T) for k in args.compare),
                                     ("--interpolate", args.interpolate or 2, 2, 10**5)):
        if not low <= value <= high:
            raise BadInput(f"{option} {value} is not supported: {low} to {high}")
    if teacher.labels:
        teacher.encode(prompts)                             # an unknown one is said before the first picture
    if args.num > 1 and sum(map(len, args.seed)) > 1:
        raise BadInput("--num counts on from one --seed: give one, or several without --num")
    if args.interpolate and args.compare:
        raise BadInput("--interpolate makes a film of the student alone: without --compare")
    if world > 1 and (args.grid or args.interpolate):
        raise BadInput("--grid and --interpolate are for one process")

def only_file(args, num):
    """The file of the only picture or of the sheet, if --out names one, else None. Raises BadInput."""
    if args.out.is_dir() or args.out.suffix.lower() not in Image.registered_extensions():
        return None
    if args.out.suffix.lower() != ".png":
        raise BadInput(f"--out {args.out} is not supported: pictures are .png files")
    if num > 1 and not args.grid:
        raise BadInput(f"--out {args.out} is one file, for {num} pictures: add --grid for a sheet, or give a folder")
    return args.out

def encode(texts, teacher, known):
    """The condition of B prompts, by the names that the network takes. known: {prompt: its own}, left by the call
    before, and then by this one: so a prompt is encoded once, as long as equal ones follow each other."""
    new = list(dict.fromkeys(text for text in texts if text not in known))
    encoded = teacher.encode(new) if new else {}
    known |= {text: {name: value[k:k + 1] for name, value in encoded.items()} for k, text in enumerate(new)}
    for text in known.keys() - set(texts):
        del known[text]
    return {name: torch.cat([known[text][name] for text in texts]) for name in known[texts[0]]}

def paint(student, args, eps, w, condition, names):
    """Pictures of B noises: for each the teacher's, one for every --compare, and the student's, as PIL images. w: (B,).
    names: of the pictures, for the message about one that is not finite."""
    teacher = student.teacher
    w = w if student.ranged else student.guidance           # a number, which may be 1: then one pass is enough
    latents = [teacher.solve(eps, teacher.schedule.grid(steps), w=w, **condition) for steps in args.compare]
    latents.append(student.refine(eps, args.refine, w=w, **condition))
    return list(zip(*(to_pil(teacher.decode(z, names)) for z in latents)))

def text_chunks(about):
    """What a PNG file says of a picture: texts by key, as they are read again."""
    return {key: str(value).encode("utf-8", "replace").decode() for key, value in about.items()}

def save_png(path, picture, texts):
    """Write a PNG file with text chunks that say what it is; a crash leaves no part of one under its name."""
    info, buffer, temporary = PngInfo(), io.BytesIO(), path.with_name(path.name + ".new")
    for key, value in texts.items():
        info.add_itxt(key, value)
    picture.save(buffer, format="PNG", pnginfo=info)
    try:                                                    # not write_file, which waits until it is on disk: that
        path.parent.mkdir(parents=True, exist_ok=True)      # takes longer than the picture, and `whole` looks again
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"can't write {path}: {error.strerror}") from None

def save_all(files):
    """save_png of each (path, picture, texts)."""
    for file in files:
        save_png(*file)

def whole(path, texts):
    """The picture in a file, if it is whole and has these text chunks, else None."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture if texts.items() <= picture.info.items() else None
    except (OSError, SyntaxError):                          # what Pillow has for a broken file
        return None

def write_index(path, jobs, about):
    """Write index.jsonl: a line for each picture of these, and for those of other calls that lie beside them."""
    lines = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            lines[json.loads(line)["file"]] = line
    lines |= {job.file: json.dumps(job._asdict() | about, ensure_ascii=False) for job in jobs}
    write_file(path, lambda p: p.write_text("".join(f"{lines[name]}\n" for name in sorted(lines)), encoding="utf-8"))

def paint_jobs(student, args, jobs, about, folder, rank=0, world=1):
    """Paint the jobs, or every world-th batch of them, into the folder, or with None into nothing but memory, and skip
    those that are there. Returns {job: picture}, but only with --grid."""
    teacher, kept, known, there = student.teacher, {}, {}, set()
    if folder and folder.is_dir():
        there = set(os.listdir(folder))
    size = min(args.batch, len(jobs))                       # the last batch is filled up: one shape, the same last bits
    order = {prompt: k for k, prompt in enumerate(dict.fromkeys(job.prompt for job in jobs))}
    jobs = sorted(jobs, key=lambda job: order[job.prompt])  # so that each prompt is encoded once
    batches = [jobs[k:k + size] for k in range(0, len(jobs), size)][rank::world]
    bar = tqdm(total=sum(map(len, batches)), unit=" images", disable=rank > 0 or len(batches) < 2,
               mininterval=1 if sys.stderr.isatty() else 60)
    waiting = collections.deque()
    with bar, ThreadPoolExecutor(1) as writer:              # encodes and writes beside the computation
        for batch in batches:
            texts = {job: text_chunks(job._asdict() | about) for job in batch}
            found = {job: whole(folder / job.file, texts[job]) for job in batch if job.file in there}
            if missing := [job for job in batch if not found.get(job)]:
                filled = batch + batch[-1:] * (size - len(batch))
                numbers, w = [job.seed for job in filled], torch.tensor([job.guidance for job in filled])
                eps, condition = noise(numbers, teacher.shape), encode([job.prompt for job in filled], teacher, known)
                rows = paint(student, args, eps.to(teacher.device), w.to(teacher.device), condition, numbers)
                painted = dict(zip(batch, rows))
                new = {job: image_grid([painted[job]]) for job in missing}
                found |= new
                if folder:
                    files = [(folder / job.file, picture, texts[job]) for job, picture in new.items()]
                    waiting.append(writer.submit(save_all, files))
            if len(waiting) > 2:
                waiting.popleft().result()
            if args.grid:
                kept |= found
            bar.update(len(batch))
        for written in waiting:
            written.result()
    return kept

def between(u, eps, w, condition):
    """Noise (F, C, h, w), scale (F,) and condition at places u (F,) between corners 0, 1, ...: noise goes on a great
    circle, scale and text go straight."""
    k = u.long().clamp(max=len(eps) - 2)
    share = (u - k).float().to(eps.device)
    text = {name: torch.lerp(c[k], c[k + 1], like(share, c[k]).to(c.dtype)) if c.is_floating_point() else c[k]
            for name, c in condition.items()}
    return slerp(eps[k], eps[k + 1], share), torch.lerp(w[k], w[k + 1], share), text

def film(student, args, u, corners):
    """(pictures at places u between the corners, distances (F - 1,) of neighbours)."""
    pictures, distances, before = [], [], None
    for part in u.split(args.batch):
        eps, w, condition = between(part, **corners)
        latents = student.refine(eps, args.refine, w=w if student.ranged else student.guidance, **condition)
        names = [f"frame {len(pictures) + k}" for k in range(len(part))]
        images = student.teacher.decode(latents, names).cpu()                                   # (B, 3, H, W)
        row = images if before is None else torch.cat([before, images])
        distances += row.diff(dim=0).flatten(1).norm(dim=1).tolist()
        pictures, before = pictures + to_pil(images), images[-1:]
    return pictures, np.array(distances)

def walk(student, args, seeds, prompts, scales, about):
    """Paint --interpolate pictures on the way from the first of the seeds, prompts and scales through the others to the
    last, at the picture's own pace: neighbours are equally far apart. Writes them, and a film there and back."""
    teacher = student.teacher
    if len(seeds) == len(prompts) == len(scales) == 1:
        seeds = [seeds[0], seeds[0] + 1]
    stops = max(len(seeds), len(prompts), len(scales))
    if {len(seeds), len(prompts), len(scales)} - {1, stops}:
        raise BadInput(f"--interpolate goes on in seeds, prompts and scales at once, but these are {len(seeds)}, "
                       f"{len(prompts)} and {len(scales)}: give as many of each, or one")
    if teacher.labels and len(prompts) > 1:
        raise BadInput("--interpolate: there is nothing between two labels; give one, and several --seed")
    corners = [part * stops if len(part) == 1 else part for part in (seeds, prompts, scales)]
    corners = {"eps": noise(corners[0], teacher.shape).to(teacher.device),
               "w": torch.tensor(corners[2], device=teacher.device), "condition": teacher.encode(corners[1])}

    u = torch.linspace(0, stops - 1, args.interpolate, dtype=torch.float64)
    frames, distances = film(student, args, u, corners)
    for _ in range(PACING):                                 # each time closer to equal distances
        way = np.append(0.0, distances.cumsum() / max(distances.sum(), 1e-9))
        u = torch.from_numpy(np.interp(np.linspace(0, 1, len(u)), way, u.numpy()))
        frames, distances = film(student, args, u, corners)

    said = {"prompt": "\n".join(prompts), "seed": " to ".join(map(str, seeds)),
            "guidance": " to ".join(map(str, scales)), **about}
    save_all([(args.out / f"frame_{k:04d}.png", picture, text_chunks(said | {"place": f"{place:.4f}"}))
              for k, (picture, place) in enumerate(zip(frames, u.tolist()))])
    if args.grid:
        save_png(args.out / "grid.png", image_grid([frames], 96), text_chunks(said))
    first, *rest = [image_grid([[picture]], 96) for picture in frames + frames[-2:0:-1]]
    write_file(args.out / "interpolation.webp", functools.partial(
        first.save, format="WEBP", save_all=True, append_images=rest, duration=FRAME_MS, loop=0, quality=90))
    print(args.out / "interpolation.webp")

@torch.no_grad()
def main():
    args = parse_args()
    rank, world, local_rank = torchrun()
    prompts = [readable(text) for text in args.prompt + args.label]
    prompts += read_prompts(args.prompts) if args.prompts else []
    student = load_student(args.student, args.teacher, pick_device(args.device, local_rank), PRECISION[args.precision])
    teacher, scales = student.teacher, [student.pick_guidance(w) for w in dict.fromkeys(args.guidance or [None])]
    check(args, prompts, teacher, world)
    seeds = list(dict.fromkeys(seed for part in args.seed for seed in part))
    prompts = prompts or [""]                               # an unconditional teacher is told nothing
    if args.decoder:
        teacher.use_decoder(args.decoder)
    if args.compile:
        student.network.compile()
        if teacher.vae is not None:
            teacher.vae.decode = torch.compile(teacher.vae.decode)

    name = Path(args.student).resolve()
    name = name.parent if name.name == "student" else name
    about = {"student": "/".join(name.parts[-2:]), "weights": student.fingerprint, "precision": args.precision,
             "decoder": args.decoder or "", "compare": args.compare or "", "refine": args.refine or ""}
    jobs = list_jobs(args.num, seeds, prompts, scales)
    file = only_file(args, len(jobs))
    if args.interpolate:
        if file:
            raise BadInput(f"--out {file} is one file: --interpolate takes a folder")
        return walk(student, args, seeds, prompts, scales, about)

    folder = file.parent if file else args.out
    if file and not args.grid:
        jobs = [jobs[0]._replace(file=file.name)]
    kept = paint_jobs(student, args, jobs, about, None if file and args.grid else folder, rank, world)
    if rank == 0 and not file:
        write_index(folder / "index.jsonl", jobs, about)
    if rank == 0 and len(jobs) <= FEW and not (file and args.grid):
        for job in jobs:
            print(f"{folder / job.file}  {job.prompt}")
    if args.grid:
        across = len(scales) if len(scales) > 1 else len(prompts)
        across = across if across > 1 else max(1, round(len(jobs) ** 0.5))
        cells = [kept[job] for job in jobs]
        grid = image_grid([cells[k:k + across] for k in range(0, len(cells), across)], 96)
        texts = text_chunks({"prompt": "\n".join(prompts), "seed": f"{jobs[0].seed} to {jobs[-1].seed}",
                             "guidance": " ".join(map(str, scales)), **about})
        save_png(file or folder / "grid.png", grid, texts)
        print(file or folder / "grid.png")
    return None

if __name__ == "__main__":
    command(main)
