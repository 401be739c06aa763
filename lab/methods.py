"""Data-free one-step distillers, each on one screen: the losses of one batch.

Every method is a function (lab, eps, condition) -> {network: loss}. It gets a batch of noises eps and the condition of
its prompts, and returns a scalar for each network that learns from it, the student and if it has one the critic.

    x               g(eps, 0), the picture of a student of the kind "generator"; all students start as the teacher
    D(x_t, t)       the clean prediction of a student of the kind "denoiser", whose picture is D(eps, T)
    f(x_t, t)       the teacher's clean prediction, guided
    h(x_t, t)       the critic's clean prediction: what it takes for the student's picture
    tau, n, x_tau   a time, fresh noise, and x noised by them
    pull(x, G)      a loss whose gradient at x is G, whatever G depends on

Notation and functions are those of signal_ode.py and matching.py, and || . ||^2 is a mean over a sample's elements.
What is special about a method is in its function, or in its row of the table SCORES, with its source. METHODS, at the
end, lists all of them with the rates to be tried. `lab` is the Lab of lab/loop.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from matching import critic_loss, error_unit, matching_loss
from signal_ode import add_noise, append_dims, boot_losses, mean_square, solve

NUM_STEPS = 10          # K of BOOT
MATCH_FROM = 0.45       # of the budget, from which BOOT's student is matched


def pull(x, G):
    """A loss of each sample, (B,), whose gradient at x is G, divided by the number of elements."""
    return (x * G.detach()).flatten(1).mean(1)


def huber(error, c=1e-3):
    """The mean of sqrt(error^2 + c^2) - c over a sample's elements, (B,)."""
    return ((error.square() + c**2).sqrt() - c).flatten(1).mean(1)


# -------------------------------------------------------------------------------------- along the teacher's trajectory
def regression(lab, eps, condition):
    """|| g(eps, 0) - x_0 ||^2, where x_0 is where the teacher's DDIM ends (Luhman & Luhman 2021, arXiv 2101.02388)."""
    condition, path, _ = teacher_paths(lab, eps, condition, num_steps=25)
    return {"student": mean_square(lab.g(path[0], 0, **condition) - path[-1]).mean()}


def teacher_paths(lab, eps, condition, num_steps, teacher=None, new_every=8):
    """(condition, path, grid) of a batch: the teacher's DDIM from noise, path (num_steps + 1, B, ...) at the times of
    grid (num_steps + 1,). Every 8th batch is new. The others are drawn again from those before, since a path costs many
    evaluations."""
    grid, stored = lab.schedule.grid(num_steps), lab.memory.setdefault(f"paths of {num_steps}", [])
    if lab.step % new_every == 0 or not stored:
        with torch.no_grad():
            path = solve(teacher or lab.f, eps, grid, lab.schedule, space="x", **condition)
        stored.append((condition, torch.stack(path), torch.tensor(grid, device=eps.device)))
    return stored[torch.randint(len(stored), (), generator=lab.rng)]


def random_points(lab, path, first, last):
    """(k, rows): for each sample of a path the number of a point between first and last, and its own number."""
    k = torch.randint(first, last + 1, (path.shape[1],), generator=lab.rng).to(path.device)
    return k, torch.arange(len(k), device=path.device)


def progressive(lab, eps, condition, stages=(16, 8, 4, 2, 1)):
    """Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512). One step of the student does what two of its
    teacher do; then it becomes the teacher, and the number of steps N is halved, down to 1. For a step from z_t to z_s

        x~ = (z_s - sigma_s / sigma_t * z_t) / (alpha_s - sigma_s / sigma_t * alpha_t)
        L = max(1, SNR_t) * || D(z_t, t) - x~ ||^2

    The z_t come from the teacher's own path from noise, in place of noised images."""
    N = stages[min(int(lab.share * len(stages)), len(stages) - 1)]
    if lab.memory.get("N", N) != N:
        lab.memory["teacher"] = lab.frozen_copy()
    lab.memory["N"], schedule = N, lab.schedule
    condition, path, grid = teacher_paths(lab, eps, condition, 2 * N, lab.memory.get("teacher"))
    k, rows = random_points(lab, path, 0, N - 1)
    t, s, z_t, z_s = grid[2 * k], grid[2 * k + 2], path[2 * k, rows], path[2 * k + 2, rows]
    ratio = schedule.sigma(s) / schedule.sigma(t)
    x = (z_s - append_dims(ratio, z_s) * z_t) / append_dims(schedule.alpha(s) - ratio * schedule.alpha(t), z_s)
    weight = (schedule.alpha(t) / schedule.sigma(t)).square().clamp(min=1).float()
    return {"student": (weight * mean_square(lab.D(z_t, t, **condition) - x)).mean()}


def consistency(lab, eps, condition, num_steps=50):
    """Consistency distillation on the teacher's own paths from noise (Song et al. 2023, arXiv 2303.01469; the loss is
    that of latent consistency models, Luo et al. 2023, 2310.04378): along a path, D should say the same everywhere.

        L = huber(D(x_t, t) - stopgrad[D(x_s, s)])      where DDIM's step leads from x_t to x_s, and D(x_0, 0) = x_0"""
    condition, path, grid = teacher_paths(lab, eps, condition, num_steps, new_every=16)
    k, rows = random_points(lab, path, 0, num_steps - 1)
    with torch.no_grad():
        target = lab.D(path[k + 1, rows], grid[k + 1].clamp(min=1), **condition)
        target = torch.where(append_dims(grid[k + 1], eps) > 0, target, path[-1])
    return {"student": huber(lab.D(path[k, rows], grid[k], **condition) - target).mean()}


def tbcm(lab, eps, condition, num_steps=16, clip=0.1):
    """Trajectory-backward consistency (hustvl/TBCM, 2025): sCM's continuous-time consistency (Lu & Song 2024, arXiv
    2410.11081) on the points of the teacher's own path. In angles theta, cos is alpha and sin is sigma; F is the
    student's velocity (cos * x - D) / sin, and v the teacher's. With dF / dtheta along the path, and r from 0 to 1:

        G = -cos^2 * (F - v) - r * cos * sin * (x + dF / dtheta),    made shorter: G / (||G|| + 0.1)
        L = || F - stopgrad[F + G] ||^2 / tan

    The derivative is a difference over a short step of the path, where TBCM takes a forward derivative. TBCM also
    learns a weight of each time. It has no loss for the first point, and neither have we."""
    schedule, r = lab.schedule, min(1.0, 2 * lab.share)
    condition, path, grid = teacher_paths(lab, eps, condition, num_steps)
    k, rows = random_points(lab, path, 1, num_steps - 1)
    x, t = path[k, rows], grid[k]
    cos, sin = (append_dims(scale(t), x) for scale in (schedule.alpha, schedule.sigma))

    def velocity(denoiser, x, t):
        return (append_dims(schedule.alpha(t), x) * x - denoiser(x, t, **condition)) / append_dims(schedule.sigma(t), x)
    F = velocity(lab.D, x, t)
    with torch.no_grad():
        v, near = velocity(lab.f, x, t), (t - 5).clamp(min=1)
        step = append_dims(schedule.alpha(t).arccos() - schedule.alpha(near).arccos(), x)
        slope = (F - velocity(lab.D, step.cos() * x - step.sin() * v, near)) / step
        G = -(cos**2) * (F - v) - r * cos * sin * (x + slope)
        G = G / (append_dims(mean_square(G).sqrt(), x) + clip)
    return {"student": mean_square((F - (F.detach() + G)) * (cos / sin).sqrt()).mean()}


def pid(lab, eps, condition):
    """Physics-informed distillation (Tee et al. 2024, arXiv 2411.08378). With k = sigma_t / alpha_t, a trajectory
    x_k = y_t + k * eps has the slope dx/dk = (x_k - f) / k. The student's has to have it too:

        L = || x_k - k * (x_k - x_k') / (k - k') - stopgrad[f(x_k)] ||^2
        x_k = (k / K) * K * eps + (1 - k / K) * F(eps, t)

    t' is a time before t, and the gradient passes through both points. K is the last k. There x_K = K * eps by
    construction, so there is no loss for the boundary. Our g is their F."""
    schedule, T = lab.schedule, lab.schedule.T
    t = torch.randint(2, T + 1, (len(eps),), generator=lab.rng).to(eps.device)
    s = (t - max(1, T // 250)).clamp(min=1)
    k_T = schedule.lam(T).exp()

    def signal_at(time):                                    # y_t = x_k - k * eps = (1 - k / K) F
        return append_dims(1 - schedule.lam(time).exp() / k_T, eps) * lab.g(eps, time, **condition)
    y_t, y_s = signal_at(t), signal_at(s)
    with torch.no_grad():
        f = lab.f(add_noise(y_t, eps, t, schedule), t, **condition)
    k_t, k_s = schedule.lam(t).exp(), schedule.lam(s).exp()
    slope = (y_t - y_s) / append_dims(k_t - k_s, eps)       # of y; that of x has eps besides, which cancels k * eps
    return {"student": mean_square(y_t - append_dims(k_t, eps) * slope - f).mean()}


def boot(lab, eps, condition, beta=0.1):
    """BOOT (Gu et al. 2023, arXiv 2306.05544), as train.py has it: signal_ode.bootstrap_loss and boundary_loss."""
    T = lab.schedule.T
    t = torch.randint(1, T + 1, (len(eps),), generator=lab.rng).to(eps.device)
    s = (t - round(T / NUM_STEPS)).clamp(min=0)
    L_BS, L_BC = boot_losses(lab.g, lab.f, eps, t, s, lab.schedule, slice(0, None, 4), "heun", **condition)
    return {"student": L_BS.mean() + beta * L_BC.mean()}


def boot_hard(lab, eps, condition):
    """BOOT with the boundary of PID: G(eps, t) = c * f(eps, T) + (1 - c) * g(eps, t), where c is 1 at T and 0 at 0. So
    G(eps, T) = f(eps, T) by construction, and there is no boundary loss. c = t / T."""
    T = lab.schedule.T
    t = torch.randint(1, T + 1, (len(eps),), generator=lab.rng).to(eps.device)
    s = (t - round(T / NUM_STEPS)).clamp(min=0)
    with torch.no_grad():
        f_T = lab.f(eps, T, **condition)

    def student(eps, t, **condition):
        c = append_dims(t / T, eps)
        return c * f_T + (1 - c) * lab.g(eps, t, **condition)
    [L_BS, _] = boot_losses(student, lab.f, eps, t, s, lab.schedule, slice(0), "heun", **condition)
    return {"student": L_BS.mean()}


# ----------------------------------------------------------------------------------------- two denoisers that disagree
class Score(NamedTuple):
    """A method that compares the teacher's denoiser f with the critic's h at x_tau.

        a           None: pull(x, h - f).  A number: SiD's loss (see matching.py), (f - h) . ((f - x) - a * (f - h)),
                    whose gradient passes through f and h
        divisor     of each sample: "one", "error" (mean |x - f|), or "difference" (sqrt(||f - h||^2 + 0.02^2))
        weight      of the time, a function of alpha and sigma
        huber       divide each element of h - f by sqrt((h - f)^2 + 1e-6), which leaves little but its sign
        critic_w    scale by which the critic is guided
        noisier     p: tau is drawn as u^(1 - p) of T, u uniform; p > 0 prefers noisy times
        updates     of the critic, for each of the student
        pairs       weight of || g(eps, 0) - x_0 ||^2 on the teacher's pictures"""
    a: float | None = None
    divisor: str = "error"
    weight: Callable = lambda alpha, sigma: 1.0
    huber: bool = False
    critic_w: float = 1.0
    noisier: float = 0.0
    updates: int = 1
    pairs: float = 0.0


SCORES = {
    "Diff-Instruct": Score(divisor="one"),                              # Luo et al. 2023, arXiv 2305.18455
    "SwiftBrush": Score(divisor="one", weight=lambda alpha, sigma: alpha * sigma, critic_w=3.0),
    "SiD, a = 1": Score(a=1.0),                                         # Zhou et al. 2024, 2404.04057
    "SiD, a = 1.2": Score(a=1.2),
    "SiD-LSG": Score(a=1.0, critic_w=3.0),                              # Zhou et al. 2024, 2406.01561
    "DMD": Score(pairs=0.25),                                           # Yin et al. 2023, 2311.18828
    "DMD2 without its GAN": Score(updates=5),                           # Yin et al. 2024, 2405.14867
    "SIM": Score(a=1.0, divisor="difference"),                          # Luo et al. 2024, 2410.16794
    "TDM at one step": Score(huber=True),                               # Luo et al. 2025, 2503.06674
}                                                                       # SwiftBrush: Nguyen & Tran 2023, 2312.05239


def score(row):
    """The method of a row of SCORES. The critic learns to denoise x, in train.py's units (matching.critic_loss)."""
    def losses(lab, eps, condition):
        for _ in range(row.updates - 1):                    # of the critic alone
            with torch.no_grad():
                x = lab.g(lab.noise(), 0, **condition)
            tau, n = lab.times(row.noisier), lab.noise()
            h = lab.h(add_noise(x, n, tau, lab.schedule), tau, w=row.critic_w, **condition)
            lab.update(critic=critic_loss(x, h, tau, lab.schedule).mean())
        x, tau, n = lab.g(eps, 0, **condition), lab.times(row.noisier), lab.noise()
        leaf = x.detach().requires_grad_()
        x_tau = add_noise(leaf, n, tau, lab.schedule)
        h = lab.h(x_tau, tau, w=row.critic_w, **condition)
        with torch.set_grad_enabled(row.a is not None):
            f = lab.f(x_tau, tau, **condition)
        G = direction(row, leaf, f, h, lab.schedule.alpha(tau), lab.schedule.sigma(tau))
        losses = {"student": pull(x, G).mean(), "critic": critic_loss(x.detach(), h, tau, lab.schedule).mean()}
        if row.pairs:
            losses["student"] = losses["student"] + row.pairs * regression(lab, eps, condition)["student"]
        return losses
    return losses


def direction(row, x, f, h, alpha, sigma):
    """G (B, ...), against which the student's samples x are moved."""
    units = {"one": 1.0, "error": error_unit(x, f),
             "difference": append_dims((mean_square(f - h) + 0.02**2).sqrt().detach(), x)}
    weight = append_dims(row.weight(alpha, sigma), x) / units[row.divisor]
    if row.a is not None:
        product = (weight * (f - h) * ((f - x) - row.a * (f - h))).sum()
        return torch.autograd.grad(product, x, retain_graph=True)[0]
    G = (h - f).detach()
    return weight * (G / (G.square() + 1e-6).sqrt() if row.huber else G)


# ------------------------------------------------------------------------------------------------------------ of both
def ours(lab, eps, condition, match=16.0):
    """train.py's recipe: BOOT, then matching (SiD with a = 1) with BOOT in every fifth step."""
    if lab.share < MATCH_FROM:
        return boot(lab, eps, condition)
    x = lab.g(eps, 0, **condition)
    tau = lab.times()
    L_M, h = matching_loss(x, lab.f, lab.h, lab.noise(), tau, lab.schedule, **condition)
    losses = {"student": match * L_M.mean(), "critic": critic_loss(x.detach(), h, tau, lab.schedule).mean()}
    if lab.step % 5 == 0:
        losses["student"] = losses["student"] + boot(lab, eps, condition)["student"]
    return losses


def freeflow(lab, eps, condition, delta=1):
    """The form of FreeFlow (2025, arXiv 2511.19428), whose training code is not public. Three batches of four learn the
    trajectory by its mean velocity, whose derivative is a difference of two of the student's times: BOOT with Euler and
    the smallest step. One of four is corrected by matching, as a difference of velocities (x_tau - f) / sigma."""
    if lab.step % 4 < 3:
        T = lab.schedule.T
        t = torch.randint(1, T + 1, (len(eps),), generator=lab.rng).to(eps.device)
        s, boundary = t - delta, slice(0, None, 4)
        L_BS, L_BC = boot_losses(lab.g, lab.f, eps, t, s, lab.schedule, boundary, "euler", **condition)
        return {"student": L_BS.mean() + 0.1 * L_BC.mean()}
    return score(Score(divisor="one", weight=lambda alpha, sigma: 1 / sigma))(lab, eps, condition)


def twinflow(lab, eps, condition):
    """The self-adversarial part of TwinFlow (2025), without images and without a third network: the student is its own
    critic. Told the target time 0 and noise it makes a picture. Told T and a noisy x_tau it learns to denoise them."""
    x, tau, n = lab.g(eps, 0, **condition), lab.times(), lab.noise()
    x_tau = add_noise(x.detach(), n, tau, lab.schedule)
    h = lab.twin(x_tau, tau, **condition)
    with torch.no_grad():
        f = lab.f(x_tau, tau, **condition)
    G = direction(Score(), x.detach(), f, h, lab.schedule.alpha(tau), lab.schedule.sigma(tau))
    return {"student": pull(x, G).mean() + critic_loss(x.detach(), h, tau, lab.schedule).mean()}


class Method(NamedTuple):
    """`losses`: the function. `rates`: of the student, to be tried; the first is the published one, if one is known.
    `critic`: the critic's rate, as a multiple of the student's; 0: there is none. `kind`: of the student. `beta_1`: of
    Adam's betas; the other is 0.99. `networks`: how many are in memory, without the average."""
    losses: Callable
    rates: tuple
    critic: float = 0.0
    kind: str = "generator"
    beta_1: float = 0.9
    networks: int = 2


METHODS = {
    "regression": Method(regression, (1e-5, 1e-4, 5e-4)),
    "progressive": Method(progressive, (1e-5, 1e-4, 5e-4), kind="denoiser", networks=3),
    "consistency": Method(consistency, (1e-5, 1e-4, 5e-4), kind="denoiser"),
    "TBCM": Method(tbcm, (1e-5, 1e-4, 5e-4), kind="denoiser"),
    "PID": Method(pid, (2e-4, 5e-5, 5e-4)),
    "BOOT": Method(boot, (5e-4, 2e-4, 1e-3)),
    "BOOT, hard boundary": Method(boot_hard, (5e-4, 2e-4, 1e-3)),
    **{name: Method(score(row), (1e-5, 5e-5, 2e-4), 1.0, beta_1=0.0, networks=3) for name, row in SCORES.items()},
    "BOOT, then matching": Method(ours, (5e-4, 2e-4, 1e-3), 0.1, networks=3),
    "FreeFlow's form": Method(freeflow, (1e-5, 1e-4, 5e-4), 0.5, beta_1=0.0, networks=3),
    "TwinFlow without images": Method(twinflow, (1e-5, 5e-5, 2e-4), beta_1=0.0),
}
