"""A vote of all ranks through torch's store, before they communicate: all go on, or all get the same sentence.

Every rank writes a ballot. Rank 0 reads all ballots and writes the decision. A rank that waits longer than its deadline
writes a negative decision. Only the first decision counts, and only rank 0 can write a positive one, after it has read
all ballots. So a rank without a ballot, for example because it lacks the plug-in, never counts as a rank that agrees.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from repro.attach.vllm.guard.meeting.meeting import Meeting
from repro.verdict.result import list_ranks

IN_FAVOUR = "yes"

Ballot = Mapping[str, Any]


def decide(
    meeting: Meeting,
    topic: str,
    ballot: Ballot,
    rank: int,
    num_ranks: int,
    deadline_s: float,
    judge: Callable[[dict[int, Any]], str],
    check: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Write this rank's ballot, wait for the decision of rank 0, and return the decision.

    The result is the same on all ranks: "" if all ranks go on, else one sentence that says why they do not. If a rank
    has waited for ``deadline_s`` seconds and there is no decision yet, this rank decides that the ranks do not go on.

    meeting     the connection to torch's store, through which the ranks exchange the ballots
    topic       the name of the vote: "start" or "prepare"
    ballot      what this rank reports to ``judge``, a mapping that JSON can represent
    deadline_s  how many seconds this rank waits: rank 0 for all ballots, another rank for the decision
    judge       rank 0 calls this with all ballots; returns "" if the ranks are allowed to go on, else why not
    check       is called again and again while this rank waits; it can raise an exception to end the wait
    """
    meeting.set(f"{topic}/{rank}", json.dumps(ballot))
    decision = f"{topic}/decision"
    keys = [f"{topic}/{other}" for other in range(num_ranks)]
    wanted = keys if rank == 0 else [decision]
    missing = meeting.wait_for(wanted, deadline_s, check, clock)
    ballots = meeting.read(keys)
    absent = [number for number, key in enumerate(keys) if key not in ballots]
    if missing and absent:
        sentence = f"{_ranks(absent)} did not answer within {deadline_s:g} s"
    elif missing:
        sentence = f"rank 0 has not decided within {deadline_s:g} s"
    elif rank == 0:
        sentence = judge({number: json.loads(ballots[key]) for number, key in enumerate(keys)})
    else:
        sentence = ""
    if rank == 0 or missing:
        meeting.first(decision, sentence or IN_FAVOUR)
    outcome = meeting.read([decision])[decision]
    return "" if outcome == IN_FAVOUR else outcome


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list_ranks(ranks)}"


def differences(ballots: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Return a line for each field of the ballots in which the ranks differ: which ranks have which value.

    ballots: a dict from rank to what this rank says in the vote
    """
    lines = []
    for name in sorted({name for ballot in ballots.values() for name in ballot}):
        sides: dict[str, list[int]] = {}
        for rank, ballot in ballots.items():
            value = ballot.get(name)
            sides.setdefault("not set" if value is None else json.dumps(value), []).append(rank)
        if len(sides) > 1:
            parts = [f"{value.strip(chr(34))} on {_ranks(ranks)}" for value, ranks in sides.items()]
            lines.append(f"{name} is {', '.join(parts)}")
    return lines
