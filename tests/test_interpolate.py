"""tools.interpolate: a film begins and ends where it should, moves smoothly, and replaces an older film. Noise on the
way stays as long as noise is. What can't be is one sentence. test_sample.py tests that a file that is not ours stays.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from test_sample import OTHER, PIXEL, PROMPT, TWO, files, pixels, sample, text
from tools.interpolate import slerp


def film(call, *options):
    code, _, error = call("tools.interpolate", *options)
    assert code == 0, error


def test_noise_on_the_way_from_one_to_another_stays_as_long():
    a, b, share = torch.randn(1, 1000).expand(3, 1000), torch.randn(1, 1000).expand(3, 1000), torch.tensor([0, 0.5, 1])
    between = slerp(a, b, share)
    assert torch.allclose(between[[0, 2]], torch.stack([a[0], b[0]]), atol=1e-5)
    assert abs(between.norm(dim=1) / 1000**0.5 - 1).max() < 0.2 and slerp(a, a, share).allclose(a)


@pytest.mark.parametrize("given, first, last", [
    ((*TWO, "--seed", 3), ("--prompt", PROMPT, "--seed", 3), ("--prompt", OTHER, "--seed", 3)),
    (("--prompt", PROMPT, "--seed", 1, 2, 5), ("--prompt", PROMPT, "--seed", 1), ("--prompt", PROMPT, "--seed", 5)),
    ((*PIXEL, "ankle boot"), (*PIXEL, "ankle boot"), (*PIXEL, "ankle boot", "--seed", 1))])
def test_a_film_begins_and_ends_where_it_should_and_moves_smoothly(call, tmp_path, given, first, last):
    out = tmp_path / "film"
    film(call, *given, "--frames", 16, "--out", out)
    for name, options in (("first.png", first), ("last.png", last)):
        sample(call, *options, "--out", tmp_path / name)
    frames = [pixels(path) for path in sorted(out.glob("frame_*.png"))]
    assert len(frames) == 16 and abs(frames[0] - pixels(tmp_path / "first.png")).max() <= 1
    assert abs(frames[-1] - pixels(tmp_path / "last.png")).max() <= 1
    steps = [((a - b) ** 2).mean() ** 0.5 for a, b in zip(frames, frames[1:])]
    assert 0 < np.median(steps) and max(steps) < 3 * np.median(steps)
    with Image.open(out / "interpolation.webp") as played:
        assert played.n_frames == 30 and played.size == (96, 96)        # there and back


def test_a_film_replaces_a_longer_one(call, tmp_path):
    for num in (4, 3):
        film(call, "--prompt", PROMPT, "--frames", num, "--grid", "--out", tmp_path)
    assert set(files(tmp_path)) == {"grid.png", "interpolation.webp", *(f"frame_000{k}.png" for k in range(3))}
    assert text(tmp_path / "frame_0002.png")["place"] == "1.0000" and Image.open(tmp_path / "grid.png").width == 3 * 96


@pytest.mark.parametrize("options, message", [
    ((*TWO, "--seed", 1, 2, 3), "but these are 3, 2 and 1"), ((*PIXEL, "bag", "--label", "coat"), "between two labels"),
    ((*TWO, "--frames", 1), "--frames = 1 is not supported: 2 to 9999"), ((*TWO, "--out", "a.png"), "take a folder")])
def test_what_can_not_be_is_one_sentence(call, options, message):
    code, _, error = call("tools.interpolate", *options)
    assert code == 2 and message in error and error.count("\n") == 1, error
