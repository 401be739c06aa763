"""The paper's mathematics on a Gaussian data distribution, whose denoiser and trajectories have closed forms.

- A schedule preserves variance, is clean at t = 0, ends at the published noise, takes any betas; its grid is trailing.
- y_t is the signal part of x_t, in every parametrisation of the network's output.
- DDIM's step, and Heun's, converge to the closed form at their orders, in x and in y.
- The Signal-ODE is dy/dt = -lam'(t) (f - y); its trajectory is DDIM's at every step, also where alpha_T = 0.
- The bootstrap loss of the true solution is zero to the solver's order, and the boundary loss is zero.
- Whoever minimises both finds the solution; the target has no gradient; conditions reach student and teacher untouched.
- boot_losses, in fewer passes, is bootstrap_loss and boundary_loss, in values and gradients.
"""

import math

import pytest
import torch

from conftest import COSINE, DDPM, SD, ZERO_SNR, gaussian_denoiser, new_schedule
from signal_ode import (Schedule, add_noise, append_dims, boot_losses, bootstrap_loss, boundary_loss, cfg,
                        clean_prediction, contraction, signal, signal_step, solve, student_signal)

MU, S = 0.7, 0.4                                            # the data: N(MU, S**2), every element


@pytest.fixture
def eps():
    return torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def f(schedule):
    return gaussian_denoiser(schedule, MU, S)


def gaussian_x(x_T, t, schedule):
    """Where the probability-flow ODE from x_T is at time t."""
    variance, variance_T = (schedule.alpha(u) ** 2 * S**2 + schedule.sigma(u) ** 2 for u in (t, schedule.T))
    scale = append_dims((variance / variance_T).sqrt(), x_T)
    return append_dims(schedule.alpha(t), x_T) * MU + scale * (x_T - schedule.alpha(schedule.T) * MU)


def gaussian_student(schedule):
    """The exact solution of the Signal-ODE from y_T = f(eps, T), for any eps and t."""
    def g(eps, t):
        f_T = gaussian_denoiser(schedule, MU, S)(eps, schedule.T)
        x_T = add_noise(f_T, eps, schedule.T, schedule)
        return signal(gaussian_x(x_T, t, schedule), eps, t, schedule)
    return g


def slopes(errors):
    """The orders at which errors fall, when the step is halved."""
    return [math.log2(a / b) for a, b in zip(errors, errors[1:])]


# ----------------------------------------------------------------------------------------------------- the schedule
@pytest.mark.parametrize("config, alpha_T", [(SD, 0.06826), (DDPM, 0.00635), (COSINE, 0.0), (ZERO_SNR, 0.0)])
def test_schedule_preserves_variance_from_clean_to_the_published_noise(config, alpha_T):
    schedule = new_schedule(config)
    t = torch.arange(schedule.T + 1)
    total = schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2
    assert torch.allclose(total, torch.ones(1001, dtype=torch.float64), atol=1e-15)
    assert schedule.alpha(0) == 1 and schedule.sigma(0) == 0 and (schedule.lam(t).diff() > 0).all()
    assert schedule.alpha(1000).item() == pytest.approx(alpha_T, abs=5e-5 if config is COSINE else 5e-6)


def test_schedule_of_a_list_of_betas_and_its_trailing_grid(schedule):
    short = Schedule(torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64), "sample")
    alpha_bar = torch.tensor([1, 0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.5], dtype=torch.float64)
    assert torch.allclose(short.alpha(torch.arange(4)) ** 2, alpha_bar, atol=1e-15) and short.grid(3) == [3, 2, 1, 0]
    assert schedule.grid(4) == [1000, 750, 500, 250, 0]
    assert schedule.grid(7)[:2] == [1000, 857] and schedule.grid(1) == [1000, 0]


# ------------------------------------------------------------------------------------------- predictions, one step
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_clean_prediction_inverts_every_parametrisation(prediction, eps):
    schedule = new_schedule(prediction_type=prediction)
    x_0, t = torch.randn_like(eps), torch.randint(1, 1001, (16,))
    alpha_t, sigma_t = append_dims(schedule.alpha(t), eps), append_dims(schedule.sigma(t), eps)
    out = {"epsilon": eps, "v_prediction": alpha_t * eps - sigma_t * x_0, "sample": x_0}[prediction]
    assert torch.allclose(clean_prediction(out, add_noise(x_0, eps, t, schedule), t, schedule), x_0, atol=1e-12)
    assert torch.allclose(signal(add_noise(x_0, eps, t, schedule), eps, t, schedule), x_0, atol=1e-12)
    half = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    assert clean_prediction(half, half, torch.tensor([1000, 1]), schedule).dtype == torch.float32


def test_guidance_of_one_is_none_and_the_clean_end_divides_by_nothing(schedule, eps):
    assert torch.allclose(cfg(eps, torch.randn_like(eps), 1.0), eps)
    assert torch.equal(cfg(eps, eps, torch.full((16,), 7.5)), eps)
    assert contraction(torch.tensor([1, 40]), torch.tensor([0, 0]), schedule).tolist() == [0, 0]
    assert torch.equal(signal_step(torch.zeros_like(eps), eps, 40, 0, schedule), eps)


# ------------------------------------------------------------------------------------------------------ trajectories
def test_the_closed_form_solves_the_signal_ode(schedule, f, eps):
    """dy/dt = -lam'(t) (f - y), both derivatives by central differences over one step of time."""
    g = gaussian_student(schedule)
    for t in (100, 500, 900):
        dy, dlam = g(eps, t + 1) - g(eps, t - 1), schedule.lam(t + 1) - schedule.lam(t - 1)
        y_t = g(eps, t)
        f_t = f(add_noise(y_t, eps, t, schedule), t)
        assert torch.allclose(dy / 2, -dlam / 2 * (f_t - y_t), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("space", ["x", "y"])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_solver_converges_to_the_closed_form_at_its_order(solver, order, space, schedule, f, eps):
    errors = []
    x_T = eps if space == "x" else add_noise(f(eps, 1000), eps, 1000, schedule)
    exact = gaussian_x(x_T, 200, schedule)
    exact = exact if space == "x" else signal(exact, eps, 200, schedule)
    for num_steps in (40, 80, 160):
        grid = list(range(1000, 199, -800 // num_steps))
        error = solve(f, eps, grid, schedule, solver, space)[-1] - exact
        errors.append(error.square().mean().sqrt().item())
    assert all(abs(slope - order) < 0.15 for slope in slopes(errors)), errors


@pytest.mark.parametrize("config", [SD, DDPM, COSINE])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_signal_ode_trajectory_equals_ddims_at_every_step(config, solver, eps):
    schedule = new_schedule(config)
    f, grid = gaussian_denoiser(schedule, MU, S), schedule.grid(50)
    xs = solve(f, eps, grid, schedule, solver, space="x")
    ys = solve(f, eps, grid, schedule, solver, space="y", start=signal(eps, eps, 1000, schedule))
    for x, y, t in zip(xs, ys, grid):
        assert (add_noise(y, eps, t, schedule) - x).abs().max() < 1e-10


def test_zero_terminal_snr_has_the_same_trajectory_in_x_and_in_y(eps):
    """Where alpha_T = 0, x_T is noise alone and y_T the mean of the data, and both go where the closed form does."""
    schedule, errors = new_schedule(ZERO_SNR), []
    f = gaussian_denoiser(schedule, MU, S)
    for num_steps in (50, 100):
        grid = schedule.grid(num_steps)
        xs, ys = (solve(f, eps, grid, schedule, "heun", space) for space in "xy")
        assert all(torch.allclose(add_noise(y, eps, t, schedule), x, atol=1e-10) for x, y, t in zip(xs, ys, grid))
        errors.append((ys[-1] - gaussian_x(eps, 0, schedule)).abs().max().item())
    assert schedule.alpha(1000) == 0 and torch.equal(ys[0], torch.full_like(eps, MU)) and errors[1] < errors[0] / 1.9
    t = torch.full((16,), 1000)
    loss = bootstrap_loss(lambda eps, t: torch.full_like(eps, MU), f, eps, t, t - 100, schedule)
    assert loss.isfinite().all()


# -------------------------------------------------------------------------------------------------------- the losses
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_true_solution_has_bootstrap_loss_zero_to_the_discretisation_order(solver, order, schedule, f, eps):
    g, errors = gaussian_student(schedule), []
    t = torch.linspace(300, 1000, 16).long()
    for delta in (40, 20, 10):
        errors.append(bootstrap_loss(g, f, eps, t, t - delta, schedule, solver).mean().sqrt().item())
    assert errors[-1] < 0.02 and all(abs(slope - order) < 0.2 for slope in slopes(errors)), errors
    assert boundary_loss(g, f, eps, schedule).max() < 1e-24


def test_bootstrap_loss_has_no_gradient_through_its_target(schedule, f, eps):
    a, seen = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), []
    bootstrap_loss(lambda eps, t: seen.append(torch.is_grad_enabled()) or a * eps, f, eps, torch.full((16,), 500),
                   torch.full((16,), 460), schedule).sum().backward()
    assert seen == [False, True] and a.grad is not None


def test_conditions_reach_networks_untouched_and_a_student_its_input_time(schedule, eps):
    """Whatever they are called: the losses and the solver know none of them."""
    condition, seen, t = {"size": object(), "w": 2.0}, [], torch.full((16,), 500)

    def record(z, t, **condition):
        seen.append(condition)
        return z
    bootstrap_loss(record, record, eps, t, t - 40, schedule, "heun", **condition)
    boundary_loss(record, record, eps, schedule, **condition)
    solve(record, eps, schedule.grid(3), schedule, "heun", **condition)
    assert len(seen) == 12 and all(given == condition for given in seen)

    def network(x_i, i, t, **given):
        assert (i, t, given) == (400, 250, condition) and x_i.equal(schedule.sigma(400) * eps)
        return torch.zeros_like(x_i)
    g = student_signal(network, eps, 250, 400, schedule, **condition)
    assert torch.allclose(g, schedule.sigma(400) / schedule.alpha(400) * eps)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("boundary", [slice(0), slice(1, None, 4), slice(None)])
def test_both_losses_at_once_are_the_two(solver, boundary, schedule, f, eps):
    """Values, and gradients to a weight; each sample with its own condition."""
    weight, size = torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True), torch.arange(16.0)

    def teacher(x_t, t, size):
        return f(x_t, t) * append_dims(1 + size / 16, x_t)

    def student(eps, t, size):
        return weight[0] * eps * append_dims(t / 1000 + size, eps) + weight[1]
    t = torch.arange(250, 1001, 50)
    s = t - 250                                             # the first is the clean end
    together = boot_losses(student, teacher, eps, t, s, schedule, boundary, solver, size=size)
    plain = (bootstrap_loss(student, teacher, eps, t, s, schedule, solver, size=size),
             boundary_loss(student, teacher, eps[boundary], schedule, size=size[boundary]))
    gradients = [torch.autograd.grad(sum(loss.sum() for loss in pair), weight)[0] for pair in (together, plain)]
    assert len(together[1]) == len(eps[boundary])
    for ours, theirs in zip((*together, gradients[0]), (*plain, gradients[1])):
        assert torch.allclose(ours, theirs, rtol=1e-12)


def test_minimising_both_losses_finds_the_solution(schedule, f):
    """A student of free y_t = a_t + b_t * eps on a grid of times, trained by BOOT alone, ends where the Euler
    Signal-ODE does."""
    grid, rng = schedule.grid(20), torch.Generator().manual_seed(0)
    coefficients = torch.zeros(1001, 2, dtype=torch.float64, requires_grad=True)

    def student(eps, t):
        return append_dims(coefficients[t, 0], eps) + append_dims(coefficients[t, 1], eps) * eps
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
