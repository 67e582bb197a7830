"""Correct the verdict on a vLLM server by what the engines did, because the judge's rules know only ranks.

An engine is the process of vLLM that schedules the requests, and tells the workers, which are the ranks, what to do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from repro.attach.vllm.processes.mirror import FRONT_ENDS, GROUP, LEFT_OUT, WITHOUT_REQUESTS
from repro.attach.vllm.processes.notes import Activity
from repro.trace.witness.file import read_dir
from repro.verdict import Verdict
from repro.verdict.result import name_ranks, say

FROM_SCHEDULE = ("extra", "skipped", "order", "mismatch")
"""The causes of a verdict that follow from a comparison with the declared schedule."""


def qualified(verdict: Verdict, root: Path) -> Verdict:
    """Return the verdict, corrected by what vLLM's engines (the processes that schedule the requests) did.

    A culprit whose engine waits for requests becomes a suspect. If all engines wait for requests, the verdict becomes
    `inconclusive`.

    If culprits are named because they departed from their schedules, the confidence becomes `likely` instead of
    `certain`: vLLM declares no schedule, so the recorder learned the schedules from earlier steps, and the new order of
    collectives can be right. The confidence stays `certain` if the engine of each culprit counted an execution that it
    did not request from its worker.

    If the verdict is `clean`, or if no witness shows an engine, the verdict is returned as it is.

    root: the folder of the job, which has the witnesses
    """
    witnesses = read_dir(root / "events")[0] if verdict.verdict != "clean" else {}
    if not any(group.name == GROUP for witness in witnesses.values() for group in witness.groups):
        return verdict
    left_out = {
        rank: text for rank, witness in witnesses.items() for text in witness.strings if text.startswith(LEFT_OUT)
    }
    lines = [
        f"rank {rank}: {text}, although the engine had counted this execution"
        for rank, text in sorted(left_out.items())
    ]
    if missing := [at.rank for at in verdict.ranks if at.state == "missing"]:
        lines.append(
            f"{name_ranks(missing)} left no witness: their processes have not become ranks yet, or they run without "
            "HMR_RECORD or without the plug-in hmr_record; install this package there, and allow it in VLLM_PLUGINS"
        )
    verdict = verdict.with_evidence(lines)
    if (
        verdict.cause in FROM_SCHEDULE
        and verdict.confidence == "certain"
        and not set(verdict.culprits) <= set(left_out)
    ):
        line = "vLLM declares no schedule: each rank is compared with what it issued in its earlier executions"
        verdict = replace(verdict.with_evidence([line]), confidence="likely")
    return _without_idle(verdict)


def at_exit(verdict: Verdict) -> str:
    """Return a sentence about ranks whose program cannot end; "" if there are no such ranks.

    At exit, the front end of such a program waits until its engine ends, but the engine waits for requests.
    """
    ranks = [at.rank for at in verdict.ranks if at.phase == WITHOUT_REQUESTS + FRONT_ENDS[Activity.EXITS]]
    if not ranks:
        return ""
    return (
        f"the front end of {name_ranks(ranks)} has finished its work and waits at exit for its engine, which waits for "
        "requests: no deadlock, but the program never ends; call llm.llm_engine.engine_core.shutdown() at its end"
    )


def _without_idle(verdict: Verdict) -> Verdict:
    """Turn each culprit whose engine waits for requests into a suspect.

    If all engines wait for requests, the verdict is `inconclusive`.
    """
    asleep = {at.rank for at in verdict.ranks if at.phase.startswith(WITHOUT_REQUESTS)}
    if asleep and all(at.rank in asleep or at.state == "done" for at in verdict.ranks):
        return _all_idle(verdict, asleep)
    idle = sorted(asleep & set(verdict.culprits))
    if not idle:
        return verdict
    culprits = tuple(rank for rank in verdict.culprits if rank not in idle)
    line = (
        f"{say(idle, 'wait')} for requests: the engine has received no request, and no message that the other engines "
        "began"
    )
    return replace(
        verdict.with_evidence([line]),
        culprits=culprits,
        suspects=tuple(sorted({*verdict.suspects, *idle})),
        confidence=verdict.confidence if culprits else "undecided",
    )


def _all_idle(verdict: Verdict, asleep: set[int]) -> Verdict:
    """Return an inconclusive verdict, because all engines wait for requests: a healthy server does so too.

    asleep: the ranks of these engines
    """
    waits = WITHOUT_REQUESTS + FRONT_ENDS[Activity.WAITS_FOR_OUTPUTS]
    lines = [f"{say(sorted(asleep), 'are')} idle, and the engines wait for requests: an idle server looks like this"]
    if starved := [at.rank for at in verdict.ranks if at.phase == waits]:
        lines.append(
            f"the front end of {name_ranks(starved)} waits for outputs that its engine does not work on: a message "
            "between them is perhaps lost"
        )
    if exits := at_exit(verdict):
        lines.append(exits)
    return replace(
        verdict,
        verdict="inconclusive",
        cause="",
        culprits=(),
        suspects=(),
        confidence="undecided",
        evidence=tuple(lines),
    )
