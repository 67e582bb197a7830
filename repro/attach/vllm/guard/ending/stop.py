"""End this process when a rank has refused to go on: print the reason, save it in a file, let vLLM shut down, and exit.

If the main thread is blocked in a collective, it cannot raise an exception. Then the guard's thread ends the process.
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

from repro.attach.notice import notice

EXIT_CODE = 86
"""The exit code of a process that the guard ended."""

GRACE_S = 0.7
"""Seconds that vLLM has, after a refusal, to shut down by itself. After that the guard ends the process."""

TELL_S = 0.3
"""Seconds between a refusal and the exception, in which all other processes must read the reason from the store.

If the server of the store runs in this process, the store is gone after the exception.
"""

EXPLAIN_S = 1.0
"""When a collective has failed, a rank waits this many seconds for a refusal that says why."""

POLL_S = 0.02


class Refused(RuntimeError):
    """The guard stops this process. The text says why: for example, which rank issued a wrong collective."""


class Stop:
    """Ends this process when a rank has refused to go on, and tells the user why.

    who      the name of the process in its log lines: "rank 1", "engine of rank 1"
    agrees   True with HMR_GUARD=agree: the guard stops the process. False with HMR_GUARD=observe: the guard only prints
    leave    is called with the exit code, to end the process
    tell     is called once, when this process begins to stop; an engine uses it to notify its front end, which has no
             guard thread
    wait     sleeps for a number of seconds
    """

    def __init__(
        self,
        who: str,
        agrees: bool,
        leave: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[], None] = lambda: None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.who = who
        self.agrees = agrees
        self.sentence = ""  # why this process stops; "" while it does not
        self._leave = leave
        self._clock = clock
        self._tell = tell
        self._wait = wait
        self._since_s = 0.0
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """Print a line, unless the same line was printed before."""
        with self._lock:
            if text in self._said:
                return
            self._said.add(text)
        notice(f"[{self.who}] repro guard: {text}")

    def observe(self, sentence: str) -> None:
        self.say(f"would refuse: {sentence}")
        self._keep(sentence, "observed")

    def begin(self, sentence: str) -> None:
        """Print and save the sentence, which says why the ranks stop.

        If this process still runs GRACE_S seconds later, the guard's thread ends it.
        """
        with self._lock:
            if self.sentence:
                return
            self.sentence, self._since_s = sentence, self._clock()
        self.say(f"refused: {sentence}")
        with contextlib.suppress(Exception):
            self._tell()  # before the file: a slow disk must not delay this beyond the end of the process
        self._keep(sentence, "refused")
        with contextlib.suppress(Exception):
            from multiprocessing import util

            # if vLLM ends the process by itself, it ends with the guard's exit code, after all other exit functions
            util.Finalize(None, self.leave, exitpriority=-1000)

    def explain(self, error: Exception) -> None:
        """Wait at most EXPLAIN_S seconds until the guard stops the ranks, and raise Refused if it does.

        Call this when a collective has failed with ``error``. If another process has ended, the collective fails at
        once, because the connections to that process break. The guard's thread learns the reason only a moment later.
        With HMR_GUARD=observe, this does nothing.
        """
        if isinstance(error, Refused) or not self.agrees:
            return
        until = self._clock() + EXPLAIN_S
        while self._clock() < until:
            if self.sentence:
                raise self.refused() from error
            self._wait(POLL_S)

    def refused(self) -> Refused:
        """Sleep until TELL_S seconds have passed since `begin`, and return the exception that the caller then raises.

        During the sleep, the other processes can read why the ranks stop.
        """
        self._wait(max(0.0, self._since_s + TELL_S - self._clock()))
        return Refused(self.sentence)

    def due(self) -> bool:
        """Whether the process must be ended, because GRACE_S seconds have passed since `begin`."""
        return bool(self.sentence) and self._clock() - self._since_s >= GRACE_S

    def leave(self) -> None:
        """End the process at once, with the guard's exit code."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        self._leave(EXIT_CODE)

    def _keep(self, sentence: str, what: str) -> None:
        """Append the sentence to the file guard.jsonl.

        The file is in the folder that HMR_GUARD_DIR names. If this variable is not set, the file is in the folder of
        the recording, which HMR_RECORD names. If neither variable is set, save nothing.

        what: "refused", or "observed" with HMR_GUARD=observe
        """
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
                os.write(descriptor, (json.dumps(line) + "\n").encode())  # no fsync: a busy disk takes seconds for it
            finally:
                os.close(descriptor)
