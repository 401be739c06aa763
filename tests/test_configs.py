"""What a published config may say.

- One validator refuses what is not supported, also True for a number, and names key, value and what is supported.
- A schedule that cannot work is refused; the betas are those of diffusers, with zero terminal SNR too.
- Every key of the published configs, changed alone, is computed as the reference libraries do, or refused by its name.
"""

import inspect
import math
import random
import re

import pytest
import torch

from conftest import CHECKPOINTS, COSINE, DDPM, SD, TINY, ZERO_SNR
from plumbing.configs import Number, check, read_config, read_schedule
from plumbing.files import read_json
from reference import REFUSED, SAME, diffusers, outcome, transformers
from signal_ode import Schedule

SEED, DRAWS = 2306, 2                           # so many values of another type are drawn for each key
REMOVED = type("Removed", (), {"__repr__": lambda self: "removed"})()
PIXEL, TEXT = ["ddpm-256", "ddpm-cifar10-32", "ddpm-butterflies-128"], ["sd15", "sd21-base", "sd21-768-v"]
DOWN, UP = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3

EVERY_UNET = {
    "_class_name": ["UNet2DModel", "UNet2DConditionModel", "UNet3DConditionModel", "x"],
    "act_fn": ["swish", "gelu", "mish", "relu", "SiLU"], "add_attention": [False], "addition_embed_type": ["text"],
    "addition_embed_type_num_heads": [8], "attention_type": ["default", "gated", "gated-text-image"],
    "attn_norm_num_groups": [4, 8], "center_input_sample": [True], "class_embed_type": [
        "timestep", "identity", "projection", "simple_projection"],
    "class_embeddings_concat": [True], "conv_in_kernel": [1, 5], "conv_out_kernel": [1, 5],
    "cross_attention_norm": ["layer_norm", "group_norm"], "downsample_padding": [0, 1, 2],
    "downsample_type": ["conv", "resnet"], "dropout": [0.0, 0.1], "dual_cross_attention": [True],
    "encoder_hid_dim": [16], "encoder_hid_dim_type": ["text_proj"], "flip_sin_to_cos": [True, False],
    "freq_shift": [0, 1], "in_channels": [5], "layers_per_block": [1, 3, [1] * 4, [1, 2, 1, 1]],
    "mid_block_only_cross_attention": [True, False], "mid_block_scale_factor": [1, 1.0, 2, 0.5], "mid_block_type": [
        "UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"],
    "norm_eps": [1e-3, 1e-6], "norm_num_groups": [4, 3, 5], "num_attention_heads": [2, 4, [2, 4, 4, 4]],
    "num_class_embeds": [7], "num_train_timesteps": [500], "only_cross_attention": [
        True, [False] * 4, [True, False, False, False]],
    "out_channels": [3, 5, 8], "projection_class_embeddings_input_dim": [32], "resnet_out_scale_factor": [1, 1.5],
    "resnet_pre_norm": [False], "resnet_skip_time_act": [True], "resnet_time_scale_shift": [
        "default", "scale_shift", "ada_group", "spatial"],
    "reverse_transformer_layers_per_block": [[1] * 4, [1, 2, 1, 1], 2], "sample_size": [8, 64, [32, 32], [16, 32]],
    "time_cond_proj_dim": [256, 10], "time_embedding_act_fn": ["silu", "gelu"], "time_embedding_dim": [160, 64],
    "time_embedding_type": ["positional", "fourier", "learned"], "timestep_post_act": ["silu", "gelu"],
    "transformer_layers_per_block": [2, [1] * 4, [1, 2, 1, 1], [[1], [2], [1], [1]]], "upcast_attention": [True],
    "upsample_type": ["conv", "resnet"], "use_linear_projection": [True, False]}
TEXT_UNET = EVERY_UNET | {
    "attention_head_dim": [4, 3, 16, [2, 4, 4, 8], [5, 5, 5, 5], [8, 8]],
    "block_out_channels": [[40, 80], [40, 80, 160], [40, 40, 40, 40], [40, 80, 160, 161]], "cross_attention_dim": [
        24, [32] * 4, [32, 24, 32, 32]],
    "down_block_types": [DOWN[:3], DOWN[:1] * 4, DOWN[3:] * 4, [*DOWN[:3], "AttnDownBlock2D"],
                         ["SimpleCrossAttnDownBlock2D", *DOWN[1:]], [*DOWN[:3], "ResnetDownsampleBlock2D"]],
    "up_block_types": [UP[1:], UP[1:2] * 4, UP[:1] * 4, ["AttnUpBlock2D", *UP[1:]], UP[::-1],
                       [*UP[:3], "SimpleCrossAttnUpBlock2D"], ["ResnetUpsampleBlock2D", *UP[1:]]]}
PIXEL_UNET = EVERY_UNET | {
    "attention_head_dim": [4, 3, 16, 64, [8] * 4], "block_out_channels": [[16, 32], [16, 32, 32, 33], [16] * 6],
    "cross_attention_dim": [32], "down_block_types": [
        ["DownBlock2D"] * 4, ["DownBlock2D"] * 6, ["AttnDownBlock2D"] * 6, ["SkipDownBlock2D"] * 6,
        ["CrossAttnDownBlock2D"] * 6, ["ResnetDownsampleBlock2D"] * 6],
    "up_block_types": [["UpBlock2D"] * 4, ["UpBlock2D"] * 6, ["AttnUpBlock2D"] * 6, ["ResnetUpsampleBlock2D"] * 6]}
AUTOENCODER = {
    "_class_name": ["AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny", "x"],
    "act_fn": ["swish", "gelu", "mish", "relu"], "block_out_channels": [[16, 32], [16] * 4, [16, 32, 64, 65]],
    "down_block_types": [["DownEncoderBlock2D"] * 3, ["AttnDownEncoderBlock2D"] * 4, ["DownBlock2D"] * 4],
    "force_upcast": [True, False], "in_channels": [1, 4], "latent_channels": [3, 16], "latents_mean": [[0.0] * 4],
    "latents_std": [[1.0] * 4], "layers_per_block": [1, 3, [2] * 4], "mid_block_add_attention": [True, False],
    "norm_num_groups": [4, 3], "out_channels": [1, 4], "sample_size": [8, [32, 32]],
    "scaling_factor": [0.5, 0.13025, 1], "shift_factor": [0.0, 0.1], "use_post_quant_conv": [True, False],
    "up_block_types": [["UpDecoderBlock2D"] * 3, ["AttnUpDecoderBlock2D"] * 4], "use_quant_conv": [True, False]}
DECODER = {
    "_class_name": ["AutoencoderKL", "x"], "act_fn": ["gelu", "silu"],
    "decoder_block_out_channels": [[8] * 3, [16] * 4], "encoder_block_out_channels": [[8] * 3, [8, 16, 16]],
    "num_decoder_blocks": [[1, 1, 1], [1] * 4],
    "num_encoder_blocks": [[2, 1, 1], [1] * 2], "latent_channels": [3, 16], "in_channels": [1], "out_channels": [1],
    "scaling_factor": [0.5], "shift_factor": [0.1], "upsample_fn": ["bilinear"], "upsampling_scaling_factor": [1, 3]}
CLIP = {
    "attention_dropout": [0.1], "eos_token_id": [499], "hidden_act": [
        "quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"],
    "hidden_size": [64, 33], "intermediate_size": [32, 96], "layer_norm_eps": [1e-3, 1e-12],
    "max_position_embeddings": [32, 248], "num_attention_heads": [2, 3, 8], "num_hidden_layers": [1, 3],
    "use_attention_mask": [True, False], "vocab_size": [300]}
SCHEDULER = {
    "_class_name": [
        "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler",
        "LCMScheduler", "UniPCMultistepScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler",
        "ScoreSdeVeScheduler", "CMStochasticIterativeScheduler", "x"],
    "beta_start": [1e-3, 0.5], "beta_end": [0.01, 0.5], "beta_schedule": [
        "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp", "laplace"],
    "clip_sample": [True, False], "clip_sample_range": [2.0], "num_train_timesteps": [1, 2, 500, 4000],
    "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"],
    "rescale_betas_zero_snr": [True, False], "thresholding": [True, False], "timestep_spacing": ["trailing"],
    "trained_betas": [[0.02] * 1000, [0.02] * 10, [0.0] * 1000, [2.0] * 1000], "use_karras_sigmas": [True],
    "variance_type": ["fixed_large", "learned_range"], "algorithm_type": ["dpmsolver++"], "solver_order": [3]}
UNSEEN = {                                      # no output depends on it: the reference may be stricter about its type
    "unet": ["dropout"],                        # a frozen teacher has none
    "vae": ["sample_size"],                     # it matters to tiles only
    "decoder": ["force_upcast", "latent_magnitude", "latent_shift"],        # they matter to its own forward only
    "text_encoder": [                           # random weights, training, the other outputs, and the library's own
        "attention_dropout", "dropout", "initializer_factor", "initializer_range", "bos_token_id", "eos_token_id",
        "pad_token_id", "projection_dim", "output_hidden_states", "return_dict", "dtype", "torch_dtype", "id2label",
        "label2id", "problem_type", "architectures", "model_type", "chunk_size_feed_forward", "is_encoder_decoder",
        "transformers_version"],
    "scheduler": []}


# ----------------------------------------------------------------------------------------------------- the validator
@pytest.mark.parametrize("supported, good, bad, said", [
    ([Number(int, 1, 8)], [1, 8], [True, 0, 9, 2.0, "1", None, [1]], "a whole number from 1 to 8"),
    ([Number(float, 0, 1)], [0, 1, 0.5], [True, False, -1, 1.5, math.nan, "x"], "a number from 0 to 1"),
    ([None, False, True], [None, False, True], [0, 1, "no"], "None, False, True"), ([1.0], [1, 1.0], [True, 2], "1.0"),
    (["conv", 3], ["conv", 3], ["x", 3.0, {}, ["conv"]], "'conv', 3")])
def test_what_is_not_supported_is_refused_by_key_and_value(supported, good, bad, said):
    for value in good:
        check("size", value, supported)
        assert read_config({"size": value, "other": 0}, {"size": supported}) == {"size": value}
    for value in bad:
        with pytest.raises(ValueError, match=f"^size = {re.escape(repr(value))} is not supported: {said}$"):
            check("size", value, supported)
        with pytest.raises(ValueError, match=f"^size = {re.escape(repr(value))} is not supported: {said}$"):
            read_config({"size": value}, {"size": supported})


def test_a_config_has_defaults_needed_keys_and_lists():
    few = Number(int, 1, 64)
    table = {"block_out_channels": [..., few], "norm_num_groups": [8, 4], "layers": [2, few]}
    config = {"block_out_channels": [8, 16], "layers": 3}
    expected = {"block_out_channels": [8, 16], "norm_num_groups": 8, "layers": [3, 3]}
    assert read_config(config, table, either=["layers"]) == expected
    assert read_config(config | {"layers": [3, 3]}, table, either=["layers"]) == expected
    with pytest.raises(KeyError, match="block_out_channels"):
        read_config({}, table)
    for change, message in (
            ({"layers": [1, True]}, "layers = True"), ({"layers": [1]}, "one value for each of block_out_channels"),
            ({"block_out_channels": [8, 12]}, "norm_num_groups = 8 is not supported: a divisor of all"),
            ({"block_out_channels": 8}, "block_out_channels = 8 is"), ({"layers": "x" * 99}, r"x{59}\.\.\. is not")):
        with pytest.raises(ValueError, match=message):
            read_config(config | change, table, either=["layers"])


# ---------------------------------------------------------------------------------------------------------- schedules
@pytest.mark.parametrize("config", [SD, DDPM, COSINE, ZERO_SNR])
def test_betas_are_those_of_diffusers(config):
    betas, prediction = read_schedule(config)
    reference = diffusers.DDIMScheduler(**config)
    assert torch.allclose(betas, reference.betas.double(), rtol=1e-4, atol=1e-6)
    alpha = Schedule(betas, prediction).alpha(torch.arange(1, 1001))
    assert torch.allclose(alpha**2, reference.alphas_cumprod.double(), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("change", [
    {"beta_schedule": "sigmoid"}, {"prediction_type": "flow"}, {"beta_start": None}, {"beta_end": "x"},
    {"beta_end": 1.2}, {"beta_end": True}, {"num_train_timesteps": 1000.0}, {"num_train_timesteps": 0},
    {"trained_betas": [0.1, 0.2]}, {"trained_betas": [True] * 1000}, {"rescale_betas_zero_snr": "yes"},
    {"use_flow_sigmas": True},
    # An epsilon network is divided by alpha_T; none can do with steps without noise, or without signal before T
    {"rescale_betas_zero_snr": True}, {"beta_end": 1.0}, {"trained_betas": [0.5] * 999 + [1.0]},
    {"trained_betas": [0.0] * 1000}, {"trained_betas": [0.1] * 500 + [1.0] * 500}, {"beta_start": 0}])
def test_a_schedule_that_is_unknown_or_cannot_work_is_refused_by_key_and_value(change):
    [(key, value)] = change.items()
    with pytest.raises(ValueError, match=" is not supported: ") as caught:
        read_schedule(SD | change)
    assert re.search(f"{key} (= )?{re.escape(repr(value)[:40])}|trained_betas = True", str(caught.value)), caught.value


# ----------------------------------------------------------------------------------- every key, beside the reference
def small(name, part):
    """A published config of a network that is small enough to be computed some hundred times."""
    if part == "decoder":
        return read_json((TINY / "decoder" if name == "tiny" else CHECKPOINTS / name) / "config.json")
    config = read_json(next((CHECKPOINTS / name / part).glob("*config.json")))
    if part in ("unet", "vae"):
        config |= {"block_out_channels": [c // 8 for c in config["block_out_channels"]], "norm_num_groups": 8}
    if part == "unet":
        config |= {"layers_per_block": 1} | ({"cross_attention_dim": 32} if name in TEXT else {})
    if part == "scheduler":                     # of PNDM's kind, all have a twin of DDIM's
        config["_class_name"] = "DDIMScheduler" if name in TEXT else "DDPMScheduler"
    if part == "text_encoder":
        config |= {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
                   "vocab_size": 500}
    return config


def told(message, key, value):
    """Whether a message names the key and the value, or its beginning; of a list, an item or how many there are."""
    values = [value, len(value), *value] if isinstance(value, list) else [value]
    return key in message and any(repr(v)[:60] in message for v in values)


def named(message, config, key):
    """Whether a refusal names the key and its value, or that of another key which contradicts it. What contradicts a
    class need not say so."""
    if key not in message and key != "_class_name":
        return False
    return key not in config or any(told(message, *item) for item in config.items())


def outcome_of(part, base, key, value):
    """The outcome where one key of a config is set to a value or removed."""
    config = {name: old for name, old in {**base, key: value}.items() if old is not REMOVED}

    def refusal(error):
        if isinstance(error, KeyError):
            return value is REMOVED and error.args == (key,)
        return named(str(error), config, key)
    return outcome(part, config, refusal, unseen=key in UNSEEN[part])


def parameters(*classes):
    """{name: default} of everything that the constructors take; tuples as JSON has them, as lists."""
    found = {name: p.default for c in classes for name, p in inspect.signature(c).parameters.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def generic(value, levels):
    """Values of other types and sizes than a key's."""
    numbers = [float(value), 2 * value] if type(value) in (int, float) else []
    return [None, True, False, "x", 0, -1, 1.5, 2.0, [], {}, [value], [value] * levels, *numbers]


UNETS = parameters(diffusers.UNet2DModel, diffusers.UNet2DConditionModel)       # a key of one can stray into the other
KINDS = {                                                   # part, published configs, known keys, values to try
    "text_unet": ("unet", TEXT, UNETS, TEXT_UNET), "pixel_unet": ("unet", PIXEL, UNETS, PIXEL_UNET),
    "vae": ("vae", TEXT, parameters(diffusers.AutoencoderKL), AUTOENCODER),
    "decoder": ("decoder", ["tiny", "taesd"], parameters(diffusers.AutoencoderTiny), DECODER),
    "text_encoder": ("text_encoder", TEXT, parameters(transformers.CLIPTextConfig), CLIP),
    "scheduler": ("scheduler", TEXT + PIXEL, parameters(diffusers.DDIMScheduler, diffusers.DDPMScheduler), SCHEDULER)}


def changes(kind):
    """The (config's name, key, value) of a kind: all values to try, and DRAWS of another type for each key. Each is
    for one published config, drawn by the seed; a schedule costs so little that what is tried is for all."""
    part, names, known, tried = KINDS[kind]
    bases, rng, found = {name: small(name, part) for name in names}, random.Random(f"{SEED} {kind}"), []
    for key in sorted({*known, *tried}.union(*bases.values())):
        for value in tried.get(key, []):
            found += [(name, key, value) for name in (names if part == "scheduler" else [rng.choice(names)])]
        for name in rng.sample(names, 0 if key.startswith("_") else DRAWS):
            base = bases[name]
            others = generic(base.get(key, known.get(key)), len(base.get("block_out_channels", "ab")))
            found.append((name, key, rng.choice(others + [REMOVED] * (key in base))))
    return found


def check_changes(kind, tried):
    """Assert that all these (name, key, value) are computed as by the reference or refused, and unchanged configs are
    computed."""
    part = KINDS[kind][0]
    bases = {name: small(name, part) for name, *_ in tried}
    wrong = [f"{name} as published" for name, base in bases.items() if outcome(part, base) != SAME]
    for name, key, value in tried:
        what = outcome_of(part, bases[name], key, value)
        if what not in (SAME, REFUSED):
            wrong.append(f"{name}, {key} = {value!r}: {what}")
    assert not wrong, f"{len(wrong)} of {len(tried)}, seed {SEED}:\n" + "\n".join(wrong)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, num", [
    ("text_unet", 20), ("pixel_unet", 20), ("vae", 15), ("decoder", 15), ("text_encoder", 40), ("scheduler", 120)])
def test_some_changed_keys_are_computed_as_by_the_reference_or_refused_by_name(kind, num):
    check_changes(kind, random.Random(SEED).sample(changes(kind), num))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, name", [(kind, name) for kind in KINDS for name in KINDS[kind][1]])
def test_every_changed_key_is_computed_as_by_the_reference_or_refused_by_name(kind, name):
    check_changes(kind, [change for change in changes(kind) if change[0] == name])
