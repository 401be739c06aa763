"""Checkpoints, and several processes: killed, sharded, resumed by another number; gloo, on a CPU."""

import errno
import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp

import run as run_module
import train
from conftest import ROOT
from plumbing.checkpoints import checkpoints
from dev.kill import differences, read_state

SHORT = ["train.py", "--sample-every", 0, "--warmup", 1, "--match-from", 0.5, "--save-every", 2]


def torchrun(processes, *options):
    """Train with so many processes, or one without torchrun, a thread each; returns what was printed."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    done = subprocess.run([sys.executable, *launch, *map(str, (*SHORT, *options))], cwd=ROOT, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def largest_part(out):
    """Of the state, what the process wrote that holds most of it."""
    sizes = [path.stat().st_size for path in next(iter(checkpoints(out).values())).glob("*.safetensors")]
    return max(sizes) / sum(sizes)


def distance(out, other):
    """Of two states' weights and moments, over their norm."""
    ours, theirs = read_state(out), read_state(other)
    norms = [((tensor - theirs[name]).double().norm(), tensor.double().norm()) for name, tensor in ours.items()]
    apart, size = torch.tensor(norms).square().sum(0).sqrt()
    return (apart / size).item()


def losses(out):
    line = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    return [line[name] for name in ("matching", "critic", "critic_grad_norm")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run of one process."""
    out = tmp_path_factory.mktemp("alone")
    torchrun(1, "--batch", 24, "--steps", 6, "--out", out)
    return out


@pytest.mark.parametrize("processes, options", [(2, ()), (2, ("--shard",)), (3, ("--shard", "--micro-batch", 4))])
def test_processes_replicated_or_sharded_are_one_run(alone, tmp_path, processes, options):
    torchrun(processes, "--batch", 24, "--steps", 6, "--out", tmp_path, *options)
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)
    assert distance(alone, tmp_path) < 1e-5
    assert largest_part(tmp_path) < 1.2 / processes


def test_any_number_of_processes_resumes_what_any_other_saved(tmp_path):
    """With options by which a step does not depend on how many there are."""
    options = ("--batch", 24, "--match-from", 0, "--decay", 0, "--save-every", 1)
    torchrun(1, *options, "--steps", 6, "--out", tmp_path / "whole")
    stretches = ((1, ()), (2, ("--shard",)), (3, ("--shard",)), (2, ()), (3, ()), (1, ()))
    for step, (processes, sharded) in enumerate(stretches):
        printed = torchrun(processes, *options, *sharded, "--steps", step + 1, "--out", tmp_path / "parts")
        assert step == 0 or f"resuming at step {step}" in printed
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert distance(tmp_path / "whole", tmp_path / "parts") < 1e-5


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(call, tmp_path):
    options = [*SHORT[1:], "--batch", 4, "--steps", 4, "--out", tmp_path / "run"]
    assert call("train", *options)[0] == 0
    whole = read_state(tmp_path / "run")
    [file] = (tmp_path / "run" / "state" / "step_4").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, out, error = call("train", *options)
    assert code == 0 and "resuming at step 2" in out and f"{file} is damaged" in error
    assert "going on from step_2" in error
    assert all(tensor.equal(whole[name]) for name, tensor in read_state(tmp_path / "run").items())


def test_the_last_two_checkpoints_are_kept(call, tmp_path):
    assert call("train", *SHORT[1:], "--batch", 4, "--steps", 7, "--out", tmp_path)[0] == 0
    assert list(checkpoints(tmp_path)) == [7, 6]


def test_saving_beside_the_computation_changes_nothing(call, tmp_path, monkeypatch):
    for name, memory in (("beside", 1e12), ("first", 0)):
        monkeypatch.setattr(run_module, "spare_memory", lambda: memory)
        assert call("train", *SHORT[1:], "--batch", 4, "--steps", 5, "--out", tmp_path / name)[0] == 0
    assert not differences(tmp_path / "beside", tmp_path / "first")
    for step in (4, 5):
        for name in ("beside", "first"):
            assert (tmp_path / name / "state" / f"step_{step}" / run_module.INFO).exists()


@pytest.mark.parametrize("memory", [1e12, 0])
def test_a_full_disk_leaves_the_last_checkpoint_and_a_sentence(call, tmp_path, monkeypatch, memory):
    write, calls = dcp.HuggingFaceStorageWriter.write_data, []

    def full(self, plan, planner):
        calls.append(plan)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, plan, planner)
    monkeypatch.setattr(run_module, "spare_memory", lambda: memory)
    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", full)
    code, _, error = call("train", *SHORT[1:], "--batch", 4, "--steps", 8, "--out", tmp_path)
    assert code == 2 and "can't write" in error and "No space left on device" in error, error
    assert list(checkpoints(tmp_path)) == [2] and not list((tmp_path / "state").glob("*.new"))
    monkeypatch.undo()
    assert call("train", *SHORT[1:], "--batch", 4, "--steps", 8, "--out", tmp_path)[0] == 0


@pytest.mark.parametrize("options", [("--kills", 3), ("--processes", 2, "--kills", 1)])
def test_killed_at_random_moments_it_is_the_undisturbed_run(call, tmp_path, options):
    code, out, error = call("tools.kill", *options, "--steps", 12, "--out", tmp_path)
    assert code == 0 and "bitwise the undisturbed one" in out, error


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_resumes_bitwise(call, tmp_path, precision):
    """Its scale of the gradients, too, which overflow at first."""
    options = [*SHORT[1:], "--batch", 4, "--precision", precision, "--match-from", 0, "--decay", 0]
    assert call("train", *options, "--steps", 4, "--out", tmp_path / "whole")[0] == 0
    for steps in (2, 4):
        code, _, error = call("train", *options, "--steps", steps, "--out", tmp_path / "parts")
        assert code == 0, error
    assert not differences(tmp_path / "whole", tmp_path / "parts")
    if precision == "fp16":
        state = read_state(tmp_path / "whole")
        assert state["scaler"][0] < 2**16 and state["step.conv_out.weight"] < 4 == state["critic_steps"]


def test_a_loss_that_is_not_finite_is_named_with_its_step(call, tmp_path, monkeypatch):
    """Though nobody looks in every step; nothing of it is saved."""
    calls, losses = [], train.boot_losses

    def break_at_the_fourth(*args, **condition):
        calls.append(args)
        L_BS, L_BC = losses(*args, **condition)
        return L_BS / (len(calls) != 4), L_BC
    monkeypatch.setattr(train, "boot_losses", break_at_the_fourth)
    code, _, error = call("train", *SHORT[1:], "--batch", 4, "--steps", 20, "--save-every", 3, "--out", tmp_path)
    *_, t, _, _, _ = train.draw(0, 3, range(4), (4, 8, 8), 1000, 1512, 3.0)
    assert code == 2 and f"bootstrap and grad_norm not finite at step 3 (times {t.tolist()}, ..." in error, error
    assert list(checkpoints(tmp_path)) == [3]


def test_torchrun_that_is_stopped_ends_with_a_checkpoint(tmp_path):
    """Of the step at which all processes stopped."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = [*SHORT, "--batch", 4, "--steps", 10**6, "--save-every", 3, "--out", tmp_path]
    process = subprocess.Popen([*launch, *map(str, options)], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (tmp_path / "state" / "step_3").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert f"stopped at step {max(checkpoints(tmp_path))}; " in output, output


@pytest.mark.parametrize("options, message", [
    (("--shard",), "--shard splits the networks over several processes"),
    (("--batch", 0), "--batch 0 is not supported")])
def test_what_cannot_be_split_is_one_sentence(call, tmp_path, options, message):
    code, _, error = call("train", *options, "--out", tmp_path)
    assert code == 2 and message in error


@pytest.mark.parametrize("batch, sharded, message", [
    (32, False, "--batch 32 does not divide over 3 processes: 30 or 33 does"),
    (32, True, "--batch 32 does not divide over 3 processes: 30 or 33 does"),
    (2, False, "--batch 2 does not divide over 3 processes: 3 does")])
def test_a_batch_that_does_not_divide_is_told_what_does(batch, sharded, message):
    args = train.parse_args(["--batch", str(batch), *(["--shard"] if sharded else [])])
    with pytest.raises(run_module.BadInput, match=re.escape(message)):
        train.split_batch(args, 3)
