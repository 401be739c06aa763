"""Loading, guidance and the untrained student, on the embedded teacher's trained weights."""

import contextlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from plumbing.files import BadInput, write_file
from plumbing.hub import TINY
from plumbing.weights import WEIGHTS
from REMOVED import boot_targets
from signal_ode import add_noise, solve
from student import Student, load_student, new_critic, new_student, save_student
from plumbing.images import noise
from teacher import load_teacher

PROMPTS = ["a red ankle boot on a yellow background", "a blue coat on a white background"]


@pytest.fixture
def copy(tmp_path):
    """A private copy of the embedded teacher."""
    others = shutil.ignore_patterns("judge", "student", "evaluation")
    return shutil.copytree(TINY, tmp_path / "teacher", ignore=others)


def test_teacher_is_frozen_float32_and_deterministic(tiny):
    assert tiny.shape == (4, 8, 8) and not any(p.requires_grad for p in tiny.unet.parameters())
    eps, condition = noise([0, 1], tiny.shape), tiny.encode(PROMPTS)
    t, w = torch.tensor([1000, 1000]), torch.tensor([3.0, 3.0])
    assert torch.equal(tiny.denoise(eps, 1000, 3.0, **condition), tiny.denoise(eps, t, w, **condition))
    assert tiny.decode(eps).shape == (2, 3, 32, 32)


def test_guidance_runs_both_passes_in_one_batch_and_is_linear_in_w(tiny):
    eps, condition = noise([0, 1], tiny.shape), tiny.encode(PROMPTS)
    one, zero = tiny.denoise(eps, 700, **condition), tiny.denoise(eps, 700, **tiny.encode(["", ""]))
    assert torch.allclose(tiny.denoise(eps, 700, 4.0, **condition), zero + 4 * (one - zero), atol=1e-4)
    w = torch.tensor([1.0, 4.0])
    assert torch.allclose(tiny.denoise(eps, 700, w, **condition)[0], one[0], atol=1e-5)


def test_negative_prompt_replaces_the_empty_one(tiny):
    teacher, eps, condition = load_teacher("tiny"), noise([0, 1], tiny.shape), tiny.encode(PROMPTS)
    teacher.set_negative_prompt(PROMPTS[0])
    f = teacher.denoise(eps, 700, 4.0, **condition)
    assert torch.allclose(f[0], tiny.denoise(eps, 700, **condition)[0], atol=1e-4)
    teacher.set_negative_prompt("")
    assert torch.equal(teacher.denoise(eps, 700, 4.0, **condition), tiny.denoise(eps, 700, 4.0, **condition))


@pytest.mark.parametrize("guidance", [3.0, [1.0, 8.0]])
@pytest.mark.parametrize("i", [1, 400, 1000])
def test_student_equals_teacher_before_training(tiny, i, guidance):
    student, condition = new_student(tiny, i, guidance), tiny.encode(PROMPTS)
    eps = noise([0, 1], tiny.shape)
    with torch.no_grad():
        expected = tiny.denoise(tiny.schedule.sigma(i).float() * eps, i, **condition)
        for t in (0, 1, 137, 1000, torch.tensor([3, 999])):
            for w in (1.0, 2.5, 8.0):
                assert torch.equal(student(eps, t, w, **condition), expected)


def test_refinement_goes_on_along_the_trajectory(tiny):
    """With no step it is the student's own picture; with one, the teacher's prediction below it at T / 5; and from the
    teacher's own y_t it ends where its trajectory does."""
    student, condition, eps = new_student(tiny, 400, 3.0), tiny.encode(PROMPTS), noise([0, 1], tiny.shape)
    with torch.no_grad():
        assert torch.equal(student.refine(eps, 0, **condition), student(eps, 0, **condition))
        x_t = add_noise(student(eps, 0, **condition), eps, 200, tiny.schedule)
        assert torch.allclose(student.refine(eps, 1, w=3.0, **condition), tiny.denoise(x_t, 200, 3.0, **condition))
        ys = solve(tiny.denoise, eps, tiny.schedule.grid(15), tiny.schedule, space="y", w=3.0, **condition)

    class Exact(Student):
        def __call__(self, eps, t, **_):
            assert t == 0
            return ys[12]                                           # y at T / 5
    assert torch.equal(Exact(None, tiny, 400, 3.0).refine(eps, 3, w=3.0, **condition), ys[-1])


@pytest.mark.parametrize("guidance", [3.0, [1.0, 8.0]])
def test_critic_equals_the_unguided_teacher_before_training(tiny, guidance):
    critic, condition = new_critic(new_student(tiny, 400, guidance)), tiny.encode(PROMPTS)
    x_t, t, w = noise([0, 1], tiny.shape), torch.tensor([1, 900]), torch.tensor([2.0, 5.0])
    with torch.no_grad():
        assert torch.equal(critic(x_t, t, w, **condition), tiny.denoise(x_t, t, **condition))
    critic.network.requires_grad_(True)
    critic(x_t, t, w, **condition).square().sum().backward()
    told = isinstance(guidance, list)
    assert not told or critic.network.time_embedding.cond_proj.weight.grad.abs().max() > 0


def test_a_new_critic_is_the_teacher_before_it_is_clipped():
    teacher = load_teacher("tiny-pixel")
    critic, condition = new_critic(new_student(teacher, 1000, 3.0)), teacher.encode(["bag", "coat"])
    x_t, t = 3 * noise([0, 1], teacher.shape), torch.tensor([10, 500])
    with torch.no_grad():
        h = critic(x_t, t, w=torch.ones(2), **condition)
        assert torch.equal(h.clamp(-1, 1), teacher.denoise(x_t, t, **condition)) and h.max() > 1.5


def test_the_teachers_prediction_has_a_gradient_to_its_input_alone(tiny):
    x_t = noise([0, 1], tiny.shape).requires_grad_()
    tiny.denoise(x_t, 500, 3.0, **tiny.encode(PROMPTS)).square().sum().backward()
    assert x_t.grad.abs().max() > 0 and all(p.grad is None for p in tiny.unet.parameters())


def test_new_embeddings_learn(tiny):
    """The zero layers get a gradient, so that the student can leave its teacher."""
    student, condition = new_student(tiny, 400, [1.0, 8.0]), tiny.encode(PROMPTS)
    student.network.requires_grad_(True)
    t, w = torch.tensor([0, 500]), torch.tensor([1.0, 5.0])
    student(noise([0, 1], tiny.shape), t, w, **condition).square().sum().backward()
    network = student.network
    for p in (network.class_embedding.linear_2.weight, network.time_embedding.cond_proj.weight):
        assert p.grad.abs().max() > 0


def test_saved_student_is_the_same_student(tiny, tmp_path):
    student, condition, eps = new_student(tiny, 400, [1.0, 8.0]), tiny.encode(PROMPTS), noise([0, 1], tiny.shape)
    for p in student.network.parameters():
        p.data += 0.01 * torch.randn_like(p)
    save_student(tmp_path / "student", student)
    loaded = load_student(tmp_path)
    assert loaded.input_time == 400 and loaded.guidance == [1.0, 8.0]
    with torch.no_grad():
        assert torch.equal(loaded(eps, 0, 3.0, **condition), student(eps, 0, 3.0, **condition))


@pytest.mark.parametrize("path, name", [
    (f"unet/{WEIGHTS}", "conv_in.weight"),
    ("text_encoder/model.safetensors", "text_model.final_layer_norm.weight"), (f"vae/{WEIGHTS}", None)])
def test_student_of_another_teacher_is_refused(tiny, copy, tmp_path, path, name):
    """But the VAE may be another: a better decoder makes better pictures."""
    weights = load_file(copy / path)
    weights[name or "decoder.conv_in.weight"] += 1
    save_file(weights, copy / path)
    save_student(tmp_path / "student", new_student(load_teacher(copy), 400, 3.0))
    with pytest.raises(BadInput, match="made for another teacher than tiny") if name else contextlib.nullcontext():
        load_student(tmp_path, "tiny")


def test_latents_are_never_clipped(tiny, copy):
    """Old pipelines' schedulers say so, and diffusers corrects them."""
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": True}))
    clipping = load_teacher(copy)
    eps, condition = noise([0], tiny.shape), tiny.encode(PROMPTS[:1])
    assert torch.equal(clipping.denoise(eps, 900, 3.0, **condition), tiny.denoise(eps, 900, 3.0, **condition))
    assert clipping.fingerprint == tiny.fingerprint


@pytest.mark.parametrize("path, change, message", [
    ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim it is a student, not a teacher"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, "model_max_length is more than .* 77")])
def test_parts_that_do_not_suit_a_teacher_are_refused(copy, path, change, message):
    (copy / path).write_text(json.dumps(json.loads((copy / path).read_text()) | change))
    with pytest.raises(BadInput, match=message):
        load_teacher(copy)


def test_full_and_half_precision_copies_are_one_teacher(tiny, copy):
    weights = load_file(copy / "unet" / WEIGHTS)
    save_file({k: v.float() for k, v in weights.items()}, copy / "unet" / WEIGHTS)
    half = load_teacher(copy, dtype=torch.bfloat16)
    assert load_teacher(copy).fingerprint == tiny.fingerprint == half.fingerprint


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("conv_in.bias"), "missing conv_in.bias"),
    (lambda w: w.update(extra=torch.zeros(1)), "unexpected extra"),
    (lambda w: w.update({"conv_in.bias": torch.zeros(3)}), r"conv_in.bias is \(3,\), not \(64,\)")])
def test_weights_that_do_not_fit_are_named(copy, change, message):
    weights = load_file(copy / "unet" / WEIGHTS)
    change(weights)
    save_file(weights, copy / "unet" / WEIGHTS)
    with pytest.raises(BadInput, match=message):
        load_teacher(copy)


def test_truncated_weights_are_named(copy):
    path = copy / "vae" / WEIGHTS
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BadInput, match="vae.*is not a whole safetensors file"):
        load_teacher(copy)


def test_pickled_weights_are_refused(copy):
    (copy / "unet" / WEIGHTS).unlink()
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BadInput, match="diffusion_pytorch_model.bin is a pickle"):
        load_teacher(copy)


@pytest.mark.parametrize("part, key, value", [
    ("unet", "act_fn", "mish"), ("unet", "class_embed_type", "projection"),
    ("unet", "down_block_types", ["SimpleCrossAttnDownBlock2D"] * 2),
    ("vae", "act_fn", "mish"), ("vae", "up_block_types", ["AttnUpDecoderBlock2D"] * 3),
    ("text_encoder", "hidden_act", "relu")])
def test_unsupported_config_names_key_and_value(copy, part, key, value):
    path = copy / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    named = value[0] if isinstance(value, list) else value
    with pytest.raises(BadInput, match=f"{key} = '{named}' is not supported"):
        load_teacher(copy)


def test_old_attention_names_load(tiny, copy):
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(copy / "vae" / WEIGHTS)
    for modern, old in new.items():
        weights = {k.replace(f"attentions.0.{modern}", f"attentions.0.{old}"): v for k, v in weights.items()}
    assert any("query" in k for k in weights)
    save_file(weights, copy / "vae" / WEIGHTS)
    eps = noise([0], tiny.shape)
    assert torch.equal(load_teacher(copy).decode(eps), tiny.decode(eps))


def test_text_encoder_without_its_prefix_loads(tiny, copy):
    """As transformers 5 writes it."""
    weights = load_file(copy / "text_encoder" / "model.safetensors")
    short = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    assert short.keys().isdisjoint(weights)
    save_file(short, copy / "text_encoder" / "model.safetensors")
    assert torch.equal(load_teacher(copy).encode(PROMPTS)["text"], tiny.encode(PROMPTS)["text"])


@pytest.mark.parametrize("name, prompts", [("tiny", PROMPTS * 4), ("tiny-pixel", ["ankle boot", "coat"] * 4)])
def test_rounded_networks_stay_within_their_bound(name, prompts):
    """RMS error against float64, over the RMS: of f, times 15 at T by 1 / alpha_T, and of the bootstrap target.

    One teacher predicts epsilon, the other v.
    """
    whole = load_teacher(name, dtype=torch.float64).unet

    def predictions(dtype):
        """f and the bootstrap target at three times; the student is float32, and under autocast as in training."""
        teacher, wide = load_teacher(name, dtype=dtype), torch.float64 if dtype == torch.float64 else torch.float32
        assert teacher.unet.conv_in.weight.dtype == dtype
        assert torch.equal(teacher.unet.conv_out.weight, whole.conv_out.weight.to(wide))    # never rounded
        eps, condition = noise(range(len(prompts)), teacher.shape).to(wide), teacher.encode(prompts)
        condition["w"] = torch.full((len(eps),), 3.0)
        student, found = new_student(teacher, 600, 3.0), []
        student.network.to(wide)
        for t in (1000, 500, 40):
            found.append(teacher.denoise(eps, t, **condition))
            with torch.autocast("cpu", dtype, enabled=dtype.itemsize == 2):
                times = torch.full((len(eps),), t)
                found.append(boot_targets(student, teacher.denoise, eps, times, times - 40, teacher.schedule,
                                          slice(0), "heun", **condition)[0])
        assert all(f.dtype == wide for f in found)
        return found

    exact = predictions(torch.float64)
    for dtype, bound in ((torch.bfloat16, 0.04), (torch.float16, 0.005), (torch.float32, 1e-5)):
        for a, b in zip(predictions(dtype), exact):
            assert ((a - b).square().mean() / b.square().mean()).sqrt() < bound


def test_decoding_in_parts_changes_nothing(tiny):
    latents = noise(range(300), tiny.shape)                 # 256 at once
    whole = tiny.decode(latents)
    assert torch.allclose(whole[250:], tiny.decode(latents[250:]), atol=1e-5) and len(whole) == 300


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(BadInput, match="No space left on device"):
        write_file(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_product_imports_no_reference_library():
    code = ("import sys, train, sample; "
            "print({'diffusers', 'transformers', 'regex', 'ftfy'} & {m.split('.')[0] for m in sys.modules})")
    done = subprocess.run([sys.executable, "-c", code], cwd=TINY.parent, capture_output=True, text=True)
    assert done.stdout == "set()\n"
