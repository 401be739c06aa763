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

from conftest import CHECKPOINTS, COSINE, DDPM, SD, TINY, ZERO_SNR, slow
from plumbing.configs import (PIXEL_UNET, SCHEDULE, TEXT_CONFIG, TEXT_UNET, TINY_VAE_CONFIG, VAE_CONFIG, Number, check,
                              read_config, read_schedule)
from plumbing.files import read_json
from reference import REFUSED, SAME, diffusers, outcome, transformers

SEED, DRAWS = 2306, 5                           # so many values of other types are drawn for each key
REMOVED = type("Removed", (), {"__repr__": lambda self: "removed"})()
PIXEL, TEXT = ["ddpm-256", "ddpm-cifar10-32", "ddpm-butterflies-128"], ["sd15", "sd21-base", "sd21-768-v"]
UNSEEN = {                                      # no output depends on it: the reference may be stricter about its type
    "dropout", "attention_dropout",             # a frozen teacher has none
    "sample_size",                              # of a VAE, it matters to tiles only
    "force_upcast", "latent_magnitude", "latent_shift",             # they matter to a small VAE's own forward only
    # Of a text encoder: random weights, training, the other outputs, and the library's own
    "initializer_factor", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "projection_dim",
    "output_hidden_states", "return_dict", "dtype", "torch_dtype", "id2label", "label2id", "problem_type",
    "architectures", "model_type", "chunk_size_feed_forward", "is_encoder_decoder", "transformers_version"}
# What the reference knows, beyond what our tables list
BETAS = {"beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp", "laplace"],
         "trained_betas": [[0.02] * 1000, [0.02] * 10, [0.0] * 1000, [2.0] * 1000], "beta_end": [0.01, 0.5],
         "prediction_type": ["flow_prediction"], "thresholding": [True], "variance_type": ["learned_range"],
         "_class_name": ["LCMScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "ScoreSdeVeScheduler"]}


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
        for ask in (lambda: check("size", value, supported), lambda: read_config({"size": value}, {"size": supported})):
            with pytest.raises(ValueError, match=f"^size = {re.escape(repr(value))} is not supported: {said}$"):
                ask()


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
            ({"block_out_channels": 8}, "block_out_channels = 8 is"), ({"layers": "x" * 99}, r"= 'x{59} is not")):
        with pytest.raises(ValueError, match=message):
            read_config(config | change, table, either=["layers"])


# ---------------------------------------------------------------------------------------------------------- schedules
@pytest.mark.parametrize("config", [SD, DDPM, COSINE, ZERO_SNR])
def test_betas_are_those_of_diffusers(config):
    assert outcome("scheduler", {"_class_name": "DDIMScheduler", **config}) == SAME


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


def outcome_of(part, base, key, value):
    """The outcome where one key of a config is set to a value or removed. A refusal names it; what contradicts a class
    need not say so."""
    config = {name: old for name, old in {**base, key: value}.items() if old is not REMOVED}

    def refusal(error):
        return value is REMOVED if isinstance(error, KeyError) else key in str(error) or key == "_class_name"
    whole = type(base.get(key)) is float and type(value) is int             # to which the reference may say no
    return outcome(part, config, refusal, unseen=whole or key in UNSEEN or key == "_class_name")


def parameters(*classes):
    """{name: default} of everything that the constructors take; tuples as JSON has them, as lists."""
    found = {name: p.default for c in classes for name, p in inspect.signature(c).parameters.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


UNETS = parameters(diffusers.UNet2DModel, diffusers.UNet2DConditionModel)       # a key of one can stray into the other
SCHEDULERS = parameters(diffusers.DDIMScheduler, diffusers.DDPMScheduler)
KINDS = {                                                   # part, published configs, known keys, our table
    "text_unet": ("unet", TEXT, UNETS, TEXT_UNET), "pixel_unet": ("unet", PIXEL, UNETS, PIXEL_UNET),
    "vae": ("vae", TEXT, parameters(diffusers.AutoencoderKL), VAE_CONFIG),
    "decoder": ("decoder", ["tiny", "taesd"], parameters(diffusers.AutoencoderTiny), TINY_VAE_CONFIG),
    "text_encoder": ("text_encoder", TEXT, parameters(transformers.CLIPTextConfig), TEXT_CONFIG),
    "scheduler": ("scheduler", TEXT + PIXEL, SCHEDULERS, SCHEDULE)}


def values(key, base, known, table, rng):
    """What to try for a key: all that its table lists, its opposite, and DRAWS of other types, sizes and orders."""
    value, levels = base.get(key, known.get(key)), len(base.get("block_out_channels", "ab"))
    tried = [good for good in table.get(key, []) if good is not ... and not isinstance(good, Number)]
    others = [None, True, False, "x", 0, -1, 1, 2, 3, 5, 8, 64, 256, 1e-6, 0.5, 1.5, 2.0, [], {}, [value],
              [value] * levels] + [REMOVED] * (key in base)
    if isinstance(value, list):
        tried = [[item] * len(value) for item in tried] + [[item, *value[1:]] for item in tried]
        others += [value[::-1], value[1:], [*value, value[-1]], [value[0]] * len(value), [item * 2 for item in value]]
    elif isinstance(value, str):
        tried.append("x")
    elif value is None or isinstance(value, bool):
        tried.append(not value)
    elif type(value) in (int, float):
        tried.append(2 * value)
        others += [float(value), [value, *[2 * value] * (levels - 1)]]
    return tried + BETAS.get(key, []) * (table is SCHEDULE) + rng.sample(others, DRAWS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", [0.03, slow(1)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_key_is_computed_as_by_the_reference_or_refused_by_name(kind, share):
    """Every key, each in one published config that is drawn by the seed, or a share of these changes."""
    part, names, known, table = KINDS[kind]
    bases, rng, tried = {name: small(name, part) for name in names}, random.Random(f"{SEED} {kind}"), []
    for key in sorted({*known, *table}.union(*bases.values())):
        name = rng.choice(names)
        tried += [(name, key, value) for value in values(key, bases[name], known, table, rng)]
    wrong = [f"{name} as published" for name, base in bases.items() if outcome(part, base) != SAME]
    for name, key, value in rng.sample(tried, math.ceil(share * len(tried))):
        what = outcome_of(part, bases[name], key, value)
        if what not in (SAME, REFUSED):
            wrong.append(f"{name}, {key} = {value!r}: {what}")
    assert not wrong, f"{len(wrong)} of {len(tried)}, seed {SEED}:\n" + "\n".join(wrong)
