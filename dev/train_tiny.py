"""Make all of tiny/: train a miniature Stable Diffusion, a pixel model and their judge on tinted Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    python -m dev.train_tiny                                            the teachers; the same command resumes
    python -m dev.train_tiny --stages vae unet --out runs/mine          some of it, elsewhere
    python -m dev.train_tiny --stages student --student runs/best       ship that student, in half precision

It takes about four hours on two cores. One should see a bar with the loss of each stage, and at the end of `reference`
the judge's accuracy, 0.9 for garments and 1 for colours. The networks' configs are those in tiny/ of this repository.
Change them there to train others.
"""

import bisect
import functools
import gzip
import itertools
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from model import VAE, TextEncoder, TinyVAE, UNet
from plumbing.configs import read_schedule
from plumbing.files import (NOT_OURS, BadInput, check_new, command, new_parser, read_json, user_path,
                            write_file, write_json)
from plumbing.hub import TINY
from plumbing.processes import pick_device
from plumbing.tokenizer import VISIBLE, Tokenizer, join
from plumbing.weights import WEIGHTS, load_module, write_tensors
from signal_ode import Schedule, add_noise, append_dims
from student import load_student, save_student
from tools.judge import Judge, article, frechet, load_judge, moments, prompt

GARMENTS = ["t-shirt", "pair of trousers", "pullover", "dress", "coat",
            "sandal", "shirt", "sneaker", "bag", "ankle boot"]
COLOURS = {"red": (217, 38, 38), "orange": (245, 140, 25), "yellow": (247, 221, 55), "green": (46, 160, 67),
           "blue": (45, 90, 220), "purple": (130, 60, 175), "pink": (245, 150, 190), "white": (244, 244, 244)}
PAIRS = list(itertools.permutations(range(len(COLOURS)), 2))    # the garment's colour and the background's differ
COMBINATIONS = [(g, *pair) for g in range(len(GARMENTS)) for pair in PAIRS]
HELD_OUT = set(random.Random(0).sample(COMBINATIONS, len(COMBINATIONS) // 10))              # never trained on
SEEN = [c for c in COMBINATIONS if c not in HELD_OUT]


# ------------------------------------------------------------------------------------------------ images and captions
@functools.cache
def read_split(folder, split):
    """Fashion-MNIST from its idx files: garments (N, 32, 32) float in [0, 1], labels (N,). Raises BadInput."""
    parts = []
    for kind, header in ("images-idx3", 16), ("labels-idx1", 8):
        path = Path(folder) / f"{split}-{kind}-ubyte.gz"
        if not path.exists():
            raise BadInput(f"{path} is missing: apt-get install dataset-fashion-mnist, or --data FOLDER")
        with gzip.open(path) as file:
            parts.append(torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=header).copy()))
    images, labels = parts
    return F.pad(images.view(-1, 28, 28).float() / 255, (2, 2, 2, 2)), labels.long()


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


def names(combination):
    """The words of a combination's three numbers."""
    g, c, b = combination
    return GARMENTS[g], list(COLOURS)[c], list(COLOURS)[b]


def phrasings(garment, colour, background):
    return (prompt(garment, colour, background), f"{colour} {garment}, {background} background",
            f"{article(garment)} in {colour} on {background}")


PROMPTS = [text for c in SEEN for text in phrasings(*names(c))]


def captions(labels, rng):
    """One of three phrasings for each image, and none for a tenth of them, which is what guidance leads away from."""
    texts = []
    for combination, u in zip(labels.tolist(), torch.rand(len(labels), generator=rng).tolist()):
        choices = "", *phrasings(*names(combination))
        texts.append(choices[bisect.bisect((0.1, 0.7, 0.85), u)])
    return texts


# ----------------------------------------------------------------------------------------------------------- training
def fit(name, modules, loss, args, lr, batch, combinations=COMBINATIONS):
    """Minimise loss(images, labels, rng) over the modules' parameters, and leave their EMA in them.

    AdamW, warm-up, cosine to zero. Resumes from WORK/NAME.pt (delete it to train anew). The batch of a step depends on
    (seed, step) alone, so an interrupted run ends where an uninterrupted one does."""
    steps, path, start = getattr(args, f"{name}_steps"), args.work / f"{name}.pt", 0
    params = [p for m in modules for p in m.to(args.device).parameters()]
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.99), weight_decay=0.01)
    if path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            start = state["step"]
            for tensor, saved in zip([*params, *average], [*state["params"], *state["average"]], strict=True):
                tensor.data.copy_(saved)
            optimizer.load_state_dict(state["optimizer"])
        except Exception as error:                          # a pickle may hold anything
            raise BadInput(f"{path} {NOT_OURS} ({error})") from None
    train = read_split(args.data, "train")
    for step in (bar := tqdm(range(start, steps), name, initial=start, total=steps, mininterval=5)):
        rng = torch.Generator().manual_seed(args.seed * 10**9 + step)
        images, labels = draw_batch(train, batch, rng, combinations)
        value = loss(images.to(args.device), labels.to(args.device), rng)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.step()
        with torch.no_grad():
            for a, p in zip(average, params):
                a.lerp_(p, 1 - min(0.999, (step + 1) / (step + 10)))
        if step % 50 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {"step": step + 1, "params": [p.detach() for p in params], "average": average,
                     "optimizer": optimizer.state_dict()}
            write_file(path, functools.partial(torch.save, state))
    for p, a in zip(params, average):
        p.data.copy_(a)


def save(folder, module, config, name=WEIGHTS):
    """A network in half precision."""
    write_json(folder / "config.json", config)
    write_tensors(folder / name, module.state_dict(), torch.float16)


def copy(args, *names):
    """The configs of this repository that have no weights."""
    for name in names:
        write_json(args.out / name, read_json(TINY / name))


def error(a, b):
    """L1 and L2."""
    return (a - b).abs().mean() + (a - b).square().mean()


# -------------------------------------------------------------------------------------------------------- tokenizer
def learn_merges(words):
    """CLIP's byte-pair algorithm, until every word is one token."""
    splits, merges = {word: [*word[:-1], word[-1] + "</w>"] for word in words}, []
    while pairs := [pair for split in splits.values() for pair in zip(split, split[1:])]:
        best = max(sorted(set(pairs)), key=pairs.count)
        merges.append(best)
        for word, split in splits.items():
            splits[word] = join(split, best)
    return merges


def make_tokenizer(args):
    """The tokenizer of the captions' words, the prompts, and the configs that have no weights."""
    copy(args, "model_index.json", "scheduler/scheduler_config.json", "tokenizer/special_tokens_map.json",
         "tokenizer/tokenizer_config.json")
    texts = {text for combination in COMBINATIONS for text in phrasings(*names(combination))}
    words = sorted({word for text in texts for word in text.replace(",", " ,").split()})
    parts = [part for word in words if "-" in word for part in word.split("-")]
    merges = learn_merges([*filter(str.isalpha, words), *parts])
    symbols = sorted(chr(VISIBLE.get(byte, byte)) for byte in range(256))
    vocabulary = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    write_json(args.out / "tokenizer" / "vocab.json", {symbol: k for k, symbol in enumerate(vocabulary)})
    write_lines(args.out / "tokenizer" / "merges.txt", ["#version: 0.2", *map(" ".join, merges)])


def write_lines(path, lines):
    write_file(path, lambda p: p.write_text("\n".join(lines) + "\n", encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------ autoencoders
def sample_latents(vae, images, rng):
    """Latents of images, their mean and the logarithm of their variance, none of them scaled."""
    mean, logvar = vae.moments(images)
    return mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=rng).to(mean.device), mean, logvar


def vae_loss(vae, images, labels, rng):
    """Reconstruction, and enough KL that the decoder forgives small errors of a latent."""
    latents, mean, logvar = sample_latents(vae, images, rng)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error(vae.decode(latents * vae.scale), images) + 1e-3 * kl


def train_vae(args):
    """The autoencoder, and the scale that brings its latents to unit variance."""
    config = read_json(TINY / "vae" / "config.json")
    del config["scaling_factor"]
    vae = VAE(config)
    fit("vae", [vae], functools.partial(vae_loss, vae), args, 2e-3, 32)
    with torch.no_grad():
        images, _ = draw_batch(read_split(args.data, "train"), 2000, torch.Generator().manual_seed(0), COMBINATIONS)
        mean, _ = vae.moments(images.to(args.device))
    save(args.out / "vae", vae, config | {"scaling_factor": round(1 / mean.std().item(), 5)})


def decoder_loss(small, vae, images, labels, rng):
    """The VAE's own images of latents, and its own latents of images."""
    with torch.no_grad():
        latents, mean, _ = sample_latents(vae, images, rng)
        decoded = vae.decode(vae.scale * latents)
    return error(small.decode(vae.scale * latents), decoded) + error(small.encode(images), vae.scale * mean)


def train_decoder(args):
    """The small autoencoder of the same latents."""
    config = read_json(TINY / "decoder" / "config.json")
    vae, small = load_module(VAE, args.out / "vae", args.device, torch.float32), TinyVAE(config)
    fit("decoder", [small], functools.partial(decoder_loss, small, vae), args, 2e-3, 32)
    save(args.out / "decoder", small, config)


# ------------------------------------------------------------------------------------------------------------- judge
def judge_loss(judge, images, labels, rng):
    """Cross-entropy of garment, colour and background."""
    return sum(map(F.cross_entropy, judge.answers(judge(images)), labels.T))


def train_judge(args):
    """The judge, on all combinations."""
    config = {"garments": GARMENTS, "colours": list(COLOURS), "held_out": [names(c) for c in sorted(HELD_OUT)]}
    judge = Judge(config)
    fit("judge", [judge], functools.partial(judge_loss, judge), args, 2e-3, 64)
    save(args.out / "judge", judge, config, "judge.safetensors")
    (args.out / "judge" / "reference.safetensors").unlink(missing_ok=True)              # which another one made


@torch.no_grad()
def measure_reference(args):
    """The judge on the real test split, each image in a random tint. Writes 5,000 features and its accuracy, and the
    Frechet distance of the images to what the autoencoder makes of them."""
    garments, numbers = read_split(args.data, "t10k")
    judge, config = load_judge(args.out / "judge")
    vae = load_module(VAE, args.out / "vae", "cpu", torch.float32)
    rng = torch.Generator().manual_seed(args.seed)
    pairs = torch.tensor(PAIRS)[torch.randint(len(PAIRS), (len(numbers),), generator=rng)]
    labels = torch.cat([numbers[:, None], pairs], 1)
    images = [tint(some, *part[:, 1:].T) for some, part in zip(garments.split(500), labels.split(500))]
    features = torch.cat([judge(part) for part in images])
    right = torch.stack([a.argmax(1) for a in judge.answers(features)], 1) == labels
    shares = [*right.float().mean(0).tolist(), right.all(1).float().mean().item()]
    accuracy = dict(zip(("garment", "colour", "background", "all"), shares))
    chosen = torch.randperm(len(features), generator=rng)[:5000]
    decoded = torch.cat([judge(vae.decode(vae.encode(part)).clamp(-1, 1)) for part in images])
    autoencoder = frechet(moments(features[chosen]), moments(decoded[chosen]))
    reference = {"features": features[chosen].half()}
    write_file(args.out / "judge" / "reference.safetensors", functools.partial(save_file, reference))
    write_json(args.out / "judge" / "config.json", config | {"accuracy": accuracy, "autoencoder": autoencoder})
    print("the judge on the real test split:", accuracy, "Frechet distance of the autoencoder alone:", autoencoder)


# ----------------------------------------------------------------------------------------------------------- teachers
def unet_loss(unet, text_encoder, tokenizer, vae, schedule, images, labels, rng):
    """Denoising of latents, epsilon prediction."""
    with torch.no_grad():
        x_0 = vae.encode(images)
    t = torch.randint(1, schedule.T + 1, (len(x_0),), generator=rng).to(x_0.device)
    eps = torch.randn(x_0.shape, generator=rng).to(x_0.device)
    text = text_encoder(tokenizer(captions(labels, rng)).to(x_0.device))
    return F.mse_loss(unet(add_noise(x_0, eps, t, schedule), schedule.timestep(t), text), eps)


def train_unet(args):
    """The U-Net; the text encoder learns along."""
    tokenizer = Tokenizer.from_folder(args.out / "tokenizer")
    vae = load_module(VAE, args.out / "vae", args.device, torch.float32)
    schedule = Schedule(*read_schedule(read_json(args.out / "scheduler" / "scheduler_config.json")))
    config, text_config = (read_json(TINY / part / "config.json") for part in ("unet", "text_encoder"))
    vocabulary = tokenizer.vocab
    text_config |= {"vocab_size": len(vocabulary), "bos_token_id": vocabulary["<|startoftext|>"],
                    "eos_token_id": vocabulary["<|endoftext|>"]}
    unet, text_encoder = UNet(config).to(memory_format=torch.channels_last), TextEncoder(text_config)
    loss = functools.partial(unet_loss, unet, text_encoder, tokenizer, vae, schedule)
    fit("unet", [unet, text_encoder], loss, args, 1e-3, 64, SEEN)
    save(args.out / "unet", unet, config)
    save(args.out / "text_encoder", text_encoder, text_config, "model.safetensors")


def pixel_loss(unet, schedule, x_0, labels, rng):
    """Denoising of pixels: the class is the garment, its colours are left to chance.

    It predicts v: at alpha_T = 0.006 an epsilon would have to be exact to 0.1% for the mean colour to come out right.
    """
    unlabelled = torch.rand(len(x_0), generator=rng).to(x_0.device) < 0.1
    label = torch.where(unlabelled, len(GARMENTS), labels[:, 0])
    u = torch.rand(len(x_0), generator=rng)
    t = (schedule.T * u**1.5).ceil().long().clamp(min=1).to(x_0.device)         # texture is most of the work
    eps = torch.randn(x_0.shape, generator=rng).to(x_0.device)
    v = append_dims(schedule.alpha(t), eps) * eps - append_dims(schedule.sigma(t), x_0) * x_0
    return F.mse_loss(unet(add_noise(x_0, eps, t, schedule), schedule.timestep(t), label=label), v)


def train_pixel(args):
    """The second teacher, in pixels."""
    copy(args, "pixel/model_index.json", "pixel/scheduler/scheduler_config.json")
    folder, config = args.out / "pixel", read_json(TINY / "pixel" / "unet" / "config.json")
    schedule = Schedule(*read_schedule(read_json(folder / "scheduler" / "scheduler_config.json")))
    unet = UNet(config).to(memory_format=torch.channels_last)
    fit("pixel", [unet], functools.partial(pixel_loss, unet, schedule), args, 1e-3, 32)
    save(folder / "unet", unet, config)


def ship_student(args):
    """student/ in its teacher's folder: a trained student of either teacher that is there, in half precision."""
    pixel = load_student(args.student).teacher.vae is None
    folder = args.out / "pixel" if pixel else args.out
    student = load_student(args.student, folder)            # refuses one of another teacher
    student.teacher.spec = "tiny-pixel" if pixel else "tiny"
    save_student(folder / "student", student, dtype=torch.float16)


STAGES = {"tokenizer": make_tokenizer, "vae": train_vae, "decoder": train_decoder, "judge": train_judge,
          "reference": measure_reference, "unet": train_unet, "pixel": train_pixel, "student": ship_student}
STEPS = {"vae": 6000, "decoder": 12_000, "judge": 5000, "unet": 6000, "pixel": 22_000}


def main():
    parser = new_parser(__doc__)
    option = parser.add_argument
    option("--data", type=user_path, default="/usr/share/datasets/fashion-mnist",
           help="folder with the four idx .gz files")
    option("--out", type=user_path, default=TINY, help="the teacher's folder")
    option("--work", type=user_path, default=Path("runs/train_tiny"), help="where each stage's .pt is, to resume from")
    option("--stages", nargs="+", choices=list(STAGES), default=[name for name in STAGES if name != "student"])
    for name, steps in STEPS.items():
        option(f"--{name}-steps", type=int, default=steps)
    option("--student", type=user_path, default=Path("runs/tiny"), help="what the stage `student` ships")
    option("--seed", type=int, default=0)
    option("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    prompts = args.out / "prompts.txt"
    if not prompts.exists() or prompts.read_bytes() != "".join(f"{line}\n" for line in PROMPTS).encode():
        check_new(args.out)                                 # a folder that is ours has these prompts
    write_lines(prompts, PROMPTS)
    args.work.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        if name in args.stages:
            torch.manual_seed(args.seed)
            stage(args)


if __name__ == "__main__":
    command(main)
