"""Stable Diffusion's and DDPM's networks by hand, from their published configs: U-Net, VAE, CLIP text encoder.

Every module carries the name it has in the published checkpoints, so a state dict loads as it is.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint


def supported(key, value, *values):
    """value, which must be one of `values`: anything else is a model that this file would compute wrongly."""
    if value not in values:
        raise ValueError(f"config {key} = {value!r} is not supported: {', '.join(map(repr, values))}")
    return value


def per_level(value, levels):
    """A config value that may be one number for all levels, as a list of one for each."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * levels


def sinusoid(t, dim, flip=False, shift=0):
    """Sinusoids of t (B,) -> (B, dim), always float32: sines, cosines (Vaswani et al. 2017), or flipped."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - shift))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()] if flip else [angle.sin(), angle.cos()], 1)


def guidance_sinusoid(w, dim):
    """Embedding of the guidance scale w (B,) -> (B, dim), as in latent consistency models (Luo et al. 2023).

    The angles reach thousands, so float32's rounding of frequencies shows: the order of operations is theirs.
    """
    frequency = torch.exp(torch.arange(dim // 2, device=w.device) * -(math.log(10000) / (dim // 2 - 1)))
    angle = (w.float() - 1)[:, None] * 1000 * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


def upsample(x, size):
    """Nearest neighbour to the skip connection's own size, not always exactly double: any size works."""
    return F.interpolate(x, size=size, mode="nearest")


class Embedding(nn.Embedding):
    """nn.Embedding, whose random start on the meta device would import a second's worth of modules for nothing."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class Conv(nn.Module):
    """A down- or up-sampler's convolution, under the name it has in the checkpoint: `downsamplers.0.conv`.

    Padding 0 stands for one pixel at the right and at the bottom, as the VAEs and the first DDPMs were trained.
    """

    def __init__(self, channels, stride, padding):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding)

    def forward(self, x):
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Resnet(nn.Module):
    """Two residual convolutions, x (B, c_in, h, w) -> (B, c_out, h, w); emb (B, c_emb) enters between.

    scale_shift: emb scales and shifts the second norm (Dhariwal & Nichol 2021) instead of being added before it.
    """

    def __init__(self, c_in, c_out, c_emb, groups, eps, scale_shift=False):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.scale_shift = scale_shift
        if c_emb:
            self.time_emb_proj = nn.Linear(c_emb, 2 * c_out if scale_shift else c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        shift = 0 if emb is None else self.time_emb_proj(F.silu(emb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, 1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + shift)
        h = self.conv2(F.silu(h))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


def attend(q, k, v, heads, causal=False):
    """Multi-head attention of queries (B, N, C) to keys and values (B, L, C) -> (B, N, C)."""
    q, k, v = (rearrange(z, "b n (h d) -> b h n d", h=heads) for z in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=causal), "b h n d -> b n (h d)")


class Attention(nn.Module):
    """Multi-head attention of x (B, N, C) on itself or on context (B, L, D)."""

    def __init__(self, channels, context, heads, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias)
        self.to_k = nn.Linear(context, channels, bias)
        self.to_v = nn.Linear(context, channels, bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x, context=None):
        context = x if context is None else context
        return self.to_out[0](attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class PixelAttention(nn.Module):
    """Self-attention over the pixels of x (B, C, h, w), with its own norm and biases: the VAE's and DDPM's."""

    def __init__(self, channels, heads, groups, eps):
        super().__init__()
        self.heads = heads
        self.group_norm = nn.GroupNorm(groups, channels, eps) if groups else nn.Identity()
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x, text=None):
        h = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        h = self.to_out[0](attend(self.to_q(h), self.to_k(h), self.to_v(h), self.heads))
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of its other half (Shazeer 2020)."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward, each on a residual stream."""

    def __init__(self, channels, heads, c_text):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, c_text, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = nn.Module()
        self.ff.net = nn.ModuleList(
            [GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x, text):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff.net[2](self.ff.net[0](self.norm3(x)))


class Transformer(nn.Module):
    """A transformer over the pixels of x (B, C, h, w), attending to text (B, L, D)."""

    def __init__(self, channels, heads, c_text, groups, linear, depth):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, c_text) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x, text):
        h = project(self.proj_in, rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.transformer_blocks:
            h = block(h, text)
        return x + rearrange(project(self.proj_out, h), "b (h w) c -> b c h w", h=x.shape[2])


def project(layer, z):
    """SD 1.x projects by 1x1 convolution, SD 2.x by linear layer: the same product, other weight shapes."""
    return F.linear(z, layer.weight.flatten(1), layer.bias)


class Block(nn.Module):
    """One resolution of the U-Net or VAE: resnets, each followed by attention if any, then a sampler."""

    def __init__(self, resnets, attentions=(), downsample=None, upsample=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        if downsample:
            self.downsamplers = nn.ModuleList([downsample])
        if upsample:
            self.upsamplers = nn.ModuleList([upsample])


class TimeEmbedding(nn.Module):
    """Sinusoids to the embedding every resnet sees; `cond_proj` adds the guidance scale to a student's."""

    def __init__(self, c_in, c_emb, c_guidance=None):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_emb)
        self.linear_2 = nn.Linear(c_emb, c_emb)
        if c_guidance:
            self.cond_proj = nn.Linear(c_guidance, c_in, bias=False)

    def forward(self, sin, guidance=None):
        sin = sin.to(self.linear_1.weight.dtype)
        if guidance is not None:
            sin = sin + self.cond_proj(guidance.to(sin.dtype))
        return self.linear_2(F.silu(self.linear_1(sin)))


class UNet(nn.Module):
    """The denoiser, from its published config dict: `UNet2DConditionModel` of Stable Diffusion 1.x and 2.x, or
    `UNet2DModel` of the DDPM family, which sees no text but the class if it has `num_class_embeds`.

    A student is the same network with an embedding of the target time (`class_embed_type="timestep"`, or
    `target_embed_type` where the classes have that place) and, with `time_cond_proj_dim`, of the guidance scale.
    """

    def __init__(self, config):
        super().__init__()
        self.config = dict(config)
        channels, pixel = config["block_out_channels"], config.get("_class_name") == "UNet2DModel"
        levels, c_emb = len(channels), 4 * channels[0]
        layers, groups = config["layers_per_block"], config.get("norm_num_groups", 32)
        eps, linear = config.get("norm_eps", 1e-5), config.get("use_linear_projection", False)
        padding = supported("downsample_padding", config.get("downsample_padding", 1), 0, 1)
        # upcast_attention needs nothing here: scaled_dot_product_attention sums its scores in float32
        for key, *values in (("act_fn", "silu"), ("center_input_sample", False), ("time_embedding_dim", None),
                             ("mid_block_scale_factor", 1), ("dual_cross_attention", False),
                             ("only_cross_attention", False), ("class_embed_type", None, "timestep"),
                             ("target_embed_type", None, "timestep"), ("addition_embed_type", None),
                             ("attention_bias", False), ("downsample_type", "conv"), ("upsample_type", "conv"),
                             ("resnet_time_scale_shift", "default", "scale_shift"),
                             ("mid_block_type", "UNetMidBlock2D" if pixel else "UNetMidBlock2DCrossAttn"),
                             ("encoder_hid_dim_type", None), ("time_embedding_type", "positional"),
                             ("time_embedding_act_fn", None), ("timestep_post_act", None),
                             ("resnet_out_scale_factor", 1.0), ("resnet_skip_time_act", False),
                             ("cross_attention_norm", None), ("conv_in_kernel", 3), ("conv_out_kernel", 3)):
            supported(key, config.get(key, values[0]), *values)             # the first value is the default
        scale_shift = config.get("resnet_time_scale_shift") == "scale_shift"

        def resnet(c_in, c_out):
            return Resnet(c_in, c_out, c_emb, groups, eps, scale_shift)

        def attention(level, groups=groups):
            if pixel:                                       # here attention_head_dim is the width of a head
                width = config.get("attention_head_dim", 8) or channels[level]
                return PixelAttention(channels[level], channels[level] // width, groups, eps)
            # and here the number of heads: the published name lies
            heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
            depth = config.get("transformer_layers_per_block", 1)
            return Transformer(channels[level], per_level(heads, levels)[level], config["cross_attention_dim"],
                               groups, linear, per_level(depth, levels)[level])

        self.conv_in = nn.Conv2d(config["in_channels"], channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0], c_emb, config.get("time_cond_proj_dim"))
        if config.get("class_embed_type"):
            self.class_embedding = TimeEmbedding(channels[0], c_emb)
        elif config.get("num_class_embeds"):
            self.class_embedding = Embedding(config["num_class_embeds"], c_emb)
        if config.get("target_embed_type"):
            self.target_embedding = TimeEmbedding(channels[0], c_emb)

        plain, attending = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")
        attending = attending if pixel else ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips, c = [channels[0]], channels[0]                               # channels of each skip connection
        for level, kind in enumerate(config["down_block_types"]):
            supported("down_block_types", kind, plain[0], attending[0])
            resnets = [resnet(c if j == 0 else channels[level], channels[level]) for j in range(layers)]
            c, last = channels[level], level == levels - 1
            attentions = [attention(level) for _ in range(layers)] if kind in attending else ()
            self.down_blocks.append(
                Block(resnets, attentions, downsample=None if last else Conv(c, 2, padding)))
            skips += [c] * (layers if last else layers + 1)

        # an oddity of UNet2DModel: with scale and shift, the attention in the middle has no norm
        middle = config.get("attn_norm_num_groups") or (None if pixel and scale_shift else groups)
        self.mid_block = Block([resnet(c, c), resnet(c, c)],
                               [attention(-1, middle)] if config.get("add_attention", True) else ())

        for level, kind in zip(reversed(range(levels)), config["up_block_types"]):
            supported("up_block_types", kind, plain[1], attending[1])
            resnets = []
            for _ in range(layers + 1):
                resnets.append(resnet(c + skips.pop(), channels[level]))
                c = channels[level]
            attentions = [attention(level) for _ in resnets] if kind in attending else ()
            self.up_blocks.append(Block(resnets, attentions, upsample=Conv(c, 1, 1) if level > 0 else None))

        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps)
        self.conv_out = nn.Conv2d(channels[0], config["out_channels"], 3, padding=1)
        self.checkpointing = False              # True: memory for time, layers are computed again going back

    def forward(self, x, t, text=None, target=None, guidance=None, label=None):
        """Raw output (B, out, h, w), float32, for x (B, in, h, w) at timestep index t (B,).

        text: (B, L, D), or label: (B,) int64, as the network was trained. target: (B,), the time a student
        shall predict; guidance: (B,), its guidance scale w. The last norm and convolution run in their own
        dtype, float32, under any autocast (see clean_prediction).
        """
        named = {"target": target, "guidance": guidance, "label": label}
        takes = {"target": self.config.get("class_embed_type") or self.config.get("target_embed_type"),
                 "guidance": self.config.get("time_cond_proj_dim"), "label": self.config.get("num_class_embeds")}
        for name, value in named.items():
            if bool(takes[name]) != (value is not None):
                raise ValueError(f"this network takes {'a' if takes[name] else 'no'} {name}: a student takes the "
                                 "target time, and guidance if trained for a range; classes take a label")
        width, flip = self.conv_in.out_channels, self.config.get("flip_sin_to_cos", True)
        shift = self.config.get("freq_shift", 0)
        if guidance is not None:
            guidance = guidance_sinusoid(guidance, self.config["time_cond_proj_dim"])
        emb = self.time_embedding(sinusoid(t, width, flip, shift), guidance)            # (B, 4 * width)
        if label is not None:
            emb = emb + self.class_embedding(label)
        if target is not None:
            embedding = self.class_embedding if label is None else self.target_embedding
            emb = emb + embedding(sinusoid(target, width, flip, shift))

        def run(module, *inputs):
            if self.checkpointing and torch.is_grad_enabled():
                return checkpoint(module, *inputs, use_reentrant=False)
            return module(*inputs)

        x = self.conv_in(x.to(self.conv_in.weight.dtype))
        skips = [x]
        for block in self.down_blocks:
            for j, resnet in enumerate(block.resnets):
                x = run(resnet, x, emb)
                if hasattr(block, "attentions"):
                    x = run(block.attentions[j], x, text)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)

        x = run(self.mid_block.resnets[0], x, emb)
        if hasattr(self.mid_block, "attentions"):
            x = run(self.mid_block.attentions[0], x, text)
        x = run(self.mid_block.resnets[1], x, emb)

        for block in self.up_blocks:
            for j, resnet in enumerate(block.resnets):
                x = run(resnet, torch.cat([x, skips.pop()], 1), emb)
                if hasattr(block, "attentions"):
                    x = run(block.attentions[j], x, text)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](upsample(x, skips[-1].shape[2:]))

        with torch.autocast(x.device.type, enabled=False):
            return self.conv_out(F.silu(self.conv_norm_out(x.to(self.conv_out.weight.dtype))))


class VAE(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to latents (B, 4, h, w) and back (`AutoencoderKL`), from its config."""

    def __init__(self, config):
        super().__init__()
        self.config = dict(config)
        self.scale = config.get("scaling_factor", 0.18215)
        channels, layers = config["block_out_channels"], config["layers_per_block"]
        groups = config.get("norm_num_groups", 32)
        c_latent, levels = config["latent_channels"], len(channels)
        supported("act_fn", config.get("act_fn", "silu"), "silu")
        for key in ("shift_factor", "latents_mean", "latents_std"):
            supported(key, config.get(key), None)
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            for given in config[key]:
                supported(key, given, kind)

        def resnets(c_in, c_out, n):
            return [Resnet(c_in if j == 0 else c_out, c_out, None, groups, 1e-6) for j in range(n)]

        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.conv_in = nn.Conv2d(config["in_channels"], channels[0], 3, padding=1)
        self.encoder.down_blocks = nn.ModuleList(
            Block(resnets(channels[max(k - 1, 0)], channels[k], layers),
                  downsample=Conv(channels[k], 2, 0) if k < levels - 1 else None)
            for k in range(levels))
        self.decoder.conv_in = nn.Conv2d(c_latent, channels[-1], 3, padding=1)
        self.decoder.up_blocks = nn.ModuleList(
            Block(resnets(channels[min(k + 1, levels - 1)], channels[k], layers + 1),
                  upsample=Conv(channels[k], 1, 1) if k > 0 else None)
            for k in reversed(range(levels)))
        for coder, c, c_out in ((self.encoder, channels[-1], 2 * c_latent),
                                (self.decoder, channels[0], config["out_channels"])):
            coder.mid_block = Block(resnets(channels[-1], channels[-1], 2),
                                    [PixelAttention(channels[-1], 1, groups, 1e-6)])
            coder.conv_norm_out = nn.GroupNorm(groups, c, 1e-6)
            coder.conv_out = nn.Conv2d(c, c_out, 3, padding=1)
        self.quant_conv = nn.Conv2d(2 * c_latent, 2 * c_latent, 1)
        self.post_quant_conv = nn.Conv2d(c_latent, c_latent, 1)

    def moments(self, images):
        """Mean and log-variance of the unscaled latents, each (B, 4, h, w)."""
        x = self.encoder.conv_in(images)
        for block in self.encoder.down_blocks:
            for resnet in block.resnets:
                x = resnet(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
        x = middle(self.encoder.mid_block, x)
        x = self.encoder.conv_out(F.silu(self.encoder.conv_norm_out(x)))
        mean, logvar = self.quant_conv(x).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, images):
        """Scaled latents, the distribution's mean."""
        return self.moments(images)[0] * self.scale

    def decode(self, latents):
        """Images, about [-1, 1], of scaled latents."""
        x = self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype) / self.scale)
        x = middle(self.decoder.mid_block, self.decoder.conv_in(x))
        for block in self.decoder.up_blocks:
            for resnet in block.resnets:
                x = resnet(x)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](upsample(x, [2 * n for n in x.shape[2:]]))
        return self.decoder.conv_out(F.silu(self.decoder.conv_norm_out(x)))


def middle(block, x):
    return block.resnets[1](block.attentions[0](block.resnets[0](x)))


class TextLayer(nn.Module):
    """One pre-norm transformer layer with causal attention, on (B, 77, D)."""

    def __init__(self, config):
        super().__init__()
        width, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-5)
        self.heads = config["num_attention_heads"]
        self.act = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}[
            supported("hidden_act", config.get("hidden_act", "quick_gelu"), "gelu", "quick_gelu")]
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.self_attn = nn.ModuleDict(
            {f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")})
        self.layer_norm2 = nn.LayerNorm(width, eps)
        hidden = config["intermediate_size"]
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x):
        h, attn = self.layer_norm1(x), self.self_attn
        h = attend(*(attn[f"{name}_proj"](h) for name in "qkv"), self.heads, causal=True)
        x = x + attn["out_proj"](h)
        return x + self.mlp["fc2"](self.act(self.mlp["fc1"](self.layer_norm2(x))))


class TextEncoder(nn.Module):
    """CLIP's text transformer (`CLIPTextModel`), from its config: ids (B, 77) -> hidden states (B, 77, D)."""

    def __init__(self, config):
        super().__init__()
        self.config = dict(config)
        width = config["hidden_size"]
        model = self.text_model = nn.Module()
        model.embeddings = nn.ModuleDict({
            "token_embedding": Embedding(config["vocab_size"], width),
            "position_embedding": Embedding(config["max_position_embeddings"], width)})
        layers = nn.ModuleList(TextLayer(config) for _ in range(config["num_hidden_layers"]))
        model.encoder = nn.ModuleDict({"layers": layers})
        model.final_layer_norm = nn.LayerNorm(width, config.get("layer_norm_eps", 1e-5))

    def forward(self, ids):
        embeddings = self.text_model.embeddings
        x = embeddings["token_embedding"](ids) + embeddings["position_embedding"].weight[:ids.shape[1]]
        for layer in self.text_model.encoder["layers"]:
            x = layer(x)
        return self.text_model.final_layer_norm(x)
