"""Read and check the environment variables of a rank, and name the first wrong one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hybrid_moe_kernels.choices import CHOICES, INSTRUCTION_SETS

from hybrid_moe_ref.config import ConfigError, nearest

_ONE_OF = {
    "HMR_KERNELS": CHOICES,
    "HMR_KERNEL_CHECKS": ("0", "1"),
    "HMR_NATIVE_ISA": INSTRUCTION_SETS,
}
_FOLDERS = ("HMR_KERNEL_CACHE", "HMR_NATIVE_DIR")


def refuse_bad_variables() -> None:
    """Raise ConfigError for the first HMR_* variable whose value would make every rank fail.

    Commands call this before they start ranks. A variable with an empty value counts as unset.
    """
    for name, choices in _ONE_OF.items():
        value = os.environ.get(name, "")
        if value not in ("", *choices):
            raise ConfigError(f"{value!r} is not one of {', '.join(choices)}{nearest(value, choices)}", name)
    for name in _FOLDERS:
        value = os.environ.get(name, "")
        if os.path.lexists(value) and not os.path.isdir(value):
            raise ConfigError(f"{value!r} is not a folder", name)


@dataclass(frozen=True)
class RankEnvironment:
    """The environment variables that torchrun (RANK and so on) and this project's launcher (HMR_*) set for a rank.

    run_dir    the run directory that the launcher created; None under plain torchrun
    launcher   the launcher's pid and start time (in clock ticks) as "PID:TICKS"; "" under plain torchrun
    """

    rank: int
    num_ranks: int
    local_rank: int
    num_local_ranks: int
    run_dir: Path | None
    launcher: str

    @classmethod
    def read(cls) -> RankEnvironment:
        """Read the variables from ``os.environ``. Raises ConfigError with the name of the variable that is wrong."""
        num_ranks = _number("WORLD_SIZE", 1, 1)
        num_local_ranks = _number("LOCAL_WORLD_SIZE", 1, 1)
        rank, local_rank = _number("RANK", 0, 0), _number("LOCAL_RANK", 0, 0)
        if rank >= num_ranks and "WORLD_SIZE" in os.environ:
            raise ConfigError(f"{rank} is not one of the {num_ranks} ranks of WORLD_SIZE", "RANK")
        launcher = os.environ.get("HMR_LAUNCHER", "")
        if launcher and not re.fullmatch(r"[0-9]{1,10}:[0-9]{1,20}", launcher):
            raise ConfigError(
                f"{launcher!r} is not of the form PID:TICKS; only the launcher sets this variable: unset it",
                "HMR_LAUNCHER",
            )
        run_dir = os.environ.get("HMR_RUN_DIR", "")
        if run_dir and not Path(run_dir, "config.json").is_file():
            raise ConfigError(
                f"{run_dir!r} is not a run directory; only the launcher sets this variable: unset it", "HMR_RUN_DIR"
            )
        return cls(rank, num_ranks, local_rank, num_local_ranks, Path(run_dir) if run_dir else None, launcher)


def _number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, "") or str(default)
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise ConfigError(f"{text!r} is not a number of at least {least}", name)
    return int(text)
