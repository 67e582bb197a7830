"""Judge Flight Recorder dumps: who waits in which operation, who has not queued it, and whether the waits form a cycle.

On NCCL a queued operation says where the host went, not what the device did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.habits import left_rhythm
from repro.verdict.partial.scene import Scene, groups_of
from repro.verdict.partial.sides import different_arguments
from repro.verdict.partial.stopped import judge_stopped
from repro.verdict.partial.waits import Wait, find_cycle, waits_of
from repro.verdict.partial.words import call_in, program_frames, ranks_of, verb


def judge_recorders(scene: Scene) -> Diagnosis | None:
    if not scene.recorders:
        return None
    groups = groups_of(scene.recorders)
    waits = waits_of(groups, any(dump.wrapped for dump in scene.recorders.values()))
    diagnosis = (
        different_arguments(scene, groups)
        or judge_stopped(scene.recorders, groups)
        or _cycle(scene, waits)
        or _lock_across(scene, waits)
        or _absent(scene, waits)
        or _all_there(scene, waits)
        or _nothing_pending(scene)
    )
    if diagnosis is None:
        return None
    notes = (*diagnosis.notes, *scene.contradictions)
    return replace(diagnosis, notes=notes, waits=tuple(_wait_rows(waits)))


def _cycle(scene: Scene, waits: Sequence[Wait]) -> Diagnosis | None:
    chain = find_cycle(waits)
    if not chain:
        return None
    ranks = sorted({wait.rank for wait in chain})
    links = [
        f"rank {wait.rank} waits in {call_in(wait.call, wait.group)} for {ranks_of(wait.missing)}" for wait in chain
    ]
    evidence = [
        f"Rank {wait.rank}: {call_in(wait.call, wait.group)} is queued and not done"
        + (f", from {place}" if (place := program_frames(wait.call.frames)) else "") + f" ({wait.at}); "
        + f"{ranks_of(wait.missing)} {verb(wait.missing, 'has', 'have')} not queued {_counterpart(wait)}"
        for wait in chain
    ]  # fmt: skip
    evidence += [
        f"Rank {rank}'s stack: {' < '.join(frames)} ({stack.source})"
        for rank in ranks
        for stack in scene.main_stacks().get(rank, [])[-1:]
        if (frames := program_frames(stack.frames, 3).split(" < ")) != [""]
    ]
    transfers = all(wait.call.is_transfer for wait in chain)
    unseen = sorted({rank for wait in waits for rank in wait.unseen})
    extra = None if transfers else left_rhythm(scene, [(wait.rank, wait.call) for wait in waits])
    culprits: tuple[int, ...] = ()
    suspects: tuple[int, ...] = ()
    cause, confidence = "order", "likely"
    if extra is not None:
        evidence.append(extra.sentence)
        cause = extra.kind
        culprits, suspects = ((extra.rank,), ()) if extra.convincing else ((), (extra.rank,))
    stood_out = _changed_order(scene, ranks) if transfers else []
    if stood_out:
        suspects = tuple(stood_out)
        evidence.append(
            f"{ranks_of(stood_out).capitalize()} changed {verb(stood_out, 'its', 'their')} order of "
            "sends and receives; an interleaved "
            "schedule may do that on purpose, so this makes a suspect and no more."
        )
    summary = [f"{ranks_of(ranks).capitalize()} wait for each other in a cycle: " + "; ".join(links) + "."]
    if transfers:
        summary.append(
            "Each waits in a receive, and the matching send was never queued."
            if all(w.call.op == "recv" for w in chain)
            else "The sends and receives do not match."
        )
    collect = [
        "the schedule (order) in which each rank issues these operations, from the code; batched "
        "transfers (batch_isend_irecv) avoid the order"
        if transfers
        else COLLECT["stacks"]
    ]
    if unseen:
        collect.append(f"dumps of {ranks_of(unseen)}, which are missing")
    return Diagnosis(
        "deadlock", cause, culprits, suspects, confidence, tuple(summary), tuple(evidence),
        ("A later dump in which one of these operations is done.",), tuple(collect),
    )  # fmt: skip


def _counterpart(wait: Wait) -> str:
    if wait.call.is_transfer:
        return f"the {'send' if wait.call.op == 'recv' else 'receive'} that it needs"
    return "it"


def _changed_order(scene: Scene, ranks: Sequence[int]) -> list[int]:
    """Ranks whose last operation breaks the rhythm of their own transfers, where not all break it."""
    changed = []
    for rank in ranks:
        ops = [call.op for record in scene.recorders[rank].groups for call in record.calls if call.is_transfer]
        past, last = ops[:-1], ops[-1:]
        if len(past) < 4:
            return []
        for period in range(1, len(past) // 2 + 1):
            if all(past[i] == past[i - period] for i in range(period, len(past))):
                if last[0] != past[len(past) - period]:
                    changed.append(rank)
                break
        else:
            return []
    return changed if len(changed) < len(ranks) else []


def _lock_across(scene: Scene, waits: Sequence[Wait]) -> Diagnosis | None:
    """A rank waits for a lock, the ranks it keeps waiting are in a collective: who holds it, if the stacks leave one
    rank.
    """
    stacks = {rank: rows[-1] for rank, rows in scene.main_stacks().items()}
    locked = {rank for rank, stack in stacks.items() if stack.activity == "lock"}
    blocked = [wait for wait in waits if set(wait.missing) & locked]
    if not locked or not blocked:
        return None
    in_collective = sorted({wait.rank for wait in blocked})
    everybody = {rank for wait in blocked for rank in wait.group.members}
    busy = [
        rank
        for rank in everybody
        if rank in stacks and stacks[rank].activity in ("building", "compiling", "loading", "")
    ]
    if busy or not everybody <= stacks.keys():
        return None
    evidence = [
        f"Rank {wait.rank}: {call_in(wait.call, wait.group)} is not done ({wait.at}); "
        f"{ranks_of(wait.missing)} {verb(wait.missing, 'has', 'have')} not queued it"
        for wait in blocked
    ]
    evidence += [
        f"Rank {rank} waits for {stacks[rank].detail} at "
        f"{program_frames(stacks[rank].frames, 1) or stacks[rank].frames[0]} "
        f"({stacks[rank].source})"
        for rank in sorted(locked)
    ]
    evidence.append(
        "No stack shows a holder. Of the ranks only those in the collective can hold the lock, "
        "and nobody builds: this is by elimination."
    )
    culprits = tuple(in_collective) if len(in_collective) == 1 else ()
    return Diagnosis(
        "deadlock", "lock", culprits, () if culprits else tuple(in_collective), "likely",
        (f"{ranks_of(locked).capitalize()} {verb(locked, 'waits', 'wait')} for a file lock "
        f"({next(iter(stacks[r].detail for r in sorted(locked)))}), and {ranks_of(in_collective)} "
         f"{verb(in_collective, 'waits', 'wait')} in {call_in(blocked[0].call, blocked[0].group)} "
        f"for {verb(locked, 'it', 'them')}.",),
        tuple(evidence),
        ("A process outside of the job holds the lock: look at /proc/locks.",),
        ("who holds the lock: cat /proc/locks; ls -l /proc/*/fd 2>/dev/null | grep -i lock", COLLECT["stacks"]),
    )  # fmt: skip


def _absent(scene: Scene, waits: Sequence[Wait]) -> Diagnosis | None:
    """A collective that some wait in and others have not queued, without a cycle."""
    lacking = [wait for wait in waits if wait.missing]
    if not lacking:
        return None
    waiting_ranks = {wait.rank for wait in waits}
    ends = sorted({rank for wait in lacking for rank in wait.missing if rank not in waiting_ranks}) or sorted(
        {r for w in lacking for r in w.missing}
    )
    stacks = {rank: rows[-1] for rank, rows in scene.main_stacks().items()}
    first = lacking[0]
    seen = [rank for rank in ends if rank in stacks and stacks[rank].activity]
    evidence = []
    for wait in lacking[:4]:
        evidence.append(
            f"Rank {wait.rank} waits in {call_in(wait.call, wait.group)} ({wait.at}); "
            f"{ranks_of(wait.missing)} {verb(wait.missing, 'has', 'have')} never queued it"
        )
    evidence += _ras_agrees(scene, ends)
    for rank in seen:
        evidence.append(f"Rank {rank} is {_doing(stacks[rank].activity, stacks[rank].detail)} ({stacks[rank].source})")
    summary = (
        f"{ranks_of(ends).capitalize()} {verb(ends, 'has', 'have')} not queued "
        f"{call_in(first.call, first.group)}, in which {ranks_of({w.rank for w in lacking})} "
        f"{verb({w.rank for w in lacking}, 'waits', 'wait')}."
    )
    if seen == ends and all(
        stacks[rank].activity in ("building", "compiling", "loading", "saving", "data") for rank in ends
    ):
        return Diagnosis(
            "slow", "", tuple(ends), (), "likely", (summary,), tuple(evidence),
            ("A second look in which the same frames stand still and no child process uses a processor.",),
            (COLLECT["children"], COLLECT["stacks"]),
        )  # fmt: skip
    return Diagnosis(
        "inconclusive", "", (), tuple(ends), "undecided",
        (summary, "What it does instead is not in these files: it may build, wait for something that no "
        "recorder sees, or have passed the call."),
        tuple(evidence),
        ("A later dump in which it has queued the operation.",),
        (f"stacks of {ranks_of(ends)}, twice: py-spy dump --nonblocking --pid PID", COLLECT["recorder"]),
    )  # fmt: skip


def _doing(activity: str, detail: str) -> str:
    words = {
        "building": "building",
        "compiling": "compiling",
        "lock": "waiting for",
        "collective": "in the collective",
        "device": "waiting for the device:",
        "idle": "idle:",
        "answer": "waiting:",
        "data": "in",
        "loading": "loading",
        "saving": "saving",
        "debugger": "in",
        "queue": "waiting in",
        "exit": "waiting for",
        "sleep": "in",
    }
    return f"{words.get(activity, activity)} {detail}".strip()


def _ras_agrees(scene: Scene, ranks: Sequence[int]) -> list[str]:
    lines = []
    for answer in scene.ras:
        for communicator in answer.communicators:
            for op, counts in communicator.launched.items():
                if len(counts) > 1 and {rank for rank, n in counts.items() if n < max(counts.values())} == set(ranks):
                    listed = ", ".join(f"rank {rank} {n}" for rank, n in sorted(counts.items()))
                    lines.append(
                        f"NCCL's RAS agrees: launches of {op} are {listed} ({answer.source}). It numbers each "
                        "kind of operation on its own, so the numbers differ from the recorder's."
                    )
    return lines


def _all_there(scene: Scene, waits: Sequence[Wait]) -> Diagnosis | None:
    """Every member with a dump has queued what all wait in."""
    if not waits:
        return None
    first = min(waits, key=lambda wait: wait.call.at_s or 0.0)
    ranks = sorted({wait.rank for wait in waits})
    unseen = sorted({rank for wait in waits for rank in wait.unseen})
    evidence = [f"Rank {wait.rank} waits in {call_in(wait.call, wait.group)} ({wait.at})" for wait in waits[:8]]
    if unseen:
        return Diagnosis(
            "inconclusive", "", (), (), "undecided",
            (f"{ranks_of(ranks).capitalize()} {verb(ranks, 'waits', 'wait')} in "
        f"{call_in(first.call, first.group)}. There are no dumps of {ranks_of(unseen)}, so nobody "
        "can be called absent.",),
            tuple(evidence), (), (f"dumps of {ranks_of(unseen)}", COLLECT["stacks"]),
        )  # fmt: skip
    return Diagnosis(
        "stall", "", (), (), "likely",
        (f"All members have queued {call_in(first.call, first.group)} with equal arguments, and it "
        "is not done. Nobody is absent in these dumps.",),
        tuple(evidence),
        ("A later dump in which it is done: then the dumps were taken while it moved.",),
        (COLLECT["kernel"], COLLECT["nccl"], "a second set of dumps, some seconds later"),
    )  # fmt: skip


def _nothing_pending(scene: Scene) -> Diagnosis | None:
    if len(scene.recorders) < 2 or scene.timeouts or scene.stacks or scene.ras:
        return None
    missing = sorted(
        {rank for dump in scene.recorders.values() for group in dump.configured for rank in group.members}
        - scene.recorders.keys()
    )
    if missing:
        return None
    return Diagnosis(
        "clean", "", (), (), "likely",
        (f"No operation is unfinished in the dumps of {ranks_of(scene.recorders)}.",), (),
        ("Operations that the recorder does not see: pynccl, CUDA graphs, gloo transfers.",), (COLLECT["stacks"],),
    )  # fmt: skip


def _wait_rows(waits: Sequence[Wait]) -> list[dict[str, object]]:
    return [
        {"ranks": [wait.rank], "waits_in": call_in(wait.call, wait.group), "for": list(wait.missing), "source": wait.at}
        for wait in waits
    ]
