"""Sample images from a student, in one step each, or from its teacher to compare.

    python sample.py --prompt "a red ankle boot on a yellow background"
    python sample.py --student runs/tiny --prompt "a blue bag on a white background" --num 16 --grid
    python sample.py --prompt "a green coat on a pink background" --compare 1 10 50 --refine 2
    torchrun --nproc_per_node=8 -- sample.py --student runs/sd21 --prompts many.txt --out samples/many

Image N has seed + N. If you give several seeds, each prompt gets an image from each. A file is called by its prompt and
seed. Each PNG stores its prompt, seed, guidance and student. The same command again skips the images that are there. If
the student has changed since then, they are kept, with the old student's digits in their names, and made anew.
`python -m tools.interpolate` makes films from one seed, prompt or scale to another.
"""

import hashlib
import itertools
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))              # which PYTHONSAFEPATH leaves out

import torch
from PIL import Image
from tqdm import tqdm

from plumbing.configs import Number, check
from plumbing.files import BadInput, command, new_parser, parsing, user_path, user_spec
from plumbing.hub import TINY
from plumbing.images import image_grid, is_made, noise, read_about, save_png, to_pil
from plumbing.processes import PRECISION, pick_device, torchrun
from plumbing.prompts import read_prompts
from student import REFINE_FROM, load_student

FEW = 64                # so many images, or fewer, are named one by one
MOST = 10**6            # seeds, or images of a prompt
WRITERS = 4             # threads that encode PNG files, which takes 20 to 60 ms for 512x512 pixels


# ------------------------------------------------------------------------------------------------------- the options
def parser_of_images(doc):
    """An ArgumentParser with the options that sample.py and tools.interpolate share."""
    parser = new_parser(doc)
    option = parser.add_argument
    option("--student", type=user_spec, default=TINY / "student", help="what train.py wrote (default: the shipped one)")
    option("--teacher", type=user_spec, help="its teacher's folder, if that has moved since the training")
    option("--prompt", action="append", default=[], help="may be given several times")
    option("--label", action="append", default=[], help="a class, its name or number; may be given several times")
    option("--prompts", type=user_path, help="text file, one prompt or label a line; # begins a comment")
    option("--seed", type=parse_seeds, nargs="+", default=[range(1)], help="numbers, or ranges LO:HI (default: 0)")
    option("--guidance", type=float, nargs="+", default=[None], metavar="W", help="for a student trained on a range, "
           "one or several scales (default: the middle); 1 is no guidance")
    option("--refine", type=int, default=0, metavar="STEPS", help="steps of the teacher after the student's, from time "
           "T / 5 on: more detail, at two passes a step (default: %(default)s)")
    option("--batch", type=int, default=16, help="images at once; halve it if you run out of memory (default: 16)")
    option("--decoder", type=user_spec, help="folder or hub id of a small decoder (AutoencoderTiny, such as "
           "madebyollin/taesd): faster")
    option("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    option("--precision", choices=list(PRECISION), default="fp32", help="(default: %(default)s)")
    return parser


def parse_seeds(text):
    """The range of numbers that N or LO:HI stands for."""
    low, colon, high = text.partition(":")
    found = range(int(low), int(high if colon else low) + 1)
    if not 0 < len(found) <= MOST or found[0] < 0 or found[-1] > 2**62:
        raise BadInput(f"{text} is not supported: a number from 0 to 2^62, or LO:HI")
    return found


def parse_args():
    parser = parser_of_images(__doc__)
    parser.add_argument("--num", type=int, default=1, help="images of each prompt (default: %(default)s)")
    parser.add_argument("--compare", type=int, nargs="+", default=[], metavar="K", help="left of each "
                        "image, the teacher's DDIM in K steps from the same noise")
    parser.add_argument("--grid", action="store_true", help="also one sheet of all images, grid.png")
    parser.add_argument("--out", type=user_path, default=Path("samples"), help="folder for the PNG files; or the "
                        "name.png of a single image, or with --grid of the sheet alone (default: %(default)s)")
    return parser.parse_args()


# --------------------------------------------------------------------------------------- the student and what it takes
def open_student(args, local_rank=0):
    """(student, {key: value} that its images have in common, for their text chunks). Raises BadInput."""
    student = load_student(args.student, args.teacher, pick_device(args.device, local_rank), PRECISION[args.precision])
    if args.decoder:
        student.teacher.use_decoder(args.decoder)
    return student, {"student": "/".join(Path(args.student).resolve().parts[-2:]), "weights": student.fingerprint,
                     "decoder": student.teacher.decoder or "", "precision": args.precision,
                     "compare": args.compare or "", "refine": args.refine or ""}


def read_inputs(args, student):
    """Lists of prompts, seeds and guidance scales. Raises BadInput for what the student does not take."""
    teacher, kind = student.teacher, student.teacher.condition_type
    prompts = args.prompt + args.label + (read_prompts(args.prompts) if args.prompts else [])
    seeds = [seed for part in args.seed for seed in part]
    scales = [student.pick_guidance(w) for w in args.guidance]
    wrong = {"prompt": args.label, "label": args.prompt, None: prompts}[kind]
    if wrong or (kind and not prompts):
        takes = f"--{kind} TEXT, or --prompts FILE with one a line" if kind else "neither --prompt nor --label"
        raise BadInput(f"the student of teacher {teacher.spec} takes {takes}")
    if teacher.labels:
        teacher.encode(prompts)                             # an unknown class is found now
    with parsing("command line"):
        most = MOST if len(seeds) == 1 else 1
        check("--num", args.num, f"1 to {MOST}, or 1 with several seeds", 1 <= args.num <= most)
        check("--batch", args.batch, [Number(int, 1, MOST)])
        check("--refine", args.refine, [Number(int, 0, teacher.schedule.T // REFINE_FROM)])
        for steps in args.compare:
            check("--compare", steps, [Number(int, 1, teacher.schedule.T)])
    return prompts or [""], list(dict.fromkeys(seeds)), list(dict.fromkeys(scales))


# --------------------------------------------------------------------------------------------------------- the images
class Job(NamedTuple):
    """An image: the name of its file, and what it is made from."""
    file: str
    prompt: str
    seed: int
    guidance: float


def slug(text, most=60):
    """A text as the beginning of a file's name, with underscores between its words. If the text can't be told from
    that, because it is longer or has other characters, a few digits of its hash follow. So two texts have two slugs."""
    short = re.sub(r"[^\w-]+", "_", text.lower()).encode()[:most].decode(errors="ignore").strip("_")
    digits = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return "" if not text else f"{short}_" if short.replace("_", " ") == text else f"{short}+{digits}_"


def list_jobs(num, seeds, prompts, scales):
    """The images in the order of a sheet, row by row. A row has all prompts, each at all the scales. A single seed
    counts on, over `num` rows: image N has seed + N. Several seeds have a row each."""
    counted = range(seeds[0], seeds[0] + num * len(prompts))
    of_images = counted if len(seeds) == 1 else [seed for seed in seeds for _ in prompts]
    scale = "_w{}" if len(scales) > 1 else ""
    return [Job(f"{slug(prompt)}{seed:06d}{scale.format(w)}.png", prompt, seed, w)
            for seed, prompt in zip(of_images, itertools.cycle(prompts)) for w in scales]


def sample_batch(student, args, jobs):
    """A PIL image of each job: the student's sample, and left of it the teacher's, one for each --compare."""
    teacher, seeds = student.teacher, [job.seed for job in jobs]
    condition = teacher.encode([job.prompt for job in jobs])
    eps = noise(seeds, teacher.shape).to(teacher.device)                                # (B, C, h, w)
    w = student.guidance                                    # a number, because 1 spares the unconditional pass
    if student.ranged:
        w = torch.tensor([job.guidance for job in jobs], device=teacher.device)         # (B,)
    latents = [teacher.solve(eps, teacher.schedule.grid(steps), w=w, **condition) for steps in args.compare]
    latents.append(student.refine(eps, args.refine, w=w, **condition))
    columns = [to_pil(teacher.decode(z, seeds)) for z in latents]
    return [image_grid([row]) for row in zip(*columns)]


def make_images(student, args, jobs, about, folder, rank=0, world=1):
    """Write the images of the jobs, or this process's share of them, into a folder, but for those that are there.
    `about`: {key: value} that they have in common. Raises BadInput for a file that is not ours under one of the names.
    """
    jobs = list(dict.fromkeys(jobs))                        # the same prompt may be given twice
    made = {job for job in jobs if is_made(folder / job.file, job._asdict() | about)}
    size = min(args.batch, len(jobs))
    batches = [jobs[first:first + size] for first in range(0, len(jobs), size)][rank::world]
    with ThreadPoolExecutor(WRITERS) as writers:
        for batch in tqdm(batches, unit=" batches", disable=rank > 0 or len(batches) < 2 or not sys.stderr.isatty()):
            if made.issuperset(batch):
                continue
            batch = batch + batch[-1:] * (size - len(batch))            # the last bits depend on the size of a batch
            images = {job: image for job, image in zip(batch, sample_batch(student, args, batch)) if job not in made}
            paths, abouts = [folder / job.file for job in images], [job._asdict() | about for job in images]
            list(writers.map(save_png, paths, images.values(), abouts))


def save_sheet(path, folder, jobs, across, least, about):
    """Write one image of all the jobs' images in a folder, so many in a row, of `least` pixels each or more."""
    images = [Image.open(folder / job.file).convert("RGB") for job in jobs]
    prompts, seeds, scales = ("\n".join(map(str, dict.fromkeys(column))) for column in list(zip(*jobs))[1:])
    grid = image_grid([images[k:k + across] for k in range(0, len(images), across)], least)
    save_png(path, grid, {"prompt": prompts, "seed": seeds, "guidance": scales} | about)


@torch.no_grad()
def main():
    args = parse_args()
    rank, world, local_rank = torchrun()
    if world > 1:
        print(f"process {rank} of {world}, as RANK and WORLD_SIZE say: makes its share of the images", file=sys.stderr)
    student, about = open_student(args, local_rank)
    prompts, seeds, scales = read_inputs(args, student)
    jobs = list_jobs(args.num, seeds, prompts, scales)
    is_file = args.out.suffix.lower() in Image.registered_extensions() and not args.out.is_dir()
    if (args.grid or is_file) and world > 1:
        raise BadInput("--grid, and --out with the name of a file, are for one process")
    if is_file and (args.out.suffix.lower() != ".png" or (len(jobs) > 1 and not args.grid)):
        raise BadInput(f"--out {args.out} is one file, for {len(jobs)} images: give a folder, or the name of a .png "
                       "file for a single image, or with --grid for the sheet")
    across = next((len(row) for row in (scales, prompts) if len(row) > 1), round(len(jobs) ** 0.5))
    sheet = args.out if is_file else args.out / "grid.png"
    if is_file or args.grid:
        read_about(sheet)                                   # refuses to replace somebody's file now, not after an hour

    with tempfile.TemporaryDirectory() as hidden:
        folder = Path(hidden) if is_file else args.out
        make_images(student, args, jobs, about, folder, rank, world)
        if is_file or args.grid:
            save_sheet(sheet, folder, jobs, across, 96 * args.grid, about)
    if rank == 0:                                           # last, because somebody may have closed the output
        written = [f"{args.out / job.file}  {job.prompt}" for job in jobs if not is_file]
        written += [sheet] * (is_file or args.grid)
        print("\n".join(map(str, written)) if len(written) <= FEW else f"{len(jobs)} images in {args.out}")


if __name__ == "__main__":
    command(main)
