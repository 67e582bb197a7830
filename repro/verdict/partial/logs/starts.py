"""Judge a job that failed at its start: the ranks could not connect to each other, and no collective ran."""

from __future__ import annotations

from repro.verdict.partial.diagnosis import Diagnosis
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.words import ranks_of, verb


def judge_start(job: JobRecords) -> Diagnosis | None:
    start = [record for record in job.failures if record.kind == "start"]
    loopback = [note for note in job.notes if note.kind == "loopback"]
    if not start and not (loopback and any(record.kind != "consequence" for record in job.failures)):
        return None
    if job.timeouts or job.recorders:
        return None  # the job ran, so the ranks had connected
    incomplete = [note for note in job.notes if note.kind == "incomplete"]
    warned = sorted({note.process.rank for note in loopback if note.process.rank is not None})
    evidence = [f"{note.text.capitalize()} ({note.source})" for note in incomplete[:2]]
    evidence += [f"{record.process}: {record.text} ({record.source})" for record in start[:3]]
    summary = ["The start-up failed: the ranks could not connect to each other. No collective ran."]
    if loopback:
        evidence.insert(
            0,
            f"{ranks_of(warned).capitalize()} could not resolve the name of {verb(warned, 'its', 'their')} host, so "
            f"gloo used the loopback address 127.0.0.1 ({loopback[0].source})",
        )
        summary.append(
            f"The host of {ranks_of(warned)} offers 127.0.0.1 (loopback) to the other hosts. Set GLOO_SOCKET_IFNAME "
            "(and NCCL_SOCKET_IFNAME) to the network interface between the hosts."
        )
    return Diagnosis(
        "crash", "start", (), (), "likely", tuple(summary), tuple(evidence),
        ("The same error with the interface set. Then look at the port and the firewall.",),
        ("the network interfaces and the name of that host: ip -br addr; hostname; getent hosts $(hostname); cat "
         "/etc/hosts", "a new start with GLOO_SOCKET_IFNAME=IFACE NCCL_SOCKET_IFNAME=IFACE"),
    )  # fmt: skip
