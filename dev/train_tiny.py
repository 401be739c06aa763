"""Make all of tiny/: train a miniature Stable Diffusion and a pixel model on tinted Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    python -m tools.train_tiny                                          the teachers; the same command resumes
    python -m tools.train_tiny --stages student --student runs/best     ship that student, in half precision
"""

import argparse
import functools
import gzip
import itertools
import json
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from plumbing.files import BadInput, command, write_file, write_json
from plumbing.hub import TINY
from plumbing.weights import WEIGHTS, load_module
from model import TextEncoder, TinyVAE, UNet, VAE
from signal_ode import Schedule, add_noise, append_dims
from student import load_student, save_student
from plumbing.processes import pick_device
from plumbing.tokenizer import Tokenizer, VISIBLE
from tools.judge import Judge, article, frechet, load_judge, moments, prompt

GARMENTS = ["t-shirt", "pair of trousers", "pullover", "dress", "coat",
            "sandal", "shirt", "sneaker", "bag", "ankle boot"]
COLOURS = {"red": (217, 38, 38), "orange": (245, 140, 25), "yellow": (247, 221, 55), "green": (46, 160, 67),
           "blue": (45, 90, 220), "purple": (130, 60, 175), "pink": (245, 150, 190), "white": (244, 244, 244)}
PAIRS = list(itertools.permutations(range(len(COLOURS)), 2))    # garment colour, background's: never equal
COMBINATIONS = [(g, *pair) for g in range(len(GARMENTS)) for pair in PAIRS]
HELD_OUT = set(random.Random(0).sample(COMBINATIONS, len(COMBINATIONS) // 10))              # never trained on

SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear",
             "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon", "clip_sample": False,
             "set_alpha_to_one": True, "steps_offset": 1, "timestep_spacing": "trailing",
             "trained_betas": None}
VAE_CONFIG = {"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [16, 32, 64],
              "layers_per_block": 1, "down_block_types": ["DownEncoderBlock2D"] * 3,
              "up_block_types": ["UpDecoderBlock2D"] * 3, "in_channels": 3, "out_channels": 3,
              "latent_channels": 4, "norm_num_groups": 8, "sample_size": 32}
DECODER_CONFIG = {"_class_name": "AutoencoderTiny", "act_fn": "relu", "in_channels": 3, "out_channels": 3,
                  "latent_channels": 4, "encoder_block_out_channels": [16] * 3, "num_encoder_blocks": [1] * 3,
                  "decoder_block_out_channels": [16] * 3, "num_decoder_blocks": [3, 2, 1], "scaling_factor": 1.0,
                  "upsampling_scaling_factor": 2, "latent_magnitude": 3, "latent_shift": 0.5}
TEXT_CONFIG = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "gelu",
               "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 2,
               "max_position_embeddings": 77, "layer_norm_eps": 1e-5, "projection_dim": 64, "pad_token_id": 0}
UNET_CONFIG = {"_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": [2, 3],
               "block_out_channels": [64, 96], "cross_attention_dim": 64,
               "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "flip_sin_to_cos": True,
               "freq_shift": 0, "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "in_channels": 4,
               "out_channels": 4, "layers_per_block": 1, "norm_eps": 1e-5, "norm_num_groups": 16,
               "sample_size": 8, "use_linear_projection": True}
PIXEL_CONFIG = {"_class_name": "UNet2DModel", "act_fn": "silu", "attention_head_dim": 16,
                "block_out_channels": [16, 48, 64],
                "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
                "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"], "in_channels": 3, "out_channels": 3,
                "layers_per_block": 1, "norm_eps": 1e-5, "norm_num_groups": 8, "sample_size": 32,
                "num_class_embeds": len(GARMENTS) + 1}
PIXEL_SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear",
                   "beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "v_prediction", "clip_sample": True,
                   "variance_type": "fixed_small", "trained_betas": None}
PIXEL_INDEX = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.30.0",
               "scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"],
               "id2label": dict(enumerate([*GARMENTS, ""]))}
MODEL_INDEX = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0",
               "feature_extractor": [None, None], "image_encoder": [None, None],
               "requires_safety_checker": False, "safety_checker": [None, None],
               "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
               "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
               "vae": ["diffusers", "AutoencoderKL"]}


def read_split(folder, split):
    """Fashion-MNIST from its idx files: garments (N, 32, 32) float in [0, 1], labels (N,)."""
    def read(kind, header):
        try:
            with gzip.open(Path(folder) / f"{split}-{kind}-ubyte.gz") as file:
                return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=header).copy())
        except FileNotFoundError as error:
            raise BadInput(f"{error.filename} is missing: "
                           "apt-get install dataset-fashion-mnist, or --data FOLDER") from None
    images = read("images-idx3", 16).view(-1, 28, 28).float() / 255
    return F.pad(images, (2, 2, 2, 2)), read("labels-idx1", 8).long()


def tint(garments, colour, background):
    """Images (B, 3, 32, 32) in [-1, 1]: garments' light and shade in one colour, on a plain background."""
    palette = torch.tensor(list(COLOURS.values())) / 255
    value, cover = garments[:, None], (8 * garments[:, None]).clamp(max=1)
    cloth = palette[colour][:, :, None, None] * (0.25 + 0.75 * value)
    return 2 * torch.lerp(palette[background][:, :, None, None].expand_as(cloth), cloth, cover) - 1


def draw_batch(split, batch, rng, combinations):
    """A batch of tinted images and their (garment, colour, background), labels (B, 3)."""
    garments, labels = split
    pairs = [[c[1:] for c in combinations if c[0] == g] for g in range(len(GARMENTS))]
    index = torch.randint(len(garments), (batch,), generator=rng)
    choice = torch.rand(batch, generator=rng).tolist()
    pair = torch.tensor([pairs[g][int(u * len(pairs[g]))] for g, u in zip(labels[index].tolist(), choice)])
    return tint(garments[index], *pair.T), torch.cat([labels[index, None], pair], 1)


def captions(labels, rng):
    """One of three phrasings for each image, and none for a tenth of them: what guidance is trained on."""
    texts, colours = [], list(COLOURS)
    for (g, c, b), u in zip(labels.tolist(), torch.rand(len(labels), generator=rng).tolist()):
        garment, colour, background = GARMENTS[g], colours[c], colours[b]
        which = 0 if u < 0.7 else 1 if u < 0.85 else 2
        texts.append("" if u < 0.1 else phrasings(garment, colour, background)[which])
    return texts


def phrasings(garment, colour, background):
    return (prompt(garment, colour, background), f"{colour} {garment}, {background} background",
            f"{article(garment)} in {colour} on {background}")


def fit(name, modules, loss, args, steps, lr, batch):
    """Minimise loss(rng, batch) over the modules' parameters; leaves in them the average over the run's end.

    AdamW, warm-up, cosine to zero. Resumes from WORK/NAME.pt (delete it to train anew). The batch of a step
    depends on (seed, step) alone, so an interrupted run ends where an uninterrupted one does.
    """
    path, start, began = args.work / f"{name}.pt", 0, time.time()
    params = [p for m in modules for p in m.to(args.device).parameters()]
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.99), weight_decay=0.01)
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        start = state["step"]
        for p, a, saved, saved_average in zip(params, average, state["params"], state["average"],
                                              strict=True):
            p.data.copy_(saved), a.copy_(saved_average)
        optimizer.load_state_dict(state["optimizer"])
        print(f"{name}: resuming at step {start} of {steps}")
    for step in (bar := tqdm(range(start, steps), name, initial=start, total=steps, mininterval=5)):
        rng = torch.Generator().manual_seed(args.seed * 10**9 + step)
        value = loss(rng, batch)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        decay = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 200, decay)
        optimizer.step()
        with torch.no_grad():
            for a, p in zip(average, params):
                a.lerp_(p, 1 - min(0.999, (step + 1) / (step + 10)))
        if step % 50 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
            with open(args.work / f"{name}.jsonl", "a") as log:
                line = {"step": step, "loss": value.item(), "seconds": round(time.time() - began, 1)}
                log.write(json.dumps(line) + "\n")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {"step": step + 1, "params": [p.detach() for p in params], "average": average,
                     "optimizer": optimizer.state_dict()}
            write_file(path, lambda p: torch.save(state, p))
    for p, a in zip(params, average):
        p.data.copy_(a)


def save(folder, module, config, name=WEIGHTS):
    """A network in half precision."""
    state = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in module.state_dict().items()}
    write_json(folder / "config.json", config)
    write_file(folder / name, lambda p: save_file(state, p, {"format": "pt"}))


def make_tokenizer(args):
    """CLIP's byte-pair algorithm, learned until every word of the captions is one token."""
    texts = {text for combination in COMBINATIONS for text in phrasings(*names(combination))}
    words = sorted({word for text in texts for word in text.replace(",", " ,").split()})
    splits = {word: [*word[:-1], word[-1] + "</w>"] for word in words if word.isalpha()}
    parts = [part for word in words if "-" in word for part in word.split("-")]
    splits |= {part: [*part[:-1], part[-1] + "</w>"] for part in parts}
    merges = []
    while pairs := [pair for split in splits.values() for pair in zip(split, split[1:])]:
        best = max(sorted(set(pairs)), key=pairs.count)
        merges.append(best)
        for word, split in splits.items():
            merged = []
            for symbol in split:
                if merged and (merged[-1], symbol) == best:
                    merged[-1] += symbol
                else:
                    merged.append(symbol)
            splits[word] = merged
    symbols = sorted(chr(VISIBLE.get(byte, byte)) for byte in range(256))
    vocabulary = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges),
                  "<|startoftext|>", "<|endoftext|>"]
    folder = args.out / "tokenizer"
    write_json(folder / "vocab.json", {symbol: k for k, symbol in enumerate(vocabulary)})
    lines = "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n"
    write_file(folder / "merges.txt", lambda p: p.write_text(lines, encoding="utf-8"))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "!",
               "unk_token": "<|endoftext|>"}
    write_json(folder / "special_tokens_map.json", special)
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", config)
    write_json(args.out / "model_index.json", MODEL_INDEX)
    write_json(args.out / "scheduler" / "scheduler_config.json", SCHEDULER)
    seen = [text for c in COMBINATIONS if c not in HELD_OUT for text in phrasings(*names(c))]
    write_file(args.out / "prompts.txt", lambda p: p.write_text("\n".join(seen) + "\n"))


def names(combination):
    """The words of a combination's three numbers."""
    g, c, b = combination
    return GARMENTS[g], list(COLOURS)[c], list(COLOURS)[b]


def vae_loss(vae, train, device, rng, batch):
    """Reconstruction in L1 and L2, and enough KL that the decoder forgives small errors of a latent."""
    images = draw_batch(train, batch, rng, COMBINATIONS)[0].to(device)
    mean, logvar = vae.moments(images)
    latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=rng).to(device)
    error = vae.decode(latents * vae.scale) - images
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + error.square().mean() + 1e-3 * kl


def train_vae(args, train):
    """The autoencoder, and the scale that brings its latents to unit variance."""
    torch.manual_seed(args.seed)
    vae = VAE(VAE_CONFIG)
    fit("vae", [vae], functools.partial(vae_loss, vae, train, args.device), args, args.vae_steps, 2e-3, 32)
    with torch.no_grad():
        images, _ = draw_batch(train, 2000, torch.Generator().manual_seed(0), COMBINATIONS)
        mean, _ = vae.moments(images.to(args.device))
    save(args.out / "vae", vae, dict(VAE_CONFIG, scaling_factor=round(1 / mean.std().item(), 5)))


def decoder_loss(small, vae, train, device, rng, batch):
    """The VAE's own pictures of latents, and its own latents of images, in L1 and L2."""
    images = draw_batch(train, batch, rng, COMBINATIONS)[0].to(device)
    with torch.no_grad():
        mean, logvar = vae.moments(images)
        noise = torch.randn(mean.shape, generator=rng).to(device)
        latents, mean = vae.scale * (mean + (0.5 * logvar).exp() * noise), vae.scale * mean
        pictures = vae.decode(latents)
    errors = small.decode(latents) - pictures, small.encode(images) - mean
    return sum(error.abs().mean() + error.square().mean() for error in errors)


def train_decoder(args, train):
    """The small autoencoder: it takes the VAE's latents as the U-Net has them."""
    torch.manual_seed(args.seed)
    vae = load_module(VAE, args.out / "vae", args.device, torch.float32)
    small = TinyVAE(DECODER_CONFIG)
    loss = functools.partial(decoder_loss, small, vae, train, args.device)
    fit("decoder", [small], loss, args, args.decoder_steps, 2e-3, 32)
    save(args.out / "decoder", small, DECODER_CONFIG)


def judge_loss(judge, train, device, rng, batch):
    """Cross-entropy of garment, colour and background."""
    images, labels = draw_batch(train, batch, rng, COMBINATIONS)
    answers = judge.answers(judge(images.to(device)))
    return sum(F.cross_entropy(a, label) for a, label in zip(answers, labels.to(device).T))


def train_judge(args, train):
    """The judge, on all combinations."""
    torch.manual_seed(args.seed)
    held_out = [names(c) for c in sorted(HELD_OUT)]
    config = {"garments": GARMENTS, "colours": list(COLOURS), "held_out": held_out}
    judge = Judge(config)
    fit("judge", [judge], functools.partial(judge_loss, judge, train, args.device), args, args.judge_steps, 2e-3, 64)
    save(args.out / "judge", judge, config, "judge.safetensors")
    (args.out / "judge" / "reference.safetensors").unlink(missing_ok=True)              # which another one made


@torch.no_grad()
def measure_reference(args, test):
    """The judge on the real test split, each picture in a random tint: 5,000 features, its accuracy, and how far the
    same pictures are from themselves when they come out of the autoencoder."""
    judge, config = load_judge(args.out / "judge")
    vae = load_module(VAE, args.out / "vae", "cpu", torch.float32)
    rng = torch.Generator().manual_seed(args.seed)
    pairs = torch.tensor(PAIRS)[torch.randint(len(PAIRS), (len(test[1]),), generator=rng)]
    labels = torch.cat([test[1][:, None], pairs], 1)
    images = [tint(garments, *part[:, 1:].T) for garments, part in zip(test[0].split(500), labels.split(500))]
    features = torch.cat([judge(part) for part in images])
    right = torch.stack([a.argmax(1) for a in judge.answers(features)], 1) == labels
    shares = [*right.float().mean(0).tolist(), right.all(1).float().mean().item()]
    accuracy = dict(zip(("garment", "colour", "background", "all"), shares))
    chosen = torch.randperm(len(features), generator=rng)[:5000]
    decoded = torch.cat([judge(vae.decode(vae.encode(part)).clamp(-1, 1)) for part in images])
    autoencoder = frechet(moments(features[chosen]), moments(decoded[chosen]))
    write_file(args.out / "judge" / "reference.safetensors",
               lambda p: save_file({"features": features[chosen].half()}, p))
    write_json(args.out / "judge" / "config.json", dict(config, accuracy=accuracy, autoencoder=autoencoder))
    print("the judge on the real test split:", accuracy, "Frechet distance of the autoencoder alone:", autoencoder)


def unet_loss(unet, text_encoder, tokenizer, vae, train, device, rng, batch):
    """Denoising of latents, epsilon prediction."""
    seen, schedule = [c for c in COMBINATIONS if c not in HELD_OUT], Schedule(SCHEDULER)
    images, labels = draw_batch(train, batch, rng, seen)
    with torch.no_grad():
        x_0 = vae.encode(images.to(device))
    t = torch.randint(1, schedule.T + 1, (batch,), generator=rng).to(device)
    eps = torch.randn(x_0.shape, generator=rng).to(device)
    text = text_encoder(tokenizer(captions(labels, rng)).to(device))
    return F.mse_loss(unet(add_noise(x_0, eps, t, schedule), schedule.timestep(t), text), eps)


def train_unet(args, train):
    """The U-Net; the text encoder learns along."""
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_folder(args.out / "tokenizer")
    vae = load_module(VAE, args.out / "vae", args.device, torch.float32)
    vocabulary = json.loads((args.out / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    text_config = dict(TEXT_CONFIG, vocab_size=len(vocabulary), bos_token_id=vocabulary["<|startoftext|>"],
                       eos_token_id=vocabulary["<|endoftext|>"])
    unet, text_encoder = UNet(UNET_CONFIG).to(memory_format=torch.channels_last), TextEncoder(text_config)
    loss = functools.partial(unet_loss, unet, text_encoder, tokenizer, vae, train, args.device)
    fit("unet", [unet, text_encoder], loss, args, args.unet_steps, 1e-3, 64)
    save(args.out / "unet", unet, UNET_CONFIG)
    save(args.out / "text_encoder", text_encoder, text_config, "model.safetensors")


def pixel_loss(unet, train, device, rng, batch):
    """Denoising of pixels: the class is the garment, its colours are left to chance.

    It predicts v: at alpha_T = 0.006 an epsilon would have to be exact to 0.1% for the mean colour to come out right.
    """
    schedule = Schedule(PIXEL_SCHEDULER)
    x_0, labels = draw_batch(train, batch, rng, COMBINATIONS)
    label = torch.where(torch.rand(batch, generator=rng) < 0.1, len(GARMENTS), labels[:, 0]).to(device)
    u = torch.rand(batch, generator=rng)
    t = (schedule.T * u**1.5).ceil().long().clamp(min=1).to(device)             # texture is most of the work
    eps, x_0 = torch.randn(x_0.shape, generator=rng).to(device), x_0.to(device)
    v = append_dims(schedule.alpha(t), eps) * eps - append_dims(schedule.sigma(t), x_0) * x_0
    return F.mse_loss(unet(add_noise(x_0, eps, t, schedule), schedule.timestep(t), label=label), v)


def train_pixel(args, train):
    """The second teacher, in pixels."""
    torch.manual_seed(args.seed)
    unet = UNet(PIXEL_CONFIG).to(memory_format=torch.channels_last)
    fit("pixel", [unet], functools.partial(pixel_loss, unet, train, args.device), args, args.pixel_steps, 1e-3, 32)
    save(args.out / "pixel" / "unet", unet, PIXEL_CONFIG)
    write_json(args.out / "pixel" / "model_index.json", PIXEL_INDEX)
    write_json(args.out / "pixel" / "scheduler" / "scheduler_config.json", PIXEL_SCHEDULER)


def ship_student(args):
    """student/ in its teacher's folder: a trained student of either teacher that is there, in half precision."""
    pixel = load_student(args.student).teacher.vae is None
    folder = args.out / "pixel" if pixel else args.out
    student = load_student(args.student, folder)            # refuses one of another teacher
    student.teacher.spec = "tiny-pixel" if pixel else "tiny"
    save_student(folder / "student", student, dtype=torch.float16)


def main():
    stages = ("tokenizer", "vae", "decoder", "judge", "reference", "unet", "pixel", "student")
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--data", default="/usr/share/datasets/fashion-mnist",
                   help="folder with the four idx .gz files")
    p.add_argument("--out", type=Path, default=TINY, help="the teacher's folder")
    p.add_argument("--work", type=Path, default=Path("runs/train_tiny"),
                   help="checkpoints and logs; delete a stage's .pt to train it anew")
    p.add_argument("--stages", nargs="+", default=stages[:-1], choices=stages)
    p.add_argument("--vae-steps", type=int, default=6000)
    p.add_argument("--decoder-steps", type=int, default=12_000)
    p.add_argument("--judge-steps", type=int, default=5000)
    p.add_argument("--unet-steps", type=int, default=6000)
    p.add_argument("--pixel-steps", type=int, default=22_000)
    p.add_argument("--student", type=Path, default=Path("runs/tiny"), help="what the stage `student` ships")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    args = p.parse_args()
    args.device = pick_device(args.device)
    args.work.mkdir(parents=True, exist_ok=True)
    if set(args.stages) & {"vae", "decoder", "judge", "unet", "pixel"}:
        train = read_split(args.data, "train")
    if "tokenizer" in args.stages:
        make_tokenizer(args)
    if "vae" in args.stages:
        train_vae(args, train)
    if "decoder" in args.stages:
        train_decoder(args, train)
    if "judge" in args.stages:
        train_judge(args, train)
    if "reference" in args.stages:
        measure_reference(args, read_split(args.data, "t10k"))
    if "unet" in args.stages:
        train_unet(args, train)
    if "pixel" in args.stages:
        train_pixel(args, train)
    if "student" in args.stages:
        ship_student(args)


if __name__ == "__main__":
    command(main)
