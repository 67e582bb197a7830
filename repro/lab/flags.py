"""The command-line flags that set up a run, in one list.

`run`, `matrix`, `minimise` and repro.worker (the program of one rank, under plain torchrun) read these flags. run.json
contains commands that repeat the run; these commands use the same flags.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_moe_ref.config import GDN_PREFILL_BACKENDS, MOE_BACKENDS, ConfigError
from hybrid_moe_ref.engine.server_config import CHECKS
from hybrid_moe_ref.files import read_json
from repro.lab import scenarios
from repro.lab.settings import BACKENDS, KERNEL_CACHES, MAX_CONFIG_BYTES, RunSettings


@dataclass(frozen=True)
class Flag:
    """A flag that changes one setting of a run.

    option   the flag, "--ranks"
    field    the setting's name in RunSettings, "num_ranks"; for a setting of the engine, "engine.moe_backend"
    options  the other arguments of argparse's ``add_argument``, such as ``type``
    """

    option: str
    field: str
    options: Mapping[str, Any]

    @property
    def dest(self) -> str:
        """Return the attribute name under which argparse stores the flag's value."""
        return self.field.rpartition(".")[2]

    def value(self, settings: RunSettings) -> Any:
        """Return the value of the flag's setting in ``settings``."""
        return getattr(settings.engine if self.field.startswith("engine.") else settings, self.dest)

    def words(self, value: Any) -> list[str]:
        """Return the words of a command line that set the flag to this value: ["--ranks", "4"]."""
        return [self.option] if value is True else [self.option, str(value)]


def _flag(option: str, field: str, help: str, **options: Any) -> Flag:
    return Flag(option, field, {**options, "help": help})


FLAGS = (
    _flag("--ranks", "num_ranks", "default: 8", type=int, metavar="N"),
    _flag("--backend", "backend", "default: gloo", choices=BACKENDS),
    _flag("--quiet-window", "quiet_window_s", "default: 1", type=float, metavar="S"),
    _flag("--deadline", "deadline_s", "default: 120", type=float, metavar="S"),
    _flag("--seed", "seed", "default: 0", type=int, metavar="N"),
    _flag("--checks", "checks", "default: observe for fault, agree for control and fix", choices=CHECKS),
    _flag(
        "--allow-unsafe", "allow_unsafe", "start even if the run can hang (a fault always starts)",
        action="store_true", default=None,
    ),
    _flag("--gdn-prefill-backend", "engine.gdn_prefill_backend", "jit: compiled on this machine at first use",
          choices=GDN_PREFILL_BACKENDS),
    _flag("--moe-backend", "engine.moe_backend", "jit: compiled on this machine at first use", choices=MOE_BACKENDS),
    _flag(
        "--kernel-cache", "kernel_cache",
        "state of the cache of compiled kernels at the start; split: every rank has its own cache, and only rank 0's "
        "is cold",
        choices=KERNEL_CACHES,
    ),
    _flag("--group-timeout", "group_timeout_s", "seconds after which a collective gives up", type=float, metavar="S"),
)  # fmt: skip


def add_flags(parser: argparse.ArgumentParser, *fields: str) -> None:
    """Add flags to a parser. A flag that the user does not give has the value None.

    *fields: the settings to add flags for, each by its name in RunSettings: "num_ranks", "engine.moe_backend"
    """
    for flag in FLAGS:
        if flag.field in fields:
            parser.add_argument(flag.option, dest=flag.dest, **flag.options)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the flags that the user gave, by the setting's name in RunSettings: {"num_ranks": 4}."""
    values = {flag.field: getattr(args, flag.dest, None) for flag in FLAGS}
    return {field: value for field, value in values.items() if value is not None}


def settings_of(
    scenario: str, variant: str, flags: Mapping[str, Any], config: Path | None = None, **fixed: Any
) -> RunSettings:
    """Return the settings of a run of ``scenario``.

    The values come from four sources: the scenario's defaults, the file ``config``, ``flags`` and ``**fixed``.
    Each source overrides the sources before it.

    flags    the values of the user's flags, by the setting's name: {"num_ranks": 4}; from :func:`given`
    config   the user's --config file; None if there is none
    fixed    settings that the calling command sets itself

    Raises ConfigError for a wrong value or an unreadable file, and DamagedFile if the file is not JSON.
    """
    document = read_config(config)
    engine = {field.removeprefix("engine."): value for field, value in flags.items() if field.startswith("engine.")}
    if engine and isinstance(users := document.get("engine", {}), dict):
        document = {**document, "engine": {**users, **engine}}
    rest = {field: value for field, value in flags.items() if not field.startswith("engine.")}
    names = {"scenario": scenario, "variant": variant}
    return scenarios.settings_of({**rest, **fixed, **names}, document, str(config) if config else "")


def read_config(path: Path | None) -> Mapping[str, Any]:
    """Return the content of the user's --config file; {} if ``path`` is None.

    Raises ConfigError if the file cannot be read or is no mapping, and DamagedFile if it is not JSON.
    """
    if path is None:
        return {}
    try:
        document = read_json(path, MAX_CONFIG_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot read the file: {error.strerror}", str(path)) from error
    if not isinstance(document, dict):
        raise ConfigError("wanted a mapping", str(path))
    return document


def differences(settings: RunSettings, plain: RunSettings, *without: str) -> Iterator[tuple[Flag, Any]]:
    """Yield (flag, its value) for each flag that a command needs to run ``settings`` instead of ``plain``.

    Differences that no flag can set are left out.

    plain: the settings that the command has without flags
    *without: names of settings whose differences are also left out, such as "num_ranks" or "engine.moe_backend"
    """
    for flag in FLAGS:
        value = flag.value(settings)
        can_say = value is not False and value != ""  # no flag sets one of these two values
        if can_say and flag.field not in without and value != flag.value(plain):
            yield flag, value
