"""Judge a job by the collectives in which its ranks wait at two looks.

A look is one observation of the processes by `hmr collect`. The rules here find a cycle of sends and receives, ranks
that wait in different collectives, and a job that does not hang.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from repro.ingest.names.operations import operation
from repro.store.text import counted
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.looks.ranks import (
    AMONG_RANKS,
    POLLING,
    WAITING,
    RankLook,
    call_of,
    rank_looks,
    seconds_between,
    wait_row,
)
from repro.verdict.partial.words import ranks_of

TRANSFERS = ("send", "isend", "recv", "irecv")
MOVING_SWITCHES_PER_S = 12.0
MOVING_CORES = 0.1
MESSAGES = {"idle", "queue"}
"""The activities of a server's worker that waits for the next message of its engine."""
Key = tuple[str, str]
"""(operation, group) of the collective in which a rank waits."""
ANY_DATA, ANYTHING = "any operation with data", "any operation"
"""What `_key` returns as the operation if a stack does not show the operation."""
WITH_DATA = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", ANY_DATA}


def judge_waiting_ranks(job: JobRecords) -> Diagnosis | None:
    """Judge a job by the collectives in which its ranks wait.

    Return None if this proves nothing, for example because a rank was not observed or has no stack.
    """
    looks = rank_looks(job)
    size = job.world_size()
    if len(looks) < 2 or (size is not None and len(looks) < size) or any(not look.stacks for look in looks.values()):
        return None
    if not all(look.waits for look in looks.values()):
        return _moving(looks)
    return _ring(looks) or _different(job, looks)


def _ring(looks: Mapping[int, RankLook]) -> Diagnosis | None:
    """Report `deadlock` if sends and receives form a cycle; otherwise return None.

    In such a cycle each rank waits for its peer, and the peer's own send or receive does not match.
    """
    edges = {rank: peer for rank, peer in _transfers(looks) if peer in looks and not _matches(looks, rank, peer)}
    cycle = _cycle(edges)
    if not cycle:
        return None
    links = [f"rank {rank} waits in {call_of(looks[rank])}" for rank in cycle]
    return Diagnosis(
        "deadlock", "order", (), tuple(sorted(cycle)), "likely",
        (f"{ranks_of(cycle).capitalize()} wait for each other in a cycle: {'; '.join(links)}.",
         "No rank in the cycle is in the transfer that the previous rank waits for."),
        tuple(f"Rank {rank} {looks[rank].at}" for rank in cycle[:8]),
        ("A later look in which one of these transfers is done.",),
        ("the order in which each rank issues its sends and receives; batch_isend_irecv needs no order",),
        waits=tuple(wait_row([rank], call_of(looks[rank]), [edges[rank]], f"rank {edges[rank]} is in "
                             f"{call_of(looks[edges[rank]])}", looks[rank].source) for rank in cycle),
    )  # fmt: skip


def _transfers(looks: Mapping[int, RankLook]) -> Iterator[tuple[int, int]]:
    for rank, look in looks.items():
        if look.stack and look.stack.detail in TRANSFERS and look.stack.peer is not None:
            yield rank, look.stack.peer


def _matches(looks: Mapping[int, RankLook], rank: int, peer: int) -> bool:
    """Whether the rank and its peer wait in two ends of one transfer.

    One of them waits in a send to the other, and the other in a receive from it.
    """
    own, other = looks[rank].stack, looks[peer].stack
    if own is None or other is None or other.detail not in TRANSFERS:
        return False
    return other.peer == rank and ("send" in own.detail) != ("send" in other.detail)


def _cycle(edges: Mapping[int, int]) -> list[int]:
    for start in sorted(edges):
        path = [start]
        while (following := edges.get(path[-1])) is not None and following not in path:
            path.append(following)
        if following is not None:
            return path[path.index(following) :]
    return []


def _different(job: JobRecords, looks: Mapping[int, RankLook]) -> Diagnosis | None:
    """Report `deadlock` if ranks wait in different collectives, and each of these collectives needs all ranks.

    Then none of these collectives can complete. A collective needs all ranks if its group contains all ranks. Return
    None if it is not certain that the collectives differ and that each needs all ranks.
    """
    sides: dict[Key, list[int]] = {}
    for rank, look in looks.items():
        sides.setdefault(_key(look), []).append(rank)
    if len(sides) < 2 or any(look.activity == "device" for look in looks.values()):
        return None
    why = _all_belong(job, looks)
    groups = {group for _, group in sides}
    crossed = len(groups) > 1 and "" not in groups and _are_apart(looks, groups)
    mismatch = any(_differ(one, two) for one, _ in sides for two, _ in sides)
    named = "; ".join(f"{ranks_of(ranks)} in {call_of(looks[ranks[0]])}" for ranks in sides.values())
    lines = tuple(f"Rank {look.rank} {look.at}" for look in list(looks.values())[:8])
    if not why or not (crossed or mismatch):
        return None
    smallest, *_, largest = sorted(sides.values(), key=len)
    few = tuple(smallest) if len(smallest) < len(largest) else ()
    what = "The ranks enter the groups in different orders." if crossed else "The ranks are in different calls."
    return Diagnosis(
        "deadlock", "order" if crossed else "mismatch", (), few, "likely",
        (f"Each rank has waited for {seconds_between(list(looks.values())):.0f} s or longer, and not all in one call: "
         f"{named}.",
         f"{what} Each call waits for ranks that wait in another call, so none of them can end."),
        (*lines, why),
        ("Dumps of the recorder which show that one of these calls is of a group without the other ranks.",),
        (_what_next(looks, sides), COLLECT["recorder"]),
        waits=tuple(wait_row(ranks, call_of(looks[ranks[0]]), sorted(set(looks) - set(ranks)),
                             "they wait in another call", looks[ranks[0]].source) for ranks in sides.values()),
    )  # fmt: skip


def _key(look: RankLook) -> Key:
    """Return (operation, group) of the collective in which a rank waits.

    If the stack does not show the operation, the result has ANY_DATA in its place if the operation certainly transfers
    data, otherwise ANYTHING. The group is then "".
    """
    stack = look.stack
    if stack is None or stack.detail in POLLING or stack.detail.startswith(("a wait", "wait ")):
        return ANYTHING, ""
    if stack.activity == "backward" or stack.detail.startswith("wait_tensor"):
        return ANY_DATA, ""
    return operation(stack.detail.split(" ")[0]), stack.group


def _differ(one: str, two: str) -> bool:
    """Whether two operations, as `_key` returns them, are certainly different.

    If one of them is ANYTHING, the result is False. If one of them is ANY_DATA, the result is True only if the other
    operation is not in WITH_DATA, such as a barrier.
    """
    if ANYTHING in (one, two):
        return False
    return not {one, two} <= WITH_DATA if ANY_DATA in (one, two) else one != two


def _are_apart(looks: Mapping[int, RankLook], groups: set[str]) -> bool:
    """Whether the variables in the stacks prove that these group names belong to different process groups."""
    named = groups - {"default"}
    if len(named) < len(groups) and len(named) == 1:
        return True  # one group is the default group, the other was passed to the call
    return any(named <= {look.stack.group, *look.stack.other_groups} for look in looks.values() if look.stack)


def _all_belong(job: JobRecords, looks: Mapping[int, RankLook]) -> str:
    """Return a sentence that says why every group in which ranks wait contains all ranks; "" if this is not certain."""
    if len(looks) == 2:
        return "The job has two ranks, so every group in which a rank waits contains both."
    if all(look.stack and look.stack.group == "default" for look in looks.values()):
        return "All of these calls are of the default group, which contains every rank."
    pids = sorted(look.last.process.pid or 0 for look in looks.values())
    pairs = [(one, two) for index, one in enumerate(pids) for two in pids[index + 1 :]]
    for record in job.connections:
        numbers = {record.between.get(pair, 0) for pair in pairs}
        if len(numbers) == 1 and (number := numbers.pop()) > 0:
            return (
                f"Each pair of ranks has {counted(number, 'connection')}, one for each group that contains both: so "
                f"every group contains all ranks ({record.source})"
            )
    return ""


def _what_next(looks: Mapping[int, RankLook], sides: Mapping[Key, list[int]]) -> str:
    places = ", ".join(f"rank {ranks[0]}: {looks[ranks[0]].at.partition(' at ')[2]}" for ranks in sides.values())
    return f"why these ranks reached different lines: {places}"


def _moving(looks: Mapping[int, RankLook]) -> Diagnosis | None:
    """Report `clean` if every rank moved on between the two looks, and waited only for other ranks; otherwise None."""
    if not all(_moved(look) for look in looks.values()):
        return None
    if not any(stack.activity in AMONG_RANKS for look in looks.values() for stack in look.stacks):
        return None
    lines = [
        f"Rank {look.rank} used {look.cores:.2f} processors in {look.apart_s:.1f} s, its main thread was switched "
        f"{look.last.switches - look.first.switches} times, and the rank {look.at}"
        for look in list(looks.values())[:6]
    ]
    return Diagnosis(
        "clean", "", (), (), "likely",
        ("This is not a hang: every rank moved between the two looks, and none stayed in one wait.",), tuple(lines),
        ("The program's own counter of steps, if it stands still.",),
        ("the time that a step takes, from the program's own log", "a second `collect`, a minute later"),
    )  # fmt: skip


def _moved(look: RankLook) -> bool:
    """Whether a rank moved on between the two looks, and waited for nothing but other ranks.

    A rank that polled in one wait all the time has not moved on. Exception: a wait for the next message of the engine
    is part of every step of a serving engine's worker. So a worker that was in this wait at one look, and elsewhere at
    another look, has moved on.
    """
    activities = {stack.activity for stack in look.stacks}
    elsewhere = activities & set(WAITING) - set(AMONG_RANKS)
    if look.apart_s <= 0 or look.spins or (elsewhere and (not elsewhere <= MESSAGES or activities <= MESSAGES)):
        return False
    switches = (look.last.switches - look.first.switches) / look.apart_s
    return switches >= MOVING_SWITCHES_PER_S or look.cores >= MOVING_CORES
