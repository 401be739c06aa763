"""Every key of the published configs, changed alone: computed as the reference libraries do, or refused by its name."""

import inspect
import json
import random

import pytest
import torch

from plumbing.files import read_json
from plumbing.hub import TINY
from plumbing.weights import remap_key
from conftest import CHECKPOINTS
from model import TextEncoder, TinyVAE, UNet, VAE
from signal_ode import Schedule
from test_parity import diffusers, shaken, transformers

SEED, DRAWS = 2306, 2                           # so many values of another type are drawn for each key
SAME, REFUSED = "the same", "refused"
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


def small(name, part):
    """A published config of a network that is small enough to be computed some hundred times."""
    if part == "decoder":
        return read_json((TINY / "decoder" if name == "tiny" else CHECKPOINTS / name) / "config.json")
    config = json.loads(next((CHECKPOINTS / name / part).glob("*config.json")).read_text())
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


def run_unet(theirs):
    """The outputs of their U-Net, and a function that computes ours from the same inputs."""
    size = 2 ** (len(theirs.config.block_out_channels) - 1)
    x, t = torch.randn(2, theirs.config.in_channels, size, size), torch.tensor([10, 999])
    inputs, names = {}, {"text": "encoder_hidden_states", "guidance": "timestep_cond"}
    if "cross_attention_dim" in inspect.signature(type(theirs)).parameters:
        width = theirs.config.cross_attention_dim           # of the text, for each level if it is a list
        inputs["text"] = torch.randn(2, 7, width[0] if isinstance(width, list) else width)
        if theirs.config.time_cond_proj_dim:
            inputs["guidance"] = torch.tensor([1.0, 7.5])
    if theirs.class_embedding is not None:
        inputs["target" if theirs.config.class_embed_type == "timestep" else "label"] = torch.tensor([0, 0])
    given = {names.get(name, "class_labels"): value for name, value in inputs.items()}
    if "guidance" in inputs:
        given["timestep_cond"] = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
            None, inputs["guidance"] - 1, embedding_dim=theirs.config.time_cond_proj_dim)
    return [theirs(x, t, **given).sample], lambda ours: [ours(x, t, **inputs)]


def run_vae(theirs):
    """The same of a VAE: mean and log-variance of images, and the images of scaled latents."""
    images, z = torch.rand(2, theirs.config.in_channels, 16, 16), torch.randn(2, theirs.config.latent_channels, 2, 2)
    posterior = theirs.encode(images).latent_dist
    decoded = theirs.decode(z / theirs.config.scaling_factor).sample
    return [posterior.mean, posterior.logvar, decoded], lambda ours: [*ours.moments(images), ours.decode(z)]


def run_decoder(theirs):
    """The same of a small VAE: scaled latents of images, and the images of such latents."""
    images, z = torch.rand(2, 3, 16, 16), torch.randn(2, theirs.config.latent_channels, 4, 4)
    scale = theirs.config.scaling_factor
    encoded, decoded = theirs.encode(images).latents * scale, theirs.decode(z / scale).sample
    return [encoded, decoded], lambda ours: [ours.encode(images), ours.decode(z)]


def run_text_encoder(theirs):
    """The same of a text encoder, which is told of the padding where its config asks for that, as pipelines do."""
    ids = torch.randint(theirs.config.vocab_size, (2, min(7, theirs.config.max_position_embeddings)))
    mask = (torch.arange(ids.shape[1]) < 3).expand(2, -1).long()
    masked = getattr(theirs.config, "use_attention_mask", False)
    return [theirs(ids, mask if masked else None)[0]], lambda ours: [ours(ids)]


def run_scheduler(theirs):
    """The same of a scheduler: squares of signal and noise scale, and what its network predicts."""
    alpha_bar = theirs.alphas_cumprod
    assert 0 <= alpha_bar.min() and alpha_bar.max() <= 1
    t = torch.arange(1, len(alpha_bar) + 1)
    kinds = ["epsilon", "sample", "v_prediction"]
    kind = torch.tensor([1.0 + kinds.index(theirs.config.prediction_type)])
    return [torch.stack([alpha_bar, 1 - alpha_bar]), kind], lambda ours: [
        torch.stack([ours.alpha(t) ** 2, ours.sigma(t) ** 2]), torch.tensor([1.0 + kinds.index(ours.prediction)])]


def their(part, config):
    """The reference library's own object of a config, with random weights if it is a network."""
    if part == "text_encoder":
        return shaken(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)))
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    return theirs if part == "scheduler" else shaken(theirs)


def load(ours, theirs):
    """Whether our network has just the weights of theirs, which it then takes: if not, checkpoint.build says so."""
    weights = {remap_key(name): w for name, w in theirs.state_dict().items() if "position_ids" not in name}
    try:
        return ours.eval().load_state_dict(weights, assign=True)
    except RuntimeError:
        return False


OURS = {"unet": UNet, "vae": VAE, "decoder": TinyVAE, "text_encoder": TextEncoder, "scheduler": Schedule}
RUN = {"unet": run_unet, "vae": run_vae, "decoder": run_decoder, "text_encoder": run_text_encoder,
       "scheduler": run_scheduler}
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


def told(message, key, value):
    """Whether a message names the key and the value; of a list, an item or how many there are."""
    values = [value, len(value), *value] if isinstance(value, list) else [value]
    return key in message and any(repr(v) in message for v in values)


def named(message, config, key):
    """Whether a refusal names the key and its value, or that of another key which contradicts it. What contradicts a
    class need not say so."""
    if key not in message and key != "_class_name":
        return False
    return key not in config or any(told(message, *item) for item in config.items())


@torch.no_grad()
def outcome(part, base, key, value):
    """SAME, REFUSED, or else what is wrong with ours, where one key of a config is set to a value or removed."""
    torch.manual_seed(0)
    config = {**base, key: value}
    if value is REMOVED:
        del config[key]
    try:
        with torch.device("cpu" if part == "scheduler" else "meta"):
            ours = OURS[part](config)
    except KeyError as error:
        return REFUSED if value is REMOVED and error.args == (key,) else f"KeyError: {error}"
    except ValueError as error:
        return REFUSED if named(str(error), config, key) else f"refused without key and value: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    try:
        theirs = their(part, config)
        if part != "scheduler" and not load(ours, theirs):
            return REFUSED
        expected, run = RUN[part](theirs)
    except Exception as error:
        return REFUSED if key in UNSEEN[part] else f"accepted, but the reference refuses it: {error!r}"
    try:
        actual = run(ours)
    except Exception as error:
        return f"crashes when run: {error!r}"
    return SAME if all(map(same, actual, expected)) else "silently different"


def same(ours, theirs):
    """Whether two outputs differ by less than 1e-5 of the largest value, and have their NaNs in the same places."""
    largest = max([0.0, *theirs.nan_to_num(0, 0, 0).abs().flatten().tolist()])
    return ours.shape == theirs.shape and torch.allclose(
        ours.to(theirs.dtype), theirs, rtol=0, atol=1e-5 * largest, equal_nan=True)


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, name", [(kind, name) for kind in KINDS for name in KINDS[kind][1]])
def test_a_changed_key_is_computed_as_by_the_reference_or_refused_by_name(kind, name):
    diffusers.logging.set_verbosity_error()
    part, tried = KINDS[kind][0], [change for of, *change in changes(kind) if of == name]
    base = small(name, part)
    assert outcome(part, base, *next(iter(base.items()))) == SAME
    found = [(key, value, outcome(part, base, key, value)) for key, value in tried]
    wrong = [f"{key} = {value!r}: {what}" for key, value, what in found if what not in (SAME, REFUSED)]
    assert not wrong, f"{len(wrong)} of {len(tried)}, seed {SEED}:\n" + "\n".join(wrong)
