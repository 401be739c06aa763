"""One run of train.py, in one process.

What it leaves, and that a second run leaves the same bits. That it resumes bitwise after any signal, wherever the
critic begins. Which options another start may change, and that every other one changes the student. Which losses a step
has, and at which rate. That a folder is never used by two, never replaced, and whole after a crash. That a disk, a log,
a loss or a memory that fails is one sentence. Which prompts it learns.
"""

import argparse
import errno
import functools
import itertools
import json
import os
import pty
import shutil
import signal
import stat
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import plumbing.processes
import plumbing.prompts
import plumbing.run
import train
from conftest import TINY, copy_tiny, edit, new_schedule, slow
from dev.kill import differences, read_state
from forks import in_step, signal_in_step, train_forked
from matching import limited_guidance
from plumbing.checkpoints import checkpoints, lock
from plumbing.files import BadInput, read_json, write_file, write_json
from plumbing.processes import PRECISION
from plumbing.prompts import compose_prompts
from plumbing.weights import WEIGHTS
from student import Critic, Student
from teacher import Teacher

RUN = ["--batch", 4, "--steps", 5, "--warmup", 1, "--match-from", 0.5, "--every", 100]
QUICK = ["--teacher", "tiny-pixel", "--batch", 2, "--steps", 2, "--warmup", 1, "--every", 100, "--samples", 0]


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """(folder, output) of a run of the embedded teacher, started as by a person."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = run("train.py", *RUN, "--samples", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The folder of a quick run of two steps, to compare with."""
    out = tmp_path_factory.mktemp("usual")
    assert train_forked(out, 1, *QUICK)[0] == [0]
    return out


@pytest.fixture
def two(usual, tmp_path):
    """A copy of it, to work with."""
    return shutil.copytree(usual, tmp_path / "two")


@pytest.fixture
def pixel(tmp_path):
    """A copy of the embedded pixel teacher, which predicts v."""
    return copy_tiny(tmp_path / "pixel", "pixel")


def student(out):
    return load_file(out / "student" / WEIGHTS)


def records(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def everything(folder):
    """{name: bytes} of the files of a folder of runs."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "printed.txt"))
    return {path.relative_to(folder): path.read_bytes() for path in files}


# --------------------------------------------------------------------------------------- the whole run, and its parts
def test_a_run_leaves_everything_and_says_where(finished):
    out, printed = finished
    assert f"python sample.py --student {out} --prompt " in printed
    assert {path.name for path in out.iterdir()} == {"config.json", "log.jsonl", "samples", "student", "state"}
    [last] = records(out)
    assert last["step"] == 5 and last["refining"] > 0 and last["samples_per_s"] > 0 and last["memory_gb"] > 0.1
    assert Image.open(out / "samples" / "step_5.png").size == (96, 2 * 96)
    before, name = load_file(TINY / "unet" / WEIGHTS), "down_blocks.0.resnets.0.conv1.weight"
    assert not student(out)[name].equal(before[name].float())


def test_two_runs_are_bitwise_equal(call, finished, tmp_path):
    """Also after a start with other options that has saved nothing, as one that ran out of memory."""
    write_json(tmp_path / "config.json", {"lr": 1e-9, "batch": 10**6, "fingerprint": "0", "teacher": "tiny"})
    assert call("train", *RUN, "--samples", 0, "--out", tmp_path)[0] == 0
    assert read_json(tmp_path / "config.json")["batch"] == 4 and not differences(finished[0], tmp_path)
    for file in ("student/config.json", "student/student.json", f"student/{WEIGHTS}"):
        assert (tmp_path / file).read_bytes() == (finished[0] / file).read_bytes(), file


@pytest.mark.parametrize("options, warmup, steps", [
    (QUICK, 2, 5), (QUICK, 0, 3), slow(QUICK, 50, 3), *[slow(RUN, warmup, 8) for warmup in (0, 3, 50)]])
def test_a_stopped_run_saves_at_the_next_step_and_resumes_bitwise(tmp_path, options, warmup, steps):
    """Before the critic begins, in its head start and after it, and where that is longer than the run. Only Ctrl-C is a
    failure, so that `train && evaluate` does not go on to evaluate."""
    options = [*options, "--samples", 0, "--match-from", 0.5, "--warmup", warmup, "--steps", steps]
    assert train_forked(tmp_path / "whole", 1, *options)[0] == [0]
    parts, signals = tmp_path / "parts", [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)]
    for step, (number, code) in zip(range(1, steps, 2), itertools.cycle(signals)):
        stopped, printed = train_forked(parts, 1, *options, prepare=signal_in_step(step, number))
        assert stopped == [code] and max(checkpoints(parts)) == step, printed
    [code], printed = train_forked(parts, 1, *options)
    assert code == 0 and "stopped at step 1; the same command goes on" in printed, printed
    assert f"resuming at step {step}" in printed and not differences(tmp_path / "whole", parts)


def test_many_prompts_are_encoded_step_by_step(tmp_path, monkeypatch):
    """With the same student as where all are encoded first."""
    options = ["--teacher", "tiny", *QUICK[2:]]
    for few in (10**6, 1):
        monkeypatch.setattr(plumbing.prompts, "FEW", few)
        assert train_forked(tmp_path / str(few), 1, *options)[0] == [0]
    one, other = student(tmp_path / "1"), student(tmp_path / str(10**6))
    assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=2e-5) for name in one)


def test_a_checkpoint_holds_what_the_run_needs_to_go_on(tmp_path):
    """No critic that has not learned; and where beta_1 is 0, no first moments."""
    for number, spared, held in ((1, "critic.", "student.exp_avg."), (3, "student.exp_avg.", "critic.exp_avg_sq.")):
        options = [*QUICK, "--steps", 4, "--match-from", 0.5]
        code, printed = train_forked(tmp_path, 1, *options, prepare=signal_in_step(number, signal.SIGTERM))
        assert code == [0] and max(checkpoints(tmp_path)) == number, printed
        names = "\n".join(read_state(tmp_path))
        assert f"\n{held}" in names and f"\n{spared}" not in names and "critic.exp_avg." not in names


@pytest.mark.parametrize("precision, dtype, scale", [
    ("fp16", torch.float32, 2.0**126),                      # passes in float16 take seconds on a CPU
    slow("fp16", torch.float16, 2.0**16), slow("bf16", torch.bfloat16, None)])
def test_half_precision_resumes_bitwise(tmp_path, monkeypatch, precision, dtype, scale):
    """Its scale of the gradients, too, which overflow at first."""
    monkeypatch.setitem(PRECISION, precision, dtype)
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=scale))
    options = [*(RUN if dtype == torch.float16 else QUICK), "--precision", precision, "--match-from", 0, "--steps", 3]
    assert train_forked(tmp_path / "whole", 1, *options)[0] == [0]
    for prepare in (signal_in_step(2, signal.SIGTERM), lambda rank: None):
        assert train_forked(tmp_path / "parts", 1, *options, prepare=prepare)[0] == [0]
    assert not differences(tmp_path / "whole", tmp_path / "parts")
    if scale:
        state, steps = read_state(tmp_path / "whole"), "student.step.mid_block.resnets.0.conv1.weight"
        assert state["scaler.scale"] < scale and state[steps] < 3 == state["critic_steps"]


def test_every_is_for_checkpoints_and_sheets_and_no_samples_need_no_teacher(call, tmp_path, monkeypatch):
    """The last two checkpoints are kept."""
    solved = []
    monkeypatch.setattr(Teacher, "solve", lambda self, *args, **rest: solved.append(rest) or args[0])
    for samples, sheets in ((1, {"step_2.png", "step_4.png", "step_5.png"}), (0, set())):
        out, options = tmp_path / str(samples), ["--match", 0, "--steps", 5, "--every", 2, "--samples", samples]
        assert call("train", *QUICK, *options, "--out", out)[0] == 0
        assert list(checkpoints(out)) == [5, 4] and {path.name for path in out.glob("samples/*")} == sheets
        assert len(solved) == 1 and len(solved[0]["grid"]) == 51


@pytest.mark.parametrize("teacher, input_time", [("tiny", 600), ("tiny-pixel", 1000)])
def test_a_dry_run_loads_and_checks_and_writes_nothing(call, tmp_path, monkeypatch, teacher, input_time):
    """An epsilon student reads its input where noise is 2.27 times the signal, one of v at T."""
    monkeypatch.setattr(train, "draw", None)
    line = ["train", "--dry-run", "--teacher", teacher, "--out", tmp_path / "run"]
    code, printed, _ = call(*line)
    assert code == 0 and "1300 steps of 32, 32 at once" in printed
    assert f"guidance 3.0, input time {input_time}, " in printed
    assert "matching begins at 585, refining 1228\n" in printed
    code, _, error = call(*line, "--prompts", tmp_path / "none.txt")
    assert code == 2 and "none.txt is missing" in error and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- options
def test_another_start_may_change_the_options_that_leave_the_student_alone(call, two):
    """A checkpoint says itself what made it; config.json is for people."""
    for options, message in ((["--lr", "1e-5"], "lr 0.0005 there, 1e-05 here"), (["--beta", 1], "beta 0.1 there, 1.0"),
                             (["--teacher", "tiny"], "holds another run (teacher tiny-pixel there, tiny here; ")):
        (two / "config.json").unlink(missing_ok=True)
        code, _, error = call("train", *QUICK, "--steps", 3, "--out", two, *options)
        assert code == 2 and message in error and not (two / "config.json").exists()
    (two / "config.json").write_text("not for machines")
    moved = ["--teacher", TINY / "pixel", "--device", "cpu", "--grad-checkpointing", "--micro-batch", 1, "--every", 3]
    code, printed, error = call("train", *QUICK, "--steps", 3, "--samples", 1, *moved, "--out", two)
    assert code == 0 and "resuming at step 2" in printed, error
    assert read_json(two / "config.json")["every"] == 3 and max(checkpoints(two)) == 3


@pytest.mark.parametrize("options", [
    "--guidance 1:6", "--solver euler", "--beta 0", "--negative-prompt bag", "--input-time 600", "--num-steps 25",
    "--match 0.1", "--critic-lr 1e-3", "--ema 0.1", "--prompts {few}", *map(slow, (
        "--guidance 1", "--match 0", "--match-from 0.9", "--precision bf16", "--seed 1", "--lr 1e-3", "--warmup 2"))])
def test_every_option_makes_another_student(usual, tmp_path, options):
    (tmp_path / "few").write_text("bag\ncoat\n")
    options = options.format(few=tmp_path / "few").split()
    assert train_forked(tmp_path / "run", 1, *QUICK, *options)[0] == [0]
    ours, theirs = student(tmp_path / "run"), student(usual)
    changed = {name for name, tensor in theirs.items() if not ours[name].equal(tensor)}
    assert {"down_blocks.0.resnets.0.conv1.weight", "mid_block.attentions.0.to_q.weight"} <= changed
    assert not any(name.startswith(("conv_in.", "conv_out.")) or "norm" in name for name in changed)


# ----------------------------------------------------------------------------------------------- what a step is made of
def arguments(steps, warmup, lr=2.0, match=16.0, match_from=0.45):
    return argparse.Namespace(steps=steps, warmup=warmup, lr=lr, match=match, match_from=match_from, ema=0.99)


def test_learning_rate_warms_up_holds_and_decays_to_that_of_matching_and_then_to_zero():
    rates = [train.learning_rate(step, arguments(200, 10), 100, 150) for step in range(200)]
    assert rates[0] == pytest.approx(0.2) and rates[9:41] == [2.0] * 32 and rates[70] == pytest.approx(1.2)
    assert rates[100:121] == pytest.approx([0.4] * 21) and rates[135] == pytest.approx(0.2) and 0 < rates[149] < 0.02
    assert rates[150:] == pytest.approx(rates[100:150])     # refining as matching
    alone = [train.learning_rate(step, arguments(100, 10, match=0), 100, 100) for step in range(100)]
    assert alone[:41] == rates[:41] and alone[70] == pytest.approx(1.0) and 0 < alone[99] < 0.05


def test_the_critic_has_a_head_start_and_other_steps_move_it_until_it_is_over():
    phases = train.phases
    assert phases(arguments(40, 2), 0, 0) == (16, 18, 37) and phases(arguments(40, 2, match=0), 0, 0) == (40, 40, 40)
    assert phases(arguments(40, 2, match_from=0), 0, 0) == (0, 2, 36)
    assert phases(arguments(100, 2), 15, 0) == (43, 45, 94)
    assert phases(arguments(20, 2), 12, 0) == (12, 14, 19)  # its head start comes first, even if that is late
    assert phases(arguments(40, 2), 20, 4) == phases(arguments(40, 2), 36, 20) == (18, 18, 37)
    assert phases(arguments(100, 2), 22, 6) == (18, 18, 91)
    with pytest.warns(UserWarning, match="40 steps end before .*, after 50: give more --steps"):
        assert phases(arguments(40, 50), 0, 0)[:2] == (0, 50)


def test_each_step_has_the_losses_of_its_part_of_the_run(call, tmp_path, monkeypatch):
    """BOOT; then the critic beside it; then matching, where every fifth step has BOOT's losses; then refining."""
    monkeypatch.setattr(plumbing.run, "LOG_EVERY", 1)
    assert call("train", *QUICK, "--match-from", 0.5, "--steps", 6, "--out", tmp_path)[0] == 0
    boot, critic, matching = (["bootstrap", "boundary"], ["critic"], ["matching", "critic"])
    expected = [boot, boot, boot + critic, matching, boot + matching, ["refining"]]
    assert [[name for name in ("bootstrap", "boundary", "matching", "critic", "refining") if name in line]
            for line in records(tmp_path)] == expected
    assert [len(line.get("bootstrap_by_time", ())) for line in records(tmp_path)] == [8, 8, 8, 0, 8, 0]


def test_matching_is_told_fresh_noise_and_leads_downhill(call, tmp_path, monkeypatch):
    """It gets noise and times of its own, the limited teacher, the critic; if it is the samples' mean, that falls."""
    drawn, means, draw = [], [], train.draw
    monkeypatch.setattr(train, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])

    def mean(x, teacher, critic, n, tau, schedule, clip, **condition):
        _, eps, t, *_ = drawn[-1]
        assert n.shape == eps.shape and not n.equal(eps) and not tau.equal(t) and 20 <= tau.min() <= tau.max() <= 980
        assert teacher.func is limited_guidance and isinstance(critic, Critic) and "w" in condition
        means.append(x.mean().item())
        return x.flatten(1).mean(1), critic(x.detach(), tau, **condition)
    monkeypatch.setattr(train, "matching_loss", mean)
    monkeypatch.setattr(train, "MATCH_LR", 2.0)
    monkeypatch.setattr(train, "DECAY", 1e-9)
    options = ["--batch", 4, "--match-from", 0, "--match", 100, "--steps", 10]
    assert call("train", *QUICK, *options, "--out", tmp_path)[0] == 0
    assert len(means) == 8 and max(means[-2:]) < min(means[:2])


def test_refining_approaches_the_refined_samples_of_an_average_that_stays(call, tmp_path, monkeypatch):
    """Of the same noises again and again. In the end the student takes the average's place."""
    averages, draw, refine = [], train.draw, Student.refine

    def refined(student, eps, steps, **condition):
        averages.append(sum(p.double().sum().item() for p in student.network.parameters()))
        assert steps == train.REFINE_STEPS and "w" in condition
        return refine(student, eps, steps, **condition)
    monkeypatch.setattr(Student, "refine", refined)
    monkeypatch.setattr(train, "draw", lambda seed, step, *rest: draw(seed, 0, *rest))
    monkeypatch.setattr(plumbing.run, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "DECAY", 1e-9)
    monkeypatch.setattr(train, "REFINE_SHARE", 0.25)
    assert call("train", *QUICK, "--match-from", 0, "--steps", 12, "--out", tmp_path)[0] == 0
    errors = [line["refining"] for line in records(tmp_path) if "refining" in line]
    assert len(errors) == 3 and errors[0] > errors[1] > errors[2] > 0 and len(set(averages)) == 1
    state = read_state(tmp_path)
    assert all(tensor.equal(state[f"student.{name}"]) for name, tensor in student(tmp_path).items())


def test_a_schedule_too_short_for_four_refining_steps_takes_what_it_has(call, tmp_path):
    teacher = copy_tiny(tmp_path / "teacher", "pixel")
    edit(teacher / "scheduler" / "scheduler_config.json", num_train_timesteps=12)
    options = ["--teacher", teacher, "--steps", 4, "--match-from", 0.5, "--out", tmp_path / "run"]
    assert call("train", *QUICK, *options)[0] == 0 and "refining" in records(tmp_path / "run")[-1]


# ---------------------------------------------------------------------------------------------------------- the folder
def test_a_second_run_in_the_same_folder_is_told_who_is_there(call, two):
    before = everything(two)
    with lock(two):
        code, _, error = call("train", *QUICK, "--steps", 9, "--lr", 1, "--out", two)
        assert code == 2 and f"process {os.getpid()} on " in error and f"is training in {two}: wait" in error
        code, printed, error = call("train", *QUICK, "--steps", 9, "--out", two, "--dry-run")
        assert code == 0 and "resuming at step 2" in printed, error
    assert everything(two) == before


def test_a_student_without_its_state_is_never_replaced(call, two):
    shutil.rmtree(two / "state")
    before = everything(two)
    code, _, error = call("train", *QUICK, "--out", two)
    assert code == 2 and "holds a student, but no state to go on from" in error and everything(two) == before


def test_a_crash_between_state_and_student_is_mended(call, two):
    """The state is saved first; a start from it writes its student again."""
    path = two / "student" / WEIGHTS
    whole = load_file(path)
    save_file({name: tensor * 0 for name, tensor in whole.items()}, path, {"format": "pt", "step": "1"})
    code, _, error = call("train", *QUICK, "--out", two)
    assert code == 0 and all(tensor.equal(whole[name]) for name, tensor in load_file(path).items()), error


def test_what_a_killed_save_left_is_removed(call, two):
    half, mine = two / "state" / "step_4.new" / "half.safetensors", two / "mine.new"
    half.parent.mkdir()
    for path in (half, mine):
        path.write_bytes(b"x")
    assert call("train", *QUICK, "--out", two, "--dry-run")[0] == 0 and half.exists()
    assert call("train", *QUICK, "--out", two)[0] == 0 and mine.exists() and not half.parent.exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(call, tmp_path):
    """If all are damaged, they are kept as they are."""
    options = [*QUICK, "--steps", 3, "--every", 2, "--out", tmp_path]
    assert call("train", *options)[0] == 0
    whole = read_state(tmp_path)
    [file], [older] = (folder.glob("*.safetensors") for folder in checkpoints(tmp_path).values())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, printed, error = call("train", *options)
    assert code == 0 and "resuming at step 2" in printed and f"{file} is missing or damaged" in error, error
    assert all(tensor.equal(whole[name]) for name, tensor in read_state(tmp_path).items())
    for path in (file, older):
        path.write_bytes(path.read_bytes()[:1000])
    before = everything(tmp_path)
    assert f"move {tmp_path} away to start anew" in call("train", *options)[2] and everything(tmp_path) == before


def test_room_for_three_checkpoints_is_checked_before_the_first_step(call, two, tmp_path, monkeypatch):
    """Two of them are kept while a third is written."""
    size = sum(tensor.nbytes for tensor in read_state(two).values())
    there = sum(path.stat().st_size for path in (two / "state").rglob("*.safetensors"))
    for out, need in ((tmp_path / "new", 3 * size), (two, 3 * size - there)):
        for free, dry, message in ((need - 1, (), "GB are free: a checkpoint takes"), (need, ("--dry-run",), "")):
            monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
            before = everything(tmp_path)
            code, _, error = call("train", *QUICK, "--steps", 9, "--out", out, *dry)
            assert bool(code) == bool(message) and message in error and everything(tmp_path) == before, error


def test_files_follow_the_umask(tmp_path):
    assert train_forked(tmp_path, 1, *QUICK, "--steps", 1, prepare=lambda rank: os.umask(0o027))[0] == [0]
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in everything(tmp_path)} == {0o640}


def test_an_interrupted_write_leaves_the_old_file_and_a_file_system_may_lack_chmod_and_fsync(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EINVAL, "Invalid argument")
    for name in ("chmod", "fsync"):
        monkeypatch.setattr(os, name, refuse)
    write_file(tmp_path / "file", lambda path: path.write_text("old"))
    with pytest.raises(BadInput, match="Invalid argument"):
        write_file(tmp_path / "file", lambda path: path.write_text("half") and refuse())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


# ----------------------------------------------------------------------------------------------- signals and terminals
def test_a_second_ctrl_c_stops_at_once(tmp_path):
    codes, printed = train_forked(tmp_path, 1, *QUICK, prepare=signal_in_step(1, signal.SIGINT, signal.SIGINT))
    assert codes == [130] and "stopping after this step; Ctrl-C now stops at once" in printed, printed
    assert "Traceback" not in printed and not checkpoints(tmp_path)


def test_nohup_is_respected(tmp_path):
    codes, printed = train_forked(tmp_path, 1, *QUICK, prepare=lambda rank: (
        signal.signal(signal.SIGHUP, signal.SIG_IGN), signal_in_step(1, signal.SIGHUP)(rank)))
    assert codes == [0] and "the student is in" in printed, printed


def test_a_closed_terminal_does_not_stop_the_save(tmp_path):
    """Neither that it can't be written to any more nor its SIGHUP."""
    def prepare(rank):
        ours, theirs = pty.openpty()
        os.dup2(theirs, 1)
        os.dup2(theirs, 2)
        os.close(theirs)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)
        in_step(2, lambda: (os.close(ours), os.kill(os.getpid(), signal.SIGHUP)))(rank)
    assert train_forked(tmp_path, 1, *QUICK, "--steps", 9, prepare=prepare)[0] == [0]
    assert list(checkpoints(tmp_path)) == [2] and (tmp_path / "student" / WEIGHTS).exists()


# ------------------------------------------------------------------------------------------------------------- the log
def test_a_resumed_log_has_every_step_once_and_keeps_remarks(call, two, monkeypatch):
    log = two / "log.jsonl"
    killed = json.dumps(records(two)[0] | {"step": 9, "seconds": 99.0}).encode()
    log.write_bytes(b"a remark, \xff\n" + log.read_bytes() + b'{"step": "x"}\n[1]\n7\n' + killed + b'\n{"to')
    assert call("train", *QUICK, "--steps", 4, "--out", two)[0] == 0
    lines = log.read_bytes().split(b"\n")
    assert lines[0] == b"a remark, \xff" and lines[2:5] == [b'{"step": "x"}', b"[1]", b"7"] and lines[6:] == [b""]
    old, new = (json.loads(lines[k]) for k in (1, 5))
    assert (old["step"], new["step"]) == (2, 4) and old["seconds"] < new["seconds"] < 99


def test_curves_are_drawn_of_whatever_a_log_holds(call, tmp_path):
    pytest.importorskip("matplotlib")
    lines = [json.dumps({"step": 10 * k, "bootstrap": 1 / k, "matching": None, "lr": 5e-4}) for k in range(1, 9)]
    for text, expected in (["a remark", *lines, '{"torn'], 0), (["a remark"], 2):
        (tmp_path / "log.jsonl").write_text("\n".join(text))
        code, printed, error = call("tools.curves", tmp_path)
        assert code == expected and (str(tmp_path / "curves.png") in printed or "has no record of a step" in error)
    assert Image.open(tmp_path / "curves.png").convert("L").getextrema()[0] < 100


# -------------------------------------------------------------------------------------------------- losses that explode
def test_a_loss_that_is_not_finite_is_named_with_its_step(call, tmp_path, monkeypatch):
    """Though nobody looks in every step; nothing of it is saved."""
    calls, losses = itertools.count(), train.boot_losses

    def break_at_the_fourth(*args, **condition):
        L_BS, L_BC = losses(*args, **condition)
        return L_BS / (next(calls) != 3), L_BC
    monkeypatch.setattr(train, "boot_losses", break_at_the_fourth)
    options = [*QUICK, "--match", 0, "--steps", 9, "--every", 3]
    code, _, error = call("train", *options, "--out", tmp_path)
    _, _, t, *_ = train.draw(0, 3, range(2), (3, 32, 32), 1000, 10, 3.0)
    assert code == 2 and f"bootstrap and grad_norm not finite at step 3 (times {t.tolist()}, ..." in error, error
    assert "guidance [3.0, 3.0]" in error and "lower --lr" in error and list(checkpoints(tmp_path)) == [3]


def test_a_first_loss_that_is_not_finite_is_not_the_learning_rates_fault(pixel, call, tmp_path):
    weights = load_file(pixel / "unet" / WEIGHTS)
    save_file(weights | {"conv_out.bias": weights["conv_out.bias"] * torch.nan}, pixel / "unet" / WEIGHTS)
    code, _, error = call("train", *QUICK, "--teacher", pixel, "--out", tmp_path / "run")
    assert code == 2 and "no weight has changed yet, so the teacher" in error and "--lr" not in error


def test_a_busy_machine_is_named_where_threads_would_wait(monkeypatch, recwarn):
    for load, threads, policy, speaks in ((1.5, 2, "", 1), (0.1, 2, "", 0), (1.5, 1, "", 0), (1.5, 2, "passive", 0)):
        monkeypatch.setattr(os, "getloadavg", lambda: (load * os.cpu_count(), 0, 0))
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
        plumbing.processes.warn_if_busy(torch.device("cpu"))
        assert ["OMP_NUM_THREADS=1" in str(recwarn.pop().message) for _ in recwarn.list] == [True] * speaks


# ------------------------------------------------------------------------------------------- prompts, other schedules
def test_composed_prompts_are_many_distinct_and_repeatable():
    prompts = compose_prompts()
    assert len(set(prompts)) == 100_000 and prompts[:50] == compose_prompts(50)


def test_a_negative_prompt_without_guidance_warns(call, tmp_path):
    options = [*QUICK, "--negative-prompt", "bag", "--dry-run", "--out", tmp_path / "run"]
    assert "--negative-prompt has no effect with --guidance 1" in call("train", "--guidance", 1, *options)[2]
    assert "no effect" not in call("train", "--guidance", "1:3", *options)[2]


def test_zero_terminal_snr_from_training_to_sample(pixel, call, tmp_path):
    edit(pixel / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    assert new_schedule(read_json(pixel / "scheduler" / "scheduler_config.json")).alpha(1000) == 0
    code, _, error = call("train", *QUICK, "--teacher", pixel, "--samples", 1, "--out", tmp_path / "run")
    assert code == 0 and records(tmp_path / "run")[0]["matching"] > 0, error
    assert call("sample", "--student", tmp_path / "run", "--label", "bag", "--out", tmp_path / "a.png")[0] == 0
