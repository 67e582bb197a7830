"""A lock file outlives the process that made it, and every later start waits for nobody.

Mirrors InferenceX issue 1360 and PyTorch issue 189245. torch's extension loader keeps other processes away by a file
that it creates with O_EXCL, and removes when it is done. A builder that is killed in between, by the out-of-memory
killer or an orchestrator's patience, leaves it behind, in a cache that outlives containers. From then on all ranks of
all starts wait for the file to vanish, without a limit or a word. It has no content that could name anyone; but its
maker keeps it open, so a file that no process has open has nobody behind it.

Here a real builder is killed while it holds the lock, before the ranks start. The cure: a lock that the kernel ends
with its holder. Under it, the file of a loader that is gone is seen for what it is and removed.
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
from repro.lab.scenarios.cold_jit import BuildAtFirstUse, missing
from repro.lab.settings import RunSettings

PATIENCE_S = 60.0


def kill_a_builder(settings: RunSettings, cache: Path) -> None:
    """The trigger: an earlier start's builder, killed in the middle of its build."""
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
        lines.readline()  # it holds the lock now
    os.killpg(builder.pid, signal.SIGKILL)
    builder.wait()


def main() -> None:
    """The builder: takes the loader's lock, says so, and gets no further."""
    from hybrid_moe_kernels.gated_delta_rule.jit import PREFILL

    def tell(event: str, name: str, holder: int) -> None:
        if event == "build_begin":
            print("builds", flush=True)
            time.sleep(PATIENCE_S)

    PREFILL.load(Path(sys.argv[1]), tell)


def policies(settings: RunSettings, rank: int) -> Policies:
    """control: the loader's lock without the file; fault: with it; fix: the engine's own builds."""
    return Policies() if settings.variant == "fix" else Policies(builds=BuildAtFirstUse(settings, rank))


def hang(settings: RunSettings) -> Expected:
    """All ranks wait at the first GDN layer of the profile step; none of them is a culprit."""
    return Expected("deadlock", "lock", culprits=(), step=0)


SCENARIO = Scenario(
    name="stale_baton",
    summary="the lock file of a killed builder keeps all ranks of the next start waiting for nobody",
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
