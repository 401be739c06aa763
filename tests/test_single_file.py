"""tools.single_file writes the original checkpoints' names.

- diffusers reads every tensor of a single file back, of tiny and of models with SD 1.x's and 2.x's configs.
- Published models get the names, shapes and numbers of tensors of their original files.
- What is no Stable Diffusion is refused, naming the key or the tensor.
"""

import pytest
import torch
from safetensors.torch import save_file

from conftest import CHECKPOINTS, copy_tiny
from model import VAE, TextEncoder, UNet
from plumbing.files import BadInput, read_json, write_json
from plumbing.hub import TINY
from plumbing.weights import STEM, init_on_meta, read_tensors, remap_key, weight_files
from tools.single_file import single_file, unet_modules

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
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
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
    "model.diffusion_model.time_embed.2.bias": [1280],
    "model.diffusion_model.input_blocks.3.0.op.weight": [320, 320, 3, 3],
    "model.diffusion_model.input_blocks.11.0.out_layers.3.weight": [1280, 1280, 3, 3],
    "model.diffusion_model.middle_block.2.emb_layers.1.weight": [1280, 1280],
    "model.diffusion_model.output_blocks.2.1.conv.weight": [1280, 1280, 3, 3],
    "model.diffusion_model.output_blocks.8.2.conv.weight": [640, 640, 3, 3],
    "model.diffusion_model.output_blocks.11.0.skip_connection.weight": [320, 640, 1, 1],
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias": [320],
    "first_stage_model.encoder.mid.attn_1.q.weight": [512, 512, 1, 1],
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": [128, 256, 1, 1]}
PUBLISHED_TOO = {
    "sd15": {"model.diffusion_model.middle_block.1.proj_in.weight": [1280, 1280, 1, 1],
             "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.k_proj.weight": [768, 768]},
    "sd21-base": {"model.diffusion_model.middle_block.1.proj_in.weight": [1280, 1280],
                  "cond_stage_model.model.positional_embedding": [77, 1024],
                  "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": [3072, 1024],
                  "cond_stage_model.model.transformer.resblocks.0.mlp.c_proj.weight": [1024, 4096],
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


def test_levels_may_differ_in_depth():
    modules = unet_modules({"block_out_channels": [32, 64], "layers_per_block": [1, 2],
                            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]})
    assert modules["down_blocks.0.downsamplers.0.conv."] == "input_blocks.2.0.op."
    assert modules["down_blocks.1.resnets.1."] == "input_blocks.4.0."
    assert modules["up_blocks.0.upsamplers.0."] == "output_blocks.2.2."
    assert modules["up_blocks.1.resnets.1."] == "output_blocks.4.0."


@pytest.mark.parametrize("key, value", [
    ("_class_name", "UNet2DModel"), ("time_cond_proj_dim", 256), ("class_embed_type", "timestep"),
    ("num_class_embeds", 10), ("class_embedding.linear_1.weight", None), ("time_embedding.cond_proj.weight", None)])
def test_what_is_not_stable_diffusion_is_refused(key, value):
    arguments, message = published("sd15"), f"{key} = {value!r} is not supported"
    if value is None:
        arguments["unet"][key], message = torch.zeros(1), f"{key} can't be written to a single file"
    else:
        arguments["config"][key] = value
    with pytest.raises(BadInput, match=message):
        single_file(**arguments)
