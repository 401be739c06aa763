"""What the tests share: the repository on the path, the embedded teacher once, and commands run as a person runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def tiny():
    from teacher import load_teacher
    return load_teacher("tiny")


@pytest.fixture(scope="session")
def run():
    """Run `python ARGS` in the repository; returns the finished process, stdout and stderr as text."""
    def run(*args, timeout=120):
        return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                              env={**os.environ, "PYTHONUNBUFFERED": "1"})
    return run
