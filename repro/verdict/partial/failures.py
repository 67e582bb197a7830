"""Judge errors that ended a process before the others began to wait in vain."""

from __future__ import annotations

from collections.abc import Sequence

from repro.trace.observed import Failure
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.scene import Scene
from repro.verdict.partial.words import ranks_of, verb

ROOTS = ("memory", "device", "killed", "exception")
_WEIGHT = {"memory": 0, "device": 0, "killed": 1, "exception": 2}


def judge_failures(scene: Scene) -> Diagnosis | None:
    start = [it for it in scene.failures if it.kind == "start"]
    loopback = [note for note in scene.notes if note.kind == "loopback"]
    if start or (loopback and any(it.kind != "consequence" for it in scene.failures)):
        return _start(scene, start)
    roots = [it for it in scene.failures if it.kind in ROOTS and not _is_aftermath(it, scene)]
    if not roots:
        return None
    first = _first(roots)
    if first is None:
        return _undecided(roots)
    alike = [
        it for it in roots if it.kind == first.kind and it.process.rank != first.process.rank and it.text == first.text
    ]
    if alike and first.kind == "exception":
        return _alike([first, *alike])
    return _crash(scene, first)


def _is_aftermath(failure: Failure, scene: Scene) -> bool:
    """An error that cannot have begun the hang: it came after a watchdog had fired, or the rank went on after it."""
    if failure.kind == "exception" and failure.process.rank in _seen_waiting(scene):
        return True  # so the exception did not end it
    fired = [it.at_s for it in scene.timeouts if it.at_s is not None]
    gave_up = [it.at_s for it in scene.failures if it.kind == "timeout" and it.at_s is not None]
    bounds = fired + gave_up
    if failure.kind in ("memory", "device") and failure.at_s is None:
        return False
    return failure.at_s is not None and bool(bounds) and failure.at_s >= min(bounds)


def _seen_waiting(scene: Scene) -> set[int]:
    """Ranks that a stack, a dump or a watchdog shows alive in a wait."""
    waiting = {rank for rank, dump in scene.recorders.items() if any(record.pending for record in dump.groups)}
    return waiting | set(scene.main_stacks()) | {it.rank for it in scene.timeouts if it.rank is not None}


def _first(roots: Sequence[Failure]) -> Failure | None:
    """The earliest, by its stamp; without stamps the weightiest, if only one rank has one."""
    stamped = [it for it in roots if it.at_s is not None]
    if stamped and len(stamped) == len(roots):
        return min(stamped, key=lambda it: (it.at_s or 0.0, _WEIGHT[it.kind]))
    heavy = sorted(roots, key=lambda it: _WEIGHT[it.kind])
    best = [it for it in heavy if _WEIGHT[it.kind] == _WEIGHT[heavy[0].kind]]
    ranks = {it.process.rank for it in best}
    return best[0] if len(ranks) == 1 else None


def _crash(scene: Scene, first: Failure) -> Diagnosis:
    rank = first.process.rank
    who = f"Rank {rank}" if rank is not None else f"{first.process}".capitalize()
    later = [it for it in scene.failures if it.kind in ("consequence", "timeout") and it.process.rank != rank]
    evidence = [f"{who}: {first.text} ({first.source})"]
    closed = [
        note for note in scene.notes if note.kind == "local rank" and rank is not None and note.value == str(rank)
    ]
    if closed:
        evidence.append(
            f"NCCL on {ranks_of({n.process.rank for n in closed if n.process.rank is not None})} saw "
            f"local rank {rank} close its connection ({closed[0].source})"
        )
    evidence += [f"{it.process}, later: {it.text} ({it.source})" for it in _one_a_rank(later)[:4]]
    waiting = sorted({it.rank for it in scene.timeouts if it.rank is not None and it.rank != rank})
    if waiting:
        evidence.append(
            f"{ranks_of(waiting).capitalize()} ran into time-outs, a consequence: "
            f"{verb(waiting, 'it', 'they')} waited for a rank that was gone."
        )
    others = sorted(({it.process.rank for it in later if it.process.rank is not None} | set(waiting)) - {rank})
    unseen = _unseen(scene, rank)
    collect = list(_COLLECT[first.kind])
    if unseen:
        collect.append(f"the log of {ranks_of(unseen)}, which is missing")
    certain = rank is not None and first.at_s is not None and not unseen
    return Diagnosis(
        "crash", _CAUSE[first.kind], (rank,) if rank is not None else (), (), "certain" if certain else "likely",
        (f"{who} ended first: {first.text}.",
         f"What {ranks_of(others)} {verb(others, 'reports', 'report')} came later and follows from "
        "it." if others else "What other ranks report follows from it."),
        tuple(evidence),
        ("An error of another rank that is older: look at the logs that are not here.",),
        tuple(collect),
    )  # fmt: skip


_CAUSE = {"memory": "memory", "device": "hardware", "killed": "killed", "exception": "error"}
_COLLECT = {
    "memory": ("its memory before the error: torch.cuda.memory_summary(), "
        "torch.cuda.memory._snapshot(); for host memory dmesg -T | grep -i oom",),
    "device": ("CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer for the kernel that failed; dmesg -T | grep "
        "-i xid on its host",),
    "killed": ("who sent the signal: dmesg -T | grep -iE 'oom|killed process' on its host, and the "
        "launcher's log (exit code)",),
    "exception": ("the traceback of that rank from its beginning",),
}  # fmt: skip


def _one_a_rank(failures: Sequence[Failure]) -> list[Failure]:
    seen: dict[object, Failure] = {}
    for it in failures:
        seen.setdefault(it.process.rank if it.process.rank is not None else it.process.title, it)
    return list(seen.values())


def _unseen(scene: Scene, rank: int | None) -> list[int]:
    known = set(scene.ranks())
    size = scene.world_size() or (max(known) + 1 if known else 0)
    return sorted(r for r in range(size) if r not in known and r != rank) if size <= 1024 else []


def _start(scene: Scene, start: Sequence[Failure]) -> Diagnosis:
    loopback = [note for note in scene.notes if note.kind == "loopback"]
    incomplete = [note for note in scene.notes if note.kind == "incomplete"]
    warned = sorted({note.process.rank for note in loopback if note.process.rank is not None})
    evidence = [f"{note.text.capitalize()} ({note.source})" for note in incomplete[:2]]
    evidence += [f"{it.process}: {it.text} ({it.source})" for it in start[:3]]
    summary = ["The start-up failed: the ranks could not connect to each other. No collective ran."]
    if loopback:
        evidence.insert(
            0,
            f"{ranks_of(warned).capitalize()} could not resolve the name of their host and bound gloo "
            f"to the loopback address 127.0.0.1 ({loopback[0].source})",
        )
        summary.append(
            f"The host of {ranks_of(warned)} offers 127.0.0.1 (loopback) to the others. Set "
            "GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the interface between the hosts."
        )
    return Diagnosis(
        "crash", "start", (), (), "likely", tuple(summary), tuple(evidence),
        ("The interface is set and the same error comes again: then look at the port and the firewall.",),
        ("the interfaces and the name of that host: ip -br addr; hostname; getent hosts "
        "$(hostname); cat /etc/hosts", "GLOO_SOCKET_IFNAME=IFACE NCCL_SOCKET_IFNAME=IFACE, and start again"),
    )  # fmt: skip


def _undecided(roots: Sequence[Failure]) -> Diagnosis:
    ranks = sorted({it.process.rank for it in roots if it.process.rank is not None})
    return Diagnosis(
        "crash", "error", (), tuple(ranks), "undecided",
        (f"{ranks_of(ranks).capitalize()} failed, and the lines carry no times: which was first is not known.",),
        tuple(f"{it.process}: {it.text} ({it.source})" for it in roots[:6]),
        (), ("the same logs with time stamps: TORCH_CPP_LOG_LEVEL=INFO, or the launcher's logs with times",),
    )  # fmt: skip


def _alike(roots: Sequence[Failure]) -> Diagnosis:
    ranks = sorted({it.process.rank for it in roots if it.process.rank is not None})
    return Diagnosis(
        "crash", "error", (), tuple(ranks), "undecided",
        (f"{ranks_of(ranks).capitalize()} raised the same error: {roots[0].text}.",),
        tuple(f"{it.process}: {it.text} ({it.source})" for it in roots[:4]),
        ("An older error of one rank.",), (COLLECT["stacks"],),
    )  # fmt: skip
