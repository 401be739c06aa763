"""A Stable Diffusion as one dict of tensors, under the names of the original checkpoints: what single-file tools read.

    tensors = single_file(unet, vae, text_encoder, config)  # three state dicts, the dict of the U-Net's config.json
    save_file(tensors, "model.safetensors")

The names are those of the modules in CompVis/stable-diffusion and, for the text encoder of SD 2.x, in
mlfoundations/open_clip. No value changes. Shapes change in the attention of the VAE and of OpenCLIP only.
"""

import re

import torch

# The U-Net's modules outside its levels, {ours: theirs}, with the dot that ends a module's name. Their numbers count
# the entries of an nn.Sequential, of which the SiLUs have no weights.
UNET = {"conv_in.": "input_blocks.0.0.", "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.", "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.", "mid_block.resnets.1.": "middle_block.2.",
        "conv_norm_out.": "out.0.", "conv_out.": "out.2."}

# The layers of its resnets. Those of its transformers have the same names in both layouts.
RESNET = {"norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1.",
          "norm2.": "out_layers.0.", "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection."}

# Parts of the VAE's names, replaced in this order.
VAE = {"mid_block.resnets.0.": "mid.block_1.", "mid_block.resnets.1.": "mid.block_2.",
       "mid_block.attentions.0.": "mid.attn_1.", "down_blocks.": "down.", "up_blocks.": "up.", "resnets.": "block.",
       "downsamplers.0.": "downsample.", "upsamplers.0.": "upsample.", "conv_shortcut.": "nin_shortcut.",
       "conv_norm_out.": "norm_out.", "group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.",
       "to_out.0.": "proj_out."}

# Parts of the text encoder's names in SD 2.x, replaced in this order. q_proj stands for q_proj, k_proj and v_proj.
OPEN_CLIP = {"text_model.embeddings.position_embedding.weight": "positional_embedding",
             "text_model.embeddings.token_embedding.": "token_embedding.", "text_model.final_layer_norm.": "ln_final.",
             "text_model.encoder.layers.": "transformer.resblocks.", "layer_norm": "ln_",
             "self_attn.q_proj.": "attn.in_proj_", "self_attn.": "attn.", "fc1.": "c_fc.", "fc2.": "c_proj."}


def replaced(name, parts):
    """A name with its parts {ours: theirs} replaced, one after the other."""
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name


def unet_modules(config):
    """{our module: theirs} of the U-Net of a config. The original numbers the modules that give a skip (input_blocks)
    and those that take one (output_blocks) through all levels. An attention has the number of the resnet before it. An
    upsampler takes no skip, and has the number of the last resnet of its level."""
    modules, levels = dict(UNET), range(len(config["block_out_channels"]))
    layers = config.get("layers_per_block", 2)
    layers = [layers for _ in levels] if isinstance(layers, int) else layers

    n = 1                                                   # input_blocks.0 is conv_in, which gives the first skip
    for level in levels:
        for j in range(layers[level]):
            modules[f"down_blocks.{level}.resnets.{j}."] = f"input_blocks.{n}.0."
            modules[f"down_blocks.{level}.attentions.{j}."] = f"input_blocks.{n}.1."
            n += 1
        modules[f"down_blocks.{level}.downsamplers.0.conv."] = f"input_blocks.{n}.0.op."
        n += 1

    n = 0
    for block, (level, kind) in enumerate(zip(reversed(levels), config["up_block_types"])):
        for j in range(layers[level] + 1):
            modules[f"up_blocks.{block}.resnets.{j}."] = f"output_blocks.{n}.0."
            modules[f"up_blocks.{block}.attentions.{j}."] = f"output_blocks.{n}.1."
            n += 1
        place = 2 if "Attn" in kind else 1                  # after the attention, if there is one
        modules[f"up_blocks.{block}.upsamplers.0."] = f"output_blocks.{n - 1}.{place}."
    return modules


def original_unet(unet, config):
    """The U-Net's tensors by their original names."""
    modules, tensors = unet_modules(config), {}
    for name, tensor in unet.items():
        module = next(known for known in modules if name.startswith(known))
        layer = name.removeprefix(module)
        if ".resnets." in module:
            layer = replaced(layer, RESNET)
        tensors[modules[module] + layer] = tensor
    return tensors


def original_vae(vae):
    """The VAE's tensors by their original names. The original counts the decoder's levels from the full resolution,
    too, and its attention's projections (C, C) are convolutions (C, C, 1, 1)."""
    tensors, last = {}, max(int(level) for name in vae for level in re.findall(r"up_blocks\.(\d+)", name))
    for name, tensor in vae.items():
        if ".to_" in name and name.endswith("weight"):
            tensor = tensor[:, :, None, None]
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{last - int(match[1])}", name)
        tensors[replaced(name, VAE)] = tensor
    return tensors


def open_clip(text):
    """The text encoder's tensors by OpenCLIP's names, where queries, keys and values are one matrix (3 * D, D)."""
    tensors = {}
    for name, tensor in text.items():
        if ".q_proj." in name:
            tensor = torch.cat([text[name.replace("q_proj", proj)] for proj in ("q_proj", "k_proj", "v_proj")])
        if ".k_proj." not in name and ".v_proj." not in name:
            tensors[replaced(name, OPEN_CLIP)] = tensor
    return tensors


def single_file(unet, vae, text_encoder, config):
    """{name: tensor} as in the original checkpoints of Stable Diffusion 1.x or, if the text is 1024 wide, of 2.x.
    `unet`, `vae`, `text_encoder`: {name: tensor} under the names of model.py. `config`: the U-Net's published one.
    Such a file has no place for the schedule, for what the U-Net predicts, for the numbers of heads and groups, and for
    the scale of the latents. Its readers have configs of their own for these, or take Stable Diffusion's."""
    parts = {"model.diffusion_model.": original_unet(unet, config), "first_stage_model.": original_vae(vae)}
    if text_encoder["text_model.final_layer_norm.weight"].shape == (1024,):
        parts["cond_stage_model.model."] = open_clip(text_encoder)
    else:
        parts["cond_stage_model.transformer."] = text_encoder
    return {part + name: tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
