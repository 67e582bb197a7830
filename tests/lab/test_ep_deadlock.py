"""The one-file reproducer keeps its promises: small, alone, hangs by itself, names itself, and passes when fixed."""

from __future__ import annotations

import ast
import os
import shutil
import sys
from pathlib import Path

import pytest
from program_server import TORCHRUN

SOURCE = Path(__file__).resolve().parents[2] / "repro" / "ep_deadlock.py"


@pytest.fixture
def torchrun(programs, tmp_path):
    """A function that runs a copy of the file from an empty folder, as someone does who was sent it."""
    shutil.copy(SOURCE, tmp_path / "ep_deadlock.py")
    env = {**os.environ, "TMPDIR": str(tmp_path)}

    def torchrun(num_ranks, *flags):
        command = ["--standalone", f"--nproc-per-node={num_ranks}", "ep_deadlock.py", *flags]
        return programs.run(TORCHRUN, *command, cwd=tmp_path, env=env)

    return torchrun


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
def test_the_fault_hangs_and_names_who_waits_where(torchrun, num_ranks):
    run = torchrun(num_ranks, *(["--quiet", "1"] if num_ranks == 2 else []))
    output = run.stdout + run.stderr
    assert run.returncode == 1, output
    busy, idle = list(range(num_ranks - 1)), [num_ranks - 1]
    assert f"ranks {busy} wait in dp all_reduce (step 4, layer 0 gated_delta_net)" in output, output
    assert f"ranks {idle} wait in ep all_gather (step 4, layer 0 moe)" in output, output


@pytest.mark.full
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_the_fix_passes(torchrun, num_ranks):
    run = torchrun(num_ranks, "--fix")
    assert run.returncode == 0 and "PASSED" in run.stdout, run.stdout + run.stderr
