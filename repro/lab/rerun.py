"""The commands that do a run again, exactly: every setting that is not a default is a flag, or in the ``--config``."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hybrid_moe_ref.config import ConfigError
from repro.lab import scenarios
from repro.lab.settings import RunSettings
from repro.report.gather import Facts

_BY_TORCHRUN = {
    "backend": "--backend", "checks": "--checks", "quiet_window_s": "--quiet-window", "deadline_s": "--deadline",
    "seed": "--seed",
}  # fmt: skip
_BY_RUN = {
    "num_ranks": "--ranks", **_BY_TORCHRUN, "kernel_cache": "--kernel-cache", "group_timeout_s": "--group-timeout",
}  # fmt: skip
_OF_ENGINE = {"gdn_prefill_backend": "--gdn-prefill-backend", "moe_backend": "--moe-backend"}


def command(facts: Facts) -> str:
    """What runs this again, from where the report is written; "" when the configuration is not known."""
    if facts.settings is None:
        return ""
    settings, plain = facts.settings, _plain(facts.settings)
    words, shown = _flags(settings, plain, _BY_RUN)
    engine_words, engine = _flags(settings.engine, plain.engine, _OF_ENGINE)
    words += engine_words
    if dataclasses.replace(shown, engine=engine) != settings:
        words += ["--config", f"{place(facts)}/config.json"]
    return shlex.join(["python", "-m", "repro", "run", settings.scenario, "--variant", settings.variant, *words])


def torchrun_command(facts: Facts) -> str:
    """The same by plain torchrun; "" for settings that the worker has no flags for."""
    if facts.settings is None:
        return ""
    settings = facts.settings
    plain = _replaced(_plain(settings), [("num_ranks", settings.num_ranks)])
    words, shown = _flags(settings, plain, _BY_TORCHRUN)
    if shown != settings:
        return ""
    start = ["torchrun", "--nproc-per-node", str(settings.num_ranks), "-m", "repro.worker", settings.scenario]
    return shlex.join([*start, "--variant", settings.variant, *words])


def commands(facts: Facts) -> list[tuple[str, str]]:
    """(what it does, command) for all that can be done again."""
    found = []
    if again := command(facts):
        found.append(("run it again", again))
        found.append(("with its control and its fix", re.sub(r"--variant \w+", "--variant all", again, count=1)))
    if by_torchrun := torchrun_command(facts):
        found.append(("the same by plain torchrun", by_torchrun))
    found.append(("judge these files once more", shlex.join(["python", "-m", "repro", "watch", place(facts)])))
    return found


def place(facts: Facts) -> str:
    """The run directory as seen from where a command is given: the working folder, where that is above it."""
    if facts.place:
        return facts.place
    relative = os.path.relpath(facts.root)
    return str(facts.root.resolve()) if relative.startswith("..") else Path(relative).as_posix()


def _plain(settings: RunSettings) -> RunSettings:
    """What runs without a flag."""
    names: dict[str, Any] = {"scenario": settings.scenario, "variant": settings.variant}
    try:
        return scenarios.settings_of(names)
    except ConfigError:
        return RunSettings(**names)


def _flags(settings: Any, plain: Any, flags: Mapping[str, str]) -> tuple[list[str], Any]:
    """The words for what differs from ``plain``, and what ``plain`` is with them."""
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
    """``plain`` so changed; as it is where the change is not valid without what no flag says."""
    try:
        return dataclasses.replace(plain, **dict(given))
    except ConfigError:
        return plain
