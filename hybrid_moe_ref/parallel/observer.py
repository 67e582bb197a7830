"""How a communicator reports what it does: it calls an :class:`Observer` for every event, in order.

This file imports nothing heavy, so that recorders and readers can use its words without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol


class Collective(NamedTuple):
    """One collective as one rank issues it. A tuple, since to make a frozen dataclass costs more than to record it.

    group      name of the process group: "dp", "ep", "tp", ...
    op         all_reduce, all_gather_v, reduce_scatter_v, broadcast, barrier, ...
    layer      the module it belongs to ("layers.0.moe"), or "" for the step as a whole
    sizes      rows per group rank for the -v ops (the *agreed* vector, uneven is legal), else (numel,)
    dtype      element type of the payload, e.g. "int32"
    reduce_op  sum, min, max, or "" where nothing is reduced
    root       group rank of the root, or -1
    """

    group: str
    op: str
    layer: str = ""
    sizes: tuple[int, ...] = ()
    dtype: str = ""
    reduce_op: str = ""
    root: int = -1


class ScheduleEntry(NamedTuple):
    """One collective that a step is planned to issue: the part of it that all ranks must share. Its fields are the
    first ones of `Collective`, so that the guard compares the two as tuples."""

    group: str
    op: str
    layer: str = ""


class Observer(Protocol):
    """Hears what one rank does. Calls come from the rank's main thread and must cost about a microsecond."""

    def groups(self, members: Mapping[str, Sequence[int]]) -> None:
        """The process groups this rank belongs to: name -> global ranks in group order."""

    def phase(self, name: str) -> None:
        """The rank enters a life-cycle phase (load, page_setup, prepare, profile, ..., serve)."""

    def begin_step(self, step: int, schedule: Sequence[ScheduleEntry], num_live: int) -> None:
        """A step begins; ``schedule`` is what the plan says it will issue, ``num_live`` its live requests."""

    def enter(self, collective: Collective) -> None:
        """Just before the collective is issued."""

    def leave(self, collective: Collective) -> None:
        """Just after it completed."""

    def local(self, event: str, name: str, holder: int = -1) -> None:
        """Rank-local work that others may wait for.

        event is lock_wait, lock_held, lock_freed, build_begin, build_end or heartbeat; name is the lock or
        build; holder is the pid that holds the lock where it is known, else -1.
        """

    def done(self) -> None:
        """The rank finished all its work."""

    def failed(self, message: str) -> None:
        """The rank stops with an error."""


class AsyncObserver(Observer, Protocol):
    """Hears also of collectives that the rank does not wait for where it issues them.

    Point to point needs no more than ``Collective``: op send or recv, root = the peer's group rank.
    """

    def issue(self, collective: Collective) -> int:
        """Just before an asynchronous collective is issued; returns a ticket that names it from here on."""

    def wait(self, collective: Collective, ticket: int) -> None:
        """The rank begins to wait for the collective of ``ticket``; coalesced ones are waited for in turn."""

    def finish(self, collective: Collective, ticket: int) -> None:
        """The collective of ``ticket`` completed, as the rank learnt after its wait."""


class NullObserver:
    """Hears everything and does nothing."""

    def groups(self, members: Mapping[str, Sequence[int]]) -> None: ...
    def phase(self, name: str) -> None: ...
    def begin_step(self, step: int, schedule: Sequence[ScheduleEntry], num_live: int) -> None: ...
    def enter(self, collective: Collective) -> None: ...
    def leave(self, collective: Collective) -> None: ...
    def local(self, event: str, name: str, holder: int = -1) -> None: ...
    def done(self) -> None: ...
    def failed(self, message: str) -> None: ...
