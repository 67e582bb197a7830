"""Show in columns what the ranks issued around the divergence, the first place where the ranks differ.

The first column is the declared schedule. Each further column is a side: ranks that did the same at the divergence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from repro.report.gather import RunData
from repro.store.text import shorten_rank_lists
from repro.trace.witness.file import read
from repro.trace.witness.parse import WitnessError
from repro.verdict.evidence.steps import Entry, Step, steps_of
from repro.verdict.result import name_ranks

MAX_SIDES = 3
_BEFORE, _AFTER = 4, 5


@dataclass(frozen=True)
class Row:
    """A row of the table that compares the declared schedule with what ranks issued around the first difference.

    planned    the collective that the schedule has in this row; "" if none
    issued     the collective that each side issued there; "" if none. A side is a set of ranks that did the same
    diverges   for each side, whether what it issued there differs from the schedule
    """

    planned: str
    issued: tuple[str, ...]
    diverges: tuple[bool, ...]

    @property
    def cells(self) -> list[tuple[str, bool]]:
        """Return, for each side (ranks that did the same), its collective, and whether it differs from the schedule."""
        return list(zip(self.issued, self.diverges, strict=True))


@dataclass(frozen=True)
class SideBySide:
    """The table that compares the declared schedule with what ranks issued around the place where ranks first differ.

    heads    a heading for each column of issued collectives: "ranks 0,6 issued"
    step     the number of the step that the rows belong to
    planned  the collective that the schedule has at the place of the difference; "" if it has none there
    cut      how many earlier rows of the step are left out
    """

    heads: tuple[str, ...]
    step: int
    planned: str
    rows: tuple[Row, ...]
    cut: int

    @property
    def declared(self) -> bool:
        """Whether the ranks declared a schedule."""
        return any(row.planned for row in self.rows)

    @property
    def divergent_row(self) -> int | None:
        return next((k for k, row in enumerate(self.rows) if any(row.diverges)), None)


def side_by_side(data: RunData) -> SideBySide | None:
    """Compare what ranks issued with the declared schedule, around the place where the ranks first differ.

    Of ranks that did the same at this place, only the first is compared. Returns None if the verdict names no such
    place. Also returns None if each of the compared ranks has an unreadable witness, or a witness without steps.
    """
    sides = [side for side in data.verdict.sides if side.ranks][:MAX_SIDES]
    steps = [_read_step(data, side.ranks[0], side.step) for side in sides]
    known = [step for step in steps if step is not None]
    if not known:
        return None
    plan = max((step.plan for step in known), key=len)
    rows = list(_rows(plan, [[call.entry for call in step.issued] if step else [] for step in steps]))
    divergent = _divergent(rows)
    begin = max(0, divergent - _BEFORE)
    return SideBySide(
        heads=tuple(shorten_rank_lists(f"{name_ranks(side.ranks)} issued") for side in sides),
        step=known[0].number,
        planned=next((side.planned for side in data.verdict.sides if side.planned), ""),
        rows=tuple(rows[begin : divergent + _AFTER + 1]),
        cut=begin,
    )


def _rows(plan: Sequence[Entry], issued: Sequence[Sequence[Entry]]) -> Iterator[Row]:
    aligned = [_align(plan, entries) for entries in issued]
    for index in range(len(plan) + 1):
        extras = [extra.get(index, []) for extra, _ in aligned]
        for k in range(max(map(len, extras))):
            cells = tuple(name_entry(extra[k]) if k < len(extra) else "" for extra in extras)
            yield Row("", cells, tuple(bool(cell and plan) for cell in cells))
        if index < len(plan):
            name = name_entry(plan[index])
            # An entry counts as skipped, not just as not yet reached, if a later entry of the plan was issued.
            left_out = tuple(index not in matched and any(i > index for i in matched) for _, matched in aligned)
            yield Row(name, tuple(name if index in matched else "" for _, matched in aligned), left_out)


def _divergent(rows: Sequence[Row]) -> int:
    """Return the index of the first row in which ranks issued something that differs from the schedule.

    If there is no such row, return the index of the first row that only some ranks have issued; 0 if there is none.
    """
    diverging = (k for k, row in enumerate(rows) if any(row.diverges))
    uneven = (k for k, row in enumerate(rows) if len({bool(cell) for cell in row.issued}) > 1)
    return next(diverging, next(uneven, 0))


def name_entry(entry: Entry) -> str:
    group, op, layer = entry
    return f"{group} {op}" + (f" · {layer}" if layer else "")


def _read_step(data: RunData, rank: int, number: int) -> Step | None:
    """Return the step of `rank` with this number; if the rank has no such step, its last step.

    Returns None if the rank's witness has no steps or cannot be read.
    """
    try:
        witness = read(data.run_dir.witness(rank))
    except (OSError, WitnessError):
        return None
    steps = steps_of(witness)
    return next((step for step in steps if step.number == number), steps[-1] if steps else None)


def _align(plan: Sequence[Entry], issued: Sequence[Entry]) -> tuple[dict[int, list[Entry]], set[int]]:
    """Align the entries that a rank issued with the declared schedule (``plan``).

    Returns two values: a dict from an index of the plan to the extra entries that the rank issued before this index;
    and the indices of the plan whose entries the rank issued.
    """
    extras: dict[int, list[Entry]] = {}
    matched: set[int] = set()
    for tag, i1, i2, k1, k2 in SequenceMatcher(None, plan, issued, autojunk=False).get_opcodes():
        if tag == "equal":
            matched.update(range(i1, i2))
        elif k2 > k1:
            extras.setdefault(i1, []).extend(issued[k1:k2])
    return extras, matched
