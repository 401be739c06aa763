"""Teachers, and the untrained student and critic, on the embedded teachers' trained weights.

- A teacher is frozen and deterministic, guided in one batch, linear in w, led away from a negative prompt.
- Student and critic equal the teacher before training, and can leave it; refinement goes on along the trajectory.
- A saved student is the same student; one of another teacher is refused.
- Folders as others write them (old names, shards, half precision, other libraries) are the same teacher.
- What a folder must not hold is refused in one sentence that names it: values, parts, tensors, files.
- Rounded networks stay within their bounds; decoding in parts changes nothing.
"""

import contextlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import PROMPTS, TINY, copy_tiny, edit
from plumbing.files import BadInput, read_json
from plumbing.images import noise
from plumbing.weights import OLD_NAMES, STEM, WEIGHTS, weight_files
from signal_ode import add_noise, heun_mean, signal_step, solve
from student import Student, load_student, new_critic, new_student, save_student
from teacher import load_teacher

UNET, ENCODER = f"unet/{WEIGHTS}", "text_encoder/model.safetensors"
EPS, NUM_TOKENS = noise([0, 1], (4, 8, 8)), len(read_json(TINY / "tokenizer" / "vocab.json"))


def change_weights(path, change):
    """Replace the weights {name: tensor} in a file by change(weights)."""
    save_file(change(load_file(path)), path)


# ---------------------------------------------------------------------------------------------- teacher and student
def test_teacher_is_frozen_float32_and_deterministic(tiny):
    assert tiny.shape == (4, 8, 8) and not any(p.requires_grad for p in tiny.unet.parameters())
    condition, t, w = tiny.encode(PROMPTS), torch.tensor([1000, 1000]), torch.tensor([3.0, 3.0])
    f = tiny.denoise(EPS, t, w, **condition)
    assert f.dtype == torch.float32 and torch.equal(tiny.denoise(EPS, 1000, 3.0, **condition), f)
    assert tiny.decode(EPS).shape == (2, 3, 32, 32)


def test_guidance_runs_both_passes_in_one_batch_and_is_linear_in_w(tiny):
    condition = tiny.encode(PROMPTS)
    one, zero = tiny.denoise(EPS, 700, **condition), tiny.denoise(EPS, 700, **tiny.encode(["", ""]))
    assert torch.allclose(tiny.denoise(EPS, 700, 4.0, **condition), zero + 4 * (one - zero), atol=1e-4)
    w = torch.tensor([1.0, 4.0])
    assert torch.allclose(tiny.denoise(EPS, 700, w, **condition)[0], one[0], atol=1e-5)


def test_negative_prompt_replaces_the_empty_one(tiny):
    teacher, condition = load_teacher("tiny"), tiny.encode(PROMPTS)
    teacher.set_negative_prompt(PROMPTS[0])
    f = teacher.denoise(EPS, 700, 4.0, **condition)
    assert torch.allclose(f[0], tiny.denoise(EPS, 700, **condition)[0], atol=1e-4)
    teacher.set_negative_prompt("")
    assert torch.equal(teacher.denoise(EPS, 700, 4.0, **condition), tiny.denoise(EPS, 700, 4.0, **condition))


def test_the_teachers_prediction_has_a_gradient_to_its_input_alone(tiny):
    x_t = EPS.clone().requires_grad_()
    tiny.denoise(x_t, 500, 3.0, **tiny.encode(PROMPTS)).square().sum().backward()
    assert x_t.grad.abs().max() > 0 and all(p.grad is None for p in tiny.unet.parameters())


@pytest.mark.parametrize("guidance", [3.0, [1.0, 8.0]])
@pytest.mark.parametrize("i", [1, 400, 1000])
def test_student_equals_teacher_before_training(tiny, i, guidance):
    student, condition = new_student(tiny, i, guidance), tiny.encode(PROMPTS)
    with torch.no_grad():
        expected = tiny.denoise(tiny.schedule.sigma(i).float() * EPS, i, **condition)
        for t in (0, 1, 137, 1000, torch.tensor([3, 999])):
            for w in (1.0, 2.5, 8.0):
                assert torch.equal(student(EPS, t, w, **condition), expected)


@pytest.mark.parametrize("guidance", [3.0, [1.0, 8.0]])
def test_critic_equals_the_unguided_teacher_before_training(tiny, guidance):
    critic, condition = new_critic(new_student(tiny, 400, guidance)), tiny.encode(PROMPTS)
    t, w = torch.tensor([1, 900]), torch.tensor([2.0, 5.0])
    with torch.no_grad():
        assert torch.equal(critic(EPS, t, w, **condition), tiny.denoise(EPS, t, **condition))
    critic.network.requires_grad_(True)
    critic(EPS, t, w, **condition).square().sum().backward()
    told = isinstance(guidance, list)
    assert not told or critic.network.time_embedding.cond_proj.weight.grad.abs().max() > 0


def test_a_new_critic_is_the_teacher_before_it_is_clipped():
    teacher = load_teacher("tiny-pixel")
    critic, condition = new_critic(new_student(teacher, 1000, 3.0)), teacher.encode(["bag", "coat"])
    x_t, t = 3 * noise([0, 1], teacher.shape), torch.tensor([10, 500])
    with torch.no_grad():
        h = critic(x_t, t, w=torch.ones(2), **condition)
        assert torch.equal(h.clamp(-1, 1), teacher.denoise(x_t, t, **condition)) and h.max() > 1.5


def test_new_embeddings_learn(tiny):
    """The zero layers get a gradient, so that the student can leave its teacher."""
    student = new_student(tiny, 400, [1.0, 8.0])
    network = student.network.requires_grad_(True)
    t, w = torch.tensor([0, 500]), torch.tensor([1.0, 5.0])
    student(EPS, t, w, **tiny.encode(PROMPTS)).square().sum().backward()
    for p in (network.class_embedding.linear_2.weight, network.time_embedding.cond_proj.weight):
        assert p.grad.abs().max() > 0


def test_refinement_goes_on_along_the_trajectory(tiny):
    """With no step it is the student's own sample; with one, the teacher's prediction below it at T / 5; and from the
    teacher's own y_t it ends where its trajectory does."""
    student, condition = new_student(tiny, 400, 3.0), tiny.encode(PROMPTS)
    with torch.no_grad():
        assert torch.equal(student.refine(EPS, 0, **condition), student(EPS, 0, **condition))
        x_t = add_noise(student(EPS, 0, **condition), EPS, 200, tiny.schedule)
        assert torch.allclose(student.refine(EPS, 1, w=3.0, **condition), tiny.denoise(x_t, 200, 3.0, **condition))
        ys = solve(tiny.denoise, EPS, tiny.schedule.grid(15), tiny.schedule, space="y", w=3.0, **condition)

    class Exact(Student):
        def __call__(self, eps, t, **_):
            assert t == 0
            return ys[12]                                           # y at T / 5
    assert torch.equal(Exact(None, tiny, 400, 3.0).refine(EPS, 3, w=3.0, **condition), ys[-1])


def test_saved_student_is_the_same_student(tiny, tmp_path):
    student, condition = new_student(tiny, 400, [1.0, 8.0]), tiny.encode(PROMPTS)
    for p in student.network.parameters():
        p.data += 0.01 * torch.randn_like(p)
    save_student(tmp_path / "student", student)
    loaded = load_student(tmp_path)
    assert loaded.input_time == 400 and loaded.guidance == [1.0, 8.0]
    with torch.no_grad():
        assert torch.equal(loaded(EPS, 0, 3.0, **condition), student(EPS, 0, 3.0, **condition))


@pytest.mark.parametrize("path, good", [(UNET, False), (ENCODER, False), (f"vae/{WEIGHTS}", True)])
def test_student_of_another_teacher_is_refused(copy, tmp_path, path, good):
    """But the VAE may be another: a better decoder makes better images."""
    change_weights(copy / path, lambda weights: {name: tensor + 1 for name, tensor in weights.items()})
    save_student(tmp_path / "student", new_student(load_teacher(copy), 400, 3.0))
    with contextlib.nullcontext() if good else pytest.raises(BadInput, match="made for another teacher than tiny"):
        load_student(tmp_path, "tiny")


# ------------------------------------------------------------------------------- folders that are the same teacher
def with_old_attention_names(folder):
    """As diffusers wrote them before 0.12."""
    def rename(weights):
        for old, new in OLD_NAMES.items():
            weights = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): w for name, w in weights.items()}
        assert any("query" in name for name in weights)
        return weights
    change_weights(folder / "vae" / WEIGHTS, rename)


def without_the_text_encoders_prefix(folder):
    """As transformers 5 writes them."""
    change_weights(folder / ENCODER, lambda old: {name.removeprefix("text_model."): w for name, w in old.items()})


def in_shards(folder):
    weights = load_file(folder / UNET)
    (folder / UNET).unlink()
    for k, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
        save_file({n: weights[n] for n in names}, folder / "unet" / f"{STEM}-{k + 1:05}-of-00002.safetensors")
    assert len(weight_files(folder / "unet")) == 2


def as_fp16_variant(folder):
    (folder / UNET).rename(folder / "unet" / f"{STEM}.fp16.safetensors")


def in_whole_precision(folder):
    change_weights(folder / UNET, lambda weights: {name: w.float() for name, w in weights.items()})


def with_a_scheduler_that_clips(folder):
    """As old pipelines say, and diffusers corrects: latents have no bounds."""
    edit(folder / "scheduler" / "scheduler_config.json", clip_sample=True)


def with_values_that_mean_the_same(folder):
    edit(folder / "unet" / "config.json", only_cross_attention=[False, False], cross_attention_dim=[64, 64],
         layers_per_block=[1, 1], sample_size=[8, 8], act_fn="swish")


def with_parts_that_nobody_needs(folder):
    edit(folder / "model_index.json", safety_checker=["x", "StableDiffusionSafetyChecker"], image_encoder=[None, None])


def saved_by_todays_library(folder):
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
    for kind, part in ((transformers.CLIPTokenizer, "tokenizer"), (transformers.CLIPTextModel, "text_encoder")):
        saved = kind.from_pretrained(folder / part)
        for path in (folder / part).iterdir():
            path.unlink()
        saved.save_pretrained(folder / part)
    assert not (folder / "tokenizer" / "vocab.json").exists()


def with_an_added_token(folder):
    """As resize_token_embeddings leaves it. The text encoder may not have it alone."""
    num, name = len(read_json(folder / "tokenizer" / "vocab.json")), "text_model.embeddings.token_embedding.weight"
    change_weights(folder / ENCODER, lambda weights: weights | {name: torch.cat([weights[name], weights[name][:1]])})
    edit(folder / "text_encoder" / "config.json", vocab_size=num + 1)
    with pytest.raises(BadInput, match=f"vocab_size = {num + 1} is not supported: {num}, for all tokens"):
        load_teacher(folder)
    edit(folder / "tokenizer" / "added_tokens.json", **{"<cat-toy>": num})
    assert num in load_teacher(folder).tokenizer(["a <cat-toy>"])[0].tolist()


@pytest.mark.parametrize("write", [
    with_old_attention_names, without_the_text_encoders_prefix, in_shards, as_fp16_variant, in_whole_precision,
    with_a_scheduler_that_clips, with_values_that_mean_the_same, with_parts_that_nobody_needs, saved_by_todays_library,
    with_an_added_token])
def test_a_folder_written_otherwise_is_the_same_teacher(tiny, copy, write):
    write(copy)
    teacher, condition = load_teacher(copy), tiny.encode([*PROMPTS[:1], ""])
    assert teacher.fingerprint == tiny.fingerprint
    assert torch.equal(teacher.encode([*PROMPTS[:1], ""])["text"], condition["text"])
    assert torch.equal(teacher.denoise(EPS, 900, 3.0, **condition), tiny.denoise(EPS, 900, 3.0, **condition))
    assert torch.equal(teacher.decode(EPS), tiny.decode(EPS))


def test_precision_of_the_passes_and_shape_of_the_samples_are_free(tiny, tmp_path):
    assert load_teacher("tiny", dtype=torch.bfloat16).fingerprint == tiny.fingerprint
    folder = copy_tiny(tmp_path / "t", "pixel")
    edit(folder / "unet" / "config.json", sample_size=[16, 32], act_fn="swish")
    teacher = load_teacher(folder)
    assert teacher.shape == (3, 16, 32)
    assert teacher.denoise(noise([0], teacher.shape), 500, **teacher.encode(["bag"])).shape == (1, 3, 16, 32)


# --------------------------------------------------------------------------------------------- folders that are refused
@pytest.mark.parametrize("part, path, change, message", [
    ("", "unet/config.json", {"act_fn": "mish"}, "act_fn = 'mish' is not supported: 'silu'"),
    ("", "unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim it is a student, not a teacher"),
    ("", "vae/config.json", {"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, "'AttnUpDecoderBlock2D' is not"),
    ("", "text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
    ("", "tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, "_embeddings = 77 is not .*: 10+ or more"),
    ("", "tokenizer/added_tokens.json", {"<cat-toy>": NUM_TOKENS}, f"vocab_size = {NUM_TOKENS} is not"),
    ("", "model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "'AutoencoderTiny'.* supported: AutoencoderKL"),
    ("", "model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "text_encoder_2 = .* is not"),
    ("", "model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, "_class_name = .* is not supported: UNet2DModel"),
    ("pixel", "model_index.json", {"unet": ["diffusers", "UNet2DModel"], "vae": ["diffusers", "AutoencoderKL"]},
     "a UNet2DModel on latents is not supported"),
    ("pixel", "model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "vqvae = .*'VQModel'.* is not supported"),
    ("pixel", "model_index.json", {"id2label": ["cat"]}, r"id2label = \['cat'\] is not supported"),
    ("pixel", "scheduler/scheduler_config.json", {"beta_start": None}, "beta_start = None is not supported"),
    ("pixel", "scheduler/scheduler_config.json", {"clip_sample": "no"}, "clip_sample = 'no' is not supported"),
    ("pixel", "unet/config.json", {"sample_size": [32]}, r"sample_size = \[32\] is not supported"),
    ("pixel", "unet/config.json", {"num_class_embeds": "11"}, "num_class_embeds = '11' is not supported")])
def test_a_value_that_a_folder_must_not_have_is_named_with_its_file(tmp_path, part, path, change, message):
    folder = copy_tiny(tmp_path / "t", part)
    edit(folder / path, **change)
    with pytest.raises(BadInput, match=f"^{folder}.*{message}"):
        load_teacher(folder)


@pytest.mark.parametrize("change, message", [
    ({"conv_in.bias": None}, "missing conv_in.bias"), ({"extra": torch.zeros(1)}, "unexpected extra"),
    ({"conv_in.bias": torch.zeros(3)}, r"conv_in.bias is \(3,\), not \(64,\)")])
def test_weights_that_do_not_fit_are_named(copy, change, message):
    change_weights(copy / UNET, lambda old: {name: w for name, w in (old | change).items() if w is not None})
    with pytest.raises(BadInput, match=message):
        load_teacher(copy)


def test_truncated_and_pickled_weights_and_latents_without_an_index_are_named(copy, tmp_path):
    (copy / "vae" / WEIGHTS).write_bytes((copy / "vae" / WEIGHTS).read_bytes()[:5000])
    with pytest.raises(BadInput, match="vae.*is not a whole safetensors file"):
        load_teacher(copy)
    (copy / UNET).rename(copy / "unet" / f"{STEM}.bin")
    with pytest.raises(BadInput, match=f"{STEM}.bin is a pickle"):
        load_teacher(copy)
    latent = copy_tiny(tmp_path / "latent", "pixel")
    (latent / "model_index.json").unlink()
    edit(latent / "vqvae" / "config.json")
    with pytest.raises(BadInput, match="on latents is not supported"):
        load_teacher(latent)


# ---------------------------------------------------------------------------------------------- rounding, decoding
@pytest.mark.parametrize("name, prompts, dtypes", [
    ("tiny", PROMPTS, ["bfloat16", "float32"]), ("tiny-pixel", ["ankle boot"], ["bfloat16", "float32"]),
    pytest.param("tiny", PROMPTS * 4, ["bfloat16", "float16", "float32"], marks=pytest.mark.slow),
    pytest.param("tiny-pixel", ["ankle boot", "coat"] * 4, ["bfloat16", "float16", "float32"], marks=pytest.mark.slow)])
def test_rounded_networks_stay_within_their_bound(name, prompts, dtypes):
    """RMS error against float64, over the RMS: of f, times 15 at T by 1 / alpha_T, and of the bootstrap target.
    One teacher predicts epsilon, the other v."""
    whole = load_teacher(name, dtype=torch.float64).unet

    def predictions(dtype):
        """f and the bootstrap target at three times; the student is float32, and under autocast as in training."""
        teacher, wide = load_teacher(name, dtype=dtype), torch.float64 if dtype == torch.float64 else torch.float32
        assert teacher.unet.conv_in.weight.dtype == dtype
        assert torch.equal(teacher.unet.conv_out.weight, whole.conv_out.weight.to(wide))    # never rounded
        eps, condition = noise(range(len(prompts)), teacher.shape).to(wide), teacher.encode(prompts)
        condition["w"] = torch.full((len(eps),), 3.0)
        student, found, schedule = new_student(teacher, 600, 3.0), [], teacher.schedule
        student.network.to(wide)
        for t in (1000, 500, 40):
            found.append(teacher.denoise(eps, t, **condition))
            times = torch.full((len(eps),), t)
            with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype.itemsize == 2):
                y_t = student(eps, times, **condition)
                f = teacher.denoise(add_noise(y_t, eps, times, schedule), times, **condition)
                f = heun_mean(f, y_t, teacher.denoise, eps, times, times - 40, schedule, **condition)
                found.append(signal_step(y_t, f, times, times - 40, schedule))
        assert all(f.dtype == wide for f in found)
        return found

    exact = predictions(torch.float64)
    for dtype in dtypes:
        bound = {"bfloat16": 0.04, "float16": 0.005, "float32": 1e-5}[dtype]
        for a, b in zip(predictions(getattr(torch, dtype)), exact):
            assert ((a - b).square().mean() / b.square().mean()).sqrt() < bound


def test_decoding_in_parts_changes_nothing(tiny):
    latents = noise(range(300), tiny.shape)                 # 256 at once
    whole = tiny.decode(latents)
    assert torch.allclose(whole[250:], tiny.decode(latents[250:]), atol=1e-5) and len(whole) == 300
