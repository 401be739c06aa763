"""tools.evaluate measures what it says, and tools.judge what it is asked.

- The measures have known values on known distributions; the prompts cover all garments, and hold combinations out.
- Teachers and shipped students make what they are told.
- The teacher's rows are stored, each as soon as it is measured, and are not measured again. Those in tiny/ are its own:
  at the student's scale, guided as in matching, at the best scale.
- The table has these rows and the student's, its file the keys that others read, its sheet of images names.
- The shipped student is nearer to real images than the teacher's fifty steps at the same scale, guided as usual.
- A disk that cannot be written is a warning; a broken student is one sentence.
- dev.train_tiny ships a student in the folder of its own teacher, and of no other.
"""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import TINY, copy_tiny, edit
from plumbing.files import BadInput, read_json, write_json
from plumbing.weights import WEIGHTS
from student import load_student
from tools.evaluate import (STEPS, SWEEP, Evaluation, best_rows, combinations, drift, limited_rows, precision_recall,
                            store, teacher_rows)
from tools.judge import frechet, moments, prompt


# ---------------------------------------------------------------------------------------------------------- measures
def test_frechet_distance_of_gaussians_is_the_closed_form():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200_000, 3, generator=rng, dtype=torch.float64) for _ in "ab")
    scale, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 0.0, -2.0])
    # |shift|^2 + sum (1 - scale)^2
    assert frechet(moments(a), moments(b * scale + shift)) == pytest.approx(5 + (0 + 1 + 0.25), rel=0.02)
    assert abs(frechet(moments(a), moments(a))) < 1e-9


def test_precision_and_recall_tell_quality_from_coverage():
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(1000, 4, generator=rng)
    assert precision_recall(real, real) == (1, 1)
    narrow, far = 0.1 * torch.randn(1000, 4, generator=rng), torch.randn(1000, 4, generator=rng) + 100
    precision, recall = precision_recall(narrow, real)
    assert precision > 0.95 and recall < 0.2 and precision_recall(far, real) == (0, 0)


def test_drift_is_the_largest_change_of_a_channel():
    aim = {"channel_mean": [0.1, 0.2, 0.3], "channel_std": [0.5, 0.5, 0.5]}
    assert drift(aim, aim) == 0
    assert drift(aim | {"channel_mean": [0.1, 0.24, 0.3]}, aim) == pytest.approx(0.04 * 127.5)
    assert drift(aim | {"channel_std": [0.5, 0.5, 0.44]}, aim) == pytest.approx(0.06 * 127.5)


def test_prompts_cover_every_garment_and_hold_combinations_out():
    config = read_json(TINY / "judge" / "config.json")
    chosen = combinations(config, 5000, 0)
    assert all(c != b for _, c, b in chosen) and {g for g, _, _ in chosen} == set(config["garments"])
    held_out = {tuple(c) for c in config["held_out"]}
    trained_on = (TINY / "prompts.txt").read_text().splitlines()
    assert len(held_out) == 56 and not any(prompt(*c) in trained_on for c in held_out)
    assert all(prompt(*c) in trained_on for c in chosen if c not in held_out)


@torch.no_grad()
@pytest.mark.parametrize("folder", [TINY / "student", TINY / "pixel"])
def test_teacher_and_shipped_student_make_what_they_are_told(folder):
    evaluation = Evaluation(load_student(folder), 100, 3.0, seed=1)

    def alignment(sampler):
        row, _ = evaluation.measure(sampler, "")
        return row["align_seen"]
    teacher = alignment(evaluation.ddim(4))                                 # about as good as in fifty steps
    assert teacher > 0.87 and alignment(evaluation.one_step()) > 0.95 * teacher


def test_the_teacher_can_be_guided_by_any_scale_and_as_in_matching():
    evaluation = Evaluation(load_student(TINY / "student"), 100, 3.0, seed=2)
    eps, condition = evaluation.inputs(slice(0, 2))
    zero, one, three, usual, limited = (sampler(eps, **condition) for sampler in (
        evaluation.ddim(1, 0.0), evaluation.ddim(1, 1.0), evaluation.ddim(1, 3.0), evaluation.ddim(1),
        evaluation.ddim(1, limited=True)))
    assert usual.equal(three) and not zero.allclose(one, atol=1e-3) and not one.allclose(three, atol=1e-3)
    assert limited.allclose(one, atol=1e-4)                 # at the noise end there is no guidance,
    two, none, usual = (evaluation.ddim(2, w, limited)(eps, **condition)
                        for w, limited in ((3.0, True), (1.0, False), (3.0, False)))
    assert not two.allclose(none, atol=1e-3) and not two.allclose(usual, atol=1e-3)         # but at T / 2 there is


# ------------------------------------------------------------------------------------------------ the teacher's rows
@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the embedded teacher and its judge, of which nothing is measured yet, and of which less is."""
    monkeypatch.setattr("tools.evaluate.STEPS", (1, 2))
    monkeypatch.setattr("tools.evaluate.SWEEP_STEPS", 1)
    monkeypatch.setattr("tools.evaluate.EXACT", 2 * 256)
    teacher = copy_tiny(tmp_path / "tiny")
    shutil.copytree(TINY / "judge", teacher / "judge")
    return teacher


def test_a_row_is_stored_at_once_and_measured_once(copied):
    evaluation = Evaluation(load_student(TINY / "student", copied), 100, 3.0, seed=2)
    calls, measure = [], evaluation.measure
    evaluation.measure = lambda *args: calls.append(args[1]) or measure(*args)
    rows, reference, solution = teacher_rows(evaluation, [1, 2], fresh=False)
    one, aim = rows[3.0, 1], rows[3.0, 2]
    assert calls == ["DDIM-2, w = 3.0", "DDIM-1, w = 3.0"] and len(rows) == 2 and len(solution) == 2
    assert aim["rmse"] < one["rmse"] and one["to_teacher"] > 10
    [stored] = (copied / "evaluation").glob("*.json")
    stored.write_text(json.dumps([aim]))                    # as an interrupted measurement leaves it
    again, *_, same = teacher_rows(evaluation, [1, 2], fresh=False)
    assert calls[2:] == ["DDIM-1, w = 3.0"] and again == rows and torch.equal(same, solution)
    for _ in range(2):
        [limited] = limited_rows(evaluation, [2], reference, solution, fresh=False).values()
        assert calls[3:] == ["DDIM-2, w = 3.0, limited"] and limited["limited"] and not aim["limited"]
        assert limited["frechet"] != aim["frechet"]
    assert teacher_rows(evaluation, [1, 2], fresh=True)[0] == rows and len(calls) == 6


def test_the_sweep_finds_the_teachers_best_scale_once(copied):
    evaluation = Evaluation(load_student(TINY / "student", copied), 100, 3.0, seed=2)
    calls = []

    def measure(sampler, name, *against):
        calls.append(name)
        return {"frechet": abs(sampler.keywords["w"] - 1.6)}, (torch.zeros(2), torch.eye(2))
    evaluation.measure = measure
    for _ in range(2):
        rows, *_ = teacher_rows(evaluation, [1, 2], fresh=False)
        [row] = best_rows(evaluation, rows, [1.0, 1.5, 2.0], fresh=False)
        assert (row["guidance"], row["steps"], row["nfe"]) == (1.5, 2, 4)
    assert calls == ["DDIM-2, w = 3.0", *(f"DDIM-1, w = {w}" for w in (3.0, 1.0, 1.5, 2.0)), "DDIM-2, w = 1.5"]
    [row] = best_rows(evaluation, rows, [2.0], fresh=False)
    assert row["guidance"] == 2.0 and calls[6:] == ["DDIM-2, w = 2.0"]
    assert best_rows(evaluation, rows, [3.0, 7.0], fresh=False) == []           # its own scale is the best
    best_rows(evaluation, rows, [2.0], fresh=True)
    assert calls[7:] == ["DDIM-1, w = 7.0", "DDIM-2, w = 2.0"]


@pytest.mark.parametrize("folder, images, most, has_limited", [
    (TINY / "student", 5000, 4, True), (TINY / "pixel", 2000, 8, False)])         # whose limited row is not shipped
def test_stored_rows_are_this_teachers_and_keep_the_promise(folder, images, most, has_limited):
    evaluation = Evaluation(load_student(folder), images, 3.0, seed=0)
    evaluation.sample = None                                # what is stored is not measured again
    rows, reference, solution = teacher_rows(evaluation, STEPS, fresh=False)
    [at_best] = best_rows(evaluation, rows, SWEEP, fresh=False)
    rows = [rows[3.0, k] for k in STEPS]
    fifty = rows[-1]
    assert len(solution) == evaluation.num_exact >= 42 and at_best["frechet"] < fifty["frechet"]
    if has_limited:
        [limited] = limited_rows(evaluation, [50], reference, solution, fresh=False).values()
        assert limited["limited"] and limited["frechet"] < fifty["frechet"] and limited["recall"] > fifty["recall"]
    assert fifty["align_seen"] >= 0.9 and (fifty["align_heldout"] or 1) >= 0.8
    better = [row["frechet"] for row in rows if row["steps"] <= most]
    assert better == sorted(better, reverse=True)           # more steps, better images


# ------------------------------------------------------------------------------------------------------- the command
FIGURES = {"sampler", "steps", "nfe", "guidance", "limited", "frechet", "to_teacher", "drift", "channel_mean",
           "channel_std", "precision", "recall", "align_seen", "align_heldout", "rmse", "images_per_s"}


@pytest.mark.slow
def test_the_table_keeps_the_readmes_promise(run, tmp_path):
    """The shipped student is better than the teacher's fifty steps, and the teacher's rows are not measured again."""
    stored = sorted(path.name for path in (TINY / "evaluation").iterdir())
    done = run("-m", "tools.evaluate", "--refine", 1, "--json", tmp_path / "e.json", timeout=600)
    assert done.returncode == 0 and "measuring the teacher" not in done.stdout, done.stderr
    assert sorted(path.name for path in (TINY / "evaluation").iterdir()) == stored
    result = read_json(tmp_path / "e.json")
    *teacher, fifty, limited, at_best, one, refined = result["rows"]
    assert result["images"] == 5000 and len(teacher) == len(STEPS) - 1 and at_best["guidance"] == 2
    assert refined["frechet"] < one["frechet"] < at_best["frechet"] and one["frechet"] < 0.9 * fifty["frechet"]
    assert all(one[name] > 0.97 * fifty[name] for name in ("precision", "recall", "align_seen", "align_heldout"))
    assert one["align_seen"] > limited["align_seen"] and one["frechet"] < 1.1 * limited["frechet"]
    assert one["images_per_s"] > refined["images_per_s"] > fifty["images_per_s"]


@pytest.fixture
def quick(copied, tmp_path):
    """Options of an evaluation that takes seconds, of a copy of the shipped student."""
    student = shutil.copytree(TINY / "student", tmp_path / "student")
    return ["--student", student, "--teacher", copied, "--images", 100, "--sweep"]


def test_the_table_its_file_and_its_sheet(call, quick, tmp_path):
    found = []
    for options in (), ("--limited", "--decoder", TINY / "decoder"):        # the decoder is for the student's row
        code, printed, error = call("tools.evaluate", *quick, *options, "--json", tmp_path / "e.json")
        assert code == 0 and "computed from one step and one decoding" in printed, error
        found.append(read_json(tmp_path / "e.json"))
        assert all(row.keys() >= FIGURES for row in found[-1]["rows"])
    assert {"teacher", "student", "images", "guidance", "rows"} <= found[0].keys()
    one, two = ([(row["sampler"], row["nfe"], row["limited"]) for row in result["rows"]] for result in found)
    assert one == [("ddim", 2, False), ("ddim", 4, False), ("ddim", 4, True), ("student", 1, False)]
    assert two == [("ddim", 2, True), ("ddim", 4, True), ("ddim", 4, False), ("student", 1, False)]
    one, two = ([row["frechet"] for row in result["rows"]] for result in found)
    assert one[1:3] == two[2:0:-1] and one[3] != two[3]
    sheet = Image.open(tmp_path / "e.png")
    margin = sheet.width - 960                              # ten images a row, and its name left of them
    assert margin > 40 and sheet.height == 96 * 3
    for row in range(3):
        name = sheet.crop((0, 96 * row, margin, 96 * (row + 1))).convert("L")
        assert name.getextrema()[0] < 100 and name.getpixel((0, 0)) == 255


def test_what_can_not_be_stored_is_printed_with_a_warning(call, quick, tmp_path):
    (tmp_path / "tiny" / "evaluation").write_text("in the way")
    (tmp_path / "student" / "evaluation.json").mkdir()
    code, printed, error = call("tools.evaluate", *quick, "--steps", 2)
    assert code == 0 and "student           1    3    1" in printed, error
    assert error.count("measured, but not kept") == 4
    with pytest.raises(BadInput, match="can't write"):      # a file that a person has named
        store(write_json, tmp_path / "tiny" / "evaluation" / "e.json", {}, needed=True)


def test_a_broken_student_is_one_sentence(call, quick, tmp_path):
    path = tmp_path / "student" / WEIGHTS
    weights = load_file(path)
    save_file(weights | {"conv_out.bias": weights["conv_out.bias"] * torch.inf}, path)
    code, _, error = call("tools.evaluate", *quick)
    assert code == 2 and "the image of seed 0 is not finite, because of the network" in error, error


def test_a_student_is_shipped_in_its_own_teachers_folder(call, tmp_path):
    out = copy_tiny(tmp_path / "tiny")
    copy_tiny(out / "pixel", "pixel")
    ship = ["dev.train_tiny", "--stages", "student", "--out", out, "--work", tmp_path / "work"]
    assert call(*ship, "--student", TINY / "student")[0] == 0
    a, b = (load_file(folder / "student" / WEIGHTS) for folder in (TINY, out))
    assert all(a[name].equal(b[name]) for name in a) and not (out / "pixel" / "student").exists()
    assert read_json(out / "student" / "student.json") == read_json(TINY / "student" / "student.json")
    edit(out / "scheduler" / "scheduler_config.json", beta_end=0.013)
    code, _, error = call(*ship, "--student", TINY / "student")
    assert code == 2 and "was made for another teacher" in error
