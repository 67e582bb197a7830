"""Follow the witnesses of a live run: open each witness as soon as it exists, and poll all of them often."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from repro.store.run_dir import RunDir
from repro.trace.witness.file import Tail, Witness
from repro.trace.witness.format import Event, Identity, Kind
from repro.trace.witness.parse import WitnessError


class Tails:
    """The open witnesses of a run, one :class:`Tail` per rank.

    here   the process that follows the witnesses. The methods whose names end in _ns return times on the monotonic
           clock of this process's host. But the witnesses that :meth:`read` returns have the times of their own hosts
    """

    def __init__(self, run_dir: RunDir, num_ranks: int, here: Identity) -> None:
        self._run_dir, self._num_ranks, self._here = run_dir, num_ranks, here
        self._tails: dict[int, Tail] = {}

    def open(self) -> None:
        """Open the witnesses that are not open yet. If a witness cannot be opened, only :meth:`read` reports this."""
        for rank in range(self._num_ranks):
            with contextlib.suppress(OSError, WitnessError):
                self._opened(rank)

    def opened(self) -> list[Tail]:
        """Return the open witnesses, by rank."""
        return [self._tails[rank] for rank in sorted(self._tails)]

    def writers(self) -> dict[int, Identity]:
        """Return, for each rank whose witness is open, the process that writes this witness."""
        return {rank: tail.writer() for rank, tail in self._tails.items()}

    def read(self, ranks: Iterable[int] | None = None) -> tuple[dict[int, Witness], list[str]]:
        """Read the witnesses of these ranks; of all ranks if ``ranks`` is None.

        Returns a dict from rank to witness, and a line for each witness that could not be read.
        """
        witnesses: dict[int, Witness] = {}
        refused = []
        for rank in range(self._num_ranks) if ranks is None else ranks:
            try:
                witnesses[rank] = self._opened(rank).witness()
            except (OSError, WitnessError) as error:
                refused.append(self._run_dir.describe(error))
        return witnesses, refused

    def all_done(self) -> bool:
        """Whether every rank has recorded that all its work is done."""
        return len(self._tails) == self._num_ranks and all(self._last_is(Kind.DONE))

    def done(self) -> set[int]:
        """Return the ranks that have recorded that all their work is done."""
        events = ((rank, tail.last_event()) for rank, tail in self._tails.items())
        return {rank for rank, event in events if event is not None and event.kind == Kind.DONE}

    def any_failed(self) -> bool:
        """Whether a rank has recorded that it failed with an error."""
        return any(self._last_is(Kind.FAILED))

    def last_event_ns(self) -> int:
        """Return the time of the latest event of any rank, in ns on the clock of this host; 0 if there is none.

        Heartbeats are no events.
        """
        return max((self._here_ns(tail, tail.last_event_ns()) for tail in self._tails.values()), default=0)

    def heartbeat_ns(self) -> int:
        """Return the time of the latest heartbeat of any rank, in ns on the clock of this host; 0 if there is none."""
        return max((self._here_ns(tail, tail.heartbeat_ns()) for tail in self._tails.values()), default=0)

    def waiting_since_ns(self) -> int:
        """Return the begin of the longest present wait of a rank, in ns on the clock of this host; 0 if none waits.

        A rank waits for a collective or for a lock.
        """
        events = ((tail, tail.last_event()) for tail in self._tails.values())
        waits = (Kind.ENTER, Kind.WAIT, Kind.LOCK_WAIT)
        since = (self._here_ns(tail, event.t_ns) for tail, event in events if event is not None and event.kind in waits)
        return min(since, default=0)

    def _opened(self, rank: int) -> Tail:
        if rank not in self._tails:
            self._tails[rank] = Tail(self._run_dir.witness(rank))
        return self._tails[rank]

    def _last_is(self, kind: Kind) -> list[bool]:
        events: list[Event | None] = [tail.last_event() for tail in self._tails.values()]
        return [event is not None and event.kind == kind for event in events]

    def _here_ns(self, tail: Tail, then_ns: int) -> int:
        return then_ns and then_ns + self._here.clock_ahead_ns(tail.writer())
