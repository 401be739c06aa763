"""The networks against the reference libraries.

- U-Nets of text and of pixels with random weights compute what diffusers' do, at any size and with a student's inputs;
  so do all networks of published configs (test_configs.py, an eighth as wide) and the embedded ones.
- The embedded teachers make the image that diffusers' pipelines make, and the shipped student opens in diffusers.
- Gradient checkpointing changes no gradient.
- A training loop on the reference libraries trains the same student (dev.bench).
"""

import pytest
import torch

from conftest import PROMPTS, TINY, slow
from model import UNet
from plumbing.files import read_json
from plumbing.images import noise
from plumbing.weights import load_module
from reference import SAME, RUN, diffusers, outcome, same, transformers
from teacher import load_teacher

TEXT = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "block_out_channels": [32, 64],
        "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 24, "attention_head_dim": 4,
        "sample_size": 8, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
PIXEL = {"_class_name": "UNet2DModel", "in_channels": 3, "out_channels": 3, "block_out_channels": [16, 32, 32],
         "layers_per_block": 2, "norm_num_groups": 8, "attention_head_dim": 8, "sample_size": 16,
         "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
         "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]}
DDPM = {"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
        "norm_eps": 1e-6}


@pytest.mark.parametrize("size", [(8, 8), (10, 6)])
@pytest.mark.parametrize("change", [
    {}, {"use_linear_projection": True, "attention_head_dim": [2, 8]},
    {"layers_per_block": 2, "flip_sin_to_cos": False, "freq_shift": 1},
    {"block_out_channels": [16, 32, 48],
     "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
     "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
     "transformer_layers_per_block": 2, "norm_eps": 1e-6},
    {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 5},
    {"class_embed_type": "timestep"}, {"class_embed_type": "timestep", "time_cond_proj_dim": 256}])
def test_unet_equals_diffusers(change, size):
    assert outcome("unet", TEXT | change, size=size) == SAME


@pytest.mark.parametrize("size", [(16, 16), (20, 12)])
@pytest.mark.parametrize("change", [
    {}, DDPM, {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 7},
    {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4}, {"add_attention": False},
    {"num_class_embeds": 7, **DDPM}, {"class_embed_type": "timestep"}])
def test_pixel_unet_equals_diffusers(change, size):
    assert outcome("unet", PIXEL | change, size=size) == SAME


def test_checkpointing_changes_no_gradient():
    network, x, t = UNet(PIXEL | {"num_class_embeds": 3}), torch.randn(2, 3, 16, 16), torch.tensor([3, 900])
    gradients = []
    for network.checkpointing in (False, True):
        network.zero_grad()
        network(x, t, label=torch.tensor([0, 2])).square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@torch.no_grad()
def test_embedded_networks_equal_the_reference(tiny):
    """The teacher's parts, and the shipped student."""
    student = load_module(UNet, TINY / "student", "cpu", torch.float32)
    for part, ours, their_class, folder, how in (
            ("unet", tiny.unet, diffusers.UNet2DConditionModel, "unet", {"size": (8, 8)}),
            ("unet", student, diffusers.UNet2DConditionModel, "student", {"size": (8, 8)}),
            ("vae", tiny.vae, diffusers.AutoencoderKL, "vae", {"size": 64}),
            ("text_encoder", tiny.text_encoder, transformers.CLIPTextModel, "text_encoder", {})):
        expected, run = RUN[part](their_class.from_pretrained(TINY / folder).float(), **how)
        assert all(map(same, run(ours), expected)), folder


def test_embedded_teacher_opens_in_diffusers_and_makes_our_image(tiny):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    eps = noise([0, 1], tiny.shape)
    theirs = pipe(PROMPTS, latents=eps.clone(), guidance_scale=3.0, num_inference_steps=10,
                  output_type="pt").images * 2 - 1
    ours = tiny.decode(tiny.solve(eps, tiny.schedule.grid(10), w=3.0, **tiny.encode(PROMPTS)))
    assert (ours - theirs).abs().max() < 1e-3


@torch.no_grad()
def test_embedded_pixel_teacher_makes_the_image_of_diffusers():
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


@pytest.mark.parametrize("batch", [2, slow(8)])
def test_a_loop_on_the_reference_libraries_trains_the_same_student(call, tmp_path, batch):
    """dev.bench --step: steps of BOOT, matched ones, and one of both."""
    code, _, error = call("dev.bench", "--step", "--batch", batch, "--steps", 6, "--json", tmp_path / "step.json", "--",
                          "--micro-batch", batch // 2)
    found = read_json(tmp_path / "step.json")
    assert code == 0 and found["difference"] < 1e-5 and set(found["rows"]) == {"BOOT", "matched", "both"}, error


@pytest.mark.slow
def test_bench_compares_loading_passes_and_sampling(call, tmp_path):
    code, out, error = call("dev.bench", "--repeat", 1)
    differences = [float(part.split()[0]) for part in out.split("difference ")[1:]]
    assert code == 0 and len(differences) == 3 and max(differences) < 1e-5, error
    code, _, error = call("dev.bench", "--sampling", "--repeat", 1, "--json", tmp_path / "sampling.json")
    assert code == 0 and read_json(tmp_path / "sampling.json")["one step"]["ratio"] > 1, error
    code, out, error = call("dev.bench", "--lora", 4, "--repeat", 1)
    assert code == 0 and out.count("backward") == 2, error
    code, _, error = call("dev.bench", "--step", "--steps", 6, "--", "--match", 0)
    assert code == 2 and "--alone" in error
