"""What the dry run promises: operations as counted in the real passes, memory as measured."""

import json
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import plan
import train
from plan import CPU_ATTENTION, Ledger, step_costs
from signal_ode import boot_losses
from student import new_critic, new_student
from teacher import noise


@pytest.fixture
def networks(tiny):
    student = new_student(tiny, 600, 3.0)
    critic = new_critic(student)
    student.network.requires_grad_(True)
    critic.network.requires_grad_(True)
    args = train.parse_args([])
    train.settle(args, tiny)
    return student, critic, args


def mixed():
    return train.autocast(torch.device("cpu"), torch.float32)


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


def test_operations_are_those_of_the_real_passes(tiny, networks):
    student, critic, args = networks
    boundary = train.boundary_samples(args, 0)
    flops, passes = step_costs(student, critic, args, 4, boundary, mixed)
    eps, t = noise(range(4), tiny.shape), torch.full((4,), 900)
    condition = tiny.encode(["a red bag on a blue background"] * 4) | {"w": torch.full((4,), 3.0)}
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        losses = boot_losses(student, tiny.denoise, eps, t, t - 100, tiny.schedule, boundary, "heun", **condition)
        torch.cat(losses).sum().backward()
    assert 4 * flops["BOOT"] == counter.get_total_flops() > 1e9
    assert 0.01e9 < flops["text"] < 0.03e9 and flops["matching"] > 3 * flops["critic"] > 0
    gradients = 2 * sum(4 * p.numel() for p in critic.network.parameters())
    assert passes > gradients and all(p.grad is None for p in critic.network.parameters())
    assert all(type(table) is torch.Tensor for table in tiny.schedule.on_device_of(t))     # nothing fake is left there


def test_memory_decides_how_many_samples_are_held(monkeypatch):
    monkeypatch.setattr(plan, "step_costs", lambda student, critic, args, samples, *_: ({}, 10 * samples))
    found = [plan.most_at_once(spare, [8, 4, 2], None, None, None, None, None) for spare in (80, 79, 39, -1)]
    assert found == [8, 4, 2, 2]


@pytest.mark.parametrize("options", [(), ("--match", 0, "--batch", 16), ("--teacher", "tiny-pixel", "--batch", 16)])
def test_memory_is_as_promised(run, tmp_path, options):
    options = ["--steps", 12, "--match-from", 0.5, "--warmup", 2, "--save-every", 4, *options, "--out", tmp_path]
    dry, done = run("train.py", *options, "--dry-run"), run("train.py", *options)
    assert dry.returncode == done.returncode == 0, dry.stderr + done.stderr
    promised = float(re.search(r"at most\s+([\d.]+)", dry.stdout)[1])
    measured = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["memory_gb"]
    assert promised == pytest.approx(measured, rel=0.15)
