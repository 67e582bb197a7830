"""Make the bundle of a run: copy what is recognised as harmless, judge the copy, draw its report, and pack it.

The report, the text of the issue and the reproducer (repro.py) are made from the copy, so they contain nothing that the
copy lacks. Before the zip is written, a plain search looks in all files for the names of this machine and its user.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_moe_ref.files import open_regular, read_at_most, read_json
from repro import report
from repro.bundle import replay
from repro.bundle.archive import pack
from repro.bundle.issue import UNPACKED, commands_script, issue
from repro.bundle.leaks import private_values, refuse_leaks
from repro.bundle.redact import documents, environment, lines
from repro.bundle.redact.recognise import Recogniser, distinct, this_machine
from repro.bundle.redact.search import Search, literals_of
from repro.bundle.redact.witnesses import redact_witness
from repro.bundle.scratch import scratch_folder
from repro.report.gather import RunData, gather, siblings
from repro.store.description import VARIANTS, read_description
from repro.store.run_dir import SUFFIX, RunDir, write_json
from repro.store.text import escape_control_characters
from repro.trace.witness.file import MAX_BYTES
from repro.trace.witness.format import CRC, HEADER
from repro.trace.witness.parse import parse_header
from repro.verdict import Verdict
from repro.watch.comparison import Comparison
from repro.watch.offline import judge_files, options_of

SCHEMA_VERSION = 2
COLLECT_ENV_S = 60
_MAX_LOG_BYTES = 512 << 10

_FOLDERS = {"events": "wit", "fr": "json", "stacks": "txt", "logs": "log", "env": "txt", "outputs": "json"}
"""For each folder with one file for each rank, the suffix of these files' names."""
_LOGS = ("logs/launcher.log", "logs/reference.log", "logs/watcher.log")
_FILES = ("run.json", "config.json", "verdict.json", "reference.json")

Document = Callable[[Any, Recogniser], Any]
_DOCUMENTS: Mapping[str, Document] = {
    "run.json": documents.description,
    "config.json": documents.config,
    "verdict.json": documents.verdict,
    "reference.json": documents.tokens,
    "outputs": documents.tokens,
    "fr": documents.recorder,
}
_TEXTS: Mapping[str, Callable[[str, Recogniser], str]] = {
    "stacks": lines.stack,
    "logs": lines.log,
    "env": lambda text, recogniser: lines.machine(text, environment.rank_line, recogniser),
}


@dataclass
class Made:
    """The result of making a bundle: the zip, and what it does not contain.

    size       size of the zip in bytes
    left_out   how often something was left out or replaced, by the kind of content: "names", "text", "files", …
    notes      sentences for the user, for example about files that were left out or shortened
    """

    path: Path
    size: int
    left_out: Mapping[str, int]
    notes: list[str] = field(default_factory=list)


Judge = Callable[[RunDir], Verdict]
"""A function that judges the redacted copy of a run, which goes into the bundle."""


def judge_copy(run_dir: RunDir, comparison: Comparison | None = None) -> Verdict:
    """Judge the redacted copy of a run from its files.

    comparison: the result of comparing the run's tokens with those of the reference model; None if they were not
    compared
    """
    comparison = comparison or Comparison(missing="the results in the bundle were not compared")
    return judge_files(run_dir, options_of(read_description(run_dir.description)), comparison).verdict


def make(root: Path, path: Path | None = None, with_logs: bool = False, judge: Judge = judge_copy) -> Made:
    """Write one bundle of the run at ``root`` and of the runs beside it that are other variants of this run.

    path: the zip to write; by default it is beside the main run and has that run's name
    with_logs: also keep text that is not known to be harmless, if a search finds nothing in it that could be private
    judge: a function that returns the verdict on the redacted copy of each run

    The main run of the bundle is the run of variant `fault`; without such a run, it is the run at ``root``. Raises
    ConfigError if there is no run, LeakError if a private name was found, OSError if the zip cannot be written.
    """
    root = root.resolve()
    family = _family(root)
    main = family.get("fault", root)
    path = path or main.parent / f"{main.name}.zip"
    hosts = [*dict.fromkeys(name for run in family.values() for name in _hosts(run)), *this_machine()]
    private = distinct({*private_values(os.environ), *hosts, *(name.partition(".")[0] for name in hosts)})
    recogniser = Recogniser(private, Search({*literals_of(os.environ), *private}) if with_logs else None)
    for name in hosts:
        recogniser.name_host(name)
    notes: list[str] = []
    with scratch_folder("repro-bundle-") as scratch:
        folder = scratch / UNPACKED
        for variant, run in family.items():
            copy = folder if run == main else folder / variant
            _copy_run(run, copy, recogniser, notes)
            _judge(copy, run, judge, recogniser, notes)
        beside = [folder / variant for variant, run in family.items() if run != main]
        data = report.write(folder, beside, UNPACKED)
        for other in beside:
            report.write(other, [folder, *(run for run in beside if run != other)], f"{UNPACKED}/{other.name}")
        others = [gather(run, with_lanes=False) for run in beside]
        (folder / "env.txt").write_text(_environment(recogniser))
        try:
            (folder / "repro.py").write_text(_reproducer(data, others, notes))
        except replay.ReplayError as error:
            notes.append(f"no repro.py: {str(error).replace(f'{folder}/', '')}")
        (folder / "ISSUE.md").write_text(issue(data, others, recogniser.left_out.total()))
        (folder / "COMMANDS.sh").write_text(commands_script(data))
        refuse_leaks(folder, private | {str(scratch)})
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "scenario": data.verdict.scenario,
            "verdict": data.verdict.verdict,
            "cause": data.verdict.cause or "",
            "left_out": dict(sorted(recogniser.left_out.items())),
            "with_logs": with_logs,
        }
        size = pack(folder, path, manifest)
    return Made(path, size, dict(recogniser.left_out), notes)


def _family(root: Path) -> dict[str, Path]:
    data = gather(root, with_lanes=False)
    variant = data.verdict.variant
    runs = {gather(path, with_lanes=False).verdict.variant: path for path in siblings(root, data)}
    runs[variant if variant in VARIANTS else "fault"] = root
    return {name: runs[name] for name in VARIANTS if name in runs}


def _hosts(run: Path) -> Iterator[str]:
    """Yield the name of each rank's host. Redaction needs all names before it begins: any file can contain any name."""
    for path in sorted((run / "events").glob(f"*{SUFFIX}")):
        with contextlib.suppress(OSError, ValueError), open_regular(path, MAX_BYTES) as file:
            yield parse_header(file.read(HEADER.size + CRC.size), path.name)[0].hostname


# -- copying -----------------------------------------------------------------------------------------------------------


def _copy_run(source: Path, target: Path, recogniser: Recogniser, notes: list[str]) -> None:
    """Copy the files of a run, each redacted.

    For each file that is left out, add a sentence to ``notes``.
    """
    target.mkdir(parents=True, exist_ok=True)
    names = [f"{folder}/{file.name}" for folder in _FOLDERS for file in sorted((source / folder).glob("*"))]
    for name in (*names, *_FILES):
        path = source / name
        if not os.path.lexists(path):
            continue
        folder, _, file = name.rpartition("/")
        if folder and name not in _LOGS and not re.fullmatch(rf"rank\d{{1,6}}\.{_FOLDERS[folder]}", file):
            notes.append(f"{escape_control_characters(name)} is left out, because a run leaves no such file")
            recogniser.left_out["files"] += 1
            continue
        try:
            if path.is_symlink():  # may lead to a path outside the run
                raise ValueError("a link")
            data = _redacted(path, folder or file, recogniser, notes)
        except (OSError, ValueError) as error:
            notes.append(f"{name} is left out: {str(error).replace(f'{source}/', '')}")
            recogniser.left_out["files"] += 1
            continue
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(data)


def _redacted(path: Path, kind: str, recogniser: Recogniser, notes: list[str]) -> bytes:
    """Return a file's redacted bytes. If the file is shortened, add a sentence to ``notes``.

    kind: the name of the file's folder in the run, such as "events"; for a file outside such folders, its own name

    Raises ValueError if the file's content is not of this kind, OSError if the file cannot be read.
    """
    if kind == "events":
        with open_regular(path, MAX_BYTES) as file:
            return redact_witness(read_at_most(file, MAX_BYTES), path.name, recogniser)
    if kind in _DOCUMENTS:
        return (json.dumps(_DOCUMENTS[kind](read_json(path), recogniser), indent=1) + "\n").encode()
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _MAX_LOG_BYTES))
        text = file.read(_MAX_LOG_BYTES).decode(errors="replace")
    if size > _MAX_LOG_BYTES:
        notes.append(f"{path.name} is shortened to its last {_MAX_LOG_BYTES >> 10} KiB")
        text = text.partition("\n")[2]  # the first line may have lost the word that shows what its rest means
    return _TEXTS[kind](text, recogniser).encode()


def _judge(copy: Path, run: Path, judge: Judge, recogniser: Recogniser, notes: list[str]) -> None:
    """Judge the copy of a run, and write the fields `evidence` and `sentences` of its verdict.json.

    The redaction of verdict.json has removed these two fields. If the copy has no verdict.json, do nothing.

    Lines of the run's own verdict.json that are recognised as harmless are kept, because some of them are observations
    of the watcher, which cannot be made again from the copy. The other lines are replaced by lines of the new
    judgement. If the copy cannot be judged, or its verdict, cause or culprits differ from those of the run, a sentence
    about this is added to ``notes``.
    """
    path = copy / "verdict.json"
    if not path.exists():
        return
    document, before = read_json(path), read_json(run / "verdict.json")
    if not isinstance(document, dict):
        return
    # The judge reads these lines only for a slow run, whose evidence cannot be produced again from the copy.
    recognised = _prose(before.get("evidence"), [], recogniser)
    write_json(path, document | {"evidence": recognised, "sentences": []})
    again: dict[str, Any] = {}
    try:
        verdict = judge(RunDir(copy))
        again = {
            "verdict": verdict.verdict, "cause": verdict.cause or None, "culprits": list(verdict.culprits),
            "evidence": list(verdict.evidence), "sentences": verdict.sentences(),
        }  # fmt: skip
    except (OSError, ValueError) as error:
        notes.append(f"{run.name}: the copy cannot be judged: {str(error).replace(f'{copy}/', '')}")
    for name in ("evidence", "sentences"):
        document[name] = _prose(before.get(name), again.get(name, []), recogniser)
    write_json(path, document)
    for name in ("verdict", "cause", "culprits"):
        if again and before.get(name) != again[name]:
            notes.append(
                f"{run.name}: {name} is {again[name]} by the bundle's files, but {before.get(name)} by verdict.json"
            )


def _prose(before: Any, again: list[str], recogniser: Recogniser) -> list[str]:
    """Return the lines of ``before`` that are known to be harmless, and replacements for the other lines.

    A line is replaced by the line of ``again`` with the same index. If that line does not exist, or is not known
    to be harmless either, the line is left out.

    before: a list of lines from the run's verdict.json
    again: the same list from the judgement of the copy
    """
    if not isinstance(before, list):
        return []
    again = [line.replace("\n", " ") for line in again]
    kept: list[str] = []
    for index, line in enumerate(before):
        own = recogniser.recognised(line) if isinstance(line, str) else None
        other = recogniser.recognised(again[index]) if index < len(again) else None
        if own is None and other is None and again:
            recogniser.left_out["text"] += 1
        kept += [text for text in (own or other,) if text]
    return kept


# -- files that are made for the bundle --------------------------------------------------------------------------------


def _environment(recogniser: Recogniser) -> str:
    """Run torch.utils.collect_env in a new process. Return its redacted output; if it fails, a line that says how."""
    command = [sys.executable, "-m", "torch.utils.collect_env"]
    intro = (
        "torch.utils.collect_env, on the machine and at the time at which this bundle was made.\nThe files in env/ "
        "say what each rank of the run had loaded.\n\n"
    )
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=COLLECT_ENV_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{intro}{type(error).__name__}: no report\n"
    if answer.returncode != 0:
        return f"{intro}torch.utils.collect_env failed with exit code {answer.returncode}\n"
    return intro + lines.machine(answer.stdout, environment.collected_line, recogniser)


def _reproducer(data: RunData, others: list[RunData], notes: list[str]) -> str:
    """Return the source of one script that repeats the hang. Raises ReplayError if the run cannot be replayed.

    If one of ``others`` (the runs of the other variants) is a run with the fix that has the verdict `clean` and can be
    replayed, the script repeats this run with --fix.
    """
    if replay.is_that_of_ep_deadlock(data.verdict):
        return replay.EP_DEADLOCK.read_text()
    hang = replay.of_runs(data, None)
    for fix in (run for run in others if (run.verdict.variant, run.verdict.verdict) == ("fix", "clean")):
        try:
            return replay.of_runs(data, fix.root)
        except replay.ReplayError as error:
            notes.append(f"repro.py has no --fix: {str(error).replace(f'{data.root}/', '')}")
    return hang
