"""Find the rank that left the rhythm which all ranks of a job kept in every earlier step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from repro.trace.knowledge import Knows
from repro.trace.observed import Call, GroupRecord, RecorderDump
from repro.trace.operations import Form
from repro.verdict.partial.scene import Scene
from repro.verdict.partial.words import program_frames

MIN_REPEATS = 2
MIN_COVERED = 8
MAX_PERIOD = 512
HISTORY = 2048


@dataclass(frozen=True, slots=True)
class HabitBreak:
    """The rank that left the rhythm. `kind` is extra or skipped, whichever changes fewer operations.

    convincing   an operation with the same arguments stands in the rhythm at another place; else the rank may have
                 begun something rare (a checkpoint, an evaluation) that the others should have begun too
    """

    rank: int
    kind: str
    sentence: str
    convincing: bool


@dataclass(frozen=True, slots=True)
class _Rhythm:
    """One rank's operations up to the first unfinished one: `keys` repeat with `period`; `due` was to come now."""

    keys: tuple[tuple[str, str, str], ...]  # (group, operation, place in the program) of one period, the due one first
    arguments: frozenset[tuple[object, ...]]  # (group, operation, sizes, types) of that period
    call: Call
    key: tuple[str, str, str]
    period: int

    @property
    def kept(self) -> bool:
        return self.key == self.keys[0]


def left_rhythm(scene: Scene, waits: Sequence[tuple[int, Call]]) -> HabitBreak | None:
    """Who issued something else than the rhythm of its own earlier operations demands, if exactly one rank did and all
    others that wait kept the same rhythm. None if the evidence does not show it.
    """
    broken: dict[int, _Rhythm] = {}
    kept: list[_Rhythm] = []
    ranks = sorted({rank for rank, _ in waits})
    framed = all(call.frames for _, call in waits)
    for rank in ranks:
        rhythm = _rhythm_of(scene.recorders[rank], framed) if rank in scene.recorders else None
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
    return _described(scene, rank, rhythm)


def _described(scene: Scene, rank: int, rhythm: _Rhythm) -> HabitBreak:
    call, (group, due, _), group_of_call = rhythm.call, rhythm.keys[0], rhythm.key[0]
    following = rhythm.keys[1 % len(rhythm.keys)][:2]
    kind = "skipped" if rhythm.key[:2] == following else "extra"
    site = program_frames(call.frames) or _site_in_stack(scene, rank)
    where = f", from {site}" if site else ""
    number = f" #{call.seq}" if call.seq is not None else ""
    passed = f"it passed over {due} of group {group}, or issues it later" if kind == "skipped" else "an extra operation"
    sentence = (
        f"Rank {rank} left the rhythm of its earlier steps ({rhythm.period} operations each): {call.op}{number} came "
        f"where {due} of group {group} came before{where}: {passed} ({call.source}). The other ranks kept theirs."
    )
    known = Knows.ARGUMENTS in scene.recorders[rank].knows
    return HabitBreak(rank, kind, sentence, known and (group_of_call, *call.arguments) in rhythm.arguments)


def _rhythm_of(dump: RecorderDump, framed: bool) -> _Rhythm | None:
    """`framed`: tell operations apart by their place in the program too, which all dumps then have to record."""
    ordered = dump.newest(HISTORY)
    names = {id(record): [_name(record, form, framed) for form in record.calls.forms] for record in dump.groups}
    keys = [names[id(record)][record.calls.form[place]] for record, place in ordered]
    pending = next((i for i, (record, place) in enumerate(ordered) if not record.calls.done[place]), None)
    if pending is None:
        return None
    period = _period(keys[:pending])
    if period is None:
        return None
    last = slice(pending - period, pending)
    arguments = frozenset((record.group.name, *record.calls[place].arguments) for record, place in ordered[last])
    record, place = ordered[pending]
    return _Rhythm(tuple(keys[last]), arguments, record.calls[place], keys[pending], period)


def _name(record: GroupRecord, form: Form, framed: bool) -> tuple[str, str, str]:
    """What distinguishes an operation in a rhythm: its group, its name, and its place in the program."""
    return record.group.name, form.op, program_frames(form.frames, 1) if framed else ""


def _period(past: Sequence[object]) -> int | None:
    """The period that explains the longest end of the history, if that end holds MIN_REPEATS periods, MIN_COVERED
    operations and half of the history. What a job does once at its start has no period.
    """
    best, covered = None, 0
    for period in range(1, min(MAX_PERIOD, len(past) // MIN_REPEATS) + 1):
        length = period
        while length < len(past) and past[-1 - length] == past[-1 - length + period]:
            length += 1
        if length > covered and length >= MIN_REPEATS * period:
            best, covered = period, length
        if covered == len(past):
            break
    return best if covered >= MIN_COVERED and covered * 2 >= len(past) else None


def _site_in_stack(scene: Scene, rank: int) -> str:
    """Where a stack of that rank stands, if it is inside a collective."""
    stacks = scene.main_stacks().get(rank, [])
    return program_frames(stacks[-1].frames, 3) if stacks and stacks[-1].activity == "collective" else ""
