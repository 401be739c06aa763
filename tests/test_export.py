"""What tools.export writes, opened by the stock pipelines of the reference library.

- An exported student makes sample.py's images, to 1 of 255: of text, of pixels, of a range of guidance, from one file.
- It has the teacher's config and keys; its schedule ends at the student's input time, whatever the betas.
- A LoRA of full rank makes the teacher the student; one of a lower rank says how far off it is.
- Its README.md has lines of code that run. A push uploads the whole folder; a failed one says what to do.
- A graph of ONNX makes the same image from noise and token ids, or from a class.
- A single file has the names, shapes and numbers of tensors of the original files, and diffusers reads all of them
  back, of models with SD 1.x's and 2.x's configs.
"""

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import CHECKPOINTS, COSINE, DDPM, PROMPTS, SD, TINY, ZERO_SNR, copy_tiny, new_schedule, slow
import tools.export
from model import VAE, TextEncoder, UNet
from plumbing.files import read_json, write_json
from plumbing.images import noise
from plumbing.weights import STEM, WEIGHTS, init_on_meta, read_tensors, remap_key, weight_files
from student import load_student, new_student, save_student
from teacher import load_teacher
from tools.export import truncate_schedule
from tools.single_file import single_file

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
diffusers.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

UNET = f"unet/{WEIGHTS}"


def random_student(folder, family, guidance=3.0, size=8, rank=0):
    """A student with random weights, or random additions of a rank, of a small teacher with a published model's config
    and schedule. The teacher is in folder/teacher; its text encoder and VAE are tiny's."""
    config = read_json(CHECKPOINTS / family / "unet" / "config.json")
    config |= {"block_out_channels": [c // 8 for c in config["block_out_channels"]], "norm_num_groups": 8,
               "sample_size": size}
    if "cross_attention_dim" in config:
        config["cross_attention_dim"] = 64
        copy_tiny(folder / "teacher")
        (folder / "teacher" / UNET).unlink()
    else:
        guidance = 1.0
    write_json(folder / "teacher" / "unet" / "config.json", config)
    write_json(folder / "teacher" / "scheduler" / "scheduler_config.json",
               read_json(CHECKPOINTS / family / "scheduler" / "scheduler_config.json"))
    torch.manual_seed(0)
    save_file(train_at_random(UNet(config)).state_dict(), folder / "teacher" / UNET)
    teacher = load_teacher(folder / "teacher")
    T = teacher.schedule.T
    i = T if teacher.schedule.prediction == "v_prediction" else round(0.6 * T)
    student = new_student(teacher, i, guidance, rank)
    train_at_random(student.network, but=("conv_in.", "conv_out."))
    save_student(folder / "student", student)
    return folder / "student"


@torch.no_grad()
def train_at_random(network, but=()):
    """Change every matrix at random; of guidance only the slow features, as training does."""
    for name, p in network.own_parameters().items():
        if name.startswith(but):
            continue
        if "cond_proj" in name:
            p[:, 100:128] += 0.1 * torch.randn_like(p[:, 100:128])
        elif p.ndim > 1:
            p += 0.3 * torch.randn_like(p) / p[0].numel() ** 0.5
    return network


def pixels(images):
    return np.stack([np.asarray(image).astype(int) for image in images])


def sample(call, out, student, *options):
    """sample.py's images from the seed 0 on."""
    code, _, error = call("sample", "--student", student, *options, "--out", out)
    assert code == 0, error
    return pixels([Image.open(path) for path in sorted(out.glob("*.png"), key=lambda path: path.stem[-6:])])


def export(call, out, student, *options):
    code, printed, error = call("tools.export", "--student", student, "--out", out, *options)
    assert code == 0, error
    return printed


def run_card(folder):
    """The names that the first lines of code in a card define."""
    names = {}
    exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    return names


def one_step(pipeline, **arguments):
    """A pipeline's images from the noises of seeds 0 and 1."""
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pixels(pipeline(num_inference_steps=1, generator=generator, **arguments).images)


# Layers of LoRAs that all programs look for: sd-scripts and stable-diffusion.cpp take what is in these modules alone
KNOWN_TO_ALL = r"lora_unet_(down_blocks_\d+|mid_block|up_blocks_\d+)_(resnets|attentions|(down|up)samplers)_\d+_"
TEXT = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
PIPE = {"prompt": PROMPTS, "guidance_scale": 1.0}


@pytest.mark.parametrize("family, rank", [
    ("tiny", 0), ("sd21-768-v", 0), slow("sd21-base", 0), slow("sd15", 0),
    ("sd21-base", 4), slow("sd21-768-v", 4), slow("sd15", 4)])
def test_a_student_of_text_is_exported_as_a_model_and_as_a_lora(call, tmp_path, family, rank):
    """Also one that was trained as a LoRA."""
    student = TINY / "student" if family == "tiny" else random_student(tmp_path, family, rank=rank)
    printed = export(call, tmp_path / "x", student, "--lora", "full")
    expected = sample(call, tmp_path / "own", student, *TEXT)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "x")
    assert abs(one_step(pipeline, **PIPE) - expected).max() <= 1
    teacher = load_student(student).teacher.folder
    theirs, ours = load_file(teacher / UNET), load_file(tmp_path / "x" / UNET)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert read_json(tmp_path / "x" / "unet" / "config.json") == read_json(teacher / "unet" / "config.json")

    pytest.importorskip("peft")
    assert "; 0 at most" in printed
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / "x", subfolder="scheduler")
    pipeline.load_lora_weights(tmp_path / "x", weight_name="pytorch_lora_weights.safetensors")
    assert abs(one_step(pipeline, **PIPE) - expected).max() <= 1
    layers = load_file(tmp_path / "x" / tools.export.LORA)              # tiny's student learned its outer layers, too
    assert all(re.match(KNOWN_TO_ALL, key) or family == "tiny" and "unet_conv_" in key for key in layers)
    code, _, error = call("train", "--teacher", tmp_path / "x", "--dry-run", "--out", tmp_path / "run")
    assert code == 2 and "is a student that tools.export wrote" in error


@pytest.mark.parametrize("config", [
    SD, {**DDPM, "prediction_type": "v_prediction"}, COSINE, ZERO_SNR,
    {"trained_betas": [0.001 + 0.0001 * k for k in range(100)], "num_train_timesteps": 100}])
@pytest.mark.parametrize("share", [0.6, 1.0])
def test_the_schedule_ends_at_the_input_time_for_any_betas(config, share):
    schedule = new_schedule(config)
    i = round(share * schedule.T)
    scheduler, ratio = diffusers.EulerDiscreteScheduler.from_config(truncate_schedule(config, i)), schedule.lam(i).exp()
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [schedule.timestep(i)]
    assert ratio.isinf() or scheduler.sigmas[0].item() == pytest.approx(ratio.item(), rel=1e-4)


def test_a_lora_of_low_rank_says_how_far_off_it_is(call, tmp_path):
    said = [export(call, tmp_path / rank, TINY / "student", "--lora", rank) for rank in ("1", "64")]
    low, high = [float(text.split("differ from the student's by ")[1].split()[0]) for text in said]
    assert low > 3 and high < low / 2
    assert f"by {high:.2g} of 255" in (tmp_path / "64" / "README.md").read_text()


def test_a_range_of_guidance_stays_an_input_of_both_pipelines_or_is_folded(call, tmp_path):
    student = random_student(tmp_path, "sd21-base", [2.0, 8.0])
    export(call, tmp_path / "x", student)
    export(call, tmp_path / "x5", student, "--guidance", 5)
    own = {w: sample(call, tmp_path / f"own{w}", student, *TEXT, "--guidance", w) for w in (2.0, 5.0, 8.0)}
    for kind in (diffusers.LatentConsistencyModelPipeline, diffusers.StableDiffusionPipeline):
        pipeline = kind.from_pretrained(tmp_path / "x")
        for w, expected in own.items():
            assert abs(one_step(pipeline, prompt=PROMPTS, guidance_scale=w) - expected).max() <= 1
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "x5")
    assert abs(one_step(pipeline, **PIPE) - own[5.0]).max() <= 1 and abs(own[5.0] - own[8.0]).max() > 10


def test_the_card_of_a_student_that_is_not_square_runs(call, tmp_path):
    student = random_student(tmp_path, "sd15", [2.0, 8.0], [8, 12])
    export(call, tmp_path / "x", student)
    names = run_card(tmp_path / "x")
    assert names["image"].size == (48, 32)


def test_an_unconditional_pixel_student_opens_as_a_ddim_pipeline(call, tmp_path):
    student = random_student(tmp_path, "ddpm-cifar10-32")
    export(call, tmp_path / "x", student)
    expected = sample(call, tmp_path / "own", student, "--num", 2)
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "x")
    assert abs(one_step(pipeline, batch_size=2) - expected).max() <= 1


def test_the_card_of_a_class_student_says_how_it_is_used(call, tmp_path):
    """No pipeline has classes of pixels, so the card's own lines are run."""
    export(call, tmp_path / "x", TINY / "pixel")
    expected = sample(call, tmp_path / "own", TINY / "pixel", "--label", "t-shirt")
    torch.manual_seed(0)
    names = run_card(tmp_path / "x")
    image = ((names["image"][0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).int().numpy()
    assert abs(image - expected[0]).max() <= 1


def test_half_precision_and_the_small_decoder_are_carried_along(call, tmp_path):
    export(call, tmp_path / "x", TINY / "student", "--precision", "fp16", "--decoder", TINY / "decoder")
    assert {tensor.dtype for tensor in load_file(tmp_path / "x" / UNET).values()} == {torch.float16}
    expected = sample(call, tmp_path / "own", TINY / "student", *TEXT, "--decoder", TINY / "decoder")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "x", torch_dtype=torch.float32)
    assert type(pipeline.vae) is diffusers.AutoencoderTiny
    error = abs(one_step(pipeline, **PIPE) - expected)
    assert (error**2).mean() ** 0.5 < 1                     # of 255: rounding of the weights


def test_the_single_file_opens_as_the_original_does(call, tmp_path):
    export(call, tmp_path / "x", TINY / "student", "--single-file")
    configs = shutil.copytree(tmp_path / "x", tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    pipeline = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "x" / "x.safetensors"), config=str(configs), local_files_only=True)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / "x", subfolder="scheduler")
    expected = sample(call, tmp_path / "own", TINY / "student", *TEXT)
    assert abs(one_step(pipeline, **PIPE) - expected).max() <= 1


def test_without_its_packages_a_graph_is_refused_before_anything_is_written(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)          # an import of it fails
    code, _, error = call("tools.export", "--onnx", "--out", tmp_path / "x")
    assert code == 2 and "pip install onnx onnxscript" in error and not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family, options, given", [
    ("tiny", (), {}), ("tiny", ("--precision", "fp16", "--decoder", TINY / "decoder"), {}),
    ("pixel", (), {}), ("sd21-base", (), {"guidance": [2.0, 8.0]}), ("sd15", (), {"size": [8, 12]}),
    ("sd21-768-v", (), {"rank": 4}), ("ddpm-cifar10-32", (), {})])
def test_one_graph_makes_the_same_image_without_pytorch(call, tmp_path, monkeypatch, family, options, given):
    """The lines of the card's section make its inputs; the noise is sample.py's."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    shipped = {"tiny": TINY / "student", "pixel": TINY / "pixel"}
    student = shipped.get(family) or random_student(tmp_path, family, **given)
    monkeypatch.chdir(tmp_path)
    export(call, Path("x"), student, "--onnx", *options)
    inputs = {"label": ("--label", "t-shirt"), "prompt": ("--prompt", PROMPTS[0]), None: ()}
    loaded = load_student(student)
    decoder = options if "--decoder" in options else ()
    [expected] = sample(call, tmp_path / "own", student, *inputs[loaded.teacher.condition_type], *decoder)

    card, names = Path("x/README.md").read_text(), {}
    exec(card.split("As one graph of ONNX")[1].split("```python\n")[1].split("```")[0], names)
    assert names["image"].shape == expected.shape and names["image"].dtype == np.uint8
    feed = names["inputs"] | {"eps": noise([0], loaded.teacher.shape).numpy()}
    if "tokens" in feed:
        feed["tokens"] = loaded.teacher.tokenizer([PROMPTS[0]]).numpy()
    [image] = runtime.InferenceSession("x/student.onnx").run(None, feed)[0]
    assert abs(image.astype(int) - expected).max() <= 1


def test_workflows_are_written_for_the_single_file_and_the_lora(call, tmp_path):
    """Those that ran in ComfyUI, with the file, its size, prediction and noise level filled in."""
    student = random_student(tmp_path, "sd21-768-v", size=[8, 16])
    export(call, tmp_path / "x", student, "--single-file", "--lora", 4)
    for name, file, model in (("workflow", "x.safetensors", "1"), ("workflow_lora", "the_teacher.safetensors", "11")):
        nodes = read_json(tmp_path / "x" / f"{name}.json")
        inputs = {node["class_type"]: node["inputs"] for node in nodes.values()}
        assert inputs["CheckpointLoaderSimple"]["ckpt_name"] == file and inputs["KarrasScheduler"]["steps"] == 1
        assert inputs["KarrasScheduler"]["sigma_max"] == pytest.approx(14.6146, abs=1e-3)           # at T
        sampling = inputs["ModelSamplingDiscrete"]
        assert (sampling["sampling"], sampling["model"]) == ("v_prediction", [model, 0])
        assert (inputs["EmptyLatentImage"]["width"], inputs["EmptyLatentImage"]["height"]) == (64, 32)
        links = [value for node in inputs.values() for value in node.values() if isinstance(value, list)]
        assert links and all(number in nodes for number, _ in links) and ("11" in nodes) == (model == "11")


def test_an_export_is_pushed_to_the_hub_or_the_error_says_what_to_do(call, tmp_path, hub, monkeypatch):
    """The upload is the client's own; what it is told is tested, and what follows where the hub refuses it."""
    told, api = [], tools.export.HfApi
    there = [".gitattributes"]
    monkeypatch.setattr(tools.export, "HfApi", lambda: SimpleNamespace(
        create_repo=lambda repo, **rest: told.append((repo, rest["private"])), list_repo_files=lambda repo: there,
        upload_folder=lambda **rest: told.append(rest) or SimpleNamespace(commit_url="me/boot/commit/1")))
    printed = export(call, tmp_path / "x", TINY / "student", "--push", "me/boot", "--private")
    assert told[0] == ("me/boot", True) and "me/boot/commit" in printed
    assert told[1]["repo_id"] == "me/boot" and told[1]["folder_path"] == tmp_path / "x"
    assert 'from_pretrained("me/boot"' in (tmp_path / "x" / "README.md").read_text()
    monkeypatch.setattr(tools.export, "hf_hub_download", lambda *_: tmp_path / "theirs")
    for name, text, expected in (("model_index.json", "", 2), ("scheduler/scheduler_config.json", "{}", 2),
                                 ("README.md", '{"_student_of": "tiny"}', 0)):      # at last an older export
        there.append(name)
        (tmp_path / "theirs").write_text(text)
        code, _, error = call("tools.export", "--out", tmp_path / name, "--push", "me/boot")
        assert code == expected and (not code or "has files that tools.export did not write" in error), error
    monkeypatch.setattr(tools.export, "HfApi", api)
    monkeypatch.setattr("fake_hub.Handler.do_POST", lambda self: self.answer(403), raising=False)
    code, _, error = call("tools.export", "--out", tmp_path / "y", "--push", "me/boot")
    assert code == 2 and "log in with `hf auth login`" in error and (tmp_path / "y" / "README.md").exists()


# ------------------------------------------------------------------------------------------- the original files' names
NETWORKS = {"unet": (UNet, STEM), "vae": (VAE, STEM), "text_encoder": (TextEncoder, "model")}
VOCABULARY = {"vocab_size": 593}                            # tiny's, to keep the embedding small
SMALL = {
    "sd15": {
        "unet": {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8, "cross_attention_dim": 32},
        "vae": {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8},
        "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, **VOCABULARY}},
    "sd21-base": {
        "unet": {"block_out_channels": [32, 64], "attention_head_dim": [2, 4],
                 "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
                 "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
        "vae": {"block_out_channels": [32, 32], "layers_per_block": 1, "down_block_types": ["DownEncoderBlock2D"] * 2,
                "up_block_types": ["UpDecoderBlock2D"] * 2},
        "text_encoder": {"intermediate_size": 64, "num_hidden_layers": 2, **VOCABULARY}}}


def model(name, folder):
    """The state dicts of tiny, or of a small random model with most of a published one's configs. The folder gets these
    configs and tiny's tokenizer and scheduler but no weights, which diffusers would take from there if it could."""
    for path in copy_tiny(folder).rglob("*.safetensors"):
        path.unlink()
    parts = {}
    for part, (network, stem) in NETWORKS.items():
        if name == "tiny":
            tensors = read_tensors(weight_files(TINY / part, stem))
        else:
            config = read_json(CHECKPOINTS / name / part / "config.json") | SMALL[name][part]
            write_json(folder / part / "config.json", config)
            shapes = init_on_meta(network, config, part).state_dict()
            tensors = {key: torch.randn(p.shape) for key, p in shapes.items()}      # no two norms or biases are equal
        parts[part] = {remap_key(key): p for key, p in tensors.items()}
    return parts


@pytest.mark.parametrize("name", ["tiny", *SMALL])
def test_diffusers_reads_every_tensor_back(name, tmp_path):
    parts, file = model(name, tmp_path / name), tmp_path / "model.safetensors"
    save_file(single_file(**parts, config=read_json(tmp_path / name / "unet" / "config.json")), file)
    pipeline = diffusers.StableDiffusionPipeline.from_single_file(
        str(file), config=str(tmp_path / name), local_files_only=True)
    for part, ours in parts.items():
        theirs = {remap_key(key): p for key, p in getattr(pipeline, part).state_dict().items()}
        theirs = {key: p for key, p in theirs.items() if not key.endswith("position_ids")}
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], p) for key, p in ours.items())


PUBLISHED = {                                               # names of the original checkpoints, and their shapes
    "model.diffusion_model.input_blocks.3.0.op.weight": [320, 320, 3, 3],
    "model.diffusion_model.output_blocks.8.2.conv.weight": [640, 640, 3, 3],
    "first_stage_model.encoder.mid.attn_1.q.weight": [512, 512, 1, 1],
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": [128, 256, 1, 1]}
PUBLISHED_TOO = {
    "sd15": {"cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.k_proj.weight": [768, 768]},
    "sd21-base": {"cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": [3072, 1024],
                  "cond_stage_model.model.ln_final.bias": [1024]}}


def published(name):
    """The arguments of single_file for a published model, without values."""
    parts = {part: {} for part in NETWORKS}
    for file, manifest in read_json(CHECKPOINTS / name / "manifest.json").items():
        parts[file.split("/")[0]] = {remap_key(key): torch.empty(shape, device="meta") for key, (_, shape)
                                     in manifest["tensors"].items() if not key.endswith("position_ids")}
    return {**parts, "config": read_json(CHECKPOINTS / name / "unet" / "config.json")}


@pytest.mark.parametrize("name, texts", [("sd15", 12 * 16 + 4), ("sd21-base", 23 * 12 + 4)])
def test_names_and_shapes_are_the_published_ones(name, texts):
    shapes = {key: list(p.shape) for key, p in single_file(**published(name)).items()}
    known = PUBLISHED | PUBLISHED_TOO[name]
    assert {key: shapes.get(key) for key in known} == known
    counts = [sum(key.startswith(part) for key in shapes) for part in ("model.", "first_stage_model.", "cond_stage_")]
    assert counts == [686, 248, texts] and sum(counts) == len(shapes)
