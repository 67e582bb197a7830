"""Build the commands that repeat a run exactly: each setting that is not a default becomes a flag, or ``--config``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from hybrid_moe_ref.config import ConfigError
from repro.lab import scenarios
from repro.lab.settings import RunSettings
from repro.store.description import RUN_FOLDER, Command

_BY_TORCHRUN = {
    "backend": "--backend", "checks": "--checks", "quiet_window_s": "--quiet-window", "deadline_s": "--deadline",
    "seed": "--seed",
}  # fmt: skip
_BY_RUN = {
    "num_ranks": "--ranks", **_BY_TORCHRUN, "kernel_cache": "--kernel-cache", "group_timeout_s": "--group-timeout",
}  # fmt: skip
_OF_ENGINE = {"gdn_prefill_backend": "--gdn-prefill-backend", "moe_backend": "--moe-backend"}


def commands(settings: RunSettings) -> tuple[Command, ...]:
    """The commands that repeat a run with these settings."""
    repeats = [
        Command("run it again", _run(settings, settings.variant)),
        Command("with its control and its fix", _run(settings, "all")),
    ]
    if by_torchrun := _torchrun(settings):
        repeats.append(Command("the same by plain torchrun", by_torchrun))
    return tuple(repeats)


def _run(settings: RunSettings, variant: str) -> tuple[str, ...]:
    """The command that runs a variant again; with the variant "all", every variant."""
    plain = _plain(settings)
    words, shown = _flags(settings, plain, _BY_RUN)
    engine_words, engine = _flags(settings.engine, plain.engine, _OF_ENGINE)
    words += engine_words
    if dataclasses.replace(shown, engine=engine) != settings:
        words += ["--config", f"{RUN_FOLDER}/config.json"]
    return ("python", "-m", "repro", "run", settings.scenario, "--variant", variant, *words)


def _torchrun(settings: RunSettings) -> tuple[str, ...]:
    """The torchrun command that repeats this run; () if the worker has no flag for one of its settings."""
    plain = _replaced(_plain(settings), [("num_ranks", settings.num_ranks)])
    words, shown = _flags(settings, plain, _BY_TORCHRUN)
    if shown != settings:
        return ()
    start = ("torchrun", "--nproc-per-node", str(settings.num_ranks), "-m", "repro.worker", settings.scenario)
    return (*start, "--variant", settings.variant, *words)


def _plain(settings: RunSettings) -> RunSettings:
    """The settings of this scenario and variant when no flag is given."""
    names: dict[str, Any] = {"scenario": settings.scenario, "variant": settings.variant}
    try:
        return scenarios.settings_of(names)
    except ConfigError:
        return RunSettings(**names)


def _flags(settings: Any, plain: Any, flags: Mapping[str, str]) -> tuple[list[str], Any]:
    """The command line's words for what differs from ``plain``, and ``plain`` with those changes."""
    given = {
        name: value
        for name in flags
        if (value := getattr(settings, name)) != getattr(plain, name) and value != ""  # no flag says "as by default"
    }
    words = [word for name, value in given.items() for word in (flags[name], str(value))]
    if getattr(settings, "allow_unsafe", False) and not plain.allow_unsafe:
        words.append("--allow-unsafe")
        given["allow_unsafe"] = True
    return words, _replaced(plain, given.items())


def _replaced(plain: Any, given: Iterable[tuple[str, Any]]) -> Any:
    """``plain`` with these values; ``plain`` itself if they are valid only together with a setting that has no flag."""
    try:
        return dataclasses.replace(plain, **dict(given))
    except ConfigError:
        return plain
