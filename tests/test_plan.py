"""tools.plan promises what train.py then takes.

- Its operations are those of real steps, of every kind.
- Its memory is what a run takes, within 15%.
- It plans for GPUs that are not here, and for several processes with sharding.
- It needs no memory for the networks: their tensors have no values.
"""

import json
import re
import sys
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import plumbing.prompts
import tools.plan
import train
from conftest import slow
from plumbing.run import Run
from tools.plan import Plan, kinds_of_steps

CPU_ATTENTION = {                                           # which torch's counter does not know; of shapes
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}


@pytest.mark.parametrize("teacher", ["tiny", slow("tiny-pixel")])
def test_operations_are_those_of_the_steps(call, tmp_path, monkeypatch, teacher):
    options = ["--teacher", teacher, "--batch", 4, "--steps", 11, "--match-from", 0.6, "--warmup", 2, "--samples", 0]
    counter, counts, zero_grad = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION), [], Run.zero_grad

    def begin_step(run):
        counts.append(counter.get_total_flops())
        zero_grad(run)
    monkeypatch.setattr(Run, "zero_grad", begin_step)
    with counter:
        assert call("train", *options, "--out", tmp_path)[0] == 0
    counted = [after - before for before, after in pairwise([*counts, counter.get_total_flops()])]
    args = train.parse_args(list(map(str, options)))
    plan = Plan(args)
    train.train(args, plan)
    kinds = [(steps, flops) for steps, (_, flops) in zip(kinds_of_steps(args), plan.kinds, strict=True)]
    assert [flops.keys() - {"text"} for _, flops in kinds] == [
        {"bootstrap"}, {"bootstrap", "critic"}, {"matching", "critic"}, {"bootstrap", "matching", "critic"},
        {"refining"}]
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
    (), slow(("--match", 0, "--batch", 16)), slow(("--grad-checkpointing",)), slow(("--lora", 4)),
    slow(("--teacher", "tiny-pixel", "--batch", 16, "--micro-batch", 8))])
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
    code, two, error = call("tools.plan", *options, "--processes", 2, "--shard", "--tflops", 50, "--price", 3)
    assert code == 0 and "2 processes x 1 micro-batches x 16 samples" in two and not (tmp_path / "run").exists(), error
    hours, dollars = (float(re.search(rf"([\d.e-]+) {unit}", two)[1]) for unit in ("hours", "dollars"))
    assert dollars == pytest.approx(2 * 3 * hours, rel=0.01)
    one, two = figures(one), figures(two)
    for part in ("teacher", "ema", "Adam", "gradients"):
        assert two[part] == pytest.approx(one[part] / 2, abs=0.0006), part
    assert two["gathered"] > 0
    for wrong, said in ((["--shard"], "give --processes"), (["--shard", "--lora", 4], "shares its weights")):
        code, _, error = call("tools.plan", *options, *wrong)
        assert code == 2 and said in error


@pytest.mark.parametrize("few, more, resting", [
    (2048, [], {"VAE", "text encoder"}), (1, [], {"VAE"}), (1, ["--grad-checkpointing"], {"VAE", "text encoder"})])
def test_what_rests_takes_no_memory_of_the_gpu(call, tmp_path, monkeypatch, few, more, resting):
    """The text encoder rests if all prompts are encoded first, or to save memory."""
    monkeypatch.setattr(plumbing.prompts, "FEW", few)
    monkeypatch.setattr(tools.plan, "FEW", few)
    code, out, error = call("tools.plan", "--device", "cuda", "--steps", 40, "--match", 0, "--out", tmp_path, *more)
    assert code == 0, error
    rows = figures(out[out.index("memory of a process"):])
    assert {"VAE", "text encoder"} - rows.keys() == resting and rows["passes"] > 0
