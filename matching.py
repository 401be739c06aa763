"""Distribution matching, beyond the paper: pictures as sharp and as varied as the teacher's, still without an image.

Regression on a trajectory averages what the student cannot tell apart, and blurs. So that its pictures as a whole have
the teacher's distribution, noise them, and compare two denoisers there: the teacher, which pulls towards its own
pictures, and a critic, a second copy of the teacher that learns all along to denoise the student's pictures, and pulls
towards those. Where they disagree, the student has too many pictures or too few.

    x           the student's picture g(eps, 0); latents, where there is a VAE
    n, tau      fresh Gaussian noise, not eps, and a time; x_tau = alpha_tau * x + sigma_tau * n
    f           the teacher's guided clean prediction f_w(x_tau, tau)
    h           the critic's clean prediction h(x_tau, tau), without guidance

How far they disagree, || f - h ||^2, is on average, up to a factor, the Fisher divergence of the noisy distributions,
where the critic is right. It changes with the student because the critic follows the student, and that cannot be had by
backpropagation. But (f - h) . (h - x) is zero on average for every student with its own best critic; so its gradient,
with the critic's weights as they are, is that of 1/2 || f - h ||^2 through the best critic (SiD's identity). The other
part of that gradient, through the place x_tau, is left out: SiD's alpha is 1, as there.

Sources: Diff-Instruct (Luo et al. 2023, arXiv 2305.18455) and SwiftBrush (Nguyen & Tran 2024, 2312.05239) for the idea,
SiD (Zhou et al. 2024, 2404.04057, eq. 23 with alpha = 1) for the loss, DMD (Yin et al. 2024, 2311.18828) for its scale,
FreeFlow (2511.19428) for doing so beside a path that is learned from noise alone. Arguments and shapes as in
signal_ode.py; pure functions of tensors and of callables.
"""

import torch

from signal_ode import like, noisy

def matching_loss(x, teacher, critic, n, tau, schedule, clip=None, **condition):
    """L_M of each sample, (B,), and h with its graph, for critic_loss. L_M's gradient is that of (f - h) . (h - x),
    also through f and h, in units of the teacher's own error |x - f|; it reaches x alone. Its value, to be logged, is
    || f - h ||^2 in those units.
    teacher, critic: callables (x_t, t, **condition). clip: the bound of the teacher's predictions, if they have one; in
    L_M those of the critic have it half as far again: what the student paints beyond has to show, and not the network's
    error, an epsilon's times 100."""
    leaf = x.detach().requires_grad_()                      # so that no weight has a gradient but the student's
    x_tau = noisy(leaf, n, tau, schedule)
    f, whole_h = teacher(x_tau, tau, **condition), critic(x_tau, tau, **condition)
    h = whole_h if clip is None else whole_h.clamp(-1.5 * clip, 1.5 * clip)
    unit = like((leaf - f).detach().abs().flatten(1).mean(1).clamp(min=1e-6), x)
    product = ((f - h) * (h - leaf) / unit).sum()           # not the mean, whose gradient would underflow in fp16
    with torch.autocast(x.device.type, enabled=False):      # a backward pass has the types of its forward pass
        [gradient] = torch.autograd.grad(product, leaf, retain_graph=True)      # h's; f's goes with f
    divergence = ((f - h).square() / unit).detach()
    return (divergence + gradient * (x - x.detach())).flatten(1).mean(1), whole_h

def critic_loss(x, h, tau, schedule):
    """L_C of each sample, (B,): || h(x_tau, tau) - x ||^2 in units of the network's own output, epsilon, v or sample,
    as the teacher was trained. x: the student's pictures, without gradient; h: the critic's predictions."""
    alpha, sigma = schedule.alpha(tau), schedule.sigma(tau)
    unit = {"epsilon": (alpha / sigma) ** 2, "v_prediction": 1 / sigma**2, "sample": torch.ones_like(sigma)}
    error = (h - x).square().flatten(1).mean(1)
    return like(unit[schedule.prediction], error) * error

def limited_guidance(denoise, x_t, t, share, until, w=1.0, **condition):
    """f(x_t, t) of a denoiser with less guidance than w, 1 + share * (w - 1), up to the time `until`, and with none at
    noisier ones, where it costs variety (Kynkaanniemi et al. 2024, 2404.07724). t: (B,). w: (B,) or a number."""
    if torch.is_tensor(w) or w != 1:                        # a number 1 needs no unconditional pass
        w = torch.where(t <= until, 1 + share * (w - 1), 1.0)
    return denoise(x_t, t, w=w, **condition)
