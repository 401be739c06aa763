"""Images: noise by seed, tensors to PIL, grids, and PNG files that say what they are.

    eps = noise([7, 8], teacher.shape)                      # each sample from a generator of its own
    rows = [to_pil(images)]
    save_png(path, image_grid(rows), {"prompt": "a red bag", "seed": 7})
    done = find_done(folder, list_jobs(...), about)         # what sample.py has made before
"""

import contextlib
import io
import json
import os
from collections import namedtuple

import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from plumbing.files import BadInput


def noise(seeds, shape):
    """eps (B, *shape), each sample from a generator of its own: the same in any batch, on any number of devices."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def to_pil(images):
    """Images (B, 3, H, W) in [-1, 1] to a list of B PIL images."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def image_grid(rows, least=0, names=None):
    """One PIL image of rows of equally large PIL images, each enlarged by a whole factor to at least `least` pixels.
    `names`: of the rows, written left of them."""
    width, height = rows[0][0].size
    grid = Image.new("RGB", (max(map(len, rows)) * width, len(rows) * height), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            grid.paste(image, (x * width, y * height))
    factor = max(1, -(-least // width))
    grid = grid.resize([factor * size for size in grid.size], Image.Resampling.NEAREST)
    return grid if names is None else name_rows(grid, names)


def name_rows(grid, names):
    """The image with names at equal distances left of it."""
    font = ImageFont.load_default(16)
    margin = 16 + max(round(font.getlength(name)) for name in names)
    named = Image.new("RGB", (margin + grid.width, grid.height), "white")
    named.paste(grid, (margin, 0))
    for row, name in enumerate(names):
        ImageDraw.Draw(named).text((8, (row + 0.5) * grid.height / len(names)), name, "black", font, anchor="lm")
    return named


def text_chunks(about):
    """{key: text} that a PNG file stores of `about`, as the texts are when they are read again."""
    return {key: str(value).encode("utf-8", "replace").decode() for key, value in about.items()}


def save_png(path, image, about):
    """Write a PNG file whose text chunks say what it is. It gets its name when it is whole. Raises BadInput."""
    info, buffer, temporary = PngInfo(), io.BytesIO(), path.with_name(path.name + ".new")
    for key, value in text_chunks(about).items():
        info.add_itxt(key, value)
    image.save(buffer, format="PNG", pnginfo=info, compress_level=1)        # a tenth larger, in two thirds of the time
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)               # a full disk gets its space back
        raise BadInput(f"can't write {path}: {error.strerror}") from None


def read_about(path):
    """{key: text} that an image of sample.py or tools.interpolate says of itself; {} where there is no file. Raises
    BadInput for any other file, because that is somebody's and must not be replaced."""
    if not os.path.lexists(path):
        return {}
    try:
        with Image.open(path) as image:
            about = image.info
            if image.format == "WEBP":                      # a film
                about = json.loads(image.getexif()[ExifTags.Base.ImageDescription])
    except Exception:                                       # Pillow raises many kinds for files that it can't read
        about = {}
    if not {"weights", "prompt"} <= about.keys():
        raise BadInput(f"{path} was not made by this project, and stays as it is: move it away, or give another --out")
    return about


# ------------------------------------------------------------------------------------------- the images of a command
Job = namedtuple("Job", "file prompt seed guidance")        # one image: the name of its file, and what it depends on


def list_jobs(num, seeds, prompts, scales):
    """The images in the order of a sheet, row by row. A row has all prompts, each at all the scales. A single seed
    counts on, over `num` rows: image N has seed + N. Several seeds have a row each."""
    several, jobs, digits = len(seeds) > 1, [], len(str(len(prompts) - 1))
    for row, first in enumerate(seeds if several else seeds * num):
        for k, prompt in enumerate(prompts):
            seed = first if several else first + row * len(prompts) + k
            which = f"-{k:0{digits}}" if several and len(prompts) > 1 else ""
            for w in scales:
                scale = f"-w{w}" if len(scales) > 1 else ""
                jobs.append(Job(f"{seed:06d}{which}{scale}.png", prompt, seed, w))
    return jobs


def find_done(folder, jobs, about):
    """The jobs whose images are there already, as their text chunks say. A file under its name is whole (save_png). An
    image of ours that was made from something else is not among them. Raises BadInput for a file that is not ours."""
    done = set()
    for job in jobs:
        wanted = text_chunks(job._asdict() | about)
        del wanted["student"]                               # its folder may have moved; the weights are what counts
        if wanted.items() <= read_about(folder / job.file).items():
            done.add(job)
    return done


def split_jobs(jobs, size):
    """[(prompts, jobs)]: batches of `size` jobs, which have at most as many prompts. Batches of the same prompts follow
    each other, so that each prompt is encoded once and few are held in memory. The last batch of some prompts is filled
    up with its last job, because the last bits of an image depend on the shape of its batch."""
    distinct, batches = list(dict.fromkeys(job.prompt for job in jobs)), []
    part = {prompt: k // size for k, prompt in enumerate(distinct)}
    parts = [[] for _ in range(0, len(distinct), size)]
    for job in jobs:
        parts[part[job.prompt]].append(job)
    for k, members in enumerate(parts):
        prompts = tuple(distinct[k * size:(k + 1) * size])
        members += members[-1:] * (-len(members) % size)
        batches += [(prompts, members[first:first + size]) for first in range(0, len(members), size)]
    return batches
