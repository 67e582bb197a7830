"""Collect the evidence of a job that runs: two looks some seconds apart, written as files that `diagnose` reads."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hybrid_moe_ref.files import write_atomically
from repro.hosts.looks.jobs import Job, Member
from repro.hosts.looks.look import host_name, look_at
from repro.hosts.looks.proc import command_of, descendants, read_all
from repro.hosts.looks.py_spy import Answer, find_py_spy, take_stacks
from repro.hosts.looks.rights import why_hidden
from repro.hosts.looks.variables import Threads, ranks_by_variables, stripped
from repro.store.run_dir import RunDir, write_json

LOOKS = 2
MAX_CHILD_STACKS = 64
_PYTHON = ("python", "pt_main", "pt_data")


@dataclass(frozen=True, slots=True)
class Collected:
    """What was collected: the job with the ranks that its variables gave, and what this user was not allowed to see."""

    job: Job
    hidden: tuple[str, ...]


def collect(run_dir: RunDir, job: Job, interval_s: float, sleep: Callable[[float], None] = time.sleep) -> Collected:
    """Look at the job LOOKS times and write what is seen. Raises OSError where the files cannot be written."""
    program = find_py_spy()
    hidden: dict[str, None] = {}
    if not program:
        hidden["py-spy is not installed, so no stacks were taken: pip install py-spy"] = None
    for number in range(1, LOOKS + 1):
        if number > 1:
            sleep(interval_s)
        answers = take_stacks(program, _pids_with_stacks(job)) if program else {}
        stacks = {pid: answer.threads for pid, answer in answers.items() if answer.threads}
        job = _with_ranks(job, stacks)
        for pid, answer in answers.items():
            if answer.failure:
                hidden[_failure(pid, job, answer)] = None
        _write_stacks(run_dir, job, number, stacks)
        document = look_at(job, number, stacks, list(hidden))
        write_json(run_dir.facts / f"{file_name(host_name())}.look{number}.json", document, durable=True)
    return Collected(job, tuple(hidden))


def _pids_with_stacks(job: Job) -> list[int]:
    """The job's processes, and Python processes below them, such as data loaders."""
    table = read_all()
    rows = [row for pid in job.pids for row in descendants(table, pid)]
    children = [row.pid for row in rows if row.name.startswith(_PYTHON) and row.state != "Z"]
    return [*(pid for pid in job.pids if pid in table), *children[:MAX_CHILD_STACKS]]


def _with_ranks(job: Job, stacks: Mapping[int, Threads]) -> Job:
    """The job with ranks by the variables of its processes, else numbered in the order in which they started."""
    unknown = [member for member in job.members if member.rank is None and member.role == "worker"]
    if not unknown:
        return job
    ranks, size = ranks_by_variables({member.pid: stacks.get(member.pid, ()) for member in unknown})
    return job.with_ranks(ranks, size)


def _failure(pid: int, job: Job, answer: Answer) -> str:
    member = next((member for member in job.members if member.pid == pid), Member(pid))
    who = f"rank {member.rank}" if member.rank is not None else f"process {pid}"
    return f"no stack of {who}: {why_hidden(pid) or answer.failure}"


def _write_stacks(run_dir: RunDir, job: Job, number: int, stacks: Mapping[int, Threads]) -> None:
    members = {member.pid: member for member in job.members}
    folder = run_dir.root / "stacks" / file_name(host_name())
    folder.mkdir(exist_ok=True)
    for pid, threads in stacks.items():
        member = members.get(pid)
        rank = member.rank if member else None
        name = f"rank_{rank}_pid_{pid}" if rank is not None else f"pid_{pid}"
        title = (
            "" if rank is not None and member and member.environment else (member.title if member else command_of(pid))
        )
        write_atomically(folder / f"{name}.look{number}.json", json.dumps(stripped(threads, pid, title[:300])) + "\n")


def file_name(text: str) -> str:
    """A text as a part of a file's name."""
    return "".join(character if character.isalnum() or character in "-_" else "-" for character in text)[:80]
