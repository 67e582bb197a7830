"""Write trace.json: the run in the Trace Event Format, which Perfetto and chrome://tracing open.

Each rank is shown as a process. A rank has a track for each of its groups, and one track each for phases, steps, locks,
held locks and builds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from repro.report.gather import RunData, describe
from repro.report.lanes import OPEN, Label, Lane

MAX_SPANS = 250_000
"""Largest number of spans that a viewer opens. If a run has more, only the newest spans of each rank are written."""

_OWN_TRACKS = {"phase": "phases", "step": "steps", "lock": "locks", "held": "locks held", "build": "builds"}
_MAY_OVERLAP = ("async", "held", "build")


def trace(data: RunData) -> str:
    """Return the content of trace.json."""
    start_ns, end_ns = data.span_ns()
    per_rank = max(1, MAX_SPANS // max(1, len(data.lanes)))
    events: list[dict[str, Any]] = []
    dropped = 0
    for lane in data.lanes.values():
        events += _metadata(data, lane)
        dropped += max(0, len(lane) - per_rank)
        events += _spans(data, lane, start_ns, end_ns, len(lane) - per_rank)
    events += _waiting_flows(data, start_ns, end_ns)
    verdict = data.verdict
    run: dict[str, Any] = {
        "scenario": verdict.scenario, "variant": verdict.variant, "backend": verdict.backend,
        "num_ranks": verdict.num_ranks, "seed": verdict.seed, "verdict": verdict.verdict, "cause": verdict.cause or "",
    }  # fmt: skip
    if dropped:
        run["left_out"] = f"the {dropped} oldest spans"
    document = {"displayTimeUnit": "ms", "otherData": run, "traceEvents": events}
    return json.dumps(document, separators=(",", ":")) + "\n"


def _track(label: Label) -> str:
    return _OWN_TRACKS.get(label.kind) or (f"{label.group} (async)" if label.kind == "async" else label.group) or "rank"


def _tracks(data: RunData, lane: Lane) -> dict[str, int]:
    """Return a dict from the name of each track of a rank to the track's number, which the trace calls a thread id.

    A track is a line in the viewer. Those of phases and steps have the lowest numbers, so they come first.
    """
    names = {_track(data.labels.table[number]) for number in set(lane.labels)}
    order = [*_OWN_TRACKS.values()]
    ordered = sorted(names, key=lambda name: (0, order.index(name)) if name in order[:2] else (1, 0))
    return {name: number for number, name in enumerate(ordered, start=1)}


def _metadata(data: RunData, lane: Lane) -> list[dict[str, Any]]:
    def row(what: str, tid: int, args: dict[str, Any]) -> dict[str, Any]:
        return {"ph": "M", "name": what, "pid": lane.rank + 1, "tid": tid, "args": args}

    rows = [
        row("process_name", 0, {"name": f"rank {lane.rank}"}),
        row("process_sort_index", 0, {"sort_index": lane.rank}),
    ]
    for track, tid in _tracks(data, lane).items():
        rows += [row("thread_name", tid, {"name": track}), row("thread_sort_index", tid, {"sort_index": tid})]
    return rows


def _spans(data: RunData, lane: Lane, start_ns: int, end_ns: int, skip: int) -> Iterator[dict[str, Any]]:
    tracks = _tracks(data, lane)
    for place, span in enumerate(lane.spans()):
        if place < skip:
            continue
        label = data.labels.table[span.label]
        never = span.end_ns == OPEN and label.kind in ("call", "lock")
        args: dict[str, Any] = {"step": span.step}
        if span.seq:
            args["seq"] = span.seq
        args |= {name: value for name in ("layer", "note", "site") if (value := getattr(label, name))}
        event = {
            "ph": "X",
            "name": f"{describe(label)}{f' #{span.seq}' if span.seq else ''}{' (never returns)' if never else ''}",
            "cat": label.group or label.kind,
            "pid": lane.rank + 1,
            "tid": tracks[_track(label)],
            "ts": (span.start_ns - start_ns) / 1e3,
            "dur": ((end_ns if span.end_ns == OPEN else span.end_ns) - span.start_ns) / 1e3,
            "args": args,
        }
        if never:
            event["cname"] = "terrible"
        if label.kind in _MAY_OVERLAP:
            yield from _as_async(event, lane.rank * MAX_SPANS + place)
        else:
            yield event


def _as_async(event: dict[str, Any], identity: int) -> Iterator[dict[str, Any]]:
    """Replace an event of the trace that has a duration by two events, one for its begin and one for its end.

    Call this for time spans that can overlap: events with a duration must not overlap partly in one track of a rank.

    identity: a number by which a viewer finds the two events of a span
    """
    dur = event.pop("dur")
    yield {**event, "ph": "b", "id": identity}
    yield {**event, "ph": "e", "id": identity, "ts": event["ts"] + dur, "args": {}}


def _waiting_flows(data: RunData, start_ns: int, end_ns: int) -> Iterator[dict[str, Any]]:
    """Yield the arrows of the verdict's wait-for graph.

    For each collective or lock in which ranks wait, an arrow leads from one of these ranks to one of the ranks that
    they wait for. A viewer draws arrows between time spans, so a rank without an unfinished call or wait for a lock has
    no arrow.

    start_ns, end_ns   the first and last time that the report shows
    """
    stuck = _stuck_spans(data)
    for number, wait in enumerate(data.verdict.waits, start=1):
        source, target = (next((rank for rank in ranks if rank in stuck), None) for ranks in (wait.ranks, wait.awaited))
        if source is None or target is None:
            continue
        for phase, rank in (("s", source), ("f", target)):
            lane, place = data.lanes[rank], stuck[rank]
            yield {
                "ph": phase, "bp": "e", "id": number, "name": "waits for", "cat": "waits",
                "pid": rank + 1, "tid": _tracks(data, lane)[_track(data.labels.table[lane.labels[place]])],
                "ts": ((lane.starts[place] + end_ns) / 2 - start_ns) / 1e3 + (phase == "f"),
            }  # fmt: skip


def _stuck_spans(data: RunData) -> dict[int, int]:
    """Return, for each rank with a call or a wait for a lock that never ended, the index of the last such span."""
    kinds = [label.kind for label in data.labels.table]
    return {
        lane.rank: place
        for lane in data.lanes.values()
        for place, end_ns in enumerate(lane.ends)
        if end_ns == OPEN and kinds[lane.labels[place]] in ("call", "lock")
    }
