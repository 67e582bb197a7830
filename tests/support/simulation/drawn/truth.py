"""The truth about the end of a drawn run, from the simulation's own state. No witness is read.

``truth(case, sim)`` is for one fault: the class, the culprits, and whether a witness can show the culprit at all.
``class_of(case, sim)`` is the class for any number of faults.
"""

from __future__ import annotations

from dataclasses import dataclass

from drawn_case import WRAPPING, Case
from faults import LATE, OFF_PLAN, SILENT
from simulator import Simulation


@dataclass(frozen=True)
class Truth:
    verdict: str
    culprits: tuple[int, ...] = ()
    provable: bool = True  # whether the witnesses show the culprit


def truth(case: Case, sim: Simulation) -> Truth:
    """Return how the run ended, from the scheduler's own state."""
    stuck = [rank for rank, each in enumerate(sim.ranks) if each.blocked and each.state == "running"]
    states = {each.state for each in sim.ranks}
    wrapped = case.shape is WRAPPING
    culprits = case.culprits
    if case.fault in OFF_PLAN:
        culprits = tuple(rank for rank in culprits if rank in sim.acted)
    provable = case.fault not in SILENT and (case.declared or case.fault == "lock") and not wrapped
    if case.habit and case.step == 0:
        provable = False  # there must be a habit before leaving it can be noticed
    if _mispaired(sim):
        return Truth("corrupt", culprits, provable)
    if case.fault in LATE and stuck:
        return Truth("slow", case.culprits)
    if states == {"done"}:
        return Truth("clean")
    if "spinning" in states:
        return Truth("slow", case.culprits)
    if case.fault == "sizes_abort" and "dead" in states:
        return Truth("crash", case.culprits, False)
    if {"dead", "failed"} & states:
        return Truth("crash", case.culprits)
    if any(channel.jammed == "stall" for channel in sim.channels.values()):
        return Truth("stall")
    if case.fault == "held_lock":
        return Truth("slow")
    if case.fault == "unknown_lock":
        return Truth("inconclusive")
    if case.fault == "stale_lock":
        return Truth("deadlock")
    return Truth("deadlock", culprits, provable)


def class_of(case: Case, sim: Simulation) -> str:
    """Return how a run with any number of faults ended, from the scheduler's own state alone."""
    states = {rank: each.state for rank, each in enumerate(sim.ranks)}
    waited_for = {other for rank, each in enumerate(sim.ranks) if each.blocked for other in sim.waits_for(rank)}
    aborted = any(
        channel.jammed == "differ" and states[rank] in ("dead", "failed")
        for channel in sim.channels.values()
        for rank in {*channel.members} - channel.served
    )
    if _mispaired(sim):
        return "corrupt"
    if set(states.values()) == {"done"}:
        return "clean"
    differ = any(  # whether the device or the difference blocks these ranks cannot be known
        channel.jammed == "stall" and len({call for call, _ in channel.calls[channel.completed].values()}) > 1
        for channel in sim.channels.values()
    )
    if (sim.in_a_circle() and not aborted) or differ:
        return "deadlock"
    if {"dead", "failed"} & set(states.values()):
        return "crash"
    if any(states[rank] == "done" for rank in waited_for):
        return "deadlock"
    moving = {rank for rank, each in enumerate(sim.ranks) if not each.blocked and states[rank] != "done"}
    if moving & waited_for:
        return "slow"
    if any(each.blocked and each.blocked[0] == "lock" and (sim.locks[each.blocked[1]] or 0) < 0 for each in sim.ranks):
        pid = next(iter(case.locks.values()))
        return "inconclusive" if "unknown_lock" in case.faults else "slow" if pid else "deadlock"
    return "slow" if moving and not any(c.jammed == "stall" for c in sim.channels.values()) else "stall"


def _mispaired(sim: Simulation) -> bool:
    """Whether a meeting was completed by ranks on both sides that issued different collectives."""
    for channel in sim.channels.values():
        for number, meeting in enumerate(channel.calls):
            left = set().union(*channel.left[number:])  # a rank that has left a later meeting has also left this one
            if left:
                # this rank never waited for the meeting
                left |= {rank for rank in meeting if sim.ranks[rank].state == "done"}
            sides = {
                (call._replace(op="", root=0, layer=""), 0) if call.op in ("send", "recv") else (call, step)
                for rank, (call, step) in meeting.items()
                if rank in left
            }
            if len(sides) > 1:
                return True
    return False
