"""The background thread of a recorded rank, for work that is not urgent.

Five times a second the thread does this work:

- If the watcher has requested evidence, the thread writes stacks and a dump.
- If an asynchronous collective has completed although the program has not waited for it, the thread records this.
- The thread calls the functions that other modules have put into the list `Rank.attended`.
- If the main thread waits in a backward pass for DDP's collectives, the thread records this.

The thread also runs while the main thread is blocked inside a collective, where Python would not run a signal handler.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from repro.attach.record import collectives, ddp
from repro.attach.record import rank as this
from repro.hosts import flight_recorder

if TYPE_CHECKING:
    from repro.attach.record.rank import Rank

INTERVAL_S = 0.2
REQUEST = "evidence_wanted"
"""The watcher creates or touches this file in the run's folder to request stacks and dumps from all ranks."""

IDLE_S = 0.02
"""A process was idle if it used less CPU time than this, in seconds, between two checks of the thread."""


class Attendant:
    """The background thread of one recorded rank."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._request = os.fspath(rank.root / REQUEST)
        self._answered_ns = 0
        self._cpu_s = 0.0

    def start(self) -> None:
        threading.Thread(target=self._attend, name="repro record", daemon=True).start()

    def _attend(self) -> None:
        while this.current is self._rank:
            time.sleep(INTERVAL_S)
            with contextlib.suppress(OSError):
                requested_ns = os.stat(self._request).st_mtime_ns
                if requested_ns != self._answered_ns:
                    self._answered_ns = requested_ns
                    self._write_evidence()
            cpu_s = time.process_time()
            idle, self._cpu_s = cpu_s - self._cpu_s < IDLE_S, cpu_s
            collectives.note_completions(self._rank)
            for call in self._rank.attended:
                call()
            if idle and _in_backward():
                ddp.note_wait(self._rank)

    def _write_evidence(self) -> None:
        """Write the stacks of all threads, and torch's Flight Recorder dump if there is one, into the job's folder."""
        from repro.store.run_dir import RunDir, write_atomically

        run_dir = RunDir(self._rank.root)
        stacks = run_dir.stack(self._rank.rank)
        scratch = stacks.with_suffix(".part")
        with scratch.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        os.replace(scratch, stacks)
        with contextlib.suppress(RuntimeError):
            if dump := flight_recorder.dump():
                write_atomically(run_dir.flight_recorder(self._rank.rank), dump)


def _in_backward() -> bool:
    """Whether the main thread is inside autograd's engine, which waits in C++ for DDP's collectives."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"
