"""Distribution matching, beyond the paper: samples as sharp and as varied as the teacher's, still without an image.

Regression on a trajectory averages what the student cannot tell apart, and its samples blur. Matching compares all of
the student's samples with all of the teacher's: both are noised, and two denoisers are asked for the clean sample. One
is the teacher, which pulls towards its own samples. The other is the critic (the "fake score network" of DMD and SiD),
a copy of the teacher that learns all along to denoise the student's samples. Where the two denoisers disagree, the
student makes too much or too little of something.

    x           the student's sample g(eps, 0); a latent, where there is a VAE
    n, tau      fresh Gaussian noise, not eps, and a time
    x_tau       alpha_tau * x + sigma_tau * n
    f           the teacher's clean prediction f(x_tau, tau), guided where limited_guidance says
    h           the critic's clean prediction h(x_tau, tau), never guided
    u . v       the mean of the products over a sample's elements; || u ||^2 is u . u

The mean of || f - h ||^2 is, up to a factor, the Fisher divergence between the two noised distributions, provided that
the critic is right. It depends on the student twice: through x_tau, and through the critic, which follows the student.
A backward pass of || f - h ||^2 at a fixed critic lacks the gradient through the critic, because we cannot
differentiate through the critic's training. SiD's identity supplies it. The mean of (f - h) . (h - x) is zero for every
student with its own best critic, so its whole gradient is zero. Its gradient through the critic is minus half of the
lacking one; hence its gradient at a fixed critic is half of the lacking one. SiD's loss therefore adds the two terms,
weighted by a number a, as published 1 or 1.2 (it is called alpha there):

    L = (1 - a) * || f - h ||^2 + (f - h) . (h - x)

With a = 1/2, L has half of the exact gradient. We take a = 1.2 (A in the code), the larger of the two published ones:
in a short run the student then has more variety than with a = 1, which drops the first term. In a long run a = 1 is a
little better (docs/results.md).

The idea is that of Diff-Instruct (Luo et al. 2023, arXiv 2305.18455) and SwiftBrush (Nguyen & Tran 2024, 2312.05239).
The loss is SiD's (Zhou et al. 2024, 2404.04057, eq. 23), and its scale is DMD's (Yin et al. 2024, 2311.18828). FreeFlow
(2511.19428), too, adds matching to a trajectory that is learned without data. Limited guidance is from Kynkaanniemi et
al. 2024 (2404.07724). Arguments and shapes are those of signal_ode.py.
"""

import torch

from signal_ode import add_noise, append_dims, mean_square

A = 1.2                     # SiD's a
LEAST_SIGNAL = 0.288        # the teacher is guided where alpha_tau is at least this: up to 0.7 T for SD, 0.5 T for DDPM


def identity_loss(x, f, h):
    """SiD's loss, divided by the teacher's mean absolute error on x. Its mean over a sample's elements is L_M:

        L_M = [ (1 - A) * || f - h ||^2 + (f - h) . (h - x) ] / stopgrad[ mean |x - f| ]

    Here it is of each element, (B, ...). The identity needs a divisor that depends on x_tau alone. Ours depends on x as
    well, so it holds only nearly."""
    return ((1 - A) * (f - h).square() + (f - h) * (h - x)) / error_unit(x, f)


def error_unit(x, f):
    """mean |x - f| of each sample, without gradient, with the dimensions to divide samples (B, ...)."""
    return append_dims((x - f).detach().abs().flatten(1).mean(1).clamp(min=1e-6), x)


def critic_loss(x, h, tau, schedule):
    """L_C of each sample, (B,): || h(x_tau, tau) - x ||^2, in units of the network's own output, epsilon, v or sample,
    as the teacher was trained. `x`: the student's samples, without gradient. `h`: the critic's predictions of them."""
    alpha, sigma = schedule.alpha(tau), schedule.sigma(tau)
    unit = {"epsilon": (alpha / sigma) ** 2, "v_prediction": 1 / sigma**2, "sample": torch.ones_like(sigma)}
    error = mean_square(h - x)
    return append_dims(unit[schedule.prediction], error) * error


def limited_guidance(denoise, x_t, t, schedule, w=1.0, **condition):
    """f(x_t, t) of a denoiser, guided by w where alpha_t >= LEAST_SIGNAL and not at all at noisier times, at which
    guidance costs variety. `t`: int or (B,). `w`: (B,) or a number."""
    if torch.is_tensor(w) or w != 1:                        # the number 1 needs no unconditional pass
        w = torch.where(schedule.alpha(t) >= LEAST_SIGNAL, w, 1.0)
    return denoise(x_t, t, w=w, **condition)


# --------------------------------------------------------------------------------- L_M, with a gradient to x alone
def matching_loss(x, teacher, critic, n, tau, schedule, clip=None, **condition):
    """(L_M, h). L_M, (B,), stands in for the mean of identity_loss over each sample x: it has the same gradient at x,
    and none elsewhere. A plain backward pass of identity_loss would also reach the critic's weights. So the gradient at
    x is taken here, once, and handed on to x. As a value, L_M has || f - h ||^2 over the same divisor, which is what
    the log shows. h keeps its graph, for critic_loss.
    `teacher`, `critic`: callables (x_t, t, **condition); guiding the teacher is its own affair (limited_guidance).
    `clip`: the bound of the teacher's predictions, or None. If there is one, h is clamped here at 1.5 * clip. This
    bound is wider, so that h can follow a pixel of x beyond clip, and f - h draws it back. There is a bound at all
    because an epsilon network's error is multiplied by sigma_tau / alpha_tau in h, which is up to 129 for DDPM."""
    leaf = x.detach().requires_grad_()
    x_tau = add_noise(leaf, n, tau, schedule)
    f, h = teacher(x_tau, tau, **condition), critic(x_tau, tau, **condition)
    clamped = h if clip is None else h.clamp(-1.5 * clip, 1.5 * clip)
    product = identity_loss(leaf, f, clamped).sum()                 # the mean is in the last line; here it underflows
    with torch.autocast(x.device.type, enabled=False):              # backward passes run outside autocast
        [gradient] = torch.autograd.grad(product, leaf, retain_graph=True)
    divergence = ((f - clamped).square() / error_unit(leaf, f)).detach()
    return (divergence + gradient * (x - x.detach())).flatten(1).mean(1), h
