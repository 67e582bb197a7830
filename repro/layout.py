"""The bytes of a witness file: what one rank writes and what its readers trust.

A witness is one preallocated file per rank, mapped into the rank's memory, so that a record costs a store and
outlives SIGKILL. Little-endian, no padding beyond what is shown. Version 2::

    0      HEADER   who writes: identity, clocks, geometry; ends in a CRC-32 of itself; written once
    512    LIVE     num_events u64                           how far the ring is whole, for cheap polling
    528    HEART    last_heartbeat_ns u64, name u32, count u32   heartbeats never enter the ring
    640    SPARE    128 bytes that groups beyond the slots share; nobody reads them
    1024   GROUPS   group_slots x 128 bytes: the last event of each group, which survives ring wrap
    ...    RING     ring_records x 72 bytes; event n (from 1) lies in slot (n - 1) % ring_records
    ...    VECTORS  vector_words x i64, a ring of size vectors: [offset + 1, size, size, ...]
    ...    STRINGS  string_bytes: u32 length + UTF-8, one after another; id k is the k-th (id 0 is "")

A record starts with its event number and ends with the low half of it, and is written in that order: a record
whose two ends differ is torn. The order of writing one event is string, vector, ring, the group's hash and last
record or its last completion, LIVE; a reader
copies the file front to back, so that whatever a record refers to is in the copy. A string's length is written
after its bytes, a vector's head before its sizes: both are seen whole or not at all.

The hash of a group is crc32(d, hash), zlib's CRC-32 from 0 on, over all collectives that the rank issued in it; d is
the CRC-32 of the signature's text (group, op, layer, dtype, reduce_op, joined by SEPARATOR) in four bytes. Sizes,
root and step are not in it. Of a transfer d covers what both ends share: channel, "p2p" and dtype.

Only little-endian hosts write or read these files. Times are CLOCK_MONOTONIC nanoseconds of the writer's host;
wall time = monotonic + wall_offset_ns.
"""

from __future__ import annotations

import enum
import struct
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

MAGIC = b"HMRWITN\x00"
VERSION = 2

# magic, version, record bytes, rank, num_ranks, ring_records, vector_words, string_bytes, group_slots,
# pid, pid start (clock ticks since boot), pid namespace, wall_offset_ns, run id, hostname, boot id
HEADER = struct.Struct("<8sIIIIIIIIqQQq64s64s40s")
CRC = struct.Struct("<I")
LIVE = struct.Struct("<Q")
HEART = struct.Struct("<QII")
LIVE_AT, HEART_AT, SPARE_AT, GROUPS_AT = 512, 528, 640, 1024

# n, t_ns, seq, vector, step | aux, sig, site, num_sizes, phase, group, kind | check
# Writers pack the middle part once per call site and reuse its bytes: 7 fields cost half of 13.
RECORD = struct.Struct("<QQQQqqIIIIHBxI")
ROW = struct.Struct("<QQQQq28sI")
FIXED = struct.Struct("<qIIIIHBx")

# Where a field lies in a record, for reading one field of all records at once: type and place in units of it.
COLUMNS = {
    "n": ("Q", 0), "t_ns": ("Q", 1), "seq": ("Q", 2), "vector": ("Q", 3), "step": ("q", 4), "aux": ("q", 5),
    "sig": ("I", 12), "site": ("I", 13), "num_sizes": ("I", 14), "phase": ("I", 15), "group": ("H", 32),
    "kind": ("B", 66), "check": ("I", 17),
}  # fmt: skip

GROUP_BYTES = 128
GROUP_NAME = struct.Struct("<II")  # name, members (both string ids)
GROUP_STATE = struct.Struct("<QQ")  # seq of the last completion, rolling hash of all signatures issued
STATE_AT, LAST_AT = 8, 24  # at LAST_AT: a copy of the last issue's record

WORD = struct.Struct("<q")
LENGTH = struct.Struct("<I")

NO_GROUP = 0xFFFF
LOST_STRING = 0xFFFFFFFF  # what a record refers to when the string area was full
SEPARATOR, ENTRY_SEPARATOR = "\x1f", "\x1e"  # inside a signature; between the entries of a schedule


class Kind(enum.IntEnum):
    """What a record says. ``sig`` names the collective, schedule, lock, build or message."""

    PHASE = 1
    STEP = 2  # aux = live requests, sig = declared schedule
    ENTER = 3  # a blocking collective is issued: the rank waits from here
    LEAVE = 4  # a collective is complete
    ISSUE = 5  # an asynchronous collective is issued: the rank goes on
    WAIT = 6  # the rank waits for one that it issued
    LOCK_WAIT = 7  # aux = pid of the holder, or -1
    LOCK_HELD = 8
    LOCK_FREED = 9
    BUILD_BEGIN = 10
    BUILD_END = 11
    DONE = 12
    FAILED = 13


class Event(NamedTuple):
    """One record, as stored; a witness resolves the ids."""

    n: int
    t_ns: int
    seq: int
    vector: int
    step: int
    aux: int
    sig: int
    site: int
    num_sizes: int
    phase: int
    group: int
    kind: int
    check: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """How large the areas of one file are, and where they start."""

    ring_records: int = 20_480
    vector_words: int = 32_768
    string_bytes: int = 1 << 20
    group_slots: int = 256

    def __post_init__(self) -> None:
        for field in ("ring_records", "vector_words", "string_bytes", "group_slots"):
            value = getattr(self, field)
            if not 2 <= value <= 1 << 30 or value % 2:
                raise ValueError(f"witness {field} = {value} is not an even number in 2..{1 << 30}")

    @property
    def ring_at(self) -> int:
        return GROUPS_AT + self.group_slots * GROUP_BYTES

    @property
    def vectors_at(self) -> int:
        return self.ring_at + self.ring_records * RECORD.size

    @property
    def strings_at(self) -> int:
        return self.vectors_at + self.vector_words * WORD.size

    @property
    def file_bytes(self) -> int:
        return self.strings_at + self.string_bytes


@dataclass(frozen=True, slots=True)
class Identity:
    """The process that wrote a witness.

    pid              0 while a launcher has made the file and no rank has opened it
    pid_start_ticks  when the process started, in clock ticks since boot: tells a reused pid apart
    pid_namespace    inode number of the process's pid namespace, in which alone ``pid`` means anything; 0 = unknown
    wall_offset_ns   wall time minus monotonic time on the writer's host
    """

    rank: int
    num_ranks: int
    run_id: str = ""
    hostname: str = ""
    boot_id: str = ""
    pid: int = 0
    pid_start_ticks: int = 0
    pid_namespace: int = 0
    wall_offset_ns: int = 0

    def shares_processes(self, other: Identity) -> bool:
        """Whether the pids of both are numbers of the same processes: one host, and one pid namespace of it.

        Containers may share boot and host name and not their processes. Where a namespace is unknown, as in files of
        version 1, they are taken to share it.
        """
        namespaces = {self.pid_namespace, other.pid_namespace} - {0}
        return (self.boot_id, self.hostname) == (other.boot_id, other.hostname) and len(namespaces) <= 1

    def clock_ahead_ns(self, other: Identity) -> int:
        """How far the monotonic clock of this host is ahead of another's, as well as their wall clocks agree."""
        if self.boot_id == other.boot_id or not self.boot_id or not other.boot_id:
            return 0
        return other.wall_offset_ns - self.wall_offset_ns


def column(records: bytes, field: str) -> list[int]:
    """One field of every record, many times faster than unpacking them."""
    code, place = COLUMNS[field]
    values: Any = memoryview(records).cast(code)  # type: ignore[call-overload]
    picked: list[int] = values[place :: RECORD.size // values.itemsize].tolist()
    return picked


def pack_header(who: Identity, shape: Geometry) -> bytes:
    """The header's bytes with their checksum."""
    body = HEADER.pack(
        MAGIC, VERSION, RECORD.size, who.rank, who.num_ranks,
        shape.ring_records, shape.vector_words, shape.string_bytes, shape.group_slots,
        who.pid, who.pid_start_ticks, who.pid_namespace, who.wall_offset_ns,
        clip(who.run_id, 64), clip(who.hostname, 64), clip(who.boot_id, 40),
    )  # fmt: skip
    return body + CRC.pack(zlib.crc32(body))


def clip(text: str, num_bytes: int) -> bytes:
    """UTF-8 in at most ``num_bytes``, never cut inside a character."""
    return text.encode()[:num_bytes].decode(errors="ignore").encode()
