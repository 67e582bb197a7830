"""Render report.html: one file that needs no network and no fonts. No text that comes from a run is executed as code.

The page is complete without its script. With the script, the timeline can be moved and zoomed.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from repro.report import templates
from repro.report.commands import commands
from repro.report.gather import RunData, headline
from repro.report.page import rank_files
from repro.report.page.lane_data import pack_lanes, script_data
from repro.report.page.sides import side_by_side
from repro.report.pictures.timeline import strip, timeline
from repro.report.pictures.waits import draw_waits
from repro.store.text import ROOT, shorten_rank_lists
from repro.verdict.classes import class_of
from repro.verdict.result import list_ranks
from repro.watch.document import Document

_VARIANT_ORDER = {"control": 0, "fault": 1, "fix": 2}
_SCRIPTS = (
    "copy", "state", "lanes", "pen", "row", "overview", "draw", "move", "pointer", "keys", "filters", "start",
)  # fmt: skip


@dataclass(frozen=True)
class Card:
    """A box on the page that shows one of several runs side by side.

    kind      the CSS class for the colour of the verdict
    picture   a small timeline of the run
    link      the address of the run's report; "" for the run of this page
    """

    verdict: Document
    kind: str
    picture: Markup
    headline: str
    link: str


def render(data: RunData, others: Sequence[RunData] = (), timeline_svg: str = "") -> str:
    """Render the page.

    others: runs of the other variants of the scenario, to show beside this run
    timeline_svg: the result of :func:`timeline` for this run; "" to call it here
    """
    verdict = data.verdict
    return templates.render(
        "page/page.html",
        verdict=verdict,
        title=f"{verdict.verdict or 'no verdict'}: {verdict.scenario} {verdict.variant}",
        kind=class_of(verdict.verdict).colour,
        style=style(),
        script=script(),
        script_hash=base64.b64encode(hashlib.sha256(script().encode()).digest()).decode(),
        headline=headline(verdict),
        strip=_strip(data),
        missing=data.missing,
        timeline=Markup(timeline_svg or timeline(data)),
        waits_picture=Markup(draw_waits(data)),
        cards=_cards(data, others),
        sides=side_by_side(data),
        evidence=[text.replace(f"{ROOT}/", "") for text in verdict.evidence],
        stacks=rank_files.stacks(data),
        logs=rank_files.logs(data),
        launcher_log=rank_files.launcher_log(data),
        commands=commands(data),
        hosts=sorted({lane.host for lane in data.lanes.values() if lane.host}),
        environments=rank_files.environments(data),
        config=rank_files.config(data),
        limits=list(_limits(data)),
        run_name=data.root.name,
        data=script_data(data),
        lanes=pack_lanes(data),
    )


def style() -> Markup:
    """Return the page's style sheet as it appears in the page."""
    return templates.read_own("page/page.css")


def script() -> Markup:
    """Return the page's script as it appears in the page: all files of script/, in one function, so in one scope."""
    parts = Markup("\n").join(templates.read_own(f"page/script/{name}.js") for name in _SCRIPTS)
    return Markup('"use strict";\n(() => {{\n{}}})();\n').format(parts)


def _strip(data: RunData) -> list[tuple[str, str]]:
    """Return the (name, value) pairs in the line under the page's headline, such as ("backend", "gloo")."""
    verdict = data.verdict
    stall_s, total_s = verdict.seconds.stall_to_verdict, verdict.seconds.total
    expected = verdict.matches_expected
    rows = [
        ("ranks", str(data.num_ranks)),
        ("backend", verdict.backend),
        ("seed", str(verdict.seed)),
        ("culprits", shorten_rank_lists(list_ranks(verdict.culprits)) or "none proven" * data.stuck),
        ("suspects", shorten_rank_lists(list_ranks(verdict.suspects))),
        ("confidence", verdict.confidence if data.stuck else ""),
        ("stall to verdict", f"{stall_s:.2f} s" if data.stuck and stall_s else ""),
        ("run", f"{total_s:.1f} s" if total_s else ""),
        ("as expected", "" if expected is None else "yes" if expected else "no"),
    ]
    return [(name, value) for name, value in rows if value]


def _cards(data: RunData, others: Sequence[RunData]) -> list[Card]:
    """Return a card for this run and each other run, in the order control, fault, fix; [] if there are no others."""
    runs = sorted([data, *others], key=lambda run: _VARIANT_ORDER.get(run.verdict.variant, len(_VARIANT_ORDER)))
    return [
        Card(
            verdict=run.verdict,
            kind=class_of(run.verdict.verdict).colour,
            picture=Markup(strip(run)),
            headline=headline(run.verdict),
            link="" if run is data else _link(data.root, run.root),
        )
        for run in (runs if others else ())
    ]


def _link(root: Path, other: Path) -> str:
    return "/".join(quote(part) for part in Path(os.path.relpath(other / "report.html", root)).parts)


def _limits(data: RunData) -> Iterator[str]:
    yield "The hang of a real server can have a different cause: this run rebuilds one mechanism on a small model."
    yield "Nothing here is a measurement of speed."
    if data.verdict.backend == "gloo":
        yield "The backend was gloo on CPUs; the behaviour of NCCL and GPUs is not shown."
    if data.stuck and not data.verdict.culprits:
        yield "The evidence does not prove which rank is the cause."
