"""Everything that a run directory tells, read without trust: what is missing or damaged is said, not raised."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_moe_ref.config import ConfigError
from hybrid_moe_ref.files import open_regular
from repro.report.lanes import Label, Labels, Lane, SharedClock, read_lane
from repro.store.description import VARIANTS, RunDescription, read_description
from repro.store.run_dir import SUFFIX, RunDir, read_json, read_text, read_tokens
from repro.store.text import shorten_rank_lists
from repro.trace.parse import WitnessError
from repro.trace.witness import read
from repro.verdict.result import Wait, name_ranks

MAX_RANKS = 4096
_MOST = 10**18
"""Numbers of a verdict are smaller; JSON has room for ones that no arithmetic here can do."""

_RANK_TEXTS = ("state", "phase", "layer", "group", "op", "detail", "site")
_RANK_NUMBERS = {"step": -1, "seq": 0, "since_s": 0.0}


@dataclass
class Facts:
    """One run as the report sees it.

    description  run.json; None where there is none, or a damaged one
    verdict      what verdict.json says, with every field there and of its type
    missing      one sentence for each thing that should be there and is not, or is damaged
    place        what commands call the directory, where that is not its place here
    """

    root: Path
    description: RunDescription | None = None
    config: dict[str, Any] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)
    lanes: dict[int, Lane] = field(default_factory=dict)
    labels: Labels = field(default_factory=Labels)
    missing: list[str] = field(default_factory=list)
    place: str = ""

    @property
    def run_dir(self) -> RunDir:
        return RunDir(self.root)

    @property
    def num_ranks(self) -> int:
        return max([int(self.verdict["num_ranks"]), *(rank + 1 for rank in self.lanes)])

    @property
    def stuck(self) -> bool:
        """Whether ranks had not finished when the run was decided; a slow run may have ended well."""
        if self.verdict["verdict"] == "slow":
            return len(self.lanes) < self.num_ranks or not all(lane.done for lane in self.lanes.values())
        return self.verdict["verdict"] not in ("clean", "corrupt", "")

    def span_ns(self) -> tuple[int, int]:
        """From the first event to the verdict, on the shared clock; (0, 1) of a run that recorded nothing."""
        starts = [lane.starts[0] for lane in self.lanes.values() if len(lane)]
        if not starts:
            return 0, 1
        last_ns = max(lane.last_ns for lane in self.lanes.values())
        return min(starts), max(last_ns + int(self.verdict["quiet_s"] * 1e9), min(starts) + 1)


def gather(root: Path, with_lanes: bool = True) -> Facts:
    """Read a run directory. Raises ConfigError when there is nothing of a run in it."""
    facts = Facts(root)
    if not root.is_dir():
        raise ConfigError("no such folder", str(root))
    if not any((root / part).exists() for part in ("run.json", "config.json", "verdict.json", "events")):
        parts = "no run.json, no config.json, no verdict.json and no events"
        raise ConfigError(f"not a run directory: it has {parts}", str(root))
    _read_description(facts)
    if facts.run_dir.config.exists():
        facts.config = _read_document(facts, "config.json", "the settings of the run are not known")
    document = _read_document(facts, "verdict.json", "the run was not decided; `python -m repro watch RUN` judges it")
    facts.verdict = sound_verdict(document, _identity(facts), facts.missing)
    if with_lanes:
        _read_lanes(facts)
        _look_for_rank_files(facts)
    return facts


def _read_description(facts: Facts) -> None:
    loss = "what the run rebuilds, the runs beside it and the commands that repeat it are not known"
    try:
        facts.description = read_description(facts.run_dir.description)
    except FileNotFoundError:
        facts.missing.append(f"run.json is missing: {loss}")
    except (OSError, ValueError) as error:
        facts.missing.append(f"run.json is damaged ({str(error).replace(f'{facts.root}/', '')}): {loss}")


def _identity(facts: Facts) -> dict[str, Any]:
    """What names the run where verdict.json does not."""
    described = facts.description
    if described is None:
        return facts.config
    names = {"scenario": described.title, "variant": described.variant, "num_ranks": described.num_ranks}
    return {**facts.config, **{name: value for name, value in names.items() if value}}


def _read_document(facts: Facts, name: str, loss: str) -> dict[str, Any]:
    path = facts.root / name
    try:
        document = read_json(path)
    except FileNotFoundError:
        facts.missing.append(f"{name} is missing: {loss}")
    except (OSError, ValueError) as error:
        facts.missing.append(f"{name} is damaged ({str(error).replace(f'{facts.root}/', '')}): {loss}")
    else:
        if isinstance(document, dict) and document:
            return document
        facts.missing.append(f"{name} is damaged ({'empty' if document == {} else 'not a mapping'}): {loss}")
    return {}


def _read_lanes(facts: Facts) -> None:
    clock = SharedClock()
    files = sorted((facts.root / "events").glob(f"*{SUFFIX}"))[:MAX_RANKS]
    for path in files:
        try:
            witness = read(path)
        except (OSError, WitnessError) as error:
            facts.missing.append(f"{str(error).replace(f'{facts.root}/', '')}: this rank's events are not shown")
            continue
        if witness.rank in facts.lanes:
            facts.missing.append(f"events/{path.name}: rank {witness.rank} is already told by another file")
            continue
        if witness.num_events == 0 and not witness.writer.pid:
            continue  # made by the launcher, never opened by its rank
        facts.lanes[witness.rank] = lane = read_lane(witness, facts.labels, clock)
        facts.missing += [problem.replace(f"{facts.root}/", "") for problem in lane.problems]
        if lane.first_event > 1:
            facts.missing.append(f"events/{path.name}: the {lane.first_event - 1} oldest events were overwritten")
    facts.lanes = dict(sorted(facts.lanes.items()))


def _look_for_rank_files(facts: Facts) -> None:
    """Say which ranks lack which file; stacks and recorder dumps are taken only when a run does not finish."""
    ranks, run_dir = range(min(facts.num_ranks, MAX_RANKS)), facts.run_dir
    wanted: list[tuple[str, Callable[[int], Path], Callable[[Path], object]]] = [("logs", run_dir.log, _check_log)]
    if facts.stuck:
        wanted += [("stacks", run_dir.stack, _check_stack), ("fr", run_dir.flight_recorder, _check_dump)]
    absent = [rank for rank in ranks if rank not in facts.lanes]
    if absent:
        facts.missing.append(f"events: {name_ranks(absent)} left no readable witness")
    for what, path, check in wanted:
        absent = [rank for rank in ranks if not _is_there(facts, path(rank), check)]
        if absent:
            facts.missing.append(f"{what}: no file of {name_ranks(absent)}")
    for file in (run_dir.reference, *map(run_dir.output, ranks)):  # of a run of the lab, when it has some
        _is_there(facts, file, read_tokens)


def _is_there(facts: Facts, path: Path, check: Callable[[Path], object]) -> bool:
    """Whether there is such a file; what ``check`` says against it is listed."""
    try:
        check(path)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        facts.missing.append(str(error).replace(f"{facts.root}/", ""))
    return True


def _check_log(path: Path) -> None:
    open_regular(path).close()


def _check_stack(path: Path) -> None:
    """A rank that was not asked for its stack leaves an empty file."""
    open_regular(path).close()
    told = read_text(path)
    if told and not (told.endswith("\n") and "hread 0x" in told):
        raise ValueError(f"{path}:{told.count(chr(10)) + 1}: {'cut short' if 'hread 0x' in told else 'no stack in it'}")


def _check_dump(path: Path) -> None:
    told = read_json(path)
    if not isinstance(told, dict) or not isinstance(told.get("entries", []), list):
        raise ValueError(f"{path}:1: no dump of the Flight Recorder")


def sound_verdict(document: Mapping[str, Any], identity: Mapping[str, Any], missing: list[str]) -> dict[str, Any]:
    """verdict.json with every field of its type; what was not is replaced and named in ``missing``."""
    wrong: list[str] = []

    def take(owner: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = owner.get(name)
        measured = not isinstance(value, (int, float)) or abs(value) < _MOST
        if isinstance(value, kind) and measured and not (isinstance(value, bool) and kind is not bool):
            return value
        if value is not None and owner:
            wrong.append(name)
        return default

    def ranks_of(owner: Mapping[str, Any], name: str) -> list[int]:
        values = take(owner, name, list, [])
        good = [r for r in values if isinstance(r, int) and not isinstance(r, bool) and 0 <= r < MAX_RANKS]
        if len(good) != len(values):
            wrong.append(name)
        return good

    def mappings(owner: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
        return [row for row in take(owner, name, list, []) if isinstance(row, dict)]

    def words(owner: Mapping[str, Any], name: str) -> list[str]:
        return [text for text in take(owner, name, list, []) if isinstance(text, str)]

    def position(row: Mapping[str, Any]) -> dict[str, Any]:
        told: dict[str, Any] = {name: take(row, name, str, "") for name in _RANK_TEXTS}
        told |= {name: take(row, name, (int, float), default) for name, default in _RANK_NUMBERS.items()}
        sizes = [size for size in take(row, "sizes", list, []) if isinstance(size, int) and abs(size) < _MOST]
        return {"rank": take(row, "rank", int, -1), **told, "sizes": sizes}

    ranks = [position(row) for row in mappings(document, "ranks")[:MAX_RANKS]]
    divergence = take(document, "first_divergence", dict, {})
    seconds = take(document, "seconds", dict, {})
    expected = take(document, "expected", dict, {})
    verdict = {
        "scenario": take(document, "scenario", str, "") or take(identity, "scenario", str, "unknown"),
        "variant": take(document, "variant", str, "") or take(identity, "variant", str, "unknown"),
        "backend": take(document, "backend", str, "") or take(identity, "backend", str, "unknown"),
        "num_ranks": take(document, "num_ranks", int, 0) or take(identity, "num_ranks", int, 0),
        "seed": take(document, "seed", int, take(identity, "seed", int, 0)),
        "verdict": take(document, "verdict", str, ""),
        "cause": take(document, "cause", str, ""),
        "confidence": take(document, "confidence", str, ""),
        "culprits": ranks_of(document, "culprits"),
        "suspects": ranks_of(document, "suspects"),
        "ranks": [row for row in ranks if 0 <= row["rank"] < MAX_RANKS],
        "sides": [
            {**position(side), "ranks": ranks_of(side, "ranks"), "planned": take(side, "planned", str, "")}
            for side in mappings(divergence, "sides")
        ],
        "cycle": [
            {
                "ranks": ranks_of(link, "ranks"),
                "waits_in": take(link, "waits_in", str, ""),
                "for": ranks_of(link, "for"),
            }
            for link in mappings(document, "cycle")
        ],
        "waits": [
            Wait(
                tuple(ranks_of(link, "ranks")),
                take(link, "waits_in", str, ""),
                tuple(ranks_of(link, "for")),
                take(link, "why", str, ""),
            )
            for link in mappings(document, "waits" if "waits" in document else "cycle")  # of an older version
        ],
        "evidence": words(document, "evidence"),
        "sentences": words(document, "sentences"),
        "quiet_s": min(max(0.0, float(take(document, "quiet_s", (int, float), 0.0))), 1e6),
        "expected": {name: take(expected, name, str, "") for name in ("verdict", "cause")},
        "matches_expected": take(document, "matches_expected", bool, None),
        "seconds": {name: take(seconds, name, (int, float), None) for name in ("stall_to_verdict", "total")},
    }
    verdict["num_ranks"] = min(max(verdict["num_ranks"], 0), MAX_RANKS)
    if wrong:
        missing.append(f"verdict.json is damaged: {', '.join(dict.fromkeys(wrong))} not of the type written there")
    return verdict


def headline(verdict: Mapping[str, Any]) -> str:
    """The verdict in a sentence."""
    culprits = name_ranks(verdict["culprits"])
    name = verdict["verdict"]
    if name == "clean":
        told = next((text for text in reversed(verdict["evidence"]) if "equal" in text), "")
        return f"All {verdict['num_ranks']} ranks finished{f': {told}' if told else ''}."
    if not name:
        return "This run has no verdict."
    where = "; ".join(verdict["sentences"][:4]) or "no rank said where it is"
    more = len(verdict["sentences"]) - 4
    if more > 0:
        where += f"; and {more} more places"
    cause = _CAUSES.get((name, verdict["cause"])) or verdict["cause"]
    finding = f" {cause}".rstrip() + (f" by {culprits}" if verdict["culprits"] else "") if cause else ""
    return shorten_rank_lists(f"{name.capitalize()}:{finding}{';' if finding else ''} {where}.")


_CAUSES = {
    ("deadlock", "extra"): "a collective too many",
    ("deadlock", "skipped"): "a collective left out",
    ("deadlock", "order"): "two groups entered in another order",
    ("deadlock", "mismatch"): "different collectives under one number",
    ("deadlock", "sizes"): "sizes that differ",
    ("deadlock", "lock"): "a lock held across a collective",
    ("crash", "dead_rank"): "a process died",
    ("crash", "error"): "an error raised",
}


def siblings(root: Path, facts: Facts) -> list[Path]:
    """The newest runs beside ``root`` of the same family and another variant."""
    described = facts.description
    if described is None or not described.family:
        return []
    newest: dict[str, Path] = {}
    names = f"*-{glob.escape(described.title)}-*-{facts.verdict['seed']}"
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
    """A span's name as the trace and the pictures show it."""
    parts = (label.group, label.name, label.layer) if label.kind in ("call", "async") else (label.name,)
    return " ".join(part for part in parts if part)
