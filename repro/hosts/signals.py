"""Handle signals in a rank: write its stacks and its Flight Recorder dump, even from inside a collective."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading

from hybrid_moe_ref.files import write_atomically
from repro.hosts import flight_recorder
from repro.store.run_dir import RunDir

TERM_PATIENCE_S = 8.0
"""Seconds after SIGTERM at which a rank exits.

When one rank has died, torchrun sends SIGTERM to all others after 0.1 s. They must live longer, because the watcher
needs up to 5 s to see the death, and some time to collect their stacks.
"""

INT_PATIENCE_S = 3.0
"""Seconds after SIGINT at which a rank exits. torchrun sends SIGINT to all ranks when the user presses Ctrl-C."""


def dump_on_signals(run_dir: RunDir, rank: int, *, interrupts: bool = False) -> None:
    """Install the signal handlers of a rank.

    SIGUSR1 writes the Python stacks of the rank into the folder stacks/ of the run. SIGUSR2 writes the rank's Flight
    Recorder dump into the folder fr/. SIGTERM ends the process TERM_PATIENCE_S seconds later; until then its stacks can
    be taken. With ``interrupts``, SIGINT ends the process INT_PATIENCE_S seconds later, and creates a file at once that
    tells the watcher: the user has requested the end of the run.

    A Python signal handler does not run while the main thread is blocked inside a collective. So the stacks are written
    by faulthandler, which runs in C. The rest is done by a thread, which signal.set_wakeup_fd wakes.
    """
    # faulthandler keeps the descriptor, so the file stays open as long as the rank runs
    stack_file = run_dir.stack(rank).open("w")
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    for number in (signal.SIGUSR2, signal.SIGTERM, *[signal.SIGINT] * interrupts):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_act_on_signals, args=(run_dir, rank, read_end), daemon=True).start()


def _act_on_signals(run_dir: RunDir, rank: int, read_end: int) -> None:
    while numbers := os.read(read_end, 64):
        if signal.SIGTERM in numbers:
            _end_in(TERM_PATIENCE_S, signal.SIGTERM)
        if signal.SIGINT in numbers:
            with contextlib.suppress(OSError):  # if the disk is full, the watcher sees only that the ranks end
                run_dir.interrupted.touch()
            _end_in(INT_PATIENCE_S, signal.SIGINT)
        if signal.SIGUSR2 in numbers:
            _dump_flight_recorder(run_dir, rank)


def _end_in(patience_s: float, number: int) -> None:
    end = threading.Timer(patience_s, os._exit, (128 + number,))
    end.daemon = True
    end.start()


def _dump_flight_recorder(run_dir: RunDir, rank: int) -> None:
    try:
        if dump := flight_recorder.dump():
            write_atomically(run_dir.flight_recorder(rank), dump)
    except (OSError, RuntimeError) as error:
        print(f"[rank {rank}] Flight Recorder not dumped: {error}", flush=True)
