"""Say which of the hypotheses H1 to H5 in docs/ROOT-CAUSE.md remain possible after the outcomes of the cells.

The question is whether a start stalls because of a cold cache, or because of expert parallelism (EP).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from repro.attach.vllm.cells.grid import COLD, TP, WARM, Cell
from repro.attach.vllm.cells.outcome import HUNG, LIMIT, READY, Outcome


def remaining(cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> list[str]:
    """Return a line for each pair of a cold and a warm start: which of the two starts stalled, and what this shows.

    A pair has a line only if it is known of both starts whether they stalled.
    """
    stalls = {cell: _stalls(outcomes.get(cell.name)) for cell in cells}
    lines = []
    for cell in (cell for cell in cells if cell.cache == COLD):
        cold, warm = stalls[cell], stalls.get(warm_cell := replace(cell, cache=WARM))
        if cold is None or warm is None:
            continue
        if warm and outcomes[warm_cell.name].partial:
            text = (
                "both starts stall, and the warm start had an incomplete cache: give a longer --limit, or see in "
                "`where` whether the ranks wait for a lock"
            )
        elif warm and not cold:
            text = (
                "only the warm start stalls, so no build is the cause; perhaps the ranks find different things in the "
                "cache (H4)"
            )
        elif warm:
            text = f"the warm start stalls, too, {_other_layout(cell, stalls, outcomes)}"
        elif cold:
            text = "only the cold start stalls: H1 or H2; the lock in `where` says which"
        else:
            text = "no stall in either start"
        lines.append(f"{cell.pair}: {text}.")
    return lines


def _other_layout(cell: Cell, stalls: Mapping[Cell, bool | None], outcomes: Mapping[str, Outcome]) -> str:
    """Return the second half of the sentence about a warm start that stalls.

    This half says whether tensor parallelism (TP) without expert parallelism stalls, too, with the same backends.
    """
    if cell.layout == TP:
        return "without expert parallelism: H3, or a build that no cache keeps"
    other = replace(cell, layout=TP, cache=WARM)
    in_tp = stalls.get(other)
    if in_tp is None or (in_tp and outcomes[other.name].partial):
        return "and nothing is known of TP with the same backends"
    if in_tp:
        return "and so does TP with the same backends: expert parallelism alone is not the cause"
    return "and TP with the same backends does not: H4 or H5 if it is a deadlock, H3 if it is a stall"


def _stalls(outcome: Outcome | None) -> bool | None:
    """Whether a start stalled. None if this is unknown: it did not run, its server ended, or it was interrupted."""
    if outcome is None or outcome.state not in (READY, HUNG, LIMIT):
        return None
    return outcome.state != READY or outcome.verdict == "slow"
