"""The judge of the embedded teacher's pictures: its features give the Frechet distance, its answers prompt alignment."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


class Judge(nn.Module):
    """A small classifier of tinted garments: images (B, 3, 32, 32) in [-1, 1] -> features (B, 64)."""

    def __init__(self, garments, colours):
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, stride=2 if a == 3 else 1) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(8, c) for c in widths[1:])
        self.feature = nn.Linear(128, 64)
        self.heads = nn.ModuleList(nn.Linear(64, n) for n in (garments, colours, colours))

    def forward(self, x):
        for k, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = F.silu(norm(conv(x)))
            if k == 1:
                x = F.max_pool2d(x, 2)                                      # (B, 64, 8, 8)
        return self.feature(x.mean((2, 3)))

    def answers(self, features):
        """Logits of garment, garment colour and background colour, each (B, classes)."""
        return [head(F.silu(features)) for head in self.heads]


def load_judge(folder):
    """(judge, config, reference) of a teacher's `judge/` folder; reference: features of real test images, (N, 64)."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    judge = Judge(len(config["garments"]), len(config["colours"])).eval().requires_grad_(False)
    judge.load_state_dict({k: v.float() for k, v in load_file(folder / "judge.safetensors").items()})
    reference = folder / "reference.safetensors"
    return judge, config, load_file(reference)["features"].float() if reference.exists() else None


def prompt(garment, colour, background):
    """The sentence for one combination: "a red ankle boot on a yellow background"."""
    return f"{article(colour)} {garment} on {article(background)} background"


def article(word):
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def frechet(a, b):
    """Frechet distance of two feature sets (N, D), (M, D): |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), float64."""
    a, b = a.double(), b.double()
    root = matrix_sqrt(torch.cov(a.T))
    cross = torch.linalg.eigvalsh(root @ torch.cov(b.T) @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * cross).item()


def matrix_sqrt(c):
    values, vectors = torch.linalg.eigh(c)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
