"""Every rank is in the same collective, nobody is absent, and nothing moves: what carries the data has stopped.

Mirrors vLLM issue 48720 (as of its July update) and FlashInfer issue 2623, where a device kernel does not end: every
rank has issued the same operation, and no order of collectives is the cause. A CPU has no such kernel. What moves data
behind a rank's back on gloo is a thread of its own that serves the sockets, which gloo names its device. Here it is
stopped for good in every rank, by a signal whose handler does not return, as a profiler's or a driver's may; the main
threads enter the next collective and wait for ever, alive and sound. This is the same symptom by another device, and
not the upstream kernel.

No server can go on without its device. What it can do is to end well: with a limit to what one collective may take, the
first rank that reaches it stops all of them with the layer's name.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from hybrid_moe_ref.engine.plan import AgreedStep, StepPlan
from hybrid_moe_ref.engine.policies import Policies, StateBinding
from hybrid_moe_ref.engine.server_config import ServerConfig
from repro.lab.scenarios import Expected, Scenario
from repro.lab.settings import RunSettings

STEP = 3
DEVICE_THREAD = "gloo_tcp_loop"


class StopDevice(StateBinding):
    """The trigger: between the step's agreement and the first layer, the threads that serve gloo's sockets stop."""

    def bind(self, plan: StepPlan, agreed: AgreedStep, rebuild: Callable[[], AgreedStep]) -> AgreedStep:
        if plan.step == STEP:
            stop_threads(DEVICE_THREAD)
        return agreed


def stop_threads(name: str) -> None:
    """Stop all threads of this process that have that name, for good: each is sent a signal handled by pause(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal.restype = ctypes.c_void_p
    number = int(signal.SIGRTMIN) + 3
    libc.signal(number, ctypes.cast(libc.pause, ctypes.c_void_p).value)
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == name:
            libc.tgkill(os.getpid(), int(task.name), number)


def policies(settings: RunSettings, rank: int) -> Policies:
    """fault and fix: the device stops in every rank. What differs is whether there is a limit that ranks wait for."""
    return Policies() if settings.variant == "control" else Policies(binding=StopDevice())


def server(settings: RunSettings, rank: int) -> ServerConfig:
    """The cure: a limit to what one collective may take, here just below what the watcher calls quiet. It belongs to
    the checks: without them a fault has none.
    """
    config = settings.server()
    if settings.variant == "control" or settings.effective_checks == "observe":
        return config
    limit_s = 0.75 * settings.quiet_window_s
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, collective_limit_s=limit_s))


def missing(settings: RunSettings) -> str:
    """It stops gloo's own threads, by their name in /proc."""
    if settings.backend != "gloo":
        return "it stops gloo's device; for NCCL take a kernel that does not end"
    return "" if sys.platform == "linux" else "it finds gloo's threads in /proc, which only Linux has"


def hang(settings: RunSettings) -> Expected:
    """All ranks in one collective, and no culprit."""
    return Expected("stall", None, (), STEP, "layers.0.moe")


def ends_well(settings: RunSettings) -> Expected:
    """Every rank raises the same error, which names the layer."""
    return Expected("crash", "error", error="CollectiveStalled")


SCENARIO = Scenario(
    name="kernel_stall",
    summary="all ranks wait in one collective, nobody is absent: what carries the data has stopped",
    source="vllm#48720, flashinfer#2623",
    policies=policies,
    hang=hang,
    refused=ends_well,
    fixed=ends_well,
    server=server,
    missing=missing,
    defaults={"quiet_window_s": 2.0},
)
