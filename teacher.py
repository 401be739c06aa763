"""The frozen teacher of a name, hub id or folder: its condition, guided clean prediction, trajectory and images.

    teacher = load_teacher("tiny")
    condition = teacher.encode(["a red ankle boot on a yellow background"])     # {"text": (1, 77, D)}
    f = teacher.denoise(x_t, t, w=3.0, **condition)                             # what BOOT learns from
    x_0 = teacher.solve(eps, teacher.schedule.grid(50), w=3.0, **condition)     # DDIM in fifty steps
    images = to_pil(teacher.decode(x_0))                                        # plumbing.images.to_pil

Times are those of signal_ode.py: 1..T, where the network's timestep index is t - 1.
"""

import functools
import math
import warnings

import torch

from model import VAE, TextEncoder, TinyVAE, UNet
from plumbing.configs import check, is_pixel
from plumbing.files import BadInput, parsing
from plumbing.hub import find, resolve
from plumbing.images import noise
from plumbing.layout import fingerprint, part_folder, read_labels, read_scheduler, read_unet
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load_module, visiting, weight_files
from signal_ode import Schedule, cfg, clean_prediction, solve


def load_teacher(spec="tiny", device="cpu", dtype=torch.float32):
    """The frozen teacher of a name, hub id or folder in the diffusers layout. Raises BadInput, one sentence."""
    teacher = Teacher(*resolve(spec), device, dtype)
    teacher.check_prediction()                              # loads the network, so that a broken file is reported now
    return teacher


class Teacher:
    """A diffusion model, frozen: of text and latents (Stable Diffusion), or of pixels, with classes or without (DDPM).

        .schedule        signal_ode.Schedule
        .clip            clean predictions lie within [-clip, clip]; None for latents
        .shape           of a sample, (C, h, w)
        .unet            the network; .settings: the values of its config
        .vae             with .text_encoder and .tokenizer, or None for pixels
        .labels          {name: number} of its classes
        .condition_type  "prompt", "label", or None for an unconditional model
        .uncond          the condition that guidance leads away from, or None where there is no guidance
        .spec            what load_teacher takes again
        .fingerprint     tells teachers apart; .decoder: tells apart what decodes, None for pixels

    Raises BadInput for a folder that is not such a model, or that this code would compute wrongly."""

    def __init__(self, folder, spec, device, dtype):
        self.folder, self.spec, self.device, self.dtype = folder, spec, torch.device(device), dtype
        self.unet_folder = part_folder(folder, "unet")
        betas, prediction, self.clip = read_scheduler(folder)
        self.schedule = Schedule(betas, prediction)
        config = self.settings = read_unet(folder)
        self.shape = (config["in_channels"], *config["sample_size"])
        self.condition_type = self.vae = self.text_encoder = self.tokenizer = self.decoder = None
        self.labels, files = {}, weight_files(self.unet_folder)
        if not is_pixel(config):
            self.load_text_parts(config)
            self.condition_type, self.clip = "prompt", None             # whatever the scheduler says: latents have no
            files += weight_files(folder / "text_encoder", "model")     # bounds
        elif config["num_class_embeds"]:
            self.condition_type, self.labels = "label", read_labels(folder, config["num_class_embeds"])
        self.set_negative_prompt("")
        self.fingerprint = fingerprint(files, self.schedule, self.clip)

    def load_text_parts(self, config):
        """VAE, tokenizer and text encoder, which must suit the U-Net's config and each other. Raises BadInput."""
        with parsing(self.folder / "tokenizer"):
            self.tokenizer = Tokenizer.from_folder(self.folder / "tokenizer")
        self.vae = load_module(VAE, self.folder / "vae", self.device, self.dtype)
        self.decoder = fingerprint(weight_files(self.folder / "vae"), self.schedule, None)
        self.text_encoder = load_module(TextEncoder, self.folder / "text_encoder", self.device, self.dtype, "model")
        text, vocab, channels = self.text_encoder.settings, self.tokenizer.vocab, self.vae.settings["latent_channels"]
        width, length = text["hidden_size"], self.tokenizer.length
        with parsing(self.unet_folder / "config.json"):
            check("in_channels", config["in_channels"], [channels])                     # as the VAE has
            check("cross_attention_dim", config["cross_attention_dim"][0], [width])     # as the text encoder has
        with parsing(self.folder / "text_encoder"):
            positions, tokens = text["max_position_embeddings"], text["vocab_size"]
            check("max_position_embeddings", positions, f"{length} or more, for the tokenizer", positions >= length)
            check("vocab_size", tokens, f"{len(vocab)}, for all tokens of tokenizer/ with those that were added "
                  "(resize_token_embeddings)", len(vocab) == tokens > max(vocab.values()))

    def use_decoder(self, spec):
        """From now on decode by the small VAE (AutoencoderTiny) in a folder or hub repository. Raises BadInput."""
        if self.vae is None:
            raise BadInput(f"teacher {self.spec} makes pixels: it needs no decoder")
        folder, _ = find(spec)
        small, own = load_module(TinyVAE, folder, self.device, self.dtype), self.vae.settings
        with parsing(folder / "config.json"):
            check("latent_channels", small.settings["latent_channels"], [own["latent_channels"]])
            check("levels of num_decoder_blocks", len(small.settings["num_decoder_blocks"]),
                  [len(own["block_out_channels"])])
        self.vae, self.decoder = small, fingerprint(weight_files(folder), self.schedule, None)

    def rest(self, text_encoder):
        """Move the VAE, and if asked the text encoder, to the CPU's memory, which they leave while they are needed."""
        for part in filter(None, (self.vae, self.text_encoder if text_encoder else None)):
            part.to("cpu")

    @functools.cached_property
    def unet(self):
        """The network. It is read when it is first needed, because a student makes samples without it."""
        return load_module(UNet, self.unet_folder, self.device, self.dtype)

    @torch.no_grad()
    def check_prediction(self):
        """Warn if the network seems to predict something else than its config says. At (eps, T) the output of an
        epsilon network is nearly eps, and that of others is not."""
        if self.unet.conv_in.weight.is_meta:                # tools.plan reads no values
            return
        condition = self.uncond or self.encode([next(iter(self.labels), "")])
        eps, T = noise([0], self.shape).to(self.device), torch.tensor([self.schedule.T], device=self.device)
        out = self.unet(eps, self.schedule.timestep(T), **condition)
        cosine = torch.cosine_similarity(out.flatten().float(), eps.flatten(), 0).item()
        if (cosine > 0.5) != (self.schedule.prediction == "epsilon"):
            warnings.warn(f"the network of {self.spec} does not look like one of prediction_type "
                          f"{self.schedule.prediction}, which its scheduler_config.json says or leaves out: its output "
                          f"for noise has a cosine of {cosine:.3f} with it, and near 1 is epsilon", stacklevel=2)

    # -------------------------------------------------------------------------------------------- the condition
    @torch.no_grad()
    def encode(self, prompts):
        """The condition of B prompts, by the names that the network takes: {"text": (B, 77, D)}; {"label": (B,)} of the
        names or numbers of classes; {} for an unconditional model. Raises BadInput for an unknown class."""
        condition = {}
        if self.text_encoder:
            with visiting(self.text_encoder, self.device):
                condition["text"] = self.text_encoder(self.tokenizer(prompts).to(self.device))
        if self.labels:
            numbers = [self.class_number(prompt) for prompt in prompts]
            condition["label"] = torch.tensor(numbers, device=self.device)
        return condition

    def class_number(self, name):
        """The number of a class by its name, or by the number itself. Raises BadInput."""
        numbers = {str(k): k for k in self.labels.values()} | self.labels
        if name not in numbers:
            known = [name for name in self.labels if name]
            listed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
            raise BadInput(f"teacher {self.spec} has no class {name!r}: {listed}, or their numbers")
        return numbers[name]

    def set_negative_prompt(self, prompt):
        """Choose what guidance leads away from: a prompt or class, or "", the empty one. Raises BadInput."""
        if prompt and not self.condition_type:
            raise BadInput(f"teacher {self.spec} is unconditional: --negative-prompt has no meaning for it")
        self.negative_prompt, self.uncond = prompt, None
        if prompt or self.text_encoder or "" in self.labels:
            self.uncond = self.encode([prompt])

    # ------------------------------------------------------------------------------------------- the prediction
    def denoise(self, x_t, t, w=1.0, **condition):
        """f_w(x_t, t), the clean prediction after guidance, float32 (B, C, h, w); clipped if the scheduler clips.
        The weights are frozen; the prediction has a gradient where x_t has one.
        `t`: int or (B,), 1..T. `w`: float or (B,). The number 1 is no guidance, and takes one pass instead of two."""
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        guided = torch.is_tensor(w) or w != 1
        if guided:                                          # one batch: with the condition, and without it
            x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])
            condition = {name: torch.cat([c, self.uncond[name].expand_as(c)]) for name, c in condition.items()}
        with torch.autocast(x_t.device.type, enabled=False):            # the weights have their precision already
            out = self.unet(x_t, self.schedule.timestep(t), **condition)
        f = clean_prediction(out, x_t, t, self.schedule)
        f = cfg(*f.chunk(2), w) if guided else f
        return f if self.clip is None else f.clamp(-self.clip, self.clip)

    def solve(self, eps, grid, solver="euler", space="x", **condition):
        """The end (B, C, h, w) of the trajectory of noise eps: DDIM's, unless told otherwise. See signal_ode.solve."""
        return solve(self.denoise, eps, grid, self.schedule, solver, space, **condition)[-1]

    # ------------------------------------------------------------------------------------------------- images
    @property
    def decoded_at_once(self):
        """How many latents are decoded together: one of 768x768 pixels, four of 512x512."""
        return max(1, 2**16 // math.prod(self.shape))

    @torch.no_grad()
    def decode(self, latents, seeds=None):
        """Images (B, 3, H, W) in [-1, 1], float32, of latents; where there is no VAE, of pixels. Raises BadInput for
        an image that is not finite, naming its seed, or the number of its row where no seeds are given."""
        images = latents
        if self.vae is not None:
            with visiting(self.vae, self.device):
                images = torch.cat([self.vae.decode(part) for part in latents.split(self.decoded_at_once)])
        finite = [z.flatten(1).isfinite().all(1) for z in (latents, images)]                    # (B,) each
        if broken := (~(finite[0] & finite[1])).nonzero().flatten().tolist():
            seed = broken[0] if seeds is None else seeds[broken[0]]
            part = "VAE" if finite[0][broken[0]] else "network"
            raise BadInput(f"the image of seed {seed} is not finite, because of the {part}: its weights or its "
                           "schedule are broken, or --precision fp16 overflows")
        return images.float().clamp(-1, 1)
