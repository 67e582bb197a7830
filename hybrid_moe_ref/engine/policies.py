"""The decisions of the engine that must be the same on several ranks, each as a small object that can be replaced.

The classes here decide correctly; `repro.lab.scenarios` has faulty ones. A policy is allowed to communicate with other
ranks only through the functions and objects that its methods get as arguments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hybrid_moe_ref.engine.startup.builds import KernelBuilds
from hybrid_moe_ref.engine.step.plan import TUNING_VOTE, AgreedStep, StepPlan
from hybrid_moe_ref.parallel.sharding.dispatch import AllGatherReduceScatter, SumOverRanks

if TYPE_CHECKING:
    from hybrid_moe_ref.engine.startup.autotune import Chosen, ExpertTuner
    from hybrid_moe_ref.engine.startup.compilation import Compiler

Exchange = Callable[[StepPlan, str], AgreedStep]
"""A function that makes the step agreement C1, by one all-reduce.

Its arguments are this rank's plan and the name of the layer that needs the agreement. Its result is the same on all
ranks."""

NewTokens = list[tuple[str, int]]
"""The (request id, token) pairs of one step of one rank."""


class StepAgreement:
    """Lets the ranks agree on a step, by one collective per step.

    Only the first call of `agree` in a step issues the collective; later calls return the same answer. A rank does not
    know whether the other ranks also make a second call. So if a second call issued a collective, the rank could wait
    in it for ever.
    """

    def __init__(self) -> None:
        self._step = -1
        self._agreed: AgreedStep | None = None

    def agree(self, plan: StepPlan, exchange: Exchange, layer: str) -> AgreedStep:
        """Return the result of the step agreement for ``plan.step``. Only the first call for a step calls `exchange`.

        exchange   a function that issues the all-reduce of the agreement and returns the result
        layer      the name of the layer that needs the result, for the event of the all-reduce
        """
        if self._agreed is None or plan.step != self._step:
            self._agreed = exchange(plan, layer)
            self._step = plan.step
        return self._agreed


class StateBinding:
    """Chooses the sizes (an `AgreedStep`) that a rank uses from the first recurrent layer of a step on.

    At this layer vLLM connects ("binds") the recurrent states to the requests. The ranks agreed on the sizes before the
    model ran, and these sizes are still valid. So binding needs no collective.
    """

    def bind(self, plan: StepPlan, agreed: AgreedStep, rebuild: Callable[[], AgreedStep]) -> AgreedStep:
        """Return the agreed step whose sizes this rank uses from now on. This class returns ``agreed``.

        plan: this rank's proposal for the step
        agreed: the result of the agreement at the beginning of the step
        rebuild: asks the policy `agreement` again, and returns its answer; this class does not call it
        """
        return agreed


class GraphChoice:
    """Decides whether a step replays a graph, and of which size.

    In C1 each rank proposes the mode that it could run. Every rank then runs the mode on which the ranks agreed.
    """

    def choose(self, plan: StepPlan, agreed: AgreedStep) -> AgreedStep:
        """Return the mode and sizes with which this rank runs the step. This class returns ``agreed``.

        plan: this rank's proposal for the step; agreed: the result of the step agreement
        """
        return agreed


class Tuning:
    """Lets the ranks choose, for each number of rows, a tactic (a way to compute the experts).

    If every rank has a choice that an earlier start saved, the ranks use these choices. Otherwise all ranks time the
    tactics.
    """

    def tune(self, tuner: ExpertTuner) -> None:
        """Choose the tactics (ways to compute the experts), and use them from now on.

        Every rank calls this in the phase `profile`, before its first step.

        tuner: has a method for each part of this work: vote, time the tactics; load, save and use a choice, which is a
        tactic for each number of rows
        """
        chosen = self.load(tuner)
        tuner.declare((TUNING_VOTE,))
        all_have_one = tuner.vote(chosen is not None)
        if chosen is None or not all_have_one:
            tuner.declare(tuner.timings)
            chosen = tuner.time_all()
            self.save(tuner, chosen)
        tuner.use(chosen)

    def load(self, tuner: ExpertTuner) -> Chosen | None:
        """Return this rank's saved choice; None if no usable choice was saved.

        A choice is a tactic (way to compute the experts) for each number of rows. tuner: reads the file
        """
        return tuner.load(f"rank{tuner.rank}.json", tuner.key)

    def save(self, tuner: ExpertTuner, chosen: Chosen) -> None:
        """Save this rank's choice in a file of its own.

        tuner: writes the file; chosen: a tactic (way to compute the experts) for each number of rows
        """
        tuner.save(f"rank{tuner.rank}.json", tuner.key, chosen)


class Compilation:
    """Decides which ranks run torch.compile, and when.

    This class makes all ranks compile in the phase `compile`. So no rank makes other ranks wait in a step because it
    compiles.
    """

    def prepare(self, compiler: Compiler) -> None:
        """Let ``compiler`` compile this rank's modules. Every rank calls this in the phase `compile`, before a vote."""
        compiler.compile_in_turn()


class IdlePolicy:
    """Decides what a rank without requests does in a step. This class makes it run a dummy batch of one row."""

    def dummy_tokens(self, unfinished: bool) -> int | None:
        """Return the number of rows of the dummy batch, which can be 0. This class returns 1.

        A faulty policy can return None: then the rank leaves its serve loop, while the other ranks continue.

        unfinished: whether requests will still arrive at this rank
        """
        return 1

    def run(self, execute: Callable[[], None]) -> None:
        """Run the dummy batch by calling `execute`.

        If `execute` raises an error, this rank fails, and the engine stops the other ranks (except with
        checks="observe").
        """
        execute()


class Ballot:
    """What a rank reports about its configuration in each vote of a start (`StartVote`)."""

    def digest(self, shared: str) -> int:
        """Return a 31-bit hash of `shared`. If the hashes of the ranks differ, the vote stops all ranks.

        shared: the rank's settings and kernels, as JSON
        """
        return int.from_bytes(hashlib.sha256(shared.encode()).digest()[:4], "big") >> 1


class Preemption:
    """Decides when a rank whose cache is full preempts requests.

    This class preempts before the step, so that the number of rows does not change after the ranks have agreed on it.

    Both methods get a function `make_room`. If the cache has too few pages for the next step, it preempts this rank's
    youngest requests until the other requests have enough pages.
    """

    def before_step(self, make_room: Callable[[], None]) -> None:
        """Preempt requests if necessary. Every rank calls this before it schedules a step and agrees on it."""
        make_room()

    def run(self, step: Callable[[], NewTokens], make_room: Callable[[], None]) -> NewTokens:
        """Run the step of a rank with requests. Returns (request id, new token) pairs.

        If the step raises an error, this rank fails, and the engine stops the other ranks (except with
        checks="observe").

        make_room: preempts requests; this class does not call it in this method
        """
        return step()


class DraftPolicy:
    """Decides how often a rank runs the drafter after the forward pass of a step.

    The drafter (the MTP layer, which proposes tokens) has experts, so all ranks must run its passes together.
    """

    def num_passes(self, num_drafts: int, room: int | None) -> int:
        """Return the number of passes of the drafter. This class returns ``num_drafts``, a setting of the server.

        So all ranks run equally many passes, even if some ranks do not need the drafts.

        room: largest number of drafts that a request of this rank can still use; 0 if all requests are about to end,
        None if the rank has no requests
        """
        return num_drafts


@dataclass(frozen=True)
class Policies:
    """The objects that decide for an engine, one for each kind of decision; a scenario replaces one by a faulty object.

    Some of them have state, so every engine needs its own `Policies`.

    dispatch  the class that issues C2 and C3 in each MoE layer
    adder     the class that sums the output of a module over the tp group
    """

    agreement: StepAgreement = field(default_factory=StepAgreement)
    binding: StateBinding = field(default_factory=StateBinding)
    graphs: GraphChoice = field(default_factory=GraphChoice)
    idle: IdlePolicy = field(default_factory=IdlePolicy)
    ballot: Ballot = field(default_factory=Ballot)
    builds: KernelBuilds = field(default_factory=KernelBuilds)
    preemption: Preemption = field(default_factory=Preemption)
    drafts: DraftPolicy = field(default_factory=DraftPolicy)
    compilation: Compilation = field(default_factory=Compilation)
    tuning: Tuning = field(default_factory=Tuning)
    dispatch: type[AllGatherReduceScatter] = AllGatherReduceScatter
    adder: type[SumOverRanks] = SumOverRanks
