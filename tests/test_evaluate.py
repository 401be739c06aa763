"""The measures have known values on known distributions; teacher and student paint what they are told."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from plumbing.files import read_json, write_json
from plumbing.hub import TINY
from plumbing.weights import WEIGHTS
from plumbing.checkpoints import INFO, Saver
from student import load_student
from tools import study
from tools.evaluate import STEPS, SWEEP, Evaluation, best_rows, combinations, drift, precision_recall, teacher_rows
from tools.judge import frechet, moments, prompt
from dev.kill import differences


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
    config = json.loads((TINY / "judge" / "config.json").read_text())
    chosen = combinations(config, 5000, 0)
    assert all(c != b for _, c, b in chosen) and {g for g, _, _ in chosen} == set(config["garments"])
    held_out = {tuple(c) for c in config["held_out"]}
    trained_on = (TINY / "prompts.txt").read_text().splitlines()
    assert len(held_out) == 56 and not any(prompt(*c) in trained_on for c in held_out)
    assert all(prompt(*c) in trained_on for c in chosen if c not in held_out)


def test_interrupted_measurement_of_the_teacher_goes_on(tmp_path, monkeypatch):
    """Real rows on 100 images of a copied teacher; a second call finds the first, measures the second."""
    shutil.copytree(TINY, tmp_path / "tiny", ignore=shutil.ignore_patterns("evaluation"))
    monkeypatch.setattr("tools.evaluate.STEPS", (1, 2))
    monkeypatch.setattr("tools.evaluate.EXACT", 10 * 256)
    evaluation = Evaluation(load_student(TINY / "student", tmp_path / "tiny"), 100, 3.0, seed=2)
    calls, measure = [], evaluation.measure
    evaluation.measure = lambda *args: calls.append(args[1]) or measure(*args)
    rows, _, solution = teacher_rows(evaluation, [1, 2], fresh=False)
    one, aim = rows[3.0, 1], rows[3.0, 2]
    assert calls == ["DDIM-2, w = 3.0", "DDIM-1, w = 3.0"] and len(rows) == 2 and len(solution) == 10
    assert aim["rmse"] < one["rmse"] and one["to_teacher"] > 10 > 1e-6 > abs(drift(aim, aim))
    [stored] = (tmp_path / "tiny" / "evaluation").glob("*.json")
    stored.write_text(json.dumps([aim]))
    again, *_, same = teacher_rows(evaluation, [1, 2], fresh=False)
    assert calls[2:] == ["DDIM-1, w = 3.0"] and again == rows and torch.equal(same, solution)
    assert teacher_rows(evaluation, [1, 2], fresh=True)[0] == rows and len(calls) == 5


def test_the_sweep_finds_the_teachers_best_scale_once(tmp_path, monkeypatch):
    shutil.copytree(TINY, tmp_path / "tiny", ignore=shutil.ignore_patterns("evaluation"))
    monkeypatch.setattr("tools.evaluate.STEPS", (1, 2))
    monkeypatch.setattr("tools.evaluate.SWEEP_STEPS", 1)
    evaluation = Evaluation(load_student(TINY / "student", tmp_path / "tiny"), 100, 3.0, seed=2)
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
    [stored] = (json.loads(path.read_text()) for path in (tmp_path / "tiny" / "evaluation").glob("*.json")
                if '"guidance": 1.5' in path.read_text())
    assert {(1.5, 2), (2.0, 2), (7.0, 1)} <= {(row["guidance"], row["steps"]) for row in stored}


def test_a_scale_of_zero_is_a_scale():
    evaluation = Evaluation(load_student(TINY / "student"), 100, 3.0, seed=2)
    assert evaluation.ddim(1, 0.0).keywords["w"] == 0.0 and evaluation.ddim(1).keywords["w"] == 3.0


def test_drift_is_the_largest_change_of_a_channel():
    aim = {"channel_mean": [0.1, 0.2, 0.3], "channel_std": [0.5, 0.5, 0.5]}
    assert drift(aim | {"channel_mean": [0.1, 0.24, 0.3]}, aim) == pytest.approx(0.04 * 127.5)
    assert drift(aim | {"channel_std": [0.5, 0.5, 0.44]}, aim) == pytest.approx(0.06 * 127.5)


def alignment(evaluation, sampler, images):
    with torch.no_grad():
        eps, condition = evaluation.inputs(slice(0, images))
        pictures = evaluation.teacher.decode(sampler(eps, **condition))
        answers = [a.argmax(1) for a in evaluation.judge.answers(evaluation.judge(pictures))]
    labels = evaluation.labels[:images]
    return (torch.stack(answers, 1)[:, :labels.shape[1]] == labels).all(1).float().mean().item()


def test_pixel_teacher_and_its_shipped_student_paint_what_they_are_told():
    evaluation = Evaluation(load_student(TINY / "pixel" / "student"), 200, 3.0, seed=1)
    teacher = alignment(evaluation, evaluation.ddim(4), 200)
    assert teacher > 0.9                                                    # as good as in ten steps or fifty
    assert alignment(evaluation, evaluation.one_step(), 200) > 0.95 * teacher


def test_teacher_and_shipped_student_paint_what_they_are_told():
    student = load_student(TINY / "student")
    evaluation = Evaluation(student, 200, student.guidance, seed=1)
    teacher = alignment(evaluation, evaluation.ddim(25), 200)
    assert teacher > 0.88
    assert alignment(evaluation, evaluation.one_step(), 200) > 0.85 * teacher


def test_stored_rows_are_this_teachers_and_meet_the_promise():
    student = load_student(TINY / "student")
    evaluation = Evaluation(student, 5000, student.guidance, seed=0)
    evaluation.sample = None                                # what is stored is not measured again
    rows, _, solution = teacher_rows(evaluation, STEPS, fresh=False)
    [at_best] = best_rows(evaluation, rows, SWEEP, fresh=False)
    rows = [rows[evaluation.w, k] for k in STEPS]
    best = rows[-1]
    assert at_best["frechet"] < best["frechet"] and solution.shape == (512, 4, 8, 8)
    assert best["align_seen"] >= 0.9 and best["align_heldout"] >= 0.8
    assert all(a["frechet"] > b["frechet"] for a, b in zip(rows, rows[1:4]))    # more steps, better pictures


def test_the_studys_rows_share_what_comes_before_matching(tmp_path, monkeypatch):
    """Train.py takes every row, and no two are the same; each is measured once, and each prefix trained once."""
    calls = []

    def call(folder, threads, job, *args):
        calls.append("evaluate" if "evaluate" in job else "prefix" if "until" in job else "train")
        if "evaluate" in job:
            return write_json(Path(job["result"]), {"frechet": 30.0 + len(calls), "aim": 28.9})
        options = vars(train.parse_args(list(map(str, args))))
        state = folder / "state" / f"step_{job.get('until', options['steps'])}"
        state.mkdir(parents=True)
        write_json(state / INFO, {"options": {name: str(value) for name, value in options.items()}})
        return write_json(folder / "passes.json", {"passes": 1000 * len(calls)})
    monkeypatch.setattr(study, "call", call)
    rows = [study.measure(tmp_path, recipe, 0, 1) for recipe in study.RECIPES]
    assert len({row["frechet"] for row in rows}) == len(rows) == calls.count("train") == calls.count("evaluate")
    assert all(variant in study.VARIANTS for *_, variant in study.RECIPES)
    assert calls.count("prefix") < len(rows) / 3
    assert study.measure(tmp_path, study.RECIPES[0], 0, 1) == rows[0] and calls.count("train") == len(rows)
    study.plot(tmp_path / "plot.png", rows)
    assert Image.open(tmp_path / "plot.png").convert("L").getextrema()[0] < 100


def test_a_row_of_the_study_is_the_run_of_its_options(call, tmp_path, monkeypatch):
    """Bitwise, though it begins with a part that it shares with others. One that fails leaves the others alone."""
    options = {"batch": 4, "steps": 6, "match-from": 0.67, "warmup": 1, "sample-every": 0}
    monkeypatch.setattr(study, "BASE", options)
    whole = [*study.flags(options | {"match-guidance": 0.5}), "--out", tmp_path / "whole"]
    real = study.call

    def call_but_not_to_evaluate(folder, threads, job, *args):
        if "evaluate" not in job:
            return real(folder, threads, job, *args)
        return write_json(Path(job["result"]), {"frechet": 30.0})
    monkeypatch.setattr(study, "call", call_but_not_to_evaluate)
    threads = torch.get_num_threads()       # sums on other numbers of threads differ in the last bits
    row = study.attempt(tmp_path, ("a row", {"match-guidance": 0.5}, ""), 0, threads)
    assert row["frechet"] == 30.0 and len(list(tmp_path.glob("until-*"))) == 1
    assert call("train", *whole)[0] == 0
    [folder] = (path.parent for path in tmp_path.glob("*/recipe.json"))
    a, b = (load_file(path / "student" / WEIGHTS) for path in (tmp_path / "whole", folder))
    assert all(a[name].equal(b[name]) for name in a)
    assert "a row failed" in str(study.attempt(tmp_path, ("another", {"batch": 3, "micro-batch": 2}, ""), 0, threads))


MATCHED = ["--batch", 4, "--steps", 5, "--match-from", 0.6, "--warmup", 1, "--sample-every", 0, "--save-every", 3]


@pytest.fixture(scope="module")
def default_run(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("default")
    done = run("train.py", *MATCHED, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("variant", study.VARIANTS)
def test_every_variant_of_the_study_trains(call, tmp_path, monkeypatch, default_run, variant):
    """From BOOT's first step to a matched one, to another end than the defaults; but the one that is watched keeps its
    checkpoints' students instead."""
    for name in ("match_time", "matching_loss", "boot_losses", "PATH_EVERY", "MATCH_BETA_1",
                 "new_optimizer", "learning_rate"):
        monkeypatch.setattr(train, name, getattr(train, name))              # to be put back
    monkeypatch.setattr(Saver, "save", Saver.save)
    study.VARIANTS[variant]()
    assert call("train", *MATCHED, "--out", tmp_path)[0] == 0
    [line] = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert line["matching"] != 0 and ("bootstrap" in line) == (variant != "alone")
    assert (tmp_path / "step_3" / "student.json").exists() == (variant == "watched")
    assert bool(differences(tmp_path, default_run)) == (variant not in ("", "watched"))


def test_a_student_is_shipped_in_its_own_teachers_folder(call, tmp_path):
    """In half precision; one of another teacher is refused, and nothing replaced."""
    shutil.copytree(TINY, tmp_path / "tiny", ignore=shutil.ignore_patterns("evaluation", "student"))
    ship = ["tools.train_tiny", "--stages", "student", "--out", tmp_path / "tiny", "--work", tmp_path / "work"]
    assert call(*ship, "--student", TINY / "student")[0] == 0
    a, b = (load_file(folder / "student" / WEIGHTS) for folder in (TINY, tmp_path / "tiny"))
    assert all(a[name].equal(b[name]) for name in a) and not (tmp_path / "tiny" / "pixel" / "student").exists()
    assert read_json(tmp_path / "tiny" / "student" / "student.json") == read_json(TINY / "student" / "student.json")
    scheduler = tmp_path / "tiny" / "scheduler" / "scheduler_config.json"
    write_json(scheduler, read_json(scheduler) | {"beta_end": 0.013})
    code, _, error = call(*ship, "--student", TINY / "student")
    assert code == 2 and "was made for another teacher" in error
