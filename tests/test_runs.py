"""Runs that are stopped, killed, started twice, started with other options, or find no room."""

import errno
import json
import os
import pty
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
import train
from plumbing.files import write_file, write_json
from plumbing.hub import TINY
from plumbing.weights import WEIGHTS
from conftest import ROOT
from matching import limited_guidance
from plumbing.checkpoints import Saver, checkpoints
from signal_ode import Schedule
from student import Critic
from dev.kill import differences

SHORT = ["--batch", 4, "--sample-every", 0, "--warmup", 2, "--save-every", 2]


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """The folder of a run of two steps. Copy it before changing it."""
    out = tmp_path_factory.mktemp("runs") / "two"
    done = run("train.py", *SHORT, "--steps", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def two(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "two")


def start(*args, before=()):
    return subprocess.Popen([*before, sys.executable, "train.py", *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def everything(folder):
    """{name: bytes} of a folder's files."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_in_the_same_folder_is_told_who_is_there(call, tmp_path):
    process = start(*SHORT, "--steps", 10**6, "--out", tmp_path / "run")
    try:
        wait_for(tmp_path / "run" / "state" / "step_2", process)
        code, _, error = call("train", *SHORT, "--steps", 10**6, "--lr", 1, "--out", tmp_path / "run")
        assert code == 2 and f"process {process.pid} on " in error and f"is training in {tmp_path}" in error
        assert call("train", *SHORT, "--steps", 10**6, "--out", tmp_path / "run", "--dry-run")[0] == 0
        assert process.poll() is None
    finally:
        process.kill()                                      # the kernel frees its lock
        process.wait()
    step = saved_step(tmp_path / "run")
    code, out, error = call("train", *SHORT, "--steps", 10**6 - 1, "--out", tmp_path / "run", "--dry-run")
    assert code == 0 and f"resuming at step {step}" in out, error


def test_a_state_says_itself_what_made_it(call, two):
    (two / "config.json").unlink()
    code, _, error = call("train", *SHORT, "--steps", 4, "--lr", "1e-4", "--out", two)
    assert code == 2 and "lr 0.0005 there, 0.0001 here" in error
    (two / "config.json").write_text("not for machines")
    code, out, error = call("train", *SHORT, "--steps", 4, "--out", two)
    assert code == 0 and "resuming at step 2" in out, error
    assert json.loads((two / "config.json").read_text())["lr"] == 5e-4


def test_options_are_free_until_something_is_saved(call, tmp_path):
    write_json(tmp_path / "config.json", {"lr": 1e-9, "batch": 10**6})      # as an out-of-memory start leaves it
    code, out, error = call("train", *SHORT, "--steps", 2, "--out", tmp_path)
    assert code == 0 and json.loads((tmp_path / "config.json").read_text())["batch"] == 4, error


def test_a_student_without_its_state_is_never_replaced(call, two):
    shutil.rmtree(two / "state")
    before = everything(two)
    code, _, error = call("train", *SHORT, "--steps", 2, "--out", two)
    assert code == 2 and "holds a student, but no state to go on from" in error and everything(two) == before


def test_a_crash_between_state_and_student_is_mended(call, two):
    """The state is saved first; a start from it writes its student again, if it is not the one that there is."""
    path = two / "student" / WEIGHTS
    whole = load_file(path)
    save_file({name: tensor * 0 for name, tensor in whole.items()}, path, {"format": "pt", "step": "1"})
    code, _, error = call("train", *SHORT, "--steps", 2, "--out", two)
    assert code == 0 and all(tensor.equal(whole[name]) for name, tensor in load_file(path).items()), error
    before = path.stat().st_mtime_ns
    assert call("train", *SHORT, "--steps", 2, "--out", two)[0] == 0 and path.stat().st_mtime_ns == before


def test_what_a_killed_save_left_is_removed(call, two):
    left = [two / "state" / ".tmpAbC12", two / "state" / "step_4.new" / "half.safetensors",
            two / "student" / f"{WEIGHTS}.new", two / "log.jsonl.new", two / "config.json.new"]
    left[1].parent.mkdir()
    for path in left:
        path.write_bytes(b"half")
    kept = two / "mine.new"
    kept.write_text("mine")
    (two / "state" / ".tmpfolder").mkdir()
    assert call("train", *SHORT, "--steps", 2, "--out", two, "--dry-run")[0] == 0 and all(p.exists() for p in left)
    assert call("train", *SHORT, "--steps", 2, "--out", two)[0] == 0
    assert kept.exists() and not any(path.exists() for path in left)
    assert {path.name for path in (two / "state").iterdir()} == {"step_2", ".tmpfolder"}


def test_room_for_a_checkpoint_is_in_the_plan_and_checked_before_the_first_step(call, two, tmp_path, monkeypatch):
    _, plan, _ = call("train", *SHORT, "--steps", 9, "--out", tmp_path / "new", "--dry-run")
    size = sum(path.stat().st_size for path in two.glob("state/*/*.safetensors")) / 1e9
    assert f"a checkpoint takes {size:.2f} GB on disk, three of them" in plan
    usage = namedtuple("usage", "total used free")
    for free, out, enough in ((2.3e8, "new", False), (2.4e8, "new", True), (1.5e8, "two", False), (1.6e8, "two", True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1e9, 0, free))
        before = everything(tmp_path)
        dry = ["--dry-run"] if enough else []
        code, _, error = call("train", *SHORT, "--steps", 9, "--out", tmp_path / out, *dry)
        assert code == (0 if enough else 2) and everything(tmp_path) == before, (free, out, error)
        assert enough or f"no room in {tmp_path / out}, where {free / 1e9:.2f} GB are free: a checkpoint takes" in error


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    process = start(*SHORT, "--batch", 4000, "--steps", 10, "--out", tmp_path / "run")
    wait_for(tmp_path / "run" / "config.json", process)
    for _ in range(2):
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 130 and "Ctrl-C now stops at once" in output and "Traceback" not in output, output
    assert not checkpoints(tmp_path / "run")


def test_nohup_is_respected(tmp_path):
    process = start(*SHORT, "--steps", 4, "--out", tmp_path / "run", before=["nohup"])
    wait_for(tmp_path / "run" / "config.json", process)
    process.send_signal(signal.SIGHUP)
    output = process.communicate()[0]
    assert process.returncode == 0 and "the student is in" in output, output


def test_a_closed_terminal_does_not_stop_the_save(tmp_path):
    """Neither that it can't be written to any more nor its SIGHUP."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "train.py", *map(str, SHORT), "--steps", "10000", "--out", tmp_path],
                               cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    while not (tmp_path / "config.json").exists():
        time.sleep(0.02)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0 and (tmp_path / "student" / WEIGHTS).exists()


def test_files_follow_the_umask(call, tmp_path):
    before = os.umask(0o027)
    try:
        assert call("train", *SHORT, "--steps", 2, "--out", tmp_path / "run")[0] == 0
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_a_file_system_without_chmod_and_fsync_is_no_error(tmp_path, monkeypatch):
    def refuse(number):
        def call(*_, **__):
            raise OSError(number, os.strerror(number))
        return call
    write = lambda path: save_file({"a": torch.ones(1)}, path)
    for number in (errno.EPERM, errno.EINVAL, errno.ENOTSUP):
        monkeypatch.setattr(os, "fsync", refuse(number))
        monkeypatch.setattr(os, "chmod", refuse(number))
        write_file(tmp_path / "file", write)
        assert load_file(tmp_path / "file")["a"] == 1
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    with pytest.raises(checkpoint.BadInput, match="No space left"):
        write_file(tmp_path / "file", write)


@pytest.mark.parametrize("env, message", [
    ({"WORLD_SIZE": "2"}, "warning: WORLD_SIZE=2 is not torchrun's, without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PO"),
    ({"WORLD_SIZE": "2", "RANK": "1"}, "one process works alone"), ({"RANK": "1"}, ""), ({"LOCAL_RANK": "7"}, "")])
def test_what_a_cluster_left_in_the_environment_is_no_torchrun(call, tmp_path, monkeypatch, env, message):
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    code, _, error = call("train", *SHORT, "--steps", 1, "--out", tmp_path)
    assert code == 0 and message in error and checkpoints(tmp_path), error


@pytest.mark.parametrize("value", ["two", "0", "-1"])
def test_a_torchrun_environment_that_cannot_be_is_one_sentence(call, tmp_path, monkeypatch, value):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, value)
    code, _, error = call("train", "--out", tmp_path)
    assert code == 2 and error.startswith("error: RANK, WORLD_SIZE and LOCAL_RANK: ")


def test_remarks_in_the_log_stay(call, two):
    log = two / "log.jsonl"
    log.write_bytes(b"a remark, \xff\n" + log.read_bytes() + b'{"step": "x"}\n[1]\n7\n{"step": 9, "seconds": 5}\n{"to')
    assert call("train", *SHORT, "--steps", 4, "--out", two)[0] == 0
    lines = log.read_bytes().split(b"\n")
    assert lines[0] == b"a remark, \xff" and lines[2:5] == [b'{"step": "x"}', b"[1]", b"7"]
    assert [json.loads(lines[k])["step"] for k in (1, 5)] == [2, 4] and lines[6:] == [b""]


def test_curves_are_drawn_of_whatever_a_log_holds(call, two, tmp_path):
    code, out, error = call("tools.curves", two)
    assert code == 0 and out.strip() == str(two / "curves.png"), error
    [record] = last_records(two)
    assert len(record["bootstrap_by_time"]) == 8 and record["samples_per_s"] > 0 and record["memory_gb"] > 0.1
    few = Image.open(two / "curves.png").convert("L").histogram()[255]
    log = two / "log.jsonl"
    log.write_text("a remark\n" + "".join(json.dumps(record | {"step": 10 * k, "matching": None}) + "\n"
                                          for k in range(1, 1000)) + '{"torn')
    assert call("tools.curves", two)[0] == 0
    assert Image.open(two / "curves.png").convert("L").histogram()[255] < few
    log.write_text("a remark\n")
    code, _, error = call("tools.curves", two)
    assert code == 2 and "has no record of a step" in error


def stop_after(monkeypatch, step):
    """The next run ends with the save at that step, as if killed there."""
    save = Saver.save

    def save_and_stop(self, state, student, done):
        save(self, state, student, done)
        if done == step:
            self.wait()
            sys.exit()
    monkeypatch.setattr(Saver, "save", save_and_stop)


def last_records(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("warmup", [0, 3, 50])
def test_resume_is_bitwise_wherever_the_critic_begins(call, tmp_path, monkeypatch, warmup):
    """Also before it begins, in its head start, and where that is longer than the run."""
    options = [*SHORT, "--warmup", warmup, "--steps", 8, "--save-every", 1]
    assert call("train", *options, "--out", tmp_path / "whole")[0] == 0
    for step in (1, 3, 5):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            call("train", *options, "--out", tmp_path / "parts")
        assert saved_step(tmp_path / "parts") == step
    assert call("train", *options, "--out", tmp_path / "parts")[0] == 0
    assert not differences(tmp_path / "whole", tmp_path / "parts") and saved_step(tmp_path / "parts") == 8


def saved_step(out):
    return max(checkpoints(out))


def test_other_steps_move_the_start_of_matching_until_it_has_begun(call, tmp_path, monkeypatch):
    options = [*SHORT, "--save-every", 1, "--out", tmp_path]                # the critic begins 2 steps before matching
    for steps, step, expected in ((40, 12, 18), (20, 13, 14), (100, 15, 45), (40, 20, 18), (100, 22, 18)):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            _, plan, _ = call("train", *options, "--steps", steps)
        assert f"matched after {expected} with" in plan, steps


def test_the_critic_always_has_a_head_start(call, tmp_path):
    code, plan, stderr = call("train", *SHORT, "--match-from", 0, "--steps", 2, "--out", tmp_path / "a")
    assert code == 0 and "matched" not in plan and "2 steps end before the student is matched, after 2:" in stderr
    [line] = last_records(tmp_path / "a")
    assert line["critic"] > 0 and "matching" not in line
    code, plan, _ = call("train", *SHORT, "--match-from", 0, "--steps", 3, "--out", tmp_path / "b")
    assert code == 0 and "matched after 2 with" in plan and last_records(tmp_path / "b")[-1]["matching"] > 0


def test_matching_is_told_fresh_noise_and_leads_downhill(call, tmp_path, monkeypatch):
    """It gets noise and times of its own, the limited teacher, the critic; if it is the pictures' mean, that falls."""
    drawn, means, draw = [], [], train.draw
    monkeypatch.setattr(train, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])

    def mean(x, teacher, critic, n, tau, schedule, clip, **condition):
        _, eps, t, *_ = drawn[-1]
        assert n.shape == eps.shape and not n.equal(eps) and not tau.equal(t) and 20 <= tau.min() <= tau.max() <= 980
        assert teacher.func is limited_guidance and isinstance(critic, Critic) and "w" in condition
        assert x.requires_grad
        means.append(x.mean().item())
        return x.flatten(1).mean(1), critic(x.detach(), tau, **condition)
    monkeypatch.setattr(train, "matching_loss", mean)
    options = ["--match-from", 0, "--match-lr", "1e-3", "--match", 100, "--warmup", 1, "--steps", 12, "--decay", 0]
    assert call("train", *SHORT, *options, "--out", tmp_path)[0] == 0
    assert len(means) == 11 and max(means[-3:]) < min(means[:3])


@pytest.mark.parametrize("options", [["--critic-updates", 2], ["--guidance", "1:6"]])
def test_resume_and_two_processes_are_the_same_run(call, tmp_path, monkeypatch, options):
    """Also where a step is the critic's alone, and where it is told the scale."""
    options = [*SHORT, "--match-from", "0.5", "--steps", 8, "--save-every", 1, *options]
    assert call("train", *options, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        call("train", *options, "--out", tmp_path / "parts")
    assert call("train", *options, "--out", tmp_path / "parts")[0] == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
              "--rdzv-endpoint=127.0.0.1:0"]
    done = subprocess.run([*launch, "train.py", *map(str, options), "--out", tmp_path / "two"], cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert not differences(tmp_path / "whole", tmp_path / "parts")
    apart = differences(tmp_path / "whole", tmp_path / "two")
    assert max(value for name, value in apart.items() if "network" in name) < 1e-4


def test_a_step_of_the_critic_alone_leaves_the_student(call, tmp_path, monkeypatch):
    """With 3 updates of the critic, of the steps 4 to 8 only the sixth matches the student."""
    states, save = {}, Saver.save
    monkeypatch.setattr(Saver, "save", lambda self, state, student, step: states.update(
        {step: {name: tensor.clone() for name, tensor in state.items()}}) or save(self, state, student, step))
    options = ["--match-from", "0.5", "--critic-updates", 3, "--warmup", 1, "--steps", 8, "--save-every", 1]
    assert call("train", *SHORT, *options, "--out", tmp_path)[0] == 0
    for step in range(2, 9):
        old, new = states[step - 1], states[step]
        moved = {name for name in new if not new[name].equal(old[name])}
        assert any(name.startswith("network") for name in moved) == (step <= 4 or step == 6), step
        assert any(name.startswith("critic_network") for name in moved) == (step >= 4), step
        assert any(name.startswith("ema") for name in moved) == (step <= 4 or step == 6), step


def test_a_negative_prompt_that_is_not_utf8_is_readable_everywhere(run, tmp_path):
    done = run("train.py", *SHORT, "--steps", 1, "--out", tmp_path, "--negative-prompt", os.fsdecode(b"caf\xe9"))
    assert done.returncode == 0 and "is not UTF-8 text" in done.stderr, done.stderr
    info = json.loads((tmp_path / "student" / "student.json").read_text(encoding="utf-8"))
    assert info["negative_prompt"] == "caf\ufffd"


def test_a_negative_prompt_without_guidance_warns(call, tmp_path):
    options = ["--negative-prompt", "a bag", "--dry-run", "--out", tmp_path / "run"]
    assert "--negative-prompt has no effect with --guidance 1" in call("train", "--guidance", 1, *options)[2]
    assert "no effect" not in call("train", "--guidance", "1:3", *options)[2]


@pytest.fixture
def pixel(tmp_path):
    """A function: changes of its scheduler's config -> a copy of the embedded pixel teacher, which predicts v."""
    def make(**change):
        others = shutil.ignore_patterns("student", "evaluation")
        folder = shutil.copytree(TINY / "pixel", tmp_path / "pixel", ignore=others)
        path = folder / "scheduler" / "scheduler_config.json"
        write_json(path, checkpoint.read_json(path) | change)
        return folder
    return make


def test_zero_terminal_snr_from_training_to_picture(pixel, call, tmp_path):
    folder = pixel(rescale_betas_zero_snr=True)
    assert Schedule(checkpoint.read_json(folder / "scheduler" / "scheduler_config.json")).alpha(1000) == 0
    code, _, error = call("train", *SHORT, "--teacher", folder, "--steps", 10, "--out", tmp_path / "run",
                          "--sample-every", 10)
    assert code == 0 and json.loads((tmp_path / "run" / "log.jsonl").read_text())["bootstrap"] > 0, error
    assert call("sample", "--student", tmp_path / "run", "--label", "bag", "--out", tmp_path / "a.png")[0] == 0


def test_a_schedule_that_cannot_work_is_refused_when_loading(pixel, call, tmp_path):
    folder = pixel(rescale_betas_zero_snr=True, prediction_type="epsilon")
    code, _, error = call("train", *SHORT, "--teacher", folder, "--out", tmp_path / "run")
    assert code == 2 and "rescale_betas_zero_snr True" in error and "v_prediction or sample" in error


def test_a_first_loss_that_is_not_finite_is_not_the_learning_rates_fault(pixel, call, tmp_path):
    folder = pixel()
    weights = load_file(folder / "unet" / WEIGHTS)
    save_file(weights | {"conv_out.bias": weights["conv_out.bias"] * torch.nan}, folder / "unet" / WEIGHTS)
    code, _, error = call("train", *SHORT, "--teacher", folder, "--out", tmp_path / "run")
    assert code == 2 and "no weight has changed yet, so that the teacher" in error and "--lr" not in error
