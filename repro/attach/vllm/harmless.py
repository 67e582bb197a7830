"""Catch exceptions of the recorder, so that the server goes on: the recorder prints one line instead."""

from __future__ import annotations

from repro.attach.notice import notice

_reported: set[str] = set()


class Harmless:
    """A ``with`` block for the recorder's own work. If the block raises an Exception, print one line and go on.

    For example, a hook raises an exception if this version of vLLM lacks an attribute that the hook reads. Do not call
    vLLM inside the block: vLLM's exceptions must reach the server.

    what: the subject of the printed line "… is not recorded", such as "the engine of this rank"
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
        """Print that ``what`` is not recorded, and why. For each ``what``, only the first line is printed."""
        if self._what not in _reported:
            _reported.add(self._what)
            reason = f"{type(error).__name__}: {error}"
            notice(f"repro record: {self._what} is not recorded: {reason}; the server is not affected")
