"""Read a run directory for a report.

The files of the run are untrusted: missing and damaged files are listed in the report, and raise no error.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from hybrid_moe_ref.config import ConfigError
from hybrid_moe_ref.files import open_regular
from repro.report.lanes import Label, Labels, Lane, SharedClock, read_lane
from repro.store.description import VARIANTS, RunDescription, read_description
from repro.store.run_dir import SUFFIX, RunDir, read_json, read_text, read_tokens
from repro.store.schema import read_typed
from repro.store.text import escape_control_characters, shorten_rank_lists
from repro.trace.witness.file import read
from repro.trace.witness.parse import WitnessError
from repro.verdict.classes import class_of
from repro.verdict.result import Count, name_ranks
from repro.watch.document import Document, read_document, undecided

MAX_RANKS = 4096
"""Largest number of ranks that a report shows."""

T = TypeVar("T")


class Named(msgspec.Struct, frozen=True):
    """The fields of config.json that identify a run."""

    scenario: str = ""
    variant: str = ""
    backend: str = ""
    num_ranks: Annotated[int, msgspec.Meta(ge=0, le=MAX_RANKS)] = 0
    seed: Count = 0


@dataclass
class RunData:
    """One run as the report sees it.

    description  the content of run.json; None if this file is missing or damaged
    named        what config.json says about the run; empty fields without a config.json
    verdict      the content of verdict.json; an empty verdict if this file is missing or damaged
    lanes        rank -> the time spans of its witness, such as steps and collectives
    labels       the texts of these spans
    missing      a sentence for each file that is missing or damaged
    place        the path to show in the commands of the report instead of ``root``; "" to show ``root``
    """

    root: Path
    description: RunDescription | None = None
    named: Named = field(default_factory=Named)
    verdict: Document = field(default_factory=undecided)
    lanes: dict[int, Lane] = field(default_factory=dict)
    labels: Labels = field(default_factory=Labels)
    missing: list[str] = field(default_factory=list)
    place: str = ""

    @property
    def run_dir(self) -> RunDir:
        return RunDir(self.root)

    @property
    def num_ranks(self) -> int:
        return max([min(self.verdict.num_ranks, MAX_RANKS), *(rank + 1 for rank in self.lanes)])

    @property
    def stuck(self) -> bool:
        """Whether some ranks have not finished.

        The class of the verdict shows this, except for `slow`: such a run can end after its verdict, so its witnesses
        show it.
        """
        hangs = class_of(self.verdict.verdict).hangs
        if hangs is None:
            return len(self.lanes) < self.num_ranks or not all(lane.done for lane in self.lanes.values())
        return hangs

    def span_ns(self) -> tuple[int, int]:
        """Return the first and last time that the report shows, in ns of the clock that all ranks share.

        The first time is that of the first event. The last time is that of the verdict or, if all ranks finished, of
        the last event. The result is (0, 1) if no rank recorded an event.
        """
        starts = [lane.starts[0] for lane in self.lanes.values() if len(lane)]
        if not starts:
            return 0, 1
        last_ns = max(lane.last_ns for lane in self.lanes.values())
        quiet_ns = int(self.verdict.quiet_s * 1e9) if self.stuck else 0
        return min(starts), max(last_ns + quiet_ns, min(starts) + 1)


def gather(root: Path, with_lanes: bool = True) -> RunData:
    """Read a run directory. Raises ConfigError if it contains nothing of a run.

    with_lanes: whether to read the witnesses, too
    """
    data = RunData(root)
    if not root.is_dir():
        raise ConfigError("there is no such folder", str(root))
    if not any((root / part).exists() for part in ("run.json", "config.json", "verdict.json", "events")):
        parts = "run.json, config.json, verdict.json and events"
        raise ConfigError(f"not a run directory: the folder has none of {parts}", str(root))
    _read_description(data)
    if data.run_dir.config.exists():
        _read_config(data)
    _read_verdict(data)
    if with_lanes:
        _read_lanes(data)
        _look_for_rank_files(data)
    return data


def _read_description(data: RunData) -> None:
    loss = "the report cannot show what the run rebuilds, its other variants, and the commands that repeat the run"
    data.description = _read(data, data.run_dir.description, read_description, loss)


def _read_config(data: RunData) -> None:
    named = _read(data, data.run_dir.config, _read_named, "the report cannot show the settings of the run")
    data.named = named or data.named


def _read_named(path: Path) -> Named:
    return read_typed(path, Named)


def _read_verdict(data: RunData) -> None:
    loss = "no verdict is shown: `python -m repro watch RUN` judges the run"
    verdict = _read(data, data.run_dir.verdict, read_document, loss) or undecided(seed=data.named.seed)
    named, described = data.named, data.description
    title, variant, num_ranks = (
        ("", "", 0) if described is None else (described.title, described.variant, described.num_ranks)
    )
    data.verdict = msgspec.structs.replace(
        verdict,
        scenario=verdict.scenario or title or named.scenario or "unknown",
        variant=verdict.variant or variant or named.variant or "unknown",
        backend=verdict.backend or named.backend or "unknown",
        num_ranks=verdict.num_ranks or num_ranks or named.num_ranks,
        ranks=verdict.ranks[:MAX_RANKS],
    )


def _read(data: RunData, path: Path, reader: Callable[[Path], T], loss: str) -> T | None:
    """Read a file of the run. If it cannot be read, return None and add a sentence to ``missing``.

    loss: the end of this sentence, which says what the report cannot show without the file
    """
    try:
        return reader(path)
    except FileNotFoundError:
        data.missing.append(f"{path.name} is missing: {loss}")
    except (OSError, ValueError) as error:
        data.missing.append(f"{path.name} is damaged ({data.run_dir.describe(error)}): {loss}")
    return None


def _read_lanes(data: RunData) -> None:
    clock = SharedClock()
    files = sorted((data.root / "events").glob(f"*{SUFFIX}"))[:MAX_RANKS]
    for path in files:
        try:
            witness = read(path)
        except (OSError, WitnessError) as error:
            data.missing.append(f"{data.run_dir.describe(error)}: this rank's events are not shown")
            continue
        if witness.rank in data.lanes:
            data.missing.append(
                f"events/{path.name}: not used, because another file is already the witness of rank {witness.rank}"
            )
            continue
        if witness.num_events == 0 and not witness.writer.pid:
            continue  # the launcher created the file, but the rank never opened it
        data.lanes[witness.rank] = lane = read_lane(witness, data.labels, clock)
        data.missing += map(data.run_dir.describe, lane.problems)
        if lane.first_event > 1:
            data.missing.append(f"events/{path.name}: the {lane.first_event - 1} oldest events were overwritten")
    data.lanes = dict(sorted(data.lanes.items()))


def _look_for_rank_files(data: RunData) -> None:
    """Add sentences to ``missing``: which ranks lack a witness or a log, and what is wrong with unreadable files.

    If ranks of the run are stuck, do the same for stacks and Flight Recorder dumps. Other runs have none.
    """
    ranks, run_dir = range(min(data.num_ranks, MAX_RANKS)), data.run_dir
    kinds: list[tuple[str, Callable[[int], Path], Callable[[Path], object]]] = [("logs", run_dir.log, _check_log)]
    if data.stuck:
        kinds += [("stacks", run_dir.stack, _check_stack), ("fr", run_dir.flight_recorder, _check_dump)]
    absent = [rank for rank in ranks if rank not in data.lanes]
    if absent:
        data.missing.append(f"events: {name_ranks(absent)} left no readable witness")
    for what, path, check in kinds:
        absent = [rank for rank in ranks if not _is_there(data, path(rank), check)]
        if absent:
            data.missing.append(f"{what}: {name_ranks(absent)} left no file")
    for file in (run_dir.reference, *map(run_dir.output, ranks)):  # only finished runs of the lab have these files
        _is_there(data, file, read_tokens)


def _is_there(data: RunData, path: Path, check: Callable[[Path], object]) -> bool:
    """Whether the file exists. ``check`` reads the file; if ``check`` fails, its error is added to ``missing``."""
    try:
        check(path)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        data.missing.append(data.run_dir.describe(error))
    return True


def _check_log(path: Path) -> None:
    open_regular(path).close()


def _check_stack(path: Path) -> None:
    """Raise ValueError if the file has no complete stack.

    An empty file is accepted, because nobody requested a stack from this rank.
    """
    open_regular(path).close()
    text = read_text(path)
    if text and not (text.endswith("\n") and "hread 0x" in text):
        problem = "the last stack is incomplete" if "hread 0x" in text else "the file contains no stack"
        raise ValueError(f"{path}:{text.count(chr(10)) + 1}: {problem}")


def _check_dump(path: Path) -> None:
    dump = read_json(path)
    if not isinstance(dump, dict) or not isinstance(dump.get("entries", []), list):
        raise ValueError(f"{path}:1: the file is not a dump of the Flight Recorder")


def headline(verdict: Document) -> str:
    """Return the verdict as a sentence."""
    culprits = name_ranks(verdict.culprits)
    name = verdict.verdict
    if name == "clean":
        compared = next((text for text in reversed(verdict.evidence) if "equal" in text), "")
        return f"All {verdict.num_ranks} ranks finished{f': {compared}' if compared else ''}."
    if not name:
        return "This run has no verdict."
    sentences = [escape_control_characters(text, 160) for text in verdict.sentences[:4]]
    where = "; ".join(sentences) or "no rank recorded where it is"
    more = len(verdict.sentences) - 4
    if more > 0:
        where += f"; and {more} more places"
    cause = class_of(name).causes.get(verdict.cause or "", verdict.cause)
    finding = f" {cause}".rstrip() + (f" by {culprits}" if verdict.culprits else "") if cause else ""
    return shorten_rank_lists(f"{name.capitalize()}:{finding}{';' if finding else ''} {where}.")


def siblings(root: Path, data: RunData) -> list[Path]:
    """Return the runs in the same folder as ``root`` that have another variant and the same settings otherwise.

    Of several runs of one variant, only the newest one is returned. Only runs with a verdict.json count. The result is
    [] if the run at ``root`` has no readable run.json.
    """
    described = data.description
    if described is None or not described.family:
        return []
    newest: dict[str, Path] = {}
    names = f"*-{glob.escape(described.title)}-*-{data.verdict.seed}"
    for path in sorted(root.resolve().parent.glob(names)):
        if path.is_symlink() or path == root.resolve() or not (path / "verdict.json").is_file():
            continue
        try:
            other = read_description(RunDir(path).description)
        except (OSError, ValueError):
            continue
        if other.family == described.family and other.variant != described.variant:
            newest[other.variant] = path
    return [newest[variant] for variant in VARIANTS if variant in newest]


def describe(label: Label) -> str:
    """Return what happened in a time span, for the trace and the pictures: "ep all_gather_v layers.0.moe".

    label   the parts of this text
    """
    parts = (label.group, label.name, label.layer) if label.kind in ("call", "async") else (label.name,)
    return " ".join(part for part in parts if part)
