"""Insert process ids into the commands that a diagnosis suggests, such as "py-spy dump --pid PID"."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from repro.verdict.partial.diagnosis import Diagnosis
from repro.verdict.partial.job_records import JobRecords

ANY_PROCESS = "$(pgrep -f 'VLLM::|sglang::|torchrun|megatron|python')"
MAX_PIDS = 32
_RANKS = re.compile(r"\branks? ([\d,-]+)")


def with_pids(diagnosis: Diagnosis, job: JobRecords) -> Diagnosis:
    """Replace the words PID and PIDS in the commands of a diagnosis by process ids.

    If the line with the command names ranks, PID means the processes of these ranks. Otherwise PID means the processes
    of the culprits, or of the suspects if there are no culprits. If no id of these processes is known, PID remains.
    PIDS means the processes of all ranks. If no id or more than MAX_PIDS ids are known, a pgrep command replaces PIDS.

    job   the records of the evidence; some of them give the process ids of ranks
    """
    pids = _pids_by_rank(job)
    named = diagnosis.culprits or diagnosis.suspects
    return replace(diagnosis, collect=tuple(_filled(text, pids, named) for text in diagnosis.collect))


def _filled(text: str, pids: Mapping[int, Sequence[int]], named: Sequence[int]) -> str:
    ranks = _listed(text) or named
    own = [pid for rank in ranks for pid in pids.get(rank, ())][:MAX_PIDS]
    every = sorted({pid for rows in pids.values() for pid in rows})
    text = text.replace("PIDS", " ".join(map(str, every)) if 0 < len(every) <= MAX_PIDS else ANY_PROCESS)
    if not own:
        return text
    text = text.replace("--ppid PID", f"--ppid {','.join(map(str, own))}")
    looped = f"for p in {' '.join(map(str, own))}; do \\1$p; done"
    return re.sub(r"(py-spy dump [-\w ]*--pid )PID", looped if len(own) > 1 else rf"\g<1>{own[0]}", text)


def _listed(text: str) -> list[int]:
    """Return the ranks that a text names: "stacks of ranks 2,5-7: …" -> [2, 5, 6, 7]; [] if it names none."""
    match = _RANKS.search(text)
    ranks: list[int] = []
    for part in match[1].strip(",-").split(",") if match else []:
        first, _, last = part.partition("-")
        if first.isdigit():
            ranks += range(int(first), min(int(last or first), int(first) + 4096) + 1)
    return ranks


def _pids_by_rank(job: JobRecords) -> dict[int, list[int]]:
    result: dict[int, list[int]] = {}
    processes = [record.process for record in job.stacks]
    processes += [record.process for record in job.failures]
    processes += [record.process for record in job.notes]
    processes += [record.process for record in job.process_looks]
    for process in processes:
        rank, pid = process.rank, process.pid
        if rank is not None and pid is not None and pid not in result.setdefault(rank, []):
            result[rank].append(pid)
    return result
