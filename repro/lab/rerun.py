"""Build the commands that repeat a run exactly.

A setting that differs from its default becomes a flag. If there is no flag for it, the command reads the run's
config.json with ``--config``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from hybrid_moe_ref.config import ConfigError
from repro.lab import scenarios
from repro.lab.flags import Flag, differences
from repro.lab.settings import RunSettings
from repro.store.description import RUN_FOLDER, Command


def commands(settings: RunSettings) -> tuple[Command, ...]:
    """Return the commands that repeat a run with these settings."""
    repeats = [
        Command("run it again", _run(settings, settings.variant)),
        Command("run it with its control and its fix", _run(settings, "all")),
    ]
    if by_torchrun := _torchrun(settings):
        repeats.append(Command("run the same by plain torchrun", by_torchrun))
    return tuple(repeats)


def _run(settings: RunSettings, variant: str) -> tuple[str, ...]:
    """Return the command that runs ``variant`` with these settings. The variant "all" means every variant."""
    plain = _plain(settings)
    flags = list(differences(settings, plain))
    words = _words(flags)
    if _changed(plain, flags) != settings:
        words += ["--config", f"{RUN_FOLDER}/config.json"]
    return ("python", "-m", "repro", "run", settings.scenario, "--variant", variant, *words)


def _torchrun(settings: RunSettings) -> tuple[str, ...]:
    """Return the torchrun command that repeats this run; () if flags alone cannot give these settings."""
    plain = _plain(settings)
    try:
        plain = dataclasses.replace(plain, num_ranks=settings.num_ranks)
    except ConfigError:  # num_ranks is valid only with other settings of this run, which torchrun's command cannot give
        return ()
    flags = list(differences(settings, plain, "num_ranks"))
    if _changed(plain, flags) != settings:
        return ()
    start = ("torchrun", "--nproc-per-node", str(settings.num_ranks), "-m", "repro.worker", settings.scenario)
    return (*start, "--variant", settings.variant, *_words(flags))


def _plain(settings: RunSettings) -> RunSettings:
    """Return the settings that a run of the same scenario and variant has if the user gives no flags."""
    names: dict[str, Any] = {"scenario": settings.scenario, "variant": settings.variant}
    try:
        return scenarios.settings_of(names)
    except ConfigError:
        return RunSettings(**names)


def _words(flags: Iterable[tuple[Flag, Any]]) -> list[str]:
    return [word for flag, value in flags for word in flag.words(value)]


def _changed(plain: RunSettings, flags: Iterable[tuple[Flag, Any]]) -> RunSettings | None:
    """Return ``plain``, the settings of a command without flags, changed by these flags.

    Return None if the result is invalid: some values are valid only together with a setting that no flag can set.

    flags: (flag, its value) pairs
    """
    values = {flag.field: value for flag, value in flags}
    engine = {field.removeprefix("engine."): value for field, value in values.items() if field.startswith("engine.")}
    rest = {field: value for field, value in values.items() if not field.startswith("engine.")}
    try:
        return dataclasses.replace(plain, engine=dataclasses.replace(plain.engine, **engine), **rest)
    except ConfigError:
        return None
