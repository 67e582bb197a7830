"""Run one cell: start the server with the recorder, run `collect` if no rank records an event, and end the server."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from repro.attach import recording
from repro.attach.vllm.cells import looks, outcome
from repro.attach.vllm.cells.outcome import Answer, Outcome
from repro.attach.vllm.cells.server import Server
from repro.store.run_dir import RunDir
from repro.store.schema import to_json
from repro.trace.witness.file import Tail
from repro.trace.witness.parse import WitnessError
from repro.watch.document import Document

POLL_S = 0.1
ASK_READY_S = 1.0
MAX_LOOKS = 16
"""The largest number of runs of `collect` for one server.

The first run comes when the ranks have recorded no event for `Start.window_s` seconds. Each further run comes when this
silence is twice as long as at the run before.
"""

LOADING = "load"
"""The phase of vLLM's recorder in which a rank reads the checkpoint."""

SITE = Path(recording.__file__).parent / "record" / "site"
"""The folder whose sitecustomize.py starts the recorder in each Python process."""


@dataclass(frozen=True)
class Start:
    """The vLLM server that one cell (one combination of settings) starts, and the limits of this start.

    command      the server's program and its arguments
    environment  the server's environment variables. They set the cache folders; `recorded` adds those of the recorder
    port         the port on which the server listens
    window_s     `collect` examines the server when no rank has recorded an event for this many seconds
    limit_s      a server that is not ready after this many seconds is ended
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    port: int
    window_s: float
    limit_s: float

    def recorded(self, folder: Path) -> dict[str, str]:
        """Return the environment, with variables that make the recorder write into ``folder``."""
        path = self.environment.get("PYTHONPATH", "")
        return {
            **self.environment,
            "HMR_RECORD": str(folder),
            "HMR_QUIET_WINDOW": str(self.window_s),
            "PYTHONPATH": f"{SITE}{os.pathsep}{path}" if path else str(SITE),
        }


@dataclass
class Trial:
    """One cell (one combination of settings of the server) while it runs.

    name         the name of the cell
    start        the server to start
    folder       the cell's folder: record/ (the recording, with the server's output), looks/ (what `collect` wrote)
    interrupted  returns whether the user wants the experiment to end
    say          prints a line
    """

    name: str
    start: Start
    folder: Path
    interrupted: Callable[[], bool]
    say: Callable[[str], None]
    _state: str = ""
    _looks: list[Answer] = field(default_factory=list)
    _notes: list[str] = field(default_factory=list)
    _silent_s: float = 0.0
    _began_s: float = 0.0
    _look_at_s: float = 0.0
    _asked_s: float = 0.0
    _loads_at: tuple[int, bool] = (0, False)
    _log_bytes: int = -1
    _log_grew_s: float = 0.0

    def run(self) -> Outcome:
        """Start the server; wait until it is ready, hangs, ends, or reaches its time limit; then end the server.

        Raises OSError if the folder cannot be written.
        """
        record = RunDir(self.folder / "record")
        record.launcher_log.parent.mkdir(parents=True)
        self._began_s = time.monotonic()
        server = Server(self.start.command, self.start.recorded(record.root), self.start.port, record.launcher_log)
        self._server = server
        try:
            document = self._watch(record)
            seconds = time.monotonic() - self._began_s
            recorder = Answer.of(to_json(document)) if document is not None else None
            state = self._state or self._ended(document)
            if state == outcome.HUNG and not self._looks:
                self._look(self._silent_s)
            answer = outcome.conclude(state, recorder, self._looks, self._silent_s, self.start.window_s)
            if state == outcome.ENDED and answer.verdict != "crash":
                answer = Answer("crash", "start", sentences=(self._end_words(),))
        finally:
            left = server.end()
        if left:
            self._notes.append(f"processes that did not end: {' '.join(map(str, left))}")
        return Outcome(
            self.name, state, answer.verdict, answer.cause, answer.culprits, answer.where(), round(seconds, 1),
            round(self._silent_s, 1), tuple(look.verdict for look in self._looks), bundles=self._bundles(record),
            notes=tuple(self._notes),
        )  # fmt: skip

    def _watch(self, record: RunDir) -> Document | None:
        """Watch until the server is ready, hangs, ends, or reaches its time limit.

        record: the folder of the recording

        Returns the content of verdict.json; None if no rank was recorded.
        """
        while not record.description.exists():
            self._tick([])
            if self._state or not self._server.alive():
                self._notes.append("no rank was recorded: install repro into the environment of vLLM")
                return None
            time.sleep(POLL_S)
        watch = recording.watch_of(
            record, self._server.alive, lambda: bool(self._state), show=self._tick, notice=self._notice
        )
        document = watch.run()
        while document.verdict == "clean" and not self._state and self._server.alive():
            self._tick([])  # the ranks have done all their work, and the server may still become ready
            time.sleep(POLL_S)
        return document

    def _ended(self, document: Document | None) -> str:
        """Return how the start ended: ENDED if the server ended, or its ranks crashed or finished; else HUNG.

        document: the content of verdict.json; None if no rank was recorded
        """
        crashed = document is None or document.verdict in ("crash", "clean")
        return outcome.ENDED if crashed or not self._server.alive() else outcome.HUNG

    def _end_words(self) -> str:
        code = self._server.exit_code()
        return f"The server ended with exit code {code} before it was ready: {self._server.last_words()}"

    def _tick(self, tails: Sequence[Tail]) -> None:
        """Check whether the user ended the experiment, and whether the server is ready or has reached its time limit.

        If no rank has recorded an event for ``window_s`` seconds, run `collect`. The watcher calls this several times a
        second.

        tails: the readers of the witnesses of all ranks
        """
        now_s = time.monotonic()
        if self.interrupted():
            self._state = outcome.INTERRUPTED
        elif now_s - self._asked_s >= ASK_READY_S:
            self._asked_s = now_s
            if self._server.ready():
                self._state = outcome.READY
        if self._state:
            return
        silent_s = now_s - self._progress_s(tails, now_s)
        if silent_s >= self.start.window_s and self._loads(tails):
            silent_s = 0.0  # reading a checkpoint takes long, and no rank records an event while it reads
        # before the first event no rank waits: the processes import and connect
        if any(tail.last_event_ns() for tail in tails):
            self._silent_s = max(self._silent_s, silent_s)
        if silent_s < self.start.window_s:
            self._look_at_s = self.start.window_s
        elif silent_s >= self._look_at_s and len(self._looks) < MAX_LOOKS:
            self._look_at_s = 2 * silent_s
            self._look(silent_s)
        if now_s - self._began_s >= self.start.limit_s:
            self._look(silent_s)
            self._state = outcome.LIMIT

    def _progress_s(self, tails: Sequence[Tail], now_s: float) -> float:
        """Return the time of the last event of any rank, in seconds of the monotonic clock.

        If no rank has an event, return the time when the server's log last grew.

        tails: the readers of the witnesses of all ranks; now_s: the current time of this clock
        """
        last_ns = max((tail.last_event_ns() for tail in tails), default=0)
        if last_ns:
            return last_ns / 1e9
        if (num_bytes := self._server.log_bytes()) != self._log_bytes:
            self._log_bytes, self._log_grew_s = num_bytes, now_s
        return self._log_grew_s

    def _loads(self, tails: Sequence[Tail]) -> bool:
        """Whether all ranks that have a witness are in the phase `load`, in which they read the checkpoint.

        In this phase it is normal that no rank records an event for a long time.

        tails: the readers of the witnesses of all ranks
        """
        last_ns = max((tail.last_event_ns() for tail in tails), default=0)
        if last_ns != self._loads_at[0]:
            self._loads_at = last_ns, bool(tails) and all(phase_of(tail) == LOADING for tail in tails)
        return self._loads_at[1]

    def _look(self, silent_s: float) -> None:
        answer, failure = looks.collect(self._server.pid, self.folder / "looks")
        if answer is None:
            self._notes.append(failure)
            return
        self._looks.append(answer)
        who = f", culprits {', '.join(map(str, answer.culprits))}" if answer.culprits else ""
        self.say(f"{self.name}: silent for {silent_s:.0f} s; collect: {answer.verdict}{who}. {answer.where()}")

    def _notice(self, text: str) -> None:
        self.say(f"{self.name}: {text}")

    def _bundles(self, record: RunDir) -> tuple[str, ...]:
        """Pack the recording, and the folder that the last `collect` wrote. Returns the names of the zip files.

        If the user interrupted the experiment, pack nothing.

        record: the folder of the recording
        """
        if self._state == outcome.INTERRUPTED:
            return ()
        zips = self.folder.parent.parent / "bundles"
        runs = [(record.root, zips / f"{self.name}.zip")] if record.description.exists() else []
        collected = sorted((self.folder / "looks").glob("*-collect-*"))
        runs += [(folder, zips / f"{self.name}-collect.zip") for folder in collected[-1:]]
        made = []
        for run, to in runs:
            if failure := looks.bundle(run, to):
                self._notes.append(failure)
            else:
                made.append(to.name)
        return tuple(made)


def phase_of(tail: Tail) -> str:
    """Return the phase of a rank; "" if its witness cannot be read or has no event. tail: the reader of the witness"""
    try:
        witness = tail.witness()
    except (OSError, WitnessError):
        return ""
    return witness.text(witness.last.phase) if witness.last is not None else ""
