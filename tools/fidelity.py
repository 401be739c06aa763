"""The measures that papers use, of a student of any teacher: tools.evaluate with --inception or --clip calls this.

    python -m tools.evaluate --student runs/sd21 --prompts coco.txt --images 30000 --real coco/val2014 --size 256 \
        --inception weights-inception-2015-12-05-6726825d.pth --clip clip-vit-large-patch14

Image N is of prompt N and seed N. The student makes it in one step and the teacher in fifty (--steps has others). The
pictures are kept under --pictures, and are not made again; several processes of torchrun share the work. Then come:

    fid, kid                    Frechet and kernel distance of Inception's features, by torch-fidelity
    precision, recall           of the same features, with three neighbours, by torch-fidelity
    clip                        mean cosine of image and prompt, by transformers' CLIP

Distances are to the teacher's pictures, and to a folder of real ones, which --size cuts and scales as it does ours. The
numbers depend on how many pictures there are, and on their size: say both. It needs torch-fidelity 0.4, and for --clip
transformers; docs/evaluating.md says where the networks' weights are.
"""

import hashlib
import itertools
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from safetensors import SafetensorError

from plumbing.configs import Number, check
from plumbing.files import BadInput, parsing
from plumbing.processes import torchrun
from plumbing.prompts import training_prompts
from sample import Job, make_images

INCEPTION_AT = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                "weights-inception-2015-12-05-6726825d.pth")
CLIP_AT = "https://huggingface.co/openai/clip-vit-large-patch14"
FIGURES = {"fid": ".2f", "kid": ".5f", "precision": ".3f", "recall": ".3f", "clip": ".4f"}


class Sampler:
    """The teacher in so many DDIM steps, guided by w, in the form in which sample.py calls a student."""

    def __init__(self, teacher, w, steps):
        self.teacher, self.guidance, self.ranged, self.steps = teacher, w, False, steps

    def refine(self, eps, _, w, **condition):
        """The sample (B, C, h, w) of noise eps."""
        grid = self.teacher.schedule.grid(self.steps)
        return self.teacher.solve(eps, grid, w=w, **condition)


def check_options(args, teacher):
    """Raise BadInput for what would fail only after hours of pictures: options, packages, networks, real images."""
    with parsing("tools.evaluate"):
        check("--images", args.images, [Number(int, 4, 10**7)])         # precision and recall have three neighbours
        check("--batch", args.batch, [Number(int, 1, 10**6)])
        check("--size", args.size, [None, Number(int, 1, 10**5)])
        check("--clip", args.clip, "none for a teacher without a condition",
              not (args.clip and teacher.condition_type is None))
    for option in ("refine", "limited", "fresh"):
        if getattr(args, option):
            raise BadInput(f"--{option} is for the judge of an embedded teacher, not for --inception and --clip")
    if isinstance(args.steps, list) and len(args.steps) > 1:            # without --steps it is a tuple
        raise BadInput("--steps takes one number with --inception and --clip")
    if isinstance(args.sweep, list):
        raise BadInput("--sweep is for the judge of an embedded teacher, not for --inception and --clip")
    if args.inception and not args.inception.is_file():
        raise BadInput(f"--inception {args.inception} is not a file: it is at {INCEPTION_AT}")
    if args.clip and not (args.clip / "config.json").is_file():
        raise BadInput(f"--clip {args.clip} is not a folder with CLIP's config.json: one is at {CLIP_AT}")
    if args.clip and not any((args.clip / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise BadInput(f"--clip {args.clip} lacks the files of its tokenizer: they are at {CLIP_AT}")
    if (args.real or args.size) and not args.inception:
        raise BadInput("--real and --size are for the distances: give --inception")
    if args.real and len(list_images(args.real)) < 4:
        raise BadInput(f"--real {args.real} has {len(list_images(args.real))} images (.png, .jpg, .jpeg) of its own, "
                       "not counting folders in it: give 4 or more")
    if args.real and not args.size:
        raise BadInput("--real needs --size, to which its images and ours are scaled")
    try:
        if args.inception and tuple(map(int, version("torch-fidelity").split(".")[:2])) < (0, 4):
            raise BadInput("torch-fidelity has precision and recall since 0.4: pip install -U torch-fidelity")
        if args.clip:
            version("transformers")
    except PackageNotFoundError as error:
        raise BadInput(f"{error.name} is not installed: pip install torch-fidelity transformers") from None


def check_files(args):
    """Open the networks, and all real images. Raises BadInput, naming the file, for one that is damaged."""
    if args.clip:
        open_clip(args)
    if args.inception:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        try:
            FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(args.inception))
        except Exception as error:                          # a pickle fails in many ways
            raise BadInput(f"--inception {args.inception} cannot be opened ({error!r:.200}): download it again from "
                           f"{INCEPTION_AT}") from None
    for path in list_images(args.real) if args.real else ():
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError) as error:
            raise BadInput(f"{path} is damaged ({error}): replace or remove it") from None


def open_clip(args):
    """(model, image processor, tokenizer) of --clip. Raises BadInput."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
    try:
        return (CLIPModel.from_pretrained(args.clip, local_files_only=True, use_safetensors=True).eval(),
                CLIPImageProcessor.from_pretrained(args.clip), CLIPTokenizer.from_pretrained(args.clip))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"--clip {args.clip} cannot be opened ({error!r:.200}): one is at {CLIP_AT}") from None


def list_images(folder):
    """The images that torch-fidelity would read in a folder."""
    return [path for path in Path(folder).glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg")]


def make_pictures(sampler, args, jobs, about):
    """Make the pictures of a sampler that are not there yet, with the other processes. Returns their folder."""
    rank, world, _ = torchrun()
    digits = hashlib.blake2b(repr([sorted(about.items()), jobs]).encode(), digest_size=6).hexdigest()
    folder = args.pictures / f"{about['sampler']}-{digits}"
    if rank == 0:
        there = {path.name for path in list_images(folder)}
        if others := there - {job.file for job in jobs}:
            raise BadInput(f"{folder} has other images, such as {min(others)}: remove them")
        print(f"{about['sampler']}: {len(there)} of {len(jobs)} pictures are there, in {folder}", flush=True)
    make_images(sampler, SimpleNamespace(batch=args.batch, refine=0, compare=[]), jobs, about, folder, rank, world)
    while world > 1 and not all((folder / job.file).exists() for job in jobs):
        time.sleep(1)                                       # for the shares of the others
    return folder


def distances(args, folder, other, device):
    """FID, KID, precision and recall of a folder of pictures to another one."""
    from torch_fidelity import calculate_metrics
    count = min(len(list_images(each)) for each in (folder, other))
    found = calculate_metrics(
        input1=str(folder), input2=str(other), fid=True, kid=True, prc=True, cuda=device.type == "cuda", verbose=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(args.inception), cache=False,
        kid_subset_size=min(1000, count), samples_resize_and_crop=args.size or 0)
    return {"fid": found["frechet_inception_distance"], "kid": found["kernel_inception_distance_mean"],
            "precision": found["precision"], "recall": found["recall"]}


@torch.no_grad()
def clip_score(args, folder, jobs, device):
    """The mean cosine of the pictures' embeddings and those of their prompts."""
    model, process, tokenizer = open_clip(args)
    model, total = model.to(device), 0.0
    for part in (jobs[k:k + args.batch] for k in range(0, len(jobs), args.batch)):
        images = process([Image.open(folder / job.file).convert("RGB") for job in part], return_tensors="pt")
        text = tokenizer([job.prompt for job in part], padding=True, truncation=True, return_tensors="pt")
        out = model(**images.to(device), **text.to(device))
        total += (out.image_embeds * out.text_embeds).sum().item()
    return total / len(jobs)


def evaluate(student, args, w):
    """(rows, lines of text) of the student and its teacher, guided by w; None in a process that has only made pictures.
    A row is a dict of what was compared (sampler, steps, guidance, reference) and FIGURES. Raises BadInput."""
    teacher, steps = student.teacher, args.steps[-1]
    rank, _, _ = torchrun()
    check_options(args, teacher)
    if rank == 0:
        check_files(args)
    known = training_prompts(teacher, args.prompts)
    jobs = [Job(f"{k:06d}.png", prompt, args.seed + k, w)
            for k, prompt in zip(range(args.images), itertools.cycle(known))]
    common = {"decoder": teacher.decoder or "", "precision": args.precision}
    folders = {
        "student": make_pictures(student, args, jobs, common | {"sampler": "student", "weights": student.fingerprint}),
        "teacher": make_pictures(Sampler(teacher, w, steps), args, jobs, common | {
            "sampler": f"ddim-{steps}", "weights": teacher.fingerprint, "negative": teacher.negative_prompt}),
        "real": args.real}
    if rank:
        return None
    scores, rows = {}, []
    for name in ("student", "teacher") if args.clip else ():
        scores[name] = clip_score(args, folders[name], jobs, teacher.device)
    pairs = [("student", "teacher"), ("student", "real"), ("teacher", "real")]
    if not args.inception:
        pairs = [("student", None), ("teacher", None)]
    for name, other in pairs:
        if other is None or folders[other]:
            found = distances(args, folders[name], folders[other], teacher.device) if other else {}
            rows.append({"sampler": name, "steps": 1 if name == "student" else steps, "guidance": w,
                         "reference": other, "clip": scores.get(name)} | found)
    size = f"scaled to {args.size} pixels" if args.size else "as they are"
    prompts = len({job.prompt for job in jobs})
    return rows, [f"{args.images} images of {prompts} prompts, w = {w:g}, {size}", *table(rows)]


def table(rows):
    """The rows as lines of text, with a heading."""
    lines = ["sampler  steps  distance to  " + "  ".join(f"{name:>9}" for name in FIGURES)]
    for row in rows:
        figures = ["-" if row.get(name) is None else format(row[name], form) for name, form in FIGURES.items()]
        lines.append(f"{row['sampler']:7}  {row['steps']:5}  {row['reference'] or '-':11}  "
                     + "  ".join(f"{figure:>9}" for figure in figures))
    return lines
