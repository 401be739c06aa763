"""Teachers, and the untrained student and critic, on the embedded teachers' trained weights.

- A teacher is frozen and deterministic, guided in one batch, linear in w, led away from a negative prompt.
- Student and critic equal the teacher before training, and can leave it; refinement goes on along the trajectory.
- A saved student is the same student; one of another teacher is refused.
- Folders as others write them (old names, shards, half precision, other libraries) are the same teacher.
- What a folder must not hold is refused in one sentence that names it: values, parts, tensors, files.
- Networks of published configs have exactly the published tensors; weights in the file's own precision are not copied.
- An unconditional teacher clips; a class-conditional one takes names and numbers, and guides; a student starts as each.
  Both go from training to image.
- Rounded networks stay within their bounds; decoding in parts changes nothing.
"""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import CHECKPOINTS, PROMPTS, TINY, copy_tiny, edit, slow
from dev.synthesise import synthesise
from model import VAE, TextEncoder, UNet
from plumbing.files import BadInput, read_json
from plumbing.images import noise
from plumbing.weights import OLD_NAMES, STEM, WEIGHTS, read_tensors, remap_key, visiting, weight_files
from signal_ode import add_noise, heun_mean, signal_step, solve
from student import Student, load_student, new_critic, new_student, save_student
from teacher import load_teacher

UNET_FILE, ENCODER_FILE = f"unet/{WEIGHTS}", "text_encoder/model.safetensors"
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


def test_a_part_that_rests_visits_the_device_and_goes_back():
    """Also where its work fails, as when memory runs out."""
    part = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).requires_grad_(False)
    places = [p.data_ptr() for p in part.parameters()]
    for place in (torch.device("cpu"), torch.float64):      # which stands for a device that is not here
        with pytest.raises(RuntimeError), visiting(part, place):
            assert all(place in (p.device, p.dtype) for p in part.parameters())
            raise RuntimeError("out of memory")
        assert [p.data_ptr() for p in part.parameters()] == places
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in part.parameters())


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


@pytest.mark.parametrize("name, guidance", [("tiny", 3.0), ("tiny", [1.0, 8.0]), ("tiny-pixel", 3.0)])
def test_critic_equals_the_unguided_teacher_before_training(name, guidance):
    """And before its prediction is clipped: the critic never clips."""
    teacher = load_teacher(name)
    critic, condition = new_critic(new_student(teacher, 400, guidance)), teacher.encode(["bag", "coat"])
    x_t, t, w = 3 * noise([0, 1], teacher.shape), torch.tensor([10, 500]), torch.tensor([2.0, 5.0])
    h, clip = critic(x_t, t, w, **condition), teacher.clip or torch.inf
    assert torch.equal(h.clamp(-clip, clip), teacher.denoise(x_t, t, **condition)) and h.max() > 1.5
    critic.network.requires_grad_(True)
    critic(x_t, t, w, **condition).square().sum().backward()
    told = isinstance(guidance, list)
    assert not told or critic.network.time_embedding.cond_proj.weight.grad.abs().max() > 0


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


@pytest.mark.parametrize("path, good", [(UNET_FILE, False), (ENCODER_FILE, False), (f"vae/{WEIGHTS}", True)])
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
    change_weights(folder / ENCODER_FILE, lambda old: {name.removeprefix("text_model."): w for name, w in old.items()})


def in_shards(folder):
    weights = load_file(folder / UNET_FILE)
    (folder / UNET_FILE).unlink()
    for k, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
        save_file({n: weights[n] for n in names}, folder / "unet" / f"{STEM}-{k + 1:05}-of-00002.safetensors")
    assert len(weight_files(folder / "unet")) == 2


def with_an_index_beside_a_stale_file(folder):
    """As diffusers, which reads what the index lists; shards may be called anything."""
    weights = load_file(folder / UNET_FILE)
    change_weights(folder / UNET_FILE, lambda old: {name: w + 1 for name, w in old.items()})
    shards = {"first.safetensors": sorted(weights)[::2], "and-more.safetensors": sorted(weights)[1::2]}
    for file, names in shards.items():
        save_file({name: weights[name] for name in names}, folder / "unet" / file)
    edit(folder / "unet" / f"{STEM}.safetensors.index.json",
         weight_map={name: file for file, names in shards.items() for name in names})


def as_fp16_variant(folder):
    (folder / UNET_FILE).rename(folder / "unet" / f"{STEM}.fp16.safetensors")


def in_whole_precision(folder):
    change_weights(folder / UNET_FILE, lambda weights: {name: w.float() for name, w in weights.items()})


def with_a_scheduler_that_clips(folder):
    """As old pipelines say, and diffusers corrects: latents have no bounds."""
    edit(folder / "scheduler" / "scheduler_config.json", clip_sample=True)


def with_values_that_mean_the_same(folder):
    edit(folder / "unet" / "config.json", only_cross_attention=[False, False], cross_attention_dim=[64, 64],
         layers_per_block=[1, 1], sample_size=[8, 8], act_fn="swish")


def with_parts_that_nobody_needs(folder):
    edit(folder / "model_index.json", safety_checker=["x", "StableDiffusionSafetyChecker"], image_encoder=[None, None])


def with_an_added_token(folder):
    """As resize_token_embeddings leaves it. The text encoder may not have it alone."""
    num, name = len(read_json(folder / "tokenizer" / "vocab.json")), "text_model.embeddings.token_embedding.weight"
    change_weights(folder / ENCODER_FILE, lambda old: old | {name: torch.cat([old[name], old[name][:1]])})
    edit(folder / "text_encoder" / "config.json", vocab_size=num + 1)
    with pytest.raises(BadInput, match=f"vocab_size = {num + 1} is not supported: {num}, for all tokens"):
        load_teacher(folder)
    edit(folder / "tokenizer" / "added_tokens.json", **{"<cat-toy>": num})
    assert num in load_teacher(folder).tokenizer(["a <cat-toy>"])[0].tolist()


@pytest.mark.parametrize("write", [
    with_old_attention_names, without_the_text_encoders_prefix, in_shards, with_an_index_beside_a_stale_file,
    as_fp16_variant, in_whole_precision,
    with_a_scheduler_that_clips, with_values_that_mean_the_same, with_parts_that_nobody_needs, with_an_added_token])
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
    ("", "text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
    ("", "tokenizer/added_tokens.json", {"<cat-toy>": NUM_TOKENS}, f"vocab_size = {NUM_TOKENS} is not"),
    ("", "model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "'AutoencoderTiny'.* supported: AutoencoderKL"),
    ("", "model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "text_encoder_2 = .* is not"),
    ("pixel", "model_index.json", {"unet": ["diffusers", "UNet2DModel"], "vae": ["diffusers", "AutoencoderKL"]},
     "a UNet2DModel on latents is not supported"),
    ("pixel", "model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "vqvae = .*'VQModel'.* is not supported"),
    ("pixel", "model_index.json", {"id2label": ["cat"]}, r"id2label = \['cat'\] is not supported"),
    ("pixel", "scheduler/scheduler_config.json", {"clip_sample": "no"}, "clip_sample = 'no' is not supported"),
    ("pixel", "unet/config.json", {"sample_size": [32]}, r"sample_size = \[32\] is not supported")])
def test_a_value_that_a_folder_must_not_have_is_named_with_its_file(tmp_path, part, path, change, message):
    folder = copy_tiny(tmp_path / "t", part)
    edit(folder / path, **change)
    with pytest.raises(BadInput, match=f"^{folder}.*{message}"):
        load_teacher(folder)


@pytest.mark.parametrize("change, message", [
    (lambda file: change_weights(file, lambda old: {"conv_in.bias": old["conv_in.bias"]}), "missing conv_in.weight"),
    (lambda file: change_weights(file, lambda old: old | {"extra": torch.zeros(1)}), "unexpected extra"),
    (lambda file: change_weights(file, lambda old: old | {"conv_in.bias": torch.zeros(3)}), r"conv_in.bias is \(3,\)"),
    (lambda file: change_weights(file, lambda old: {f"_orig_mod.{name}": w for name, w in old.items()}),
     r"compiled module.*missing conv_in.weight; .* more; unexpected _orig_mod.up_"),
    (lambda file: change_weights(file, lambda old: {name.replace(".to_q.", ".to_q.base_layer."): w
                                                    for name, w in old.items()}), r"unload_lora_weights.*base_layer"),
    (lambda file: change_weights(file, lambda old: {"a.lora_A.weight": old["conv_in.bias"]}), "are a LoRA, not"),
    (lambda file: file.write_bytes(file.read_bytes()[:5000]), "is not a whole safetensors file"),
    (lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "Git LFS"),
    (lambda file: file.unlink() or file.symlink_to("gone"), "is missing, or a link that leads nowhere"),
    (lambda file: file.rename(file.with_name(f"{STEM}.non_ema.safetensors")), "non_ema.*: .* another variant has to"),
    (lambda file: file.rename(file.with_name(f"{STEM}-00002-of-00002.safetensors")), "-00001-of-00002.* is missing"),
    (lambda file: edit(file.with_name(f"{STEM}.safetensors.index.json"), weight_map={"a": "b.safetensors"}),
     "b.safetensors is missing"),
    (lambda file: edit(file.with_name(f"{STEM}.safetensors.index.json"), weight_map={}), "index.json lists nothing"),
    (lambda file: save_file({"a": EPS}, file.with_name(f"{STEM}-00001-of-00001.safetensors")), "are of two sets"),
    (lambda file: file.rename(file.with_name(f"{STEM}.bin")), f"only {STEM}.bin: a pickle")])
def test_weights_that_do_not_fit_are_named(copy, change, message):
    change(copy / UNET_FILE)
    with pytest.raises(BadInput, match=f"unet.*{message}"):
        load_teacher(copy)


@pytest.mark.parametrize("part, kind, cosine", [
    ("", "epsilon", None), ("", "v_prediction", "0.999"), ("pixel", "v_prediction", None),
    ("pixel", "epsilon", "0.091")])
def test_a_network_that_predicts_something_else_than_its_config_says_is_told(tmp_path, recwarn, part, kind, cosine):
    """By the cosine of its output for noise with that noise."""
    folder = copy_tiny(tmp_path / "t", part)
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type=kind)
    load_teacher(folder)
    assert [f"prediction_type {kind}" in str(line.message) and f"cosine of {cosine}" in str(line.message)
            for line in recwarn.list] == [True] * bool(cosine)


def test_latents_without_an_index_are_named(tmp_path):
    latent = copy_tiny(tmp_path / "latent", "pixel")
    (latent / "model_index.json").unlink()
    edit(latent / "vqvae" / "config.json")
    with pytest.raises(BadInput, match="on latents is not supported"):
        load_teacher(latent)


# -------------------------------------------------------------------------------------------------- published weights
@pytest.mark.parametrize("name", [path.parent.name for path in sorted(CHECKPOINTS.glob("*/manifest.json"))])
def test_networks_have_exactly_the_published_tensors(name):
    for file, part in read_json(CHECKPOINTS / name / "manifest.json").items():
        folder = file.split("/")[0]
        network = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}[folder]
        with torch.device("meta"):
            ours = network(read_json(CHECKPOINTS / name / folder / "config.json")).state_dict()
        theirs = {remap_key(key): shape for key, (_, shape) in part["tensors"].items() if "position_ids" not in key}
        assert {key: list(p.shape) for key, p in ours.items()} == theirs


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_weights_in_the_files_own_precision_are_not_copied(tmp_path):
    """Loaded and read through, 64 MB are still pages of the file; only what is written to becomes one's own."""
    def own():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    save_file({"a": torch.zeros(2**24)}, tmp_path / "a.safetensors")
    before = own()
    tensor = read_tensors(tmp_path / "a.safetensors", dtype=torch.float32)["a"]
    assert tensor.max() == 0 and own() - before < 8
    tensor += 1
    assert own() - before > 56 and read_tensors(tmp_path / "a.safetensors")["a"].max() == 0


# ----------------------------------------------------------------------------------------------- teachers without text
@pytest.fixture
def pixel(tmp_path):
    """A function: config changes -> the folder of DDPM in small, with random weights, all at the root."""
    def make(**change):
        source, published = tmp_path / "configs", CHECKPOINTS / "ddpm-cifar10-32"
        small = {"sample_size": 16, "norm_num_groups": 8, "block_out_channels": [16, 16, 32, 32], "layers_per_block": 1}
        edit(source / "config.json", **read_json(published / "unet" / "config.json") | small | change)
        edit(source / "scheduler_config.json", **read_json(published / "scheduler" / "scheduler_config.json"))
        synthesise(source, tmp_path / "pixel")
        return tmp_path / "pixel"
    return make


def test_unconditional_teacher_clips_and_student_starts_as_its_equal(pixel):
    teacher = load_teacher(pixel())
    assert teacher.condition_type is None and teacher.shape == (3, 16, 16) and teacher.clip == 1.0
    student, eps = new_student(teacher, 400, 1.0), noise([0, 1], teacher.shape)
    assert teacher.encode(["", ""]) == {} and student.network.config["class_embed_type"] == "timestep"
    assert teacher.denoise(eps, 1000).abs().max() == 1      # 157 times a rounding error, clipped
    with torch.no_grad():
        x = teacher.schedule.sigma(400).float() * eps
        assert torch.equal(student(eps, 7).clamp(-1, 1), teacher.denoise(x, 400))
    with pytest.raises(BadInput, match="no empty condition to lead away from: --guidance 1"):
        new_student(teacher, 400, 3.0)


def test_class_conditional_teacher_takes_names_and_numbers(pixel):
    folder = pixel(num_class_embeds=3, resnet_time_scale_shift="scale_shift")
    edit(folder / "model_index.json", id2label={"0": "cat", "1": "dog", "2": ""})
    teacher = load_teacher(folder)
    assert teacher.condition_type == "label" and teacher.encode(["dog", "0", ""])["label"].tolist() == [1, 0, 2]
    assert teacher.uncond["label"].tolist() == [2]
    with pytest.raises(BadInput, match="has no class 'cow': cat, dog"):
        teacher.encode(["cow"])
    eps, pets = noise([0, 1], teacher.shape), teacher.encode(["cat", "dog"])
    assert not teacher.denoise(eps, 20, **pets).equal(teacher.denoise(eps, 20, **teacher.encode(["dog", "cat"])))
    teacher.clip = None
    f, f_empty = teacher.denoise(eps, 20, **pets), teacher.denoise(eps, 20, **teacher.encode(["", ""]))
    assert torch.allclose(teacher.denoise(eps, 20, 1.5, **pets), f_empty + 1.5 * (f - f_empty), rtol=1e-4, atol=1e-4)
    student = new_student(teacher, 400, [1.0, 2.0])
    with torch.no_grad():
        x = teacher.schedule.sigma(400).float() * eps
        assert torch.equal(student(eps, 0, 1.5, **pets), teacher.denoise(x, 400, **pets))


@pytest.mark.parametrize("classes", [None, 3])
def test_pixel_teacher_from_training_to_image(pixel, call, tmp_path, classes):
    folder, out = pixel(num_class_embeds=classes), tmp_path / "run"
    options = ["--batch", 4, "--ema", 0, "--grad-checkpointing", "--every", 2, "--num-steps", 5]
    code, said, error = call("train", "--teacher", folder, "--out", out, "--steps", 2, *options)
    assert code == 0 and ("--label 0" in said) == bool(classes), error
    assert Image.open(out / "samples" / "step_2.png").size == (8 * 96, 2 * 96)
    named = re.search(r"sample.py (--student.*)", said)[1].split()
    code, said, error = call("sample", *named, "--out", tmp_path / "png", "--num", 2)
    images = [Image.open(path) for path in (tmp_path / "png").iterdir()]
    assert code == 0 and [image.size for image in images] == [(16, 16)] * 2, error
    assert load_student(out).teacher.condition_type == ("label" if classes else None)
    code, said, error = call("train", "--teacher", folder, "--out", out, "--steps", 3, *options)
    assert code == 0 and "resuming at step 2" in said, error                # without an average to restore
    for command, message in ((("sample", "--student", out), "takes neither --prompt nor --label"),
                             (("train", "--teacher", folder, "--out", tmp_path / "told"), "is unconditional")):
        code, _, error = call(*command, "--prompts", "none.txt" if classes else "README.md")
        assert code == 2 and ("none.txt is missing" if classes else message) in error


# ---------------------------------------------------------------------------------------------- rounding, decoding
@pytest.mark.parametrize("name, prompts, dtypes", [
    ("tiny", PROMPTS, ["bfloat16", "float32"]), ("tiny-pixel", ["ankle boot"], ["bfloat16", "float32"]),
    slow("tiny", PROMPTS * 4, ["bfloat16", "float16", "float32"]),
    slow("tiny-pixel", ["ankle boot", "coat"] * 4, ["bfloat16", "float16", "float32"])])
def test_rounded_networks_stay_within_their_bound(name, prompts, dtypes):
    """RMS error against float64, over the RMS: of f, times 15 at T by 1 / alpha_T, and of the bootstrap target.
    One teacher predicts epsilon, the other v."""
    whole = load_teacher(name, dtype=torch.float64).unet

    @torch.no_grad()
    def predictions(dtype):
        """f and the bootstrap target at three times; the student is float32, and under autocast as in training."""
        teacher, wide = load_teacher(name, dtype=dtype), torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(teacher.unet.conv_out.weight, whole.conv_out.weight.to(wide))    # never rounded
        eps, condition = noise(range(len(prompts)), teacher.shape).to(wide), teacher.encode(prompts) | {"w": 3.0}
        student, found, schedule = new_student(teacher, 600, 3.0), [], teacher.schedule
        student.network.to(wide)
        for t in torch.tensor([1000, 500, 40])[:, None].expand(-1, len(eps)):
            found.append(teacher.denoise(eps, t, **condition))
            with torch.autocast("cpu", dtype, enabled=dtype.itemsize == 2):
                y_t = student(eps, t, **condition)
                f = teacher.denoise(add_noise(y_t, eps, t, schedule), t, **condition)
                f = heun_mean(f, y_t, teacher.denoise, eps, t, t - 40, schedule, **condition)
                found.append(signal_step(y_t, f, t, t - 40, schedule))
        assert teacher.unet.conv_in.weight.dtype == dtype and all(f.dtype == wide for f in found)
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
