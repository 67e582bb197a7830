"""Write two areas of a witness file: strings, each stored once, and size vectors (the sizes of one collective)."""

from __future__ import annotations

import mmap
import struct
import threading
from zlib import crc32

from repro.trace.witness.format import (
    GUARD,
    LIVE,
    LIVE_AT,
    LOST_STRING,
    MAX_STRINGS,
    NO_VECTOR,
    STRING,
    WORD,
    Geometry,
    pack_string,
)

Buffer = mmap.mmap | bytearray


def live_words(buffer: Buffer) -> memoryview:
    """Return the four counters of a witness: events, 8-byte words of size vectors, strings, groups.

    Assigning a counter is a single 8-byte store, so a reader never sees half of a value.
    """
    return memoryview(buffer).cast("B")[LIVE_AT : LIVE_AT + LIVE.size].cast("Q")


class Strings:
    """The strings of a witness: each text is stored once and gets a number, by which records name it. Thread-safe."""

    def __init__(self, buffer: Buffer, shape: Geometry) -> None:
        self._buffer = buffer
        self._live = live_words(buffer)
        self._at = shape.strings_at
        self._end = shape.file_bytes
        self._numbers: dict[str, int] = {"": 0}
        self._lock = threading.RLock()
        self._storing = False

    def intern(self, text: str) -> int:
        """Return the number of a text. Store the text if it is new.

        Returns LOST_STRING if the file has no room left for strings, or if this is called in a signal handler that
        interrupted the storing of another new text.
        """
        number = self._numbers.get(text)
        if number is not None:
            return number
        entry = pack_string(text.encode(errors="replace"))
        with self._lock:
            if self._storing:
                return LOST_STRING
            self._storing = True
            try:
                return self._store(text, entry)
            finally:
                self._storing = False

    def _store(self, text: str, entry: bytes) -> int:
        number = self._numbers.get(text)  # another thread may have stored it
        if number is not None:
            return number
        number = len(self._numbers)
        at, end = self._at, self._at + len(entry)
        if end > self._end or number > MAX_STRINGS:
            return LOST_STRING
        self._buffer[at + STRING.size : end] = entry[STRING.size :]
        self._buffer[at + 4 : at + STRING.size] = entry[4 : STRING.size]
        # the length is written last, so that a reader sees a complete entry or none
        self._buffer[at : at + 4] = entry[:4]
        self._live[2] = number * GUARD
        self._at = end
        self._numbers[text] = number
        return number


class Vectors:
    """The ring buffer of size vectors (the sizes of one collective each): new vectors overwrite the oldest ones.

    The offset of a vector is the number of 8-byte words that were used before it since the file was created, including
    overwritten words, and words at the end of the ring that stay empty because a vector did not fit there.
    """

    def __init__(self, buffer: Buffer, shape: Geometry) -> None:
        self._buffer = buffer
        self._live = live_words(buffer)
        self._start = shape.vectors_at
        self._room = shape.vector_words
        self._next = 0
        self._lock = threading.RLock()
        self._storing = False

    def store(self, sizes: tuple[int, ...]) -> int:
        """Store the sizes of a collective and return their offset. Thread-safe.

        Returns NO_VECTOR in these cases:

        - there are no sizes
        - the ring buffer is too small for the sizes
        - a signal handler calls this, and has interrupted the storing of other sizes
        """
        if not sizes or len(sizes) + 1 > self._room:
            return NO_VECTOR
        with self._lock:
            if self._storing:
                return NO_VECTOR
            self._storing = True
            try:
                return self._store(sizes)
            finally:
                self._storing = False

    def _store(self, sizes: tuple[int, ...]) -> int:
        room, num_words = self._room, len(sizes) + 1
        offset = self._next
        if offset % room + num_words > room:  # a vector must not wrap around
            offset += room - offset % room
        words = struct.pack(f"<{len(sizes)}q", *sizes)
        check = WORD.pack(crc32(words, offset & 0xFFFFFFFF))
        self._next = offset + num_words
        # the counter is written before the vector, so that a reader knows which older vectors may be overwritten
        self._live[1] = self._next * GUARD
        at = self._start + offset % room * WORD.size
        self._buffer[at : at + num_words * WORD.size] = check + words
        return offset
