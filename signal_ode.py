"""The mathematics of BOOT: noise schedule, DDIM, the Signal-ODE, the student's prediction and the two losses.

Source: Gu et al. 2023, "BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping", arXiv
2306.05544, section 3. Pure functions of tensors: nothing here knows a network class, a command line or a process.

    ys = solve(teacher, eps, schedule.grid(50), schedule, **condition)          # the trajectory a student learns
    L_BS = bootstrap_loss(student, teacher, eps, t, s, schedule, **condition)   # the loss by which it learns it
    L_BC = boundary_loss(student, teacher, eps, schedule, **condition)          # and the loss for its start, y_T

    eps               the initial Gaussian noise, fixed along one trajectory; the student's only image input
    t, s              times, whole numbers 0..T with s < t; t = 0 is the clean end, t = T the noise end
    alpha_t, sigma_t  signal and noise scale, alpha_t**2 + sigma_t**2 == 1
    x_t               noisy sample; the noise that the teacher predicts in it (eps_t of ddim_step) is in general not eps
    f                 the teacher's prediction of the clean sample, f(x_t, t), with guidance if there is any
    y_t               the signal part of x_t: y_t = (x_t - sigma_t * eps) / alpha_t
    lam(t)            log(sigma_t / alpha_t), which grows with t
    dy/dt             -lam'(t) * (f(x_t, t) - y_t) with x_t = alpha_t * y_t + sigma_t * eps: the Signal-ODE
    r                 exp(lam(s) - lam(t)) = sigma_s * alpha_t / (alpha_s * sigma_t), in [0, 1)
    g                 the student, g(eps, t): one forward pass that predicts y_t
    i, x_i            the fixed time whose noise level the student's input has, and that input, sigma_i * eps; unlike
                      an x_t it has no signal part
    w                 guidance scale; w = 1 is no guidance

Times are ints or int64 tensors (B,). Samples are float32 or float64 tensors (B, ...), and || . ||^2 is the mean of the
squares over a sample's elements. A condition is the dict of a denoiser's other inputs by name, such as {"text": ...}.
"""

import torch


# ------------------------------------------------------------------------------------------ from DDIM to the Signal-ODE
def add_noise(y_t, eps, t, schedule):
    """x_t = alpha_t * y_t + sigma_t * eps, the noisy sample with signal part y_t."""
    return append_dims(schedule.alpha(t), y_t) * y_t + append_dims(schedule.sigma(t), y_t) * eps


def signal(x_t, eps, t, schedule):
    """y_t = (x_t - sigma_t * eps) / alpha_t, the signal part of x_t (section 3.1)."""
    return (x_t - append_dims(schedule.sigma(t), x_t) * eps) / append_dims(schedule.alpha(t), x_t)


def ddim_step(x_t, f, t, s, schedule):
    """DDIM's step from x_t to x_s (Song et al. 2021, eq. 12 without noise).

        x_s = alpha_s * f + sigma_s * eps_t,      eps_t = (x_t - alpha_t * f) / sigma_t
    """
    eps_t = (x_t - append_dims(schedule.alpha(t), x_t) * f) / append_dims(schedule.sigma(t), x_t)
    return append_dims(schedule.alpha(s), x_t) * f + append_dims(schedule.sigma(s), x_t) * eps_t


def contraction(t, s, schedule):
    """r = exp(lam(s) - lam(t)), written as a product, which avoids lam(0) = -inf. At the clean end r is 0."""
    return schedule.sigma(s) * schedule.alpha(t) / (schedule.alpha(s) * schedule.sigma(t))


def signal_step(y_t, f, t, s, schedule):
    """The Signal-ODE's step from y_t to y_s, exact for constant f: y_s = y_t + (1 - r) (f - y_t) (section 3.1).
    Put x = alpha * y + sigma * eps into both sides of DDIM's step: eps cancels, and this remains."""
    return y_t + append_dims(1 - contraction(t, s, schedule), y_t) * (f - y_t)


# ----------------------------------------------------------------------------------------------------------- the losses
def bootstrap_loss(student, teacher, eps, t, s, schedule, solver="euler", **condition):
    """L_BS of each sample, (B,): g(eps, s) should equal one solver step from g(eps, t) (section 3.2, eq. 9).

        L_BS = || (g(eps, s) - y_s) / (1 - r) ||^2,      y_s = stopgrad[ y_t + (1 - r) (f(x_t, t) - y_t) ],
                                                         y_t = g(eps, t),  x_t = alpha_t * y_t + sigma_t * eps

    An error of f moves y_s by 1 - r times as much. Dividing by 1 - r makes the same error of f count the same for every
    t and s. The paper's weight is 1 / (lam' delta)^2 with delta = t - s, the limit for small steps: 1 - r is about
    lam' delta. With the solver "heun", f is heun_mean.
    `student`: callable (eps, t, **condition) -> y_t. `teacher`: callable (x_t, t, **condition) -> f. `t`, `s`: (B,)."""
    with torch.no_grad():                       # The target uses the current weights. As in the paper, it needs no EMA.
        y_t = student(eps, t, **condition)
        f = teacher(add_noise(y_t, eps, t, schedule), t, **condition)
        if solver == "heun":
            f = heun_mean(f, y_t, teacher, eps, t, s, schedule, **condition)
        y_s = signal_step(y_t, f, t, s, schedule)
    return scaled_error(student(eps, s, **condition), y_s, t, s, schedule)


def boundary_loss(student, teacher, eps, schedule, **condition):
    """L_BC of each sample, (B,): || g(eps, T) - f(eps, T) ||^2 (section 3.2). It gives the ODE its initial value:
    L_BS trains the student at s < t only, and never at T. Since alpha_T is small, eps stands in for x_T."""
    T = torch.full((len(eps),), schedule.T, device=eps.device)
    with torch.no_grad():
        f_T = teacher(eps, T, **condition)
    return mean_square(student(eps, T, **condition) - f_T)


def heun_mean(f, y_t, teacher, eps, t, s, schedule, **condition):
    """The mean of f at t and of f at the state that an Euler step predicts for s, (B, ...). A step with this f is of
    second order, as Heun's method is: a better target for the same t - s. Where s = 0, f stays as it is, as in `solve`.
    """
    y_s = signal_step(y_t, f, t, s, schedule)
    f_s = teacher(add_noise(y_s, eps, s, schedule), s.clamp(min=1), **condition)            # no denoiser knows time 0
    return torch.where(append_dims(s, f) > 0, (f + f_s) / 2, f)


def scaled_error(g_s, y_s, t, s, schedule):
    """|| (g_s - y_s) / (1 - r) ||^2 of each sample, (B,)."""
    return mean_square((g_s - y_s) / append_dims(1 - contraction(t, s, schedule), y_s))


def mean_square(error):
    """|| . ||^2 of each sample of (B, ...), (B,)."""
    return error.square().flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------------------- predictions
def clean_prediction(out, x_t, t, schedule):
    """f, the clean sample that a network's raw output at (x_t, t) stands for: epsilon, v or sample prediction.
    It is computed in float32 at least, from an output that should be float32 as well. An epsilon output is divided by
    alpha_t, which multiplies rounding errors, at T by 15 for Stable Diffusion and by 157 for DDPM. In half precision
    they would be as large as the differences that L_BS measures."""
    out, x_t = (z if z.dtype == torch.float64 else z.float() for z in (out, x_t))
    alpha_t, sigma_t = append_dims(schedule.alpha(t), x_t), append_dims(schedule.sigma(t), x_t)
    if schedule.prediction == "epsilon":                                    # (x_t - sigma_t * out) / alpha_t
        return signal(x_t, out, t, schedule)
    if schedule.prediction == "v_prediction":                               # Salimans & Ho 2022
        return alpha_t * x_t - sigma_t * out
    return out


def cfg(f_cond, f_uncond, w):
    """Classifier-free guidance of clean predictions (Ho & Salimans 2022). `w`: float or (B,); 1 is no guidance."""
    return f_uncond + append_dims(w, f_cond) * (f_cond - f_uncond)


def student_signal(network, eps, t, i, schedule, **condition):
    """g(eps, t): one pass of a copy of the teacher's network at a fixed input time i. The network is also told the
    target time t, which has no effect before training. `network`: callable (x_i, i, t, **condition) -> raw output. The
    output is read as the teacher's at (x_i, i) is. So before training, g(eps, t) is the teacher's prediction at
    (x_i, i), unguided and unclipped, for every t. The paper has i = T. There an epsilon network must reproduce eps
    almost exactly, because 1 / alpha_T multiplies its error; a smaller i avoids that."""
    x_i = append_dims(schedule.sigma(i), eps) * eps
    return clean_prediction(network(x_i, i, t, **condition), x_i, i, schedule)


# --------------------------------------------------------------------------------------------------------- trajectories
def solve(denoise, eps, grid, schedule, solver="euler", space="y", start=None, **condition):
    """The trajectory of the noise eps under a denoiser, as the list of its states at the times of the grid.
    In space "x" it is DDIM's, with states x_t, which start at x_T = eps. In space "y" it is the Signal-ODE's, with
    states y_t, which start at y_T = f(eps, T); this is what the student should reproduce. The two differ a little,
    because the latter's x_T is alpha_T * y_T + sigma_T * eps. `start` replaces either start.
    The solver "euler" takes f at t. "heun" takes the mean of f at t and at the state predicted for s.
    `denoise`: callable (x_t, t, **condition) -> f, t an int. `grid`: ints from T down, such as schedule.grid(50)."""
    step = ddim_step if space == "x" else signal_step
    if start is None:
        start = eps if space == "x" else denoise(eps, grid[0], **condition)
    states = [start]
    for t, s in zip(grid, grid[1:]):
        state = states[-1]
        x_t = state if space == "x" else add_noise(state, eps, t, schedule)
        f = denoise(x_t, t, **condition)
        if solver == "heun" and s > 0:                      # at s = 0 the step ends in f, and no denoiser knows time 0
            predicted = step(state, f, t, s, schedule)
            x_s = predicted if space == "x" else add_noise(predicted, eps, s, schedule)
            f = (f + denoise(x_s, s, **condition)) / 2
        states.append(step(state, f, t, s, schedule))
    return states


# ------------------------------------------------------------------------------------- the same losses, in fewer passes
def boot_losses(student, teacher, eps, t, s, schedule, boundary, solver="euler", **condition):
    """(L_BS, L_BC): bootstrap_loss of each sample, (B,), and boundary_loss of those that the slice `boundary` picks,
    (B',). The samples of both go through one pass of the teacher, at times t and T. They also share the student's pass
    with a gradient, at s and T. train.py calls this function. Unless `boundary` is slice(0), which picks none,
    all values of the condition must be tensors (B, ...)."""
    eps_boundary, T = eps[boundary], torch.full_like(t[boundary], schedule.T)
    both = repeat_rows(condition, boundary)
    with torch.no_grad():
        y_t = student(eps, t, **condition)
        x_t = torch.cat([add_noise(y_t, eps, t, schedule), eps_boundary])
        f, f_T = teacher(x_t, torch.cat([t, T]), **both).split([len(t), len(T)])
        if solver == "heun":
            f = heun_mean(f, y_t, teacher, eps, t, s, schedule, **condition)
        y_s = signal_step(y_t, f, t, s, schedule)
    g_s, g_T = student(torch.cat([eps, eps_boundary]), torch.cat([s, T]), **both).split([len(t), len(T)])
    return scaled_error(g_s, y_s, t, s, schedule), mean_square(g_T - f_T)


def repeat_rows(condition, rows):
    """The condition with the rows of a slice appended; unchanged for slice(0)."""
    if rows == slice(0):
        return condition
    return {name: torch.cat([value, value[rows]]) for name, value in condition.items()}


# --------------------------------------------------------------------------------------------------- the noise schedule
class Schedule:
    """alpha, sigma and lam of a variance-preserving diffusion, tabulated in float64.
    `betas`: float64 (T,), the variance of the noise that each step of the diffusion adds.
    `prediction`: what the networks' output means, "epsilon", "v_prediction" or "sample".
    Both are read from a published config by plumbing.configs.read_schedule."""

    def __init__(self, betas, prediction="epsilon"):
        self.T, self.prediction = len(betas), prediction
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0)])     # (T + 1,)
        self.tables = {torch.device("cpu"): (alpha_bar.sqrt(), (1 - alpha_bar).sqrt())}

    def tables_for(self, t):
        """The tables (alpha, sigma) on the device of t. They are copied there at the first call."""
        device = t.device if torch.is_tensor(t) else torch.device("cpu")
        if device not in self.tables:
            dtype = torch.float32 if device.type == "mps" else torch.float64                # Apple's GPUs lack float64
            self.tables[device] = tuple(table.to(device, dtype) for table in self.tables[torch.device("cpu")])
        return self.tables[device]

    def alpha(self, t):
        """Signal scale at time t, int or (B,) int tensor -> float64, same shape."""
        return self.tables_for(t)[0][t]

    def sigma(self, t):
        """Noise scale at time t, int or (B,) int tensor -> float64, same shape."""
        return self.tables_for(t)[1][t]

    def lam(self, t):
        """log(sigma_t / alpha_t), half the negative log signal-to-noise ratio; -inf at the clean end."""
        return (self.sigma(t) / self.alpha(t)).log()

    def timestep(self, t):
        """The timestep index 0..T - 1 that the published networks take at time t, 1..T. Time 0 has none."""
        return t - 1

    def grid(self, num_steps):
        """K + 1 evenly spaced times from T to 0, rounded, where K = num_steps: a list of ints ("trailing" spacing)."""
        if not 1 <= num_steps <= self.T:
            raise ValueError(f"num_steps = {num_steps} is not supported: 1 to {self.T}")
        return [round(self.T * (num_steps - k) / num_steps) for k in range(num_steps + 1)]


def append_dims(coefficient, x):
    """Casts and reshapes a coefficient, () or (B,), so that it can multiply samples x (B, ...)."""
    coefficient = torch.as_tensor(coefficient, dtype=x.dtype, device=x.device)
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))
