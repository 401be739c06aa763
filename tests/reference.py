"""Our networks and schedules beside the reference libraries' of one config, with equal random weights and inputs."""

import inspect

import pytest
import torch

from conftest import shaken
from model import TextEncoder, TinyVAE, UNet, VAE
from plumbing.configs import read_schedule
from plumbing.weights import remap_key
from signal_ode import Schedule

diffusers = pytest.importorskip("diffusers", reason="the reference library diffusers is not installed")
transformers = pytest.importorskip("transformers", reason="the reference library transformers is not installed")
diffusers.utils.logging.disable_progress_bar()
diffusers.logging.set_verbosity_error()

SAME, REFUSED = "the same", "refused"


def run_unet(theirs, size=None):
    """The outputs of their U-Net, and a function that computes ours from the same inputs."""
    size = size or [2 ** len(theirs.config.block_out_channels)] * 2         # 2x2 in the middle
    x, t = torch.randn(3, theirs.config.in_channels, *size), torch.tensor([0, 400, 999])
    inputs, names = {}, {"text": "encoder_hidden_states", "guidance": "timestep_cond"}
    if "cross_attention_dim" in inspect.signature(type(theirs)).parameters:
        width = theirs.config.cross_attention_dim           # of the text, for each level if it is a list
        inputs["text"] = torch.randn(3, 77, width[0] if isinstance(width, list) else width)
        if theirs.config.time_cond_proj_dim:
            inputs["guidance"] = torch.tensor([1.0, 3.0, 7.5])
    if theirs.config.class_embed_type == "timestep":
        inputs["target"] = torch.tensor([0, 17, 1000])
    elif theirs.class_embedding is not None:
        last = (theirs.config.num_class_embeds or 1) - 1
        inputs["label"] = torch.tensor([0, last // 2, last])
    given = {names.get(name, "class_labels"): value for name, value in inputs.items()}
    if "guidance" in inputs:
        given["timestep_cond"] = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
            None, inputs["guidance"] - 1, embedding_dim=theirs.config.time_cond_proj_dim)
    return [theirs(x, t, **given).sample], lambda ours: [ours(x, t, **inputs)]


def run_vae(theirs, size=16):
    """The same of a VAE: mean and log-variance of images, and the images of scaled latents."""
    images = torch.rand(2, theirs.config.in_channels, size, size) * 2 - 1
    z = torch.randn(2, theirs.config.latent_channels, size // 8, size // 8)
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
    ids = torch.randint(theirs.config.vocab_size, (2, min(77, theirs.config.max_position_embeddings)))
    mask = (torch.arange(ids.shape[1]) < 3).expand(2, -1).long()
    masked = getattr(theirs.config, "use_attention_mask", False)
    return [theirs(ids, mask if masked else None)[0]], lambda ours: [ours(ids)]


def run_scheduler(theirs):
    """The same of a scheduler, whose prediction has to be ours: squares of signal and noise scale."""
    alpha_bar, prediction = theirs.alphas_cumprod, theirs.config.prediction_type
    assert 0 <= alpha_bar.min() and alpha_bar.max() <= 1
    t = torch.arange(1, len(alpha_bar) + 1)
    return [torch.stack([alpha_bar, 1 - alpha_bar])], lambda ours: [
        torch.stack([ours.alpha(t) ** 2, ours.sigma(t) ** 2]) if ours.prediction == prediction else t]


OURS = {"unet": UNet, "vae": VAE, "decoder": TinyVAE, "text_encoder": TextEncoder,
        "scheduler": lambda config: Schedule(*read_schedule(config))}
RUN = {"unet": run_unet, "vae": run_vae, "decoder": run_decoder, "text_encoder": run_text_encoder,
       "scheduler": run_scheduler}


def their(part, config):
    """The reference library's own object of a config, with random weights if it is a network."""
    if part == "text_encoder":
        return shaken(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)))
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    return theirs if part == "scheduler" else shaken(theirs)


def load(part, ours, theirs):
    """Whether our network has just the weights of theirs, which it then takes: if not, plumbing.weights says so."""
    weights = theirs.state_dict()
    if part == "text_encoder":                              # of which transformers 5 leaves out a part of the names
        weights = {remap_key(name): w for name, w in weights.items() if "position_ids" not in name}
    try:
        return ours.eval().load_state_dict(weights, assign=True)
    except RuntimeError:
        return False


def same(ours, theirs):
    """Whether two outputs differ by less than 1e-5 of the largest value, and have their NaNs in the same places."""
    largest = max([0.0, *theirs.nan_to_num(0, 0, 0).abs().flatten().tolist()])
    return ours.shape == theirs.shape and torch.allclose(
        ours.to(theirs.dtype), theirs, rtol=0, atol=1e-5 * largest, equal_nan=True)


@torch.no_grad()
def outcome(part, config, refusal=lambda error: False, unseen=False, **how):
    """SAME, REFUSED, or else what is wrong with ours, of this config.
    refusal: whether a KeyError or ValueError is as it should be. unseen: no output depends on what is tried, so that
    the reference may be stricter. how: what the part's function above takes."""
    torch.manual_seed(0)
    try:
        with torch.device("cpu" if part == "scheduler" else "meta"):
            ours = OURS[part](config)
    except Exception as error:
        return REFUSED if isinstance(error, (KeyError, ValueError)) and refusal(error) else f"refused: {error!r}"
    try:
        theirs = their(part, config)
        if part != "scheduler" and not load(part, ours, theirs):
            return REFUSED
        expected, run = RUN[part](theirs, **how)
    except Exception as error:
        return REFUSED if unseen else f"accepted, but the reference refuses it: {error!r}"
    try:
        actual = run(ours)
    except Exception as error:
        return f"crashes when run: {error!r}"
    return SAME if all(map(same, actual, expected)) else "silently different"
