"""The hook of a front end, the process that started the engines.

If an engine ended with the guard's exit code, the hook makes vLLM's server end with this code, too. If a user's own
program started the engines, the hook does not end this program, which gets vLLM's EngineDeadError.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import wraps
from multiprocessing import connection
from typing import Any

from repro.attach.vllm.guard.ending.stop import EXIT_CODE, GRACE_S, POLL_S, Stop


def monitoring(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap CoreEngineProcManager.monitor_engine_liveness, to start a thread that waits for the engines' exit codes."""

    @wraps(original)
    def monitor_engine_liveness(self: Any, *args: Any, **options: Any) -> Any:
        engines = list(getattr(self, "processes", ()))
        if engines and is_server():
            threading.Thread(target=_watch, args=(engines,), name="repro guard", daemon=True).start()
        return original(self, *args, **options)

    return monitor_engine_liveness


def is_server() -> bool:
    """Whether this program is vLLM's own server, such as ``vllm serve``, and not a user's program."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    return os.path.basename(sys.argv[0]) == "vllm" or str(getattr(main, "name", "")).startswith("vllm.")


def _watch(engines: Sequence[Any]) -> None:
    waiting = {engine.sentinel: engine for engine in engines}
    while waiting:
        for sentinel in connection.wait(list(waiting)):
            engine = waiting.pop(sentinel)
            deadline = time.monotonic() + GRACE_S
            while engine.exitcode is None and time.monotonic() < deadline:
                time.sleep(POLL_S)  # another thread has reaped the engine, and is about to store the exit code
            if engine.exitcode == EXIT_CODE:
                leave(Stop("front end", True))


def leave(stop: Stop, wait: Callable[[float], None] = time.sleep) -> None:
    """Wait GRACE_S seconds for vLLM's own shutdown, then end this process with the guard's exit code.

    stop: prints why, and ends the process; wait: sleeps for a number of seconds
    """
    stop.say(f"the guard ended an engine; the engine's log says why. The server ends with exit code {EXIT_CODE}")
    atexit.register(stop.leave)  # the main thread may end during this wait, and would end the process with code 0
    wait(GRACE_S)
    for child in multiprocessing.active_children():  # such as vLLM's coordinator, which no other process would end
        child.kill()
    stop.leave()
