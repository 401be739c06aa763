"""Distribution matching on Gaussians, where the best denoiser of either distribution has a closed form."""

import pytest
import torch

from matching import critic_loss, limited_guidance, matching_loss
from signal_ode import Schedule, add_noise, append_dims, clean_prediction

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MU, S = 0.7, 0.4                                            # the teacher's pictures: N(MU, S**2), every element


def denoiser(schedule, mean, std):
    """The best clean prediction of x_t, where pictures are N(mean, std**2)."""
    def f(x_t, t, w=1.0):
        alpha_t, sigma_t = append_dims(schedule.alpha(t), x_t), append_dims(schedule.sigma(t), x_t)
        return mean + alpha_t * std**2 / (alpha_t**2 * std**2 + sigma_t**2) * (x_t - alpha_t * mean)
    return f


def draw(num, seed=0):
    """x (num, 4, 8, 8), n and tau, of a standard normal and of all times but the ends."""
    rng = torch.Generator().manual_seed(seed)
    x, n = torch.randn(2, num, 4, 8, 8, generator=rng, dtype=torch.float64)
    return x, n, torch.randint(20, 981, (num,), generator=rng)


@pytest.fixture
def schedule():
    return Schedule(SD)


def test_the_gradient_is_that_of_the_fisher_divergence_through_the_best_critic(schedule):
    """Of 1/2 || f - h ||^2, to m and s of a student m + s * eps, whose best critic has a closed form; through the place
    x_tau, too, if 1/2 || f - h ||^2 of the frozen critic is added, which is SiD's alpha of 1/2."""
    eps, n, _ = draw(20_000)
    tau = torch.full((len(eps),), 400)
    m, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.2, 0.9))
    x, teacher, best = m + s * eps, denoiser(schedule, MU, S), denoiser(schedule, m, s)
    frozen, x_tau = denoiser(schedule, m.detach(), s.detach()), add_noise(x, n, tau, schedule)

    def gradient(loss):
        return torch.stack(torch.autograd.grad(loss, (m, s), retain_graph=True))

    def divergence(critic, place):
        return 0.5 * (teacher(place, tau) - critic(place, tau)).square().mean()
    unit = (x - teacher(x_tau, tau)).detach().abs().mean()
    ours = unit * gradient(matching_loss(x, teacher, frozen, n, tau, schedule)[0].mean())
    for sum_of_ours, exact in ((ours, gradient(divergence(best, x_tau.detach()))),
                               (ours + gradient(divergence(frozen, x_tau)), gradient(divergence(best, x_tau)))):
        assert (sum_of_ours - exact).norm() < 0.02 * exact.norm()


def test_nothing_but_the_picture_has_a_gradient(schedule):
    x, n, tau = draw(2)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    network = lambda x_t, t, w=1.0: scale * x_t
    matching_loss(x.requires_grad_(), network, network, n, tau, schedule)[0].sum().backward()
    assert scale.grad is None and x.grad is not None


def test_a_student_whose_pictures_are_the_teachers_stays(schedule):
    x, n, tau = draw(8)
    x = (MU + S * x).requires_grad_()
    f = denoiser(schedule, MU, S)
    loss, _ = matching_loss(x, f, f, n, tau, schedule)
    loss.sum().backward()
    assert loss.eq(0).all() and x.grad.eq(0).all()


def test_a_pixel_beyond_those_of_a_picture_is_drawn_back(schedule):
    """The teacher's predictions are clipped, and the critic, which knows the student's pictures, is beyond them."""
    x, n, tau = draw(8)
    x, f = (1.3 + 0.01 * x).requires_grad_(), denoiser(schedule, MU, S)
    teacher = lambda x_t, t: f(x_t, t).clamp(-1, 1)
    [gradient] = torch.autograd.grad(
        matching_loss(x, teacher, denoiser(schedule, 1.3, 0.01), n, tau, schedule)[0].sum(), x)
    assert gradient.flatten(1).mean(1).min() > 0


def test_a_student_finds_the_teachers_mean_and_spread(schedule):
    """A student m + s * eps, and a critic of two numbers that learns what it makes: it comes where the teacher's
    pictures are, without one."""
    m, s, h_m, h_s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-0.5, 1.0, 0.0, 0.8))
    student = torch.optim.Adam([m, s], 0.02, betas=(0.0, 0.99))
    critic = torch.optim.Adam([h_m, h_s], 0.04, betas=(0.0, 0.99))
    for step in range(400):
        for optimizer in (student, critic):
            optimizer.param_groups[0]["lr"] *= 0.99
            optimizer.zero_grad()
        eps, n, tau = draw(16, step)
        x, critic_of = m + s * eps, denoiser(schedule, h_m, h_s)
        loss, h = matching_loss(x, denoiser(schedule, MU, S), critic_of, n, tau, schedule)
        loss.mean().backward()
        critic_loss(x.detach(), h, tau, schedule).mean().backward()
        student.step()
        critic.step()
    assert m.item() == pytest.approx(MU, abs=0.02) and s.item() == pytest.approx(S, abs=0.02)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_critics_loss_is_that_of_the_networks_own_output(prediction):
    schedule = Schedule(SD | {"prediction_type": prediction})
    x, n, tau = draw(6)
    out = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = clean_prediction(out, add_noise(x, n, tau, schedule), tau, schedule)
    alpha, sigma = append_dims(schedule.alpha(tau), x), append_dims(schedule.sigma(tau), x)
    aim = {"epsilon": n, "v_prediction": alpha * n - sigma * x, "sample": x}[prediction]
    loss = critic_loss(x, h, tau, schedule)
    assert torch.allclose(loss, (out - aim).square().flatten(1).mean(1), rtol=1e-8)


def test_the_critics_loss_is_least_for_the_best_denoiser(schedule):
    x, n, tau = draw(1000)
    x = MU + S * x
    x_tau = add_noise(x, n, tau, schedule)
    loss = [critic_loss(x, denoiser(schedule, m, s)(x_tau, tau), tau, schedule).mean()
            for m, s in ((MU, S), (MU + 0.05, S), (MU - 0.05, S), (MU, 1.1 * S), (MU, 0.9 * S))]
    assert min(loss) == loss[0]


def test_guidance_is_limited_to_the_less_noisy_times():
    w, tau = torch.tensor([3.0, 3.0, 7.0, 7.0, 1.0]), torch.tensor([700, 701, 1, 1000, 5])
    told = lambda x_t, t, w, label: (w, label)
    guided, label = limited_guidance(told, None, tau, 0.75, 700, w=w, label=2)
    assert guided.tolist() == [2.5, 1.0, 5.5, 1.0, 1.0] and label == 2
    assert limited_guidance(told, None, tau, 0.75, 700, label=2) == (1.0, 2)    # spares the unconditional pass
    assert limited_guidance(told, None, tau, 0.75, 700, w=3.0, label=2)[0].tolist() == [2.5, 1.0, 2.5, 1.0, 2.5]


def test_the_critics_graph_is_still_there_for_its_own_loss(schedule):
    """Its gradient is that of a critic that is asked again. Where the teacher is clipped, h is too, half as far again,
    but for L_M alone."""
    x, n, tau = draw(8)
    spread = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    critic = denoiser(schedule, 2.0, spread)
    loss, h = matching_loss(x.requires_grad_(), denoiser(schedule, MU, S), critic, n, tau, schedule, clip=1.0)
    loss.sum().backward()
    clipped = lambda x_t, t: critic(x_t, t).clamp(-1.5, 1.5)
    assert torch.equal(loss, matching_loss(x, denoiser(schedule, MU, S), clipped, n, tau, schedule)[0])
    again = critic(add_noise(x.detach(), n, tau, schedule), tau)
    assert torch.equal(h, again) and h.max() > 1.5 and spread.grad is None
    found = [torch.autograd.grad(critic_loss(x.detach(), z, tau, schedule).sum(), spread)[0] for z in (h, again)]
    assert torch.allclose(*found, rtol=1e-12)
