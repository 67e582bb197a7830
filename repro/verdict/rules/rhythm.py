"""Explain a hang of a program that declares no schedule: which rank left the repeating pattern of its own steps?

We call this pattern the rank's rhythm. A rank is named if it left its rhythm, all other ranks kept theirs, and another
rank waits for it. Ranks are not compared with each other, so each rank can have another pattern, as in a pipeline.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from repro.trace.knowledge import Knows
from repro.trace.witness.format import Event, Kind
from repro.trace.witness.reader import Witness
from repro.verdict.evidence.position import GroupKey
from repro.verdict.period import period_of
from repro.verdict.result import Finding

NEEDED = Knows.ORDER | Knows.LAYERS | Knows.ARGUMENTS
HISTORY = 2048
"""How many of a rank's newest collectives are searched for a pattern."""

RECENT_PERIODS = 3
"""A rank that left its pattern is named only if it has issued at most this many periods of operations since then. If it
issued more, the hang has another cause."""

_Key = tuple[int, int]  # string numbers of the signature (group, operation, layer, type) and of the call site


@dataclass(frozen=True, slots=True)
class _Break:
    """The place where a rank left its repeating pattern.

    events  the operations that the rank issued from this place on
    due     the operations of one period of the pattern, in the order in which they were due from this place on
    """

    events: Sequence[Event]
    due: Sequence[Event]

    @property
    def skipped(self) -> int:
        """How many operations of the pattern the rank left out, if it then continued the pattern; otherwise 0."""
        for count in range(1, len(self.due)):
            rest = [*self.due[count:], *self.due[:count]]
            if all(_key(came) == _key(due) for came, due in zip(self.events, rest, strict=False)):
                return count
        return 0

    @property
    def extra(self) -> int:
        """How many additional operations the rank issued, if it then continued the pattern; otherwise 0."""
        for count in range(1, len(self.events)):
            if all(_key(came) == _key(due) for came, due in zip(self.events[count:], self.due, strict=False)):
                return count
        return 0

    @property
    def in_pattern(self) -> bool:
        """Whether the pattern contains the operation with which the rank left it. Call sites are not compared."""
        return any(self.events[0].sig == due.sig for due in self.due)


def rhythm_finding(
    witnesses: Mapping[int, Witness], awaited: Collection[int], until: tuple[GroupKey, int] | None = None
) -> Finding | None:
    """Name the rank that left its repeating pattern, if no other rank did so and other ranks wait for this rank.

    The rank is the culprit if the operation with which it left the pattern occurs elsewhere in the pattern: then it
    skipped or repeated something. After a new operation the rank is only a suspect. Return None if no rank is named. If
    one of the ranks has no pattern, no rank is named.

    awaited  the ranks for which other ranks wait
    until    the group and the sequence number of the collective that ranks completed although their calls differed;
             None if there is none. What a rank did later cannot be the cause
    """
    broken: dict[int, _Break] = {}
    if len(witnesses) < 2 or any(NEEDED not in witness.knows for witness in witnesses.values()):
        return None
    for rank, witness in witnesses.items():
        issued = [event for event in witness.events(4 * HISTORY) if event.kind in (Kind.ENTER, Kind.ISSUE)][-HISTORY:]
        known, left = _rhythm(issued)
        if not known:
            return None
        if left is not None:
            broken[rank] = left
    if len(broken) != 1:
        return None
    rank, left = next(iter(broken.items()))
    if rank not in awaited or (until is not None and _comes_after(witnesses[rank], left, until)):
        return None
    return _described(witnesses[rank], rank, left)


def _key(event: Event) -> _Key:
    return event.sig, event.site


def _rhythm(issued: Sequence[Event]) -> tuple[bool, _Break | None]:
    """Return whether a rank has a repeating pattern, and the place where it left the pattern.

    The place is None if the rank kept the pattern. It is also None if the rank left the pattern too long ago to explain
    the hang, that is, more than RECENT_PERIODS periods of the pattern ago.
    """
    keys = [_key(event) for event in issued]
    cut = 0
    while cut * 2 <= len(keys):
        past = keys[: len(keys) - cut]
        period = period_of(past)
        if period is None:
            cut = max(1, cut * 2)
            continue
        at = len(past)
        while at < len(keys) and keys[at] == keys[at - period]:
            at += 1
        if at == len(keys) or len(keys) - at > RECENT_PERIODS * period:
            return True, None
        return True, _Break(issued[at:], issued[at - period : at])
    return False, None


def _comes_after(witness: Witness, left: _Break, until: tuple[GroupKey, int]) -> bool:
    """Whether the rank left its pattern by an operation of the same group as ``until``, with a higher number.

    until   (group, sequence number) of a collective
    """
    (name, _), seq = until
    first = left.events[0]
    same = witness.signature(first.sig).group == name
    return same and first.seq > seq


def _described(witness: Witness, rank: int, left: _Break) -> Finding:
    came, due = left.events[0], left.due[0]
    skipped, extra = left.skipped, left.extra
    cause = "skipped" if skipped and (not extra or skipped <= extra) else "extra"
    period = len(left.due)
    line = (
        f"rank {rank} left the pattern of its earlier steps ({period} operation{'s' if period > 1 else ''} each): "
        f"{_place(witness, came, came.seq)} came where {_place(witness, due)} had come before ({witness.line(came.n)})"
    )
    if cause == "skipped":
        passed = f"{skipped} operations" if skipped > 1 else "it"
        also = ", or issues it later" if len(left.events) == 1 else ""
        line += f"; the rank left {passed} out{also}"
    elif extra:
        line += f"; after {extra} additional operation{'s' if extra > 1 else ''} it went on as before"
    evidence = [line, "all other ranks kept the pattern of their earlier steps"]
    if left.in_pattern:
        return Finding(cause, (rank,), confidence="likely", evidence=evidence)
    evidence.append(
        f"rank {rank} had not issued this operation in earlier steps: it may begin something rare, such as a "
        "checkpoint, that the others should have begun too"
    )
    return Finding(cause, suspects=(rank,), confidence="undecided", evidence=evidence)


def _place(witness: Witness, event: Event, seq: int = 0) -> str:
    """Format an operation with its number, group, module and call site: "all_reduce #41 in group dp of layers.0, …"."""
    signature = witness.signature(event.sig)
    layer = f" of {signature.layer}" if signature.layer else ""
    site = f", from {site}" if (site := witness.text(event.site)) else ""
    number = f" #{seq}" if seq else ""
    return f"{signature.op}{number} in group {signature.group}{layer}{site}"
