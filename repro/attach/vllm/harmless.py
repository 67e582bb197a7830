"""Keep a failure of the recorder away from the server: one line, and the server goes on."""

from __future__ import annotations

import sys

_reported: set[str] = set()


class Harmless:
    """A block whose exceptions end only the block. Use it for the recorder's own work, never around a call of vLLM.

    A version of vLLM that was never seen may lack an attribute that a hook reads. ``what`` is then not recorded,
    and is printed once.
    """

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        if self._what not in _reported:
            _reported.add(self._what)
            reason = f"{type(error).__name__}: {error}"
            print(f"repro record: {self._what} is not recorded: {reason}; the server is not affected", file=sys.stderr)
        return True
