"""Read the log of the Linux kernel: errors of a GPU (Xid), and processes that the out-of-memory killer ended.

These lines have a GPU's PCI address or a process id, but no rank. `repro.ingest.join` finds the rank: logs of NCCL and
of serving engines have the address or the process id together with the rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from repro.ingest.logs.prefix import Line
from repro.trace.foreign.records import Failure, Observation, Process, Source

NEEDLES = ("NVRM: Xid", "Killed process", "oom-kill:")

HARDWARE_XIDS = {48, 62, 63, 64, 74, 79, 92, 94, 95, 110, 119, 120, 140}
SOFTWARE_XIDS = {13, 31, 43, 45, 69}

_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d{1,12})(?:, pid='?(\d{1,12}|<unknown>)'?)?(.*)")
_KILLED = re.compile(r"Killed process (\d{1,12}) \(([^)]*)\)(?:.*?anon-rss:(\d{1,12})kB)?")
_CONSTRAINT = re.compile(r"oom-kill:.*?task=([^,]*),pid=(\d{1,12})")
_SYSLOG_HOST = re.compile(r"(?:\d\d:\d\d:\d\d|[+-]\d\d:\d\d|Z) (\S+) kernel:")
_FILE_HOST = re.compile(r"(?:dmesg|kern|kernel|messages|syslog)[-_.](\w[\w.-]*?)(?:\.(?:txt|log))?$")


def read(line: Line, source: Source) -> Iterator[Observation]:
    text, host = line.text, _host(line.text, source.file)
    if match := _XID.search(text):
        code, bus = int(match[2]), match[1].lower()
        kind = "hardware" if code in HARDWARE_XIDS else "software" if code in SOFTWARE_XIDS else "see NVIDIA's list"
        pid = int(match[3]) if match[3] and match[3].isdigit() and match[3] != "0" else None
        words = f"Xid {code} ({kind}) on GPU {bus}{_tail(match[4])}"
        yield Failure(Process(pid, f"GPU {bus}"), "device", words, line.at_s, source, bus, host)
    elif match := _KILLED.search(text):
        held = f", which held {int(match[3]) >> 20} GiB" if match[3] else ""
        words = f"the kernel's OOM killer ended process {match[1]}{held}"
        yield Failure(Process(int(match[1]), match[2]), "killed", words, line.at_s, source, host=host)
    elif match := _CONSTRAINT.search(text):
        words = f"the kernel's OOM killer ended process {match[2]}"
        yield Failure(Process(int(match[2]), match[1]), "killed", words, line.at_s, source, host=host)


def _host(text: str, file: str) -> str:
    match = _SYSLOG_HOST.search(text[:200]) or _FILE_HOST.search(file.rpartition("/")[2])
    return match[1] if match else ""


def _tail(text: str | None) -> str:
    words = re.sub(r"^(?:pid=\S+,?\s*)?(?:name=\S+,?\s*)?", "", (text or "").strip(" ,."))
    return f": {words[:80]}" if words else ""
