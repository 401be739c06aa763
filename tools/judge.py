"""The judge of an embedded teacher's images: a small classifier, and the measures that are taken of its features.

    judge, config = load_judge("tiny/judge")
    features = judge(images)                                # (B, 64)
    distance = frechet(moments(features), moments(real))
    precision, recall = precision_recall(features, real)
    garment, colour, background = judge.answers(features)   # logits; how often they are right is the alignment
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.files import read_json
from plumbing.weights import build, read_tensors


class Judge(nn.Module):
    """A small classifier of tinted garments: images (B, 3, 32, 32) in [-1, 1] -> features (B, 64)."""

    def __init__(self, config):
        super().__init__()
        garments, colours = len(config["garments"]), len(config["colours"])
        widths = (3, 32, 64, 128, 128)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(8, c) for c in widths[1:])
        self.feature = nn.Linear(128 * 4 * 4, 64)
        self.heads = nn.ModuleList(nn.Linear(64, n) for n in (garments, colours, colours))

    def forward(self, x):
        for k, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = F.silu(norm(conv(x)))
            if k != 2:
                x = F.max_pool2d(x, 2)                                      # 16, 8, -, 4 pixels a side
        return self.feature(x.flatten(1))

    def answers(self, features):
        """Logits of garment, garment colour and background colour, each (B, classes)."""
        return [head(F.silu(features)) for head in self.heads]


def load_judge(folder, device="cpu"):
    """(judge, config) of a teacher's `judge/` folder. Raises BadInput."""
    folder = Path(folder)
    config, path = read_json(folder / "config.json"), folder / "judge.safetensors"
    return build(Judge, config, read_tensors(path, device, torch.float32), path), config


def prompt(garment, colour, background):
    """The sentence for one combination: "a red ankle boot on a yellow background"."""
    return f"{article(colour)} {garment} on {article(background)} background"


def article(word):
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


# ---------------------------------------------------------------------------------------------------------- measures
def moments(features):
    """(mean (D,), covariance (D, D)) of features (N, D), float64."""
    return features.double().mean(0), torch.cov(features.double().T)


def frechet(a, b):
    """Frechet distance of two Gaussians, moments (m, C): |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))."""
    (m_a, c_a), (m_b, c_b) = a, b
    root = matrix_sqrt(c_a)
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp(min=0).sqrt().sum()
    return ((m_a - m_b).square().sum() + c_a.trace() + c_b.trace() - 2 * cross).item()


def matrix_sqrt(c):
    values, vectors = torch.linalg.eigh(c)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def precision_recall(fake, real):
    """Improved precision and recall (Kynkaanniemi et al. 2019), k = 3. Precision is the share of fake features near a
    real one; recall is the share of real features near a fake one."""
    return covered(fake, real, neighbour_radius(real)), covered(real, fake, neighbour_radius(fake))


def covered(a, b, radius):
    """Share of a (N, D) that lies within the radius (M,) of some b (M, D)."""
    inside = [(torch.cdist(part, b) <= radius).any(1) for part in a.split(1000)]
    return torch.cat(inside).float().mean().item()


def neighbour_radius(features, k=3):
    """Distance of every feature (N, D) to its k-th nearest other: (N,)."""
    return torch.cat([torch.cdist(part, features).kthvalue(k + 1).values for part in features.split(1000)])
