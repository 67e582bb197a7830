"""Explain why a run is `slow`: name the ranks that still work while others wait for them, and show that they work."""

from __future__ import annotations

from collections.abc import Sequence

from repro.trace.knowledge import Knows
from repro.verdict.case import Case
from repro.verdict.result import Finding, name_ranks, say

BUSY = 0.02
"""A process that keeps at least this many processors busy counts as working. A sleeping process uses less."""

STARVED = 0.1
"""If a process could run but got no processor for at least this share of the time, the machine is overloaded. Then low
processor use and missing events prove little."""


def slow(case: Case, movers: Sequence[int]) -> Finding:
    """Name the ranks ``movers``, for which other ranks wait, as culprits, and show the evidence that they work.

    A rank that has been in its present state for less than the quiet window is not named, because it is too early to
    call it slow. (But a rank that is suspended or still starts is named.) The confidence is at most ``likely`` in two
    cases:

    - one of ``movers`` shows no sign of work and is not suspended
    - one of ``movers``, or one of the waiting ranks, lacked a processor
    """
    finding = Finding("", tuple(movers))
    signs = {rank: signs_of_life(case, rank) for rank in movers}
    for rank in movers[:8]:
        at = case.rank_states[rank].position
        what = ", ".join([at.detail or case.place(rank), *signs[rank]])
        finding.evidence.append(f"rank {rank} {at.state} for {at.since_s:.1f} s: {what}")
    silent = [rank for rank, shown in signs.items() if not shown and rank not in case.facts.excused]
    unmeasured = [rank for rank in silent if rank not in case.facts.cores]
    asleep = [rank for rank in silent if rank in case.facts.cores]
    waiting = case.ranks("blocked", "locked")
    starved = [rank for rank in sorted({*movers, *waiting}) if case.facts.starved.get(rank, 0.0) >= STARVED]
    if starved:
        finding.confidence = "likely"
        finding.evidence.append(
            f"{name_ranks(starved)} lacked a processor: on a machine this busy, low processor use proves little"
        )
    elif silent:
        finding.confidence = "likely"
    if asleep and not starved:
        finding.evidence.append(
            f"{name_ranks(asleep)} used no processor and sent no heartbeat: asleep, or waiting for something that is "
            "not recorded. Take the stacks to see which"
        )
    if unmeasured:
        finding.evidence.append(f"no evidence shows that {say(unmeasured, 'work')}: processor use was not measured")
    return _with_waits(case, _only_quiet(case, finding))


def _only_quiet(case: Case, finding: Finding) -> Finding:
    """Remove each culprit that has been in its present state for less than the quiet window.

    It is too early to call such a rank slow: in a healthy run, too, ranks are outside collectives for short times. A
    rank that is suspended or that still starts is not removed. If a witness has no times, turn all culprits into
    suspects.
    """
    if not case.all_know(Knows.TIME):
        finding.culprits, finding.suspects, finding.confidence = (), finding.culprits, "undecided"
        finding.evidence.append("not every witness has times, so nothing shows how long the ranks have waited")
        return finding
    moving = [rank for rank in finding.culprits if _moved(case, rank)]
    if moving:
        finding.culprits = tuple(rank for rank in finding.culprits if rank not in moving)
        finding.confidence = finding.confidence if finding.culprits else "undecided"
        finding.evidence.append(
            f"{name_ranks(moving)} moved less than {case.quiet_window_s:g} s ago, too recently to name a culprit"
        )
    return finding


def _moved(case: Case, rank: int) -> bool:
    at = case.rank_states[rank].position
    if at.state == "blocked":  # in a collective that others have completed, perhaps a moment ago
        return not case.quiet
    return at.state != "starting" and rank not in case.facts.excused and at.since_s < case.quiet_window_s


def signs_of_life(case: Case, rank: int) -> list[str]:
    """Return the evidence that a rank works, as phrases: its last heartbeat and its processor use; [] if none."""
    rank_state, cores = case.rank_states[rank], case.facts.cores.get(rank, 0.0)
    signs = []
    if rank_state.beat_s is not None:
        signs.append(f"heartbeat {rank_state.beat_s:.1f} s ago" + (f" ({rank_state.beat})" if rank_state.beat else ""))
    if cores >= BUSY:
        signs.append(f"keeps {cores:.2f} processors busy")
    return signs


def may_wait_for_device(case: Case, rank: int) -> bool:
    """Whether a rank that seems to work possibly waits for its device.

    Returns True if three things are true: the rank is outside any collective, it has queued collectives on its device,
    and it shows no work (no heartbeat, no build, no lock that it holds).
    """
    rank_state = case.rank_states[rank]
    has_queued = any(key[0] in case.queued and issued for key, issued in rank_state.issued.items())
    return has_queued and rank_state.state == "running" and rank_state.beat_s is None and not rank_state.position.detail


def _with_waits(case: Case, finding: Finding) -> Finding:
    """Add lines of evidence: which ranks wait, and which ranks hold the locks that other ranks wait for."""
    waiting = [rank for rank in case.ranks("blocked", "locked") if rank not in finding.culprits]
    if waiting:
        finding.evidence.append(say(waiting, "wait"))
    for node in case.waits.nodes.values():
        holders = sorted(node.waits_for)
        if node.key[0] == "lock" and holders:
            finding.evidence.append(f"{say(holders, 'hold')} {node.name}, for which {say(node.ranks, 'wait')}")
    return finding
