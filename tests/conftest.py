"""What the tests share: the repository on the path, teachers and their copies, a closed form, commands run as by a
person, a hub on this machine."""

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")              # before torch is imported: threads would wait for each other

import pytest
import torch
from fake_hub import hub_on

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tiny"
CHECKPOINTS = ROOT / "tests" / "checkpoints"                # published configs, manifests, tokenizers
sys.path.insert(0, str(ROOT))
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    HUB_PORT = free.getsockname()[1]
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{HUB_PORT}"  # read at import: no test ever asks the real hub
os.environ.pop("HF_HUB_OFFLINE", None)
WITH_GPU = dict(os.environ)                                 # for tests of a GPU; the others compare bits, on a CPU
os.environ["CUDA_VISIBLE_DEVICES"] = ""

PROMPTS = ["a red ankle boot on a yellow background", "a blue coat on a white background"]
# Schedules, as their configs have them
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DDPM = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def new_schedule(config=SD, **change):
    """The Schedule of a published config."""
    from plumbing.configs import read_schedule
    from signal_ode import Schedule
    return Schedule(*read_schedule(config | change))


def gaussian_denoiser(schedule, mean, std):
    """The best clean prediction of x_t, where samples are N(mean, std**2) in every element."""
    from signal_ode import append_dims

    def f(x_t, t, w=1.0):
        alpha_t, sigma_t = append_dims(schedule.alpha(t), x_t), append_dims(schedule.sigma(t), x_t)
        return mean + alpha_t * std**2 / (alpha_t**2 * std**2 + sigma_t**2) * (x_t - alpha_t * mean)
    return f


def slow(*values):
    """The values of a test that is marked as slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def schedule():
    return new_schedule()


# ------------------------------------------------------------------------------------------------- teachers, folders
@pytest.fixture(scope="session")
def tiny():
    from teacher import load_teacher
    return load_teacher("tiny")


def copy_tiny(folder, part=""):
    """A copy of the embedded teacher, or with the part "pixel" of the one of pixels, without what is not its own."""
    others = shutil.ignore_patterns("student", "decoder", "evaluation", "judge", "pixel", "*.png", "*.md")
    return shutil.copytree(TINY / part, folder, ignore=others)


@pytest.fixture
def copy(tmp_path):
    """A private copy of the embedded teacher."""
    return copy_tiny(tmp_path / "teacher")


def edit(path, **changes):
    """Change keys of a JSON file, or write one of these keys where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(old | changes), encoding="utf-8")


def shaken(module):
    """Random weights everywhere: zero-initialised layers and unit norms would hide errors."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return module.eval().requires_grad_(False)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that has the embedded teacher as somebody/tiny, with files that nobody needs, and an empty cache."""
    import huggingface_hub.constants as constants
    server = hub_on(HUB_PORT)
    folder = copy_tiny(tmp_path / "repo")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"too much")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    server.repos, server.fail, server.seen = {"somebody/tiny": folder}, {}, []
    monkeypatch.setattr("time.sleep", lambda _: None)       # the client's pauses between attempts
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return server


# ---------------------------------------------------------------------------------------------------------- commands
@pytest.fixture(scope="session")
def run():
    """Run `python ARGS` in the repository; returns the finished process, stdout and stderr as text."""
    def run(*args, timeout=120):
        return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                              timeout=timeout, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    return run


@pytest.fixture
def call(monkeypatch, capsys):
    """The same in this process, sparing torch's import: call("train", ...) -> (exit code, stdout, stderr)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.chdir(ROOT)

    def call(name, *args):
        from plumbing.files import command
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        try:
            command(importlib.import_module(name).main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)
