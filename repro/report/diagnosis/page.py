"""Render the page of a diagnosis: verdict, reasons, what to collect next, and the merged stack tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from repro.ingest.read import Evidence
from repro.report import templates
from repro.report.diagnosis import stack_tree
from repro.verdict.classes import class_of
from repro.verdict.partial.diagnosis import Diagnosis
from repro.verdict.partial.job_records import JobRecords


@dataclass(frozen=True)
class TreeRow:
    """A line of the stack tree.

    names              the processes: "ranks 0-2"
    innermost, outer   the innermost frame of the line, and its other frames
    ends               whether the stack of a process ends on this line
    opens, closes      how many HTML lists to open before the line, and to close after it
    """

    names: str
    innermost: str
    outer: tuple[str, ...]
    ends: bool
    opens: int
    closes: int


def page(diagnosis: Diagnosis, evidence: Evidence, job: JobRecords) -> str:
    """Render a self-contained HTML page. The template escapes all text from the evidence.

    job   the same records as in `evidence`, sorted by kind
    """
    roles = ("worker", "engine", "front end")
    stacks = [looks[-1] for role in roles for looks in job.main_stacks(role).values() if looks]
    return templates.render(
        "diagnosis/diagnosis.html",
        title="Diagnosis of a job from the evidence that it left",
        style=templates.read_own("page/page.css") + templates.read_own("diagnosis/diagnosis.css"),
        kind=class_of(diagnosis.verdict).colour,
        diagnosis=diagnosis,
        evidence=evidence,
        classes=_classes(stack_tree.classes(stacks)),
        tree=list(_rows(stack_tree.lines(stack_tree.merge(stacks)))),
    )


def _classes(classes: Mapping[tuple[str, str], Sequence[str]]) -> list[dict[str, str]]:
    return [
        {"names": stack_tree.name_all(names), "activity": activity, "frames": frames}
        for (activity, frames), names in classes.items()
    ]


def _rows(lines: Sequence[stack_tree.Line]) -> Iterator[TreeRow]:
    depth = 0
    for place, line in enumerate(lines):
        following = lines[place + 1].depth if place + 1 < len(lines) else 0
        yield TreeRow(
            names=stack_tree.name_all(line.names),
            innermost=line.frames[-1],
            outer=line.frames[:-1],
            ends=bool(line.ends),
            opens=max(0, line.depth - depth),
            closes=max(0, line.depth - following),
        )
        depth = min(line.depth, following)
