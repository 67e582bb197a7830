"""What every benchmark row carries: hardware, versions, commit; and what this machine's memory and products reach.

`python benchmarks/machine.py` prints what a file of results is named after: the processor, its threads, and the day.
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
    """Its name, and the numbers that tell apart two of the same name."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.partition(":")[::2] for line in info.read_text().splitlines() if ":" in line)
    told = {key.strip(): value.strip() for key, value in fields.items()}
    numbers = ", ".join(f"{key} {told[key]}" for key in ("cpu family", "model") if key in told)
    return told.get("model name", platform.machine()) + (f" ({numbers})" if numbers else "")


def cpu() -> str:
    """The processor, and the number of cores, and of threads in use."""
    return f"{processor()}, {os.cpu_count()} cores, threads: {torch.get_num_threads()}"


def versions(*packages: str) -> dict[str, str]:
    """Of Python, torch, and these; "not installed" where one is not."""
    found = {"python": platform.python_version(), "torch": torch.__version__} | dict.fromkeys(packages, "not installed")
    places = [str(Path(sys.prefix, "oracles")), *sys.path]  # the first is where set-up puts what only tests may see
    installed: dict[str, str] = {}
    for each in importlib.metadata.distributions(path=places):  # the first is what an import finds
        installed.setdefault(each.name.replace("_", "-"), each.version)
    for package in packages:
        for name in DISTRIBUTIONS.get(package, (package,)):
            if name in installed:
                found[package] = installed[name]
    return found


def commit() -> str:
    """The commit, with "-dirty" where files differ from it; "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def write(path: Path, document: dict[str, Any]) -> None:
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.rename(path)


def best_s(call: Callable[[], Any], repeats: int = 10) -> float:
    """Seconds of the fastest of several calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 256 MB."""
    source = torch.zeros(1 << 28, dtype=torch.uint8)
    target = torch.ones_like(source)
    return 2 * source.numel() / best_s(lambda: target.copy_(source))


def product_rate(dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of torch's product of two square matrices."""
    a = torch.ones(1024, 1024, dtype=dtype)
    return float(2 * 1024**3 / best_s(lambda: a @ a, 5))


def mark(measured: float, wanted: float, at_most: bool = False) -> str:
    """`measured` beside what was asked for."""
    good = measured <= wanted if at_most else measured >= wanted
    return f"{'<=' if at_most else '>='} {wanted:g} {'ok' if good else 'MISSED'}"


if __name__ == "__main__":
    name = re.sub(r"[^a-z0-9]+", "-", processor().lower().replace("cpu ", "").replace("(r)", "")).strip("-")
    print(f"{name}-{os.cpu_count()}-cores_{datetime.date.today()}")
