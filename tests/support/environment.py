"""The environment of the tests and of the processes that they start: the same on every machine."""

from __future__ import annotations

import os
import signal

OPTIONS = ("HMR_CASES", "HMR_LIVE_REPEATS", "HMR_SCENARIO_SEEDS", "HMR_SEED", "HMR_SEEDS")
"""Variables that tests themselves read: how thorough they are, and a seed to repeat."""

FIXED = {
    "HMR_KERNEL_CHECKS": "1",  # also of the calls that a model makes
    "LC_ALL": "C",  # what compilers and the system say is compared with English text
    "OMP_NUM_THREADS": "1",  # threads that wait for each other are most of the time of small tensors
    "TERM": "xterm-256color",
}

DROPPED = (
    *("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCH_EXTENSIONS_DIR", "TORCH_LOGS", "TRITON_INTERPRET"),
)
DROPPED_PREFIXES = ("HMR_", "TORCHELASTIC_", "TORCHINDUCTOR_", "TORCH_DISTRIBUTED_", "XDG_")


def settle(home: str) -> None:
    """Give this process and its children the environment of the tests, with ``home``, an empty folder, as HOME.

    Call it before torch is imported: torch reads some variables then.
    """
    for name in list(os.environ):
        if name in DROPPED or (name.startswith(DROPPED_PREFIXES) and name not in OPTIONS):
            del os.environ[name]
    os.environ |= FIXED | {"HOME": home}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job, and then in its children
        signal.signal(signal.SIGINT, signal.default_int_handler)
