"""The one-file reproducer keeps its promises: small, alone, hangs by itself, names itself, and passes when fixed."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "repro" / "ep_deadlock.py"


def torchrun(tmp_path, num_ranks, *flags):
    """Run a copy of the file from an empty folder, as someone does who was sent it."""
    shutil.copy(SOURCE, tmp_path / "ep_deadlock.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return subprocess.run(
        [*command, "ep_deadlock.py", *flags],
        cwd=tmp_path, capture_output=True, text=True, timeout=90, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip


def test_it_is_short_and_imports_only_torch_and_the_standard_library():
    text = SOURCE.read_text()
    assert text.count("\n") <= 200
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert imported <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    "num_ranks", [2, pytest.param(4, marks=pytest.mark.full), pytest.param(8, marks=pytest.mark.full)]
)
def test_the_fault_hangs_and_names_who_waits_where(tmp_path, num_ranks):
    run = torchrun(tmp_path, num_ranks, *(["--quiet", "1"] if num_ranks == 2 else []))
    output = run.stdout + run.stderr
    assert run.returncode == 1, output
    busy, idle = list(range(num_ranks - 1)), [num_ranks - 1]
    assert f"ranks {busy} wait in dp all_reduce (step 4, layer 0 gated_delta_net)" in output, output
    assert f"ranks {idle} wait in ep all_gather (step 4, layer 0 moe)" in output, output


@pytest.mark.full
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_the_fix_passes(tmp_path, num_ranks):
    run = torchrun(tmp_path, num_ranks, "--fix")
    assert run.returncode == 0 and "PASSED" in run.stdout, run.stdout + run.stderr
