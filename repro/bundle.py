"""A run as one zip to attach to a bug report: the evidence, the pictures, the issue's text, and how to do it again.

What could name a person, a machine or a secret is taken out first, of the witnesses too; the report is then made
anew from what is left, so that nothing else can be in it. Before the zip is written every file of it is searched for
what was to be gone.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_moe_ref.files import open_regular
from repro import replay, report
from repro.archive import MANIFEST, MAX_TOTAL_BYTES, ArchiveError, differences, unpack
from repro.issue import UNPACKED, commands_script, issue
from repro.layout import CRC, HEADER
from repro.parse import parse_header
from repro.redact import RULES, Redactor, redact_witness
from repro.report.gather import Facts, gather, siblings
from repro.report.text import visible, visible_lines
from repro.rundir import MAX_JSON_BYTES, RunDir, refuse_unwritable
from repro.settings import VARIANTS
from repro.witness import MAX_BYTES, SUFFIX

SCHEMA_VERSION = 1
COLLECT_ENV_S = 60
_FOLDERS = ("events", "fr", "stacks", "logs", "env", "outputs")
_FILES = ("config.json", "verdict.json", "reference.json")
_OF_A_RANK = re.compile(r"rank\d{1,6}\.[a-z]{1,5}")
_LANES = re.compile(rb'<script type="text/plain" id="lane\d+">[A-Za-z0-9+/=]*</script>')
_MAX_LOG_BYTES = 512 << 10


class LeakError(RuntimeError):
    """Something that was to be removed is still there; nothing was written."""


@dataclass
class Made:
    """What was bundled: removed counts replacements by rule, notes are files that were left out or cut."""

    path: Path
    size: int
    removed: Mapping[str, int]
    notes: list[str] = field(default_factory=list)


def make(root: Path, path: Path | None = None, keep: frozenset[str] = frozenset()) -> Made:
    """Write the bundle of a run and its siblings; ``path`` is by default beside the runs.

    keep: names of redaction rules that are off. The fault is the bundle's main run where there is one.

    Raises ConfigError when there is no run, LeakError when redaction failed, OSError when it cannot be written.
    """
    root = root.resolve()
    family = _family(root)
    main = family.get("fault", root)
    path = path or main.parent / f"{main.name}.zip"
    redactor = Redactor.of_this_machine(keep)
    notes: list[str] = []
    for run in family.values():
        _name_hosts(run, redactor)
    with tempfile.TemporaryDirectory(prefix="repro-bundle-") as name:
        folder = Path(name) / UNPACKED
        for variant, run in family.items():
            _copy_run(run, folder if run == main else folder / variant, redactor, notes)
        beside = [folder / variant for variant, run in family.items() if run != main]
        facts = report.write(folder, beside, UNPACKED)
        for other in beside:
            report.write(other, [folder, *(run for run in beside if run != other)], f"{UNPACKED}/{other.name}")
        others = [gather(run, with_lanes=False) for run in beside]
        environment = _environment(redactor)
        (folder / "env.txt").write_text(environment)
        try:
            (folder / "repro.py").write_text(_reproducer(facts, others, notes))
        except replay.ReplayError as error:
            notes.append(f"no repro.py: {str(error).replace(f'{folder}/', '')}")
        (folder / "ISSUE.md").write_text(issue(facts, others))
        (folder / "COMMANDS.sh").write_text(commands_script(facts))
        _refuse_leaks(folder, redactor)
        size = _pack(folder, path, facts, redactor)
    return Made(path, size, dict(redactor.removed), notes)


def verify(path: Path) -> list[str]:
    """What is wrong with a bundle, one line each. Raises ArchiveError for what is none, or is not safe to open."""
    with tempfile.TemporaryDirectory(prefix="repro-verify-") as name:
        return differences(Path(name), unpack(path, Path(name)), str(path))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Path]:
    """A run directory as it is, or that of a bundle, unpacked for the length of a ``with``.

    Raises ArchiveError for a zip that is no bundle, is not safe to open, or is not as its manifest says.
    """
    if not path.is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="repro-bundle-") as name:
        if wrong := differences(Path(name), unpack(path, Path(name)), str(path)):
            raise ArchiveError(f"{path}: {wrong[0]}" + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""))
        yield Path(name)


def _family(root: Path) -> dict[str, Path]:
    facts = gather(root, with_lanes=False)
    variant = facts.verdict["variant"]
    runs = {gather(path, with_lanes=False).verdict["variant"]: path for path in siblings(root, facts)}
    runs[variant if variant in VARIANTS else "fault"] = root
    return {name: runs[name] for name in VARIANTS if name in runs}


# -- copying -----------------------------------------------------------------------------------------------------------


def _name_hosts(run: Path, redactor: Redactor) -> None:
    """Learn the hosts of the ranks before anything is copied: any file may name any of them."""
    for path in sorted((run / "events").glob(f"*{SUFFIX}")):
        with contextlib.suppress(OSError, ValueError), open_regular(path, MAX_BYTES) as file:
            redactor.name_host(parse_header(file.read(HEADER.size + CRC.size), path.name)[0].hostname)


def _copy_run(source: Path, target: Path, redactor: Redactor, notes: list[str]) -> None:
    """Copy what a run left, redacted, but for files whose names a run of this program does not give."""
    target.mkdir(parents=True, exist_ok=True)
    run_dir = RunDir(source)
    of_no_rank = {run_dir.launcher_log, run_dir.reference_log, *(source / name for name in _FILES)}
    names = [*_FILES, *(f"{folder}/{file.name}" for folder in _FOLDERS for file in sorted((source / folder).glob("*")))]
    for name in names:
        path = source / name
        if not os.path.lexists(path):
            continue
        if path not in of_no_rank and not _OF_A_RANK.fullmatch(path.name):
            notes.append(f"{visible(name)} is left out: not a file that a run leaves")
            continue
        try:
            if path.is_symlink():  # to a file that is none of the run's
                raise ValueError("a link")
            data = _redacted(path, redactor, notes)
        except (OSError, ValueError) as error:
            notes.append(f"{name} is left out: {str(error).replace(f'{source}/', '')}")
            continue
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(data)


def _redacted(path: Path, redactor: Redactor, notes: list[str]) -> bytes:
    with open_regular(path, MAX_JSON_BYTES) as file:
        data = file.read()
    if path.suffix == SUFFIX:
        return redact_witness(data, str(path), redactor)
    if path.suffix == ".log" and len(data) > _MAX_LOG_BYTES:
        notes.append(f"{path.name} is cut to its last {_MAX_LOG_BYTES >> 10} KiB")
        data = data[-_MAX_LOG_BYTES:]
    text = data.decode(errors="replace")
    if path.suffix == ".json":
        try:
            return (json.dumps(redactor.document(json.loads(text)), indent=1) + "\n").encode()
        except (ValueError, RecursionError):
            notes.append(f"{path.name} is not JSON and is copied as text")
    return redactor.text(text).encode()


def _refuse_leaks(folder: Path, redactor: Redactor) -> None:
    """Raise LeakError where something is left, by a plain search that knows nothing of how the rules replace."""
    forbidden = list(redactor.forbidden())
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        if path.name == "report.html":
            data = _LANES.sub(b"", data)  # numbers in base64, which may spell any name
        for text, rule, anywhere in forbidden:
            if (anywhere or path.suffix != SUFFIX) and text.search(data):
                raise LeakError(
                    f"{path.relative_to(folder)} still holds something of the rule {rule!r}; nothing was written"
                )


def _pack(folder: Path, path: Path, facts: Facts, redactor: Redactor) -> int:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = [str(file.relative_to(folder)) for file in files]
    total = sum(file.stat().st_size for file in files)
    if total > MAX_TOTAL_BYTES:  # nobody could open it
        raise ArchiveError(
            f"{path}: would unpack to {total} bytes, at most {MAX_TOTAL_BYTES} are read; fewer ranks fit"
        )
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "scenario": facts.verdict["scenario"],
        "verdict": facts.verdict["verdict"],
        "cause": facts.verdict["cause"],
        "redacted": {rule: redactor.removed[rule] for rule in RULES if rule not in redactor.keep},
        "kept": sorted(redactor.keep),
        "files": {
            name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
            for name, file in zip(names, files, strict=True)
        },
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name, file in zip(names, files, strict=True):
                _add(archive, name, file.read_bytes())
            _add(archive, MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """The same bytes give the same zip, whenever it is made."""
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    entry.external_attr = (0o755 if name.endswith((".sh", ".py")) else 0o644) << 16
    archive.writestr(entry, data, zipfile.ZIP_DEFLATED, 9)


# -- what is written for it ------------------------------------------------------------------------------------------


def _environment(redactor: Redactor) -> str:
    """torch's own report of this machine, asked in a process of its own."""
    command = [sys.executable, "-m", "torch.utils.collect_env"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=COLLECT_ENV_S)
        told = answer.stdout if answer.returncode == 0 else f"failed: {answer.stderr[-500:]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        told = f"failed: {error}"
    intro = (
        "torch.utils.collect_env, on the machine and at the time that made this bundle.\n"
        "What each rank of the run had loaded stands in env/.\n\n"
    )
    return redactor.text(intro + told)


def _reproducer(facts: Facts, others: list[Facts], notes: list[str]) -> str:
    """The hang in one file, with the cure if there is a run of it that went well and can be replayed."""
    if replay.is_that_of_ep_deadlock(facts.verdict):
        return replay.EP_DEADLOCK.read_text()
    hang = replay.of_runs(facts, None)
    for fix in (run for run in others if (run.verdict["variant"], run.verdict["verdict"]) == ("fix", "clean")):
        try:
            return replay.of_runs(facts, fix.root)
        except replay.ReplayError as error:
            notes.append(f"repro.py is without --fix: {str(error).replace(f'{facts.root}/', '')}")
    return hang


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser("bundle", help="a run as one zip to attach to a bug report; or check such a zip")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, or with --verify a zip")
    parser.add_argument("--verify", action="store_true", help="compare a zip with its manifest")
    parser.add_argument("--to", type=Path, metavar="ZIP", help="default: beside the run")
    for rule, what in RULES.items():
        parser.add_argument(f"--keep-{rule}", dest="keep", action="append_const", const=rule, help=f"keep {what}")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Make a bundle and say what was removed, or verify one: 0, 1 where it is not as its manifest says."""
    if args.verify:
        wrong = verify(args.run)
        if args.json:
            print(json.dumps({"bundle": str(args.run), "wrong": wrong}, indent=1))
        else:
            print(visible_lines("\n".join(wrong)) or f"{args.run}: every file is as {MANIFEST} says")
        return int(bool(wrong))
    if args.run.is_dir():
        root = args.run.resolve()
        refuse_unwritable(args.to or root.with_name(f"{root.name}.zip"), "; choose another --to")
    made = make(args.run, args.to, frozenset(args.keep or ()))
    if args.json:
        told = {"bundle": str(made.path), "bytes": made.size, "removed": dict(made.removed), "notes": made.notes}
        print(json.dumps(told, indent=1))
        return 0
    print(f"{made.path}: {made.size / 1e6:.2f} MB")
    for rule, what in RULES.items():
        kept = rule in (args.keep or ())
        print(
            f"  kept: {what}" if kept else f"  removed {made.removed.get(rule, 0)}: {what} (--keep-{rule} keeps them)"
        )
    for note in made.notes:
        print(visible(f"  {note}", 4000))
    return 0
