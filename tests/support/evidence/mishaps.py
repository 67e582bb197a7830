"""What may happen to evidence on the way: files are lost, cut, renamed, merged or repeated, or older files are
added.
"""

from __future__ import annotations

import json
import pickle
import random
import re
from typing import Any

Files = dict[str, bytes]


def _is_text(data: bytes) -> bool:
    return data[:1] not in (b"\x80", b"{")


def lose(files: Files, rng: random.Random) -> Files:
    kept = rng.sample(sorted(files), rng.randint(1, len(files)))
    return {name: files[name] for name in kept}


def truncate(files: Files, rng: random.Random) -> Files:
    name = rng.choice(sorted(files))
    return {**files, name: files[name][: rng.randrange(len(files[name]) + 1)]}


def rename(files: Files, rng: random.Random) -> Files:
    """Change folders and prefixes. The number at the end of a dump's name is its rank, and stays."""
    renamed = {}
    for name, data in files.items():
        base = name.rpartition("/")[2]
        base = f"out{rng.randrange(1000)}.txt" if _is_text(data) and "ras" not in base else f"run7_{base}"
        renamed[f"{rng.choice('abc')}{len(renamed)}/{base}"] = data
    return renamed


def merge(files: Files, rng: random.Random) -> Files:
    """Merge all logs into one file and interleave their lines, as a launcher does.

    The lines of each log keep their order.
    """
    logs = {name: data for name, data in files.items() if data.startswith(b"[")}
    queues = [data.splitlines(keepends=True) for data in logs.values()]
    merged = []
    while any(queues):
        queue = rng.choice([queue for queue in queues if queue])
        merged.append(queue.pop(0))
    rest = {name: data for name, data in files.items() if name not in logs}
    return {**rest, "all.log": b"".join(merged)} if merged else files


def other_zone(files: Files, rng: random.Random) -> Files:
    """Change the time zone of one log's clock."""
    name = rng.choice(sorted(files))
    hours = rng.choice([-5, -1, 1, 5])
    if not _is_text(files[name]):
        return files
    text = files[name].decode()
    moved = re.sub(r"(E1003 )(\d\d)(:)", lambda m: f"{m[1]}{int(m[2]) + hours:02d}{m[3]}", text)
    return {**files, name: moved.encode()}


def noise(files: Files, rng: random.Random) -> Files:
    """Add lines without information at the start or the end of a text."""
    lines = [
        "INFO 10-22 09:43:49 [loggers.py:118] Avg generation throughput: 0.0 tokens/s\n",
        "WARNING 10-22 09:43:49 [x.py:1] ImportError: no module named foo; falling back\n",
        "\x1b[36m(pid=4)\x1b[0m step 17 loss 3.25\n",
        "[W1003 10:00:00.1 socket.cpp:752] [c10d] The client socket has failed to connect; will retry\n",
        "NCCL version 2.27.5+cuda12.8\n",
        "/usr/lib/python3/x.py:7: UserWarning: barrier(): using the device\n",
    ]
    text = "".join(rng.sample(lines, 3)).encode()
    noisy = {}
    for name, data in files.items():
        plain = _is_text(data) and not data.startswith((b"NCCL version", b"Process"))
        noisy[name] = (text + data if rng.random() < 0.5 else data + text) if plain else data
    return {**noisy, "noise.log": text}


def repeat(files: Files, rng: random.Random) -> Files:
    """Add the same files again in another folder."""
    return {**files, **{f"copy/{name}": data for name, data in files.items() if rng.random() < 0.7}}


def older(files: Files, rng: random.Random) -> Files:
    """Add dumps of an earlier moment of some ranks: the same entries, cut before the first unfinished one."""
    added = {}
    for name, data in files.items():
        content = None if _is_text(data) or rng.random() < 0.4 else _content(data)
        if content is None:
            continue
        entries = content["entries"]
        finished = next((n for n, entry in enumerate(entries) if not entry["retired"]), len(entries))
        content["entries"] = entries[: rng.randint(0, finished)]
        content["pg_status"] = {}
        added[f"earlier/{name}"] = json.dumps(content).encode() if data[:1] == b"{" else pickle.dumps(content, 2)
    return {**files, **added}


def _content(data: bytes) -> dict[str, Any] | None:
    """Return the content of a dump; None if an earlier mishap damaged it."""
    try:
        # a pickle that this test has written itself
        return json.loads(data) if data[:1] == b"{" else pickle.loads(data)
    except (ValueError, EOFError, pickle.UnpicklingError):
        return None


MISHAPS = (lose, truncate, rename, merge, other_zone, noise, repeat, older)
