"""Read the local variables that py-spy prints, and write only those that a diagnosis needs.

Local variables can contain prompts, samples and passwords. So only four kinds of variables are written to a file: the
process group of a collective, the peer of a send or receive, ranks (and their number), and paths of lock files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from repro.ingest.stacks.activities import activity_of
from repro.ingest.stacks.dumps import frames_of
from repro.ingest.stacks.frame_locals import variables_of

Threads = Sequence[Mapping[str, Any]]
RANKS = ("rank", "global_rank", "RANK")
SIZES = ("world_size", "WORLD_SIZE", "nprocs", "num_ranks")
_KEPT = {*RANKS, *SIZES, "local_rank", "src", "dst", "group_src", "group_dst"}
_GROUP = re.compile(r"<(?:[\w.]+\.)?ProcessGroup\w* at 0x[0-9a-fA-F]+>")
_TEXT = re.compile(r"^['\"](/[^'\"]{1,1000})['\"]$")
MAX_FRAMES = 200
MAX_THREADS = 200


def main_thread(threads: Threads, pid: int) -> Mapping[str, Any]:
    """Return the main thread of the process ``pid`` from the list of its threads; {} if the list does not have it."""
    named = [thread for thread in threads if thread.get("thread_name") == "MainThread"]
    first = [thread for thread in threads if thread.get("os_thread_id") == pid]
    return (named or first or [{}])[0]


def ranks_by_variables(stacks: Mapping[int, Threads]) -> tuple[dict[int, int], int | None]:
    """Return two values from local variables of the main threads: the rank of each pid, and the number of ranks.

    The first value is {} if a process shows no rank, or if two processes show the same rank. The second value is None
    if no process shows the number, or if two processes show different numbers. If a rank is not below the number of
    ranks, the variables are not trusted, and the result is ({}, None).
    """
    ranks: dict[int, int] = {}
    sizes: set[int] = set()
    for pid, threads in stacks.items():
        frames = list(reversed(_frames(main_thread(threads, pid))))  # the outermost frame first
        rank = next(_numbers(frames, RANKS), None)
        if rank is not None:
            ranks[pid] = rank
        sizes.update(list(_numbers(frames, SIZES))[:1])
    size = sizes.pop() if len(sizes) == 1 else None
    if len(set(ranks.values())) < len(ranks) or len(ranks) < len(stacks):
        return {}, size
    return (ranks, size) if size is None or all(rank < size for rank in ranks.values()) else ({}, None)


def waits_for_lock(threads: Threads, pid: int) -> bool:
    """Whether the main thread of the process ``pid`` waits for a file lock. threads: all threads of this process"""
    return activity_of(frames_of(_frames(main_thread(threads, pid))))[0] == "lock"


def may_move(threads: Threads, pid: int) -> bool:
    """Whether the process ``pid`` possibly makes progress, although its stack looks like a wait.

    threads: all threads of this process

    True if the main thread uses a processor inside a collective, or waits for its next task, as a worker of a serving
    engine does between two steps.
    """
    thread = main_thread(threads, pid)
    activity = activity_of(frames_of(_frames(thread)))[0]
    return activity == "idle" or (bool(thread.get("active")) and activity == "collective")


def lock_paths(threads: Threads, pid: int) -> Iterator[str]:
    """Yield the paths of lock files that are in local variables of the main thread of the process ``pid``.

    A variable has the path of the lock file, or of a folder with a file named "lock", such as a build folder of torch.
    """
    for frame in _frames(main_thread(threads, pid)):
        for _, text in variables_of(frame):
            if match := _TEXT.match(text):
                path = match[1]
                if os.path.exists(f"/proc/{pid}/root{path}/lock") or os.path.exists(f"{path}/lock"):
                    yield f"{path}/lock"
                elif "lock" in os.path.basename(path).lower():
                    yield path


def stripped(threads: Threads, pid: int, title: str) -> list[dict[str, Any]]:
    """Return the threads in the form of py-spy, but only with the variables that a diagnosis needs.

    title: the title of the process, which is saved in place of its command line
    """
    return [
        {
            "pid": pid,
            "thread_id": thread.get("thread_id"),
            "thread_name": thread.get("thread_name"),
            "os_thread_id": thread.get("os_thread_id"),
            "active": thread.get("active"),
            "owns_gil": thread.get("owns_gil"),
            "process_info": {"pid": pid, "command_line": title},
            "frames": [_stripped_frame(frame) for frame in _frames(thread)],
        }
        for thread in threads[:MAX_THREADS]
    ]


def _stripped_frame(frame: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: frame.get(key) for key in ("name", "filename", "short_filename", "module", "line")}
    return {**kept, "locals": [{"name": name, "repr": text} for name, text in _kept_variables(frame)]}


def _kept_variables(frame: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, text in variables_of(frame):
        if name in ("args", "kwargs"):  # other arguments may be private, so only the group is kept
            match = _GROUP.search(text)
            absent = '{"group": None}' if name == "kwargs" and '"group"' in text else "{}" if name == "kwargs" else "()"
            yield name, f"({match[0]})" if match else absent
        elif _is_kept(name, text):
            yield name, text


def _is_kept(name: str, text: str) -> bool:
    if name in _KEPT:
        return text.isdigit()
    if _GROUP.fullmatch(text) or (name == "group" and text == "None"):
        return True
    match = _TEXT.match(text)
    return match is not None and "lock" in os.path.basename(match[1]).lower()


def _numbers(frames: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[int]:
    for frame in frames:
        for name, text in variables_of(frame):
            if name in names and text.isdigit():
                yield int(text)


def _frames(thread: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = thread.get("frames")
    return [row for row in rows[:MAX_FRAMES] if isinstance(row, dict)] if isinstance(rows, list) else []
