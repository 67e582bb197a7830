"""Damaged and hostile run directories and bundles: a verdict or one line, with little time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODES = (0, 1, 2, 125)
MOST_MIB = 300
MOST_CPU_S = 10.0
"""A guard against what grows without end; the usual figure is 0.1 s, and 2 s the most that is seen."""


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=[pytest.mark.full, pytest.mark.timeout(1800)])])
def test_a_damaged_run_or_bundle_gets_a_verdict_or_one_line(count):
    command = [sys.executable, str(ROOT / "tests" / "support" / "simulation" / "mutations.py"), "0", str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        cases = [json.loads(line) for line in process.stdout]
    assert len(cases) == count
    for case in cases:
        text = case["output"]
        assert case["code"] in CODES, case
        assert "Traceback" not in text and "internal error" not in text and "\x1b" not in text, case
        assert case["code"] != 2 or text.count("\n") <= 1, case
        assert case["mib"] <= MOST_MIB and case["cpu_s"] <= MOST_CPU_S, case
    print("most: {} MiB, {} s".format(*(max(case[what] for case in cases) for what in ("mib", "cpu_s"))))
