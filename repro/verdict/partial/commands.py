"""Insert known process ids into the commands that a diagnosis suggests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from repro.verdict.partial.diagnosis import Diagnosis
from repro.verdict.partial.scene import Scene

ANY_PROCESS = "$(pgrep -f 'VLLM::|sglang::|torchrun|megatron|python')"
MAX_PIDS = 32
_RANKS = re.compile(r"\branks? ([\d,-]+)")


def with_pids(diagnosis: Diagnosis, scene: Scene) -> Diagnosis:
    """Replace PIDS and PID in the commands of a diagnosis by the process ids of the ranks that the text names."""
    pids = _pids(scene)
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
    """Return the ranks that a sentence of the form "stacks of ranks 2,5-7: …" names."""
    match = _RANKS.search(text)
    ranks: list[int] = []
    for part in match[1].strip(",-").split(",") if match else []:
        first, _, last = part.partition("-")
        if first.isdigit():
            ranks += range(int(first), min(int(last or first), int(first) + 4096) + 1)
    return ranks


def _pids(scene: Scene) -> dict[int, list[int]]:
    """Return rank -> ids of its processes, in the order in which records name them."""
    result: dict[int, list[int]] = {}
    processes = [record.process for record in scene.stacks]
    processes += [record.process for record in scene.failures]
    processes += [record.process for record in scene.notes]
    processes += [record.process for record in scene.process_looks]
    for process in processes:
        rank, pid = process.rank, process.pid
        if rank is not None and pid is not None and pid not in result.setdefault(rank, []):
            result[rank].append(pid)
    return result
