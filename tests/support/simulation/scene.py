"""Ranks without processes: real recorders on byte arrays with one simulated clock. A test says what they record."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from repro.trace.knowledge import WITNESS, Knows
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.file import Witness, parse
from repro.trace.witness.format import Geometry, Identity, pack_header

SMALL = Geometry(ring_records=512, vector_words=512, string_bytes=16_384, group_slots=16)
MS = 1_000_000


def make_recorder(
    rank: int,
    num_ranks: int,
    clock: Any,
    shape: Geometry = SMALL,
    run_id: str = "test",
    host: int = 0,
    skew_ns: int = 0,
    path: Path | None = None,
    knows: Knows = WITNESS,
) -> tuple[bytearray | mmap.mmap, Recorder]:
    """Make a recorder on a byte array, or on a file. ``host`` and the ``skew_ns`` of its clock go into the header."""
    writer = Identity(
        rank, num_ranks, run_id, f"host{host}", f"boot{host}", 100 + rank, wall_offset_ns=10**18 - skew_ns, knows=knows
    )
    buffer: bytearray | mmap.mmap = bytearray(shape.file_bytes)
    if path is not None:
        path.write_bytes(buffer)
        with path.open("r+b") as file:
            buffer = mmap.mmap(file.fileno(), 0)
    header = pack_header(writer, shape)
    buffer[: len(header)] = header
    return buffer, Recorder(buffer, writer, shape, clock=clock)


class Scene:
    """Ranks that record what a test tells them to record, a tenth of a millisecond apart."""

    def __init__(
        self, num_ranks: int, groups: Mapping[str, Sequence[int]], *, shape: Geometry = SMALL, run_id: str = "test"
    ) -> None:
        self.num_ranks = num_ranks
        self.now_ns = 1_000 * MS
        self.files: list[Any] = []
        self.recorders: list[Recorder] = []
        for rank in range(num_ranks):
            buffer, recorder = make_recorder(rank, num_ranks, self._tick, shape, run_id)
            recorder.groups({name: members for name, members in groups.items() if rank in members})
            self.files.append(buffer)
            self.recorders.append(recorder)

    def _tick(self) -> int:
        self.now_ns += MS // 10
        return self.now_ns

    def phase(self, name: str) -> None:
        for recorder in self.recorders:
            recorder.phase(name)

    def begin_step(
        self, step: int, schedule: Sequence[ScheduleEntry], live: Sequence[int] = (), ranks: Iterable[int] | None = None
    ) -> None:
        for rank in range(self.num_ranks) if ranks is None else ranks:
            self.recorders[rank].begin_step(step, tuple(schedule), int(rank in live))

    def enter(self, ranks: Iterable[int], call: Collective) -> None:
        for rank in ranks:
            self.recorders[rank].enter(call)

    def leave(self, ranks: Iterable[int], call: Collective) -> None:
        for rank in ranks:
            self.recorders[rank].leave(call)

    def all_of(self, ranks: Sequence[int], call: Collective) -> None:
        self.enter(ranks, call)
        self.leave(ranks, call)

    def witnesses(self) -> dict[int, Witness]:
        return {rank: parse(bytes(data), f"rank{rank:03d}.wit") for rank, data in enumerate(self.files)}
