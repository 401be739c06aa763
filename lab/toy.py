"""BOOT in two dimensions, where everything can be seen: a teacher without a network, and a student that is a small one.

    python -m lab.toy                               half a minute, and a picture: toy.png
    python -m lab.toy --out docs/toy.png

The data are a mixture of Gaussians. Its denoiser f is known exactly, so the teacher has no error of its own. The
student starts as train.py's does: g(eps, t) is the teacher's prediction at a fixed time, plus a network whose last
layer is zero. The losses are the functions that train.py calls. The six panels:

    teacher             DDIM's paths in the space of x, from noise to data
    Signal-ODE          the same trajectories by their signal y_t: they begin at y_T, near the mean of the data
    before              what the student makes of noise; its colour is the direction of its eps, here and below
    after BOOT          the teacher's map of noise to data, but for what lies between the modes
    after matching      every sample is drawn to a mode
    without boundary    BOOT with beta = 0: nothing holds the noise end, and the whole map is lost
"""

import math

import torch
from torch import nn

from matching import critic_loss, matching_loss
from plumbing.files import check_new, command, new_parser, user_path
from signal_ode import Schedule, append_dims, boot_losses, solve

MEANS = torch.tensor([[math.cos(k * math.tau / 5), math.sin(k * math.tau / 5)] for k in range(5)]) * 1.5
WEIGHTS, STD = torch.tensor([0.1, 0.15, 0.2, 0.25, 0.3]), 0.12
T, INPUT_TIME, DELTA = 1000, 600, 100
STEPS, BATCH, LR = 1500, 512, 2e-3
SCHEDULE = Schedule(torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2)     # Stable Diffusion's


def teacher(x_t, t):
    """f(x_t, t) = E[x_0 | x_t], (B, 2): each Gaussian's own mean given x_t, weighted by how likely it made x_t."""
    t = torch.as_tensor(t).expand(len(x_t))
    alpha, sigma = append_dims(SCHEDULE.alpha(t), x_t), append_dims(SCHEDULE.sigma(t), x_t)         # (B, 1)
    variance = (alpha * STD) ** 2 + sigma**2                                                        # of x_t, (B, 1)
    offset = x_t[:, None] - alpha[:, None] * MEANS                                                  # (B, 5, 2)
    log_likelihood = WEIGHTS.log() - offset.square().sum(2) / (2 * variance)                        # (B, 5)
    each = MEANS + (alpha * STD**2 / variance)[:, None] * offset                                    # (B, 5, 2)
    return (log_likelihood.softmax(1)[:, :, None] * each).sum(1)


class Net(nn.Module):
    """A correction (B, 2) of points (B, 2) at times (B,), zero before training."""

    def __init__(self, width=128):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x, t):
        angles = torch.as_tensor(t).expand(len(x))[:, None] / T * math.pi * 2.0 ** torch.arange(4)  # (B, 4)
        return self.layers(torch.cat([x, angles.sin(), angles.cos()], 1))


def new_student():
    """(network, g): g(eps, t) is the teacher's prediction of sigma_i * eps at i, and a correction."""
    network, sigma_i = Net(), SCHEDULE.sigma(INPUT_TIME).float()
    return network, lambda eps, t: teacher(sigma_i * eps, INPUT_TIME) + network(eps, t)


def train(network, student, beta=0.1, match=False):
    """So many steps of BOOT, or of matching with its critic. The rate falls to zero."""
    critic_network = Net()
    def critic(x_t, t):
        return teacher(x_t, t) + critic_network(x_t, t)
    adam = torch.optim.Adam([*network.parameters(), *critic_network.parameters()], LR, (0.0 if match else 0.9, 0.99))
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = LR * (1 - step / STEPS) * (0.2 if match else 1)
        eps, n = torch.randn(2, BATCH, 2)
        t, tau = torch.randint(1, T + 1, (BATCH,)), torch.randint(20, 981, (BATCH,))
        if match:
            x = student(eps, 0)
            L_M, h = matching_loss(x, teacher, critic, n, tau, SCHEDULE)
            loss = L_M.mean() + critic_loss(x.detach(), h, tau, SCHEDULE).mean()
        else:
            s = (t - DELTA).clamp(min=0)
            L_BS, L_BC = boot_losses(student, teacher, eps, t, s, SCHEDULE, slice(0, None, 4), "heun")
            loss = L_BS.mean() + beta * L_BC.mean()
        adam.zero_grad()
        loss.backward()
        adam.step()


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=user_path, default="toy.png", help="the picture (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    check_new(args.out)
    torch.manual_seed(args.seed)
    eps, grid = torch.randn(1500, 2), SCHEDULE.grid(50)
    panels = {"teacher: DDIM in x": solve(teacher, eps[:60], grid, SCHEDULE, space="x"),
              "Signal-ODE: the same in y": solve(teacher, eps[:60], grid, SCHEDULE, space="y")}
    network, student = new_student()
    panels["student before"] = student(eps, 0).detach()
    train(network, student)
    panels["after BOOT"] = student(eps, 0).detach()
    train(network, student, match=True)
    panels["after matching"] = student(eps, 0).detach()
    network, student = new_student()
    train(network, student, beta=0.0)
    panels["BOOT without boundary loss"] = student(eps, 0).detach()
    draw(panels, eps, args.out)


def draw(panels, eps, path):
    """Paths as lines, maps as points, coloured by the direction of eps."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    colours = pyplot.cm.hsv(torch.atan2(eps[:, 1], eps[:, 0]) / math.tau + 0.5)
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 7.4), sharex=True, sharey=True)
    for axis, (name, panel) in zip(axes.flat, panels.items(), strict=True):
        axis.set(title=name, xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal", xticks=[], yticks=[])
        if isinstance(panel, list):
            for line, colour in zip(torch.stack(panel, 1), colours):
                axis.plot(*line.T, color=colour, linewidth=0.7)
                axis.plot(*line[-1:].T, ".", color="black", markersize=3)
        else:
            axis.scatter(*panel.T, c=colours, s=3)
        axis.scatter(*MEANS.T, marker="o", s=350, facecolors="none", edgecolors="grey", linewidths=0.7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    command(main)
