"""The schedules at the divergence, side by side: what was declared, and what the ranks of each side issued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from repro.report.gather import Facts
from repro.store.text import shorten_rank_lists
from repro.trace.parse import WitnessError
from repro.trace.witness import read
from repro.verdict.evidence.schedule import Entry, Step, steps_of
from repro.verdict.result import name_ranks

MAX_SIDES = 3
_BEFORE, _AFTER = 4, 5


@dataclass(frozen=True)
class Row:
    """One place of the schedule: the declared entry, and per side what was issued there; "" where nothing was."""

    planned: str
    issued: tuple[str, ...]
    diverges: tuple[bool, ...]


@dataclass(frozen=True)
class SideBySide:
    """heads: a heading per side; step: the step they were in; cut: how many rows before are left out."""

    heads: tuple[str, ...]
    step: int
    rows: tuple[Row, ...]
    cut: int


def side_by_side(facts: Facts) -> SideBySide | None:
    """None when the verdict names no divergence or its steps cannot be read."""
    sides = [side for side in facts.verdict.sides if side.ranks][:MAX_SIDES]
    if not sides:
        return None
    steps = [_step(facts, side.ranks[0], side.step) for side in sides]
    known = [step for step in steps if step is not None]
    if not known:
        return None
    plan = max((step.plan for step in known), key=len)
    columns = [_along(plan, [call.entry for call in step.issued] if step else []) for step in steps]
    rows: list[Row] = []
    for index in range(len(plan) + 1):
        extras = [column[0].get(index, []) for column in columns]
        for k in range(max(map(len, extras))):
            cells = tuple(name_entry(extra[k]) if k < len(extra) else "" for extra in extras)
            rows.append(Row("", cells, tuple(bool(cell and plan) for cell in cells)))
        if index < len(plan):
            issued = tuple(name_entry(plan[index]) if index in column[1] else "" for column in columns)
            # Left out, not merely not reached: something later of the plan was issued.
            skipped = tuple(index not in column[1] and any(i > index for i in column[1]) for column in columns)
            rows.append(Row(name_entry(plan[index]), issued, skipped))
    first = next((i for i, row in enumerate(rows) if any(row.diverges)), None)
    if first is None:
        first = next((i for i, row in enumerate(rows) if len({bool(cell) for cell in row.issued}) > 1), 0)
    begin = max(0, first - _BEFORE)
    heads = tuple(shorten_rank_lists(f"{name_ranks(side.ranks)} issued") for side in sides)
    return SideBySide(heads, known[0].number, tuple(rows[begin : first + _AFTER + 1]), begin)


def name_entry(entry: Entry) -> str:
    group, op, layer = entry
    return f"{group} {op}" + (f" · {layer}" if layer else "")


def _step(facts: Facts, rank: int, number: int) -> Step | None:
    try:
        witness = read(facts.run_dir.witness(rank))
    except (OSError, WitnessError):
        return None
    steps = steps_of(witness)
    return next((step for step in steps if step.number == number), steps[-1] if steps else None)


def _along(plan: Sequence[Entry], issued: Sequence[Entry]) -> tuple[dict[int, list[Entry]], set[int]]:
    """What was issued laid along the plan: extras by the place they come before, and the places that were issued."""
    extras: dict[int, list[Entry]] = {}
    met: set[int] = set()
    for tag, i1, i2, k1, k2 in SequenceMatcher(None, plan, issued, autojunk=False).get_opcodes():
        if tag == "equal":
            met.update(range(i1, i2))
        elif k2 > k1:
            extras.setdefault(i1, []).extend(issued[k1:k2])
    return extras, met
