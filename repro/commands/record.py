"""``python -m repro record [--to DIR] -- PROGRAM…``: run a torch.distributed program and record its collectives."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from hybrid_moe_ref.config import ConfigError
from repro.attach import recording
from repro.attach.record import compiled
from repro.commands.shared.verdicts import write_reports
from repro.exit_codes import INTERRUPTED, UNEXPECTED
from repro.hosts import processes
from repro.hosts.interrupt import Interrupt
from repro.report.terminal import display, outcome, say, waits
from repro.store.run_dir import OutputError, RunDir
from repro.store.schema import to_json
from repro.store.text import escape_lines
from repro.verdict.classes import class_of
from repro.verdict.result import name_ranks
from repro.watch.document import Document

POLL_S = 0.1
END_PATIENCE_S = 10.0
"""Seconds that the program has to end after SIGTERM, with --end."""

SIGNAL_GRACE_S = 1.0
"""Seconds that the program has to react to Ctrl-C by itself."""

LONGEST_WINDOW_S = 86400.0

SITE = Path(recording.__file__).parent / "record" / "site"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder of the recording; default: runs/<utc>-record")
    parser.add_argument("--modules", action="store_true", help="record the module that each collective belongs to")
    parser.add_argument(
        "--quiet-window", type=float, metavar="S", help="seconds without an event after which the ranks are judged"
    )
    parser.add_argument(
        "--end",
        action="store_true",
        help="end the program if it still runs after the verdict deadlock, stall, crash or corrupt",
    )
    parser.add_argument(
        "--print-env", action="store_true", help="print the environment variables that turn recording on, and exit"
    )
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    parser.add_argument("program", nargs="*", default=(), metavar="-- PROGRAM…")


def run(args: argparse.Namespace) -> int:
    """Run the program, record its collectives, and watch its ranks.

    With --print-env, only print the environment variables that turn recording on, and return 0.

    Returns the program's exit code, UNEXPECTED if --end ended the program, or INTERRUPTED after Ctrl-C.
    """
    program = list(args.program)
    root = args.to or Path("runs") / f"{datetime.now(UTC):%Y%m%dT%H%M%S}Z-record"
    if args.quiet_window is not None and not 0 < args.quiet_window <= LONGEST_WINDOW_S:
        raise ConfigError(
            f"{args.quiet_window} is not a number of seconds above 0 and up to {LONGEST_WINDOW_S:,.0f}",
            "--quiet-window",
        )
    console = Console(stderr=True)
    if problem := compiled.build():
        say(console, f"record: without the compiled hooks, a collective costs some microseconds more: {problem}")
    if args.print_env:
        for name, value in _variables(args, root.absolute()).items():
            print(f"export {name}={shlex.quote(value)}")
        return 0
    if not program:
        args.parser.error("no program is given; example: record [--to DIR] -- torchrun --nproc-per-node 8 train.py")
    _make(root)
    with args.interrupt.deferred():
        return _Recording(args, root.absolute(), console, args.interrupt).run(program)


def _variables(args: argparse.Namespace, root: Path) -> dict[str, str]:
    """Return environment variables that make a program record its collectives into the folder ``root``."""
    path = os.environ.get("PYTHONPATH", "")
    variables = {"HMR_RECORD": str(root), "PYTHONPATH": f"{SITE}{os.pathsep}{path}" if path else str(SITE)}
    if args.modules:
        variables["HMR_RECORD_MODULES"] = "1"
    if args.quiet_window is not None:
        variables["HMR_QUIET_WINDOW"] = str(args.quiet_window)
    return variables


def _make(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()):
            raise OutputError(f"{root}: the folder is not empty; choose another folder with --to")
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write to {root}: {error.strerror}; choose another folder with --to") from error


def sites(document: Document) -> list[str]:
    """Return a line "ranks 0,2: issued at FILE:LINE" for each call site of a collective in which ranks wait.

    document: the content of the recording's verdict.json
    """
    ranks: dict[str, list[int]] = {}
    for position in document.ranks:
        if position.site and position.state in ("blocked", "locked"):
            ranks.setdefault(position.site, []).append(position.rank)
    return [f"{name_ranks(group)}: issued at {site}" for site, group in ranks.items()]


class _Recording:
    """Starts the user's program, watches its ranks, prints the verdict, and waits until the program ends."""

    def __init__(self, args: argparse.Namespace, root: Path, console: Console, interrupt: Interrupt) -> None:
        self._args = args
        self._root = root
        self._console = console
        self._interrupt = interrupt

    def run(self, program: list[str]) -> int:
        try:
            self._child = subprocess.Popen(program, env={**os.environ, **_variables(self._args, self._root)})
        except OSError as error:
            raise ConfigError(f"cannot start: {error.strerror}", program[0]) from error
        document = self._watch()
        if document is not None:
            self._print(document)
        hangs = document is not None and class_of(document.verdict).colour == "red" and self._child.poll() is None
        if hangs and self._args.end:
            self._end()
        elif hangs:
            say(self._console, "record: the program still runs, because nothing was ended; press Ctrl-C to end it")
        code = self._wait()
        if document is None and not self._interrupt():
            say(self._console, f"record: no rank of torch.distributed began in {self._root}")
        if self._interrupt():
            return INTERRUPTED
        if hangs and self._args.end:
            return UNEXPECTED
        return code if code >= 0 else 128 - code

    def _watch(self) -> Document | None:
        """Wait until a rank begins to record, then watch the ranks until the verdict, and return it.

        Returns None if the program ends, or the user interrupts, before a rank begins.
        """
        run_dir = RunDir(self._root)
        while not run_dir.description.exists():
            if self._child.poll() is not None or self._interrupt():
                return None
            time.sleep(POLL_S)
        with display(self._console, f"record: {self._root}") as shown:
            watch = recording.watch_of(
                run_dir, lambda: self._child.poll() is None, self._interrupt, show=shown.show, notice=shown.notice
            )
            document = watch.run()
        write_reports(self._console, [self._root])
        return document

    def _print(self, document: Document) -> None:
        if self._args.json:
            print(json.dumps(to_json(document), indent=1))
            return
        lines = [f"record: {outcome(document)}"]
        if document.verdict != "clean":
            lines += [*document.sentences, *waits(document), *sites(document), *document.evidence]
            lines.append(f"evidence and report: {self._root}; to share it: python -m repro bundle {self._root}")
        for line in lines:
            say(self._console, escape_lines(line))

    def _end(self) -> None:
        """Send SIGTERM to the program. When the program has ended, send SIGKILL to its remaining descendants.

        If the program still runs after END_PATIENCE_S, send SIGKILL to the program and its descendants.
        """
        started = processes.with_descendants(self._child.pid)
        self._child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + END_PATIENCE_S
        while self._child.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        processes.kill(started[1:] if self._child.poll() is not None else started)

    def _wait(self) -> int:
        """Wait for the program to end, and return its exit status, which is negative if a signal ended the program.

        After Ctrl-C or a signal to this command, the program has SIGNAL_GRACE_S seconds to end by itself. If it still
        runs then, send SIGTERM to it.
        """
        passed_on = False
        while self._child.poll() is None:
            time.sleep(POLL_S)
            if self._interrupt() and not passed_on:
                time.sleep(SIGNAL_GRACE_S)
                passed_on = True
                if self._child.poll() is None:
                    self._child.send_signal(signal.SIGTERM)
        return self._child.returncode
