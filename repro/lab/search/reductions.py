"""Reduce the settings of a run step by step, as long as its scenario predicts the same verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from hybrid_moe_ref.config import ConfigError
from repro.lab.scenarios import Expected, Scenario
from repro.lab.settings import RunSettings


def reductions(scenario: Scenario, start: RunSettings, target: Expected) -> Iterator[RunSettings]:
    """Yield smaller and smaller settings for which the scenario predicts the same verdict and cause as ``target``.

    The prediction must have culprits if ``target`` has culprits, and none if ``target`` has none. Each of the yielded
    settings has one reduction more than the settings before: fewer ranks, layers, experts, tokens or requests.

    start: the settings to reduce
    """
    current, moved = start, True
    while moved:
        moved = False
        for smaller in (_ranks, _layers, _experts, _tokens, _requests):
            for candidate in smaller(current):
                if _predicts(scenario, candidate, target):
                    current, moved = candidate, True
                    yield current
                    break


def _predicts(scenario: Scenario, settings: RunSettings, target: Expected) -> bool:
    try:
        predicted = scenario.hang(settings)
        usable = not scenario.missing(settings)
    except (ConfigError, ValueError, ArithmeticError, LookupError):
        return False  # the scenario is not possible at this size
    same = (predicted.verdict, predicted.cause) == (target.verdict, target.cause)
    return usable and same and bool(predicted.culprits) == bool(target.culprits)


def _change(settings: RunSettings, part: str = "", **changes: Any) -> Iterator[RunSettings]:
    """Yield the settings with ``**changes``. Yield nothing if the result is invalid or equal to ``settings``.

    part: the config that contains the changed fields, such as "model"; "" for the settings themselves
    """
    try:
        inside: Any = dataclasses.replace(getattr(settings, part), **changes) if part else None
        changed = dataclasses.replace(settings, **({part: inside} if part else changes))
        changed.server()
        changed.requests()
    except (ConfigError, ValueError):
        return
    if changed != settings:
        yield changed


def _ranks(settings: RunSettings) -> Iterator[RunSettings]:
    for num_ranks in range(2, settings.num_ranks):
        yield from _change(settings, num_ranks=num_ranks)


def _layers(settings: RunSettings) -> Iterator[RunSettings]:
    """Yield settings with fewer layers, the fewest first.

    Settings with at most 3 layers can keep any of the model's layers. Settings with more layers keep the first layers.
    """
    pattern = settings.model.layer_pattern
    tried: set[str] = set()
    for length in range(1, len(pattern)):
        for places in combinations(range(len(pattern)), length) if length <= 3 else [range(length)]:
            kept = "".join(pattern[place] for place in places)
            if kept not in tried:
                tried.add(kept)
                yield from _change(settings, "model", layer_pattern=kept)


def _experts(settings: RunSettings) -> Iterator[RunSettings]:
    for top_k in sorted({1, 2, settings.model.num_experts_per_tok}):
        for num_experts in range(settings.num_ranks, settings.model.num_experts, settings.num_ranks):
            if num_experts >= top_k and top_k <= settings.model.num_experts_per_tok:
                yield from _change(settings, "model", num_experts=num_experts, num_experts_per_tok=top_k)
                break


def _tokens(settings: RunSettings) -> Iterator[RunSettings]:
    work = settings.workload
    for prompt in sorted({1, 2, 4, work.max_prompt_tokens}):
        for short in sorted({1, 2, work.short_new_tokens}):
            for new in sorted({short + 1, short + 3, work.max_new_tokens}):
                size = (prompt, short, new)
                now = (work.max_prompt_tokens, work.short_new_tokens, work.max_new_tokens)
                if all(a <= b for a, b in zip(size, now, strict=True)) and size != now:
                    yield from _change(
                        settings, "workload", max_prompt_tokens=prompt, short_new_tokens=short, max_new_tokens=new
                    )


def _requests(settings: RunSettings) -> Iterator[RunSettings]:
    work = settings.workload
    if (work.max_requests, work.max_arrival_step) != (1, 0):
        yield from _change(settings, "workload", max_requests=1, max_arrival_step=0)
    for count in range(1, work.max_requests):
        yield from _change(settings, "workload", max_requests=count)
    if work.max_idle_ranks > 1:
        yield from _change(settings, "workload", max_idle_ranks=1)
