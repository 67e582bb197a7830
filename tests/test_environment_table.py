"""Environment variables are an interface: each that the code reads stands in the README's one table, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"\bHMR_[A-Z_]+\b")


def test_every_environment_variable_stands_in_the_readme_and_none_that_is_not_read() -> None:
    folders = ("hybrid_moe_ref", "kernels", "repro", "tests", "benchmarks", "scripts")
    files = [ROOT / "Makefile", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    read = {name: path for path in files for name in NAME.findall(path.read_text())}
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `HMR_")]
    table = {name for row in rows for name in NAME.findall(row)}
    missing = {name: str(path.relative_to(ROOT)) for name, path in read.items() if name not in table}
    assert not missing, f"not in the README: {missing}"
    assert not table - read.keys(), f"in the README alone: {sorted(table - read.keys())}"
