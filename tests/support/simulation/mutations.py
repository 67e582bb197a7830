"""Damage run directories and bundles at random, and run a command on each in a process of its own.

``python tests/support/simulation/mutations.py FIRST_SEED COUNT`` prints a line of JSON for each: what was damaged, how
the command ended, what it printed, its processor time, and its peak memory. The same seed gives the same damage.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reported import write_hang

from repro import bundle
from repro.bundle import assemble
from repro.commands.cli import main
from repro.watch import offline

LIMIT_S = 60
NUM_RANKS = 4

VALUES: list[Any] = [
    None, True, -1, 0, 3, 2**31, 2**63, 10**30, 1e308, -1e-308, "", "x", "\x1b[2J", "../" * 40, "a" * 100_000, "\ud800",
    [], {}, [[]] * 1000, {"a": {}}, list(range(1000)), [None], ["0"], {"0": 0}, "deadlock", "metadata_rebuild", "fix",
]  # fmt: skip
TEXTS = [
    b"", b"{", b"null", b"NaN", b"[1e999]", b"[" * 100_000, b'{"a":' * 100_000, b"[" + b"{}," * 1_000_000 + b"{}]",
    b'{"a":[' + b"[]," * 1_000_000 + b"[]]}", b'{"a":[' + b"1000," * 1_000_000 + b"1]}", b"\xff" * 100, bytes(3 << 20),
    b'{"r":[' + b'"ab",' * 500_000 + b"1]}", b"1" * 5000, b'"\\ud800"',
]  # fmt: skip


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(value, key), *nodes(value[key])]
    return found


def change_json(path: Path, rng: random.Random) -> str:
    """Put up to three unsuitable values into a JSON file."""
    document = json.loads(path.read_text())
    lines = []
    for _ in range(rng.randint(1, 3)):
        if not (places := nodes(document)):
            break
        container, key = rng.choice(places)
        value = copy.deepcopy(rng.choice(VALUES))
        if rng.random() < 0.2 and isinstance(container, dict):
            del container[key]
            lines.append(f"{key} removed")
        else:
            container[key] = value
            lines.append(f"{key} = {value!r}"[:80])
    path.write_text(json.dumps(document))
    return f"{path.name}: {', '.join(lines)}"


def change_bytes(path: Path, rng: random.Random) -> str:
    """Flip, cut, repeat or replace the bytes of a file."""
    data = bytearray(path.read_bytes())
    what = rng.choice(("flip", "cut", "zero", "repeat", "text"))
    if what == "flip":
        for _ in range(rng.randint(1, 20)):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del data[rng.randint(0, len(data)) :]
    elif what == "zero" and data:
        start = rng.randrange(len(data))
        data[start : start + 4096] = bytes(4096)
    elif what == "repeat":
        data *= 3
    else:
        data = bytearray(rng.choice(TEXTS))
    path.write_bytes(data)
    return f"{path.name}: {what}"


def replace_file(path: Path, rng: random.Random) -> str:
    """Replace a file by something that is not a regular file."""
    path.unlink()
    what = rng.choice(("pipe", "device", "folder", "nothing", "loop", "random"))
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what != "nothing":
        path.symlink_to({"device": "/dev/zero", "loop": path.name, "random": "/dev/urandom"}[what])
    return f"{path.name}: {what}"


def damage(root: Path, rng: random.Random, kinds: list[Callable[[Path, random.Random], str]]) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    documents = [path for path in files if path.suffix == ".json"]
    kind = rng.choice(kinds)
    return kind(rng.choice(documents if kind is change_json or rng.random() < 0.5 else files), rng)


def pack(folder: Path, target: Path) -> None:
    """Pack the files into a bundle. Its manifest is right, unless the manifest itself was damaged."""
    manifest = folder / "MANIFEST.json"
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    try:
        document = json.loads(manifest.read_bytes())
        sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != manifest.name}
        document["files"] = {name: {"bytes": len(files[name]), "sha256": digest} for name, digest in sums.items()}
        files[manifest.name] = json.dumps(document).encode()
    except (ValueError, TypeError, RecursionError, OSError):
        pass  # the manifest itself is damaged
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def case(seed: int, run: Path, unpacked: Path, folder: Path) -> tuple[list[str], str]:
    """Make the damaged file of a seed. Returns the command that reads it, and what was damaged."""
    rng = random.Random(seed)
    place = folder / run.name
    if rng.random() < 0.5:
        shutil.copytree(run, place)
        changes = damage(place, rng, [change_json, change_json, change_bytes, replace_file])
        return [rng.choice(("watch", "watch", "report")), str(place)], changes
    shutil.copytree(unpacked, place)
    changes = damage(place, rng, [change_json, change_bytes])
    target = folder / "bundle.zip"
    pack(place, target)
    shutil.rmtree(place)
    if rng.random() < 0.2:
        changes = change_bytes(target, rng)
    return [*rng.choice((["watch"], ["watch"], ["bundle", "--verify"])), str(target)], changes


def measured(command: list[str], folder: Path) -> dict[str, Any]:
    """Run a command in a forked process. Returns how it ended and what it used."""
    output = folder / "output"
    began = time.monotonic()
    if not (pid := os.fork()):
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = main(command)
        except SystemExit as usage:
            code = usage.code
        except BaseException as error:
            print("Traceback:", repr(error))
            code = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status, use = os.wait4(pid, 0)
    return {
        "code": os.waitstatus_to_exitcode(status), "output": output.read_text(errors="replace")[-20_000:],
        "cpu_s": round(use.ru_utime + use.ru_stime, 2), "mib": use.ru_maxrss >> 10,
        "seconds": round(time.monotonic() - began, 2),
    }  # fmt: skip


def run_cases(first: int, count: int) -> None:
    assemble._environment = lambda recogniser: ""  # the description of this machine, which torch would collect
    offline.LOOK_S = 0.01
    with tempfile.TemporaryDirectory() as name:
        run, _ = write_hang(Path(name) / "runs", NUM_RANKS)
        (run / "reference.json").write_text('{"rank0-0": [1, 2]}')
        for rank in range(NUM_RANKS):
            (run / "outputs" / f"rank{rank:03d}.json").write_text('{"rank0-0": [1, 2]}')
        bundle.make(run, Path(name) / "whole.zip")
        with zipfile.ZipFile(Path(name) / "whole.zip") as archive:
            archive.extractall(Path(name) / "unpacked")
        for seed in range(first, first + count):
            folder = Path(name) / str(seed)
            folder.mkdir()
            command, changes = case(seed, run, Path(name) / "unpacked", folder)
            print(json.dumps({"seed": seed, "command": command[:-1], "damage": changes, **measured(command, folder)}))
            sys.stdout.flush()
            shutil.rmtree(folder)


if __name__ == "__main__":
    run_cases(int(sys.argv[1]), int(sys.argv[2]))
