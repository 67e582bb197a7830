"""Run the cells of the experiment one after another. A later `hmr cells` on the same folder runs the remaining cells.

The folder has these files:

experiment.json        the program, model, flags and version of vLLM, which must be the same in a later `hmr cells`
cells/NAME/            record/ (the recording), looks/ (what `collect` wrote), outcome.json
caches/PAIR/           the kernel caches that a cold start fills and a warm start then uses, such as
                       dp8ep8-jit-triton; removed when the warm start has ended
bundles/               NAME.zip: the recording of a cell; NAME-collect.zip: what `collect` saw
table.txt, table.md    the outcomes of all cells as a table
results.json           the same outcomes, for programs
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hybrid_moe_ref.config import ConfigError
from hybrid_moe_ref.files import read_json, write_atomically
from repro.attach.vllm.cells import caches, hypotheses, outcome, table
from repro.attach.vllm.cells.grid import COLD, REPORT_VARIABLES, Cell
from repro.attach.vllm.cells.machine import Machine
from repro.attach.vllm.cells.outcome import Outcome
from repro.attach.vllm.cells.server import free_port
from repro.attach.vllm.cells.trial import Start, Trial
from repro.report.tables import lines as table_lines
from repro.store.run_dir import OutputError, write_json


@dataclass(frozen=True)
class Settings:
    """What all cells of the experiment share: what is started, and the limits of a start.

    program   the program and its arguments before the model: ("vllm", "serve")
    model     the model's name or path, which follows `program` in the command line
    flags     flags that all cells share
    window_s  `collect` examines a server when no rank has recorded an event for this many seconds
    limit_s   a server that is not ready after this many seconds is ended
    needed    number of bytes that must be free on the disk before a start
    """

    program: tuple[str, ...]
    model: str
    flags: tuple[str, ...]
    window_s: float
    limit_s: float
    needed: int

    def identity(self) -> dict[str, Any]:
        """Return program, model and flags, which must be the same in each `hmr cells` on one folder."""
        return {"program": list(self.program), "model": self.model, "flags": list(self.flags)}


@dataclass
class Experiment:
    """The experiment in the folder ``root``, which gets the recordings and results of all cells.

    machine      says which cells can start here
    cells        the cells to run, in this order
    interrupted  returns whether the user wants the experiment to end
    say          prints a line for the user
    """

    root: Path
    settings: Settings
    machine: Machine
    cells: Sequence[Cell]
    interrupted: Callable[[], bool]
    say: Callable[[str], None]

    def prepare(self) -> dict[str, Outcome]:
        """Make the folder, or read what an earlier `hmr cells` left in it.

        Returns a dict from the name of a cell to its outcome, with those cells that were started and not interrupted.

        Raises OutputError if the folder cannot be written or has other files, ConfigError if the earlier `hmr cells`
        had other settings, and DamagedFile if an outcome cannot be read.
        """
        path, identity = self.root / "experiment.json", {**self.settings.identity(), "vllm": self.machine.vllm}
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if path.exists():
                if (before := read_json(path)) != identity:
                    names = [name for name, value in identity.items() if before.get(name) != value]
                    raise ConfigError(
                        f"the earlier experiment in {self.root} had another {', '.join(names)}; give another folder",
                        "--to",
                    )
            elif any(self.root.iterdir()):
                raise OutputError(f"{self.root}: the folder has other files, but no experiment.json; give another --to")
            else:
                write_json(path, identity)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write to {self.root}: {error.strerror}; choose another --to") from error
        found = {cell.name: Outcome.load(self._folder(cell)) for cell in self.cells}
        return {name: old for name, old in found.items() if old is not None and old.finished}

    def run(self) -> dict[str, Outcome]:
        """Run the cells that were not started yet, or were interrupted. After each cell, write the tables.

        Returns a dict from the name of a cell to its outcome, also with the outcomes that an earlier `hmr cells` left.
        """
        outcomes = self.prepare()
        if outcomes:
            self.say(f"{len(outcomes)} cells of {self.root} have an outcome and are not started again")
        for number, cell in enumerate(self.cells, start=1):
            if cell.name in outcomes:
                continue
            if self.interrupted():
                break
            result = self._run(cell, outcomes)
            outcomes[cell.name] = result
            self._write(outcomes)
            if result.state != outcome.NOT_RUN:
                seconds = f"{result.state} after {result.seconds:.0f} s"
                self.say(f"[{number}/{len(self.cells)}] {cell.name}: {seconds}: {result.verdict}. {result.where}")
        return outcomes

    def _folder(self, cell: Cell) -> Path:
        return self.root / "cells" / cell.name

    def _run(self, cell: Cell, outcomes: dict[str, Outcome]) -> Outcome:
        reason = self.machine.why_not(cell) or self._no_room()
        if reason:
            return Outcome(cell.name, outcome.NOT_RUN, reason=reason)
        cold = self._cold(cell, outcomes)
        if cell.cache != COLD and (cold is None or not cold.cache or not Path(cold.cache).is_dir()):
            return Outcome(
                cell.name, outcome.NOT_RUN, reason="it uses the cache of a cold start, but this cold start has not run"
            )
        try:
            cache = Path(cold.cache) if cold else caches.make(self.root.absolute() / "caches", cell.pair)
            result = self._start(cell, cache)
        except OSError as error:
            where = error.filename or self.root
            return Outcome(cell.name, outcome.NOT_RUN, reason=f"{where}: {error.strerror or error}")
        result = replace(result, cache=str(cache), partial=cold is not None and cold.state != outcome.READY)
        try:
            result.save(self._folder(cell))
        except OSError as error:
            result = replace(result, notes=(*result.notes, f"this outcome is not saved: {error.strerror}"))
        if cell.cache != COLD and result.finished:
            caches.remove(cache)
        return result

    def _cold(self, cell: Cell, outcomes: dict[str, Outcome]) -> Outcome | None:
        """Return the outcome of the cold start whose cache this warm cell uses; None if the cold start has no outcome.

        For a cold cell, return None.
        """
        if cell.cache == COLD:
            return None
        cold = replace(cell, cache=COLD)
        return outcomes.get(cold.name) or Outcome.load(self._folder(cold))

    def _start(self, cell: Cell, cache: Path) -> Outcome:
        folder, port = self._folder(cell), free_port()
        _set_aside(folder)
        folder.mkdir(parents=True)
        given = {**REPORT_VARIABLES, **self.machine.variables(), **os.environ}
        command = [*self.settings.program, self.settings.model, *cell.flags(), *self.settings.flags]
        start = Start(
            (*command, "--host", "127.0.0.1", "--port", str(port)), caches.environment(cache, given), port,
            self.settings.window_s, self.settings.limit_s,
        )  # fmt: skip
        self.say(f"{cell.name}: {' '.join(start.command)}")
        return Trial(cell.name, start, folder.absolute(), self.interrupted, self.say).run()

    def _no_room(self) -> str:
        free = shutil.disk_usage(self.root).free
        if free >= self.settings.needed:
            return ""
        return (
            f"{self.root} has {free / 1e9:.1f} GB free, and a start needs {self.settings.needed / 1e9:.1f}: see --needs"
        )

    def _write(self, outcomes: dict[str, Outcome]) -> None:
        """Write the tables. If a table cannot be written, print the reason and go on.

        A full disk ends the experiment in another place: the free space is checked before each start.
        """
        found = table.rows(self.cells, outcomes)
        rest = [
            *table.not_run(self.cells, outcomes),
            *hypotheses.remaining(self.cells, outcomes),
            *self.machine.notes(),
        ]
        results = [{**cell.to_json(), **asdict(outcomes[cell.name])} for cell in self.cells if cell.name in outcomes]
        try:
            write_atomically(self.root / "table.txt", "\n".join([*table_lines(table.terminal(found)), "", *rest, ""]))
            write_atomically(
                self.root / "table.md", table.markdown(found) + "\n" + "".join(f"- {row}\n" for row in rest)
            )
            write_json(self.root / "results.json", results)
        except OSError as error:
            self.say(f"the tables are not written: {error.strerror}")


def _set_aside(folder: Path) -> None:
    """If an interrupted start left its folder, rename the folder, to keep it as evidence."""
    if folder.exists():
        number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}.{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}.{number}"))
