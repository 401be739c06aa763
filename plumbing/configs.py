"""What a published config may say: the values that this code computes as the reference does, and one validator.

    c = read_unet_config(config)                            # {key: value}, defaults filled in
    betas, prediction = read_schedule(scheduler_config)     # what signal_ode.Schedule is made of

A table has, for every key, the default and the other supported values. Everything else raises ValueError, naming the
key, the value and what is supported. Keys that no table has are ignored, as the reference ignores them.
"""

import torch


class Number:
    """All numbers from low to high, as one of the supported values of a key: whole ones if kind is int."""

    def __init__(self, kind, low, high):
        self.kind, self.low, self.high = kind, low, high

    def __contains__(self, value):
        return has_type(value, self.kind) and self.low <= value <= self.high

    def __repr__(self):
        return f"a {'whole ' if self.kind is int else ''}number from {self.low} to {self.high}"


# What train.py's options may be
LIMITS = {
    "steps": Number(int, 1, 10**9), "batch": Number(int, 1, 10**6), "micro_batch": Number(int, 1, 10**6),
    "lora": Number(int, 0, 4096), "lr": Number(float, 0, 10), "warmup": Number(int, 0, 10**9),
    "critic_lr": Number(float, 0, 10), "ema": Number(float, 0, 0.999999), "beta": Number(float, 0, 10**6),
    "match": Number(float, 0, 10**6), "match_from": Number(float, 0, 0.99), "every": Number(int, 1, 10**9),
    "samples": Number(int, 0, 64)}


def has_type(value, kind):
    """Whether a value of a JSON file has this type. A whole number passes for a float, but True is not a number."""
    return type(value) is kind or (kind is float and type(value) is int)


def check(key, value, supported, good=None):
    """Raise ValueError, naming the key, its value and what is supported, unless the value is good.
    `supported`: a list of values and Numbers; or a text, and then the argument `good` says whether the value is."""
    if good is None:
        good = any(value in choice if isinstance(choice, Number) else value == choice and has_type(value, type(choice))
                   for choice in supported)
        supported = ", ".join(repr(choice) for choice in supported if choice is not ...)
    if not good:
        raise ValueError(f"{key} = {repr(value):.60} is not supported: {supported}")


def check_limits(args):
    """Raise ValueError, naming the option, if one of train.py's is outside its limits."""
    for name, limits in LIMITS.items():
        if getattr(args, name) is not None:
            check(f"--{name.replace('_', '-')}", getattr(args, name), [limits])


def read_config(config, table, either=(), lists=("block_out_channels", "down_block_types", "up_block_types")):
    """{key: value} of a published config, for the keys of a table.
    `table`: {key: [default, other supported values ...]}. A default of `...` means that the key must be there.
    `lists`: the keys that have a list of values, one for each level of the network.
    `either`: the keys that have such a list, or one value for all levels; the list is returned in both cases.
    Raises ValueError for a value that is not supported, and KeyError for a missing key."""
    values = {}
    for key, supported in table.items():
        value = config.get(key, supported[0])
        if value is ...:
            raise KeyError(key)
        if key in either and not isinstance(value, (list, tuple)):
            value = [value] * len(config[lists[0]])
        if key in (*lists, *either):
            good = isinstance(value, (list, tuple)) and 0 < len(value) == len(config[lists[0]])
            check(key, value, f"one value for each of {lists[0]}", good)
        for item in value if key in (*lists, *either) else [value]:
            check(key, item, supported)
        values[key] = value
    for channels in values.get("block_out_channels", []):
        groups = values["norm_num_groups"]
        check("norm_num_groups", groups, "a divisor of all block_out_channels", channels % groups == 0)
    return values


# ------------------------------------------------------------------------------------------------------- schedule
# The schedulers whose noise is what their betas say. None stands for a config that was written by hand.
SCHEDULERS = [None, *(f"{name}Scheduler" for name in (
    "PNDM", "DDIM", "DDIMParallel", "DDIMInverse", "DDPM", "DDPMParallel", "DPMSolverMultistep", "DPMSolverSinglestep",
    "DPMSolverMultistepInverse", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep", "SASolver", "EulerDiscrete",
    "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "LMSDiscrete"))]
SCHEDULE = {
    "_class_name": SCHEDULERS, "num_train_timesteps": [1000, Number(int, 1, 10**6)],
    "prediction_type": ["epsilon", "v_prediction", "sample"], "rescale_betas_zero_snr": [None, False, True],
    "thresholding": [None, False], "use_flow_sigmas": [None, False], "snr_shift_scale": [None, False]}
BETAS = ("num_train_timesteps", "trained_betas", "rescale_betas_zero_snr", "beta_start", "beta_end", "beta_schedule")
CLIPPING = {"clip_sample": [None, False, True], "clip_sample_range": [1.0, Number(float, 1e-3, 1e3)]}


def read_schedule(config):
    """(betas, prediction type) of a scheduler's config: float64 (T,), and "epsilon", "v_prediction" or "sample".
    Raises ValueError for a schedule that is not supported, or that cannot work."""
    c = read_config(config, SCHEDULE)
    betas = training_betas(config, c["num_train_timesteps"])
    if c["rescale_betas_zero_snr"]:
        betas = rescale_to_zero_snr(betas)
    alpha_bar = torch.cumprod(1 - betas, 0)                                                     # (T,)
    given = ", ".join(f"{key} {repr(config[key]):.60}" for key in BETAS if config.get(key) is not None)
    if not (alpha_bar[0] < 1 and (alpha_bar.diff() < 0).all()):
        raise ValueError(f"{given} is not supported: more noise at every step, and some signal before the last")
    alpha_T = alpha_bar[-1].sqrt()
    check("prediction_type", c["prediction_type"], f"v_prediction or sample, because an epsilon is divided by alpha_T, "
          f"which is {alpha_T:.0e} with {given}", c["prediction_type"] != "epsilon" or alpha_T > 1e-6)
    return betas, c["prediction_type"]


def training_betas(config, T):
    """beta_1 .. beta_T, float64 (T,): the noise that each step of training time adds."""
    betas = config.get("trained_betas")
    if betas is not None:
        good = isinstance(betas, (list, tuple)) and len(betas) == T
        check("trained_betas", betas, f"a list of num_train_timesteps numbers, {T}", good)
        for beta in betas:
            check("trained_betas", beta, [Number(float, 0, 1)])
        return torch.tensor(betas, dtype=torch.float64)
    kind = config.get("beta_schedule", "linear")
    check("beta_schedule", kind, ["linear", "scaled_linear", "squaredcos_cap_v2"])
    if kind == "squaredcos_cap_v2":                                         # Nichol & Dhariwal 2021, eq. 17
        u = torch.arange(T + 1, dtype=torch.float64) / T
        alpha_bar = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    beta_1, beta_T = config.get("beta_start"), config.get("beta_end")
    check("beta_start", beta_1, [Number(float, 0, 1)])
    check("beta_end", beta_T, [Number(float, 0, 1)])
    if kind == "linear":                                                    # DDPM, Ho et al. 2020
        return torch.linspace(beta_1, beta_T, T, dtype=torch.float64)
    return torch.linspace(beta_1**0.5, beta_T**0.5, T, dtype=torch.float64) ** 2            # Stable Diffusion


def rescale_to_zero_snr(betas):
    """The betas (T,) shifted and scaled such that alpha_T = 0 (Lin et al. 2024, algorithm 1)."""
    alpha = torch.cumprod(1 - betas, 0).sqrt()
    alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    return 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])


# ---------------------------------------------------------------------------------------------------------- U-Net
FEW, COUNT, EPS = Number(int, 1, 100), Number(int, 1, 10**6), Number(float, 1e-12, 1)

# upcast_attention may say anything, because scaled_dot_product_attention sums its scores in float32 either way.
# Dropout has no effect here.
UNET = {
    "_class_name": ["UNet2DConditionModel", "UNet2DModel"], "in_channels": [..., COUNT], "out_channels": [..., COUNT],
    "block_out_channels": [..., COUNT], "layers_per_block": [2, FEW], "norm_num_groups": [32, COUNT],
    "norm_eps": [1e-5, EPS], "act_fn": ["silu", "swish"], "center_input_sample": [False],
    "flip_sin_to_cos": [True, False], "freq_shift": [0, Number(float, 0, 1)], "time_embedding_type": ["positional"],
    "time_embedding_dim": [None, COUNT], "time_cond_proj_dim": [None, Number(int, 4, 10**6)],
    "time_cond_fastest": [None, Number(float, 0, 1000)], "class_embed_type": [None, "timestep"],
    "target_embed_type": [None, "timestep"], "num_class_embeds": [None, COUNT], "lora_rank": [0, COUNT],
    "resnet_time_scale_shift": ["default", "scale_shift"], "downsample_padding": [1, 0],
    "mid_block_scale_factor": [1.0]}
TEXT_UNET = UNET | {                                                            # UNet2DConditionModel
    "down_block_types": [..., "DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": [..., "UpBlock2D", "CrossAttnUpBlock2D"], "mid_block_type": ["UNetMidBlock2DCrossAttn"],
    "cross_attention_dim": [1280, COUNT], "attention_head_dim": [8, COUNT], "num_attention_heads": [None],
    "transformer_layers_per_block": [1, FEW], "reverse_transformer_layers_per_block": [None],
    "use_linear_projection": [False, True], "only_cross_attention": [False], "dual_cross_attention": [False],
    "mid_block_only_cross_attention": [None, False], "cross_attention_norm": [None], "attention_type": ["default"],
    "addition_embed_type": [None], "encoder_hid_dim": [None], "encoder_hid_dim_type": [None],
    "class_embeddings_concat": [False], "resnet_skip_time_act": [False], "resnet_out_scale_factor": [1.0],
    "time_embedding_act_fn": [None], "timestep_post_act": [None], "conv_in_kernel": [3], "conv_out_kernel": [3]}
PIXEL_UNET = UNET | {                                                           # UNet2DModel
    "down_block_types": [..., "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": [..., "UpBlock2D", "AttnUpBlock2D"], "mid_block_type": ["UNetMidBlock2D"],
    "attention_head_dim": [8, None, COUNT], "add_attention": [True, False], "attn_norm_num_groups": [None, COUNT],
    "downsample_type": ["conv"], "upsample_type": ["conv"]}
EITHER = ("layers_per_block", "attention_head_dim", "transformer_layers_per_block", "cross_attention_dim",
          "only_cross_attention")                                               # in TEXT_UNET: one value, or a list


def is_pixel(config):
    """Whether a U-Net's config is of the DDPM family (UNet2DModel), which sees no text, and not Stable Diffusion's."""
    return config.get("_class_name") == "UNet2DModel"


def read_unet_config(config):
    """{key: value} of a U-Net's config, see read_config."""
    if is_pixel(config):
        return read_config(config, PIXEL_UNET)
    c = read_config(config, TEXT_UNET, EITHER)
    widths = c["cross_attention_dim"]
    check("cross_attention_dim", widths, "one number, the width of the text", len(set(widths)) == 1)
    return c


def target_slot(config):
    """The name of a student's embedding of the target time: SLOT_embedding in its weights, SLOT_embed_type in its
    config. It is "class", so that diffusers opens it, or "target" where class labels have that name already."""
    return "target" if config.get("num_class_embeds") else "class"


# --------------------------------------------------------------------------------------- autoencoders, text encoder
VAE_CONFIG = {
    "_class_name": ["AutoencoderKL"], "in_channels": [3], "out_channels": [3], "latent_channels": [4, COUNT],
    "block_out_channels": [..., COUNT], "layers_per_block": [1, FEW], "norm_num_groups": [32, COUNT],
    "down_block_types": [..., "DownEncoderBlock2D"], "up_block_types": [..., "UpDecoderBlock2D"],
    "act_fn": ["silu", "swish"], "scaling_factor": [0.18215, Number(float, 1e-6, 1e6)], "shift_factor": [None],
    "latents_mean": [None], "latents_std": [None], "use_quant_conv": [True], "use_post_quant_conv": [True],
    "mid_block_add_attention": [True]}
TINY_VAE_CONFIG = {
    "_class_name": ["AutoencoderTiny"], "in_channels": [3], "out_channels": [3], "latent_channels": [4, COUNT],
    "decoder_block_out_channels": [..., COUNT], "encoder_block_out_channels": [..., COUNT],
    "num_decoder_blocks": [..., FEW], "num_encoder_blocks": [..., FEW], "act_fn": ["relu"], "upsample_fn": ["nearest"],
    "upsampling_scaling_factor": [2], "scaling_factor": [1.0, Number(float, 1e-6, 1e6)], "shift_factor": [0.0, None]}
TINY_VAE_LISTS = (
    "decoder_block_out_channels", "encoder_block_out_channels", "num_decoder_blocks", "num_encoder_blocks")
TEXT_CONFIG = {
    "model_type": ["clip_text_model"], "hidden_act": ["quick_gelu", "gelu"], "use_attention_mask": [False, None],
    "hidden_size": [..., COUNT], "intermediate_size": [..., COUNT], "num_hidden_layers": [..., FEW],
    "num_attention_heads": [..., COUNT], "vocab_size": [..., COUNT], "max_position_embeddings": [..., COUNT],
    "layer_norm_eps": [1e-5, EPS]}
