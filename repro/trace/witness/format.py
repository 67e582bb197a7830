"""The format of a witness file: the bytes that one rank writes, and the checks that readers rely on.

A witness is one preallocated file per rank. The rank maps it into memory, so a record is written without a system call
and survives SIGKILL. Numbers are little-endian. The table shows all padding. Version 2::

    0      HEADER   identity of the writer, clocks, geometry, and a CRC-32 of these; written by launcher and rank
    504    KNOWS    guarded word: the aspects that the recorder writes; 0 = all of WITNESS, in repro.trace.knowledge
    512    LIVE     4 guarded words: events recorded, vector words stored, strings stored, groups with a slot
    544    HEART    last_heartbeat_ns u64, name u32, count u32, CRC-32 of these; heartbeats never enter the ring
    640    SPARE    128 bytes: groups without a slot of their own write here; never read
    1024   GROUPS   group_slots x 128 bytes: name, members, last issue and last completion of a group; the ring does
                    not overwrite them
    ...    RING     ring_records x 72 bytes: a ring buffer; event n (from 1) lies in slot (n - 1) % ring_records
    ...    VECTORS  vector_words x i64, a ring of size vectors: [check, size, size, ...]
    ...    STRINGS  u32 length, u32 check, UTF-8, one after another; string k is the k-th (string 0 is "")

**Checksums.** All data that a verdict depends on has a checksum, so that a flipped bit is detected:

- A record ends in the CRC-32 of its other bytes, computed with the start value RESIDUE. Then the CRC-32 of any number
  of intact records in a row, with the start value RESIDUE, is RESIDUE again: one call checks a whole ring.
- The checksum of a vector is the CRC-32 of its sizes, with its offset as the start value. The checksum of a string is
  the CRC-32 of its bytes, with its length as the start value.
- A guarded word is a counter, stored as value * GUARD in one aligned 8-byte store, so that a reader never sees half of
  it. A flipped bit changes the word by a power of two, which is no multiple of GUARD, so a reader notices it.

**Order of writing.** The recorder writes an event in this order:

1. its new strings: for each the bytes, the checksum and the length, then the count of strings in LIVE;
2. its size vector: the count of words in LIVE, then the words;
3. its record in the ring;
4. the last record, or the last completion, in the slot of its group;
5. the count of events in LIVE.

A reader copies the file from front to back, so the copy contains everything that a record in it refers to. A writer
that dies leaves at most one incomplete ("torn") record, after the last intact one; LIVE does not count it. Every other
wrong checksum is damage, unless the checksum is right when the reader copies the file again. A vector is overwritten
after vector_words more words have been stored.

**Hash.** The record of an issued collective has a rolling hash of all collectives that the rank has issued in the group
so far: hash = crc32(d, previous hash), where the hash before the first collective is 0. d is the CRC-32, in four bytes,
of the signature's text (group, op, layer, dtype, reduce_op, joined by SEPARATOR). Sizes, root and step are not
included. For a send or receive, d covers what both ends share: the name of the group of the two ranks, "p2p" and dtype.

Only little-endian hosts write or read these files. Times are CLOCK_MONOTONIC nanoseconds of the writer's host;
wall time = monotonic + wall_offset_ns.
"""

from __future__ import annotations

import enum
import struct
import zlib
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, get_type_hints

from repro.trace.knowledge import WITNESS, Knows

MAGIC = b"HMRWITN\x00"
VERSION = 2

# magic, version, record bytes, rank, num_ranks, ring_records, vector_words, string_bytes, group_slots,
# pid, pid start (clock ticks since boot), pid namespace, wall_offset_ns, run id, hostname, boot id
HEADER = struct.Struct("<8sIIIIIIIIqQQq64s64s40s")
CRC = struct.Struct("<I")
KNOWS = struct.Struct("<Q")
LIVE = struct.Struct("<QQQQ")
HEART = struct.Struct("<QIII")
KNOWS_AT, LIVE_AT, HEART_AT, SPARE_AT, GROUPS_AT = 504, 512, 544, 640, 1024

GUARD = 251
"""The factor of guarded words. It is a prime number, and small: then value * GUARD usually fits in one digit (30 bits)
of a Python integer, which makes the multiplication fast."""

RESIDUE = 0x2144DF1C
"""The CRC-32 of any bytes that end in their own CRC-32. It is a constant of this checksum."""

GROUP_BYTES = 128
GROUP_NAME = struct.Struct("<III")  # name, members (both string ids), CRC-32 of these
GROUP_LEFT = struct.Struct("<Q")  # guarded: seq of the last completion
LEFT_AT, LAST_AT = 16, 24  # at LAST_AT: a copy of the last issue's record

WORD = struct.Struct("<q")
STRING = struct.Struct("<II")  # length, check

NO_GROUP = 0xFFFF
NO_VECTOR = 0xFFFFFFFFFFFFFFFF  # the vector reference of a record with too many sizes to store
LOST_STRING = 0xFFFF  # the string reference of a record that was written when the string area was full
MAX_STRINGS = LOST_STRING - 1
"""Maximum number of strings in one file. It limits the time and memory that a reader needs."""

SEPARATOR, ENTRY_SEPARATOR = "\x1f", "\x1e"  # separators: inside a signature; between the entries of a schedule

_LARGEST = {"ring_records": 1 << 20, "vector_words": 1 << 20, "string_bytes": 1 << 23, "group_slots": 1 << 12}


class Kind(enum.IntEnum):
    """What a record says, for example that a collective was issued or is complete.

    The field ``sig`` of a record is the index of a string. The kind says what this string is: a collective's
    signature, a schedule, the name of a lock or build, or an error message.
    """

    PHASE = 1
    STEP = 2  # aux = live requests, sig = declared schedule
    ENTER = 3  # a blocking collective is issued: the rank waits from here
    LEAVE = 4  # a collective is complete
    ISSUE = 5  # an asynchronous collective is issued: the rank goes on
    WAIT = 6  # the rank waits for an asynchronous collective that it issued
    LOCK_WAIT = 7  # aux = pid of the holder, or -1
    LOCK_HELD = 8
    LOCK_FREED = 9
    BUILD_BEGIN = 10
    BUILD_END = 11
    DONE = 12
    FAILED = 13


class Event(NamedTuple):
    """One record of a witness.

    A string is given by its index in the table of strings at the end of the witness. `Witness` has methods that look up
    strings and sizes.

    aux         for a collective: its root; for a step: number of live requests; for a wait for a lock:
                pid of the holder, -1 if unknown
    num_sizes   for a collective: number of its sizes
    sig         index of a string; the kind says what this string is (`Kind`)
    site        index of the string "file:line function" of the call site; 0 if unknown
    phase       index of the string with the phase's name
    group       index of the collective's group in `Witness.groups`; NO_GROUP if the file has no room for this group,
                and for other events
    n           number of the event, from 1
    t_ns        time of the event, in ns of the rank's monotonic clock
    seq         sequence number of the collective in its group; 0 for other events
    vector      the size, if there is one; else where the sizes are stored (see `Witness.sizes`)
    step        number of the step; -1 before the first step
    hash        for an issued collective: hash of all collectives that the rank issued in the group so far; else 0
    check       checksum of the record

    The annotations are struct codes, which define the layout of a record. The fields before ``n`` are equal for all
    events of one kind at one call site in one phase, so the recorder packs them only once.
    """

    aux: Annotated[int, "q"]
    num_sizes: Annotated[int, "I"]
    sig: Annotated[int, "H"]
    site: Annotated[int, "H"]
    phase: Annotated[int, "H"]
    group: Annotated[int, "H"]
    kind: Annotated[int, "Bxxx"]
    n: Annotated[int, "Q"]
    t_ns: Annotated[int, "Q"]
    seq: Annotated[int, "Q"]
    vector: Annotated[int, "Q"]
    step: Annotated[int, "q"]
    hash: Annotated[int, "I"]
    check: Annotated[int, "I"]


_CODES = {name: hint.__metadata__[0] for name, hint in get_type_hints(Event, include_extras=True).items()}


def _layout(*names: str) -> struct.Struct:
    return struct.Struct("<" + "".join(map(_CODES.__getitem__, names)))


_FIELDS, _N = Event._fields, Event._fields.index("n")
RECORD, FIXED, VARIABLE = _layout(*_FIELDS), _layout(*_FIELDS[:_N]), _layout(*_FIELDS[_N:-1])
SEALED = struct.Struct(f"<{FIXED.size}s{VARIABLE.size}sI")
"""A record in three parts, as the recorder writes it: the packed constant fields, the packed other fields, the
checksum."""

COLUMNS = {
    name: (code[0], _layout(*_FIELDS[:place]).size // struct.calcsize(code[0]))
    for place, (name, code) in enumerate(_CODES.items())
}
"""Name of a field -> (its type code, its offset in a record in units of this type), for the function `column`."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes and offsets of the areas of one witness file.

    ring_records   how many of the newest events are kept
    vector_words   room for sizes of collectives, in numbers of 8 bytes; new sizes overwrite the oldest ones
    string_bytes   room for strings
    group_slots    for how many groups the progress is kept

    Raises ValueError if a size is not an even number or is out of range.
    """

    ring_records: int = 20_480
    vector_words: int = 32_768
    string_bytes: int = 1 << 20
    group_slots: int = 256

    def __post_init__(self) -> None:
        for field, largest in _LARGEST.items():
            value = getattr(self, field)
            if not 2 <= value <= largest or value % 2:
                raise ValueError(f"witness {field} = {value} is not an even number in 2..{largest}")

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


MAX_BYTES = Geometry(**_LARGEST).file_bytes
"""The length of the largest witness file: 92 MiB."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The process that wrote a witness.

    run_id           the id that all witnesses of one run share
    boot_id          Linux's boot id of the host; "" if unknown
    pid              0 until the rank has opened the file that its launcher made
    pid_start_ticks  when the process started, in clock ticks since boot; distinguishes processes that reuse a pid
    pid_namespace    inode number of the pid namespace in which ``pid`` is valid; 0 = unknown
    wall_offset_ns   wall time minus monotonic time on the writer's host
    knows            what the writer's recorder writes, for example the order of the collectives and the locks
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
    knows: Knows = WITNESS

    def shares_processes(self, other: Identity) -> bool:
        """Whether two writers are on one host and in one pid namespace, so that the same pid means the same process.

        An unknown pid namespace (0) counts as equal to any other.
        """
        namespaces = {self.pid_namespace, other.pid_namespace} - {0}
        return (self.boot_id, self.hostname) == (other.boot_id, other.hostname) and len(namespaces) <= 1

    def clock_ahead_ns(self, other: Identity) -> int:
        """Return how many ns this writer's monotonic clock is ahead of the other writer's monotonic clock.

        0 if both writers have the same boot id (one host), or if a boot id is unknown. Otherwise the result is computed
        from the wall clocks of the two hosts, and is wrong by the difference between these wall clocks.
        """
        if self.boot_id == other.boot_id or not self.boot_id or not other.boot_id:
            return 0
        return other.wall_offset_ns - self.wall_offset_ns


def column(records: bytes | memoryview, field: str) -> list[int]:
    """Return the values of one field of `Event` in all packed records.

    Unpacking whole records would take many times longer.
    """
    code, place = COLUMNS[field]
    values: Any = memoryview(records).cast(code)
    picked: list[int] = values[place :: RECORD.size // values.itemsize].tolist()
    return picked


def is_whole(records: bytes | memoryview) -> bool:
    """Whether all of these records match their checksums."""
    return zlib.crc32(records, RESIDUE) == RESIDUE


def unguarded(word: int) -> int | None:
    """Return the value of a guarded word, a counter that is stored as value * GUARD; None if the word is damaged."""
    value, rest = divmod(word, GUARD)
    return None if rest else value


def pack_header(writer: Identity, shape: Geometry) -> bytes:
    """Pack the header of a witness with its checksum, and after it ``writer.knows``."""
    body = HEADER.pack(
        MAGIC, VERSION, RECORD.size, writer.rank, writer.num_ranks,
        shape.ring_records, shape.vector_words, shape.string_bytes, shape.group_slots,
        writer.pid, writer.pid_start_ticks, writer.pid_namespace, writer.wall_offset_ns,
        clip(writer.run_id, 64), clip(writer.hostname, 64), clip(writer.boot_id, 40),
    )  # fmt: skip
    header = body + CRC.pack(zlib.crc32(body))
    return header.ljust(KNOWS_AT, b"\0") + KNOWS.pack(writer.knows.value * GUARD)


def pack_heartbeat(now_ns: int, name: int, count: int) -> bytes:
    """Pack a heartbeat with its checksum.

    name    the heartbeat's name, as the index of a string in the witness's table of strings
    count   number of heartbeats so far
    """
    body = HEART.pack(now_ns, name, count, 0)[: -CRC.size]
    return body + CRC.pack(zlib.crc32(body))


def pack_group_name(name: int, members: int) -> bytes:
    """Pack the first fields of a group's slot (its 128 bytes in the witness), with their checksum.

    name, members   the group's name and its members, each as the index of a string in the witness's table of strings
    """
    body = GROUP_NAME.pack(name, members, 0)[: -CRC.size]
    return body + CRC.pack(zlib.crc32(body))


def pack_string(text: bytes) -> bytes:
    """Pack one string as a witness stores it: length, checksum and bytes of the text."""
    return STRING.pack(len(text), zlib.crc32(text, len(text))) + text


def clip(text: str, num_bytes: int) -> bytes:
    """Encode a text as UTF-8 in at most ``num_bytes`` bytes. A character that does not fit is left out as a whole."""
    return text.encode()[:num_bytes].decode(errors="ignore").encode()
