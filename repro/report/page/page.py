"""report.html: one file that needs nothing else, neither network nor fonts, and in which a run's strings do nothing.

The document is whole without its script. With it the timeline can be moved and zoomed: lanes travel as compressed
columns of numbers, one element a rank, unpacked when they come into sight.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from repro.report.commands import commands
from repro.report.gather import Facts, headline
from repro.report.lanes import OPEN, Lane
from repro.report.page.sides import side_by_side
from repro.report.pictures import drawing
from repro.store.run_dir import read_text
from repro.store.text import ROOT, embed, escape, escape_control_characters, short_site, shorten_rank_lists
from repro.verdict.result import Position, list_ranks, name_ranks

HERE = Path(__file__).parent
_NEVER = 0xFFFFFFFF
_KINDS = {"clean": "clean", "inconclusive": "unsure", "slow": "unsure", "": "unsure"}
_MAX_LOG = 20_000


def page(facts: Facts, others: Sequence[Facts] = (), timeline: str = "") -> str:
    """The document. others: the control and fix (or fault) runs to show beside this one."""
    verdict = facts.verdict
    script = (HERE / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    start_ns, end_ns = facts.span_ns()
    unit_ns = max(1000, -(-(end_ns - start_ns) // (_NEVER - 1)))
    name = verdict.verdict or "no verdict"
    parts = {
        "script_hash": f"sha256-{digest}",
        "title": escape(f"{name}: {verdict.scenario} {verdict.variant}", 120),
        "style": (HERE / "page.css").read_text(),
        "kind": _kind(name if verdict.verdict else ""),
        "badge": escape(f"{name}{': ' + verdict.cause if verdict.cause else ''}"),
        "name": escape(verdict.scenario),
        "variant": escape(verdict.variant),
        "headline": escape(headline(verdict), 900),
        "strip": _strip(facts),
        "missing": _missing(facts),
        "runs": _runs(facts, others),
        "waits": _waits(facts),
        "timeline": timeline or drawing.timeline(facts),
        "sides": _sides(facts),
        "table": _table(facts),
        "evidence": _evidence(facts),
        "stacks": _stacks(facts),
        "logs": _logs(facts),
        "commands": _commands(facts),
        "environment": _environment(facts),
        "limits": escape(_limits(facts), 900),
        "footer": escape(f"Written by python -m repro report from {facts.root.name}. Times are since the first event."),
        "facts": embed(_data(facts, start_ns, end_ns, unit_ns)),
        "lanes": "\n".join(_lane(lane, start_ns, unit_ns) for lane in facts.lanes.values()),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match.group(1)], (HERE / "page.html").read_text())


def _kind(verdict: str) -> str:
    return _KINDS.get(verdict, "hung")


def _strip(facts: Facts) -> str:
    verdict = facts.verdict
    seconds = verdict.seconds
    expected = verdict.matches_expected
    rows = [
        ("ranks", str(facts.num_ranks)),
        ("backend", verdict.backend),
        ("seed", str(verdict.seed)),
        ("culprits", shorten_rank_lists(list_ranks(verdict.culprits)) or "none proven" * facts.stuck),
        ("suspects", shorten_rank_lists(list_ranks(verdict.suspects))),
        ("confidence", verdict.confidence if facts.stuck else ""),
        (
            "stall to verdict",
            f"{seconds.stall_to_verdict:.2f} s" if facts.stuck and seconds.stall_to_verdict else "",
        ),
        ("run", f"{seconds.total:.1f} s" if seconds.total else ""),
        ("as expected", "" if expected is None else "yes" if expected else "no"),
    ]
    return "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in rows if value)


def _missing(facts: Facts) -> str:
    if not facts.missing:
        return ""
    rows = "".join(f"<li>{escape(text)}</li>" for text in facts.missing[:40])
    if len(facts.missing) > 40:
        rows += f"<li>and {len(facts.missing) - 40} more</li>"
    return f'<section class="missing" aria-labelledby="h-missing"><h2 id="h-missing">Missing or damaged</h2><ul>{rows}</ul></section>'


def _section(identity: str, title: str, body: str, css: str = "") -> str:
    return f'<section class="{css}" aria-labelledby="h-{identity}"><h2 id="h-{identity}">{title}</h2>{body}</section>'


def _runs(facts: Facts, others: Sequence[Facts]) -> str:
    if not others:
        return ""
    order = {"control": 0, "fault": 1, "fix": 2}
    shown = sorted([facts, *others], key=lambda run: order.get(run.verdict.variant, 3))
    cards = []
    for run in shown:
        verdict, this = run.verdict, run is facts
        words = headline(verdict)
        link = "" if this else f' <a href="{_link(facts.root, run.root)}">its report</a>'
        cards.append(
            f'<article class="card{" this" * this}"><h3>{escape(verdict.variant)}{" (this run)" * this}'
            f'<span class="badge {_kind(verdict.verdict)}">{escape(verdict.verdict or "no verdict")}</span></h3>'
            f"{drawing.strip(run)}<p>{escape(words, 400)}{link}</p></article>"
        )
    note = "<p>The same requests and seed: without the fault, with it, and with its trigger present but cured.</p>"
    return _section("runs", "Control, fault and fix", f'{note}<div class="cards">{"".join(cards)}</div>')


def _link(root: Path, other: Path) -> str:
    return escape("/".join(quote(part) for part in Path(os.path.relpath(other / "report.html", root)).parts))


def _waits(facts: Facts) -> str:
    picture = drawing.who_waits(facts)
    if not picture:
        return ""
    told = "; ".join(wait.words() for wait in facts.verdict.waits if wait.awaited)
    cycle = " The waits close a cycle: none of these ranks can go on." if facts.verdict.cycle else ""
    body = f'<div class="wide" tabindex="0" role="group" aria-label="Who waits for whom">{picture}</div>'
    return _section(
        "waits", "Who waits for whom", f"{body}<p>{escape(told[:1].upper() + told[1:], 2000)}.{cycle}</p>", "waits"
    )


def _sides(facts: Facts) -> str:
    found = side_by_side(facts)
    if found is None:
        return ""
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in ("declared for the step", *found.heads))
    rows = []
    first = True
    nothing = "not in the schedule" if any(row.planned for row in found.rows) else "none was declared"
    for row in found.rows:
        parted = any(row.diverges) and first
        first = first and not parted
        cells = [f"<td>{escape(row.planned) if row.planned else f'<span class=none>{nothing}</span>'}</td>"]
        for cell, diverges in zip(row.issued, row.diverges, strict=True):
            words = escape(cell) if cell else "left out" if diverges else "<span class=none>not reached</span>"
            if not cell and not row.planned:
                words = "<span class=none>–</span>"
            cells.append(f"<td{' class=diverges' if diverges else ''}>{words}</td>")
        rows.append(f"<tr{' class=parts' if parted else ''}>{''.join(cells)}</tr>")
    cut = f"<p>{found.cut} equal entries before these are left out.</p>" if found.cut else ""
    body = f'{cut}<div class="scroll" tabindex="0" role="group" aria-label="Schedules at the divergence"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    planned = next((side.planned for side in facts.verdict.sides if side.planned), "")
    told = f" The schedule had {escape(planned)} there." if planned else ""
    intro = f"<p>Step {found.step}, as declared, and as issued by one rank of each side.{told}</p>"
    return _section("sides", "The schedules where they part", intro + body, "sides")


def _table(facts: Facts) -> str:
    columns = ("rank", "state", "phase", "step", "group", "collective", "layer", "sizes", "since", "called from")
    numeric = {"rank", "step", "since"}
    heads = "".join(f'<th scope="col"{" class=n" if c in numeric else ""}>{c}</th>' for c in columns)
    culprits = set(facts.verdict.culprits)
    rows = []
    for p in facts.verdict.ranks:
        call = f"{p.op} #{p.seq}" if p.op else p.detail
        sizes = ",".join(map(str, p.sizes[:16])) + ("…" if len(p.sizes) > 16 else "")
        state = p.state + (" (culprit)" if p.rank in culprits else "")
        rows.append(
            f'<tr{" class=culprit" if p.rank in culprits else ""}><th scope="row" class="n">{p.rank}</th>'
            f'<td class="nowrap">{escape(state)}</td><td>{escape(p.phase)}</td><td class="n">{p.step if p.step >= 0 else ""}</td>'
            f'<td>{escape(p.group, 60)}</td><td class="nowrap">{escape(call, 120)}</td><td>{escape(p.layer, 120)}</td>'
            f'<td class="nowrap">{escape(sizes)}</td><td class="n nowrap">{p.since_s:.2f} s</td><td>{escape(short_site(p.site), 160)}</td></tr>'
        )
    if not rows:
        return ""
    body = f'<div class="scroll" tabindex="0" role="group" aria-label="Where every rank stands"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return _section("ranks", "Where every rank stands", body, "ranks")


def _evidence(facts: Facts) -> str:
    if not facts.verdict.evidence:
        return ""
    rows = "".join(
        f"<li>{escape(shorten_rank_lists(text.replace(f'{ROOT}/', '')), 1000)}</li>"
        for text in facts.verdict.evidence[:60]
    )
    return _section("evidence", "What the verdict rests on", f'<ol class="evidence">{rows}</ol>')


def _folded(texts: Mapping[int, str]) -> list[tuple[list[int], str]]:
    together: dict[str, list[int]] = {}
    for rank, text in texts.items():
        if text.strip():
            together.setdefault(text, []).append(rank)
    return [(ranks, text) for text, ranks in together.items()]


def _ranks(facts: Facts) -> Iterable[int]:
    return range(facts.num_ranks)


def _stacks(facts: Facts) -> str:
    folded = _folded({rank: main_stack(read_text(facts.run_dir.stack(rank))) for rank in _ranks(facts)})
    if not folded:
        return ""
    rows = []
    for ranks, text in folded:
        frames = text.splitlines()
        top = next((line.strip() for line in frames if line.strip().startswith("File")), "")
        rows.append(
            f"<details><summary><strong>{name_ranks(ranks)}</strong> · {len(frames)} frames · <code>{escape(top, 160)}</code>"
            f"</summary><pre>{_block(text)}</pre></details>"
        )
    note = "<p>The Python stack of each rank's main thread, most recent call first; equal ones are folded.</p>"
    return _section("stacks", "Stacks", note + "".join(rows))


def main_stack(text: str) -> str:
    """The main thread of a faulthandler dump, which writes it last, with paths cut to what differs."""
    thread = re.split(r"^(?:Current thread|Thread) 0x", text, flags=re.MULTILINE)[-1]
    frames = [line for line in thread.splitlines() if line.startswith("  ")]
    return "\n".join(re.sub(r'"([^"]*)"', lambda m: f'"{short_site(m.group(1))}"', line) for line in frames)


def _logs(facts: Facts) -> str:
    texts = {rank: read_text(facts.run_dir.log(rank), _MAX_LOG) for rank in _ranks(facts)}
    rows = [
        f"<details><summary><strong>{name_ranks(ranks)}</strong> · {len(text.splitlines())} lines</summary>"
        f"<pre>{_block(text)}</pre></details>"
        for ranks, text in _folded(texts)
    ]
    launcher = read_text(facts.run_dir.launcher_log, _MAX_LOG)
    if launcher.strip():
        rows.append(f"<details><summary><strong>launcher</strong></summary><pre>{_block(launcher)}</pre></details>")
    return _section("logs", "Logs", "".join(rows)) if rows else ""


def _block(text: str) -> str:
    return "\n".join(escape(line, 2000) for line in text.splitlines())


def _commands(facts: Facts) -> str:
    rows = "".join(
        f'<p>{escape(what[:1].upper() + what[1:])}</p><div class="command"><pre>{escape(command, 2000)}</pre>'
        f'<button data-copy aria-label="Copy the command: {escape(what)}">Copy</button></div>'
        for what, command in commands(facts)
    )
    return _section("commands", "Commands", rows, "commands")


def _environment(facts: Facts) -> str:
    folded = _folded({rank: read_text(facts.run_dir.environment(rank)) for rank in _ranks(facts)})
    rows = [
        f"<details><summary><strong>{name_ranks(ranks)}</strong> loaded</summary><pre>{_block(text)}</pre></details>"
        for ranks, text in folded
    ]
    hosts = sorted({lane.host for lane in facts.lanes.values() if lane.host})
    if hosts:
        rows.insert(0, f"<p>Hosts: {escape(', '.join(hosts))}.</p>")
    if text := _block(read_text(facts.run_dir.config, _MAX_LOG)):
        rows.append(f"<details><summary><strong>config.json</strong></summary><pre>{text}</pre></details>")
    return _section("environment", "Environment", "".join(rows)) if rows else ""


def _limits(facts: Facts) -> str:
    told = (
        "That any other server's hang has this cause: the run rebuilds one mechanism on a small model. "
        "Nothing here speaks about speed."
    )
    if facts.verdict.backend == "gloo":
        told += " The backend was gloo on CPUs; behaviour on NCCL and GPUs is not shown."
    if facts.stuck and not facts.verdict.culprits:
        told += " The evidence does not prove who did it."
    return told


# -- what the script draws -------------------------------------------------------------------------------------------


def _data(facts: Facts, start_ns: int, end_ns: int, unit_ns: int) -> dict[str, Any]:
    verdict = facts.verdict
    places = {p.rank: _place(p) for p in verdict.ranks}
    window = drawing.interesting_ns(facts)
    return {
        "unit": unit_ns,
        "end": (end_ns - start_ns) // unit_ns,
        "window": [(t - start_ns) // unit_ns for t in window],
        "stuck": facts.stuck,
        "groups": [escape_control_characters(name, 60) for name in drawing.group_names(facts)],
        "labels": [
            [
                label.kind,
                *(
                    escape_control_characters(part, 200)
                    for part in (label.name, label.group, label.layer, label.note, label.site)
                ),
            ]
            for label in facts.labels.table
        ],
        "ranks": list(facts.lanes),
        "places": {rank: escape_control_characters(words, 160) for rank, words in places.items()},
        "culprits": verdict.culprits,
        "marks": [[rank, escape_control_characters(s.group, 60), s.seq] for s in verdict.sides for rank in s.ranks],
        "waits": [[wait.ranks, escape_control_characters(wait.waits_in, 120), wait.awaited] for wait in verdict.waits],
    }


def _place(position: Position) -> str:
    if position.op:
        return f"{position.state} in {position.group} {position.op} #{position.seq}"
    return f"{position.state} {position.detail}".strip()


def _lane(lane: Lane, start_ns: int, unit_ns: int) -> str:
    """Five columns of 32-bit numbers, deflated: start (as differences), length, label, number, step + 1."""
    starts = [(t - start_ns) // unit_ns for t in lane.starts]
    deltas = [b - a for a, b in zip([0, *starts], starts, strict=False)]
    lengths = [
        _NEVER if end == OPEN else min((end - begin) // unit_ns, _NEVER - 1)
        for begin, end in zip(lane.starts, lane.ends, strict=True)
    ]
    columns = (
        deltas,
        lengths,
        lane.labels,
        (seq & _NEVER for seq in lane.seqs),
        (step + 1 & _NEVER for step in lane.steps),
    )
    packed = array("I")
    for column in columns:
        packed.extend(max(0, value) for value in column)
    text = base64.b64encode(zlib.compress(packed.tobytes(), 6)).decode()
    return f'<script type="text/plain" id="lane{lane.rank}">{text}</script>'
