"""The mathematics of BOOT (Gu et al. 2023, arXiv 2306.05544): schedule, DDIM, Signal-ODE and the two losses.

Pure functions of tensors: nothing here knows a network class, a command line or a process group.

    eps               the initial Gaussian noise, fixed along one trajectory; the student's only image input
    t, s              times, whole numbers 0..T, s < t; t = 0 is the clean end, t = T the noise end
    alpha_t, sigma_t  signal and noise scale, alpha_t**2 + sigma_t**2 == 1
    x_t               noisy sample, alpha_t * x_0 + sigma_t * noise
    f                 the teacher's prediction of the clean sample, f(x_t, t), after guidance
    y_t               the signal part of x_t: (x_t - sigma_t * eps) / alpha_t
    lam_t             log(sigma_t / alpha_t), grows with t
    r                 exp(lam_s - lam_t) = sigma_s * alpha_t / (alpha_s * sigma_t), in [0, 1)
    g                 the student, g(eps, t): one forward pass that predicts y_t
    w                 guidance scale; w = 1 is no guidance

Times are int64 tensors of shape (B,) or plain ints; samples are (B, ...) tensors in float32 or better.
"""

import math

import torch


class Schedule:
    """alpha, sigma, lam of a variance-preserving diffusion, tabulated in float64 from a published config.

    config: the dict of `scheduler_config.json`. Raises ValueError naming the key, the value and what is
    supported. A network trained with T = num_train_timesteps calls our time t its index t - 1; t = 0
    (alpha = 1) has no index. clip: clean predictions lie within [-clip, clip], or None; the pixel models say so.
    """

    def __init__(self, config):
        self.T = config.get("num_train_timesteps", 1000)
        self.prediction = config.get("prediction_type", "epsilon")
        if "_class_name" in config and not {"beta_start", "trained_betas"} & set(config):
            raise ValueError(f"_class_name {config['_class_name']!r} is not supported: it has no betas")
        kind, T = config.get("beta_schedule", "linear"), self.T
        beta_1, beta_T = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type {self.prediction!r} is not supported: "
                             "epsilon, v_prediction or sample")
        clips = config.get("_class_name") in ("DDPMScheduler", "DDIMScheduler")         # where the key is missing
        self.clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample", clips) else None
        for key in ("thresholding", "rescale_betas_zero_snr"):
            if config.get(key):
                raise ValueError(f"{key} {config[key]!r} is not supported: False")
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
            if len(betas) != T:
                raise ValueError(f"trained_betas has {len(betas)} values, num_train_timesteps is {T}")
        elif kind == "linear":
            betas = torch.linspace(beta_1, beta_T, T, dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(beta_1**0.5, beta_T**0.5, T, dtype=torch.float64) ** 2
        elif kind == "squaredcos_cap_v2":                                   # Nichol & Dhariwal 2021, eq. 17
            u = torch.arange(T + 1, dtype=torch.float64) / T
            abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"beta_schedule {kind!r} is not supported: "
                             "linear, scaled_linear or squaredcos_cap_v2")
        abar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0)])     # (T + 1,)
        self.tables = {torch.device("cpu"): (abar.sqrt(), (1 - abar).sqrt())}  # copied once to each device

    def table(self, t):
        device = t.device if torch.is_tensor(t) else torch.device("cpu")
        if device not in self.tables:
            dtype = torch.float32 if device.type == "mps" else torch.float64        # Apple's GPUs have no double
            self.tables[device] = tuple(values.to(device, dtype) for values in self.tables[torch.device("cpu")])
        return self.tables[device]

    def alpha(self, t):
        """Signal scale at time t, int or (B,) int tensor -> float64, same shape."""
        return self.table(t)[0][t]

    def sigma(self, t):
        """Noise scale at time t, int or (B,) int tensor -> float64, same shape."""
        return self.table(t)[1][t]

    def lam(self, t):
        """log(sigma_t / alpha_t), half the negative log signal-to-noise ratio; -inf at the clean end."""
        return (self.sigma(t) / self.alpha(t)).log()

    def grid(self, num_steps):
        """The trailing grid of whole times round(T, T - T/K, ..., 0), a list of K + 1 ints."""
        if not 1 <= num_steps <= self.T:
            raise ValueError(f"num_steps {num_steps} is not supported: 1 to {self.T}")
        return [round(self.T * (num_steps - k) / num_steps) for k in range(num_steps + 1)]


def like(coefficient, x):
    """A schedule value, () or (B,) float64, shaped and cast to multiply x (B, ...): the tables' one cast."""
    coefficient = torch.as_tensor(coefficient).to(x.device, x.dtype)
    return coefficient.view(-1, *[1] * (x.ndim - 1)) if coefficient.ndim else coefficient


def clean_prediction(out, x_t, t, schedule):
    """f, the clean sample a network's raw output at (x_t, t) stands for: epsilon, v or sample prediction.

    In float32 at least: an epsilon output is divided by alpha_T, 15x for Stable Diffusion and 157x for DDPM,
    and would carry a half-precision rounding error as large as the signal that BOOT learns from.
    """
    out, x_t = (z if z.dtype == torch.float64 else z.float() for z in (out, x_t))
    alpha_t, sigma_t = like(schedule.alpha(t), x_t), like(schedule.sigma(t), x_t)
    if schedule.prediction == "epsilon":
        return (x_t - sigma_t * out) / alpha_t
    if schedule.prediction == "v_prediction":
        return alpha_t * x_t - sigma_t * out
    return out


def guide(f_cond, f_uncond, w):
    """Classifier-free guidance of clean predictions (Ho & Salimans 2022). w: float or (B,); 1 is none."""
    return f_uncond + (like(w, f_cond) if torch.is_tensor(w) else w) * (f_cond - f_uncond)


def signal(x_t, eps, t, schedule):
    """y_t, the signal part of x_t."""
    return (x_t - like(schedule.sigma(t), x_t) * eps) / like(schedule.alpha(t), x_t)


def noisy(y_t, eps, t, schedule):
    """x_t = alpha_t * y_t + sigma_t * eps: the noisy sample with signal part y_t."""
    return like(schedule.alpha(t), y_t) * y_t + like(schedule.sigma(t), y_t) * eps


def contraction(t, s, schedule):
    """r = exp(lam_s - lam_t) as a product, so that nothing divides by zero at the clean end (where r = 0)."""
    return schedule.sigma(s) * schedule.alpha(t) / (schedule.alpha(s) * schedule.sigma(t))


def ddim_step(x_t, f, t, s, schedule):
    """DDIM's step x_t to x_s (Song et al. 2021, eq. 12 without noise): same noise estimate, new scales."""
    eps_t = (x_t - like(schedule.alpha(t), x_t) * f) / like(schedule.sigma(t), x_t)
    return like(schedule.alpha(s), x_t) * f + like(schedule.sigma(s), x_t) * eps_t


def signal_step(y_t, f, t, s, schedule):
    """Signal-ODE step y_t to y_s: DDIM's, eps cancelled, dy/dt = -lam'(t) (f - y), exact for constant f."""
    return y_t + like(1 - contraction(t, s, schedule), y_t) * (f - y_t)


def check_solver(solver):
    if solver not in ("euler", "heun"):
        raise ValueError(f"solver {solver!r} is not supported: euler or heun")


def solve(denoise, eps, grid, schedule, solver="euler", space="y", start=None):
    """The trajectory of one noise under a denoiser, as the list of its states at the times of `grid`.

    denoise: callable (x_t, t) -> f, t an int. grid: decreasing ints, e.g. schedule.grid(50). space "x": DDIM,
    states x_t from x_T = eps. space "y": the Signal-ODE, states y_t from y_T = f(eps, T), the student's
    reference. `start` replaces either start. Euler is DDIM; Heun averages f at t and at the predicted s, and
    is Euler where s = 0.
    """
    check_solver(solver)
    step = {"x": ddim_step, "y": signal_step}[space]
    to_x = {"x": lambda x, t: x, "y": lambda y, t: noisy(y, eps, t, schedule)}[space]
    state = start if start is not None else eps if space == "x" else denoise(eps, grid[0])
    states = [state]
    for t, s in zip(grid, grid[1:]):
        f = denoise(to_x(state, t), t)
        if solver == "heun" and s > 0:                          # f has no value at s = 0, and r = 0 there
            f = (f + denoise(to_x(step(state, f, t, s, schedule), s), s)) / 2
        state = step(state, f, t, s, schedule)
        states.append(state)
    return states


def student_signal(network, eps, t, i, schedule):
    """g(eps, t), the student: one pass of the teacher's network at fixed input time i, told target time t.

    network: callable (x_i, i, t) -> raw output. The output means what the teacher's does at (x_i, i), so that
    before training g(eps, t) == f(sigma_i * eps, i) for every t. The paper has i = T; a smaller i spares the
    network from reproducing eps, which 1 / alpha_i then amplifies.
    """
    x_i = like(schedule.sigma(i), eps) * eps
    return clean_prediction(network(x_i, i, t), x_i, i, schedule)


def bootstrap_target(student, teacher, eps, t, s, schedule, solver="euler"):
    """One solver step of the Signal-ODE from the student's own y_t = g(eps, t) to s. No gradient.

    student: callable (eps, t) -> y_t; teacher: callable (x_t, t) -> f. t, s: (B,), s < t. Returns (B, ...).
    """
    check_solver(solver)
    with torch.no_grad():                       # same weights, no EMA copy: the boundary loss is what pins y
        y_t = student(eps, t)
        f = teacher(noisy(y_t, eps, t, schedule), t)
        if solver == "heun":
            y_s = signal_step(y_t, f, t, s, schedule)
            f_s = teacher(noisy(y_s, eps, s, schedule), s.clamp(min=1))     # the clean end has no index
            f = torch.where((s > 0).view(-1, *[1] * (f.ndim - 1)), (f + f_s) / 2, f)
        return signal_step(y_t, f, t, s, schedule)


def bootstrap_loss(student, teacher, eps, t, s, schedule, solver="euler", weight=1.0):
    """L_BS per sample, (B,): the student at s against one solver step from the student at t.

    The error is divided by 1 - r, which puts it in units of the clean prediction: the exact form of the
    paper's 1 / (lam' delta)**2. weight: float or (B,).
    """
    target = bootstrap_target(student, teacher, eps, t, s, schedule, solver)
    error = (student(eps, s) - target) / like(1 - contraction(t, s, schedule), target)
    return weight * error.square().flatten(1).mean(1)


def boundary_loss(student, teacher, eps, schedule):
    """L_BC per sample, (B,): pins the noise end, g(eps, T) to f(eps, T), where the ODE holds nothing."""
    T = torch.full((len(eps),), schedule.T, device=eps.device)
    with torch.no_grad():
        target = teacher(eps, T)
    return (student(eps, T) - target).square().flatten(1).mean(1)
