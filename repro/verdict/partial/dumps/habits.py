"""Find the rank that left a repeating pattern of operations. All waiting ranks followed this pattern before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from repro.trace.foreign.operations import Form
from repro.trace.foreign.records import Call, GroupRecord, RecorderDump
from repro.trace.knowledge import Knows
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.words import program_frames
from repro.verdict.period import period_of

HISTORY = 2048


@dataclass(frozen=True, slots=True)
class HabitBreak:
    """A rank that left the repeating pattern of its operations, and how it did so.

    kind         "skipped" if the rank left out one operation and issued the next one of the pattern; otherwise "extra"
    sentence     a line of evidence that says where the rank left the pattern
    convincing   whether the pattern contains the operation that the rank issued, with the same arguments. If not, the
                 rank is no culprit: perhaps it rightly began something rare (a checkpoint, an evaluation) that the
                 other ranks left out
    """

    rank: int
    kind: str
    sentence: str
    convincing: bool


@dataclass(frozen=True, slots=True)
class _Rhythm:
    """The repeating pattern of one rank's operations, and the rank's first unfinished operation.

    keys        the operations of one period, each as (group, operation, call site). The first one is the operation
                that the pattern predicts in place of ``call``
    arguments   the operations of the same period, each as (group, operation, sizes, data types)
    call        the unfinished operation
    key         (group, operation, call site) of ``call``
    period      number of operations in a period
    """

    keys: tuple[tuple[str, str, str], ...]
    arguments: frozenset[tuple[object, ...]]
    call: Call
    key: tuple[str, str, str]
    period: int

    @property
    def kept(self) -> bool:
        return self.key == self.keys[0]


def left_rhythm(job: JobRecords, waits: Sequence[tuple[int, Call]]) -> HabitBreak | None:
    """Find the waiting rank whose unfinished operation is not the one that the rank's earlier operations predict.

    waits   (rank, the operation in which the rank waits), for each waiting rank

    Return this rank only if all other waiting ranks kept their patterns, and the patterns of all waiting ranks consist
    of the same operations. Otherwise return None.
    """
    broken: dict[int, _Rhythm] = {}
    kept: list[_Rhythm] = []
    ranks = sorted({rank for rank, _ in waits})
    framed = all(call.frames for _, call in waits)
    for rank in ranks:
        rhythm = _rhythm_of(job.recorders[rank], framed) if rank in job.recorders else None
        if rhythm is None:
            return None
        if rhythm.kept:
            kept.append(rhythm)
        else:
            broken[rank] = rhythm
    if len(broken) != 1 or not kept:
        return None
    rank, rhythm = next(iter(broken.items()))
    if any(sorted(other.keys) != sorted(rhythm.keys) for other in kept):
        return None
    return _described(job, rank, rhythm)


def _described(job: JobRecords, rank: int, rhythm: _Rhythm) -> HabitBreak:
    call, (group, due, _), group_of_call = rhythm.call, rhythm.keys[0], rhythm.key[0]
    following = rhythm.keys[1 % len(rhythm.keys)][:2]
    kind = "skipped" if rhythm.key[:2] == following else "extra"
    site = program_frames(call.frames) or _site_in_stack(job, rank)
    where = f", from {site}" if site else ""
    number = f" #{call.seq}" if call.seq is not None else ""
    passed = (
        (f"rank {rank} skipped {due} of group {group}, or issues it later")
        if kind == "skipped"
        else "an extra operation"
    )
    sentence = (
        f"Rank {rank} left the pattern of its earlier steps ({rhythm.period} operations each): it issued "
        f"{call.op}{number} where {due} of group {group} came before{where}: {passed} ({call.source}). The other ranks "
        "kept their pattern."
    )
    known = Knows.ARGUMENTS in job.recorders[rank].knows
    return HabitBreak(rank, kind, sentence, known and (group_of_call, *call.arguments) in rhythm.arguments)


def _rhythm_of(dump: RecorderDump, framed: bool) -> _Rhythm | None:
    """Find the repeating pattern of the operations in a dump. None if there is no pattern or no unfinished operation.

    framed   whether operations with different call sites count as different
    """
    ordered = dump.newest(HISTORY)
    names = {id(record): [_name(record, form, framed) for form in record.calls.forms] for record in dump.groups}
    keys = [names[id(record)][record.calls.form[place]] for record, place in ordered]
    pending = next((i for i, (record, place) in enumerate(ordered) if not record.calls.done[place]), None)
    if pending is None:
        return None
    period = period_of(keys[:pending])
    if period is None:
        return None
    last = slice(pending - period, pending)
    arguments = frozenset((record.group.name, *record.calls[place].arguments) for record, place in ordered[last])
    record, place = ordered[pending]
    return _Rhythm(tuple(keys[last]), arguments, record.calls[place], keys[pending], period)


def _name(record: GroupRecord, form: Form, framed: bool) -> tuple[str, str, str]:
    """Return (group, operation, call site) for a call, by which calls are compared.

    If not ``framed``, the call site is "", so that it is not compared.
    """
    return record.group.name, form.op, program_frames(form.frames, 1) if framed else ""


def _site_in_stack(job: JobRecords, rank: int) -> str:
    """Return the call site of the collective in which a rank's stack is; "" if the stack is in no collective."""
    stacks = job.main_stacks().get(rank, [])
    return program_frames(stacks[-1].frames, 3) if stacks and stacks[-1].activity == "collective" else ""
