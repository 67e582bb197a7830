"""Write the bug report of a diagnosis: what hangs, the stacks of all ranks as one tree, counters, versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from repro.ingest.read import Evidence
from repro.report.diagnosis import stack_tree
from repro.store.text import counted
from repro.trace.foreign.records import RecorderDump, Stack
from repro.verdict.partial.diagnosis import Diagnosis
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.notes import known_bad, versions_of

MAX_TREE, MAX_ROWS = 60, 64


def issue(headline: str, diagnosis: Diagnosis, evidence: Evidence, job: JobRecords, apart: Mapping[str, str]) -> str:
    """Return the bug report as Markdown.

    headline: the title of the report
    job: the same records as in `evidence`, sorted by kind
    apart: for each path that the user gave, the headline of the diagnosis of this path alone; shown as a table
    """
    lines = [f"# Hang: {headline}", "", *diagnosis.summary, ""]
    lines += _listed("Why", diagnosis.evidence)
    lines += _listed("What would refute this", diagnosis.refutes)
    lines += _listed("What is missing", diagnosis.collect)
    lines += _listed("Notes", diagnosis.notes)
    lines += _runs(apart)
    lines += _tree(job)
    lines += _counters(job)
    lines += ["## Versions", ""]
    versions = [f"NCCL {version}" for version in versions_of(job)]
    lines += [f"- {text}" for text in (*versions, *known_bad(job))] or ["- No file names a version of NCCL."]
    lines += ["", "## Files", "", *(f"- `{name}`" for name in evidence.files[:MAX_ROWS])]
    if len(evidence.files) > MAX_ROWS:
        lines.append(f"- and {len(evidence.files) - MAX_ROWS} more")
    return "\n".join(lines)


def _listed(title: str, texts: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *(f"- {text}" for text in texts), ""] if texts else []


def _runs(apart: Mapping[str, str]) -> list[str]:
    if not apart:
        return []
    rows = [f"| `{name}` | {text} |" for name, text in apart.items()]
    return ["## Each path alone", "", "| path | verdict |", "|---|---|", *rows, ""]


def _tree(job: JobRecords) -> list[str]:
    """Draw the stacks of the last look as a tree, and name the processes that did something else in the first look."""
    roles = ("worker", "engine", "front end")  # a process without a role is listed under each role
    looks = list({
        str(rows[0].process): rows for role in roles for rows in job.main_stacks(role).values() if rows
    }.values())  # fmt: skip
    if not looks:
        return []
    tree = stack_tree.text(stack_tree.merge(rows[-1] for rows in looks))
    cut = [f"… {len(tree) - MAX_TREE} more lines"] if len(tree) > MAX_TREE else []
    lines = ["## Stacks of all processes, outermost frame first", "", "```", *tree[:MAX_TREE], *cut, "```", ""]
    twice = [rows for rows in looks if len(rows) > 1]
    moved = sorted({str(rows[-1].process) for rows in twice if _place(rows[0]) != _place(rows[-1])})
    if twice:
        others = stack_tree.name_all(moved) if moved else "none"
        lines += [
            f"Of {counted(len(twice), 'process')} observed twice, these were at a different place in the last "
            f"observation than in the first: {others}.",
            "",
        ]
    return lines


def _place(stack: Stack) -> tuple[str, str]:
    return stack.activity, stack.detail


def _counters(job: JobRecords) -> list[str]:
    """Make a table of the highest sequence numbers that each rank has queued and completed in each group.

    The numbers come from the rank's last dump. If the rank also has an earlier dump, another column has the numbers of
    the earlier dump.
    """
    rows = []
    for rank, dump in job.recorders.items():
        before = _positions(job.earlier[rank]) if rank in job.earlier else {}
        rows += [
            f"| {rank} | {name} | {before.get(name, '')} | {now} |" for name, now in _positions(dump).items()
        ]  # fmt: skip
    if not rows:
        return []
    more = [f"| … | {len(rows) - MAX_ROWS} more rows | | |"] if len(rows) > MAX_ROWS else []
    head = ["## Collectives queued / done", "", "| rank | group | earlier dump | last dump |", "|---|---|---|---|"]
    return [*head, *rows[:MAX_ROWS], *more, ""]


def _positions(dump: RecorderDump) -> dict[str, str]:
    positions = {}
    for record in dump.groups:
        queued = record.calls.last_number()
        if queued is not None:
            positions[str(record.group)] = f"{queued} / {record.calls.last_number(done=True) or 0}"
    return positions
