"""The networks against the reference libraries: embedded checkpoints, small random configs of every kind."""

import json

import pytest
import torch
from safetensors.torch import load_file

from plumbing.files import read_json
from plumbing.hub import TINY
from conftest import CHECKPOINTS
from model import TextEncoder, UNet, VAE
from plumbing.images import noise
from teacher import load_teacher

diffusers = pytest.importorskip("diffusers", reason="the reference library diffusers is not installed")
transformers = pytest.importorskip(
    "transformers", reason="the reference library transformers is not installed")

SMALL = {"in_channels": 4, "out_channels": 4, "block_out_channels": [32, 64], "layers_per_block": 1,
         "norm_num_groups": 8, "cross_attention_dim": 24, "attention_head_dim": 4, "sample_size": 8,
         "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
         "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < tolerance


def shaken(module):
    """Random weights everywhere: zero-initialised layers and unit norms would hide errors."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("change", [
    {}, {"use_linear_projection": True, "attention_head_dim": [2, 8]},
    {"layers_per_block": 2, "flip_sin_to_cos": False, "freq_shift": 1},
    {"block_out_channels": [16, 32, 48],
     "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
     "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
     "transformer_layers_per_block": 2, "norm_eps": 1e-6},
    {"class_embed_type": "timestep"}, {"class_embed_type": "timestep", "time_cond_proj_dim": 256}])
@pytest.mark.parametrize("size", [(8, 8), (10, 6)])
def test_unet_equals_diffusers(change, size):
    config = {**SMALL, **change}
    theirs = shaken(diffusers.UNet2DConditionModel(**config))
    ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict())
    x, t, text = torch.randn(3, 4, *size), torch.tensor([0, 400, 999]), torch.randn(3, 77, 24)
    target = torch.tensor([0, 17, 1000]) if "class_embed_type" in change else None
    w = torch.tensor([1.0, 3.0, 7.5]) if "time_cond_proj_dim" in change else None
    embedding = None
    if w is not None:
        pipeline = diffusers.LatentConsistencyModelPipeline
        embedding = pipeline.get_guidance_scale_embedding(None, w - 1, embedding_dim=256)
    with torch.no_grad():
        expected = theirs(x, t, text, class_labels=target, timestep_cond=embedding).sample
        assert_close(ours(x, t, text, target, w), expected)


PIXEL = {"_class_name": "UNet2DModel", "in_channels": 3, "out_channels": 3, "block_out_channels": [16, 32, 32],
         "layers_per_block": 2, "norm_num_groups": 8, "attention_head_dim": 8, "sample_size": 16,
         "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
         "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]}
DDPM = {"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
        "norm_eps": 1e-6}


@pytest.mark.parametrize("change", [
    {}, DDPM, {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 7},
    {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4}, {"add_attention": False},
    {"num_class_embeds": 7, **DDPM}, {"class_embed_type": "timestep"}])
@pytest.mark.parametrize("size", [(16, 16), (20, 12)])
def test_pixel_unet_equals_diffusers(change, size):
    config = {**PIXEL, **change}
    theirs = shaken(diffusers.UNet2DModel(**{k: v for k, v in config.items() if k != "_class_name"}))
    ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict())
    x, t = torch.randn(3, 3, *size), torch.tensor([0, 400, 999])
    label = torch.tensor([0, 3, 6]) if "num_class_embeds" in change else None
    target = torch.tensor([0, 17, 1000]) if "class_embed_type" in change else None
    with torch.no_grad():
        expected = theirs(x, t, class_labels=target if label is None else label).sample
        assert_close(ours(x, t, target=target, label=label), expected)


@pytest.mark.parametrize("name", ["sd21-base", "sd21-768-v", "sd15", "ddpm-cifar10-32", "ddpm-256",
                                  "ddpm-butterflies-128"])
def test_published_configs_an_eighth_as_wide_equal_diffusers(name):
    config = json.loads((CHECKPOINTS / name / "unet" / "config.json").read_text())
    config |= {"block_out_channels": [c // 8 for c in config["block_out_channels"]], "norm_num_groups": 8}
    text = torch.randn(2, 77, 32) if "cross_attention_dim" in config else None
    if text is not None:
        config["cross_attention_dim"] = 32
    theirs = shaken(getattr(diffusers, config["_class_name"]).from_config(config))
    ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict())
    x, t = torch.randn(2, config["in_channels"], 32, 32), torch.tensor([10, 999])
    with torch.no_grad():
        assert_close(ours(x, t, text), theirs(x, t, *([] if text is None else [text])).sample)


def test_bench_compares_the_two(call):
    code, out, error = call("tools.bench", "--repeat", 1)
    assert code == 0 and out.count("ours    load") == out.count("theirs  load") == 3, error
    assert all(float(part.split()[0]) < 1e-5 for part in out.split("difference ")[1:])


def test_a_loop_on_the_reference_libraries_trains_the_same_student(run, tmp_path):
    """tools.bench --step: steps of BOOT, matched ones, and one of both."""
    done = run("-m", "tools.bench", "--step", "--batch", 8, "--steps", 6, "--json",
               tmp_path / "step.json", "--", "--micro-batch", 4)
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "step.json")
    assert found["difference"] < 1e-5 and set(found["rows"]) == {"BOOT", "matched", "both"}
    assert all(0 < row["outside"] < 1 and row["ratio"] > 0 and row["FLOP/s"] > 1e9 for row in found["rows"].values())
    done = run("-m", "tools.bench", "--step", "--steps", 6, "--", "--match", 0)
    assert done.returncode == 2 and "--alone" in done.stderr
    done = run("-m", "tools.bench", "--sampling", "--repeat", 1, "--json", tmp_path / "sampling.json")
    assert done.returncode == 0 and read_json(tmp_path / "sampling.json")["one step"]["ratio"] > 1, done.stderr


def test_text_unet_with_scale_shift_equals_diffusers():
    config = {**SMALL, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 5}
    theirs = shaken(diffusers.UNet2DConditionModel(**config))
    ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict())
    x, t, text, label = torch.randn(2, 4, 8, 8), torch.tensor([0, 9]), torch.randn(2, 7, 24), torch.tensor([1, 4])
    with torch.no_grad():
        assert_close(ours(x, t, text, label=label), theirs(x, t, text, class_labels=label).sample)


def test_checkpointing_changes_no_gradient():
    config = {**PIXEL, "num_class_embeds": 3}
    ours, x, t, label = UNet(config), torch.randn(2, 3, 16, 16), torch.tensor([3, 900]), torch.tensor([0, 2])
    gradients = []
    for ours.checkpointing in (False, True):
        ours.zero_grad()
        ours(x, t, label=label).square().sum().backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("change", [{}, {"layers_per_block": 2, "block_out_channels": [16, 32, 32]}])
def test_vae_equals_diffusers(change):
    config = {"block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8,
              "latent_channels": 4, "in_channels": 3, "out_channels": 3}
    config |= change
    config["down_block_types"] = ["DownEncoderBlock2D"] * len(config["block_out_channels"])
    config["up_block_types"] = ["UpDecoderBlock2D"] * len(config["block_out_channels"])
    theirs = shaken(diffusers.AutoencoderKL(**config))
    ours = VAE(config).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        assert_close(ours.moments(images)[0], posterior.mean)
        assert_close(ours.moments(images)[1], posterior.logvar)
        assert_close(ours.decode(posterior.mean * ours.scale), theirs.decode(posterior.mean).sample)


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_text_encoder_equals_transformers(act):
    config = {"hidden_act": act, "hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4,
              "num_hidden_layers": 3, "vocab_size": 500, "max_position_embeddings": 77,
              "layer_norm_eps": 1e-5, "eos_token_id": 499, "bos_token_id": 498, "pad_token_id": 0}
    theirs = shaken(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)))
    ours = TextEncoder(config).eval()
    # transformers 5 drops the prefix in memory
    prefix = "" if next(iter(theirs.state_dict())).startswith("text_model.") else "text_model."
    ours.load_state_dict({prefix + k: v for k, v in theirs.state_dict().items() if "position_ids" not in k})
    ids = torch.randint(500, (2, 77))
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).last_hidden_state)


def test_embedded_networks_equal_the_reference(tiny):
    unet = diffusers.UNet2DConditionModel.from_pretrained(TINY / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(TINY / "vae")
    text_encoder = transformers.CLIPTextModel.from_pretrained(TINY / "text_encoder").float()
    ids = tiny.tokenizer(["a red ankle boot on a yellow background", ""])
    x, t, images = torch.randn(2, 4, 8, 8), torch.tensor([999, 20]), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        text = text_encoder(ids).last_hidden_state
        assert_close(tiny.text_encoder(ids), text)
        assert_close(tiny.unet(x, t, text), unet.float()(x, t, text).sample)
        assert_close(tiny.vae.moments(images)[0], vae.float().encode(images).latent_dist.mean)
        assert_close(tiny.vae.decode(x), vae.decode(x / vae.config.scaling_factor).sample)


def test_embedded_teacher_opens_in_diffusers_and_paints_our_picture(tiny):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red ankle boot on a yellow background", "a blue coat on a white background"]
    eps = noise([0, 1], tiny.shape)
    theirs = pipe(prompts, latents=eps.clone(), guidance_scale=3.0, num_inference_steps=10,
                  output_type="pt").images * 2 - 1
    ours = tiny.decode(tiny.solve(eps, tiny.schedule.grid(10), w=3.0, **tiny.encode(prompts)))
    assert (ours - theirs).abs().max() < 1e-3


@torch.no_grad()
def test_embedded_pixel_teacher_paints_the_picture_of_diffusers():
    """Guided and clipped; theirs takes the noise from the clipped prediction only if asked to."""
    teacher = load_teacher("tiny-pixel")
    unet = diffusers.UNet2DModel.from_pretrained(teacher.unet_folder).float()
    scheduler = diffusers.DDIMScheduler.from_pretrained(teacher.folder / "scheduler", timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    eps, condition = noise([0, 1], teacher.shape), teacher.encode(["bag", "dress"])
    x, labels = eps, torch.cat([condition["label"], teacher.uncond["label"].expand(2)])
    for t in scheduler.timesteps:
        out, uncond = unet(torch.cat([x, x]), t, class_labels=labels).sample.chunk(2)
        x = scheduler.step(uncond + 2 * (out - uncond), t, x, use_clipped_model_output=True).prev_sample
    assert (teacher.solve(eps, teacher.schedule.grid(10), w=2.0, **condition) - x).abs().max() < 1e-3


def test_shipped_student_opens_in_diffusers():
    unet = diffusers.UNet2DConditionModel.from_pretrained(TINY / "student").float()
    ours = UNet(json.loads((TINY / "student" / "config.json").read_text()))
    weights = load_file(TINY / "student" / "diffusion_pytorch_model.safetensors")
    ours.load_state_dict({k: v.float() for k, v in weights.items()})
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([399, 399])
    text, target = torch.randn(2, 77, 64), torch.tensor([0, 1000])
    with torch.no_grad():
        assert_close(ours(x, t, text, target), unet(x, t, text, class_labels=target).sample)
