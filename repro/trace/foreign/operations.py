"""The operations that one rank queued in one group. They are stored in columns, because a job of a thousand ranks has
millions of operations."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple, overload

TRANSFERS = ("send", "recv")
NO_NUMBER = -1
"""The value in the column of sequence numbers for an operation without a sequence number."""


class Source(NamedTuple):
    """The place in a file of evidence from which a record was read.

    line    "line 88"; "" for a dump
    entry   for a Flight Recorder dump: the number of the entry in the dump; None for other files
    """

    file: str
    line: str = ""
    entry: int | None = None

    @property
    def place(self) -> str:
        return self.line if self.entry is None else f"entry {self.entry}"

    def __str__(self) -> str:
        return f"{self.file} {self.place}".rstrip()


NOWHERE = Source("")


@dataclass(frozen=True, slots=True)
class Group:
    """A process group as the evidence names it. `members` are global ranks; () if the evidence lists none."""

    name: str
    description: str = ""
    members: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.description and self.description != "undefined":
            return self.description
        return f"group {self.name}" if self.name else "its group"


class Call(NamedTuple):
    """One operation of a process group, as one rank queued it.

    op          torch.distributed's name: all_reduce, all_gather, reduce_scatter, broadcast, all_to_all, barrier, send,
                recv
    seq         number of the collective in its group; None for a send or receive, or if the tool prints no number
    sizes       shapes of the inputs, then of the outputs, one tuple per tensor
    dtypes      data types of the inputs, then of the outputs
    peer        for send and recv: the global rank of the other end
    frames      "function (file:line)", innermost first; () if no stack was recorded
    done        whether the evidence shows that the operation is complete
    at_s        when the operation was queued, in seconds since the start of the year, in the time zone of the evidence
                (a Flight Recorder dump: UTC); None if unknown
    """

    op: str
    seq: int | None
    sizes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    peer: int | None = None
    frames: tuple[str, ...] = ()
    done: bool = False
    at_s: float | None = None
    source: Source = NOWHERE

    @property
    def is_transfer(self) -> bool:
        return self.op in TRANSFERS

    @property
    def arguments(self) -> tuple[object, ...]:
        """Return the operation, its sizes and its data types, which must be equal on all members of the group."""
        return self.op, self.sizes, self.dtypes


class Form(NamedTuple):
    """The fields of a `Call` that are equal in many operations. They are stored only once, to save memory."""

    op: str
    sizes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    peer: int | None = None
    frames: tuple[str, ...] = ()

    @property
    def is_transfer(self) -> bool:
        return self.op in TRANSFERS


class Calls(Sequence[Call]):
    """The operations of one rank in one group, oldest first: a sequence of `Call`, which is stored in columns.

    forms    each different `Form` (name, sizes, data types, peer and stack of an operation) once
    form     for each operation: its index into `forms`; array of type "I"
    seqs     for each operation: its sequence number, or NO_NUMBER; array of type "q"
    done     for each operation: one byte, 1 if the operation is complete
    times_s  for each operation: when it was queued (`Call.at_s`), or NaN; array of type "d"
    entries  for each operation: the number of its entry in the dump `file`; array of type "q"
    """

    __slots__ = ("done", "entries", "file", "form", "forms", "seqs", "times_s")

    def __init__(
        self,
        forms: tuple[Form, ...],
        form: array[int],
        seqs: array[int],
        done: bytes,
        times_s: array[float],
        entries: array[int],
        file: str,
    ) -> None:
        self.forms, self.form, self.seqs, self.done = forms, form, seqs, done
        self.times_s, self.entries, self.file = times_s, entries, file

    def __len__(self) -> int:
        return len(self.form)

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> list[Call]: ...
    def __getitem__(self, index: int | slice) -> Call | list[Call]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        form, seq, at_s = self.forms[self.form[index]], self.seqs[index], self.times_s[index]
        return Call(
            form.op,
            None if seq == NO_NUMBER else seq,
            form.sizes,
            form.dtypes,
            form.peer,
            form.frames,
            bool(self.done[index]),
            None if math.isnan(at_s) else at_s,
            Source(self.file, "", self.entries[index]),
        )

    @property
    def pending(self) -> int | None:
        """Return the index of the oldest operation that is not complete; None if all are complete."""
        place = self.done.find(0)
        return None if place < 0 else place

    def unfinished(self) -> list[int]:
        """Return at most two indices: the oldest incomplete collective, and the oldest incomplete send or receive."""
        oldest: dict[bool, int] = {}
        place = self.done.find(0)
        while place >= 0 and len(oldest) < 2:
            oldest.setdefault(self.forms[self.form[place]].is_transfer, place)
            place = self.done.find(0, place + 1)
        return list(oldest.values())

    @property
    def has_transfers(self) -> bool:
        return any(form.is_transfer for form in self.forms)

    def ops(self) -> Iterator[str]:
        """Yield the name of each operation, oldest first: "all_reduce", "send"."""
        return (self.forms[form].op for form in self.form)

    def numbered(self, seq: int) -> list[Call]:
        """Return the operations whose sequence number is ``seq``."""
        return [self[place] for place, number in enumerate(self.seqs) if number == seq]

    def transfers(self, op: str, peer: int) -> list[int]:
        """Return the indices of the sends to the rank ``peer``, or of the receives from ``peer``. op: send or recv."""
        wanted = [form.op == op and form.peer == peer for form in self.forms]
        return [place for place, form in enumerate(self.form) if wanted[form]] if any(wanted) else []

    def times_by_number(self) -> dict[int, float]:
        """Return, for each sequence number, the time in s at which the operation was queued.

        Operations that have no number or no time are left out.
        """
        rows = zip(self.seqs, self.times_s, strict=True)
        return {seq: at_s for seq, at_s in rows if seq != NO_NUMBER and not math.isnan(at_s)}

    def last_number(self, *, done: bool = False, where: Callable[[Form], bool] | None = None) -> int | None:
        """Return the highest sequence number of these operations; None if none of them has a number.

        done    if True, only complete operations count
        where   a function of an operation's `Form`. If it is given, an operation counts only if it returns True
        """
        seqs: Iterator[int] | array[int] = self.seqs
        if where is not None:
            wanted = bytes(map(where, self.forms))
            chosen = map(wanted.__getitem__, self.form)
            seqs = compress(self.seqs, map(int.__and__, chosen, self.done) if done else chosen)
        elif done:
            seqs = compress(self.seqs, self.done)
        highest = max(seqs, default=NO_NUMBER)
        return None if highest == NO_NUMBER else highest


NO_CALLS = Calls((), array("I"), array("q"), b"", array("d"), array("q"), "")
