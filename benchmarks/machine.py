"""The hardware, versions and commit that every benchmark records, and the speed of this machine's memory and products.

`python benchmarks/machine.py` prints the stem of a file of results: the processor, its cores, and the day.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = {"fla": ("fla-core", "flash-linear-attention"), "mamba_ssm": ("mamba-ssm",)}


def processor() -> str:
    """Return the processor's name, with the family and model numbers that distinguish two of the same name."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.partition(":")[::2] for line in info.read_text().splitlines() if ":" in line)
    info_of = {key.strip(): value.strip() for key, value in fields.items()}
    numbers = ", ".join(f"{key} {info_of[key]}" for key in ("cpu family", "model") if key in info_of)
    return info_of.get("model name", platform.machine()) + (f" ({numbers})" if numbers else "")


def cpu() -> str:
    """Return the processor's name, its number of cores, and the number of threads in use."""
    return f"{processor()}, {os.cpu_count()} cores, threads: {torch.get_num_threads()}"


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, torch and these packages; "not installed" for a missing one."""
    versions_of = {"python": platform.python_version(), "torch": torch.__version__}
    versions_of |= dict.fromkeys(packages, "not installed")
    places = [str(Path(sys.prefix, "oracles")), *sys.path]  # set-up installs what only tests use into the first
    installed: dict[str, str] = {}
    for each in importlib.metadata.distributions(path=places):  # an import takes the first one
        installed.setdefault(each.name.replace("_", "-"), each.version)
    for package in packages:
        for name in DISTRIBUTIONS.get(package, (package,)):
            if name in installed:
                versions_of[package] = installed[name]
    return versions_of


def commit() -> str:
    """Return the commit, with "-dirty" if files differ from it; "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a document as JSON. A reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.rename(path)


def best_s(call: Callable[[], Any], repeats: int = 10) -> float:
    """Return the seconds of the fastest of several calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def copy_bandwidth() -> float:
    """Return the bytes per second that a copy of 256 MB reads and writes."""
    source = torch.zeros(1 << 28, dtype=torch.uint8)
    target = torch.ones_like(source)
    return 2 * source.numel() / best_s(lambda: target.copy_(source))


def product_rate(dtype: torch.dtype = torch.float32) -> float:
    """Return the operations per second of torch's product of two square matrices."""
    a = torch.ones(1024, 1024, dtype=dtype)
    return float(2 * 1024**3 / best_s(lambda: a @ a, 5))


def mark(measured: float, wanted: float, at_most: bool = False) -> str:
    """Return the limit `wanted` and whether the measured value keeps it, such as ">= 2 ok" or "<= 0.1 MISSED"."""
    good = measured <= wanted if at_most else measured >= wanted
    return f"{'<=' if at_most else '>='} {wanted:g} {'ok' if good else 'MISSED'}"


if __name__ == "__main__":
    name = re.sub(r"[^a-z0-9]+", "-", processor().lower().replace("cpu ", "").replace("(r)", "")).strip("-")
    print(f"{name}-{os.cpu_count()}-cores_{datetime.date.today()}")
