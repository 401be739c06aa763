"""Images: noise by seed, tensors to PIL, grids, and PNG files that say what they are.

    eps = noise([7, 8], teacher.shape)                      # each sample from a generator of its own
    rows = [to_pil(images)]
    about = {"prompt": "a red bag", "seed": 7, "student": "runs/tiny", "weights": student.fingerprint}
    save_png(path, image_grid(rows), about)
    is_made(path, about)                                    # True: need not be made again

A PNG file under its final name is whole.
"""

import contextlib
import json
import os

import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from plumbing.files import NOT_OURS, BadInput, write_file

OURS = {"Software": "BOOT"}         # what all our images say of themselves


def noise(seeds, shape):
    """eps (B, *shape), each sample from a generator of its own: the same in any batch, on any number of devices."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def to_pil(images):
    """Images (B, 3, H, W) in [-1, 1] to a list of B PIL images."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def image_grid(rows, least=0):
    """One PIL image of rows of equally large PIL images, each enlarged by a whole factor to at least `least` pixels."""
    width, height = rows[0][0].size
    grid = Image.new("RGB", (max(map(len, rows)) * width, len(rows) * height), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            grid.paste(image, (x * width, y * height))
    factor = max(1, -(-least // width))
    return grid.resize([factor * size for size in grid.size], Image.Resampling.NEAREST)


def text_chunks(about):
    """{key: text} that a PNG file stores of `about`, as the texts are when they are read again."""
    return {k: str(v).encode("utf-16", "surrogatepass").decode("utf-16", "replace") for k, v in about.items()}


def save_png(path, image, about):
    """Write a PNG file whose text chunks say what it is. It gets its name when it is whole. It replaces an image of
    ours, but one that another student has made is kept. Raises BadInput."""
    keep_another_students(path, about)
    info = PngInfo()
    for key, value in text_chunks(about | OURS).items():
        info.add_itxt(key, value)
    # At level 1 a file is a tenth larger than usual, and takes two thirds of the time.
    write_file(path, lambda p: image.save(p, format="PNG", pnginfo=info, compress_level=1))


def read_about(path):
    """{key: text} that an image of ours says of itself; {} where there is no file. Raises BadInput for any other file,
    because that is somebody's and must not be replaced."""
    if not os.path.lexists(path):
        return {}
    with contextlib.suppress(Exception), Image.open(path) as image:         # Pillow raises many kinds of errors
        about = image.info
        if image.format == "WEBP":                          # a film has no text chunks
            about = json.loads(image.getexif()[ExifTags.Base.ImageDescription])
        if OURS.items() <= about.items() or {"prompt", "weights"} <= about.keys():         # which older ones have
            return about
    raise BadInput(f"{path} {NOT_OURS}")


def keep_another_students(path, about):
    """Rename the image at this path if it is of other weights than `about` says: they are in its name from now on.
    Training changes a student, so nobody could make that image again. Raises BadInput for a file that is not ours."""
    there = read_about(path)
    if there.get("weights", about.get("weights")) != about.get("weights"):
        aside = path.with_stem(f"{path.stem}_{there['weights']}")
        while read_about(aside) not in ({}, there):         # which it has made otherwise, say with --refine
            aside = aside.with_stem(f"{aside.stem}_")
        os.replace(path, aside)


def is_made(path, about):
    """Whether a file is the image that `about` describes, wherever the student's folder is now. Raises BadInput for one
    that is not ours."""
    return text_chunks({key: about[key] for key in about if key != "student"}).items() <= read_about(path).items()
