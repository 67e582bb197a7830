"""All ranks wait in the same collective, no rank is absent, and no data moves, because the transport has stopped.

Upstream: vLLM issue 48720 (the updated report) and FlashInfer issue 2623, where a GPU kernel does not end:
every rank has issued the same operation, and the order of collectives is not the cause. A CPU has no such kernel. In
gloo a separate thread, which gloo calls its device, moves the data through the sockets. Here a signal stops this thread
for good in every rank: the signal's handler never returns. The main threads are healthy, enter the next collective and
wait for ever. The symptom is the same as in the upstream issues, but the mechanism differs.

A server cannot continue without its transport, but it can stop with an error. With a time limit for one collective, the
first rank that reaches the limit stops all ranks with an error that names the layer.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

from hybrid_moe_ref.engine.policies import Policies, StateBinding
from hybrid_moe_ref.engine.server_config import ServerConfig
from hybrid_moe_ref.engine.step.plan import AgreedStep, StepPlan
from repro.lab.scenarios import Expected, Scenario
from repro.lab.settings import RunSettings

STEP = 3
DEVICE_THREAD = "gloo_tcp_loop"


class StopDevice(StateBinding):
    """The trigger: the threads that serve gloo's sockets stop between the step's agreement and the first layer."""

    def bind(self, plan: StepPlan, agreed: AgreedStep, rebuild: Callable[[], AgreedStep]) -> AgreedStep:
        if plan.step == STEP:
            stop_threads(DEVICE_THREAD)
        return agreed


def stop_threads(name: str) -> None:
    """Stop those threads of this process that have this name, by a signal whose handler (pause) never returns."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal.restype = ctypes.c_void_p
    number = int(signal.SIGRTMIN) + 3
    libc.signal(number, ctypes.cast(libc.pause, ctypes.c_void_p).value)
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == name:
            libc.tgkill(os.getpid(), int(task.name), number)


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    In fault and fix, gloo's device stops in every rank. The fix differs from the fault by the time limit for a
    collective, which :func:`server` sets.
    """
    return Policies() if settings.variant == "control" else Policies(binding=StopDevice())


def server(settings: RunSettings, rank: int) -> ServerConfig:
    """Return the server's configuration.

    In fault and fix, the configuration has a time limit for one collective if `checks` is "agree" (the default of the
    fix) or "strict", but not if it is "observe" (the default of the fault). The limit is shorter than the quiet window.
    """
    config = settings.server()
    if settings.variant == "control" or settings.effective_checks == "observe":
        return config
    limit_s = 0.75 * settings.quiet_window_s
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, collective_limit_s=limit_s))


def missing(settings: RunSettings) -> str:
    """Return why gloo's threads cannot be stopped in this run; "" if they can."""
    if settings.backend != "gloo":
        return (
            "this scenario stops gloo's device: use --backend gloo (for NCCL, a kernel that does not end would be "
            "needed)"
        )
    return ""


def hang(settings: RunSettings) -> Expected:
    """Predict a stall: all ranks are in one collective, and no rank is a culprit."""
    return Expected("stall", None, (), STEP, "layers.0.moe")


def ends_well(settings: RunSettings) -> Expected:
    """Predict the verdict with a time limit: a crash, in which every rank raises the same error CollectiveStalled."""
    return Expected("crash", "error", error="CollectiveStalled")


SCENARIO = Scenario(
    name="kernel_stall",
    summary="all ranks wait in one collective, no rank is absent: the transport has stopped",
    source="vllm#48720, flashinfer#2623",
    policies=policies,
    hang=hang,
    refused=ends_well,
    fixed=ends_well,
    server=server,
    missing=missing,
    defaults={"quiet_window_s": 2.0},
)
