"""The frozen teacher of a name, hub id or folder: its condition, guided clean prediction, trajectory and pictures.

    teacher = load_teacher("tiny")
    condition = teacher.encode(["a red ankle boot on a yellow background"])     # {"text": (1, 77, D)}
    f = teacher.denoise(x_t, t, w=3.0, **condition)                             # what BOOT learns from
    x_0 = teacher.solve(eps, teacher.schedule.grid(50), w=3.0, **condition)     # DDIM in fifty steps
    images = to_pil(teacher.decode(x_0))
"""

import functools
import hashlib
import math
import os
import random
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from checkpoint import (BadInput, find, load_module, modern, open_tensors, parsing, read_json, require, resolve,
                        weight_files, weight_names)
from model import VAE, Number, TextEncoder, TinyVAE, UNet, is_pixel, unet_settings
from signal_ode import Schedule, clean_prediction, guide, solve
from tokenizer import Tokenizer

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISION_NAME = {dtype: name for name, dtype in PRECISION.items()}

def pick_device(name=None, local_rank=0):
    """The device of --device; None is CUDA if there is one, else the CPU. Of several GPUs, that of the local rank.
    Its float32 is float32, not TF32, because 1 / alpha_T multiplies what is rounded. Raises BadInput."""
    torch.backends.cudnn.allow_tf32 = False
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device {name or device} is not available here ({reason}): try cpu") from None
    return device

def torchrun():
    """(rank, number of processes, rank on this machine). Where a part of torchrun's environment is missing, the rest is
    what a cluster left there, and this is the only process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = ", ".join(name for name in names if not os.environ.get(name))
    size = os.environ.get("WORLD_SIZE") or "1"
    if missing and size != "1":
        warnings.warn(f"WORLD_SIZE={size} is not torchrun's, without {missing}: one process works alone", stacklevel=2)
    if missing or size == "1":
        return 0, 1, 0
    with parsing("RANK, WORLD_SIZE and LOCAL_RANK"):
        rank, world, local_rank = (int(os.environ[name]) for name in names[:3])
        if not 0 <= rank < world:
            raise ValueError(f"there is no process {rank} of {world}")
        return rank, world, local_rank

def load_teacher(spec="tiny", device="cpu", dtype=torch.float32):
    """The frozen teacher of a name, hub id or folder in the diffusers layout. Raises BadInput, one sentence."""
    teacher = Teacher(*resolve(spec), device, dtype)
    teacher.unet                                            # loads it now, so that a broken file is reported now
    return teacher

class Teacher:
    """A diffusion model, frozen: of text and latents (Stable Diffusion), or of pixels, with classes or without (DDPM).
    .schedule: Schedule. .clip: clean predictions lie within [-clip, clip], or None. .shape: of a sample, (C, h, w).
    .unet, and if it sees text .vae, .text_encoder and .tokenizer: its parts. .settings: those of the U-Net's config.
    .labels: name -> number of its classes. .takes: the option of its condition, "prompt" or "label", or None if it has
    none. .uncond: the condition that guidance leads away from, or None. .spec: what load_teacher takes again.
    .fingerprint: tells teachers apart; .decoder: tells apart what decodes, None for pixels."""

    def __init__(self, folder, spec, device, dtype):
        self.folder, self.spec, self.device, self.dtype = folder, spec, torch.device(device), dtype
        self.unet_folder = part_folder(folder, "unet")
        self.schedule, self.clip = read_scheduler(folder)
        config = self.settings = read_unet_config(folder)
        self.shape = (config["in_channels"], *config["sample_size"])
        self.takes = self.vae = self.text_encoder = self.tokenizer = self.decoder = None
        self.labels, files = {}, weight_files(self.unet_folder)
        if not is_pixel(config):
            self.load_text_parts(config)
            self.takes, self.clip = "prompt", None          # whatever the scheduler says, latents have no bounds
            files += weight_files(folder / "text_encoder", "model")
        elif config["num_class_embeds"]:
            self.takes, self.labels = "label", read_labels(folder, config["num_class_embeds"])
        self.set_negative_prompt("")
        self.fingerprint = fingerprint(files, self.schedule, self.clip)

    def load_text_parts(self, config):
        """VAE, tokenizer and text encoder, which must suit the U-Net's config and each other. Raises BadInput."""
        with parsing(self.folder / "tokenizer"):
            self.tokenizer = Tokenizer.from_folder(self.folder / "tokenizer")
        self.vae = load_module(VAE, self.folder / "vae", self.device, self.dtype)
        self.decoder = fingerprint(weight_files(self.folder / "vae"), self.schedule, None)
        self.text_encoder = load_module(TextEncoder, self.folder / "text_encoder", self.device, self.dtype, "model")
        where, text, vocab = self.unet_folder / "config.json", self.text_encoder.settings, self.tokenizer.vocab
        channels, width, length = config["in_channels"], text["hidden_size"], text["max_position_embeddings"]
        require(channels == self.vae.settings["latent_channels"], where, "in_channels", channels,
                f"{self.vae.settings['latent_channels']}, the VAE's latent_channels")
        require(set(config["cross_attention_dim"]) == {width}, where, "cross_attention_dim",
                config["cross_attention_dim"], f"{width}, the text encoder's width")
        if self.tokenizer.length > length:
            raise BadInput(f"{self.folder / 'tokenizer'}: model_max_length is more than the text encoder's {length}")
        require(len(vocab) == text["vocab_size"] > max(vocab.values()), self.folder / "text_encoder", "vocab_size",
                text["vocab_size"], f"{len(vocab)}, the tokens of {self.folder / 'tokenizer'} with those that were "
                "added (resize_token_embeddings gives each its embedding)")

    def use_decoder(self, spec):
        """From now on decode by the small VAE (AutoencoderTiny) in a folder or hub repository. Raises BadInput."""
        if self.vae is None:
            raise BadInput(f"teacher {self.spec} paints pixels: it needs no decoder")
        folder, _ = find(spec)
        small, own = load_module(TinyVAE, folder, self.device, self.dtype), self.vae.settings
        for key, value, wanted in (
                ("latent_channels", small.settings["latent_channels"], own["latent_channels"]),
                ("num_decoder_blocks", len(small.settings["num_decoder_blocks"]), len(own["block_out_channels"]))):
            require(value == wanted, folder / "config.json", f"the number of {key}", value, f"{wanted}, as the VAE has")
        self.vae, self.decoder = small, fingerprint(weight_files(folder), self.schedule, None)

    @functools.cached_property
    def unet(self):
        """The network, read when it is first needed: a student paints without it."""
        return load_module(UNet, self.unet_folder, self.device, self.dtype)

    @torch.no_grad()
    def encode(self, prompts):
        """The condition of B prompts, by the names that the network takes: {"text": (B, 77, D)}, {"label": (B,)} of the
        names or numbers of classes, or {} of a model that sees none. Raises BadInput for an unknown class."""
        condition = {}
        if self.text_encoder:
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
        if prompt and not self.takes:
            raise BadInput(f"teacher {self.spec} is unconditional: --negative-prompt has no meaning for it")
        self.negative_prompt, self.uncond = prompt, None
        if prompt or self.text_encoder or "" in self.labels:
            self.uncond = self.encode([prompt])

    def denoise(self, x_t, t, w=1.0, **condition):
        """f_w(x_t, t), the clean prediction after guidance, clipped if the scheduler clips; float32 (B, C, h, w). The
        weights are frozen: it has a gradient where x_t has one.
        t: int or (B,), 1..T. w: float or (B,); 1.0 is no guidance, and one pass of the network instead of two."""
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        guided = torch.is_tensor(w) or w != 1
        if guided:                                          # both passes at once: with the condition, and without it
            x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])
            condition = {name: torch.cat([c, self.uncond[name].expand_as(c)]) for name, c in condition.items()}
        with torch.autocast(x_t.device.type, enabled=False):            # the weights have their precision already
            out = self.unet(x_t, self.schedule.index(t), **condition)
        f = clean_prediction(out, x_t, t, self.schedule)
        f = guide(*f.chunk(2), w) if guided else f
        return f if self.clip is None else f.clamp(-self.clip, self.clip)

    def solve(self, eps, grid, solver="euler", space="x", **condition):
        """The end (B, C, h, w) of the trajectory of noise eps: DDIM's, unless told otherwise. See signal_ode.solve."""
        return solve(self.denoise, eps, grid, self.schedule, solver, space, **condition)[-1]

    @property
    def decoded_at_once(self):
        """How many latents are decoded together: one of 768x768 pixels, four of 512x512."""
        return max(1, 2**16 // math.prod(self.shape))

    @torch.no_grad()
    def decode(self, latents, seeds=None):
        """Images (B, 3, H, W) in [-1, 1], float32, of latents or, where there is no VAE, of pixels. Raises BadInput for
        one that is not finite, with its seed, or the number of its row."""
        images = latents
        if self.vae is not None:
            parts = latents.split(self.decoded_at_once)
            images = torch.cat([self.vae.decode(part) for part in parts])
        good = [z.flatten(1).isfinite().all(1).tolist() for z in (latents, images)]
        for seed, *finite in zip(range(len(images)) if seeds is None else seeds, *good):
            if not all(finite):
                part, half = "VAE" if finite[0] else "network", self.dtype == torch.float16
                advice = "take --precision fp32 or bf16" if half else "its weights or its schedule are broken"
                raise BadInput(f"the picture of seed {seed} is not finite, its {part} overflows in "
                               f"{PRECISION_NAME.get(self.dtype, self.dtype)}: {advice}")
        return images.float().clamp(-1, 1)

def part_folder(folder, part):
    """The folder of a model's part; models of pixels may keep all of theirs in one."""
    own, config = folder / part, folder / ("config.json" if part == "unet" else f"{part}_config.json")
    there = own.is_dir() or ((folder / "model_index.json").exists() and not config.exists())
    return own if there else folder

# The parts of a model that this code knows, and the classes that it takes them for; of those with None it makes sure
# by their own config, or has no use for them.
CLASSES = {
    "unet": ("UNet2DConditionModel", "UNet2DModel"), "vae": ("AutoencoderKL",), "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"), "scheduler": None, "safety_checker": None,
    "feature_extractor": None, "image_encoder": None}

def read_parts(folder):
    """{part: class} that the model_index.json of a model lists or, where it has none, those of its folders, of unknown
    class. Raises BadInput for a part that a teacher of this code has not."""
    path = folder / "model_index.json"
    if not path.exists():
        return {name: None for name in (*CLASSES, "vqvae") if (folder / name).is_dir()}
    lists = {name: value for name, value in read_json(path).items()
             if isinstance(value, list) and any(value) and not name.startswith("_")}
    for name, value in lists.items():
        require(name in CLASSES, path, name, value, f"no other parts than {', '.join(CLASSES)}")
        require(CLASSES[name] is None or value[-1] in CLASSES[name], path, name, value, ", ".join(CLASSES[name] or ()))
    return {name: value[-1] for name, value in lists.items()}

def read_scheduler(folder):
    """(schedule, clip) of a model's folder. Raises BadInput."""
    path = part_folder(folder, "scheduler") / "scheduler_config.json"
    if not path.exists():
        student = any(folder.glob("student.json")) or any(folder.glob("student/student.json"))
        found = "a student, not a teacher" if student else "no model in the diffusers layout"
        raise BadInput(f"{folder} holds {found}: there is no {path.relative_to(folder)}")
    config = read_json(path)
    # If a config omits clip_sample, the DDPM and DDIM schedulers clip and the others don't.
    clips = config.get("clip_sample", config.get("_class_name") in ("DDPMScheduler", "DDIMScheduler"))
    bound, bounds = config.get("clip_sample_range", 1.0), Number(float, 1e-3, 1e3)
    require(clips in (None, False, True), path, "clip_sample", clips, "false or true")
    require(bound in bounds, path, "clip_sample_range", bound, bounds)
    with parsing(path):
        return Schedule(config), bound if clips else None

def read_unet_config(folder):
    """The settings of a model's U-Net, and its sample_size, [h, w]; it must be a teacher's. Raises BadInput."""
    where, parts = part_folder(folder, "unet") / "config.json", read_parts(folder)
    config = read_json(where)
    with parsing(where):
        c = unet_settings(config)
    pixel, kind, channels = is_pixel(config), parts.get("unet") or c["_class_name"], c["in_channels"]
    size, good_size = config.get("sample_size"), Number(int, 1, 2**14)
    sizes = size if isinstance(size, list) else [size, size]
    for key, value, good, wanted in (
            ("_class_name", c["_class_name"], c["_class_name"] == kind, f"{kind}, which model_index.json says"),
            ("in_channels", channels, not pixel or channels == 3, "3, or any number where there is a VAE"),
            ("out_channels", c["out_channels"], c["out_channels"] == channels, f"in_channels, {channels}"),
            ("sample_size", size, len(sizes) == 2 and all(n in good_size for n in sizes),
             f"{good_size}, or a list of height and width"),
            ("num_class_embeds", c["num_class_embeds"], pixel or not c["num_class_embeds"], "null beside text")):
        require(good, where, key, value, wanted)
    if pixel and ("vae" in parts or "vqvae" in parts):
        raise BadInput(f"{where}: a UNet2DModel on latents is not supported: on pixels, without a VAE")
    if c["class_embed_type"] or c["target_embed_type"] or c["time_cond_proj_dim"]:
        raise BadInput(f"{where}: with class_embed_type or time_cond_proj_dim it is a student, not a teacher")
    return c | {"sample_size": sizes}

def read_labels(folder, num):
    """{name: number} of the classes. model_index.json may name them, as DiT's does; "" stands for none of them."""
    path = folder / "model_index.json"
    index = read_json(path) if path.exists() else {}
    names, labels = index.get("id2label") or {}, {}
    require(isinstance(names, dict) and all(isinstance(name, str) for name in names.values()), path, "id2label", names,
            'names by number, {"0": "cat", ...}')
    for k in range(num):
        name = names.get(str(k), str(k))
        labels[f"{name} ({k})" if name in labels else name] = k     # ImageNet has two classes named crane
    return labels

def fingerprint(paths, schedule, clip):
    """A short hash of the schedule and of the first weights of every tensor in the files of U-Net and text encoder.
    It is the same for files in half precision, and does not depend on the VAE."""
    alphas = schedule.alpha(torch.arange(schedule.T + 1)).mul(1e6).round().tolist()
    digest = hashlib.sha256(f"{schedule.prediction} {clip} {alphas}".encode())
    some = {}
    for path in paths:
        with open_tensors(path) as file:
            some |= {modern(name): file.get_tensor(name).flatten()[:8].half() for name in weight_names(file)}
    for name in sorted(some):
        digest.update(name.encode() + some[name].numpy().tobytes())
    return digest.hexdigest()[:16]

def readable(text):
    """A text from the command line in which U+FFFD stands for what is not UTF-8, with a warning if that is needed."""
    known = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if known != text:
        warnings.warn(f"the prompt {known!r} is not UTF-8 text: \ufffd stands for what can't be read", stacklevel=2)
    return known

def read_prompts(path):
    """The lines of a UTF-8 prompt file that hold something. Raises BadInput."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")    # other separators belong to the prompt
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; --prompts takes a text file with one prompt a line") from None
    except OSError as error:
        raise BadInput(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start})") from None
    prompts = [line.strip(" \t") for line in lines if line.strip()]
    if not prompts:
        raise BadInput(f"{path} holds no prompt; it takes one a line")
    return prompts

def compose_prompts(num=100_000, seed=0):
    """num distinct prompts from the word lists of prompts.json, a function of the seed."""
    words, rng, prompts = read_json(Path(__file__).parent / "prompts.json"), random.Random(seed), {}
    while len(prompts) < num:                               # a dict keeps them distinct and in order
        scene = " ".join(map(rng.choice, rng.choice(words["scenes"])))
        prompts[rng.choice(words["styles"]).format(scene)] = True
    return list(prompts)

def training_prompts(teacher, path=None):
    """The prompts or labels to train on: those of a file, the teacher's own, or composed ones. Raises BadInput."""
    own = teacher.folder / "prompts.txt"
    if path and not teacher.takes:
        raise BadInput(f"teacher {teacher.spec} is unconditional: --prompts has no meaning for it")
    if path or own.exists():
        prompts = read_prompts(path or own)
        if teacher.labels:
            teacher.encode(prompts)                         # an unknown label is found now, not in an hour
        return prompts
    if teacher.labels:
        return [name for name in teacher.labels if name]
    return compose_prompts() if teacher.takes else [""]

def noise(seeds, shape):
    """eps (B, *shape), each sample from a generator of its own: the same in any batch, on any number of devices."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

def to_pil(images):
    """Images (B, 3, H, W) in [-1, 1] to a list of B PIL images."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]

def image_grid(rows, least=0, names=None):
    """One PIL image of rows of equally large PIL images, enlarged by a whole factor to `least` pixels each; with names,
    those of the rows stand left of them."""
    width, height = rows[0][0].size
    grid = Image.new("RGB", (max(map(len, rows)) * width, len(rows) * height), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            grid.paste(image, (x * width, y * height))
    factor = max(1, -(-least // width))
    grid = grid.resize([factor * size for size in grid.size], Image.Resampling.NEAREST)
    return grid if names is None else name_rows(grid, names)

def name_rows(grid, names):
    """The image with names, in equal distances, left of it."""
    font = ImageFont.load_default(16)
    margin = 16 + max(round(font.getlength(name)) for name in names)
    named = Image.new("RGB", (margin + grid.width, grid.height), "white")
    named.paste(grid, (margin, 0))
    for row, name in enumerate(names):
        ImageDraw.Draw(named).text((8, (row + 0.5) * grid.height / len(names)), name, "black", font, anchor="lm")
    return named
