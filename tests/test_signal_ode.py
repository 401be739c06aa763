"""The mathematics on a Gaussian data distribution, whose denoiser and trajectories have closed forms."""

import math
import re

import pytest
import torch

from signal_ode import (Schedule, add_noise, append_dims, boot_losses, bootstrap_loss, boundary_loss, cfg, clean_prediction, contraction, ddim_step, signal, signal_step, solve, student_signal)

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DDPM = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
MU, S = 0.7, 0.4                                            # the data: N(MU, S**2), every element


@pytest.fixture
def eps():
    return torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def schedule():
    return Schedule(SD)


def variance(t, schedule):
    return schedule.alpha(t) ** 2 * S**2 + schedule.sigma(t) ** 2


def gaussian_teacher(schedule):
    def f(x_t, t):
        alpha_t = append_dims(schedule.alpha(t), x_t)
        return MU + alpha_t * S**2 / append_dims(variance(t, schedule), x_t) * (x_t - alpha_t * MU)
    return f


def gaussian_x(x_T, t, schedule):
    """Where the probability-flow ODE from x_T is at time t."""
    T = schedule.T
    scale = append_dims((variance(t, schedule) / variance(T, schedule)).sqrt(), x_T)
    return append_dims(schedule.alpha(t), x_T) * MU + scale * (x_T - schedule.alpha(T) * MU)


def gaussian_student(schedule):
    """The exact solution of the Signal-ODE from y_T = f(eps, T), for any eps and t."""
    def g(eps, t):
        x_T = add_noise(gaussian_teacher(schedule)(eps, schedule.T), eps, schedule.T, schedule)
        return signal(gaussian_x(x_T, t, schedule), eps, t, schedule)
    return g


@pytest.mark.parametrize("config", [SD, DDPM, COSINE, ZERO_SNR])
def test_schedule_is_variance_preserving_and_clean_at_zero(config):
    schedule = Schedule(config)
    t = torch.arange(schedule.T + 1)
    total = schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2
    assert torch.allclose(total, torch.ones(1001, dtype=torch.float64), atol=1e-15)
    assert schedule.alpha(0) == 1 and schedule.sigma(0) == 0 and (schedule.lam(t).diff() > 0).all()


@pytest.mark.parametrize("config, alpha_T", [(SD, 0.06826), (DDPM, 0.00635)])
def test_schedule_ends_at_the_published_noise_level(config, alpha_T):
    assert Schedule(config).alpha(1000).item() == pytest.approx(alpha_T, abs=5e-6)


@pytest.mark.parametrize("config", [SD, DDPM, COSINE, ZERO_SNR])
def test_schedule_equals_diffusers(config):
    diffusers = pytest.importorskip("diffusers", reason="the reference library is not installed")
    reference = diffusers.DDIMScheduler(**config).alphas_cumprod.double()
    assert torch.allclose(Schedule(config).alpha(torch.arange(1, 1001)) ** 2, reference, rtol=2e-5, atol=1e-7)


def test_grid_is_trailing_and_whole(schedule):
    assert schedule.grid(4) == [1000, 750, 500, 250, 0]
    assert schedule.grid(7)[:2] == [1000, 857] and schedule.grid(1) == [1000, 0]


@pytest.mark.parametrize("key, value", [
    ("beta_schedule", "sigmoid"), ("prediction_type", "flow"), ("beta_start", None), ("beta_end", "x"),
    ("beta_end", 1.2), ("num_train_timesteps", 1000.0), ("num_train_timesteps", 0), ("trained_betas", [0.1, 0.2]),
    ("beta_end", True), ("rescale_betas_zero_snr", "yes"), ("use_flow_sigmas", True)])
def test_unsupported_schedule_names_key_and_value(key, value):
    with pytest.raises(ValueError, match=re.escape(f"{key} {value!r} is not supported")):
        Schedule({**SD, key: value})


@pytest.mark.parametrize("change", [
    {"rescale_betas_zero_snr": True}, {"beta_end": 1.0}, {"trained_betas": [0.5] * 999 + [1.0]},
    {"trained_betas": [0.0] * 1000}, {"trained_betas": [0.1] * 500 + [1.0] * 500}, {"beta_start": 0}])
def test_schedule_that_cannot_work_is_refused(change):
    """An epsilon network is divided by alpha_T; none can do with steps without noise, or without signal before T."""
    key, value = next(iter(change.items()))
    with pytest.raises(ValueError, match="is not supported: ") as caught:
        Schedule({**SD, **change})
    assert f"{key} {repr(value)[:40]}" in str(caught.value)


def test_zero_terminal_snr_has_the_same_trajectory_in_x_and_in_y(eps):
    """Where alpha_T = 0, x_T is noise alone and y_T the mean of the data, and both go where the closed form does."""
    schedule, errors = Schedule(ZERO_SNR), []
    f = gaussian_teacher(schedule)
    for num_steps in (50, 100):
        xs, ys = (solve(f, eps, schedule.grid(num_steps), schedule, "heun", space) for space in "xy")
        assert all(torch.allclose(add_noise(y, eps, t, schedule), x, atol=1e-10)
                   for x, y, t in zip(xs, ys, schedule.grid(num_steps)))
        errors.append((ys[-1] - gaussian_x(eps, 0, schedule)).abs().max().item())
    assert schedule.alpha(1000) == 0 and torch.equal(ys[0], torch.full_like(eps, MU)) and errors[1] < errors[0] / 1.9
    t = torch.full((16,), 1000)
    assert bootstrap_loss(lambda eps, t: append_dims(torch.ones(16) * MU, eps), f, eps, t, t - 100, schedule).isfinite().all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_clean_prediction_inverts_every_parametrisation(prediction, eps):
    schedule = Schedule({**SD, "prediction_type": prediction})
    x_0, t = torch.randn_like(eps), torch.randint(1, 1001, (16,))
    alpha_t, sigma_t = append_dims(schedule.alpha(t), eps), append_dims(schedule.sigma(t), eps)
    out = {"epsilon": eps, "v_prediction": alpha_t * eps - sigma_t * x_0, "sample": x_0}[prediction]
    assert torch.allclose(clean_prediction(out, add_noise(x_0, eps, t, schedule), t, schedule), x_0, atol=1e-12)


def test_clean_prediction_is_float32_from_a_half_precision_output(schedule):
    x = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    assert clean_prediction(x, x, torch.tensor([1000, 1]), schedule).dtype == torch.float32


def test_guidance_of_one_is_no_guidance(eps):
    assert torch.allclose(guide(eps, torch.randn_like(eps), 1.0), eps)
    assert torch.equal(guide(eps, eps, torch.full((16,), 7.5)), eps)


@pytest.mark.parametrize("space", ["x", "y"])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_solver_converges_to_the_closed_form_at_its_order(solver, order, space, schedule, eps):
    f, errors = gaussian_teacher(schedule), []
    start = f(eps, 1000)
    x_T = eps if space == "x" else add_noise(start, eps, 1000, schedule)
    exact = gaussian_x(x_T, 200, schedule)
    exact = exact if space == "x" else signal(exact, eps, 200, schedule)
    for num_steps in (40, 80, 160):
        grid = list(range(1000, 199, -800 // num_steps))
        error = solve(f, eps, grid, schedule, solver, space)[-1] - exact
        errors.append(error.square().mean().sqrt().item())
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(slope - order) < 0.15 for slope in slopes), (errors, slopes)


@pytest.mark.parametrize("config", [SD, DDPM, COSINE])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_signal_ode_trajectory_equals_ddims_at_every_step(config, solver, eps):
    schedule = Schedule(config)
    f, grid = gaussian_teacher(schedule), schedule.grid(50)
    xs = solve(f, eps, grid, schedule, solver, space="x")
    ys = solve(f, eps, grid, schedule, solver, space="y", start=signal(eps, eps, 1000, schedule))
    for x, y, t in zip(xs, ys, grid):
        assert (add_noise(y, eps, t, schedule) - x).abs().max() < 1e-10


def test_one_step_is_the_same_in_x_and_in_y(schedule, eps):
    y_t, f = torch.randn_like(eps), torch.randn_like(eps)
    t, s = torch.randint(500, 1001, (16,)), torch.randint(0, 500, (16,))
    x_s = ddim_step(add_noise(y_t, eps, t, schedule), f, t, s, schedule)
    assert torch.allclose(add_noise(signal_step(y_t, f, t, s, schedule), eps, s, schedule), x_s, atol=1e-12)


def test_clean_end_divides_by_nothing(schedule, eps):
    assert contraction(torch.tensor([1, 40]), torch.tensor([0, 0]), schedule).tolist() == [0, 0]
    assert torch.equal(signal_step(torch.zeros_like(eps), eps, 40, 0, schedule), eps)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_true_solution_has_bootstrap_loss_zero_to_the_discretisation_order(solver, order, schedule, eps):
    f, g, errors = gaussian_teacher(schedule), gaussian_student(schedule), []
    t = torch.linspace(300, 1000, 16).long()
    for delta in (40, 20, 10):
        errors.append(bootstrap_loss(g, f, eps, t, t - delta, schedule, solver).mean().sqrt().item())
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert errors[-1] < 0.02 and all(abs(slope - order) < 0.2 for slope in slopes), (errors, slopes)
    assert boundary_loss(g, f, eps, schedule).max() < 1e-24


def test_bootstrap_loss_has_no_gradient_through_its_target(schedule, eps):
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    f, t = gaussian_teacher(schedule), torch.full((16,), 500)
    seen = []

    def student(eps, t):
        seen.append(torch.is_grad_enabled())
        return a * eps
    bootstrap_loss(student, f, eps, t, t - 40, schedule).sum().backward()
    assert seen == [False, True] and a.grad is not None


def test_conditions_reach_student_and_teacher_untouched(schedule, eps):
    """Whatever they are called: the losses and the solver know none of them."""
    size, seen = object(), []

    def record(z, t, **condition):
        seen.append(condition)
        return z
    t = torch.full((16,), 500)
    bootstrap_loss(record, record, eps, t, t - 40, schedule, "heun", size=size, w=2.0)
    boundary_loss(record, record, eps, schedule, size=size, w=2.0)
    solve(record, eps, schedule.grid(3), schedule, "heun", size=size, w=2.0)
    student_signal(lambda x, i, t, **condition: record(x, t, **condition), eps, t, 400, schedule, size=size, w=2.0)
    assert len(seen) > 12 and all(condition == {"size": size, "w": 2.0} for condition in seen)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("boundary", [slice(0), slice(1, None, 4), slice(None)])
def test_both_losses_at_once_are_the_two(solver, boundary, schedule, eps):
    """Values, and gradients to a weight; each sample with its own condition."""
    weight, size = torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True), torch.arange(16.0)
    f = gaussian_teacher(schedule)
    teacher = lambda x_t, t, size: f(x_t, t) * append_dims(1 + size / 16, x_t)
    student = lambda eps, t, size: weight[0] * eps * append_dims(t / 1000 + size, eps) + weight[1]
    t = torch.arange(250, 1001, 50)
    s = t - 250                                             # the first is the clean end
    L_BS, L_BC = boot_losses(student, teacher, eps, t, s, schedule, boundary, solver, weight=2.0, size=size)
    each = (bootstrap_loss(student, teacher, eps, t, s, schedule, solver, weight=2.0, size=size),
            boundary_loss(student, teacher, eps[boundary], schedule, size=size[boundary]))
    for ours, theirs in zip((L_BS, L_BC), each):
        assert torch.allclose(ours, theirs, rtol=1e-12)
    gradients = [torch.autograd.grad(sum(loss.sum() for loss in pair), weight)[0] for pair in ((L_BS, L_BC), each)]
    assert torch.allclose(*gradients, rtol=1e-12)


def test_minimising_both_losses_finds_the_solution(schedule):
    """A student of free y_t = a_t + b_t * eps on a grid of times, trained by BOOT alone, ends where the Euler
    Signal-ODE does."""
    grid, f = schedule.grid(20), gaussian_teacher(schedule)
    rng = torch.Generator().manual_seed(0)
    coefficients = torch.zeros(1001, 2, dtype=torch.float64, requires_grad=True)
    student = lambda eps, t: append_dims(coefficients[t, 0], eps) + append_dims(coefficients[t, 1], eps) * eps
    optimizer = torch.optim.Adam([coefficients], 0.05)
    for step in range(2500):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 2500)
        eps = torch.randn(64, 1, 4, generator=rng, dtype=torch.float64)
        k = torch.randint(0, 20, (64,), generator=rng)
        t, s = torch.tensor(grid)[k], torch.tensor(grid)[k + 1]
        bootstrap = bootstrap_loss(student, f, eps, t, s, schedule).mean()
        loss = bootstrap + boundary_loss(student, f, eps, schedule).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = student(eps, torch.zeros(64, dtype=torch.int64)) - solve(f, eps, grid, schedule)[-1]
    assert error.square().mean().sqrt() < 0.02


@pytest.mark.parametrize("i", [1, 400, 1000])
def test_student_reads_its_input_time(i, schedule, eps):
    seen = {}

    def network(x_i, i, t):
        seen.update(x=x_i, i=i, t=t)
        return torch.zeros_like(x_i)
    g = student_signal(network, eps, 250, i, schedule)
    assert seen["i"] == i and seen["t"] == 250 and torch.equal(seen["x"], schedule.sigma(i) * eps)
    assert torch.allclose(g, schedule.sigma(i) / schedule.alpha(i) * eps)
