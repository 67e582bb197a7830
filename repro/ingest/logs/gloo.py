"""Read gloo's errors.

A closed connection means that the peer process ended. After a time-out, the peer possibly still runs.

These errors show the peer's address, but not the peer's rank. The port in the address says nothing about the rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from repro.ingest.logs.prefix import Line
from repro.trace.foreign.records import Failure, Left, Note, Observation, Source

NEEDLES = ("gloo", "Gloo", "loopback address", "caused pair closure")

_ERROR = re.compile(r"\[(?:enforce fail at )?[^\[\]]{0,200}?gloo/[^\[\]]{0,100}?:\d{1,6}\] ([^\n]*)$")
_CLOSED = re.compile(r"Connection closed by peer|Connection reset by peer|Read error|Write error|caused pair closure")
_WAIT = re.compile(r"Timed out waiting (\d{1,12})ms for (recv|send) operation to complete")
_CONNECT = re.compile(
    r"connectFullMesh failed|timed out connecting|Connect timeout|rendezvous|Connection refused|"
    r"Unable to find address for|Unable to resolve hostname"
)
_COUNT = re.compile(
    r"Rank (\d{1,12}) is connected to (\d{1,12}) peer ranks\. Expected number of connected peer ranks is : (\d{1,12})"
)
_ADDRESS = re.compile(r"\[([\da-fA-F.:]+)\]:\d+")


def read(line: Line, source: Source) -> Iterator[Observation]:
    text = line.text
    if match := _COUNT.search(text):
        if match[2] != match[3]:
            words = f"rank {match[1]} of a gloo group reached {match[2]} of {match[3]} peers"
            yield Note("incomplete", words, line.process, f"{match[2]}/{match[3]}", line.at_s, source)
        return
    if "Using the loopback address as fallback" in text:
        words = "gloo could not resolve this host's name and bound to loopback"
        yield Note("loopback", words, line.process, "GLOO_SOCKET_IFNAME", line.at_s, source)
        return
    match = _ERROR.search(text)
    if match is None and "connectFullMesh" not in text and "caused pair closure" not in text:
        return
    words = _first_sentence(match[1] if match else text)
    if _CONNECT.search(text):
        where = f" ({address[1]})" if (address := _ADDRESS.search(words)) else ""
        yield Failure(line.process, "start", f"gloo could not connect its ranks{where}: {words}", line.at_s, source)
    elif _CLOSED.search(text):
        yield Left(line.process, None, f"gloo: {words}", line.at_s, source)
        yield Failure(line.process, "consequence", f"gloo: {words}", line.at_s, source)
    elif waited := _WAIT.search(text):
        words = f"gloo waited {int(waited[1]) / 1000:g} s for a {waited[2]}"
        yield Failure(line.process, "timeout", words, line.at_s, source)


def _first_sentence(text: str) -> str:
    """Return an error text without the advice that newer versions of torch append to it."""
    return text.split(". This is typically")[0].rstrip("'\", ")[:160]
