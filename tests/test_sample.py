"""sample.py and tools.interpolate: what their images depend on, and what they skip. test_commands.py has the refusals.

Images: each PNG stores what made it. An image depends on its seed, and not on the other images or their number. Several
seeds, prompts, scales and classes; sheets; the teacher's images beside the student's; refined, or with a small
decoder. Two processes make what one makes.
Prompts: one that is too long is a warning, and one that is not UTF-8 is stored readably. A character that the terminal
lacks is escaped.
Again: the same command skips what is there, and goes on after a kill. An image of ours that was made otherwise is made
anew, and one of another student is kept. All images are made, even if nobody reads the output.
Films begin and end where they should, move smoothly, and replace an older film.
Images that are not finite are not written.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import ROOT, TINY, edit
from plumbing.weights import WEIGHTS
from sample import slug
from student import new_student, save_student

PROMPT, OTHER = "a red ankle boot on a yellow background", "a blue bag on a white background"
TWO = ("--prompt", PROMPT, "--prompt", OTHER)
PIXEL = ("--student", TINY / "pixel", "--label")


def sample(call, *options):
    code, _, error = call("sample", *options)
    assert code == 0, error
    return error


def text(path):
    return Image.open(path).text


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def name(prompt, seed, scale=""):
    """The file of a plain prompt's image."""
    return f"{prompt.replace(' ', '_')}_{seed:06d}{scale}.png"


def files(folder):
    """{path: contents} of all files in a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------------- the images
def test_images_say_what_they_are(run, tmp_path):
    done = run("sample.py", *TWO, "--num", 2, "--seed", 5, "--grid", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    names = {name(PROMPT, 5), name(OTHER, 6), name(PROMPT, 7), name(OTHER, 8), "grid.png"}
    assert files(tmp_path).keys() == names and all(file in done.stdout for file in names)
    assert Image.open(tmp_path / name(PROMPT, 5)).size == (32, 32)
    assert Image.open(tmp_path / "grid.png").size == (192, 192)
    about = text(tmp_path / name(OTHER, 6))
    assert about["prompt"] == OTHER and about["seed"] == "6" and about["student"] == "tiny/student"
    assert float(about["guidance"]) > 1 and about["weights"]
    assert text(tmp_path / "grid.png")["prompt"] == f"{PROMPT}\n{OTHER}"


def test_each_prompt_is_sampled_from_each_of_several_seeds(call, tmp_path):
    sample(call, *TWO, "--seed", 7, "10:12", "--out", tmp_path)
    assert {file: (text(tmp_path / file)["prompt"], text(tmp_path / file)["seed"]) for file in files(tmp_path)} == {
        name(prompt, seed): (prompt, str(seed)) for seed in (7, 10, 11, 12) for prompt in (PROMPT, OTHER)}


def test_an_image_depends_on_its_seed_alone(call, tmp_path):
    """To the bit in batches of one size, however many images there are; another size may round differently."""
    for out, options in (("five", ("--num", 5)), ("eight", ("--num", 8)), ("one", ("--seed", 6))):
        sample(call, "--prompt", PROMPT, "--seed", 3, "--batch", 4, *options, "--out", tmp_path / out)
    five, eight, one = (files(tmp_path / out) for out in ("five", "eight", "one"))
    assert len(five) == 5 and five.items() < eight.items() and list(one) == [name(PROMPT, 6)]
    five, six, same = (pixels(tmp_path / path) for path in (
        f"five/{name(PROMPT, 5)}", f"five/{name(PROMPT, 6)}", f"one/{name(PROMPT, 6)}"))
    assert abs(six - same).max() <= 1 and abs(six - five).max() > 20


def test_a_student_of_a_range_is_sampled_at_several_scales(call, tiny, tmp_path):
    save_student(tmp_path / "student", new_student(tiny, 600, [2.0, 4.0]))
    options = ("--student", tmp_path / "student", *TWO, "--guidance")
    sample(call, *options, 2, 4, "--grid", "--out", tmp_path / "png")
    assert {file: text(tmp_path / "png" / file)["guidance"] for file in files(tmp_path / "png") if "_w" in file} == {
        name(prompt, seed, f"_w{w}"): w for seed, prompt in enumerate((PROMPT, OTHER)) for w in ("2.0", "4.0")}
    assert Image.open(tmp_path / "png" / "grid.png").size == (192, 192)
    assert "2.0 to 4.0" in call("sample", *options, 5)[2]


def test_out_may_name_the_file_of_one_image_or_sheet(call, tmp_path):
    sample(call, "--prompt", PROMPT, "--out", tmp_path / "new" / "image.png")
    sample(call, *TWO, "--grid", "--out", tmp_path / "two.png")
    (tmp_path / "folder.png").mkdir()
    sample(call, *PIXEL, "bag", "--out", tmp_path / "folder.png")
    assert set(files(tmp_path)) == {"new/image.png", "two.png", "folder.png/bag_000000.png"}
    assert text(tmp_path / "new" / "image.png")["prompt"] == PROMPT
    assert Image.open(tmp_path / "two.png").size == (192, 96) and text(tmp_path / "two.png")["seed"] == "0\n1"


def test_what_made_an_image_is_in_it_and_the_teacher_is_left_of_the_student(call, tmp_path):
    """Refined, compared, decoded or computed otherwise, the same seed is another image: it replaces the one before."""
    path, seen = tmp_path / "0.png", {}
    for key, option in (("", ()), ("decoder", (TINY / "decoder",)), ("precision", ("bf16",)), ("refine", (2,)),
                        ("compare", (1, 4))):
        options = (f"--{key}", *option) if key else ()
        sample(call, "--prompt", PROMPT, *options, "--out", path)
        seen[key] = pixels(path), text(path)
    (plain, about), (compared, _) = seen.pop(""), seen["compare"]
    for key, (_, other) in seen.items():
        assert {name for name in about if about[name] != other[name]} == {key}
    assert compared.shape == (32, 96, 3)
    assert (compared[:, 64:] == plain).all() and not (compared[:, :32] == plain).all()
    assert abs(seen["refine"][0] - plain).max() > 2 and abs(seen["decoder"][0] - plain).max() > 0
    assert ((seen["decoder"][0] - plain) ** 2).mean() ** 0.5 < 10


# -------------------------------------------------------------------------------------------------------- the prompts
def test_a_prompt_that_is_too_long_warns_and_one_that_is_not_utf8_is_stored_readably(call, tmp_path):
    error = sample(call, "--prompt", "red " * 90 + "hat", "--out", tmp_path)
    assert error.startswith("warning: prompt truncated to 77 tokens") and "hat" in error
    sample(call, "--prompt", os.fsdecode(b"caf\xe9"), "--out", tmp_path / "cafe")
    [path] = (tmp_path / "cafe").iterdir()
    assert text(path)["prompt"] == "caf\ufffd"


def test_a_terminal_that_lacks_a_character_gets_its_escape(call, tmp_path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "cp1252"))
    sample(call, "--prompt", "\U0001f99d on a boot", "--num", 3, "--out", tmp_path)
    sys.stdout.flush()
    assert written.getvalue().count(b"\\U0001f99d on a boot") == 3


# ---------------------------------------------------------------------------------------------------------- once more
def test_the_same_command_skips_what_is_there(call, tmp_path):
    command = (*TWO, "--num", 5, "--batch", 4, "--out", tmp_path)
    sample(call, *command)
    first, times = files(tmp_path), {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / name(PROMPT, 8)).unlink()
    (tmp_path / name(OTHER, 9)).write_bytes(first[name(OTHER, 1)])      # ours, but of another seed
    sample(call, *command)
    changed = {path.name for path in tmp_path.iterdir() if path.stat().st_mtime_ns != times[path.name]}
    assert files(tmp_path) == first and changed == {name(PROMPT, 8), name(OTHER, 9)}
    sample(call, "--prompt", "a bag", "--num", 2, "--out", tmp_path)    # another prompt meets none of them
    assert files(tmp_path).items() > first.items() and len(files(tmp_path)) == 12


def test_no_two_prompts_share_a_name(tmp_path):
    """Plain prompts are their names; of others, a hash of all of it is a part."""
    prompts = [PROMPT, PROMPT + " ", PROMPT.upper(), f"{PROMPT}!", "a_red", "a red", "a-red", "", ".", "..", "../a red",
               "cut " * 30 + "a", "cut " * 30 + "b", "\u65e5\u672c", "\udce9", "a/b", "a\\b", "CON", "a\nb", "a red+1"]
    names = [slug(prompt) for prompt in prompts]
    assert len(set(names)) == len(prompts) and names[0] == PROMPT.replace(" ", "_") + "_"
    assert all(len(name) < 80 and re.fullmatch(r"[\w+-]*", name) for name in names)


def test_what_another_student_has_made_is_kept(call, tiny, tmp_path):
    """After more training the same command paints anew; the image that nobody can make again has its student's digits
    in its name. Pictures that the same student can make again are replaced."""
    student, out = new_student(tiny, 600, 3.0), tmp_path / "png"
    for command in ("sample", "--grid"), ("tools.interpolate", "--frames", 2):
        seen = []
        for p in (0.0, 0.01):
            for tensor in student.network.conv_out.parameters():
                tensor.data += p
            save_student(tmp_path / "student", student)
            for _ in range(2):
                code, _, error = call(*command, "--student", tmp_path / "student", "--prompt", PROMPT, "--out", out)
                assert code == 0, error
            seen.append(files(out))
        assert len(seen[1]) == 2 * len(seen[0]) and set(seen[0].values()) < set(seen[1].values())
        for options in (("--student", TINY / "student", "--refine", 1), ("--student", tmp_path / "student")):
            assert call(*command, *options, "--prompt", PROMPT, "--out", out)[0] == 0
            assert set(seen[1].values()) <= set(files(out).values())
        shutil.rmtree(out)


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_images(run, tmp_path):
    command = ["sample.py", "--prompts", "tiny/prompts.txt", "--batch", "8", "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, *command, killed], cwd=ROOT)
    while len(list(killed.glob("*.png"))) < 700 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() < 0                               # it had not ended by itself
    assert run(*command, killed).returncode == run(*command, whole).returncode == 0
    assert len(files(whole)) == 1512 and files(killed) == files(whole)


@pytest.mark.slow
def test_two_processes_share_the_images_that_one_makes(run, tmp_path):
    command = ("sample.py", "--prompts", "tiny/showcase.txt", "--num", 5, "--batch", 8, "--out")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--")
    assert run(*command, tmp_path / "one").returncode == run(*torchrun, *command, tmp_path / "two").returncode == 0
    assert len(files(tmp_path / "one")) == 40 and files(tmp_path / "two") == files(tmp_path / "one")


def test_what_a_cluster_left_in_the_environment_is_told(call, tmp_path, monkeypatch):
    """It looks like torchrun, so that this process makes half of the images."""
    for key, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(key, str(value))
    error = sample(call, *TWO, "--batch", 1, "--out", tmp_path)
    assert "process 1 of 2, as RANK and WORLD_SIZE say: makes its share" in error and len(files(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["| head -1", "2>&1 | head -1", ">&-", "2>&-", "| true"])
def test_all_is_sampled_whoever_listens(tmp_path, shell):
    line = f"{sys.executable} sample.py --prompt x --num 20 --batch 5 --grid --out {tmp_path / 'png'} {shell}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, timeout=120)
    assert len(files(tmp_path / "png")) == 21 and b"Traceback" not in done.stderr, done.stderr


# ------------------------------------------------------------------------------------------------------- the refusals
@pytest.mark.parametrize("part", ["network", "VAE"])
def test_images_that_are_not_finite_are_not_written(call, copy, tmp_path, part):
    student = shutil.copytree(TINY / "student", tmp_path / "student")
    edit(student / "student.json", teacher=str(copy))
    file = (student if part == "network" else copy / "vae") / WEIGHTS
    save_file({name: tensor.float() * (1e5 if "mid_block.resnets.1.conv2" in name else 1)
               for name, tensor in load_file(file).items()}, file)
    options = ("--student", student, "--prompt", PROMPT, "--seed", 7, "--out", tmp_path / "png")
    code, _, error = call("sample", *options, "--precision", "fp16")
    assert code == 2 and f"the image of seed 7 is not finite, because of the {part}: " in error
    assert "--precision fp16 overflows" in error and not (tmp_path / "png").exists()
    sample(call, *options, "--precision", "bf16")


# ---------------------------------------------------------------------------------------------------------- the films
def film(call, *options):
    code, _, error = call("tools.interpolate", *options)
    assert code == 0, error


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
