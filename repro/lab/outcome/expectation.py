"""Derive the watcher's options, the expected verdict, and fields of verdict.json from the settings of a run."""

from __future__ import annotations

from typing import Any

from repro.hosts.options import WatchOptions
from repro.lab import scenarios
from repro.lab.scenarios import Expected
from repro.lab.settings import RunSettings
from repro.store.schema import typed
from repro.verdict import Verdict
from repro.watch.document import Document, Expectation, describe


def watch_options(settings: RunSettings) -> WatchOptions:
    """Return the watcher's options for a run.

    With NCCL, a rank only queues the collectives of the groups ep and tp for the GPU, so the option `queued_groups`
    names these two. The collectives of the other groups, dp and world, always run on the CPU. With gloo, the option is
    empty.
    """
    queued_groups = ("ep", "tp") if settings.backend == "nccl" else ()
    return WatchOptions(settings.num_ranks, settings.quiet_window_s, settings.deadline_s, queued_groups)


def document_of(settings: RunSettings, verdict: Verdict, **more: Any) -> Document:
    """Return the content of verdict.json for a lab run.

    **more: further fields of verdict.json, such as ``seconds`` or ``skipped``
    """
    expected = scenarios.load(settings.scenario).expected(settings)
    return describe(
        verdict,
        scenario=settings.scenario,
        variant=settings.variant,
        backend=settings.backend,
        num_ranks=settings.num_ranks,
        seed=settings.seed,
        expected=typed(expected.to_json(), Expectation, "expected"),
        **{"matches_expected": matches(verdict, expected), **more},
    )


def matches(verdict: Verdict, expected: Expected) -> bool:
    """Whether the verdict matches ``expected`` or one of its alternatives (``or_else``)."""
    return _matches(verdict, expected) or (expected.or_else is not None and matches(verdict, expected.or_else))


def _matches(verdict: Verdict, expected: Expected) -> bool:
    if (verdict.verdict, verdict.cause or None) != (expected.verdict, expected.cause):
        return False
    for named, expected_ranks in ((verdict.culprits, expected.culprits), (verdict.suspects, expected.suspects)):
        if expected_ranks is not None and tuple(sorted(named)) != expected_ranks:
            return False
    living = [position for position in verdict.ranks if position.state != "dead"]
    if expected.error and not all(p.detail.startswith(f"{expected.error}:") for p in living):
        return False
    sides = (verdict.first_divergence or {}).get("sides", ())
    if expected.planned and not any(side.get("planned") == expected.planned for side in sides):
        return False
    ranks = verdict.culprits or range(len(verdict.ranks))
    positions = [position for position in verdict.ranks if position.rank in ranks]
    return all(
        expected.step in (None, position.step) and expected.layer in (None, position.layer) for position in positions
    )
