"""Judge answers of NCCL's RAS, which counts the operations that hosts launched, not those that devices completed."""

from __future__ import annotations

from repro.trace.foreign.records import RasAnswer, RasCommunicator
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.job_records import JobRecords


def judge_counts(job: JobRecords) -> Diagnosis | None:
    if not job.ras:
        return None
    answers = sorted(job.ras, key=lambda answer: answer.order)
    if len(answers) > 1:
        return _moving(answers)
    answer = answers[0]
    named = [c for c in answer.communicators if c.errors != "OK"]
    lines = tuple(f"{c.name}: {c.errors}, {_counts(c)} ({answer.source})" for c in named[:4]) or (
        f"{len(answer.communicators)} communicators: OK ({answer.source})",
    )
    lines += tuple(f"{note.text} ({note.source})" for note in job.notes if note.kind == "ras")[:4]
    return Diagnosis(
        "inconclusive", "", (), (), "undecided",
        ("One answer of NCCL's RAS shows one moment. A difference in counts may be benign, because collectives go on "
         "while RAS asks the ranks." if named
         else (
             "NCCL's RAS says OK: all hosts launched equally many operations. RAS does not show what the devices "
             "completed."
         ),),
        lines, (), (COLLECT["ras"], COLLECT["recorder"], COLLECT["stacks"]),
    )  # fmt: skip


def _moving(answers: list[RasAnswer]) -> Diagnosis:
    first, last = answers[0], answers[-1]
    before, after = _largest(first), _largest(last)
    common = sorted(before.keys() & after.keys())
    grown = [(name, before[name], after[name]) for name in common if after[name] > before[name]]
    lines = [f"{name}: launches went from {one} to {two} ({first.source}, {last.source})" for name, one, two in grown]
    if grown:
        return Diagnosis(
            "inconclusive", "", (), (), "likely",
            ("The counts advance between the two answers: the job makes progress. RAS lists the smaller set of ranks, "
             "which may be ahead of the other ranks or behind; a MISMATCH of counts that advance is benign.",),
            tuple(lines), ("A third answer in which the counts are the same.",),
            ("two more queries of NCCL's RAS when the job seems to hang: ncclras -v; sleep 30; ncclras -v",
             COLLECT["stacks"]),
        )  # fmt: skip
    return Diagnosis(
        "inconclusive", "", (), (), "undecided",
        ("The counts are the same in both answers: no host launched anything between them.",),
        tuple(f"{name}: {before[name]} launches in both ({first.source}, {last.source})" for name in common),
        (), (COLLECT["stacks"], COLLECT["recorder"], COLLECT["ras"]),
    )  # fmt: skip


def _largest(answer: RasAnswer) -> dict[str, int]:
    """Return, for each operation of each communicator, the number of launches on the rank that launched it most.

    The keys are text: the name of the communicator, a space, and the name of the operation.
    """
    result: dict[str, int] = {}
    for communicator in answer.communicators:
        for op, counts in communicator.launched.items():
            result[f"{communicator.name} {op}"] = max(counts.values(), default=0)
        for key, (_, count) in communicator.others.items():
            name = f"{communicator.name} {key.split()[0]}"
            result[name] = max(result.get(name, 0), count)
    return result


def _counts(communicator: RasCommunicator) -> str:
    parts = [
        f"{op} {', '.join(f'rank {r}: {n}' for r, n in sorted(counts.items())[:6])}"
        for op, counts in communicator.launched.items()
    ]
    return "; ".join(parts) or f"{communicator.size} ranks"
