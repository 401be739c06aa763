"""The networks of Stable Diffusion and DDPM, written by hand: U-Net, VAE and CLIP's text encoder.

    unet = UNet(config)                                     # the dict of the published config.json
    out = unet(x, t, text=text)                             # the raw output for noisy samples x at timestep indices t

Every module carries the name that it has in the published checkpoints, so that their state dicts load as they are
(plumbing.weights.load_module). Shapes: B samples, C channels, h x w pixels, N = h * w, L tokens, D the text's width.
"""

import functools
import math
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from plumbing.configs import (TEXT_CONFIG, TINY_VAE_CONFIG, TINY_VAE_LISTS, VAE_CONFIG, check, is_pixel,
                              read_config, read_unet_config, target_slot)


def sinusoid(t, dim, flip=False, shift=0):
    """Sinusoids of times t (B,) -> (B, dim), float32: sines, then cosines (Vaswani et al. 2017); flipped if asked."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - shift))
    angle = t.float()[:, None] * frequency                                                  # (B, dim / 2)
    return torch.cat([angle.cos(), angle.sin()] if flip else [angle.sin(), angle.cos()], 1)


def guidance_sinusoid(w, dim, fastest=None):
    """Embedding of guidance scales w (B,) -> (B, dim), as in latent consistency models (Luo et al. 2023).
    `fastest`: features that turn by more radians from w to w + 1 are zero instead. For neighbouring scales they are as
    good as random, and make a student's pictures jump; their weights, which start at zero, then stay there.
    Angles reach thousands, where float32 rounding shows: so the operations are in the order of the reference."""
    frequency = torch.exp(torch.arange(dim // 2, device=w.device) * -(math.log(10000) / (dim // 2 - 1)))
    angle = (w.float() - 1)[:, None] * 1000 * frequency                                     # (B, dim / 2)
    features = torch.cat([angle.sin(), angle.cos()], 1)
    return features if fastest is None else features * (1000 * frequency <= fastest).repeat(2)


class Embedding(nn.Embedding):
    """nn.Embedding that skips its random values on the meta device: drawing them there costs a second of imports."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class LowRank:
    """What Linear and Conv2d have in common: y = base(x) + up(down(x)) (LoRA, Hu et al. 2021, arXiv 2106.09685). In a
    network with a lora_rank the base is frozen and the two others learn: `down`, to so many channels, and `up`. Their
    product, of the size of the base, is never made. What they add is not scaled (alpha = rank). Without a lora_rank
    there is the base alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.down = self.up = None

    def forward(self, x):
        y = super().forward(x)
        return y if self.up is None else y + self.up(self.down(x))


class Linear(LowRank, nn.Linear):
    """nn.Linear that may have additions of low rank."""

    def add_low_rank(self, rank):
        self.down = nn.Linear(self.in_features, rank, bias=False)
        self.up = nn.Linear(rank, self.out_features, bias=False)


class Conv2d(LowRank, nn.Conv2d):
    """nn.Conv2d that may have additions of low rank."""

    def add_low_rank(self, rank):
        self.down = nn.Conv2d(self.in_channels, rank, self.kernel_size, self.stride, self.padding, bias=False)
        self.up = nn.Conv2d(rank, self.out_channels, 1, bias=False)


class TimeEmbedding(nn.Module):
    """Sinusoids (B, c_in) to the embedding that every resnet sees, (B, c_emb); a student's may add the guidance."""

    def __init__(self, c_in, c_emb, c_guidance=None):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_emb)
        self.linear_2 = nn.Linear(c_emb, c_emb)
        self.cond_proj = nn.Linear(c_guidance, c_in, bias=False) if c_guidance else None

    def forward(self, sin, guidance=None):
        sin = sin.to(self.linear_1.weight.dtype)
        if guidance is not None:
            sin = sin + self.cond_proj(guidance.to(sin.dtype))
        return self.linear_2(F.silu(self.linear_1(sin)))


class Resnet(nn.Module):
    """Two convolutions on a residual stream, x (B, c_in, h, w) -> (B, c_out, h, w); emb (B, c_emb) enters between.
    c_emb None: no emb, as in the VAE. `scale_shift`: emb scales and shifts the second norm (Dhariwal & Nichol 2021)
    instead of being added before it."""

    def __init__(self, c_in, c_out, c_emb, groups, eps, scale_shift=False):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.scale_shift = scale_shift
        self.time_emb_proj = Linear(c_emb, 2 * c_out if scale_shift else c_out) if c_emb else None
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))                                   # (B, c_out, h, w)
        if self.time_emb_proj is not None:
            emb = self.time_emb_proj(F.silu(emb))[:, :, None, None]             # (B, c_out or twice that, 1, 1)
        if emb is None:
            h = self.norm2(h)
        elif self.scale_shift:
            scale, shift = emb.chunk(2, 1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        h = self.conv2(F.silu(h))                                               # (B, c_out, h, w)
        return h + self.conv_shortcut(x)


class Downsample(nn.Module):
    """Half the height and width, x (B, C, h, w) -> (B, C, h / 2, w / 2).
    Padding 0 stands for one pixel at the right and at the bottom, as the VAEs and the first DDPMs were trained."""

    def __init__(self, channels, padding):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x):
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """The nearest pixel, then a convolution: x (B, C, h, w) -> (B, C, *size), or (B, C, 2 * h, 2 * w)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        size = size or [2 * n for n in x.shape[2:]]
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def attend(q, k, v, heads, causal=False):
    """Multi-head attention of queries (B, N, C) to keys and values (B, L, C) -> (B, N, C)."""
    q, k, v = (rearrange(z, "b n (h d) -> b h n d", h=heads) for z in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=causal), "b h n d -> b n (h d)")


class Attention(nn.Module):
    """Multi-head attention of x (B, N, C) to a context (B, L, D), which may be x -> (B, N, C)."""

    def __init__(self, channels, context, heads, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(channels, channels, bias)
        self.to_k = Linear(context, channels, bias)
        self.to_v = Linear(context, channels, bias)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x, context):
        return self.to_out[0](attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class PixelAttention(Attention):
    """Self-attention over the pixels of x (B, C, h, w), with a norm and biases of its own: the VAE's and DDPM's."""

    def __init__(self, channels, heads, groups, eps):
        super().__init__(channels, channels, heads, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps) if groups else nn.Identity()

    def forward(self, x, text=None):
        h = rearrange(self.group_norm(x), "b c h w -> b (h w) c")               # (B, N, C)
        h = super().forward(h, h)                                               # (B, N, C)
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])           # (B, C, h, w)


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of its other half (Shazeer 2020), (B, N, C) -> (B, N, hidden)."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.proj = Linear(channels, 2 * hidden)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text and a feed-forward network, each on the residual stream x (B, N, C)."""

    def __init__(self, channels, heads, c_text):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, c_text, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = nn.Module()                   # its published list has a dropout of zero in the middle
        self.ff.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels)])

    def forward(self, x, text):
        h = self.norm1(x)                                                       # (B, N, C)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff.net[2](self.ff.net[0](self.norm3(x)))


class Transformer(nn.Module):
    """A transformer over the pixels of x (B, C, h, w) that also attends to text (B, L, D) -> (B, C, h, w)."""

    def __init__(self, channels, heads, depth, c_text, groups, linear):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in = Linear(channels, channels) if linear else Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, c_text) for _ in range(depth))
        self.proj_out = Linear(channels, channels) if linear else Conv2d(channels, channels, 1)

    def forward(self, x, text):
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")                     # (B, N, C)
        h = project(self.proj_in, h)
        for block in self.transformer_blocks:
            h = block(h, text)                                                  # (B, N, C)
        h = project(self.proj_out, h)
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])           # (B, C, h, w)


def project(layer, z):
    """A linear layer (SD 2.x) or a 1x1 convolution (SD 1.x) on z (B, N, C): one product, two shapes of the weight."""
    y = F.linear(z, layer.weight.flatten(1), layer.bias)
    if layer.up is None:
        return y
    return y + F.linear(F.linear(z, layer.down.weight.flatten(1)), layer.up.weight.flatten(1))


class Block(nn.Module):
    """One resolution of a network, the unit to checkpoint and to shard. Its lists may be empty."""

    def __init__(self, resnets, attentions=(), downsamplers=(), upsamplers=()):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList(downsamplers)
        self.upsamplers = nn.ModuleList(upsamplers)


class DownBlock(Block):
    """x (B, c_in, h, w) -> (B, c_out, h / 2, w / 2), and the list of its outputs that the up blocks concatenate."""

    def forward(self, x, emb, text=None):
        skips = []
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, emb)                                                  # (B, c_out, h, w)
            if self.attentions:
                x = self.attentions[j](x, text)                                 # (B, c_out, h, w)
            skips.append(x)
        for downsample in self.downsamplers:                                    # one, or none at the lowest resolution
            x = downsample(x)                                                   # (B, c_out, h / 2, w / 2)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    """x (B, C, h, w) -> (B, C, h, w): resnet, attention if there is one, resnet. The VAE has no emb and no text."""

    def forward(self, x, emb=None, text=None):
        x = self.resnets[0](x, emb)
        for attention in self.attentions:
            x = attention(x, text)
        return self.resnets[1](x, emb)


class UpBlock(Block):
    """x (B, c_in, h, w) and a skip for each resnet -> (B, c_out, *size), the size of the block above."""

    def forward(self, x, skips, size, emb, text=None):
        for j, resnet in enumerate(self.resnets):
            x = torch.cat([x, skips[j]], 1)                                     # (B, c_in + c_skip, h, w)
            x = resnet(x, emb)                                                  # (B, c_out, h, w)
            if self.attentions:
                x = self.attentions[j](x, text)                                 # (B, c_out, h, w)
        for upsample in self.upsamplers:                                        # one, or none at the full resolution
            x = upsample(x, size)                                               # (B, c_out, *size)
        return x


class VAEBlock(Block):
    """x (B, c_in, h, w) -> (B, c_out, h', w'): resnets, then the sampler if there is one, of encoder or decoder."""

    def forward(self, x):
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x

# --------------------------------------------------------------------------------------------------------- U-Net
def unet_attention(c, level, groups):
    """The attention of a level of the U-Net of settings c: over pixels, or a transformer over pixels and text."""
    channels = c["block_out_channels"][level]
    pixel, head = is_pixel(c), c["attention_head_dim"]
    head = (head or channels) if pixel else head[level]     # pixel: channels a head. text: heads, under a wrong name
    check("attention_head_dim", c["attention_head_dim"], f"a divisor of {channels} channels", channels % head == 0)
    if pixel:
        return PixelAttention(channels, channels // head, groups, c["norm_eps"])
    return Transformer(channels, head, c["transformer_layers_per_block"][level], c["cross_attention_dim"][level],
                       groups, linear=c["use_linear_projection"])


class UNet(nn.Module):
    """The denoiser: UNet2DConditionModel of Stable Diffusion 1.x and 2.x, or UNet2DModel of the DDPM family.
    `config`: the published dict. With num_class_embeds it sees a class. A student is the same network with an embedding
    of the target time ("class_embed_type": "timestep", or "target_embed_type" beside labels) and, with
    time_cond_proj_dim, of the guidance scale. Raises ValueError for what is not supported."""

    def __init__(self, config):
        super().__init__()
        pixel = is_pixel(config)
        c = self.settings = read_unet_config(config)
        self.config = dict(config)
        channels, levels = c["block_out_channels"], range(len(c["block_out_channels"]))
        layers = [c["layers_per_block"] for _ in levels] if pixel else c["layers_per_block"]
        groups, eps, scale_shift = c["norm_num_groups"], c["norm_eps"], c["resnet_time_scale_shift"] == "scale_shift"
        check("block_out_channels", channels, "an even first one, for sines and cosines of the time",
              channels[0] % 2 == 0)
        c_emb = c["time_embedding_dim"] or 4 * channels[0]
        resnet = functools.partial(Resnet, c_emb=c_emb, groups=groups, eps=eps, scale_shift=scale_shift)
        self.sinusoid = functools.partial(sinusoid, dim=channels[0], flip=c["flip_sin_to_cos"], shift=c["freq_shift"])
        self.checkpointing = False              # True: recompute each block in the backward pass, to save memory

        self.conv_in = nn.Conv2d(c["in_channels"], channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0], c_emb, c["time_cond_proj_dim"])
        if c["num_class_embeds"]:
            self.class_embedding = Embedding(c["num_class_embeds"], c_emb)
        if c["class_embed_type"] or c["target_embed_type"]:
            self.add_module(f"{target_slot(c)}_embedding", TimeEmbedding(channels[0], c_emb))

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        c_x, c_skips = channels[0], [channels[0]]
        for level, kind in zip(levels, c["down_block_types"]):
            resnets = [resnet(c_x if j == 0 else channels[level], channels[level]) for j in range(layers[level])]
            attentions = [unet_attention(c, level, groups) for _ in resnets] if "Attn" in kind else []
            c_x = channels[level]
            downsamplers = [Downsample(c_x, c["downsample_padding"])] if level < levels[-1] else []
            self.down_blocks.append(DownBlock(resnets, attentions, downsamplers))
            c_skips += [c_x for _ in (*resnets, *downsamplers)]

        # A UNet2DModel with scale_shift has a norm in its middle attention only if attn_norm_num_groups is given.
        mid_groups = (c["attn_norm_num_groups"] or (None if scale_shift else groups)) if pixel else groups
        check("attn_norm_num_groups", mid_groups, f"a divisor of {c_x} channels",
              mid_groups is None or c_x % mid_groups == 0)
        attentions = [unet_attention(c, -1, mid_groups)] if c.get("add_attention", True) else []
        self.mid_block = MidBlock([resnet(c_x, c_x), resnet(c_x, c_x)], attentions)

        for level, kind in zip(reversed(levels), c["up_block_types"]):
            resnets = []
            for _ in range(layers[level] + 1):
                resnets.append(resnet(c_x + c_skips.pop(), channels[level]))
                c_x = channels[level]
            attentions = [unet_attention(c, level, groups) for _ in resnets] if "Attn" in kind else []
            self.up_blocks.append(UpBlock(resnets, attentions, upsamplers=[Upsample(c_x)] if level > 0 else []))

        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps)
        self.conv_out = nn.Conv2d(channels[0], c["out_channels"], 3, padding=1)
        for layer in list(self.modules()):                  # those outside the blocks are torch's own
            if c["lora_rank"] and isinstance(layer, LowRank):
                layer.add_low_rank(c["lora_rank"])

    def forward(self, x, t, text=None, target=None, guidance=None, label=None):
        """Raw output (B, out, h, w) for x (B, in, h, w) at timestep indices t (B,); float32 in the last layers.
        `text`: (B, L, D), or `label`: (B,) int64, as the network was trained. `target`: (B,), the time that a student
        shall predict. `guidance`: (B,), its guidance scale. The config says which of them the network has."""
        emb = self.embed(t, target, guidance, label)                            # (B, 4 * c_0)
        x = self.conv_in(x.to(self.conv_in.weight.dtype))                       # (B, c_0, h, w)
        skips = [x]
        for block in self.down_blocks:
            x, block_skips = self.run(block, x, emb, text)                      # (B, c, h / 2, w / 2)
            skips += block_skips
        x = self.run(self.mid_block, x, emb, text)                              # (B, c, h, w)
        for block in self.up_blocks:
            block_skips = [skips.pop() for _ in block.resnets]                  # the latest first
            size = skips[-1].shape[2:] if skips else None                       # of the next skip: h or w may be odd
            x = self.run(block, x, block_skips, size, emb, text)                # (B, c, *size)
        with torch.autocast(x.device.type, enabled=False):                      # see signal_ode.clean_prediction
            x = F.silu(self.conv_norm_out(x.to(self.conv_out.weight.dtype)))    # (B, c_0, h, w)
            return self.conv_out(x)                                             # (B, out, h, w)

    def embed(self, t, target, guidance, label):
        """The sum of the embeddings of time, guidance, label and target time, (B,) each -> (B, 4 * c_0)."""
        c = self.settings
        if c["time_cond_proj_dim"]:
            guidance = guidance_sinusoid(guidance, c["time_cond_proj_dim"], c["time_cond_fastest"])
        emb = self.time_embedding(self.sinusoid(t), guidance)
        if c["num_class_embeds"]:
            emb = emb + self.class_embedding(label)
        if c["class_embed_type"] or c["target_embed_type"]:
            target_embedding = self.get_submodule(f"{target_slot(c)}_embedding")
            emb = emb + target_embedding(self.sinusoid(target))
        return emb

    def own_parameters(self):
        """{name: parameter} of what is this network's own: all of it. With lora_rank, all that its teacher lacks."""
        own = ["*"] if not self.settings["lora_rank"] else [
            "*.down.weight", "*.up.weight", "*.cond_proj.weight", f"{target_slot(self.settings)}_embedding.linear_?.*"]
        return {name: p for name, p in self.named_parameters() if any(fnmatch(name, pattern) for pattern in own)}

    def blocks(self):
        """What is recomputed or sharded as a whole."""
        return (*self.down_blocks, self.mid_block, *self.up_blocks)

    def run(self, block, *inputs):
        """block(*inputs). With checkpointing its activations are not kept but recomputed in the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

# ----------------------------------------------------------------------------------------------------------- VAE
class Encoder(nn.Module):
    """Images (B, 3, H, W) -> mean and log-variance of latents before quant_conv, (B, 2 * c_latent, h, w)."""

    def __init__(self, config):
        super().__init__()
        channels, layers, groups = config["block_out_channels"], config["layers_per_block"], config["norm_num_groups"]
        resnet = functools.partial(Resnet, c_emb=None, groups=groups, eps=1e-6)
        self.conv_in = nn.Conv2d(config["in_channels"], channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        c = channels[0]
        for level, c_out in enumerate(channels):
            resnets = [resnet(c if j == 0 else c_out, c_out) for j in range(layers)]
            downsamplers = [Downsample(c_out, padding=0)] if level < len(channels) - 1 else []
            self.down_blocks.append(VAEBlock(resnets, downsamplers=downsamplers))
            c = c_out
        self.mid_block = MidBlock([resnet(c, c), resnet(c, c)], [PixelAttention(c, 1, groups, eps=1e-6)])
        self.conv_norm_out = nn.GroupNorm(groups, c, 1e-6)
        self.conv_out = nn.Conv2d(c, 2 * config["latent_channels"], 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)                                                     # (B, c_0, H, W)
        for block in self.down_blocks:
            x = block(x)                                                        # (B, c, H / 2, W / 2)
        x = self.mid_block(x)                                                   # (B, c, h, w)
        return self.conv_out(F.silu(self.conv_norm_out(x)))                     # (B, 2 * c_latent, h, w)


class Decoder(nn.Module):
    """Latents after post_quant_conv (B, c_latent, h, w) -> images (B, 3, H, W)."""

    def __init__(self, config):
        super().__init__()
        channels, layers, groups = config["block_out_channels"], config["layers_per_block"], config["norm_num_groups"]
        resnet = functools.partial(Resnet, c_emb=None, groups=groups, eps=1e-6)
        c = channels[-1]
        self.conv_in = nn.Conv2d(config["latent_channels"], c, 3, padding=1)
        self.mid_block = MidBlock([resnet(c, c), resnet(c, c)], [PixelAttention(c, 1, groups, eps=1e-6)])
        self.up_blocks = nn.ModuleList()
        for level, c_out in reversed(list(enumerate(channels))):
            resnets = [resnet(c if j == 0 else c_out, c_out) for j in range(layers + 1)]
            upsamplers = [Upsample(c_out)] if level > 0 else []
            self.up_blocks.append(VAEBlock(resnets, upsamplers=upsamplers))
            c = c_out
        self.conv_norm_out = nn.GroupNorm(groups, c, 1e-6)
        self.conv_out = nn.Conv2d(c, config["out_channels"], 3, padding=1)

    def forward(self, z):
        x = self.conv_in(z)                                                     # (B, c, h, w)
        x = self.mid_block(x)                                                   # (B, c, h, w)
        for block in self.up_blocks:
            x = block(x)                                                        # (B, c, 2 * h, 2 * w)
        return self.conv_out(F.silu(self.conv_norm_out(x)))                     # (B, 3, H, W)


class VAE(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to latents (B, c_latent, h, w) and back (AutoencoderKL), from its config dict."""

    def __init__(self, config):
        super().__init__()
        c = self.settings = read_config(config, VAE_CONFIG)
        self.scale, channels = c["scaling_factor"], c["latent_channels"]
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def moments(self, images):
        """Mean and log-variance of the unscaled latents, each (B, c_latent, h, w)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, images):
        """Scaled latents, the mean of their distribution."""
        return self.moments(images)[0] * self.scale

    def decode(self, latents):
        """Images, about [-1, 1], of scaled latents."""
        return self.decoder(self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype) / self.scale))

# ------------------------------------------------------------------------------------------------- the small VAE
class TinyBlock(nn.Module):
    """Three convolutions on a residual stream, (B, c, h, w)."""

    def __init__(self, c):
        super().__init__()
        convs = [nn.Conv2d(c, c, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x):
        return F.relu(self.conv(x) + x)


class TinyVAE(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to latents (B, c_latent, h, w) and back, as VAE does it, in a fraction of the time
    (AutoencoderTiny: TAESD, by O. Boer Bohan), from its config dict."""

    def __init__(self, config):
        super().__init__()
        c = self.settings = read_config(config, TINY_VAE_CONFIG, lists=TINY_VAE_LISTS)
        self.scale, conv = c["scaling_factor"], functools.partial(nn.Conv2d, kernel_size=3, padding=1)
        for key in TINY_VAE_LISTS[:2]:
            check(key, c[key], "the same width on all levels", len(set(c[key])) == 1)

        width = c["encoder_block_out_channels"][0]
        encoder = [conv(3, width)]
        for level, num in enumerate(c["num_encoder_blocks"]):
            encoder += [conv(width, width, stride=2, bias=False)] if level > 0 else []
            encoder += [TinyBlock(width) for _ in range(num)]
        encoder += [conv(width, c["latent_channels"])]

        width = c["decoder_block_out_channels"][0]
        decoder = [conv(c["latent_channels"], width), nn.ReLU()]
        for level, num in enumerate(c["num_decoder_blocks"]):
            decoder += [nn.Upsample(scale_factor=2), conv(width, width, bias=False)] if level > 0 else []
            decoder += [TinyBlock(width) for _ in range(num)]
        decoder += [conv(width, 3)]
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*encoder)})
        self.decoder = nn.ModuleDict({"layers": nn.Sequential(*decoder)})

    def encode(self, images):
        """Scaled latents."""
        return self.encoder["layers"]((images + 1) / 2) * self.scale

    def decode(self, latents):
        """Images, about [-1, 1], of scaled latents."""
        z = latents.to(self.decoder["layers"][0].weight.dtype) / self.scale
        return self.decoder["layers"](torch.tanh(z / 3) * 3) * 2 - 1

# -------------------------------------------------------------------------------------------------- text encoder
class TextLayer(nn.Module):
    """Causal attention and a feed-forward network on the residual stream x (B, L, D), each after a norm."""

    def __init__(self, config):
        super().__init__()
        width, hidden, eps = config["hidden_size"], config["intermediate_size"], config["layer_norm_eps"]
        self.heads = config["num_attention_heads"]
        self.quick_gelu = config["hidden_act"] == "quick_gelu"    # in SD 1.5; SD 2.1 has gelu
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x):
        h, attn = self.layer_norm1(x), self.self_attn                           # (B, L, D)
        h = attend(attn["q_proj"](h), attn["k_proj"](h), attn["v_proj"](h), self.heads, causal=True)
        x = x + attn["out_proj"](h)                                             # (B, L, D)
        h = self.mlp["fc1"](self.layer_norm2(x))                                # (B, L, hidden)
        h = h * torch.sigmoid(1.702 * h) if self.quick_gelu else F.gelu(h)      # (B, L, hidden)
        return x + self.mlp["fc2"](h)                                           # (B, L, D)


class TextEncoder(nn.Module):
    """CLIP's text transformer (CLIPTextModel), from its config dict: token ids (B, L) -> hidden states (B, L, D)."""

    def __init__(self, config):
        super().__init__()
        config = self.settings = read_config(config, TEXT_CONFIG)
        width, heads = config["hidden_size"], config["num_attention_heads"]
        check("num_attention_heads", heads, f"a divisor of hidden_size, {width}", width % heads == 0)
        model = self.text_model = nn.Module()
        model.embeddings = nn.ModuleDict({
            "token_embedding": Embedding(config["vocab_size"], width),
            "position_embedding": Embedding(config["max_position_embeddings"], width)})
        layers = nn.ModuleList(TextLayer(config) for _ in range(config["num_hidden_layers"]))
        model.encoder = nn.ModuleDict({"layers": layers})
        model.final_layer_norm = nn.LayerNorm(width, config["layer_norm_eps"])

    def forward(self, ids):
        embeddings = self.text_model.embeddings
        x = embeddings["token_embedding"](ids)                                  # (B, L, D)
        x = x + embeddings["position_embedding"].weight[:ids.shape[1]]          # (B, L, D)
        for layer in self.text_model.encoder["layers"]:
            x = layer(x)                                                        # (B, L, D)
        return self.text_model.final_layer_norm(x)
