"""Read the files facts/*.json. In such a file, `hmr collect` describes the processes, locks and connections of a host.

We call one such observation of a host a look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from repro.trace.foreign.records import Child, Connections, LockLook, Note, Observation, Process, ProcessLook, Source

FORMAT = "hmr-host-look"
VERSION = 1
MAX_ROWS = 100_000
MAX_TEXT = 400


def looks_like_json(content: Any) -> bool:
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_json(content: dict[str, Any], file: str) -> Iterator[Observation]:
    """Return what one look shows, as records (`repro.trace.foreign.records`).

    content: the JSON document in the file; file: the name of the file, for messages

    Raises ValueError for an unknown version of the format.
    """
    if content.get("version") != VERSION:
        raise ValueError(
            f"the facts file has version {content.get('version')}, but this release reads only version {VERSION}: use "
            "the release that wrote the file"
        )
    host, look, at_s = _text(content.get("host")), _count(content.get("look")), _number(content.get("at_s"))
    for index, row in enumerate(_dicts(content.get("processes"))):
        source = Source(file, f"process {_count(row.get('pid')) or index}")
        yield ProcessLook(
            _process(row), host, look, at_s, _text(row.get("state"))[:1], _number(row.get("cpu_s")),
            _number(row.get("first_thread_cpu_s")), _count(row.get("switches")), _text(row.get("kernel_function")),
            tuple(map(_child, _dicts(row.get("children")))), source,
        )  # fmt: skip
    for row in _dicts(content.get("locks")):
        path = _text(row.get("path"))
        age_s = row.get("age_s")
        yield LockLook(
            path, _text(row.get("kind")), host, look, _pids(row.get("holders")), _pids(row.get("waiters")),
            _count(row.get("hidden")), _number(age_s) if age_s is not None else None,
            tuple(map(_text, _list(row.get("holder_names")))), Source(file, f"lock {path}"),
        )  # fmt: skip
    if isinstance(content.get("connections"), list):
        yield _connections(_dicts(content["connections"]), host, look, Source(file, "connections"))
    yield from _notes(content, file)


def _connections(rows: list[dict[str, Any]], host: str, look: int, source: Source) -> Connections:
    between: Counter[tuple[int, int]] = Counter()
    unread: Counter[int] = Counter()
    closed = set()
    for row in rows:
        pid, peer = _count(row.get("pid")), _count(row.get("peer"))
        unread[pid] += _count(row.get("receive_queue"))
        if row.get("closed_by_peer"):
            closed.add(pid)
        elif peer and pid < peer:
            between[pid, peer] += 1
    return Connections(host, look, dict(between), +unread, tuple(sorted(closed)), source)


def _notes(content: dict[str, Any], file: str) -> Iterator[Note]:
    source = Source(file)
    size = content.get("world_size")
    if isinstance(size, int) and not isinstance(size, bool) and 0 < size < MAX_ROWS:
        yield Note("world", f"the job has {size} ranks", Process(), str(size), None, source)
    for rank in _list(content.get("missing_ranks"))[:MAX_ROWS]:
        if isinstance(rank, int):
            words = f"rank {rank} has no process on {_text(content.get('host'))}"
            yield Note("no process", words, Process(rank=rank), str(rank), None, source)
    for text in _list(content.get("hidden"))[:MAX_ROWS]:
        yield Note("hidden", _text(text), Process(), "", None, source)
    loaded = content.get("versions")
    if isinstance(loaded, dict) and (version := _text(loaded.get("nccl"))):
        yield Note("version", f"NCCL {version} is loaded", Process(), version, None, source)
    if content.get("has_devices") is True:
        yield Note("devices", "the host has accelerators", Process(), "", None, source)
    if content.get("numbered") is True:
        words = (
            "the ranks of the processes are not known: here the processes are numbered from 0, in the order of their "
            "process ids"
        )
        yield Note("numbered", words, Process(), "", None, source)
    for row in _dicts(content.get("gpus"))[:64]:
        yield Note("gpu", _gpu(row), Process(), str(_count(row.get("index"))), None, source)
    for text in _list(content.get("warnings"))[:64]:
        yield Note("warning", _text(text), Process(), "", None, source)


def _gpu(row: dict[str, Any]) -> str:
    used, total = _count(row.get("memory_used")) >> 30, _count(row.get("memory_total")) >> 30
    pids = " ".join(map(str, _pids(row.get("pids"))[:8])) or "none"
    share = _count(row.get("utilisation"))
    return f"GPU {_count(row.get('index'))}: {share} % in use, {used} of {total} GiB, processes {pids}"


def _process(row: dict[str, Any]) -> Process:
    rank = row.get("rank")
    known = isinstance(rank, int) and not isinstance(rank, bool) and 0 <= rank < MAX_ROWS * 10
    return Process(
        _count(row.get("pid")) or None, _text(row.get("title")), rank if known else None, _text(row.get("role"))
    )


def _child(row: dict[str, Any]) -> Child:
    return Child(
        _count(row.get("pid")), _text(row.get("name")), _text(row.get("command")), _text(row.get("state"))[:1],
        _number(row.get("age_s")), _number(row.get("cpu_s")),
    )  # fmt: skip


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [row for row in _list(value) if isinstance(row, dict)]


def _list(value: Any) -> list[Any]:
    return value[:MAX_ROWS] if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value[:MAX_TEXT] if isinstance(value, str) else ""


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62 else 0


def _pids(value: Any) -> tuple[int, ...]:
    return tuple(pid for pid in map(_count, _list(value)) if pid)
