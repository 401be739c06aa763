"""A GPU makes what the CPU makes, and its training resumes: tools/gpu.py, where there is one, and in small without."""

import subprocess
import sys

import pytest

from plumbing.files import read_json
from conftest import ROOT, WITH_GPU


def measure(out, *options):
    """The figures of `python -m tools.gpu`."""
    done = subprocess.run([sys.executable, "-m", "tools.gpu", "--out", str(out), *options], cwd=ROOT, env=WITH_GPU,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return read_json(out / "gpu.json")


def test_the_tool_measures_and_a_killed_run_resumes_bitwise(tmp_path):
    found = measure(tmp_path, "--device", "cpu", "--precisions", "fp32", "--micro-batches", "4", "--steps", "8",
                    "--repeat", "1")
    assert {part: len(rows) for part, rows in found.items() if part != "device"} == {
        "agreement": 1, "passes": 2, "training": 1, "resume": 1}
    assert found["agreement"][0]["prediction"] == 0 and found["passes"][0]["TFLOP/s"] > 0
    assert found["training"][0]["matched"] > 0
    assert found["resume"][0]["killed after step"] == 12 and found["resume"][0]["differ"] == 0


def test_a_gpu_agrees_with_the_cpu_and_resumes(tmp_path):
    look = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    if subprocess.run(look, env=WITH_GPU).returncode:
        pytest.skip("there is no GPU")
    found = measure(tmp_path, "--parts", "agreement", "resume")
    error = {row["precision"]: row["prediction"] for row in found["agreement"]}
    assert error["fp32"] < 1e-4 and error["fp16"] < 0.01 and error["bf16"] < 0.1
    assert all(row["killed after step"] == 12 for row in found["resume"])
    differ = {row["precision"]: row["by at most"] for row in found["resume"]}
    assert differ["bf16"] == differ["fp16"] == 0 and differ["fp32"] < 1e-4
