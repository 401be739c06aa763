"""What the tests share: the repository on the path, one embedded teacher, commands run as by a person."""

import importlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKPOINTS = ROOT / "tests" / "checkpoints"                # published configs, manifests, tokenizers
sys.path.insert(0, str(ROOT))
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    HUB_PORT = free.getsockname()[1]
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{HUB_PORT}"  # read at import: no test ever asks the real hub
os.environ.pop("HF_HUB_OFFLINE", None)
WITH_GPU = dict(os.environ)                                 # for test_gpu.py; the others compare bits, on a CPU
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def tiny():
    from teacher import load_teacher
    return load_teacher("tiny")


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
