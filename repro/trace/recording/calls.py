"""What the recorder keeps in memory for each group and each call site.

The part of a record that is equal in all events of a call site is packed only once. So recording an event takes about a
microsecond.
"""

from __future__ import annotations

from collections.abc import Callable
from zlib import crc32

from hybrid_moe_ref.parallel.observer import ScheduleEntry
from repro.trace.witness.format import (
    FIXED,
    GROUP_BYTES,
    GROUPS_AT,
    LAST_AT,
    LEFT_AT,
    NO_GROUP,
    RESIDUE,
    SPARE_AT,
    WORD,
    Kind,
)


def sealed_part(*fields: int) -> tuple[bytes, int]:
    """Pack the part of a record that is equal in all events of one call site.

    fields: the first seven fields of `Event`, in its order: aux, num_sizes, sig, site, phase, group, kind

    Returns the packed bytes and their CRC-32, from which the checksum of the whole record is computed later.
    """
    fixed = FIXED.pack(*fields)
    return fixed, crc32(fixed, RESIDUE)


class Group:
    """The counters of one process group on this rank, and where the witness stores the group's progress (its slot).

    index      index of the slot; NO_GROUP if the file has none left
    last       offset in the file of the slot's copy of the event that issued the group's last collective
    left_word  where the slot stores the number of the last completed collective: its offset in 8-byte words
    seq, left  sequence numbers of the last issued and of the last completed collective
    hash       rolling hash of all collectives that the rank has issued in the group
    """

    __slots__ = ("hash", "index", "last", "left", "left_word", "seq")

    def __init__(self, index: int) -> None:
        slot = SPARE_AT if index == NO_GROUP else GROUPS_AT + index * GROUP_BYTES
        self.index = index
        self.last = slot + LAST_AT
        self.left_word = (slot + LEFT_AT) // WORD.size
        self.seq = 0
        self.left = 0
        self.hash = 0


class Call:
    """A collective at one call site in one phase.

    enter, leave, issue, wait   for each of these four kinds of record: the part of the record that is equal in all
                                events of this call site, and the CRC-32 of this part (the result of `sealed_part`)
    """

    __slots__ = ("digest", "enter", "entry", "group", "issue", "leave", "num_sizes", "wait")

    def __init__(
        self,
        group: Group,
        digest: bytes,
        num_sizes: int,
        entry: ScheduleEntry,
        fixed: Callable[[int], tuple[bytes, int]],
    ) -> None:
        self.group = group
        self.digest = digest
        self.num_sizes = num_sizes
        self.entry = entry
        self.enter, self.leave, self.issue, self.wait = map(fixed, (Kind.ENTER, Kind.LEAVE, Kind.ISSUE, Kind.WAIT))
