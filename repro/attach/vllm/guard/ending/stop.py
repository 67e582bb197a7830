"""How this process ends when the guard has refused: say why, leave evidence, let vLLM shut down, then exit.

A process whose main thread is blocked in a collective never comes back to Python, so a thread of the guard ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

EXIT_CODE = 86
"""The exit code of a process that the guard ended."""

GRACE_S = 0.7
"""How long vLLM may shut down by itself after a refusal before the process is ended."""


EXPLAIN_S = 1.0
POLL_S = 0.02


class Refused(RuntimeError):
    """The guard refuses to go on; the text says who did what, and where."""


class Stop:
    """The end of this process.

    who      "rank 1", "engine of rank 1": how its lines begin
    agrees   whether the guard stops the process; else it only says so
    tell     called once, at the refusal, to let others know that do not look for themselves
    """

    def __init__(
        self,
        who: str,
        agrees: bool,
        leave: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        self.who = who
        self.agrees = agrees
        self.sentence = ""  # why this process stops; "" while it does not
        self._leave = leave
        self._clock = clock
        self._tell = tell
        self._since_s = 0.0
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """Print one line, once."""
        with self._lock:
            if text in self._said:
                return
            self._said.add(text)
        print(f"[{self.who}] repro guard: {text}", file=sys.stderr, flush=True)

    def observe(self, sentence: str) -> None:
        self.say(f"would refuse: {sentence}")
        self._keep(sentence, "observed")

    def begin(self, sentence: str) -> None:
        """The ranks stop for this reason. The process ends GRACE_S later at the latest, if :meth:`due` is called."""
        with self._lock:
            if self.sentence:
                return
            self.sentence, self._since_s = sentence, self._clock()
        self.say(f"refused: {sentence}")
        self._keep(sentence, "refused")
        with contextlib.suppress(Exception):
            self._tell()
        with contextlib.suppress(Exception):
            from multiprocessing import util

            util.Finalize(None, self.leave, exitpriority=-1000)  # vLLM's processes end with its code, after all else

    def explain(self, error: Exception) -> None:
        """Raise Refused if a collective failed because the ranks stop, for example because a peer is gone.

        The operating system closes the connections of a process shortly before it reports that the process has ended.
        """
        if isinstance(error, Refused) or not self.agrees:
            return
        until = self._clock() + EXPLAIN_S
        while self._clock() < until:
            if self.sentence:
                raise Refused(self.sentence) from error
            time.sleep(POLL_S)

    def due(self, extra_s: float = 0.0) -> bool:
        return bool(self.sentence) and self._clock() - self._since_s >= GRACE_S + extra_s

    def leave(self) -> None:
        """End the process at once."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        self._leave(EXIT_CODE)

    def _keep(self, sentence: str, what: str) -> None:
        """Append the sentence to guard.jsonl in HMR_GUARD_DIR, or in the folder of the recording."""
        folder = os.environ.get("HMR_GUARD_DIR") or os.environ.get("HMR_RECORD")
        if not folder:
            return
        line: dict[str, Any] = {
            "time_s": time.time(), "who": self.who, "pid": os.getpid(), "what": what, "sentence": sentence,
        }  # fmt: skip
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
            descriptor = os.open(os.path.join(folder, "guard.jsonl"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, (json.dumps(line) + "\n").encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
