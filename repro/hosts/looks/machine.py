"""Read what a host reports besides its processes: kernel log, memory limits, versions of loaded libraries, GPUs."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from repro.hosts.looks.proc import PROC, read_text, uptime_s

KERNEL_LOG = Path("/dev/kmsg")
MAX_LINES = 2000
CLOCK_SLACK_S = 5.0
"""How many seconds a new kernel message may seem to be in the future, because two clocks differ."""

_DEVICES = ("/dev/nvidia0", "/dev/kfd", "/dev/davinci0", "/dev/xpu0")
_DEVICE_LINE = re.compile(r"NVRM: Xid|mlx5|bnxt|EEH|nvidia-nvswitch")
_KILLED = re.compile(r"Killed process \d+ \(([^)]*)\)")
_NCCL = re.compile(r"nvidia_nccl\w*-([\d.]+)\.dist-info")
_TORCH = re.compile(r"__version__ = ['\"]([^'\"]+)")


def has_devices() -> bool:
    """Whether this host has accelerators of a known type."""
    return any(map(os.path.exists, _DEVICES))


class OtherClock(ValueError):
    """The times in the kernel log cannot be compared with the clock of this process."""


def kernel_lines(since_boot_s: float, names: Collection[str], log: Path = KERNEL_LOG) -> list[str]:
    """Return the lines of the kernel log about errors of devices, and about processes that the kernel killed.

    since_boot_s  the start of the job, in seconds after boot; earlier lines are left out
    names         names of processes; a line about a killed process with a different name is left out

    Each line begins with its time in UTC. Raises PermissionError if this user is not allowed to read the log, and
    OtherClock in a time namespace, where the age of a line is not known.
    """
    now_s = uptime_s()
    boot_s = time.time() - now_s
    lines = []
    for at_s, text in _messages(log):
        if at_s > now_s + CLOCK_SLACK_S:
            raise OtherClock("this process is in another time namespace, so it cannot tell how old a message is")
        killed = _KILLED.search(text)
        if at_s >= since_boot_s and (_DEVICE_LINE.search(text) or (killed and killed[1] in names)):
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(boot_s + at_s))
            lines.append(f"{stamp},{int(at_s * 1e6) % 1_000_000:06d}+00:00 kernel: {text}")
    return lines[-MAX_LINES:]


def _messages(log: Path) -> Iterator[tuple[float, str]]:
    """Yield (seconds since boot, text) of each message in the kernel log.

    The log has lines such as "6,339,5140900,-;NVRM: Xid …". Here the time is 5140900 microseconds.
    """
    descriptor = os.open(log, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while True:
            try:
                record = os.read(descriptor, 8192)
            except BrokenPipeError:
                continue  # the kernel has overwritten the message that would be read next
            except (BlockingIOError, OSError):
                return
            head, _, text = record.decode(errors="replace").partition(";")
            fields = head.split(",")
            if not record or len(fields) < 3:
                return
            with contextlib.suppress(ValueError):
                yield int(fields[2]) / 1e6, text.split("\n")[0]
    finally:
        os.close(descriptor)


def memory_warnings(pids: Collection[int], proc: Path = PROC, root: Path = Path("/sys/fs/cgroup")) -> list[str]:
    """Return a sentence for each control group of these processes in which the OOM killer ended processes."""
    groups: dict[Path, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in read_text(proc / str(pid) / "cgroup").splitlines():
                _, controllers, path = line.split(":", 2)
                folder = root / "memory" if "memory" in controllers.split(",") else root if not controllers else None
                if folder is not None:
                    groups.setdefault(folder / path.lstrip("/"), pid)
    warnings = []
    for group, pid in groups.items():
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                match = re.search(r"^oom_kill (\d+)", read_text(group / name), re.MULTILINE)
                if match and match[1] != "0":
                    warnings.append(
                        f"the control group of process {pid} ran out of memory, and the kernel has ended {match[1]} of "
                        f"the group's processes since the group was made ({group / name})"
                    )
    return warnings


def versions(pid: int, proc: Path = PROC) -> dict[str, str]:
    """Return the versions of torch and NCCL that a process has loaded: {"torch": "2.11.0", "nccl": "2.28.9"}.

    The version is that of the installed package that has the loaded library. A library without a package is left out.
    """
    loaded: dict[str, str] = {}
    with contextlib.suppress(OSError):
        paths = {line.split(maxsplit=5)[-1] for line in read_text(proc / str(pid) / "maps", 64 << 20).splitlines()}
        for path in paths:
            packages, mark, _ = path.partition("/site-packages/")
            inside = Path(f"{proc}/{pid}/root{packages}/site-packages")
            if mark and "libtorch_cpu.so" in path and "torch" not in loaded:
                match = _TORCH.search(read_text(inside / "torch" / "version.py"))
                loaded |= {"torch": match[1]} if match else {}
            if mark and "libnccl.so" in path:
                numbers = [match[1] for name in os.listdir(inside) if (match := _NCCL.match(name))]
                loaded |= {"nccl": numbers[0]} if numbers else {}
    return loaded


def gpus() -> list[dict[str, Any]]:
    """Return utilisation, memory and processes of each NVIDIA GPU from pynvml; [] without pynvml or a GPU."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return []
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(nvml.NVMLError):
        nvml.nvmlInit()
        try:
            rows += [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        finally:
            nvml.nvmlShutdown()
    return rows


def _gpu(nvml: Any, index: int) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    row: dict[str, Any] = {"index": index}
    with contextlib.suppress(nvml.NVMLError):
        row["utilisation"] = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
    with contextlib.suppress(nvml.NVMLError):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        row |= {"memory_used": memory.used, "memory_total": memory.total}
    with contextlib.suppress(nvml.NVMLError):
        row["pids"] = [process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    return row
