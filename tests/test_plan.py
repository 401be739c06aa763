"""tools.plan promises what train.py then takes.

- Its operations are those of real steps, of every kind.
- Its memory is what a run takes, within 15%.
- It plans for GPUs that are not here, and for several processes with sharding.
- It needs no memory for the networks: their tensors have no values.
"""

import json
import re
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import train
from plumbing.run import Run
from tools.plan import Meter, Plan, kinds_of_steps

CPU_ATTENTION = {                                           # which torch's counter does not know; of shapes
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}


def test_the_meter_knows_what_is_in_use():
    with FakeTensorMode(), Meter() as meter:
        a = torch.empty(1000)                               # 4,000 bytes
        b = a * 2 + a                                       # one more, and another on the way
        assert (meter.bytes, meter.peak) == (8000, 12000)
        b.add_(1)
        c = b[:10].view(2, 5)                               # the same memory
        del a, b
        assert (meter.bytes, meter.peak, c.shape) == (4000, 12000, (2, 5))
        del c
        assert meter.bytes == 0


@pytest.mark.parametrize("teacher", ["tiny", pytest.param("tiny-pixel", marks=pytest.mark.slow)])
def test_operations_are_those_of_the_steps(call, tmp_path, monkeypatch, teacher):
    options = ["--teacher", teacher, "--batch", 4, "--steps", 11, "--match-from", 0.6, "--warmup", 2, "--out", tmp_path,
               "--samples", 0]
    counted, zero_grad, update = [], Run.zero_grad, Run.update

    def begin_step(run):
        zero_grad(run)
        run.counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        run.counter.__enter__()

    def end_step(run, *adams):
        run.counter.__exit__(None, None, None)
        counted.append(run.counter.get_total_flops())
        update(run, *adams)
    monkeypatch.setattr(Run, "zero_grad", begin_step)
    monkeypatch.setattr(Run, "update", end_step)
    assert call("train", *options)[0] == 0
    args = train.parse_args(list(map(str, options)))
    plan = Plan(args)
    train.train(args, plan)
    kinds = [(steps, flops) for steps, (_, flops) in zip(kinds_of_steps(args), plan.kinds, strict=True)]
    assert [flops.keys() - {"text"} for _, flops in kinds] == [
        {"bootstrap"}, {"bootstrap", "critic"}, {"matching", "critic"}, {"bootstrap", "matching", "critic"}]
    assert sorted(step for steps, _ in kinds for step in steps) == list(range(11))
    for steps, flops in kinds:
        assert {counted[step] for step in steps} == {4 * sum(flops.values())} and sum(flops.values()) > 1e8
    networks = plan.networks | plan.whole
    assert all(isinstance(p, FakeTensor) for network in networks.values() for p in network.parameters())


def figures(printed):
    """{name: number} of the lines of a plan."""
    return {name.strip(): float(number) for name, number in re.findall(r"^  (\D+?) +([\d.]+)$", printed, re.MULTILINE)}


@pytest.mark.skipif(sys.platform != "linux", reason="the libraries' share was found on Linux")
@pytest.mark.parametrize("options", [
    (), pytest.param(("--match", 0, "--batch", 16), marks=pytest.mark.slow),
    pytest.param(("--grad-checkpointing",), marks=pytest.mark.slow),
    pytest.param(("--teacher", "tiny-pixel", "--batch", 16, "--micro-batch", 8), marks=pytest.mark.slow)])
def test_memory_is_as_promised(run, tmp_path, options):
    options = ["--steps", 12, "--match-from", 0.5, "--warmup", 2, "--every", 4, *options, "--out", tmp_path]
    plan, done = run("-m", "tools.plan", *options), run("train.py", *options)
    assert plan.returncode == done.returncode == 0, plan.stderr + done.stderr
    measured = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["memory_gb"]
    assert figures(plan.stdout)["together"] == pytest.approx(measured, rel=0.15)


def test_a_plan_is_for_any_device_and_number_of_processes(call, tmp_path):
    options = ["--teacher", "tiny-pixel", "--steps", 40, "--match", 0, "--out", tmp_path / "run", "--device", "cuda"]
    code, one, error = call("tools.plan", *options)
    assert code == 0 and "in bf16" in one and "at 100 TFLOP/s" in one and "Python" not in one, error
    code, two, error = call("tools.plan", *options, "--processes", 2, "--shard", "--tflops", 50)
    assert code == 0 and "2 processes x 1 micro-batches x 16 samples" in two and not (tmp_path / "run").exists(), error
    one, two = figures(one), figures(two)
    for part in ("teacher", "ema", "Adam", "gradients"):
        assert two[part] == pytest.approx(one[part] / 2, abs=0.0006), part
    assert two["gathered"] > 0
    code, _, error = call("tools.plan", *options, "--shard")
    assert code == 2 and "give --processes" in error
