"""On a GPU; without one these tests are skipped.

- The teacher's clean predictions are the CPU's in every precision.
- A run that is killed and resumed is bitwise the undisturbed one in half precision. In fp32 it need not be, because
  cuDNN adds in no fixed order.
"""

import subprocess
import sys

import pytest
from conftest import ROOT, WITH_GPU

from plumbing.files import read_json

ALLOWED = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.1}         # ||a - b|| / ||b||


@pytest.fixture(scope="module")
def run_on_gpu():
    """Run `python -m ARGS` where a GPU can be seen, or skip; returns what it prints."""
    def run(*args):
        done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, env=WITH_GPU, capture_output=True, text=True,
                              timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout
    if run("-c", "import torch; print(torch.cuda.is_available())").strip() == "False":
        pytest.skip("there is no GPU")
    return run


def test_a_gpu_agrees_with_the_cpu(run_on_gpu, tmp_path):
    run_on_gpu("-m", "dev.bench", "--agreement", "--json", tmp_path / "agreement.json")
    for precision, row in read_json(tmp_path / "agreement.json").items():
        assert row["prediction"] < ALLOWED[precision], precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_killed_run_resumes_bitwise(run_on_gpu, tmp_path, precision):
    text = run_on_gpu("-m", "dev.kill", "--kills", 2, "--out", tmp_path, "--", "--precision", precision)
    assert "every state was bitwise the undisturbed one" in text
