"""The decisions of the engine that must be the same on several ranks, each as a small object that can be replaced.

The classes here decide correctly; `repro.lab.scenarios` has faulty ones. A policy may communicate only through its
arguments.
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
"""The step agreement C1: (own plan, layer that asks) -> the result for all ranks' plans. It takes one all-reduce."""

NewTokens = list[tuple[str, int]]
"""The (request id, token) pairs of one step of one rank."""


class StepAgreement:
    """How the ranks agree on a step.

    There is one agreement per step: later callers within the step get the same answer without a collective. A second
    collective would be joined only by the ranks that ask again, and no rank can know whether the others will.
    """

    def __init__(self) -> None:
        self._step = -1
        self._agreed: AgreedStep | None = None

    def agree(self, plan: StepPlan, exchange: Exchange, layer: str) -> AgreedStep:
        """Return the agreed step for ``plan.step``. layer: the layer that asks."""
        if self._agreed is None or plan.step != self._step:
            self._agreed = exchange(plan, layer)
            self._step = plan.step
        return self._agreed


class StateBinding:
    """How a recurrent layer gets the step's metadata when it binds its state.

    The engine calls this at the first recurrent layer of every step. The agreement from before the model ran stays
    valid, so binding state is local.
    """

    def bind(self, plan: StepPlan, agreed: AgreedStep, rebuild: Callable[[], AgreedStep]) -> AgreedStep:
        """Return the metadata with which this rank runs the step: ``agreed``, so that no collective is needed."""
        return agreed


class GraphChoice:
    """Whether a step replays a graph, and of which size.

    In C1 a rank proposes what it could run. It then runs what the ranks agreed on.
    """

    def choose(self, plan: StepPlan, agreed: AgreedStep) -> AgreedStep:
        """Return the mode and sizes with which this rank runs the step: those of ``agreed``."""
        return agreed


class Tuning:
    """How the ranks choose a tactic (a way to compute the experts).

    They use their saved choices if every rank has one. Otherwise they time the tactics together.
    """

    def tune(self, tuner: ExpertTuner) -> None:
        """Choose a tactic and use it. Called on every rank at the same point of its start."""
        chosen = self.load(tuner)
        tuner.declare((TUNING_VOTE,))
        all_have_one = tuner.vote(chosen is not None)
        if chosen is None or not all_have_one:
            tuner.declare(tuner.timings)
            chosen = tuner.time_all()
            self.save(tuner, chosen)
        tuner.use(chosen)

    def load(self, tuner: ExpertTuner) -> Chosen | None:
        """Return this rank's saved choice, or None."""
        return tuner.load(f"rank{tuner.rank}.json", tuner.key)

    def save(self, tuner: ExpertTuner, chosen: Chosen) -> None:
        """Save a choice, each rank in its own file."""
        tuner.save(f"rank{tuner.rank}.json", tuner.key, chosen)


class Compilation:
    """Which ranks compile, and when: every rank, before the first step in which other ranks would wait for it."""

    def prepare(self, compiler: Compiler) -> None:
        """Compile. The engine calls this on every rank in the phase `compile`, before a vote."""
        compiler.compile_in_turn()


class IdlePolicy:
    """What a rank without requests does in a step: it takes part, with as few rows as the kernels allow."""

    def dummy_tokens(self, unfinished: bool) -> int | None:
        """Return the number of rows of the dummy batch. 0 is allowed; None ends the serve loop.

        unfinished: whether requests will still arrive at this rank
        """
        return 1

    def run(self, execute: Callable[[], None]) -> None:
        """Run the dummy batch. An error in it fails this rank, and the others with it."""
        execute()


class Ballot:
    """What a rank reports about its configuration in the vote that ends `prepare`."""

    def digest(self, shared: str) -> int:
        """Return a 31-bit number that is equal on all ranks only if their texts are equal.

        shared: the rank's settings and kernels, as JSON
        """
        return int.from_bytes(hashlib.sha256(shared.encode()).digest()[:4], "big") >> 1


class Preemption:
    """When a rank whose cache is full preempts: before the step, so that the ranks agree on the rows that it will have.

    ``make_room`` preempts this rank's youngest requests, if necessary, until the others have their pages.
    """

    def before_step(self, make_room: Callable[[], None]) -> None:
        """Preempt requests if necessary. Called on a rank with requests, before each step is scheduled and agreed."""
        make_room()

    def run(self, step: Callable[[], NewTokens], make_room: Callable[[], None]) -> NewTokens:
        """Run the step. Returns its new tokens by request. An error in it fails this rank, and the others with it."""
        return step()


class DraftPolicy:
    """How often a rank runs the drafter after a step's forward pass.

    The drafter has experts, so its passes are collective, like the forward pass.
    """

    def num_passes(self, num_drafts: int, room: int | None) -> int:
        """Return the number of passes: ``num_drafts``, a setting of the server, on every rank, whether needed or not.

        room: largest number of drafts that a request of this rank can still use; 0 if all requests are about to end,
        None without requests
        """
        return num_drafts


@dataclass(frozen=True)
class Policies:
    """One policy of each kind. Some policies have state, so every engine needs its own set."""

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
