"""The benchmarks run where there is no GPU, say what they did not run, and their rows carry what a row must."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


def run(script: str, *arguments: str | Path) -> str:
    done = subprocess.run([sys.executable, BENCHMARKS / script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    assert {"hardware", "versions", "commit", "rows"} <= set(document)
    return document


@pytest.mark.usefixtures("native_library")
def test_kernels_on_a_cpu(tmp_path) -> None:
    path = tmp_path / "kernels.json"
    run("bench_kernels.py", "--only", "rope", "--budget", "0.001", "--threads", "1", "--json", path)
    rows = load(path)["rows"]
    assert {(row["size"], row["dtype"]) for row in rows} >= {(1, "f32"), (512, "bf16")}
    assert all(row["wrong"] == "" and row["native_us"] > 0 and row["torch_ratio"] > 0 for row in rows)
    if importlib.util.find_spec("matplotlib") is not None:
        run("plots.py", path)
        assert (tmp_path / "kernels_ratio.svg").exists() and (tmp_path / "kernels_roofline.svg").exists()


@pytest.mark.usefixtures("native_library")
def test_a_wrong_kernel_is_not_timed() -> None:
    code = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); sys.argv = ["bench", "--only", "linear", "--dtype", "f32"]
import bench_kernels
from hybrid_moe_kernels.linear import native
right = native.project
native.project = lambda *args: [1.001 * y for y in right(*args)]
sys.exit(bench_kernels.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1 and "WRONG: result 0 is off by" in done.stdout, done.stdout + done.stderr


def test_kernels_of_a_gpu_without_one(tmp_path) -> None:
    if list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there is a GPU")
    run("bench_kernels_gpu.py", "--json", tmp_path / "gpu.json")
    rows = load(tmp_path / "gpu.json")["rows"]
    assert rows and all(row["not_run"] == "not run: no CUDA device" for row in rows)
    run("plots.py", tmp_path / "gpu.json")
    assert not list(tmp_path.glob("*.svg"))
