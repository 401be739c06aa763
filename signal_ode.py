"""The mathematics of BOOT: noise schedule, DDIM, Signal-ODE, the student's prediction and the two losses.

Source: Gu et al. 2023, "BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping", arXiv
2306.05544, section 3. Pure functions of tensors: nothing here knows a network class, a command line or a process.

    ys = solve(denoise, eps, schedule.grid(50), schedule, **condition)          # the trajectory that a student learns
    L_BS = bootstrap_loss(student, denoise, eps, t, s, schedule, **condition)   # and the loss by which it learns it;
    L_BS, L_BC = boot_losses(student, denoise, eps, t, s, schedule, rows, **condition)      # with the boundary's

    eps               the initial Gaussian noise, fixed along one trajectory; the student's only image input
    t, s              times, whole numbers 0..T, s < t; t = 0 is the clean end, t = T the noise end
    alpha_t, sigma_t  signal and noise scale, alpha_t**2 + sigma_t**2 == 1
    x_t               noisy sample, alpha_t * x_0 + sigma_t * noise
    f                 the teacher's prediction of the clean sample, f(x_t, t), after guidance
    y_t               the signal part of x_t: (x_t - sigma_t * eps) / alpha_t
    lam_t             log(sigma_t / alpha_t), grows with t
    r                 exp(lam_s - lam_t) = sigma_s * alpha_t / (alpha_s * sigma_t), in [0, 1)
    g                 the student, g(eps, t): one forward pass that predicts y_t
    i, x_i            the fixed time at which the student reads its input, and that input, sigma_i * eps
    w                 guidance scale; w = 1 is no guidance

Times are int64 tensors (B,) or ints; samples are float32 or float64 tensors (B, ...); || . ||^2 is the mean over a
sample's elements. A condition is the dict of a denoiser's other inputs by name, such as {"text": ..., "w": ...} or
{"label": ...}; the functions here pass it on unread, but boot_losses, which picks rows of it.
"""

import math

import torch

class Schedule:
    """alpha, sigma and lam of a variance-preserving diffusion, tabulated in float64 from a published config.
    config: the dict of scheduler_config.json. Raises ValueError naming the key, the value and what is supported."""

    def __init__(self, config):
        self.T = config.get("num_train_timesteps", 1000)
        self.prediction = config.get("prediction_type", "epsilon")
        check(is_number(self.T, 1, 10**6, int), "num_train_timesteps", self.T, "a whole number from 1 to 1000000")
        check(self.prediction in ("epsilon", "v_prediction", "sample"), "prediction_type", self.prediction,
              "epsilon, v_prediction or sample")
        kind = config.get("_class_name")
        check(kind in SCHEDULERS, "_class_name", kind, "a scheduler of betas, such as DDIMScheduler")
        zero_snr = config.get("rescale_betas_zero_snr")
        check(zero_snr in (None, False, True), "rescale_betas_zero_snr", zero_snr, "False or True")
        for key in ("thresholding", "use_flow_sigmas", "snr_shift_scale"):
            check(not config.get(key), key, config.get(key), "False")

        alpha_bar = torch.cumprod(1 - noise_rates(config, self.T), 0)                           # (T,)
        if zero_snr:                                        # Lin et al. 2024, algorithm 1: alpha_T = 0
            alpha = alpha_bar.sqrt()
            alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar])                  # (T + 1,)
        given = ", ".join(f"{key} {shorten(config[key])}" for key in BETAS if config.get(key) is not None)
        if not (alpha_bar.diff() < 0).all():
            raise ValueError(f"{given} is not supported: more noise at every step, and some signal before the last")
        check(self.prediction != "epsilon" or alpha_bar[-1] > 1e-12, "prediction_type", "epsilon", "v_prediction or "
              f"sample, as alpha_T is {alpha_bar[-1].sqrt():.0e}, by which an epsilon is divided, with {given}")
        self.tables = {torch.device("cpu"): (alpha_bar.sqrt(), (1 - alpha_bar).sqrt())}

    def on_device_of(self, t):
        """The tables (alpha, sigma) on the device of t; they are copied there the first time that it is seen."""
        device = t.device if torch.is_tensor(t) else torch.device("cpu")
        if device not in self.tables:
            dtype = torch.float32 if device.type == "mps" else torch.float64                # Apple's GPUs lack float64
            self.tables[device] = tuple(table.to(device, dtype) for table in self.tables[torch.device("cpu")])
        return self.tables[device]

    def alpha(self, t):
        """Signal scale at time t, int or (B,) int tensor -> float64, same shape."""
        return self.on_device_of(t)[0][t]

    def sigma(self, t):
        """Noise scale at time t, int or (B,) int tensor -> float64, same shape."""
        return self.on_device_of(t)[1][t]

    def lam(self, t):
        """log(sigma_t / alpha_t), half the negative log signal-to-noise ratio; -inf at the clean end."""
        return (self.sigma(t) / self.alpha(t)).log()

    def index(self, t):
        """The timestep index that the published networks take, 0..T - 1, at time t, 1..T. Time 0 has none."""
        return t - 1

    def grid(self, num_steps):
        """The trailing grid of whole times round(T, T - T/K, ..., 0), a list of K + 1 ints."""
        check(1 <= num_steps <= self.T, "num_steps", num_steps, f"1 to {self.T}")
        return [round(self.T * (num_steps - k) / num_steps) for k in range(num_steps + 1)]

def noise_rates(config, T):
    """beta_1 .. beta_T, float64 (T,), of a scheduler's config: the noise that each step of training time adds."""
    betas = config.get("trained_betas")
    if betas is not None:
        good = isinstance(betas, (list, tuple)) and len(betas) == T and all(is_number(beta, 0, 1) for beta in betas)
        check(good, "trained_betas", betas, f"numbers from 0 to 1, as many as num_train_timesteps, {T}")
        return torch.tensor(betas, dtype=torch.float64)
    kind = config.get("beta_schedule", "linear")
    check(kind in ("linear", "scaled_linear", "squaredcos_cap_v2"), "beta_schedule", kind,
          "linear, scaled_linear or squaredcos_cap_v2")
    if kind == "squaredcos_cap_v2":                                         # Nichol & Dhariwal 2021, eq. 17
        u = torch.arange(T + 1, dtype=torch.float64) / T
        alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    beta_1, beta_T = config.get("beta_start"), config.get("beta_end")
    for key, beta in (("beta_start", beta_1), ("beta_end", beta_T)):
        check(is_number(beta, 0, 1), key, beta, "a number from 0 to 1")
    if kind == "linear":                                                    # DDPM, Ho et al. 2020
        return torch.linspace(beta_1, beta_T, T, dtype=torch.float64)
    return torch.linspace(beta_1**0.5, beta_T**0.5, T, dtype=torch.float64) ** 2            # Stable Diffusion

def like(coefficient, x):
    """A coefficient, () or (B,), with the device, the precision and the dimensions to multiply samples x (B, ...)."""
    coefficient = torch.as_tensor(coefficient, dtype=x.dtype, device=x.device)
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))

def slerp(a, b, share):
    """Noises (F, ...) on the way from a to b at shares (F,) of it: on the great circle through both, where they are as
    long as noise is; straight, where a and b are the same."""
    lengths = a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1)
    angle = ((a * b).flatten(1).sum(1) / lengths).clamp(-1, 1).acos().clamp(min=1e-3)           # (F,)
    of_a, of_b = ((1 - share) * angle).sin() / angle.sin(), (share * angle).sin() / angle.sin()
    return like(of_a, a) * a + like(of_b, b) * b

def clean_prediction(out, x_t, t, schedule):
    """f, the clean sample that a network's raw output at (x_t, t) stands for: epsilon, v or sample prediction.
    In float32 at least: an epsilon output is divided by alpha_T, 15x for Stable Diffusion and 157x for DDPM, which
    would make a half-precision rounding error as large as the signal that BOOT learns from."""
    out, x_t = (z if z.dtype == torch.float64 else z.float() for z in (out, x_t))
    alpha_t, sigma_t = like(schedule.alpha(t), x_t), like(schedule.sigma(t), x_t)
    if schedule.prediction == "epsilon":
        return (x_t - sigma_t * out) / alpha_t
    if schedule.prediction == "v_prediction":                               # Salimans & Ho 2022
        return alpha_t * x_t - sigma_t * out
    return out

def guide(f_cond, f_uncond, w):
    """Classifier-free guidance of clean predictions (Ho & Salimans 2022). w: float or (B,); 1 is none."""
    return f_uncond + like(w, f_cond) * (f_cond - f_uncond)

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
    """DDIM's step from x_t to x_s (Song et al. 2021, eq. 12 without noise): same noise estimate, new scales."""
    eps_t = (x_t - like(schedule.alpha(t), x_t) * f) / like(schedule.sigma(t), x_t)
    return like(schedule.alpha(s), x_t) * f + like(schedule.sigma(s), x_t) * eps_t

def signal_step(y_t, f, t, s, schedule):
    """BOOT's step from y_t to y_s along the Signal-ODE, dy/dt = -lam'(t) (f - y), solved exactly for constant f.
    It is DDIM's step in terms of y, in which eps cancels: y_s = y_t + (1 - r) (f - y_t)."""
    return y_t + like(1 - contraction(t, s, schedule), y_t) * (f - y_t)

def solve(denoise, eps, grid, schedule, solver="euler", space="y", start=None, **condition):
    """The trajectory of the noise eps under a denoiser, as the list of its states at the times of the grid.
    denoise: callable (x_t, t, **condition) -> f, t an int. grid: decreasing ints, e.g. schedule.grid(50). Space "x":
    DDIM, states x_t from x_T = eps. Space "y": the Signal-ODE, states y_t from y_T = f(eps, T), which is the student's
    reference. start: replaces either start. Heun's method takes the mean of f at t and at the predicted s."""
    check_solver(solver)
    step = ddim_step if space == "x" else signal_step
    if start is None:
        start = eps if space == "x" else denoise(eps, grid[0], **condition)
    states = [start]
    for t, s in zip(grid, grid[1:]):
        state = states[-1]
        x_t = state if space == "x" else noisy(state, eps, t, schedule)
        f = denoise(x_t, t, **condition)
        if solver == "heun" and s > 0:                      # at s = 0 the step ends in f: there is no second one
            predicted = step(state, f, t, s, schedule)
            x_s = predicted if space == "x" else noisy(predicted, eps, s, schedule)
            f = (f + denoise(x_s, s, **condition)) / 2
        states.append(step(state, f, t, s, schedule))
    return states

def student_signal(network, eps, t, i, schedule, **condition):
    """g(eps, t): one pass of the teacher's network at a fixed input time i, which is also told the target time t.
    network: callable (x_i, i, t, **condition) -> raw output. The output means what the teacher's does at (x_i, i), so
    that before training g(eps, t) == f(sigma_i * eps, i) for every t. The paper has i = T. There an epsilon network
    must reproduce eps almost exactly, because 1 / alpha_T multiplies its error; a smaller i avoids that."""
    x_i = like(schedule.sigma(i), eps) * eps
    return clean_prediction(network(x_i, i, t, **condition), x_i, i, schedule)

def boot_targets(student, teacher, eps, t, s, schedule, boundary, solver="euler", **condition):
    """What the losses lead to: of each sample y_s (B, ...), one solver step of the Signal-ODE from the student's own
    y_t = g(eps, t) to s; and of those that the slice `boundary` picks f(eps, T), (B', ...). No gradient.
    student: callable (eps, t, **condition) -> y_t; teacher: callable (x_t, t, **condition) -> f. t, s: (B,), s < t."""
    check_solver(solver)
    eps_T, T = eps[boundary], torch.full_like(t[boundary], schedule.T)
    with torch.no_grad():                       # the weights being trained, not their average: the paper needs no EMA
        y_t = student(eps, t, **condition)
        x_t = torch.cat([noisy(y_t, eps, t, schedule), eps_T])
        f, f_T = teacher(x_t, torch.cat([t, T]), **repeat(condition, boundary)).split([len(t), len(T)])
        if solver == "heun":
            y_s = signal_step(y_t, f, t, s, schedule)
            f_s = teacher(noisy(y_s, eps, s, schedule), s.clamp(min=1), **condition)        # networks have no time 0
            f = torch.where(like(s, f) > 0, (f + f_s) / 2, f)                               # s = 0 keeps f: see solve
        return signal_step(y_t, f, t, s, schedule), f_T

def boot_losses(student, teacher, eps, t, s, schedule, boundary, solver="euler", weight=1.0, **condition):
    """L_BS of each sample, (B,), and L_BC of those that the slice `boundary` picks, (B',); each network is asked about
    both at once. Without such samples, conditions are passed on unread; else they are tensors (B, ...).

    L_BS = || (g(eps, s) - y_s) / (1 - r) ||^2, times weight, float or (B,): the division puts the error in units of the
    clean prediction, and is the exact form of the paper's 1 / (lam' delta)^2. L_BC = || g(eps, T) - f(eps, T) ||^2 is
    the noise end, where the ODE determines nothing. The rest as in boot_targets."""
    y_s, f_T = boot_targets(student, teacher, eps, t, s, schedule, boundary, solver, **condition)
    T = torch.full_like(t[boundary], schedule.T)
    g = student(torch.cat([eps, eps[boundary]]), torch.cat([s, T]), **repeat(condition, boundary))
    g_s, g_T = g.split([len(t), len(T)])
    L_BS = ((g_s - y_s) / like(1 - contraction(t, s, schedule), y_s)).square().flatten(1).mean(1)
    return weight * L_BS, (g_T - f_T).square().flatten(1).mean(1)

def repeat(condition, rows):
    """The condition of all samples, and once more of some, if there are any."""
    if rows == slice(0):
        return condition
    return {name: torch.cat([value, value[rows]]) for name, value in condition.items()}

def bootstrap_loss(student, teacher, eps, t, s, schedule, solver="euler", weight=1.0, **condition):
    """L_BS of each sample, (B,), alone. The rest as in boot_losses."""
    return boot_losses(student, teacher, eps, t, s, schedule, slice(0), solver, weight, **condition)[0]

def boundary_loss(student, teacher, eps, schedule, **condition):
    """L_BC of each sample, (B,), alone: || g(eps, T) - f(eps, T) ||^2."""
    T = torch.full((len(eps),), schedule.T, device=eps.device)
    with torch.no_grad():
        target = teacher(eps, T, **condition)
    return (student(eps, T, **condition) - target).square().flatten(1).mean(1)

# ------------------------------------------------------------------------------------------- what a config may say
def check(good, key, value, supported):
    """Raise ValueError, with key, value and what is supported, if it is not good."""
    if not good:
        raise ValueError(f"{key} {shorten(value)} is not supported: {supported}")

def shorten(value, length=60):
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."

def is_number(value, low, high, kind=float):
    """Whether a config's value is a number from low to high, and whole where the kind is int."""
    return type(value) in (int, kind) and low <= value <= high

# The schedulers whose noise is what their betas say; None is a config written by hand
SCHEDULERS = (None, *(f"{name}Scheduler" for name in (
    "PNDM", "DDIM", "DDIMParallel", "DDIMInverse", "DDPM", "DDPMParallel", "DPMSolverMultistep", "DPMSolverSinglestep",
    "DPMSolverMultistepInverse", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep", "SASolver", "EulerDiscrete",
    "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "LMSDiscrete")))
BETAS = ("num_train_timesteps", "trained_betas", "rescale_betas_zero_snr", "beta_start", "beta_end", "beta_schedule")

def check_solver(solver):
    check(solver in ("euler", "heun"), "solver", solver, "euler or heun")
