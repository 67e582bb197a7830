"""The environment of the tests and of the processes that they start: the same on every machine."""

from __future__ import annotations

import os
import signal

OPTIONS = ("HMR_CASES", "HMR_LIVE_REPEATS", "HMR_SCENARIO_SEEDS", "HMR_SEED", "HMR_SEEDS")
"""Variables that the tests themselves read: how thorough the tests are, and a seed to repeat one."""

FIXED = {
    "HMR_KERNEL_CHECKS": "1",  # arguments are checked also in calls that a model makes
    "LC_ALL": "C",  # the messages of compilers and of the system are compared with English text
    "OMP_NUM_THREADS": "1",  # with small tensors, threads that wait for each other would take most of the time
    "TERM": "xterm-256color",
}

DROPPED = (
    *("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCH_EXTENSIONS_DIR", "TORCH_LOGS", "TRITON_INTERPRET"),
    "PYTHONDONTWRITEBYTECODE",  # each process of a test would compile all modules again
)
DROPPED_PREFIXES = ("HMR_", "TORCHELASTIC_", "TORCHINDUCTOR_", "TORCH_DISTRIBUTED_", "XDG_")


def settle(home: str) -> None:
    """Give this process and its children the environment of the tests, with ``home``, an empty folder, as HOME.

    Call this before torch is imported, because torch reads some variables at its import.
    """
    for name in list(os.environ):
        if name in DROPPED or (name.startswith(DROPPED_PREFIXES) and name not in OPTIONS):
            del os.environ[name]
    os.environ |= FIXED | {"HOME": home}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # true in a shell's background job, and then in its children
        signal.signal(signal.SIGINT, signal.default_int_handler)
