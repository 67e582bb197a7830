"""Made-up evidence in the formats of other tools: recorder dumps, stacks, logs, answers of NCCL's RAS."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

START_NS = 1_790_000_000_000_000_000
C10D = "/usr/lib/python3/dist-packages/torch/distributed/distributed_c10d.py"


def call(
    number: int,
    op: str,
    *,
    group: tuple[int, str, str] = (1, "1", "ep"),
    backend: str = "nccl",
    done: bool = True,
    sizes: Sequence[Sequence[int]] | None = None,
    dtype: str = "Float",
    frames: Sequence[tuple[str, str, int]] = (),
    record: int = 0,
    p2p: bool = False,
    at_ms: int = 0,
) -> dict[str, Any]:
    """Return one entry of a recorder dump as torch 2.13 writes it. The default sizes suit four ranks."""
    sizes = sizes or (((8,), (32,)) if "gather" in op else ((32,), (8,)) if "scatter" in op else ((8,), (8,)))
    entry: dict[str, Any] = {
        "record_id": record, "pg_id": group[0], "process_group": (group[1], group[2]),
        "collective_seq_id": 0 if p2p else number,
        "p2p_seq_id": number if p2p else 0, "op_id": number, "profiling_name": f"{backend}:{op}",
        "time_created_ns": START_NS + at_ms * 1_000_000, "input_sizes": [list(sizes[0])], "input_dtypes": [dtype],
        "output_sizes": [list(sizes[1])], "output_dtypes": [dtype],
        "state": "completed" if done and backend == "nccl" else "scheduled", "retired": done, "is_p2p": p2p,
        "time_discovered_started_ns": None,
        "time_discovered_completed_ns": START_NS if done and backend == "nccl" else None,
        "timeout_ms": 600000,
    }  # fmt: skip
    if frames:
        entry["frames"] = [{"name": name, "filename": file, "line": line} for name, file, line in frames]
    return entry


def dump(
    entries: Sequence[Mapping[str, Any]],
    groups: Mapping[str, tuple[str, Sequence[int]]] | None = None,
    status: Mapping[str, tuple[int, int]] | None = None,
    *,
    as_json: bool = False,
    library: str = "2.27.5",
) -> bytes:
    """Return the bytes of a dump. `groups`: name -> (description, members); `status`: id -> (enqueued, completed)."""
    content = {
        "version": "2.10", "comm_lib_version": library,
        "pg_config": {
            n: {"name": n, "desc": d, "ranks": str(list(r))} for n, (d, r) in (groups or {"": ("", [])}).items()
        },
        "pg_status": {
            key: {"last_enqueued_collective": a, "last_started_collective": -1, "last_completed_collective": b}
            for key, (a, b) in (status or {}).items()
        },
        "entries": [dict(entry, record_id=entry["record_id"] or place) for place, entry in enumerate(entries)],
    }  # fmt: skip
    return json.dumps(content).encode() if as_json else pickle.dumps(content, protocol=2)


def watchdog(
    rank: int,
    number: int,
    op: str,
    *,
    group_rank: int | None = None,
    group: str = "1(ep)",
    queued: int = 0,
    numel: int = 64,
) -> str:
    """Return the two lines that NCCL's watchdog prints with torch 2.9."""
    local = rank if group_rank is None else group_rank
    stamp = f"E1003 11:42:{rank % 60:02d}.087127883"
    return (
        f"[rank{rank}]:[{stamp} ProcessGroupNCCL.cpp:683] [Rank {local}] Watchdog caught collective operation timeout: "
        f"WorkNCCL(SeqNum={number}, OpType={op}, NumelIn={numel}, NumelOut={numel}, "
        "Timeout(ms)=600000) ran for 600021 milliseconds "
        "before timing out.\n"
        f"[rank{rank}]:[{stamp} ProcessGroupNCCL.cpp:2241] [PG ID 1 PG GUID {group} Rank {local}] "
        " failure detected by watchdog at "
        f"work sequence id: {number} PG status: last enqueued work: {queued or number}, last "
        f"completed work: {number - 1}\n"
    )


def py_spy(title: str, frames: Sequence[str], pid: int = 100) -> str:
    """Return `py-spy dump` of a process with one thread. Frames are innermost first, as "function (file:line)"."""
    rows = "".join(f"    {frame}\n" for frame in frames)
    return f'Process {pid}: {title}\nPython v3.12.3 (/usr/bin/python3.12)\n\nThread {pid} (idle): "MainThread"\n{rows}'


def ras(errors: str, rows: Sequence[str] = (), ranks: int = 8) -> str:
    """Return an answer of NCCL's RAS in text, about one communicator."""
    found = (
        f"\n#0-0 (12a1b02d15a8bb89) {errors}\n  Communicator ranks have different AllGather operation counts\n"
        if rows
        else ""
    )
    return (
        "NCCL version 2.26.2 compiled with CUDA 12.6\nCUDA runtime version 12060, driver version 12060\n\n"
        "Job summary\n===========\n\nCommunicators... (0.00s)\n=============\n\n"
        "Group     Comms     Nodes     Ranks     Ranks     Ranks    Status  Errors\n"
        "    #  in group  per comm  per node  per comm  in group\n"
        f"    0         1         1         {ranks}         {ranks}         {ranks}   RUNNING  {errors}\n"
        "\nErrors\n======\n\nWarnings\n========\n" + found + "".join(f"  {row}\n" for row in rows)
    )  # fmt: skip


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write the files. Returns their folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder
