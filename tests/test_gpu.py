"""A GPU makes what the CPU makes, and its training resumes: tools/gpu.py, where there is one, and in small without."""

import os
import subprocess
import sys

import pytest

from checkpoint import read_json
from conftest import GPUS, ROOT

ENV = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
ENV |= {} if GPUS is None else {"CUDA_VISIBLE_DEVICES": GPUS}


def measure(out, *options):
    """The figures of `python -m tools.gpu`."""
    done = subprocess.run([sys.executable, "-m", "tools.gpu", "--out", str(out), *options], cwd=ROOT, env=ENV,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return read_json(out / "gpu.json")


def has_gpu():
    seen = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(seen, env=ENV).returncode == 0


def test_the_tool_measures_and_a_killed_run_resumes_bitwise(tmp_path):
    found = measure(tmp_path, "--device", "cpu", "--precisions", "fp32", "--micro-batches", "4", "2", "--steps", "8",
                    "--repeat", "1")
    assert [row["precision"] for row in found["agreement"]] == ["fp32", "bf16", "fp16"]
    assert found["agreement"][0]["prediction"] == 0 and found["agreement"][2]["prediction"] < 0.02
    for part in ("passes", "training"):
        assert {row["micro-batch"] for row in found[part]} == {2, 4}
    assert all(row["TFLOP/s"] > 0 for row in found["passes"]) and all(row["matched"] > 0 for row in found["training"])
    [row] = found["resume"]
    assert row["killed after step"] == "12" and row["differ"] == 0


@pytest.mark.skipif(not has_gpu(), reason="there is no GPU")
def test_a_gpu_agrees_with_the_cpu_and_resumes(tmp_path):
    found = measure(tmp_path, "--parts", "agreement", "resume")
    error = {row["precision"]: row["prediction"] for row in found["agreement"]}
    assert error["fp32"] < 1e-4 and error["fp16"] < 0.01 and error["bf16"] < 0.1
    differ = {row["precision"]: row["by at most"] for row in found["resume"]}
    assert differ["bf16"] == differ["fp16"] == 0 and differ["fp32"] < 1e-4
