"""A film from one seed, prompt or guidance scale to another, in frames that are evenly spaced in image distance.

    python -m tools.interpolate --prompt "a purple bag on an orange background" --seed 0 2 --frames 12 --grid
    python -m tools.interpolate --prompt "a red sandal on a white background" --prompt "a blue bag on a red background"
    python -m tools.interpolate --student runs/range --prompt "a red sandal on a white background" --guidance 2 4

Give several seeds, prompts or scales; what there is only one of stays the same. One of each is a film from its seed to
the next. The folder gets the frames, frame_0000.png and so on, and interpolation.webp, which plays them there and back.
"""

import functools
import json
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

from plumbing.configs import Number, check
from plumbing.files import BadInput, command, parsing, user_path, write_file
from plumbing.images import image_grid, keep_another_students, noise, read_about, save_png, text_chunks, to_pil
from sample import open_student, parser_of_images, read_inputs
from signal_ode import append_dims

PACING = 3              # times that the distances of neighbours are measured and evened out
FRAME_MS = 60           # for which a frame is shown
FRAMES = "frame_[0-9][0-9][0-9][0-9].png"


def parse_args():
    parser = parser_of_images(__doc__)
    parser.set_defaults(num=1, compare=[])
    parser.add_argument("--frames", type=int, default=48, help="(default: %(default)s)")
    parser.add_argument("--grid", action="store_true", help="also one sheet, a row of all frames, grid.png")
    parser.add_argument("--out", type=user_path, default=Path("samples/film"), help="folder (default: %(default)s)")
    return parser.parse_args()


def slerp(a, b, share):
    """Noises (F, ...) at shares (F,) of the way from a to b, on the great circle through both, where they stay as long
    as noise is. Where a and b are the same, so is the result."""
    lengths = a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1)
    angle = ((a * b).flatten(1).sum(1) / lengths).clamp(-1, 1).acos().clamp(min=1e-3)           # (F,)
    of_a, of_b = ((1 - share) * angle).sin() / angle.sin(), (share * angle).sin() / angle.sin()
    return append_dims(of_a, a) * a + append_dims(of_b, b) * b


def between(u, eps, w, condition):
    """Noise (F, C, h, w), scale (F,) and condition at places u (F,). Place k is stop k. Between two stops, noise moves
    on a great circle, scale and text in a straight line."""
    k = u.long().clamp(max=len(eps) - 2)
    share = (u - k).float().to(eps.device)
    mixed = {}
    for name, c in condition.items():
        mixed[name] = c[k]
        if c.is_floating_point():                           # there is nothing between two labels
            mixed[name] = torch.lerp(c[k], c[k + 1], append_dims(share, c))
    return slerp(eps[k], eps[k + 1], share), torch.lerp(w[k], w[k + 1], share), mixed


def sample_frames(student, args, u, stops):
    """(PIL images at the places u, distances (F - 1,) of neighbours)."""
    frames, distances, last = [], [], None
    for part in u.split(args.batch):
        eps, w, condition = between(part, **stops)
        latents = student.refine(eps, args.refine, w=w if student.ranged else student.guidance, **condition)
        images = student.teacher.decode(latents).cpu()                                          # (B, 3, H, W)
        row = images if last is None else torch.cat([last, images])
        distances += row.diff(dim=0).flatten(1).norm(dim=1).tolist()
        frames += to_pil(images)
        last = images[-1:]
    return frames, np.array(distances)


def save_film(folder, frames, u, about, grid):
    """Write the frames, in place of those of an older film, the film itself, and a sheet if asked. What another student
    has made is kept."""
    for old in [*folder.glob(FRAMES), folder / "interpolation.webp"]:
        keep_another_students(old, about)
        if "place" in read_about(old):
            old.unlink()
    for k, frame in enumerate(frames):
        save_png(folder / f"frame_{k:04d}.png", frame, about | {"place": f"{u[k].item():.4f}"})
    if grid:
        save_png(folder / "grid.png", image_grid([frames], 96), about)
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps(text_chunks(about))           # where read_about finds it
    first, *rest = [image_grid([[frame]], 96) for frame in frames + frames[-2:0:-1]]
    write_file(folder / "interpolation.webp", functools.partial(
        first.save, format="WEBP", save_all=True, append_images=rest, duration=FRAME_MS, loop=0, quality=90, exif=exif))


@torch.no_grad()
def main():
    args = parse_args()
    student, about = open_student(args)
    prompts, seeds, scales = read_inputs(args, student)
    if len(seeds) == len(prompts) == len(scales) == 1:
        seeds = [seeds[0], seeds[0] + 1]
    num = max(len(seeds), len(prompts), len(scales))
    if {len(seeds), len(prompts), len(scales)} - {1, num}:
        raise BadInput(f"a film passes seeds, prompts and scales at the same time, but these are {len(seeds)}, "
                       f"{len(prompts)} and {len(scales)}: give as many of each, or one")
    if student.teacher.labels and len(prompts) > 1:
        raise BadInput("there is nothing between two labels: give one, and several --seed")
    with parsing("command line"):
        check("--frames", args.frames, f"{num} to 9999, to pass {num} stops", args.frames in Number(int, num, 9999))
    if args.out.suffix.lower() in Image.registered_extensions():
        raise BadInput(f"--out {args.out} looks like a file: a film and its frames take a folder")
    sheet = [args.out / "grid.png"] if args.grid else []
    for path in (*args.out.glob(FRAMES), args.out / "interpolation.webp", *sheet):
        read_about(path)                                    # refuses to replace somebody's file

    stop_seeds, stop_prompts, stop_scales = (
        part * num if len(part) == 1 else part for part in (seeds, prompts, scales))
    teacher = student.teacher
    stops = {"eps": noise(stop_seeds, teacher.shape).to(teacher.device), "condition": teacher.encode(stop_prompts),
             "w": torch.tensor(stop_scales, device=teacher.device)}
    u = torch.linspace(0, num - 1, args.frames, dtype=torch.float64)
    frames, distances = sample_frames(student, args, u, stops)
    for _ in range(PACING):                                 # each time closer to equal distances
        way = np.append(0.0, distances.cumsum() / max(distances.sum(), 1e-9))
        u = torch.from_numpy(np.interp(np.linspace(0, 1, args.frames), way, u.numpy()))
        frames, distances = sample_frames(student, args, u, stops)
    about |= {"prompt": "\n".join(prompts), "seed": " to ".join(map(str, seeds)),
              "guidance": " to ".join(map(str, scales))}
    save_film(args.out, frames, u, about, args.grid)
    print("\n".join(map(str, [args.out / "interpolation.webp", *sheet])))


if __name__ == "__main__":
    command(main)
