"""What may import and call what, and what stays free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "module",
    [
        "repro.verdict",
        "repro.commands.cli",
        "repro.watch.live",
        "repro.trace.witness.file",
        "repro.lab.scenarios",
        "repro.report",
    ],
)
def test_what_watches_and_judges_never_imports_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_watcher_knows_nothing_of_the_lab():
    code = "import sys, repro.watch.live; sys.exit(any(name.startswith('repro.lab') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("command", "forbidden"),
    [
        ("", ("rich", "jinja2", "psutil", "repro.ingest", "repro.verdict", "repro.lab")),
        ("diagnose", ("rich", "jinja2", "psutil", "repro.ingest", "repro.verdict", "repro.lab")),
        ("list", ("rich", "jinja2", "psutil", "repro.lab")),
        ("clean", ("rich", "jinja2", "psutil", "repro.lab")),
        ("report", ("repro.lab", "repro.bundle", "repro.ingest")),
    ],
)
def test_help_imports_only_what_it_prints(command, forbidden):
    words = [command, "--help"] if command else ["--help"]
    assert imported(f"from repro.commands.cli import main; main({words})", *forbidden) == set()


def test_diagnose_needs_neither_the_lab_nor_the_model_nor_the_terminals_tables(tmp_path):
    (tmp_path / "rank0.log").write_text("[rank0]: nothing\n")
    forbidden = ("torch", "numpy", "hybrid_moe_kernels", "repro.lab", "repro.watch", "rich", "psutil")
    code = f"from repro.commands.cli import main; main(['diagnose', {str(tmp_path)!r}])"
    assert imported(code, *forbidden) == set()
    of_the_model = {name for name in imported(code, "hybrid_moe_ref") if not name.startswith("hybrid_moe_ref.files")}
    assert of_the_model <= {"hybrid_moe_ref"}, of_the_model


def test_a_bundle_of_foreign_evidence_needs_neither_the_lab_nor_torch(tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "rank0.log").write_text("[rank0]: torch.OutOfMemoryError: CUDA out of memory.\n")
    code = f"from repro.commands.cli import main; main(['bundle', {str(tmp_path / 'job')!r}])"
    assert imported(code, "torch", "numpy", "hybrid_moe_kernels", "repro.lab", "hybrid_moe_ref.engine") == set()
    assert (tmp_path / "job.zip").is_file()


def imported(code: str, *packages: str) -> set[str]:
    """The modules of these packages that a new interpreter has imported after running the code."""
    ask = f"""
import contextlib, io, sys
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    {code}
print(*sys.modules)
"""
    answer = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    return {
        name for name in answer.stdout.split() if name.startswith(tuple(f"{p}." for p in packages)) or name in packages
    }


def test_dependencies_point_one_way():
    """layers -> kernels, model -> layers, parallel -> model, engine -> parallel, repro -> engine; never back."""
    forbidden = {
        "kernels": ("hybrid_moe_ref", "repro"),
        "hybrid_moe_ref/layers": ("hybrid_moe_ref.parallel", "hybrid_moe_ref.engine", "hybrid_moe_ref.model", "repro"),
        "hybrid_moe_ref/parallel": ("hybrid_moe_ref.engine", "repro"),
        "hybrid_moe_ref/engine": ("repro",),
        "hybrid_moe_ref": ("repro",),
        "repro/verdict": ("torch",),
        "repro/report": ("torch",),
    }
    for folder, modules in forbidden.items():
        for path in (ROOT / folder).rglob("*.py"):
            for line in path.read_text().splitlines():
                words = line.split()
                if words[:1] in (["import"], ["from"]):
                    imported = words[1]
                    assert not any(imported == m or imported.startswith(f"{m}.") for m in modules), f"{path}: {line}"


def test_a_wheel_has_every_file_that_the_packages_read():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    for path in (path for name in ("repro", "hybrid_moe_ref", "kernels") for path in (ROOT / name).rglob("*.*")):
        left_out = path.suffix in (".py", ".md") or "__pycache__" in path.parts or path.is_dir()
        assert left_out or any(fnmatch(path.name, pattern) for pattern in patterns), path


def test_only_comm_calls_collectives():
    collectives = {"all_reduce", "reduce_scatter", "broadcast", "barrier", "all_gather", "all_to_all_single"}
    for path in (ROOT / "hybrid_moe_ref").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
                raise AssertionError(f"{path}:{node.lineno} imports from torch.distributed by name")
            if isinstance(node, ast.Attribute) and node.attr in collectives and path.name != "comm.py":
                owner = ast.unparse(node.value)
                assert "dist" not in owner.split("."), f"{path}:{node.lineno}: {owner}.{node.attr}"


def test_no_test_module_asks_for_a_gpu_when_it_is_imported():
    """After that, no rank that uses one can be forked: one such line makes all of test_gpu.py fail when it is not run
    alone."""

    def at_import(node):
        """What runs then: everything but the bodies of functions."""
        yield node
        skipped = node.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) else []
        for child in ast.iter_child_nodes(node):
            if child not in (skipped if isinstance(skipped, list) else [skipped]):
                yield from at_import(child)

    for path in (ROOT / "tests").rglob("*.py"):
        for node in at_import(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.cuda."):
                raise AssertionError(f"{path}:{node.lineno}: {ast.unparse(node)}")
