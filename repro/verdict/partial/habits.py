"""Find the rank that left the rhythm which all ranks of a job kept in every earlier step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from repro.trace.observed import Call, RecorderDump
from repro.verdict.partial.scene import Scene
from repro.verdict.partial.words import program_frames

MIN_REPEATS = 2
MAX_PERIOD = 512
HISTORY = 2048


@dataclass(frozen=True, slots=True)
class HabitBreak:
    """The rank that left the rhythm. `kind` is extra or skipped, whichever changes fewer operations.

    convincing   its operation stands in the rhythm at another place, or comes from a line that no rank used before;
                 else it may begin something new that the others should have begun too
    """

    rank: int
    kind: str
    sentence: str
    convincing: bool


@dataclass(frozen=True, slots=True)
class _Rhythm:
    """One rank's operations up to the first unfinished one: `keys` repeat with `period`; `due` was to come now."""

    keys: tuple[tuple[str, str, str], ...]  # (group, operation, place in the program) of one period, the due one first
    call: Call
    key: tuple[str, str, str]
    period: int

    @property
    def kept(self) -> bool:
        return self.key == self.keys[0]


def left_rhythm(scene: Scene, waits: Sequence[tuple[int, Call]]) -> HabitBreak | None:
    """Who issued something else than the rhythm of its own earlier operations demands, if exactly one rank did and all
    others that wait kept the same rhythm. None where that cannot be told.
    """
    broken: dict[int, _Rhythm] = {}
    kept: list[_Rhythm] = []
    for rank in sorted({rank for rank, _ in waits}):
        rhythm = _rhythm_of(scene.recorders[rank]) if rank in scene.recorders else None
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
    call, (group, due, _) = rhythm.call, rhythm.keys[0]
    later = rhythm.keys.index(rhythm.key) if rhythm.key in rhythm.keys else None
    kind = "skipped" if later is not None and later <= 1 else "extra"
    site = program_frames(call.frames) or _site_in_stack(scene, rank)
    where = f", from {site}" if site else ""
    number = f" #{call.seq}" if call.seq is not None else ""
    passed = f"it passed over {due} of group {group}" if kind == "skipped" else "an extra operation"
    sentence = (
        f"Rank {rank} left the rhythm of its earlier steps ({rhythm.period} operations each): {call.op}{number} came "
        f"where {due} of group {group} came before{where}: {passed} ({call.source}). The other ranks kept theirs."
    )
    return HabitBreak(rank, kind, sentence, later is not None or bool(call.frames))


def _rhythm_of(dump: RecorderDump) -> _Rhythm | None:
    ordered = [(dump.groups[g].group.name, dump.groups[g].calls[c]) for g, c in dump.order][-HISTORY:]
    keys = [(name, call.op, program_frames(call.frames, 1)) for name, call in ordered]
    pending = next((i for i, (_, call) in enumerate(ordered) if not call.done), None)
    if pending is None:
        return None
    past = keys[:pending]
    for period in range(1, min(MAX_PERIOD, len(past) // MIN_REPEATS) + 1):
        if all(past[i] == past[i - period] for i in range(period, len(past))):
            due = tuple(past[len(past) - period :])
            return _Rhythm(due, ordered[pending][1], keys[pending], period)
    return None


def _site_in_stack(scene: Scene, rank: int) -> str:
    """Where a stack of that rank stands, if it is inside a collective."""
    stacks = scene.main_stacks().get(rank, [])
    return program_frames(stacks[-1].frames, 3) if stacks and stacks[-1].activity == "collective" else ""
