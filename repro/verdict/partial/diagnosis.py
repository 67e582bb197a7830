"""The result of `diagnose`: a verdict with its evidence, what would refute the verdict, and what to collect next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from repro.verdict.result import list_ranks

COLLECT = {
    "stacks": "the stacks of all ranks, twice: for p in PIDS; do py-spy dump --nonblocking --pid $p; done",
    "recorder": "Flight Recorder dumps of all ranks: set TORCH_FR_BUFFER_SIZE=2000 "
    "(TORCH_NCCL_TRACE_BUFFER_SIZE before torch 2.9) and TORCH_NCCL_DUMP_ON_TIMEOUT=1",
    "ras": "a second query of NCCL's RAS, 30 s later: ncclras -v; sleep 30; ncclras -v",
    "kernel": "the kernel log for Xid and NIC errors: dmesg -T | grep -iE 'xid|nvrm|mlx5|oom'",
    "nccl": "NCCL's own log: NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET,COLL",
    "topology": "the links between the GPUs (and try once with NCCL_P2P_DISABLE=1): nvidia-smi topo -m",
    "children": "the size of the builder's cache folder, and its children (nvcc, cicc, ninja): "
    "ps -o pid,etime,time,args --ppid PID",
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A verdict on partial evidence. Fields that are not listed mean the same as in `repro.verdict.result.Verdict`.

    summary   where the ranks are, in sentences
    evidence  why the verdict is this one, in sentences with their sources
    refutes   what evidence would refute the verdict
    collect   what to collect next, as commands where possible; the most useful comes first
    notes     remarks on log lines that are often misread, and on versions with known defects
    waits     one dict for each wait: {"ranks": the ranks that wait, "waits_in": the collective or lock, "for": the
              ranks for which they wait, …}
    """

    verdict: str
    cause: str = ""
    culprits: tuple[int, ...] = ()
    suspects: tuple[int, ...] = ()
    confidence: str = "undecided"
    summary: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    refutes: tuple[str, ...] = ()
    collect: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    waits: tuple[dict[str, Any], ...] = field(default=())

    @classmethod
    def inconclusive(cls, *summary: str, collect: tuple[str, ...] = ("stacks", "recorder")) -> Self:
        return cls("inconclusive", summary=summary, collect=tuple(COLLECT.get(record, record) for record in collect))

    def headline(self) -> str:
        """Return the first line of the printed diagnosis: "deadlock (skipped), likely, culprits: 2"."""
        cause = f" ({self.cause})" if self.cause else ""
        culprits = f", culprits: {list_ranks(self.culprits)}" if self.culprits else ", nobody is named"
        suspects = f", suspects: {list_ranks(self.suspects)}" if self.suspects else ""
        return f"{self.verdict}{cause}, {self.confidence}{culprits}{suspects}"

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict, "cause": self.cause or None, "culprits": list(self.culprits),
            "suspects": list(self.suspects), "confidence": self.confidence, "sentences": list(self.summary),
            "evidence": list(self.evidence), "refutes": list(self.refutes), "collect": list(self.collect),
            "notes": list(self.notes), "waits": list(self.waits),
        }  # fmt: skip
