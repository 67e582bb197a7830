"""Catch exceptions of the recorder, so that the server goes on: the recorder prints one line instead."""

from __future__ import annotations

import sys

_reported: set[str] = set()


class Harmless:
    """A ``with`` block that catches any exception of its body. Use it for the recorder's own work, never around a call
    of vLLM.

    For example, an unknown version of vLLM may lack an attribute that a hook reads. After an exception, one line says
    what is not recorded.

    what: the subject of this line, such as "the engine of this rank"
    """

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self.report(error)
        return True

    def report(self, error: Exception) -> None:
        """Print the line about an exception, unless a line about the same ``what`` was printed before."""
        if self._what not in _reported:
            _reported.add(self._what)
            reason = f"{type(error).__name__}: {error}"
            print(f"repro record: {self._what} is not recorded: {reason}; the server is not affected", file=sys.stderr)
