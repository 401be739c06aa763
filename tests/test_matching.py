"""Distribution matching on Gaussians, where the best denoiser of either distribution has a closed form.

- matching_loss's gradient at x is that of the plain identity_loss, and it reaches nothing but x.
- It is the gradient of the Fisher divergence through the best critic, which is SiD's identity.
- A student whose samples are the teacher's stays; another finds the teacher's mean and spread, without a sample of it.
- A pixel beyond the bound of the teacher's predictions is drawn back.
- The critic's loss is that of the network's own output, and its graph survives L_M.
- Guidance is limited to alpha_t >= LEAST_SIGNAL: t <= 0.7 T of Stable Diffusion, half of T of DDPM.
"""

import pytest
import torch

from conftest import DDPM, SD, gaussian_denoiser, new_schedule
from matching import A, LEAST_SIGNAL, critic_loss, identity_loss, limited_guidance, matching_loss
from signal_ode import add_noise, append_dims, clean_prediction

MU, S = 0.7, 0.4                                            # the teacher's samples: N(MU, S**2), every element


def draw(num, seed=0):
    """x (num, 4, 8, 8), n and tau, of a standard normal and of all times but the ends."""
    rng = torch.Generator().manual_seed(seed)
    x, n = torch.randn(2, num, 4, 8, 8, generator=rng, dtype=torch.float64)
    return x, n, torch.randint(20, 981, (num,), generator=rng)


def parameters(*values):
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


@pytest.fixture
def teacher(schedule):
    return gaussian_denoiser(schedule, MU, S)


# ------------------------------------------------------------------------------------------------------ the gradient
@pytest.mark.parametrize("clip", [None, 0.8])
def test_the_gradient_at_x_is_that_of_the_plain_identity(schedule, teacher, clip):
    """Through x itself and through the place x_tau, where each network is asked. With a bound, the critic is clamped
    half as far again."""
    x, n, tau = draw(8)
    x.requires_grad_()
    critic = gaussian_denoiser(schedule, 0.4, 0.9)
    loss, h = matching_loss(x, teacher, critic, n, tau, schedule, clip)
    x_tau = add_noise(x, n, tau, schedule)
    bounded = critic(x_tau, tau) if clip is None else critic(x_tau, tau).clamp(-1.5 * clip, 1.5 * clip)
    plain = identity_loss(x, teacher(x_tau, tau), bounded).flatten(1).mean(1)
    found = [torch.autograd.grad(z.sum(), x)[0] for z in (loss, plain)]
    assert torch.allclose(*found, rtol=1e-9, atol=1e-15) and found[0].abs().max() > 1e-4
    assert torch.equal(h, critic(x_tau, tau)) and (clip is None or not torch.equal(h, bounded))


def test_the_gradient_is_that_of_the_fisher_divergence_through_the_best_critic(schedule, teacher):
    """Of D = 1/2 || f - h ||^2, to m and s of a student m + s * eps, whose best critic has a closed form. Through the
    critic alone, if 2 (A - 1) times D of the frozen critic is added; with D once more, through the place x_tau, too.
    Then all is as in SiD with a of 1/2."""
    eps, n, _ = draw(20_000)
    tau = torch.full((len(eps),), 400)
    m, s = parameters(0.2, 0.9)
    x, best = m + s * eps, gaussian_denoiser(schedule, m, s)
    frozen, x_tau = gaussian_denoiser(schedule, m.detach(), s.detach()), add_noise(x, n, tau, schedule)

    def gradient(loss):
        return torch.stack(torch.autograd.grad(loss, (m, s), retain_graph=True))

    def divergence(critic, place):
        return 0.5 * (teacher(place, tau) - critic(place, tau)).square().mean()
    unit = (x - teacher(x_tau, tau)).detach().abs().mean()
    ours = unit * gradient(matching_loss(x, teacher, frozen, n, tau, schedule)[0].mean())
    through_place = gradient(divergence(frozen, x_tau))
    ours = ours + 2 * (A - 1) * through_place
    for sum_of_ours, exact in ((ours, gradient(divergence(best, x_tau.detach()))),
                               (ours + through_place, gradient(divergence(best, x_tau)))):
        assert (sum_of_ours - exact).norm() < 0.02 * exact.norm()


def test_a_student_whose_samples_are_the_teachers_stays(schedule, teacher):
    x, n, tau = draw(8)
    x = (MU + S * x).requires_grad_()
    loss, _ = matching_loss(x, teacher, teacher, n, tau, schedule)
    loss.sum().backward()
    assert loss.eq(0).all() and x.grad.eq(0).all()


def test_a_pixel_beyond_those_of_an_image_is_drawn_back(schedule, teacher):
    """The teacher's predictions are clipped, and the critic, which knows the student's samples, is beyond them."""
    x, n, tau = draw(8)
    x = (1.3 + 0.01 * x).requires_grad_()
    loss, _ = matching_loss(x, lambda x_t, t: teacher(x_t, t).clamp(-1, 1), gaussian_denoiser(schedule, 1.3, 0.01), n,
                            tau, schedule)
    [gradient] = torch.autograd.grad(loss.sum(), x)
    assert gradient.flatten(1).mean(1).min() > 0


def test_a_student_finds_the_teachers_mean_and_spread(schedule, teacher):
    """A student m + s * eps, and a critic of two numbers that learns what it makes."""
    m, s, h_m, h_s = parameters(-0.5, 1.0, 0.0, 0.8)
    student = torch.optim.Adam([m, s], 0.02, betas=(0.0, 0.99))
    critic = torch.optim.Adam([h_m, h_s], 0.04, betas=(0.0, 0.99))
    for step in range(400):
        for optimizer in (student, critic):
            optimizer.param_groups[0]["lr"] *= 0.99
            optimizer.zero_grad()
        eps, n, tau = draw(16, step)
        x = m + s * eps
        loss, h = matching_loss(x, teacher, gaussian_denoiser(schedule, h_m, h_s), n, tau, schedule)
        loss.mean().backward()
        critic_loss(x.detach(), h, tau, schedule).mean().backward()
        student.step()
        critic.step()
    assert m.item() == pytest.approx(MU, abs=0.02) and s.item() == pytest.approx(S, abs=0.02)


# -------------------------------------------------------------------------------------------------------- the critic
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_critics_loss_is_that_of_the_networks_own_output(prediction):
    schedule = new_schedule(prediction_type=prediction)
    x, n, tau = draw(6)
    out = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = clean_prediction(out, add_noise(x, n, tau, schedule), tau, schedule)
    alpha, sigma = append_dims(schedule.alpha(tau), x), append_dims(schedule.sigma(tau), x)
    aim = {"epsilon": n, "v_prediction": alpha * n - sigma * x, "sample": x}[prediction]
    loss = critic_loss(x, h, tau, schedule)
    assert torch.allclose(loss, (out - aim).square().flatten(1).mean(1), rtol=1e-8)


def test_l_m_reaches_no_weight_and_leaves_the_critics_graph_for_its_own_loss(schedule):
    """The critic's gradient is that of a critic that is asked again, unclamped."""
    x, n, tau = draw(8)
    mean, spread = parameters(MU, 0.9)
    teacher, critic = gaussian_denoiser(schedule, mean, S), gaussian_denoiser(schedule, 2.0, spread)
    loss, h = matching_loss(x.requires_grad_(), teacher, critic, n, tau, schedule, clip=1.0)
    loss.sum().backward()
    assert mean.grad is None and spread.grad is None and x.grad is not None
    again = critic(add_noise(x.detach(), n, tau, schedule), tau)
    assert torch.equal(h, again) and h.max() > 1.5
    found = [torch.autograd.grad(critic_loss(x.detach(), z, tau, schedule).sum(), spread)[0] for z in (h, again)]
    assert torch.allclose(*found, rtol=1e-12)


# ------------------------------------------------------------------------------------------------------ the guidance
@pytest.mark.parametrize("config, last", [(SD, 700), (DDPM, 494)])
def test_guidance_is_limited_to_the_less_noisy_times(config, last):
    """The rule before was t <= 700, of Stable Diffusion's schedule; half of T is what suited DDPM's."""
    schedule, t = new_schedule(config), torch.arange(1, 1001)

    def told(x_t, t, w, label):
        assert label == 2
        return w
    assert torch.equal(schedule.alpha(t) >= LEAST_SIGNAL, t <= last)
    for w in (3.0, 2 + t % 7):
        guided = limited_guidance(told, None, t, schedule, w, label=2)
        assert torch.equal(guided, torch.where(t <= last, w, 1))
        assert limited_guidance(told, None, last + 1, schedule, 3.0, label=2) == 1
    assert limited_guidance(told, None, t, schedule, label=2) == 1.0        # a number, which spares the unguided pass
