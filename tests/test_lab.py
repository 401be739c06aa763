"""The laboratory's methods on a Gaussian teacher, whose denoiser and trajectories have closed forms.

- A method along the trajectory has nearly no loss for the exact student, and one for a student that is moved.
- A method of two denoisers leaves a student with the teacher's distribution alone, and draws another towards it.
- The critic's loss is least for the student's own best denoiser.
- Progressive distillation halves its steps and takes its student as the teacher.
- Network evaluations are counted as the page says: 1 forward, 2 more to the weights, 1 more to the sample alone.
- A killed table goes on with the rows that it lacks. In two dimensions the teacher is exact, and a picture is drawn.
- The teacher's frontier is measured once, and drawn with the methods.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import lab.__main__ as laboratory
from conftest import PROMPTS, gaussian_denoiser, new_schedule
from lab import frontier, loop, toy
from lab.methods import METHODS, SCORES
from plumbing.images import noise
from signal_ode import add_noise, append_dims, signal
from student import new_student
from tools.evaluate import Evaluation

MU, S = 0.7, 0.4                                            # the data: N(MU, S**2), every element
SCHEDULE = new_schedule()
BATCH, SHAPE = 256, (2, 4, 4)
EPS = noise([0, 1], (4, 8, 8))


def path_end(x_t, t):
    """Where the trajectory through x_t ends at t = 0."""
    alpha, sigma = append_dims(SCHEDULE.alpha(t), x_t), append_dims(SCHEDULE.sigma(t), x_t)
    return MU + (x_t - alpha * MU) * S / (alpha**2 * S**2 + sigma**2).sqrt()


def on_path(x_T, t):
    """The state at t of the trajectory that begins in x_T."""
    variance, variance_T = (SCHEDULE.alpha(u) ** 2 * S**2 + SCHEDULE.sigma(u) ** 2 for u in (t, SCHEDULE.T))
    offset = x_T - SCHEDULE.alpha(SCHEDULE.T) * MU
    return append_dims(SCHEDULE.alpha(t), x_T) * MU + append_dims((variance / variance_T).sqrt(), x_T) * offset


def new_lab(**parts):
    rng = torch.Generator().manual_seed(0)
    lab = SimpleNamespace(schedule=SCHEDULE, rng=rng, memory={}, step=0, share=0.9)
    lab.f = gaussian_denoiser(SCHEDULE, MU, S)
    lab.noise = lambda: torch.randn(BATCH, *SHAPE, generator=rng, dtype=torch.float64)
    lab.times = lambda: torch.randint(20, 981, (BATCH,), generator=rng)
    lab.limited, lab.empty, lab.scales = lab.f, lambda condition: condition, lambda w, t: w
    lab.update = lambda **losses: None
    vars(lab).update(parts)
    return lab


def exact_student(name, lab, shift):
    """g(eps, t) whose losses vanish, by the method; moved by a shift."""
    f_T = lab.f

    def g(eps, t, **condition):
        t = torch.as_tensor(t).expand(len(eps))
        start = eps if name == "regression" else add_noise(f_T(eps, SCHEDULE.T), eps, SCHEDULE.T, SCHEDULE)
        if name == "PID":
            start = SCHEDULE.sigma(SCHEDULE.T) * eps        # of signal zero
        y_t = signal(on_path(start, t), eps, t, SCHEDULE)
        if name == "PID":                                   # y_t is (1 - k / K) times what the network says
            y_t = y_t / append_dims(1 - (SCHEDULE.lam(t) - SCHEDULE.lam(SCHEDULE.T)).exp(), eps).clamp(min=1e-9)
        if name in ("BOOT, hard boundary", "FreeFlow's form"):
            c = append_dims(t / SCHEDULE.T, eps)
            y_t = (y_t - c * f_T(eps, SCHEDULE.T)) / (1 - c).clamp(min=1e-9)
        return y_t + shift
    return g


@pytest.mark.parametrize("name", ["regression", "consistency", "TBCM", "PID", "BOOT", "BOOT, hard boundary",
                                  "FreeFlow's form"])
def test_the_exact_student_has_nearly_no_loss(name):
    losses = []
    for shift in (0.0, 0.2):
        shift = torch.tensor(shift, dtype=torch.float64, requires_grad=True)
        lab = new_lab()
        lab.h = lab.f                                       # as good as the teacher's: nothing to match
        lab.g = exact_student(name, lab, shift)
        lab.D = lambda x_t, t, **condition: path_end(x_t, t) + shift * append_dims(t / SCHEDULE.T, x_t)
        losses.append(METHODS[name].losses(lab, lab.noise(), {})["student"].item())
    assert losses[0] < 0.2 * losses[1], losses              # what is left is the error of the solver


@pytest.mark.parametrize("name", [*SCORES, "TwinFlow without images", "BOOT, then matching"])
def test_a_student_is_drawn_to_the_teachers_distribution_and_stays_there(name):
    pulls = []
    for mean, std in ((MU, S), (0.4, S), (1.0, S)):
        m = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
        best = gaussian_denoiser(SCHEDULE, mean, std)
        lab = new_lab(g=lambda eps, t, **condition: m + std * eps, h=best, twin=best, step=1)
        eps = lab.noise()
        lab.memory["paths of 25"] = [({}, torch.stack([eps, MU + S * eps]), None)]
        losses = METHODS[name].losses(lab, lab.noise(), {})
        [gradient] = torch.autograd.grad(losses["student"], m)
        pulls.append(gradient.item())
    assert abs(pulls[0]) < 1e-6 and pulls[1] < -1e-3 and pulls[2] > 1e-3, pulls


def test_the_critic_learns_what_the_student_makes():
    losses = []
    for mean in (0.4, 0.3, 0.5):
        other = gaussian_denoiser(SCHEDULE, mean, S)
        lab = new_lab(g=lambda eps, t, **condition: 0.4 + S * eps, h=other)
        losses.append(METHODS["Diff-Instruct"].losses(lab, lab.noise(), {})["critic"].item())
    assert losses[0] < min(losses[1:])


def test_progressive_distillation_halves_its_steps():
    """A point mass is the case in which every number of steps has the same exact student."""
    lab, asked = new_lab(f=gaussian_denoiser(SCHEDULE, MU, 0.0)), []
    for share in (0.0, 0.2, 0.99):
        lab.share = share
        for shift in (0.0, 0.1):
            lab.D = lambda x_t, t, **condition: asked.append(t) or torch.full_like(x_t, MU + shift)
            lab.frozen_copy = lambda: lambda x_t, t, **condition: torch.full_like(x_t, MU)
            loss = METHODS["progressive"].losses(lab, lab.noise(), {})["student"].item()
            assert loss < 1e-9 if shift == 0 else loss > 1e-3
    assert lab.memory.keys() >= {"paths of 32", "paths of 16", "paths of 2", "teacher"}
    assert asked[-1].eq(SCHEDULE.T).all()


def test_evaluations_are_counted_and_networks_learn(tiny, monkeypatch):
    monkeypatch.setattr(loop, "BATCH", 4)
    before = new_student(tiny, loop.INPUT_TIME, loop.W).network.state_dict()
    sid, path = 3 + 2 * 2 + (1 + 1 + 2), 25 * 2             # x; f guided, and back to x; h, back to x and its weights
    counted = {                                             # of the first step, and of the second
        "BOOT": (9.25, 9.25), "SiD, a = 1": (sid, sid), "SiD-LSG": (sid + 4, sid + 4), "Diff-Instruct": (8, 8),
        "DMD2 without its GAN": (4 * 4 + 8,) * 2, "DMD": (8 + path + 3, 8 + 3), "PID": (2 * 3 + 2,) * 2,
        "SwiftBrush": (3 + 2 + 2 * 3,) * 2, "TwinFlow without images": (3 + 2 + 3,) * 2}
    for name, evaluations in counted.items():
        _, lab = loop.distil(METHODS[name], tiny, 1e-3, budget=4 * evaluations[0] + 1)
        assert lab.spent == 4 * sum(evaluations) and lab.step == 2, name
        moved = any(not p.equal(before[key]) for key, p in lab.average.state_dict().items())
        assert moved or name == "SwiftBrush"                # whose critic is the teacher still
        assert not any(p.requires_grad or p.grad_fn for p in lab.average.parameters())
    for name in ("consistency", "progressive"):
        image_of, lab = loop.distil(METHODS[name], tiny, 1e-5, budget=1)
        condition = tiny.encode(PROMPTS)
        assert image_of(EPS, **condition).allclose(tiny.denoise(EPS, 1000, **condition), atol=1e-4), name


def test_a_killed_table_goes_on(monkeypatch, tmp_path):
    made, path, table = [], tmp_path / "results.jsonl", laboratory.table
    trained = None, SimpleNamespace(g=None, spent=1, step=1)
    monkeypatch.setattr(laboratory, "RESULTS", path)
    monkeypatch.setattr(laboratory, "distil", lambda *args: made.append(args[2:]) or trained)
    figures = dict.fromkeys(laboratory.FIGURES, 1.0)
    monkeypatch.setattr(laboratory, "Evaluation", lambda *args: SimpleNamespace(measure=lambda *args: (figures, None)))
    monkeypatch.setattr(laboratory, "teacher_rows", lambda *args: (None, None, None))
    args = SimpleNamespace(seeds=[0, 1], device="cpu", limited=False, budget=80)
    laboratory.run(args, "BOOT")
    assert len(made) == 5 and [budget for *_, budget, _ in made] == [40, 40, 40, 80, 80]
    assert "| BOOT | 0.0005 | 2 | 1.0 (1.0 to 1.0) |" in table(80)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    laboratory.run(args, "BOOT")
    assert len(made) == 7


def test_the_teacher_in_two_dimensions_is_exact():
    """Tweedie: f = (x_t + sigma^2 * the gradient of log p(x_t)) / alpha, with p a mixture of Gaussians."""
    x_t = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for t in (20, 400, 1000):
        alpha, sigma = toy.SCHEDULE.alpha(t), toy.SCHEDULE.sigma(t)
        variance = (alpha * toy.STD) ** 2 + sigma**2
        distance = (x_t[:, None] - alpha * toy.MEANS).square().sum(2)
        log_p = (toy.WEIGHTS.log() - distance / (2 * variance)).logsumexp(1)
        [score] = torch.autograd.grad(log_p.sum(), x_t)
        assert torch.allclose(toy.teacher(x_t, t), ((x_t + sigma**2 * score) / alpha).float(), atol=1e-3)


def test_boot_in_two_dimensions_is_drawn(call, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(toy, "STEPS", 3)
    monkeypatch.setattr(toy, "MATCH_STEPS", 3)
    monkeypatch.setattr(toy, "HEAD_START", 1)
    code, _, error = call("lab.toy", "--out", tmp_path / "toy.png")
    assert code == 0 and Image.open(tmp_path / "toy.png").width > 1000, error


def test_the_frontier_is_measured_once_and_drawn(tiny, call, tmp_path, monkeypatch):
    """Of few images and in few steps. Two of the ten lines are the stored ones of the evaluation."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(frontier, "TEACHER", tmp_path / "teacher.jsonl")
    monkeypatch.setattr(frontier, "IMAGES", 100)
    monkeypatch.setattr(laboratory, "RESULTS", tmp_path / "results.jsonl")
    line = {"method": "BOOT", "limited": False, "rate": 5e-4, "budget": loop.BUDGET, "trial": False, "frechet": 60,
            "recall": 0.5}
    (tmp_path / "results.jsonl").write_text("".join(
        json.dumps(line | {"seed": seed, "align_seen": 0.9 + seed / 100}) + "\n" for seed in range(3)))
    scales, rows = [], {"frechet": 20.0, "precision": 0.9, "recall": 0.7, "align_seen": 0.9, "align_heldout": 0.9}
    monkeypatch.setattr(frontier, "teacher_rows", lambda *args: ({(3.0, 50): rows}, None, None))
    monkeypatch.setattr(frontier, "limited_rows", lambda *args: {(3.0, 50): rows})
    monkeypatch.setattr(Evaluation, "measure", lambda *args: (rows, None))
    monkeypatch.setattr(Evaluation, "ddim", lambda _, steps, w, limited: scales.append((steps, w, limited)))
    for _ in range(2):
        code, _, error = call("lab.frontier", "--measure", "--out", tmp_path / "frontier.png")
        assert code == 0 and Image.open(tmp_path / "frontier.png").width > 1000, error
    assert scales == [(50, w, limited) for limited in (True, False) for w in (1.5, 2.0, 4.0, 5.0)]
    assert len((tmp_path / "teacher.jsonl").read_text().splitlines()) == 10
