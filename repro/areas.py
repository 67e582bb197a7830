"""The two growing areas of a witness file as its writer sees them: interned strings and size vectors."""

from __future__ import annotations

import mmap
import threading

from repro.layout import LENGTH, LOST_STRING, WORD, Geometry

Buffer = mmap.mmap | bytearray


class Strings:
    """The string area: each text once, known by its number. Threads may share it."""

    def __init__(self, buffer: Buffer, shape: Geometry) -> None:
        self._buffer = buffer
        self._at = shape.strings_at
        self._end = shape.file_bytes
        self._known: dict[str, int] = {"": 0}
        self._lock = threading.Lock()

    def intern(self, text: str) -> int:
        """The number of a text; LOST_STRING where there is no room for it any more."""
        known = self._known.get(text)
        if known is not None:
            return known
        encoded = text.encode(errors="replace")
        with self._lock:
            known = self._known.get(text)
            if known is not None:
                return known
            at, end = self._at + LENGTH.size, self._at + LENGTH.size + len(encoded)
            if end > self._end:
                return LOST_STRING
            self._buffer[at:end] = encoded
            LENGTH.pack_into(self._buffer, self._at, len(encoded))  # last: a reader sees all of it or nothing
            self._at = end
            self._known[text] = known = len(self._known)
            return known


class Vectors:
    """The vector ring: the newest size vectors, known by their offset over the file's whole life."""

    def __init__(self, buffer: Buffer, shape: Geometry) -> None:
        self._buffer = buffer
        self._start = shape.vectors_at
        self._room = shape.vector_words
        self._next = 0

    def store(self, sizes: tuple[int, ...]) -> int:
        """Store a vector and return its offset; what is too long for the ring is not kept."""
        room, num_words = self._room, len(sizes) + 1
        if not sizes or num_words > room:
            return 0
        if self._next % room + num_words > room:  # a vector lies in one piece
            self._next += room - self._next % room
        offset = self._next
        at = self._start + offset % room * WORD.size
        WORD.pack_into(self._buffer, at, offset + 1)  # first: else an older head would stand before newer sizes
        for i, size in enumerate(sizes, start=1):
            WORD.pack_into(self._buffer, at + i * WORD.size, size)
        self._next += num_words
        return offset
