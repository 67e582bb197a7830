"""The steps of a rank: what it declared for each, and what it issued."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from repro.trace.knowledge import Knows
from repro.trace.witness.file import Witness
from repro.trace.witness.format import Kind
from repro.verdict.evidence.ledger import is_transfer
from repro.verdict.evidence.position import GroupKey

_PHASE, _STEP = int(Kind.PHASE), int(Kind.STEP)
RECENT_STEPS = 10
"""Number of steps of a rank that are compared, unless the divergence in question is older."""

STEP_CONTENT = Knows.ORDER | Knows.STEPS | Knows.LAYERS
"""What a trace has to show for its steps to be compared."""

Entry = tuple[str, str, str]  # (group, operation, layer)


@dataclass(frozen=True, slots=True)
class Issued:
    """One collective of a step."""

    entry: Entry
    group: GroupKey
    seq: int
    t_ns: int
    site: str
    n: int  # number of the event


@dataclass(slots=True)
class Step:
    """What one rank planned and issued in one step."""

    number: int
    # the declared parts; the second part is declared after the step agreement, because it depends on the result
    parts: list[tuple[Entry, ...]]
    live: int
    issued: list[Issued] = field(default_factory=list)
    over: bool = False  # a later step began or the rank is done, so no further entry will follow
    is_lost: bool = False  # a name in it was not stored, so that it cannot be compared

    @property
    def plan(self) -> tuple[Entry, ...]:
        return tuple(itertools.chain.from_iterable(self.parts))


def steps_of(witness: Witness, num_steps: int = RECENT_STEPS) -> list[Step]:
    """Read the last steps of a rank.

    Steps whose beginning the ring has overwritten, or with names not stored, are left out.
    """
    if STEP_CONTENT not in witness.knows:
        return []
    keys = [(group.name, group.members) for group in witness.groups]
    kinds, numbers = witness.column("kind"), witness.column("step")
    declared = [index for index, kind in enumerate(kinds) if kind == _STEP]

    def begins_step(n: int) -> bool:
        if n == 0:
            return (
                witness.first_event <= 1
            )  # after the ring has wrapped, the first event may declare the second part of a step
        return kinds[n - 1] == _PHASE or numbers[n - 1] != numbers[n]

    begins = [n for n in declared if begins_step(n)][-num_steps:]
    steps: list[Step] = []
    within, num_strings = False, len(witness.strings)
    for event in witness.events(len(kinds) - begins[0]) if begins else ():
        match event.kind:
            case Kind.STEP:
                plan = witness.schedule(event.sig) if Knows.SCHEDULE in witness.knows else ()
                within, is_lost = True, event.sig >= num_strings
                if steps and steps[-1].number == event.step and not steps[-1].over:
                    steps[-1].parts.append(plan)
                    steps[-1].is_lost |= is_lost
                    continue
                if steps and steps[-1].number >= event.step:
                    steps.clear()  # another engine began, and counts its steps from 0
                elif steps:
                    steps[-1].over = True
                steps.append(Step(event.step, [plan], event.aux, is_lost=is_lost))
            case Kind.PHASE | Kind.DONE:  # the events that follow belong to no step
                within = False
                if steps:
                    steps[-1].over = True
            case Kind.ENTER | Kind.ISSUE if within:
                steps[-1].is_lost |= event.sig >= num_strings
                signature = witness.signature(event.sig)
                name = signature.group.split(":")[0] if is_transfer(signature) else signature.group
                key = keys[event.group] if event.group < len(keys) else (signature.group, ())
                entry = (name, signature.op, signature.layer)
                steps[-1].issued.append(Issued(entry, key, event.seq, event.t_ns, witness.text(event.site), event.n))
    return [step for step in steps if not step.is_lost]


def habitual_plan(all_steps: Mapping[int, list[Step]], before: int) -> tuple[Entry, ...]:
    """Return the collectives that every rank issued in every step before ``before``; () if these steps differ."""
    habits: set[tuple[Entry, ...]] = set()
    for steps in all_steps.values():
        past = [step for step in steps if step.over and step.number < before]
        if len(past) < 2:
            return ()
        habits.update(tuple(call.entry for call in step.issued) for step in past)
    return habits.pop() if len(habits) == 1 else ()


def with_plan(all_steps: Mapping[int, Iterable[Step]], plan: tuple[Entry, ...]) -> dict[int, list[Step]]:
    """Return copies of the steps in which each rank has declared ``plan``."""
    return {
        rank: [Step(step.number, [plan], step.live, step.issued, step.over) for step in steps]
        for rank, steps in all_steps.items()
    }
