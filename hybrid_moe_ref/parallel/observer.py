"""The interface through which a communicator reports events: it calls an :class:`Observer` for each event, in order.

This file does not import torch, so that recorders and readers can use its types without importing torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol


class Collective(NamedTuple):
    """One collective as one rank issues it.

    The class is a tuple, because to create a frozen dataclass takes longer than to record the collective.

    group      name of the process group: "dp", "ep", "tp", ...
    op         all_reduce, all_gather_v, reduce_scatter_v, broadcast, barrier, ...
    layer      the module to which the collective belongs ("layers.0.moe"); "" if it belongs to the step as a whole
    sizes      for all_gather_v and reduce_scatter_v, the agreed rows of each group rank; for other operations, (numel,)
    dtype      element type of the data, such as "int32"
    reduce_op  sum, min or max; "" if nothing is reduced
    root       group rank of the root; -1 if there is no root
    """

    group: str
    op: str
    layer: str = ""
    sizes: tuple[int, ...] = ()
    dtype: str = ""
    reduce_op: str = ""
    root: int = -1


class ScheduleEntry(NamedTuple):
    """One planned collective of a step: the fields that must be equal on all ranks.

    They are also the first fields of `Collective`, so that the guard can compare an entry with a collective as tuples.
    """

    group: str
    op: str
    layer: str = ""


class Observer(Protocol):
    """Receives the events of one rank. The rank's main thread makes the calls.

    A call should take no longer than about a microsecond, because the rank waits for it.
    """

    def groups(self, members: Mapping[str, Sequence[int]]) -> None:
        """Receive the process groups to which this rank belongs. members: for each name, global ranks in group order"""

    def phase(self, name: str) -> None:
        """Called when the rank enters a phase of its start or service (load, page_setup, ..., serve)."""

    def begin_step(self, step: int, schedule: Sequence[ScheduleEntry], num_live: int) -> None:
        """Called when a step begins.

        schedule   the collectives that this rank will issue in the step
        num_live   how many requests of this rank are not finished
        """

    def enter(self, collective: Collective) -> None:
        """Called just before the collective is issued."""

    def leave(self, collective: Collective) -> None:
        """Called just after the collective completed."""

    def local(self, event: str, name: str, holder: int = -1) -> None:
        """Called when the rank does local work, because the other ranks can wait for the end of this work.

        event   lock_wait, lock_held, lock_freed, build_begin, build_end or heartbeat
        name    the lock or the build; for heartbeat, what the rank does
        holder  pid of the process that holds the lock; -1 if unknown
        """

    def done(self) -> None:
        """Called when the rank has finished all its work."""

    def failed(self, message: str) -> None:
        """Called when the rank stops with an error."""


class AsyncObserver(Observer, Protocol):
    """Receives asynchronous collectives, too: the rank issues them now and waits for them later.

    A point-to-point transfer is a ``Collective`` with op send or recv, and root = the peer's group rank.
    """

    def issue(self, collective: Collective) -> int:
        """Called just before an asynchronous collective is issued. Returns a number (ticket) that identifies it."""

    def wait(self, collective: Collective, ticket: int) -> None:
        """Called when the rank begins to wait for an asynchronous collective.

        If the rank waits for several coalesced collectives at once, this is called once for each of them.

        ticket: the number that `issue` returned for this collective
        """

    def finish(self, collective: Collective, ticket: int) -> None:
        """Called when an asynchronous collective for which the rank has waited is complete.

        ticket: the number that `issue` returned for this collective
        """


class NullObserver:
    """An observer that ignores all events."""

    def groups(self, members: Mapping[str, Sequence[int]]) -> None: ...
    def phase(self, name: str) -> None: ...
    def begin_step(self, step: int, schedule: Sequence[ScheduleEntry], num_live: int) -> None: ...
    def enter(self, collective: Collective) -> None: ...
    def leave(self, collective: Collective) -> None: ...
    def local(self, event: str, name: str, holder: int = -1) -> None: ...
    def done(self) -> None: ...
    def failed(self, message: str) -> None: ...
