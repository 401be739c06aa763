"""--lora: student, critic and average are low-rank additions to one frozen copy of the teacher's weights.

- Before training they are the teacher. Their weights are the teacher's own storage, which gets no gradient and is never
  written to; each network's additions are its own, also where blocks are computed again in the backward pass.
- y = base(x) + up(down(x)) is what one layer of the merged weight computes, for every layer, linear or convolution.
- A student's folder and a checkpoint hold the additions alone. A run resumes bitwise, and two processes are one run.
- A range of guidance, classes, BOOT alone and half precision train as well.
- An export opens as a model, as one file, and as a LoRA that is the additions as they are.
"""

import signal

import pytest
import torch
from safetensors.torch import load_file

from conftest import PROMPTS, TINY, slow
from dev.kill import differences
from forks import signal_in_step, train_forked
from plumbing.images import noise
from plumbing.weights import WEIGHTS
from student import load_student, new_critic, new_student, save_student, set_trainable
from teacher import load_teacher
from tools.export import LORA, fold

QUICK = ["--teacher", "tiny-pixel", "--lora", 4, "--batch", 4, "--steps", 4, "--warmup", 1, "--match-from", 0.5,
         "--every", 100, "--samples", 0]
EPS = noise([0, 1], (4, 8, 8))
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork")


def changed(network):
    """The network with additions that are not zero."""
    rng = torch.Generator().manual_seed(1)
    for name, p in network.own_parameters().items():
        if name.endswith(".up.weight"):
            p.data = 0.02 * torch.randn(p.shape, generator=rng)
    return network


@pytest.mark.parametrize("guidance", [3.0, [1.0, 8.0]])
@torch.no_grad()
def test_student_and_critic_are_the_teacher_before_training_and_share_its_weights(tiny, guidance):
    student, condition = new_student(tiny, 400, guidance, rank=4), tiny.encode(PROMPTS)
    critic, w = new_critic(student), torch.tensor([2.0, 5.0])
    assert student(EPS, 0, w, **condition).equal(tiny.denoise(tiny.schedule.sigma(400).float() * EPS, 400, **condition))
    assert critic(EPS, torch.tensor([1, 900]), w, **condition).equal(
        tiny.denoise(EPS, torch.tensor([1, 900]), **condition))
    base = dict(tiny.unet.named_parameters())
    for network in student.network, critic.network:
        own = network.own_parameters()
        shared = {name: p for name, p in network.named_parameters() if name not in own}
        assert shared.keys() == base.keys() and sum(p.numel() for p in own.values()) < 0.2 * 2.6e6
        assert all(p.data_ptr() == base[name].data_ptr() for name, p in shared.items())


def test_gradients_are_each_networks_own_also_where_blocks_are_computed_again(tiny):
    """The critic's pass between the student's and its backward pass must not matter."""
    condition, t = tiny.encode(PROMPTS), torch.tensor([300, 700])
    student = new_student(tiny, 400, 3.0, rank=4)
    critic, found = new_critic(student), []
    set_trainable(changed(student.network))
    changed(critic.network)
    for student.network.checkpointing in (False, True):
        student.network.zero_grad()
        x = student(EPS, 0, **condition)
        critic(x.detach(), t, **condition).sum().backward()
        x.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in student.network.own_parameters().items()})
        assert all(p.grad is None for name, p in student.network.named_parameters() if name not in found[-1])
        assert all(p.grad is None for p in tiny.unet.parameters())
    assert all(found[0][name].equal(grad) for name, grad in found[1].items())
    assert all(grad.any() for name, grad in found[0].items() if name.endswith((".up.weight", ".down.weight")))


@pytest.mark.parametrize("name", ["tiny", "tiny-pixel"])
@torch.no_grad()
def test_additions_are_what_merged_weights_compute(name, tmp_path):
    """At target time 0, which export folds; and from a folder with the additions alone."""
    teacher = load_teacher(name)
    student, eps = new_student(teacher, 400, 3.0, rank=3), noise([0, 1], teacher.shape)
    changed(student.network)
    save_student(tmp_path / "student", student)
    assert load_file(tmp_path / "student" / WEIGHTS).keys() == student.network.own_parameters().keys()
    loaded, condition = load_student(tmp_path, name), teacher.encode(["bag", "coat"])
    x, i = teacher.schedule.sigma(400).float() * eps, teacher.schedule.timestep(torch.tensor([400, 400]))
    merged = load_teacher(name).unet
    merged.load_state_dict(fold(student.network))
    out = student.output(x, 400, torch.tensor([0, 0]), **condition)
    assert loaded.output(x, 400, torch.tensor([0, 0]), **condition).equal(out)
    assert torch.allclose(merged(x, i, **condition), out, atol=1e-4) and not teacher.unet(x, i, **condition).allclose(
        out, atol=0.05)


@pytest.mark.parametrize("options", [
    (), slow(("--guidance", "1:6")), slow(("--match", 0)), slow(("--teacher", "tiny")), slow(("--ema", 0)),
    slow(("--precision", "bf16", "--grad-checkpointing"))])
def test_a_stopped_run_resumes_bitwise_and_its_files_are_small(tmp_path, options):
    assert train_forked(tmp_path / "whole", 1, *QUICK, *options)[0] == [0]
    for prepare in (signal_in_step(3, signal.SIGTERM), lambda rank: None):
        codes, printed = train_forked(tmp_path / "parts", 1, *QUICK, *options, prepare=prepare)
        assert codes == [0], printed
    assert not differences(tmp_path / "whole", tmp_path / "parts")
    sizes = {path.parent.name: path.stat().st_size for path in tmp_path.rglob("whole/**/*.safetensors")}
    assert sizes["student"] < 0.4 * (TINY / "unet" / WEIGHTS).stat().st_size and sizes["step_4"] < 8 * sizes["student"]


def test_two_processes_are_one_run(tmp_path):
    assert train_forked(tmp_path / "one", 1, *QUICK)[0] + train_forked(tmp_path / "two", 2, *QUICK)[0] == [0, 0, 0]
    one, two = (load_file(tmp_path / out / "student" / WEIGHTS) for out in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-5) for name in one)
    codes, printed = train_forked(tmp_path / "three", 2, *QUICK, "--shard")
    assert 2 in codes and "a LoRA shares its weights" in printed


def test_an_export_is_the_student_and_its_lora_the_additions(call, tiny, tmp_path):
    student = new_student(tiny, 600, 3.0, rank=4)
    changed(student.network)
    save_student(tmp_path / "student", student)
    code, printed, error = call("tools.export", "--student", tmp_path / "student", "--lora", 64, "--single-file",
                                "--out", tmp_path / "x")
    assert code == 0 and "; 0 at most" in printed, error
    assert "to rank 4." in (tmp_path / "x" / "README.md").read_text()
    lora, own = load_file(tmp_path / "x" / LORA), student.network.own_parameters()
    for name in ("mid_block.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"):
        for part in ("up", "down"):
            key = f"lora_unet_{name.replace('.', '_')}.lora_{part}.weight"
            assert lora[key].equal(own[f"{name}.{part}.weight"]), key
