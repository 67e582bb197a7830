"""The environment that the tests run in."""

from __future__ import annotations

import os
import re
from pathlib import Path

import environment


def test_what_a_shell_or_a_cluster_sets_does_not_reach_the_tests(monkeypatch):
    shell = {"TERM": "dumb", "LANG": "de_DE.ISO-8859-1", "LC_ALL": "de_DE.ISO-8859-1", "NO_COLOR": "1", "COLUMNS": "40"}
    shell |= {"HMR_KERNELS": "native", "TORCH_DISTRIBUTED_DEBUG": "DETAIL", "RANK": "3", "XDG_CACHE_HOME": "/cache"}
    shell |= {"OMP_NUM_THREADS": "64", "HOME": "/home/user"}
    monkeypatch.setattr(os, "environ", shell | {"PATH": "/bin", "HMR_CASES": "9"})
    environment.settle("/empty")
    kept = {"PATH": "/bin", "HMR_CASES": "9", "LANG": shell["LANG"]}
    assert os.environ == {**environment.FIXED, **kept, "HOME": "/empty"}


def test_every_variable_that_a_test_reads_reaches_it():
    read = re.compile(r'environ\.get\("(HMR_\w+)"')
    tests = Path(__file__).parent
    paths = [path for path in tests.rglob("*.py") if tests / "vllm" not in path.parents]  # a plug-in and its servers
    variables = {name for path in paths for name in read.findall(path.read_text())}
    assert variables == set(environment.OPTIONS)
