"""A lock file outlives the process that created it, and every later start waits for a process that no longer exists.

Upstream: InferenceX issue 1360 and PyTorch issue 189245. Before torch 2.14, torch's extension loader excludes other
processes by a lock file ("baton"), which it creates with O_EXCL and removes at the end. A builder that is killed in
between, by the out-of-memory killer or an orchestrator's timeout, leaves the file in a cache that outlives containers.
From then on all ranks of every start wait for the file to disappear, without a time limit or a log line. The file is
empty and names no process. But the process that created the file keeps it open. So if no process has the file open, it
is stale.

Here a real builder is killed while it holds the lock, before the ranks start.

The fix: use a lock that the operating system releases when its holder ends. The rank that holds this lock can recognise
a stale lock file of the loader, and removes it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hybrid_moe_ref.engine.policies import Policies
from repro.hosts import processes
from repro.lab.scenarios import Expected, Scenario
from repro.lab.scenarios.cold_jit import BuildAtFirstUse
from repro.lab.scenarios.cold_jit import missing as missing_compiler
from repro.lab.settings import RunSettings

PATIENCE_S = 60.0


def kill_a_builder(settings: RunSettings, cache: Path) -> None:
    """The trigger: start a builder and kill it in the middle of its build, so that its lock file stays in ``cache``.

    The builder stands for an earlier start of the server that was killed. In the control, do nothing.
    """
    if settings.variant == "control":
        return
    parent = os.getpid()
    builder = subprocess.Popen(
        [sys.executable, "-m", __name__, str(cache / "kernels")],
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: processes.die_with_parent(parent),
    )
    assert builder.stdout is not None
    with builder.stdout as lines:
        lines.readline()  # the builder holds the lock now
    os.killpg(builder.pid, signal.SIGKILL)
    builder.wait()


def main() -> None:
    """Act as the builder that is killed: take the loader's lock, print a line, and wait until the process is killed."""
    from hybrid_moe_kernels.lab.gdn_prefill import PREFILL

    def on_event(event: str, name: str, holder: int) -> None:
        if event == "build_begin":
            print("builds", flush=True)
            time.sleep(PATIENCE_S)

    PREFILL.load(Path(sys.argv[1]), on_event)


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    control: Kernels are built under the loader's lock, and no stale lock file exists.
    fault: Kernels are built under the loader's lock, and a stale lock file exists.
    fix: The engine builds the kernels under its own lock.
    """
    return Policies() if settings.variant == "fix" else Policies(builds=BuildAtFirstUse(settings, rank))


def missing(settings: RunSettings) -> str:
    """Return why the scenario cannot run on this machine; "" if it can."""
    if lack := missing_compiler(settings):
        return lack
    from hybrid_moe_kernels.extension import has_baton

    return "" if has_baton() else "it needs torch before 2.14: since then the loader's lock ends with its holder"


def hang(settings: RunSettings) -> Expected:
    """Predict a deadlock without a culprit: all ranks wait at the first GDN layer of the profile step."""
    return Expected("deadlock", "lock", culprits=(), step=0)


SCENARIO = Scenario(
    name="stale_baton",
    summary="the lock file of a killed builder makes all ranks of the next start wait for ever",
    source="InferenceX#1360, pytorch#189245",
    policies=policies,
    hang=hang,
    refused=hang,
    before=kill_a_builder,
    missing=missing,
    defaults={"engine": {"gdn_prefill_backend": "jit"}},
)

if __name__ == "__main__":
    main()
