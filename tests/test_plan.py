"""What the dry run promises: operations as counted in the real passes, memory as measured."""

import json
import re
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import train
from tools.plan import CPU_ATTENTION, Ledger, Plan


def test_the_ledger_knows_what_is_in_use():
    with FakeTensorMode(), Ledger() as ledger:
        a = torch.empty(1000)                               # 4,000 bytes
        b = a * 2 + a                                       # one more, and another on the way
        assert (ledger.bytes, ledger.peak) == (8000, 12000)
        b.add_(1)
        c = b[:10].view(2, 5)                               # the same memory
        del a, b
        assert (ledger.bytes, ledger.peak, c.shape) == (4000, 12000, (2, 5))
        del c
        assert ledger.bytes == 0


class Counted:
    """Stands where the loop asks for a learning rate: .flops of train.py's steps, by number."""

    def __init__(self):
        self.flops, self.counter, self.learning_rate = {}, None, train.learning_rate

    def __call__(self, step, *rest):
        if self.counter:
            self.counter.__exit__(None, None, None)
            self.flops[step - 1] = self.counter.get_total_flops()
        self.counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        self.counter.__enter__()
        return self.learning_rate(step, *rest)


@pytest.mark.parametrize("teacher", ["tiny", "tiny-pixel"])
def test_operations_are_those_of_the_steps(call, tmp_path, monkeypatch, teacher):
    """BOOT's, of the critic alone, matched, and of all; nothing is computed for it, and nothing is left behind."""
    counted, plans, Plan = Counted(), [], train.Plan
    monkeypatch.setattr(train, "Plan", lambda *args: plans.append(Plan(*args)) or plans[-1])
    monkeypatch.setattr(train, "learning_rate", counted)
    options = ["--teacher", teacher, "--batch", 4, "--steps", 11, "--match-from", 0.6, "--warmup", 2, "--out", tmp_path,
               "--sample-every", 0, "--critic-updates", 2]
    assert call("train", *options, "--dry-run")[0] == 0
    assert call("train", *options)[0] == 0
    counted.counter.__exit__(None, None, None)
    flops = {part: 4 * count for part, count in plans[0].flops(slice(0, None, 4)).items()}
    critic = flops["critic alone"]
    assert counted.flops[0] == flops["BOOT"] > 1e9 and counted.flops[6] == flops["BOOT"] + critic
    assert counted.flops[8] == critic
    assert counted.flops[7] == counted.flops[9] - flops["BOOT"] == flops["matching"] + flops["critic"]
    assert all(p.grad is None for p in plans[0].student.teacher.unet.parameters())


def test_memory_decides_how_many_samples_are_held(monkeypatch):
    monkeypatch.setattr(Plan, "activations", lambda plan, samples, *rest: 10 * samples)
    plan = Plan.__new__(Plan)
    assert [plan.most_at_once(spare, [8, 4, 2], slice(0), True) for spare in (80, 79, 39, -1)] == [8, 4, 2, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="the libraries' share was found on Linux")
@pytest.mark.parametrize("options", [
    (), ("--match", 0, "--batch", 16), ("--teacher", "tiny-pixel", "--batch", 16, "--micro-batch", 8)])
def test_memory_is_as_promised(run, tmp_path, options):
    options = ["--steps", 12, "--match-from", 0.5, "--warmup", 2, "--save-every", 4, *options, "--out", tmp_path]
    dry, done = run("train.py", *options, "--dry-run"), run("train.py", *options)
    assert dry.returncode == done.returncode == 0, dry.stderr + done.stderr
    promised = float(re.search(r"together\s+([\d.]+)", dry.stdout)[1])
    measured = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["memory_gb"]
    assert promised == pytest.approx(measured, rel=0.15)
