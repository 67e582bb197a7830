"""Find the rank and role of a process from its title, a log prefix or a file name."""

from __future__ import annotations

import re

from repro.trace.foreign.records import Process

_RANK_IN_TITLE = re.compile(
    r"(?:Worker|RayWorkerProc|scheduler|ModelRunner|VllmWorker)[-_A-Za-z]*?((?:[-_](?:DP|PP|TP|EP|PCP|DCP)\d+)+)"
)
_PART = re.compile(r"(DP|PP|TP|EP)(\d{1,12})")
_ENGINE = re.compile(r"Engine_?Core(?:_DP(\d{1,12}))?")
_WORKER_NUMBER = re.compile(r"(?:VllmWorker|Worker)[- ](?:rank=)?(\d{1,12})\b")
_RANK_PREFIX = re.compile(r"\[rank(\d{1,12})\]")
_SGLANG_PARTS = re.compile(r"(?:^|[ _])((?:(?:DP|PP|TP|EP)\d+[ _]?)+)(?=[\]\s:]|$)")
_STACK_DUMP = re.compile(r"VLLM_STACK_DUMP_for_(engine|worker)\w*?_(\d{1,9})\.")
"""The name of a stack dump by vLLM's watchdog: part of the server, number in its engine, process id."""

_FILE_RANK = re.compile(r"rank[-_]?(\d{1,12})(?=[-_.]|$)")


def process_of(*, title: str = "", file: str = "", pid: int | None = None, line: str = "") -> Process:
    """Return the process that a title, a line's prefix or a file's name describes, as far as known.

    A title is trusted more than a file's name. A global rank ("[rank3]") is trusted more than a parallel rank ("TP3").
    """
    role = role_of(title or line) or role_of(file.rpartition("/")[2])
    if (found := _STACK_DUMP.search(file)) and pid is None:
        return Process(int(found[2]), title, None, found[1])
    rank = None
    if found := _RANK_PREFIX.search(line):
        rank = int(found.group(1))
    if rank is None:
        rank = rank_in(title)
    if rank is None and line:
        rank = rank_in(line[:200])
    if rank is None and (found := _FILE_RANK.search(file.rpartition("/")[2])):
        rank = int(found.group(1))
    return Process(pid, title, rank, role)


def member_of(writer: Process, title: str) -> Process:
    """Return the process that the title in another process's message names.

    Each of several engines numbers its workers from 0, so "VllmWorker-0" of EngineCore_DP1 is not a global rank. It
    becomes "VllmWorker-0 of EngineCore_DP1", and `repro.ingest.join` finds the rank.
    """
    if writer.role == "engine" and writer.rank is not None and _WORKER_NUMBER.match(title):
        return Process(None, f"{title} of EngineCore_DP{writer.rank}", None, "worker")
    return Process(None, title, rank_in(title), role_of(title))


def rank_in(text: str) -> int | None:
    """Return the rank in a title or prefix. The global rank is the EP rank if there is one, or a lone DP, PP or TP
    rank.

    "Worker_DP7_EP7" -> 7, "Worker_TP3" -> 3, "Worker_DP0_TP2_EP2" -> 2, "EngineCore_DP3" -> 3.
    A title with two parallel ranks ("PP1_TP3") gives no global rank, because the sizes are not known: None.
    """
    if found := _ENGINE.search(text):
        return int(found.group(1)) if found.group(1) else None
    parts: dict[str, int] = {}
    if (found := _RANK_IN_TITLE.search(text)) or (found := _SGLANG_PARTS.search(text)):
        parts = {name: int(number) for name, number in _PART.findall(found.group(1))}
    elif found := _WORKER_NUMBER.search(text):
        return int(found.group(1))
    if "EP" in parts and ("TP" in parts or "DP" in parts) and "PP" not in parts:
        return parts["EP"]
    wide = {name: number for name, number in parts.items() if name != "EP"}
    if len(wide) == 1:
        return next(iter(wide.values()))
    if wide and not any(number for name, number in wide.items() if name != "TP"):
        return wide.get("TP")
    return parts.get("EP") if not wide else None


def role_of(text: str) -> str:
    lowered = text.lower()
    if "enginecore" in lowered or "engine_core" in lowered:
        return "engine"
    if any(
        word in lowered
        for word in ("apiserver", "frontend", "front_end", "api_server", "tokenizermanager", "detokenizer")
    ):
        return "front end"
    if any(word in lowered for word in ("worker", "scheduler")):
        return "worker"
    return ""
