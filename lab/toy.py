"""BOOT in two dimensions, where everything can be seen: a teacher without a network, and a student that is a small one.

    python -m lab.toy                               a minute on one core, and a picture: toy.png
    python -m lab.toy --out docs/toy.png            the one that the pages show

The data are a mixture of Gaussians. Its denoiser f is known exactly, so the teacher has no error of its own. The
student starts as train.py's does: g(eps, t) is the teacher's prediction at a fixed time, plus a network whose last
layer is zero. The losses are the functions that train.py calls. It needs matplotlib. The panels, where a circle is a
Gaussian of the data and a colour is the direction of eps:

    teacher, x_t                DDIM's paths, from noise to data
    teacher, y_t                the same by their signal, the Signal-ODE: they begin near the mean of the data
    teacher: map                where DDIM takes noise
    student before              what the student makes of the same noise
    student after BOOT, y_t     its paths: g(eps, t) for t from T to 0, each point made in one pass
    the same without boundary   BOOT with beta = 0: no loss says where a path begins, so it begins where it did
    after BOOT: map             the teacher's map, but for the lines between the circles. The teacher tears neighbouring
                                noises apart there, and the student, which is smooth, averages
    after matching: map         the spots and the lines are broader: matching brings back spread that averaging lost.
                                The lines are not gone, since so small a network is not steep enough
"""

import math

import torch
from torch import nn

from matching import critic_loss, matching_loss
from plumbing.files import command, new_parser, user_path
from signal_ode import Schedule, add_noise, boot_losses, solve
from tools.plotting import new_figure, save_figure

MEANS = torch.tensor([[math.cos(k * math.tau / 5), math.sin(k * math.tau / 5)] for k in range(5)]) * 1.5
WEIGHTS, STD = torch.tensor([0.1, 0.15, 0.2, 0.25, 0.3]), 0.12
T, INPUT_TIME, DELTA = 1000, 600, 100
POINTS, BATCH = 4, 96       # a sample is a set of 4 points with one time, since matching.py divides by a sample's mean
STEPS, MATCH_STEPS, LR, MATCH_LR = 1200, 800, 2e-3, 5e-4
CRITIC_STEPS, HEAD_START = 3, 240       # the critic's steps for each of the student's, and before the student's first
SCHEDULE = Schedule(torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2)     # Stable Diffusion's


def teacher(x_t, t):
    """f(x_t, t) = E[x_0 | x_t], (B, N, 2) of N points: each Gaussian's mean given x_t, by how likely it made x_t."""
    t = torch.as_tensor(t).expand(len(x_t))
    alpha, sigma = (scale(t).float()[:, None, None] for scale in (SCHEDULE.alpha, SCHEDULE.sigma))  # (B, 1, 1)
    variance = (alpha * STD) ** 2 + sigma**2                                                        # of x_t
    offset = x_t[..., None, :] - alpha[..., None] * MEANS                                           # (B, N, 5, 2)
    log_likelihood = WEIGHTS.log() - offset.square().sum(-1) / (2 * variance)                       # (B, N, 5)
    each = MEANS + (alpha * STD**2 / variance)[..., None] * offset                                  # (B, N, 5, 2)
    return (log_likelihood.softmax(-1)[..., None] * each).sum(-2)


class Net(nn.Module):
    """A correction (B, N, 2) of points (B, N, 2) at times (B,), zero before training."""

    def __init__(self, width=128):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x, t):
        angles = torch.as_tensor(t).expand(len(x))[:, None] / T * math.pi * 2.0 ** torch.arange(4)  # (B, 4)
        time = torch.cat([angles.sin(), angles.cos()], 1)[:, None].expand(*x.shape[:2], 8)
        return self.layers(torch.cat([x, time], 2))


def new_student():
    """(network, g): g(eps, t) is the teacher's prediction of sigma_i * eps at i, and a correction."""
    network, sigma_i = Net(), SCHEDULE.sigma(INPUT_TIME).float()
    return network, lambda eps, t: teacher(sigma_i * eps, INPUT_TIME) + network(eps, t)


def train(network, student, beta=0.1):
    """STEPS steps of BOOT. The rate falls to zero."""
    adam = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        eps, t = torch.randn(BATCH, POINTS, 2), torch.randint(1, T + 1, (BATCH,))
        s, boundary = (t - DELTA).clamp(min=0), slice(0, None, 4)
        L_BS, L_BC = boot_losses(student, teacher, eps, t, s, SCHEDULE, boundary, "heun")
        adam.zero_grad()
        (L_BS.mean() + beta * L_BC.mean()).backward()
        adam.step()


def match(network, student):
    """MATCH_STEPS steps of matching. The critic makes three for each of the student's, and some before the first: one
    that lags behind leads the student astray. Both rates fall to zero."""
    critic_network = Net()

    def critic(x_t, t):                                     # what it has to correct vanishes with the noise
        return teacher(x_t, t) + SCHEDULE.sigma(t).float()[:, None, None] * critic_network(x_t, t)
    adam = torch.optim.Adam(network.parameters(), betas=(0.0, 0.99))
    critic_adam = torch.optim.Adam(critic_network.parameters(), betas=(0.0, 0.99))
    for step in range(-HEAD_START, CRITIC_STEPS * MATCH_STEPS):
        left, learns = 1 - max(step, 0) / (CRITIC_STEPS * MATCH_STEPS), step >= 0 and step % CRITIC_STEPS == 0
        eps, n = torch.randn(2, BATCH, POINTS, 2)
        tau = torch.randint(20, 981, (BATCH,))
        with torch.set_grad_enabled(learns):
            x = student(eps, 0)
        if learns:
            L_M, h = matching_loss(x, teacher, critic, n, tau, SCHEDULE)
        else:
            h = critic(add_noise(x, n, tau, SCHEDULE), tau)
        critic_adam.param_groups[0]["lr"] = LR * left
        critic_adam.zero_grad()
        critic_loss(x.detach(), h, tau, SCHEDULE).mean().backward()
        critic_adam.step()
        if learns:
            adam.param_groups[0]["lr"] = MATCH_LR * left
            adam.zero_grad()
            L_M.mean().backward()
            adam.step()


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=user_path, default="toy.png", help="the picture (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    figure = new_figure(args.out, figsize=(14, 7.2), dpi=110, layout="constrained")
    torch.manual_seed(args.seed)
    eps, grid = torch.randn(1, 1500, 2), SCHEDULE.grid(50)
    few = eps[:, :60]
    network, student = new_student()
    with torch.no_grad():
        panels = {"teacher, $x_t$": solve(teacher, few, grid, SCHEDULE, space="x"),
                  "teacher, $y_t$: the Signal-ODE": solve(teacher, few, grid, SCHEDULE, space="y"),
                  "teacher: map of noise to data": solve(teacher, eps, grid, SCHEDULE, space="x")[-1],
                  "student before: map": student(eps, 0)}
    train(network, student)
    after_boot = student(eps, 0).detach()
    panels["student after BOOT, $y_t$"] = [student(few, t).detach() for t in grid]
    other_network, other = new_student()
    train(other_network, other, beta=0.0)
    panels["the same without boundary loss"] = [other(few, t).detach() for t in grid]
    panels["after BOOT: map"] = after_boot
    match(network, student)
    panels["after matching: map"] = student(eps, 0).detach()
    draw(figure, panels, eps)
    save_figure(figure, args.out)


def draw(figure, panels, eps):
    """Paths as lines, maps as points, coloured by the direction of eps."""
    from matplotlib import colormaps
    colours = colormaps["hsv"](torch.atan2(eps[0, :, 1], eps[0, :, 0]) / math.tau + 0.5)
    for axis, (name, panel) in zip(figure.subplots(2, 4).flat, panels.items(), strict=True):
        axis.set(title=name, xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal", xticks=[], yticks=[])
        if isinstance(panel, list):
            for line, colour in zip(torch.cat(panel).transpose(0, 1), colours):
                axis.plot(*line.T, color=colour, linewidth=0.7)
                axis.plot(*line[-1:].T, ".", color="black", markersize=3)
        else:
            axis.scatter(*panel[0].T, c=colours, s=3)
        axis.scatter(*MEANS.T, marker="o", s=350, facecolors="none", edgecolors="grey", linewidths=0.7)


if __name__ == "__main__":
    command(main)
