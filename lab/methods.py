"""Data-free one-step distillers, each on one screen: the losses of one batch.

Every method is a function (lab, eps, condition) -> {network: loss}. It gets a batch of noises eps and the condition of
its prompts, and returns a scalar for each network that learns from it, the student and if it has one the critic.

    x               g(eps, 0), the picture of a student of the kind "generator"; all students start as the teacher
    D(x_t, t)       the clean prediction of a student of the kind "denoiser", whose picture is D(eps, T)
    f(x_t, t)       the teacher's clean prediction, guided
    h(x_t, t)       the critic's clean prediction: what it takes for the student's picture
    tau, n, x_tau   a time, fresh noise, and x noised by them
    pull(x, G)      a loss by which a step of gradient descent moves x along -G, whatever G depends on

Notation and functions are those of signal_ode.py and matching.py, and || . ||^2 is a mean over a sample's elements.
What is special about a method is in its function, or in its row of the table SCORES, with its source. METHODS, at the
end, lists all of them with the rates to be tried. `lab` is the Lab of lab/loop.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from matching import critic_loss, error_unit, matching_loss
from signal_ode import add_noise, append_dims, boot_losses, cfg, contraction, mean_square, solve

NUM_STEPS = 10                                  # K of BOOT
MATCH_FROM, HEAD_START = 0.366, 0.0135          # train.py's, as shares of its evaluations
STAGES = {16: 0.14, 8: 0.14, 4: 0.14, 2: 0.29, 1: 0.29}     # steps of progressive distillation: shares of the budget


def pull(x, G):
    """A loss of each sample, (B,), whose gradient at x is G over the number of elements."""
    return (x * G.detach()).flatten(1).mean(1)


def huber(error, c=1e-3):
    """The mean of sqrt(error^2 + c^2) - c over a sample's elements, (B,)."""
    return ((error.square() + c**2).sqrt() - c).flatten(1).mean(1)


def random_times(lab, eps):
    """Times (B,) in 1..T."""
    return torch.randint(1, lab.schedule.T + 1, (len(eps),), generator=lab.rng).to(eps.device)


# -------------------------------------------------------------------------------------- along the teacher's trajectory
def regression(lab, eps, condition):
    """|| g(eps, 0) - x_0 ||^2, where x_0 is where the teacher's DDIM ends (Luhman & Luhman 2021, arXiv 2101.02388)."""
    condition, path, _ = teacher_paths(lab, eps, condition, lab.schedule.grid(25))
    return {"student": mean_square(lab.g(path[0], 0, **condition) - path[-1]).mean()}


def teacher_paths(lab, eps, condition, grid, teacher=None, new_every=8, kept=16):
    """(condition, path, grid) of a batch: the teacher's DDIM from noise, path (K + 1, B, ...) at the times of the grid,
    (K + 1,). Every 8th batch is new. The others are drawn again from the latest, since a path costs many evaluations.
    """
    stored = lab.memory.setdefault(f"paths of {len(grid) - 1}", [])
    if lab.step % new_every == 0 or not stored:
        with torch.no_grad():
            path = solve(teacher or lab.f, eps, grid, lab.schedule, space="x", **condition)
        stored.append((condition, torch.stack(path), torch.tensor(grid, device=eps.device)))
        del stored[:-kept]
        return stored[-1]
    return stored[torch.randint(len(stored), (), generator=lab.rng)]


def random_points(lab, path, first, last):
    """(k, rows): for each of the B samples the number of a point of its path, and 0..B-1, so that path[k, rows] are
    these points."""
    k = torch.randint(first, last + 1, (path.shape[1],), generator=lab.rng).to(path.device)
    return k, torch.arange(len(k), device=path.device)


def progressive(lab, eps, condition):
    """Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512). One step of the student does what two of its
    teacher do; then it becomes the teacher, and the number of steps N is halved, down to 1. For a step from z_t to z_s

        x~ = (z_s - sigma_s / sigma_t * z_t) / (alpha_s - sigma_s / sigma_t * alpha_t)
        L = max(1, SNR_t) * || D(z_t, t) - x~ ||^2

    The z_t come from the teacher's own path from noise, in place of noised images. The rate falls in each stage."""
    N, _ = stage(lab.share)
    if lab.memory.get("N", N) != N:
        lab.memory["teacher"] = lab.frozen_copy()
    lab.memory["N"], schedule = N, lab.schedule
    condition, path, grid = teacher_paths(lab, eps, condition, schedule.grid(2 * N), lab.memory.get("teacher"))
    k, rows = random_points(lab, path, 0, N - 1)
    t, s, z_t, z_s = grid[2 * k], grid[2 * k + 2], path[2 * k, rows], path[2 * k + 2, rows]
    ratio = schedule.sigma(s) / schedule.sigma(t)
    x = (z_s - append_dims(ratio, z_s) * z_t) / append_dims(schedule.alpha(s) - ratio * schedule.alpha(t), z_s)
    weight = (schedule.alpha(t) / schedule.sigma(t)).square().clamp(min=1).float()
    return {"student": (weight * mean_square(lab.D(z_t, t, **condition) - x)).mean()}


def stage(share):
    """(N, how much of its stage is over) of progressive distillation."""
    for N, length in STAGES.items():
        if share < length or N == 1:
            return N, min(1.0, share / length)
        share -= length


def consistency(lab, eps, condition, num_steps=50):
    """Consistency distillation on the teacher's own paths from noise (Song et al. 2023, arXiv 2303.01469; the loss is
    that of latent consistency models, Luo et al. 2023, 2310.04378): along a path, D should say the same everywhere.

        L = huber(D(x_t, t) - stopgrad[D(x_s, s)])      where DDIM's step leads from x_t to x_s, and D(x_0, 0) = x_0"""
    condition, path, grid = teacher_paths(lab, eps, condition, lab.schedule.grid(num_steps), new_every=16)
    k, rows = random_points(lab, path, 0, num_steps - 1)
    with torch.no_grad():
        target = lab.D(path[k + 1, rows], grid[k + 1].clamp(min=1), **condition)
        target = torch.where(append_dims(grid[k + 1], eps) > 0, target, path[-1])
    return {"student": huber(lab.D(path[k, rows], grid[k], **condition) - target).mean()}


def tbcm(lab, eps, condition, num_steps=16):
    """Trajectory-backward consistency (hustvl/TBCM, 2025): sCM's continuous-time consistency (Lu & Song 2024, arXiv
    2410.11081) on the points of the teacher's own path. In angles theta, cos is alpha and sin is sigma; F is the
    student's velocity (cos * x - D) / sin, and v the teacher's. With dF / dtheta along the path, and r from 0 to 1:

        G = -cos^2 * (F - v) - r * cos * sin * (x + dF / dtheta),    made shorter: G / (norm of G + 0.1)
        L = || F - stopgrad[F + G] ||^2 / tan

    The times of a path are drawn evenly, but for the first. The derivative is a difference over a small angle, where
    TBCM takes a forward derivative. TBCM also learns a weight of each time."""
    schedule, r = lab.schedule, min(1.0, 2 * lab.share)
    late = torch.rand(num_steps - 1, generator=lab.rng).tolist()
    grid = [schedule.T, *(max(1, round(schedule.T * (1 - (k + u) / num_steps))) for k, u in enumerate(late)), 0]
    condition, path, grid = teacher_paths(lab, eps, condition, grid)
    k, rows = random_points(lab, path, 1, num_steps - 1)
    x, t, near = path[k, rows], grid[k], (grid[k] - 5).clamp(min=1)
    cos, sin, cos_near, sin_near = (append_dims(scale(time), x) for time in (t, near)
                                    for scale in (schedule.alpha, schedule.sigma))
    F = (cos * x - lab.D(x, t, **condition)) / sin
    with torch.no_grad():
        angle = append_dims(schedule.alpha(t).arccos() - schedule.alpha(grid[k + 1]).arccos(), x)
        v = (angle.cos() * x - path[k + 1, rows]) / angle.sin()         # which DDIM took for this step
        angle = append_dims(schedule.alpha(t).arccos() - schedule.alpha(near).arccos(), x).clamp(min=1e-6)
        x_near = angle.cos() * x - angle.sin() * v
        F_near = (cos_near * x_near - lab.D(x_near, near, **condition)) / sin_near
        G = -(cos**2) * (F - v) - r * cos * sin * (x + (F - F_near) / angle)
        G = G / (append_dims(mean_square(G).sqrt(), x) + 0.1 / x[0].numel() ** 0.5)
    return {"student": mean_square((F - (F.detach() + G)) * (cos / sin).sqrt()).mean()}


def pid(lab, eps, condition):
    """Physics-informed distillation (Tee et al. 2024, arXiv 2411.08378). With k = sigma_t / alpha_t, a trajectory
    x_k = y_t + k * eps has the slope dx/dk = (x_k - f) / k. The student's has to have it too:

        L = || x_k - k * (x_k - x_k') / (k - k') - stopgrad[f(x_k)] ||^2
        x_k = (k / K) * K * eps + (1 - k / K) * F(eps, t)

    t' is a time before t, and the gradient passes through both points. K is the last k. There x_K = K * eps by
    construction, so there is no loss for the boundary. Our g is their F."""
    schedule = lab.schedule
    t = random_times(lab, eps)
    s = (t - max(1, schedule.T // 250)).clamp(min=0)
    k_t, k_s, k_T = (schedule.lam(time).exp() for time in (t, s, schedule.T))
    y_t, y_s = (append_dims(1 - k / k_T, eps) * lab.g(eps, time, **condition) for k, time in ((k_t, t), (k_s, s)))
    with torch.no_grad():
        f = lab.f(add_noise(y_t, eps, t, schedule), t, **condition)
    slope = (y_t - y_s) / append_dims(k_t - k_s, eps)       # of y; that of x has eps besides, which cancels k * eps
    return {"student": mean_square(y_t - append_dims(k_t, eps) * slope - f).mean()}


def boot(lab, eps, condition, beta=0.1):
    """BOOT (Gu et al. 2023, arXiv 2306.05544), as train.py has it: signal_ode.bootstrap_loss and boundary_loss."""
    t = random_times(lab, eps)
    s = (t - round(lab.schedule.T / NUM_STEPS)).clamp(min=0)
    L_BS, L_BC = boot_losses(lab.g, lab.f, eps, t, s, lab.schedule, slice(0, None, 4), "heun", **condition)
    return {"student": L_BS.mean() + beta * L_BC.mean()}


def boot_hard(lab, eps, condition, delta=None, solver="heun"):
    """BOOT with a boundary as PID's: G(eps, t) = c * f(eps, T) + (1 - c) * g(eps, t) with c = t / T, which is f(eps, T)
    at T by construction. There is no boundary loss."""
    T, schedule = lab.schedule.T, lab.schedule
    t = random_times(lab, eps)
    s = (t - (delta or round(T / NUM_STEPS))).clamp(min=0)
    with torch.no_grad():
        f_T = lab.f(eps, T, **condition)

    def student(eps, t, **condition):
        c = append_dims(t / T, eps)
        return c * f_T + (1 - c) * lab.g(eps, t, **condition)
    L_BS, _ = boot_losses(student, lab.f, eps, t, s, schedule, slice(0), solver, **condition)
    if delta:                                               # so small a step: the residual itself, not its slope
        L_BS = L_BS * (1 - contraction(t, s, schedule)).float()
    return {"student": L_BS.mean()}


# ----------------------------------------------------------------------------------------- two denoisers that disagree
class Score(NamedTuple):
    """A method that compares the teacher's denoiser f with the critic's h at x_tau.

        a           None: pull(x, h - f).  A number: SiD's loss (see matching.py), (f - h) . ((f - x) - a * (f - h)),
                    whose gradient passes through f and h
        divisor     of each sample: "one", "error" (mean |x - f|), or "difference" (sqrt(||f - h||^2 + 0.02^2))
        weight      of the time, a function of alpha and sigma
        huber       divide each element of h - f by sqrt((h - f)^2 + 1e-6), which leaves little but its sign
        critic_w    scale by which h is guided where it is compared
        guided      whether the critic learns as it is guided; if not, a tenth of its prompts are empty
        updates     of the critic, for each of the student
        pairs       weight of || g(eps, 0) - x_0 ||^2 on the teacher's pictures
        rates       of the student, to be tried; the first is published for Stable Diffusion, or near to it
        critic      rate of the critic, as a multiple of the student's"""
    a: float | None = None
    divisor: str = "error"
    weight: Callable = lambda alpha, sigma: 1.0
    huber: bool = False
    critic_w: float = 1.0
    guided: bool = False
    updates: int = 1
    pairs: float = 0.0
    rates: tuple = (1e-5, 3e-5, 1e-4)
    critic: float = 1.0


SCORES = {
    # Luo et al. 2023, arXiv 2305.18455
    "Diff-Instruct": Score(divisor="one"),
    # Nguyen & Tran 2023, 2312.05239: sigma^2 times the difference of epsilons. Its critic is a LoRA; here it is not.
    "SwiftBrush": Score(divisor="one", weight=lambda alpha, sigma: alpha * sigma, critic_w=3.0,
                        rates=(1e-6, 3e-5, 1e-4)),
    # Zhou et al. 2024, 2404.04057
    "SiD, a = 1": Score(a=1.0),
    "SiD, a = 1.2": Score(a=1.2),
    # Zhou et al. 2024, 2406.01561
    "SiD-LSG": Score(a=1.0, critic_w=3.0, guided=True, rates=(1e-6, 3e-5, 1e-4)),
    # Yin et al. 2023, 2311.18828, where the distance on pairs is LPIPS
    "DMD": Score(pairs=0.25),
    # Yin et al. 2024, 2405.14867
    "DMD2 without its GAN": Score(updates=5),
    # Luo et al. 2024, 2410.16794; the constant 0.02 of its divisor is ours
    "SIM": Score(a=1.0, divisor="difference"),
    # Luo et al. 2025, 2503.06674, whose critic has the weight min(SNR, 5)
    "TDM at one step": Score(huber=True, rates=(4e-6, 3e-5, 1e-4), critic=5.0),
}


def score(row):
    """The method of a row of SCORES. The critic learns to denoise x, in train.py's units (matching.critic_loss)."""
    def method(lab, eps, condition):
        schedule = lab.schedule
        for _ in range(row.updates - 1):                    # of the critic alone
            with torch.no_grad():
                x = lab.g(lab.noise(), 0, **condition)
            tau = lab.times()
            _, h = critics(lab, row, add_noise(x, lab.noise(), tau, schedule), tau, condition)
            lab.update(critic=critic_loss(x, h, tau, schedule).mean())
        x, tau = lab.g(eps, 0, **condition), lab.times()
        leaf = x.detach().requires_grad_()
        x_tau = add_noise(leaf, lab.noise(), tau, schedule)
        h, h_learning = critics(lab, row, x_tau, tau, condition)
        with torch.set_grad_enabled(row.a is not None):
            f = lab.f(x_tau, tau, **condition)
        G = direction(row, leaf, f, h, schedule.alpha(tau), schedule.sigma(tau))
        L = pull(x, G).mean()
        if row.pairs:
            L = L + row.pairs * regression(lab, eps, condition)["student"]
        return {"student": L, "critic": critic_loss(x.detach(), h_learning, tau, schedule).mean()}
    return method


def critics(lab, row, x_tau, tau, condition):
    """h as it is compared, and h as it learns."""
    h = lab.h(x_tau, tau, **condition)
    if row.critic_w == 1:
        return h, h
    h_empty = lab.h(x_tau, tau, **lab.empty(condition))
    compared = cfg(h, h_empty, lab.scales(row.critic_w, tau))
    if row.guided:
        return compared, compared
    emptied = torch.rand(len(h), generator=lab.rng).to(h.device) < 0.1
    return compared, torch.where(append_dims(emptied, h) > 0, h_empty, h)


def direction(row, x, f, h, alpha, sigma):
    """G, (B, ...): the samples x are to move along -G."""
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
    """train.py's recipe before refining: BOOT; then the critic's head start; then matching (SiD with a = 1.2), with
    BOOT in every fifth step. In matching the teacher is guided at the less noisy times alone."""
    matched, critic_learns = lab.share >= MATCH_FROM, lab.share >= MATCH_FROM - HEAD_START
    sums = {} if matched and lab.step % 5 else boot(lab, eps, condition)
    if critic_learns:
        x, tau = lab.g(eps, 0, **condition), lab.times()
        L_M, h = matching_loss(x, lab.limited, lab.h, lab.noise(), tau, lab.schedule, **condition)
        sums["critic"] = critic_loss(x.detach(), h, tau, lab.schedule).mean()
        if matched:
            sums["student"] = sums.get("student", 0) + match * L_M.mean()
    return sums


def freeflow(lab, eps, condition):
    """The form of FreeFlow (2025, arXiv 2511.19428), whose training code is not public. Three quarters of a batch learn
    the trajectory by its mean velocity, whose derivative is a difference of two of the student's times: BOOT with a
    hard boundary, Euler and the smallest step. The others are matched, by the difference of velocities
    (x_tau - f) / sigma."""
    cut = 3 * len(eps) // 4
    first, last = ({name: value[rows] for name, value in condition.items()} for rows in (slice(cut), slice(cut, None)))
    L = boot_hard(lab, eps[:cut], first, delta=1, solver="euler")["student"]
    x, tau, n = lab.g(eps[cut:], 0, **last), lab.times()[cut:], lab.noise()[cut:]
    x_tau = add_noise(x.detach(), n, tau, lab.schedule)
    h = lab.h(x_tau, tau, **last)
    with torch.no_grad():
        f = lab.f(x_tau, tau, **last)
    G = (h - f) / append_dims(lab.schedule.sigma(tau), h)
    return {"student": L + pull(x, G).mean(), "critic": critic_loss(x.detach(), h, tau, lab.schedule).mean()}


def twinflow(lab, eps, condition):
    """What remains of TwinFlow (2025) without images and without a third network: the student is its own critic. Told
    the target time 0 and noise it makes a picture. Told T and a noisy x_tau it learns to denoise its pictures. The
    other side of the comparison is the teacher's, where TwinFlow has the student's own; and there is no loss for the
    trajectory."""
    x, tau = lab.g(eps, 0, **condition), lab.times()
    x_tau = add_noise(x.detach(), lab.noise(), tau, lab.schedule)
    h = lab.twin(x_tau, tau, **condition)
    with torch.no_grad():
        f = lab.f(x_tau, tau, **condition)
    G = direction(Score(), x.detach(), f, h, lab.schedule.alpha(tau), lab.schedule.sigma(tau))
    return {"student": pull(x, G).mean() + critic_loss(x.detach(), h, tau, lab.schedule).mean()}


# ------------------------------------------------------------------------------------------------------------ the list
def usual_ramp(share):
    """(student's rate, critic's rate) as multiples of their own: warm-up for 4%, then a fall to zero over the last 60%.
    """
    ramp = min(1.0, share / 0.04) * min(1.0, (1 - share) / 0.6)
    return ramp, ramp


def staged_ramp(share):
    """The rate falls to zero in each stage of progressive distillation."""
    _, over = stage(share)
    return min(1.0, share / 0.04, 1 - over), 0.0


def our_ramp(share):
    """train.learning_rate, and a critic whose rate stays."""
    if share < MATCH_FROM:
        return min(1.0, share / 0.03, 0.2 + 0.8 * (MATCH_FROM - share) / (0.6 * MATCH_FROM)), 1.0
    return 0.2 * min(1.0, (1 - share) / (0.6 * (1 - MATCH_FROM))), 1.0


class Method(NamedTuple):
    """`losses`: the function. `rates`: of the student, to be tried; the first is published, for other teachers.
    `critic`: the critic's rate, as a multiple of the student's; 0: there is none. `kind`: of the student. `beta_1`: of
    Adam, before matching; from then on it is 0. `ramp`: of the rates. `networks`: in memory, without the average."""
    losses: Callable
    rates: tuple
    critic: float = 0.0
    kind: str = "generator"
    beta_1: float = 0.9
    ramp: Callable = usual_ramp
    networks: int = 2


METHODS = {
    "regression": Method(regression, (1e-5, 1e-4, 4e-4)),
    "progressive": Method(progressive, (1e-5, 1e-4, 4e-4), kind="denoiser", ramp=staged_ramp, networks=3),
    "consistency": Method(consistency, (1e-5, 1e-4, 4e-4), kind="denoiser"),
    "TBCM": Method(tbcm, (1e-5, 1e-4, 4e-4), kind="denoiser"),
    "PID": Method(pid, (2e-4, 5e-5, 5e-4)),
    "BOOT": Method(boot, (5e-4, 2e-4, 1e-3)),
    "BOOT, hard boundary": Method(boot_hard, (5e-4, 2e-4, 1e-3)),
    **{name: Method(score(row), row.rates, row.critic, beta_1=0.0, networks=3) for name, row in SCORES.items()},
    "BOOT, then matching": Method(ours, (5e-4, 2e-4, 1e-3), 0.1, ramp=our_ramp, networks=3),
    "FreeFlow's form": Method(freeflow, (1e-5, 1e-4, 4e-4), 1.0, beta_1=0.0, networks=3),
    "TwinFlow without images": Method(twinflow, (1e-5, 3e-5, 1e-4), beta_1=0.0),
}
