"""The page of a diagnosis: verdict, reasons, what to collect next, and the merged stack tree of all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from repro.ingest.read import Evidence
from repro.report.diagnosis import stack_tree
from repro.verdict.partial.diagnosis import Diagnosis
from repro.verdict.partial.scene import Scene
from repro.verdict.result import list_ranks

_HERE = Path(__file__).parent
_KINDS = {"clean": "clean", "inconclusive": "unsure", "slow": "unsure"}


def page(diagnosis: Diagnosis, evidence: Evidence, scene: Scene) -> str:
    """A self-contained page; every text of the evidence is escaped by the template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=False, undefined=jinja2.StrictUndefined
    )
    stacks = [
        rows[-1] for role in ("worker", "engine", "front end") for rows in scene.main_stacks(role).values() if rows
    ]
    return environment.get_template("diagnosis.html").render(
        heading="Diagnosis of a job from the evidence that it left",
        style=Markup((_HERE.parent / "page/page.css").read_text(encoding="utf-8")),
        kind=_KINDS.get(diagnosis.verdict, "hung"),
        diagnosis=diagnosis,
        evidence=evidence,
        culprits=list_ranks(diagnosis.culprits),
        suspects=list_ranks(diagnosis.suspects),
        classes=_classes(stack_tree.classes(stacks)),
        tree=_rows(stack_tree.lines(stack_tree.merge(stacks))),
    )


def _classes(classes: Mapping[tuple[str, str], Sequence[str]]) -> list[dict[str, str]]:
    return [
        {"names": stack_tree.name_all(names), "activity": activity, "frames": frames}
        for (activity, frames), names in classes.items()
    ]


def _rows(lines: Sequence[stack_tree.Line]) -> list[dict[str, Any]]:
    """Lines with the lists that open before and close after each of them."""
    rows = []
    depth = 0
    for place, line in enumerate(lines):
        following = lines[place + 1].depth if place + 1 < len(lines) else 0
        rows.append({
            "names": stack_tree.name_all(line.names), "last": line.frames[-1], "hidden": line.frames[:-1],
            "ends": bool(line.ends), "opens": max(0, line.depth - depth), "closes": max(0, line.depth - following),
        })  # fmt: skip
        depth = min(line.depth, following)
    return rows
