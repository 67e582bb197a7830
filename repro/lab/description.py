"""Describe a lab run for run.json: the run's title, the watcher's options, and the commands that repeat the run."""

from __future__ import annotations

import hashlib
import json

from repro.lab import rerun, scenarios
from repro.lab.outcome.expectation import watch_options
from repro.lab.settings import RunSettings
from repro.store.description import RunDescription


def describe(settings: RunSettings) -> RunDescription:
    """Return the content of run.json for a run with these settings."""
    scenario = scenarios.load(settings.scenario)
    options = watch_options(settings)
    return RunDescription(
        title=settings.scenario,
        num_ranks=options.num_ranks,
        quiet_window_s=options.quiet_window_s,
        deadline_s=options.deadline_s,
        queued_groups=tuple(options.queued_groups),
        mechanism=scenario.summary,
        source=scenario.source,
        family=_family(settings),
        variant=settings.variant,
        commands=rerun.commands(settings),
    )


def _family(settings: RunSettings) -> str:
    """Return a digest of all settings except variant and checks. A report shows runs with equal digests together."""
    shared = {name: value for name, value in settings.to_mapping().items() if name not in ("variant", "checks")}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]
