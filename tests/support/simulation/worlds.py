"""What is so in a run, as the judge's positions and the witnesses show it, or as a simulation knows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from simulator import Simulation

from repro.trace.witness.file import Witness
from repro.trace.witness.format import Kind
from repro.verdict import Verdict
from repro.verdict.evidence.ledger import calls

Words = tuple[str, str, str]  # group, operation, layer


class World(Protocol):
    """What is so, by rank. A group is the one of that name in which the rank is."""

    def state(self, rank: int) -> str: ...
    def members(self, rank: int, group: str) -> tuple[int, ...]: ...
    def is_in(self, rank: int, group: str, seq: int) -> bool: ...
    def has_issued(self, rank: int, group: str, seq: int) -> bool: ...
    def has_left(self, rank: int, group: str, seq: int) -> bool: ...
    def holds_up(self, rank: int, group: str, seq: int) -> bool: ...
    def call(self, rank: int, group: str, seq: int) -> str: ...
    def issued_in(self, rank: int, step: int) -> list[Words] | None: ...
    def awaits_lock(self, rank: int, lock: str) -> bool: ...
    def holds(self, rank: int, lock: str) -> bool: ...


@dataclass
class Witnessed:
    """The world as the judge's positions and the witnesses show it."""

    verdict: Verdict
    witnesses: Mapping[int, Witness]

    def state(self, rank: int) -> str:
        return self.verdict.ranks[rank].state

    def members(self, rank: int, group: str) -> tuple[int, ...]:
        trace = self._group(rank, group)
        return trace.members if trace else ()

    def is_in(self, rank: int, group: str, seq: int) -> bool:
        at = self.verdict.ranks[rank]
        return at.state in ("blocked", "dead", "failed") and (at.group, at.seq) == (group, seq)

    def has_issued(self, rank: int, group: str, seq: int) -> bool:
        trace = self._group(rank, group)
        return trace is not None and trace.issued >= seq

    def has_left(self, rank: int, group: str, seq: int) -> bool:
        trace = self._group(rank, group)
        return trace is not None and trace.left >= seq

    def holds_up(self, rank: int, group: str, seq: int) -> bool:
        """Whether the others cannot complete the collective without it: it has not come, or went on from it."""
        return not self.is_in(rank, group, seq) and not self.has_left(rank, group, seq)

    def call(self, rank: int, group: str, seq: int) -> str:
        trace = self._group(rank, group)
        if trace is None:
            return ""
        found = next(calls(self.witnesses[rank], (trace.name, trace.members), seq), None)
        return _call(*found[3].signature[1:2], *found[3].signature[3:], found[3].sizes, found[3].root) if found else ""

    def issued_in(self, rank: int, step: int) -> list[Words] | None:
        witness = self.witnesses[rank]
        events = [e for e in witness.events() if e.kind in (Kind.ENTER, Kind.ISSUE) and e.step == step]
        signatures = [witness.signature(e.sig) for e in events]
        return [(s.group.split(":")[0] if s.op in ("send", "recv") else s.group, s.op, s.layer) for s in signatures]

    def awaits_lock(self, rank: int, lock: str) -> bool:
        at, last = self.verdict.ranks[rank], self.witnesses[rank].last
        if at.state == "locked":
            return at.detail == lock
        return at.state in ("dead", "failed") and last is not None

    def holds(self, rank: int, lock: str) -> bool:
        kinds = [
            event.kind
            for event in self.witnesses[rank].events()
            if event.kind in (Kind.LOCK_HELD, Kind.LOCK_FREED) and self.witnesses[rank].text(event.sig) == lock
        ]
        return not kinds or kinds[-1] == Kind.LOCK_HELD  # none: the system says so

    def _group(self, rank: int, group: str) -> Any:
        witness = self.witnesses.get(rank)
        return next((trace for trace in witness.groups if trace.name == group), None) if witness else None


@dataclass
class Simulated:
    """The world of a simulation, which has read no witness."""

    sim: Simulation

    def state(self, rank: int) -> str:
        each = self.sim.ranks[rank]
        if each.state != "running":
            return each.state
        return "running" if each.blocked is None else {"meeting": "blocked", "lock": "locked"}[each.blocked[0]]

    def members(self, rank: int, group: str) -> tuple[int, ...]:
        return self._key(rank, group)[1]

    def is_in(self, rank: int, group: str, seq: int) -> bool:
        each = self.sim.ranks[rank]
        if each.state in ("dead", "failed"):
            return self.has_issued(rank, group, seq) and not self.has_left(rank, group, seq)
        return bool(each.blocked) and each.blocked[:1] == ("meeting",) and each.blocked[1][:2] == (
            self._key(rank, group), seq,
        )  # fmt: skip

    def has_issued(self, rank: int, group: str, seq: int) -> bool:
        channel = self.sim.channels.get(self._key(rank, group))
        return channel is not None and channel.issued.get(rank, 0) >= seq

    def has_left(self, rank: int, group: str, seq: int) -> bool:
        channel = self.sim.channels.get(self._key(rank, group))
        return channel is not None and any(rank in left for left in channel.left[seq - 1 :])

    def holds_up(self, rank: int, group: str, seq: int) -> bool:
        return not self.has_issued(rank, group, seq)

    def call(self, rank: int, group: str, seq: int) -> str:
        call, _ = self.sim.channels[self._key(rank, group)].calls[seq - 1][rank]
        return _call(call.op, call.dtype, call.reduce_op, call.sizes, call.root)

    def issued_in(self, rank: int, step: int) -> list[Words] | None:
        return [
            (call.group, call.op, call.layer)
            for channel in self.sim.channels.values()
            for meeting in channel.calls
            if rank in meeting
            for call, number in [meeting[rank]]
            if number == step
        ]

    def awaits_lock(self, rank: int, lock: str) -> bool:
        each = self.sim.ranks[rank]
        return each.state in ("dead", "failed") or each.blocked == ("lock", lock)

    def holds(self, rank: int, lock: str) -> bool:
        return self.sim.locks.get(lock) == rank

    def _key(self, rank: int, group: str) -> tuple[str, tuple[int, ...]]:
        if ">" in group:
            return group, tuple(map(int, group.partition(":")[2].split(">")))
        return group, self.sim._of_rank[rank].get(group, ())


def _call(op: str, dtype: str, reduce_op: str, sizes: tuple[int, ...], root: int) -> str:
    parts = [op, dtype, reduce_op, f"sizes {list(sizes)}" if sizes else "", f"root {root}" if root >= 0 else ""]
    return " ".join(part for part in parts if part)
