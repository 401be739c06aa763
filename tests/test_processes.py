"""Several processes, with gloo on a CPU.

Two processes are one run, replicated or sharded, and any number of them resumes what any other saved. All of them stop
together, and halve a micro-batch together. A kill at any moment costs no bit. A full disk leaves the last checkpoint.
What can't be split over processes, and an environment that is not torchrun's, is one sentence.
"""

import errno
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import train
from conftest import ROOT, slow
from dev.kill import differences, read_state
from forks import in_step, short_of_memory, signal_in_step, train_forked
from plumbing.checkpoints import checkpoints
from plumbing.files import BadInput
from plumbing.processes import torchrun
from plumbing.run import split_batch

QUICK = ["--teacher", "tiny-pixel", "--batch", 4, "--steps", 3, "--warmup", 1, "--match-from", 0.5, "--every", 100,
         "--samples", 0]
WHOLE = ["--batch", 24, "--steps", 6, "--warmup", 1, "--match-from", 0.5, "--every", 2, "--samples", 0]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function: options -> the folder of a run of one process."""
    @functools.cache
    def alone(*options):
        out = tmp_path_factory.mktemp("alone")
        assert train_forked(out, 1, *options)[0] == [0]
        return out
    return alone


def distance(out, other):
    """Of two states' weights and moments, over their norm."""
    ours, theirs = read_state(out), read_state(other)
    norms = [((tensor - theirs[name]).double().norm(), tensor.double().norm()) for name, tensor in ours.items()]
    apart, size = torch.tensor(norms).square().sum(0).sqrt()
    return (apart / size).item()


def assert_one_run(out, other):
    """The same up to the order of floating-point sums: weights, moments, and what the last step logs, of a matched or a
    refining one."""
    ours, theirs = (json.loads((folder / "log.jsonl").read_text().splitlines()[-1]) for folder in (out, other))
    logged = ["refining"] if "refining" in ours else ["matching", "critic", "critic_grad_norm"]
    logged.append("grad_norm")
    assert [ours[name] for name in logged] == pytest.approx([theirs[name] for name in logged], rel=1e-5)
    assert distance(out, other) < 1e-5


def largest_part(out):
    """Of the state, what the process wrote that holds most of it."""
    sizes = [path.stat().st_size for path in next(iter(checkpoints(out).values())).glob("*.safetensors")]
    return max(sizes) / sum(sizes)


# --------------------------------------------------------------------------------------------------- one run, in parts
def test_two_processes_are_one_run(alone, tmp_path):
    """Noise, time and prompt of a sample depend on its number alone. Each process writes its part of a checkpoint."""
    options = [*QUICK, "--guidance", "1:6"]
    codes, printed = train_forked(tmp_path, 2, *options, "--micro-batch", 1)
    assert codes == [0, 0], printed
    assert_one_run(alone(*options), tmp_path)
    assert largest_part(tmp_path) < 1.2 / 2


@pytest.mark.slow
@pytest.mark.parametrize("world, options", [(2, ()), (2, ("--shard",)), (3, ("--shard", "--micro-batch", 4))])
def test_torchrun_is_one_run(alone, run, tmp_path, world, options):
    done = run(*TORCHRUN, f"--nproc_per_node={world}", "train.py", *WHOLE, *options, "--out", tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_one_run(alone(*WHOLE), tmp_path)
    assert largest_part(tmp_path) < 1.2 / world


@pytest.mark.parametrize("options, stretches", [
    (QUICK, [(1, ()), (2, ()), (2, ("--shard",))]),
    slow(WHOLE, [(1, ()), (2, ("--shard",)), (3, ("--shard",)), (2, ()), (3, ()), (1, ())])])
def test_any_number_of_processes_resumes_what_any_other_saved(alone, tmp_path, options, stretches):
    """A step each. What the last saved is read by one process."""
    for step, (world, sharded) in enumerate(stretches):
        prepare = signal_in_step(step + 1, signal.SIGTERM)
        codes, printed = train_forked(tmp_path, world, *options, *sharded, prepare=prepare)
        assert codes == [0] * world and max(checkpoints(tmp_path)) == step + 1, printed
        assert step == 0 or f"resuming at step {step}" in printed
        assert largest_part(tmp_path) < 1.2 / world
    assert_one_run(alone(*options), tmp_path)


def test_all_processes_stop_with_the_one_that_gets_a_signal(tmp_path):
    codes, printed = train_forked(tmp_path, 2, *QUICK, prepare=signal_in_step(2, signal.SIGTERM, rank=1))
    assert codes == [0, 0] and "stopped at step 2; " in printed and list(checkpoints(tmp_path)) == [2], printed


@pytest.mark.slow
def test_torchrun_that_is_stopped_ends_with_a_checkpoint(tmp_path):
    """Of the step at which all processes stopped."""
    line = [*TORCHRUN, "--nproc_per_node=2", "train.py", *QUICK, "--steps", 10**6, "--every", 3, "--out", tmp_path]
    with subprocess.Popen([sys.executable, *map(str, line)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "state" / "step_3").exists() and process.poll() is None:
            time.sleep(0.1)
        process.terminate()
        printed = process.stdout.read()
    assert f"stopped at step {max(checkpoints(tmp_path))}; " in printed, printed


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["a guest", "the host"])
def test_two_machines_go_on_when_one_is_lost_and_comes_back(two_machines, tmp_path, lost):
    """Two agents of torchrun with a process each, which meet at an address, as on two machines. One is killed with its
    process, and started again, as a cluster does. The other waits for it, unless they met at the one that is lost: then
    it ends, and is started again as well. What is lost is the steps since the last checkpoint."""
    agents, start = two_machines(tmp_path / "killed")
    while max(checkpoints(tmp_path / "killed"), default=0) < 4:
        assert all(process.poll() is None for process in agents), (tmp_path / "killed.txt").read_text()
        time.sleep(0.05)
    number = 0 if lost == "the host" else 1
    lose(agents[number])
    if lost == "the host":
        assert agents[1].wait(200) != 0
        agents[1] = start(1)
    else:
        time.sleep(20)                                      # torchrun counts who is silent for 15 seconds as lost
    agents[number] = start(number)
    assert [process.wait(200) for process in agents] == [0, 0], (tmp_path / "killed.txt").read_text()[-3000:]
    assert "resuming at step" in (tmp_path / "killed.txt").read_text()
    agents, _ = two_machines(tmp_path / "whole")
    assert [process.wait(200) for process in agents] == [0, 0]
    assert max(checkpoints(tmp_path / "whole")) == 20 and not differences(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture
def two_machines():
    """A function: out -> two agents of torchrun, and a function that starts one of them. The first is the host."""
    begun = []

    def two_machines(out):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def start(number):
            line = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d",
                    f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf=is_host={1 - number}", "--local-addr=127.0.0.1",
                    "--max-restarts=3", "train.py", *QUICK, "--steps", 20, "--every", 4, "--out", out]
            with open(out.with_suffix(".txt"), "a") as log:
                begun.append(subprocess.Popen([sys.executable, *map(str, line)], cwd=ROOT, stdout=log, stderr=log,
                                              env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}))
            return begun[-1]
        return [start(0), start(1)], start
    yield two_machines
    for process in begun:
        lose(process)


def lose(agent):
    """Kill an agent of torchrun and its processes, which are in sessions of their own."""
    if agent.poll() is None:
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        agent.kill()
        for pid in map(int, children):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        agent.wait()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_process_that_waits_for_the_others(tmp_path):
    """It waits in C code, where no handler of Python's runs, for one that waits until it has ended."""
    pid, began = tmp_path / "pid", time.time()

    def interrupt():
        pid.write_text(str(os.getpid()))
        for seconds in (4, 5):
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()

    def wait():
        while not pid.exists() or Path(f"/proc/{pid.read_text()}").exists() and time.time() < began + 100:
            time.sleep(0.1)

    def prepare(rank):
        in_step(2, (interrupt, wait)[rank], rank)(rank)
    codes, printed = train_forked(tmp_path, 2, *QUICK, prepare=prepare)
    assert codes[0] == 130 and time.time() < began + 60, printed


def test_processes_of_other_options_are_refused(tmp_path):
    codes, printed = train_forked(tmp_path, 2, *QUICK, prepare=lambda rank: sys.argv.extend(["--seed", str(rank)]))
    assert 2 in codes and "process 1 has other options or another teacher than the first" in printed, printed
    assert not checkpoints(tmp_path)


@pytest.mark.parametrize("world", [2, slow(1)])
def test_the_micro_batch_is_halved_until_it_fits(tmp_path, world):
    """Memory runs out for the last process, in the first pass of a step and in a later one. All of them begin the step
    again, and the student is that of --micro-batch 1."""
    def prepare(rank):
        if rank == world - 1:
            train.boot_losses = short_of_memory(0, 2)
    options = [*QUICK, "--batch", 4 * world, "--steps", 1, "--solver", "euler", "--guidance", 1]
    codes, printed = train_forked(tmp_path / "tried", world, *options, prepare=prepare)
    assert codes == [0] * world and printed.count("memory ran out: from here on 2 samples at once") == 1, printed
    assert train_forked(tmp_path / "told", world, *options, "--micro-batch", 1)[0] == [0] * world
    assert not differences(tmp_path / "tried", tmp_path / "told")


@pytest.mark.parametrize("world, options, numbers", [
    (1, ("--micro-batch", 2), [0]), (1, ("--batch", 2), [0, 1]), slow(2, ("--shard",), [0])])
def test_a_micro_batch_that_is_told_or_of_one_or_sharded_is_not_halved(tmp_path, world, options, numbers):
    """Sharded passes need each other, so that one can't begin again while the others go on."""
    def prepare(rank):
        if rank == world - 1:
            train.boot_losses = short_of_memory(*numbers)
    codes, printed = train_forked(tmp_path, world, *QUICK, *options, prepare=prepare)
    assert codes[-1] == 2 and "error: out of memory, give half the --micro-batch" in printed, printed
    assert not checkpoints(tmp_path)


# ------------------------------------------------------------------------------------------------- kills and full disks
def test_a_killed_run_resumes_bitwise(alone, tmp_path):
    """-9: no handler runs, and the kernel frees the lock."""
    killed, _ = train_forked(tmp_path, 1, *QUICK, "--every", 1, prepare=signal_in_step(3, signal.SIGKILL))
    assert killed == [-signal.SIGKILL] and list(checkpoints(tmp_path)) == [2, 1]
    codes, printed = train_forked(tmp_path, 1, *QUICK)
    assert codes == [0] and "resuming at step 2" in printed, printed
    assert not differences(alone(*QUICK), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--kills", 3), ("--processes", 2, "--kills", 1)])
def test_killed_at_random_moments_it_is_the_undisturbed_run(call, tmp_path, options):
    code, printed, error = call("dev.kill", *options, "--steps", 12, "--out", tmp_path)
    assert code == 0 and "bitwise the undisturbed one" in printed, error


def test_who_has_lost_the_others_says_so(tmp_path):
    codes, printed = train_forked(tmp_path, 2, *QUICK, prepare=signal_in_step(2, signal.SIGKILL, rank=1))
    assert codes == [2, -signal.SIGKILL] and "error: process 0 has lost the others" in printed, printed


def test_a_full_disk_leaves_the_last_checkpoint_and_a_sentence(call, tmp_path, monkeypatch):
    write, calls = dcp.HuggingFaceStorageWriter.write_data, itertools.count()

    def full(self, plan, planner):
        if next(calls) > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, plan, planner)
    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", full)
    code, _, error = call("train", *QUICK, "--match", 0, "--every", 1, "--out", tmp_path)
    assert code == 2 and "can't write" in error and "No space left on device" in error, error
    assert list(checkpoints(tmp_path)) == [1] and not list((tmp_path / "state").glob("*.new"))


# ------------------------------------------------------------------------------------------------ what can't be split
def test_a_batch_that_does_not_divide_is_told_what_does():
    with pytest.raises(BadInput, match="--batch 32 does not divide over 3 processes: .*33 does"):
        split_batch(train.parse_args(["--batch", "32"]), 3, torch.device("cpu"))


@pytest.mark.parametrize("env, message", [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is not torchrun's, without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: one"),
    ({"WORLD_SIZE": "2", "RANK": "1"}, "one process works alone"), ({"RANK": "1"}, ""), ({"LOCAL_RANK": "7"}, ""),
    (dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "-1"), None)])
def test_what_a_cluster_left_in_the_environment_is_no_torchrun(monkeypatch, recwarn, env, message):
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(BadInput, match="RANK, WORLD_SIZE and LOCAL_RANK: ") if message is None else nullcontext():
        assert torchrun() == (0, 1, 0)
    assert [message in str(recwarn.pop().message) for _ in recwarn.list] == [True] * bool(message)
