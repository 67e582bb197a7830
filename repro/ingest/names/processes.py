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
"""The file name of a stack dump of vLLM's watchdog. It has "engine" or "worker", and ends in the process id."""

_FILE_RANK = re.compile(r"rank[-_]?(\d{1,12})(?=[-_.]|$)")


def process_of(*, title: str = "", file: str = "", pid: int | None = None, line: str = "") -> Process:
    """Return what a process title, the prefix of a log line, or a file name shows about a process: pid, rank, role.

    title   title of the process
    file    name of a file that the process wrote
    pid     pid of the process, if it is known
    line    a log line of the process, for its prefix

    If these show different ranks, the first one in this order counts: the prefix "[rank3]", which is a global rank; the
    title; a different prefix, such as "TP3"; the file name.
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
    """Return the process that a message of ``writer`` names. For example, an engine prints "VllmWorker-0 died".

    writer   the process that printed the message
    title    the name in the message

    An engine numbers its workers from 0, so the number in such a name is not a global rank. If ``writer`` is an engine
    with a known rank, the result has the title "VllmWorker-0 of EngineCore_DP1", from which `repro.ingest.join` finds
    the global rank.
    """
    if writer.role == "engine" and writer.rank is not None and _WORKER_NUMBER.match(title):
        return Process(None, f"{title} of EngineCore_DP{writer.rank}", None, "worker")
    return Process(None, title, rank_in(title), role_of(title))


def rank_in(text: str) -> int | None:
    """Return the global rank that a process title or the prefix of a line shows; None if the text shows no global rank.

    "Worker_DP7_EP7" -> 7, "Worker_TP3" -> 3, "Worker_DP0_TP2_EP2" -> 2, "EngineCore_DP3" -> 3.

    - Without a PP rank, the EP rank is the global rank.
    - If there is only one of DP, PP and TP rank, it is the global rank.
    - If the DP and PP ranks beside a TP rank are 0, the TP rank is the global rank.
    - "PP1_TP3" gives None, because the number of TP ranks is not known.
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
