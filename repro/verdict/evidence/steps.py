"""Read the steps of a rank from its witness: for each step, the declared schedule and the issued collectives."""

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
"""How many of the newest steps are compared. If ranks issued different collectives under one sequence number in an
older step, more steps are compared, back to that step."""

STEP_CONTENT = Knows.ORDER | Knows.STEPS | Knows.LAYERS
"""The aspects that a witness must record so that its steps can be compared with the declared schedules."""

Entry = tuple[str, str, str]  # (group, operation, layer)


@dataclass(frozen=True, slots=True)
class Issued:
    """One collective that a rank issued in a step.

    entry   (group, operation, layer)
    group   the group with its members
    seq     the sequence number of the collective in its group
    t_ns    when the rank issued it, in ns on the clock of its host
    site    where the program called the collective
    n       the number of the event in the rank's witness
    """

    entry: Entry
    group: GroupKey
    seq: int
    t_ns: int
    site: str
    n: int


@dataclass(slots=True)
class Step:
    """The schedule that one rank declared for one step, and the collectives that it issued in this step.

    parts     the parts of the schedule. The second part depends on the result of the step agreement, so the rank
              declares it after the agreement
    live      number of requests that the rank had when the step began
    over      whether the step has ended, because a later step began or the rank is done
    is_lost   whether the step cannot be compared, because the witness lacks the text of the schedule, or the signature
              of a collective of this step
    """

    number: int
    parts: list[tuple[Entry, ...]]
    live: int
    issued: list[Issued] = field(default_factory=list)
    over: bool = False
    is_lost: bool = False

    @property
    def plan(self) -> tuple[Entry, ...]:
        return tuple(itertools.chain.from_iterable(self.parts))


def steps_of(witness: Witness, num_steps: int = RECENT_STEPS) -> list[Step]:
    """Read the last ``num_steps`` steps of a rank.

    A step is left out if its first event is overwritten, or if the witness lacks the text of its schedule or the
    signature of one of its collectives. Return [] if the witness does not record order, steps and layers.
    """
    if STEP_CONTENT not in witness.knows:
        return []
    keys = [(group.name, group.members) for group in witness.groups]
    kinds, numbers = witness.column("kind"), witness.column("step")
    declared = [index for index, kind in enumerate(kinds) if kind == _STEP]

    def begins_step(n: int) -> bool:
        if n == 0:
            # if older events were overwritten, the oldest one may declare the second part of a step
            return witness.first_event <= 1
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
                    steps.clear()  # a new engine began in the same process, and counts its steps from 0
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
    """Return the sequence of collectives that every rank issued in every ended step with a number below ``before``.

    Each collective is (group, operation, layer). Return () if the steps do not all have the same sequence, or if a rank
    has fewer than two such steps.

    all_steps   rank -> the rank's recent steps
    """
    habits: set[tuple[Entry, ...]] = set()
    for steps in all_steps.values():
        past = [step for step in steps if step.over and step.number < before]
        if len(past) < 2:
            return ()
        habits.update(tuple(call.entry for call in step.issued) for step in past)
    return habits.pop() if len(habits) == 1 else ()


def with_plan(all_steps: Mapping[int, Iterable[Step]], plan: tuple[Entry, ...]) -> dict[int, list[Step]]:
    """Return copies of the steps of each rank as if the rank had declared the schedule ``plan`` for each step."""
    return {
        rank: [Step(step.number, [plan], step.live, step.issued, step.over) for step in steps]
        for rank, steps in all_steps.items()
    }
