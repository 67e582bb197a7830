"""Explain a hang: find its cause and the culprits, or say that the evidence does not show them.

A rank is a culprit if it did one of these:

- It left the schedule that it had declared itself.
- It entered a collective while it held a lock that other ranks wait for.
- It passed a wrong size for another rank: this other rank and all remaining members agree on a different size.
- It left the repeating pattern of its own steps, while all other ranks kept their patterns and one of them waited for
  it (rhythm.py). This rule is used only if the program declares no schedule.

A rank that only differs from other ranks or from its own earlier steps is a suspect, because the other ranks can be
wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

from repro.trace.knowledge import PLAN, Knows
from repro.trace.witness.file import Witness
from repro.verdict.evidence.alignment import Deviation, inverted_before, unshared_deviations
from repro.verdict.evidence.graph import Waits
from repro.verdict.evidence.ledger import CallVariant, Ledger, calls
from repro.verdict.evidence.position import GroupKey, RankState
from repro.verdict.evidence.schedule import ScheduleDivergence, first_schedule_divergence, plans_of
from repro.verdict.evidence.sides import calls_of_sides, positions
from repro.verdict.evidence.steps import RECENT_STEPS, Step, habitual_plan, steps_of, with_plan
from repro.verdict.result import Finding, name_ranks, shorten
from repro.verdict.rules.arguments import arguments_finding
from repro.verdict.rules.deviation import deviation_finding
from repro.verdict.rules.rhythm import rhythm_finding

NOT_ENOUGH = (
    "not enough evidence to name a culprit: declare each step's schedule (Observer.begin_step), or compare the call "
    "sites of both sides"
)


def explain(
    witnesses: Mapping[int, Witness],
    rank_states: Mapping[int, RankState],
    ledger: Ledger,
    waits: Waits,
    mispaired: tuple[GroupKey, int] | None = None,
) -> Finding:
    """Find the cause of a hang, and the culprits or suspects.

    ledger      the collectives of all ranks, matched by group and sequence number
    waits       the wait-for graph
    mispaired   (group, sequence number) under which ranks completed different collectives; None if there is none. What
                a rank did after this collective cannot be the cause
    """
    lock = _lock_finding(waits, rank_states)
    if lock is not None:
        return lock
    divergence = ledger.first_divergence()
    if mispaired is None and divergence is not None:
        key, seq, _ = divergence
        left = any(rank_state.left.get(key, 0) >= seq for rank_state in rank_states.values())
        if left and ("collective", key, seq) in waits.nodes:
            # some ranks wait in this collective, so what the others did after they completed it cannot be the cause
            mispaired = key, seq
    steps = [rank_state.position.step for rank_state in rank_states.values() if rank_state.position.step >= 0]
    since = min(steps, default=0)
    if divergence is not None:
        since = min(since, *(side.call.step for side in divergence[2]))
    # A wrong pairing may have happened many steps before the hang.
    num_steps = max(RECENT_STEPS, max(steps, default=0) - since + 2)
    all_steps = {rank: steps_of(witness, num_steps) for rank, witness in witnesses.items()}

    if any(PLAN | Knows.ORDER | Knows.TIME not in witness.knows for witness in witnesses.values()):
        finding = None
        if not any(Knows.SCHEDULE in witness.knows for witness in witnesses.values()):
            awaited = {rank for node in waits.nodes.values() for rank in node.waits_for | node.cannot_return}
            finding = rhythm_finding(witnesses, awaited, mispaired)
        if finding is None and divergence is not None:
            finding = _unproven(arguments_finding(witnesses, divergence))
        return _completed(finding, divergence, rank_states, waits)
    schedule_divergence = first_schedule_divergence(witnesses, all_steps, since)
    involved = {rank for node in waits.cycle for rank in (*node.ranks, *node.waits_for)}

    def relevant(deviations: list[Deviation]) -> list[Deviation]:
        in_time = [d for d in deviations if schedule_divergence is None or schedule_divergence.comes_after(d)]
        related = [d for d in in_time if not involved or involved & {d.rank, *d.concerned}]
        return _until(mispaired, related, witnesses)

    fresh, habitual = map(relevant, unshared_deviations(witnesses, all_steps, since))
    finding = deviation_finding(fresh, rank_states, all_steps) or _plan_finding(
        witnesses, all_steps, schedule_divergence
    )
    if finding is not None and finding.cause == "order" and (ranks := inverted_before(fresh, witnesses, all_steps)):
        finding.evidence.append(f"in earlier steps {name_ranks(ranks)} issued both collectives in that order")
    finding = (
        finding
        or deviation_finding(habitual, rank_states, all_steps)
        or _habit_finding(witnesses, all_steps, since, rank_states)
    )
    if finding is None and divergence is not None:
        finding = arguments_finding(witnesses, divergence)
    return _completed(finding, divergence, rank_states, waits)


def _completed(
    finding: Finding | None,
    divergence: tuple[GroupKey, int, list[CallVariant]] | None,
    rank_states: Mapping[int, RankState],
    waits: Waits,
) -> Finding:
    """Add the first divergence to a finding that has none. To an undecided finding, add how to get more evidence.

    finding      None counts as a finding without a cause
    divergence   (group, sequence number, the different calls); if it is None, the ranks of the cycle of waits and their
                 positions become the first divergence
    """
    if finding is None:
        finding = Finding(confidence="undecided")
    if finding.confidence == "undecided":
        finding.evidence.append(NOT_ENOUGH)
    if finding.first_divergence is None:
        finding.first_divergence = calls_of_sides(divergence) if divergence else positions(waits.cycle, rank_states)
    return finding


def _unproven(finding: Finding | None) -> Finding | None:
    """Turn the culprits of a finding into suspects, because the witnesses possibly do not show the true cause."""
    if finding is not None and finding.culprits:
        finding.suspects, finding.culprits = tuple(sorted({*finding.suspects, *finding.culprits})), ()
        finding.confidence = "undecided"
    return finding


def _until(
    meeting: tuple[GroupKey, int] | None, deviations: list[Deviation], witnesses: Mapping[int, Witness]
) -> list[Deviation]:
    """Return the deviations that ranks made before they issued the collective ``meeting``, or by issuing it.

    A deviation is a place where a rank left its declared schedule. Only times of the same rank are compared. Deviations
    of ranks that did not issue ``meeting`` are left out. A deviation at which the rank issued no collective has no
    time, and is returned.

    meeting   (group, sequence number) of the collective; if it is None, return all deviations
    """
    if meeting is None:
        return deviations
    issued_ns = {
        rank: row.t_ns
        for rank in meeting[0][1]
        if rank in witnesses
        for _, _, row, _ in calls(witnesses[rank], *meeting)
    }
    members = [d for d in deviations if d.rank in issued_ns]
    return [d for d in members if d.issued is None or d.issued.t_ns <= issued_ns[d.rank]]


def _lock_finding(waits: Waits, rank_states: Mapping[int, RankState]) -> Finding | None:
    """Name the ranks that hold a lock of the cycle of waits, and wait themselves; None if the cycle has no lock.

    If two ranks recorded that they hold the same lock, the named ranks are only suspects.
    """
    locks = [node for node in waits.cycle if node.key[0] == "lock"]
    if not locks:
        return None
    holders = sorted((rank, node.name) for node in locks for rank in node.waits_for if rank in waits.at)
    ranks = tuple(sorted({rank for rank, _ in holders}))
    finding = Finding("lock", ranks)
    if any(len(node.waits_for) > 1 for node in locks):
        finding = Finding("lock", suspects=ranks, confidence="undecided")
    finding.evidence += shorten([f"rank {rank} holds {lock} and {_waits(rank_states[rank])}" for rank, lock in holders])
    finding.first_divergence = positions(waits.cycle, rank_states)
    return finding


def _waits(rank_state: RankState) -> str:
    return rank_state.position.words().replace("wait", "waits", 1)


def _plan_finding(
    witnesses: Mapping[int, Witness],
    all_steps: Mapping[int, list[Step]],
    schedule_divergence: ScheduleDivergence | None,
) -> Finding | None:
    """Explain a hang by members of a group that declared different schedules for the same step.

    If some ranks changed a schedule that had been the same on all members, these ranks are the suspects. Otherwise the
    ranks with the rarest schedule are the suspects, if they are fewer than half of the members. Return None if
    ``schedule_divergence`` is None.
    """
    if schedule_divergence is None:
        return None
    number, key, sides = schedule_divergence.step, schedule_divergence.group, schedule_divergence.sides
    declared = sorted(plans_of(key, witnesses, all_steps).items())
    before = [set(plans) for (step, part), plans in declared if step < number and part == schedule_divergence.part]
    usual = before[-1] if len(before) >= 2 and len(before[-1]) == 1 and before[-1] == before[-2] else set()
    suspects = sorted(rank for plan, ranks in sides.items() if plan not in usual for rank in ranks)
    same_entries = len({tuple(sorted(plan)) for plan in sides}) == 1
    named = ", ".join(f"{name_ranks(ranks)}: {len(plan)} entries" for plan, ranks in sides.items())
    finding = Finding("order" if same_entries else "mismatch", confidence="undecided")
    finding.evidence.append(f"the schedules that members of {key[0]} declared for step {number} differ ({named})")
    if usual & set(sides):
        finding.suspects = tuple(suspects)
        finding.evidence.append(f"{name_ranks(suspects)} changed a schedule that had been the same on all members")
    elif len(minority := min(sides.values(), key=len)) * 2 < sum(map(len, sides.values())):
        finding.suspects = tuple(minority)
        finding.evidence.append(
            f"{name_ranks(minority)} declared another schedule than most members; the witnesses do not show which is "
            "right"
        )
    return finding


def _habit_finding(
    witnesses: Mapping[int, Witness],
    all_steps: Mapping[int, list[Step]],
    since: int,
    rank_states: Mapping[int, RankState],
) -> Finding | None:
    """Explain a hang of a program that declares no schedule: compare each rank with the earlier steps of all ranks.

    If all ranks issued the same collectives in the same order in every step before step ``since``, the ranks that
    deviate from this order in a later step are suspects. Otherwise return None.
    """
    plan = habitual_plan(all_steps, since)
    if not plan or any(step.plan for steps in all_steps.values() for step in steps):
        return None
    planned = with_plan(all_steps, plan)
    finding = deviation_finding(unshared_deviations(witnesses, planned, since)[0], rank_states, planned)
    if finding is not None:
        finding.culprits, finding.suspects, finding.confidence = (), finding.culprits, "undecided"
        finding.evidence.append(
            "no schedule was declared: the comparison is with what all ranks issued in every earlier step"
        )
    return finding
