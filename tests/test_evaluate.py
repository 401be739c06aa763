"""tools.evaluate measures what it says, and tools.judge what it is asked.

- The measures have known values on known distributions; the prompts cover all garments, and hold combinations out.
- Teachers and shipped students make what they are told.
- The teacher's rows are stored, each as soon as it is measured, and are not measured again. Those in tiny/ are its own:
  at the student's scale, guided as in matching, at the best scale.
- The table has these rows and the student's, its file the keys that others read, its sheet of images names.
- The shipped student is nearer to real images than the teacher's fifty steps at the same scale, guided as usual.
- A disk that cannot be written is a warning.
"""

import json
import shutil

import pytest
import torch
from PIL import Image

from conftest import TINY, copy_tiny
from plumbing.files import BadInput, read_json, write_json
from student import load_student
from tools.evaluate import (STEPS, SWEEP, Evaluation, best_rows, combinations, limited_rows, precision_recall, store,
                            teacher_rows)
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
    teacher, student = (evaluation.measure(sampler, "")[0]["align_seen"]    # four steps are about as good as fifty
                        for sampler in (evaluation.ddim(4), evaluation.one_step()))
    assert teacher > 0.87 and student > 0.95 * teacher


def test_the_teacher_can_be_guided_by_any_scale_and_as_in_matching():
    """One step begins at T, where matching has no guidance; the second of two begins at T / 2, where it has."""
    evaluation = Evaluation(load_student(TINY / "student"), 100, 3.0, seed=2)
    eps, condition = evaluation.inputs(slice(0, 2))

    def same(steps, one, other):
        a, b = (evaluation.ddim(steps, *how)(eps, **condition) for how in (one, other))
        return a.allclose(b, atol=1e-3)
    assert same(1, (), (3.0,)) and not same(1, (0.0,), (1.0,)) and not same(1, (1.0,), (3.0,))
    assert same(1, (3.0, True), (1.0,)) and not same(2, (3.0, True), (1.0,)) and not same(2, (3.0, True), (3.0,))


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


@pytest.mark.parametrize("folder, images, most", [(TINY / "student", 5000, 4), (TINY / "pixel", 2000, 8)])
def test_stored_rows_are_this_teachers_and_keep_the_promise(folder, images, most):
    evaluation = Evaluation(load_student(folder), images, 3.0, seed=0)
    evaluation.sample = None                                # what is stored is not measured again
    rows, reference, solution = teacher_rows(evaluation, STEPS, fresh=False)
    [at_best] = best_rows(evaluation, rows, SWEEP, fresh=False)
    rows = [rows[3.0, k] for k in STEPS]
    fifty = rows[-1]
    assert len(solution) == evaluation.num_exact >= 42 and at_best["frechet"] < fifty["frechet"]
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
        assert {"teacher", "student", "images", "guidance", "rows"} <= found[-1].keys()
        assert all(row.keys() >= FIGURES for row in found[-1]["rows"])
    one, two = ([(row["sampler"], row["nfe"], row["limited"]) for row in result["rows"]] for result in found)
    assert one == [("ddim", 2, False), ("ddim", 4, False), ("ddim", 4, True), ("student", 1, False)]
    assert two == [("ddim", 2, True), ("ddim", 4, True), ("ddim", 4, False), ("student", 1, False)]
    one, two = ([row["frechet"] for row in result["rows"]] for result in found)
    assert one[1:3] == two[2:0:-1] and one[3] != two[3]
    sheet = Image.open(tmp_path / "e.png")
    margin = sheet.crop((0, 0, sheet.width - 960, sheet.height)).convert("L")       # ten images a row, left of them
    assert sheet.height == 96 * 3 and margin.getextrema()[0] < 100                  # its name


def test_what_can_not_be_stored_is_printed_with_a_warning(call, quick, tmp_path):
    (tmp_path / "tiny" / "evaluation").write_text("in the way")
    code, printed, error = call("tools.evaluate", *quick, "--steps", 2)
    assert code == 0 and "student           1    3    1" in printed and error.count("measured, but not kept") == 3
    with pytest.raises(BadInput, match="can't write"):      # a file that a person has named
        store(write_json, tmp_path / "tiny" / "evaluation" / "e.json", {}, needed=True)
