"""The decisions of the engine that several ranks must take alike, each a small object that can be swapped.

These are the right ones. A policy may communicate only through what it is handed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hybrid_moe_ref.engine.builds import KernelBuilds
from hybrid_moe_ref.engine.plan import TUNING_VOTE, AgreedStep, StepPlan
from hybrid_moe_ref.engine.server_config import ServerConfig
from hybrid_moe_ref.parallel.dispatch import AllGatherReduceScatter, SumOverRanks

if TYPE_CHECKING:
    from hybrid_moe_ref.engine.autotune import Chosen, ExpertTuner
    from hybrid_moe_ref.engine.compilation import Compiler

Exchange = Callable[[StepPlan, str], AgreedStep]
"""C1 itself: (own plan, layer that asks) -> what the plans of all ranks come to. One all-reduce."""

NewTokens = list[tuple[str, int]]
"""(request id, token) of one step of one rank."""


class StepAgreement:
    """How the ranks agree on a step.

    One agreement per step: later callers within the step get the same answer without a collective. Only ranks that
    happen to ask would join a second one, and no rank can know whether the others will.
    """

    def __init__(self) -> None:
        self._step = -1
        self._agreed: AgreedStep | None = None

    def agree(self, plan: StepPlan, exchange: Exchange, layer: str) -> AgreedStep:
        """What all ranks do in ``plan.step``; ``layer`` says who asks."""
        if self._agreed is None or plan.step != self._step:
            self._agreed = exchange(plan, layer)
            self._step = plan.step
        return self._agreed


class StateBinding:
    """How a recurrent layer comes by the step's metadata when it binds its state.

    The engine asks at the first recurrent layer of every step. What the step agreed on before the model ran
    stands; binding state is local.
    """

    def bind(self, plan: StepPlan, agreed: AgreedStep, rebuild: Callable[[], AgreedStep]) -> AgreedStep:
        """The metadata to run with: ``agreed``. ``rebuild`` would ask the step's agreement once more."""
        return agreed


class GraphChoice:
    """Whether a step replays a graph, and of which size.

    What a rank could run is a wish, which C1 carries. What the ranks agreed on is what each of them runs.
    """

    def choose(self, plan: StepPlan, agreed: AgreedStep) -> AgreedStep:
        """The step as this rank runs it: ``agreed``."""
        return agreed


class Tuning:
    """How the ranks come by a choice of kernels: by what every one of them remembers, else they measure together."""

    def tune(self, tuner: ExpertTuner) -> None:
        """Choose, and put the choice to use; called on every rank at the same point of its start."""
        chosen = self.load(tuner)
        tuner.declare((TUNING_VOTE,))
        everyone_remembers = tuner.vote(chosen is not None)
        if chosen is None or not everyone_remembers:
            tuner.declare(tuner.timings)
            chosen = tuner.time_all()
            self.save(tuner, chosen)
        tuner.use(chosen)

    def load(self, tuner: ExpertTuner) -> Chosen | None:
        """What this rank remembers."""
        return tuner.load(f"rank{tuner.rank}.json", tuner.key)

    def save(self, tuner: ExpertTuner, chosen: Chosen) -> None:
        """Remember a choice, each rank in a file of its own."""
        tuner.save(f"rank{tuner.rank}.json", tuner.key, chosen)


class Compilation:
    """Who compiles, and when: every rank, before the step in which others would wait for it."""

    def prepare(self, compiler: Compiler) -> None:
        """Called on every rank in the phase `compile`, which ends in a vote."""
        compiler.compile_in_turn()


class IdlePolicy:
    """What a rank with nothing to run does in a step: it takes part, with as few rows as the kernels allow."""

    def dummy_tokens(self, unfinished: bool) -> int | None:
        """Rows of its dummy batch; 0 is legal, None leaves the loop. ``unfinished``: requests are still to arrive."""
        return 1

    def run(self, execute: Callable[[], None]) -> None:
        """Run the dummy batch. An error in it fails this rank, and the others with it."""
        execute()


class Ballot:
    """What a rank says of itself in the vote that ends `prepare`."""

    def digest(self, config: ServerConfig) -> int:
        """A number that is equal on all ranks only when they were started with the same configuration."""
        return config.digest()


class Preemption:
    """When a rank whose cache is full makes room: before the step, so that what it brings is what the ranks agree on.

    ``make_room`` preempts this rank's youngest requests, if need be, until the others have their pages.
    """

    def before_step(self, make_room: Callable[[], None]) -> None:
        """Called on a rank with requests before each step is scheduled, and so before its agreement."""
        make_room()

    def run(self, step: Callable[[], NewTokens], make_room: Callable[[], None]) -> NewTokens:
        """Run the step; returns its new tokens by request. An error in it fails this rank, and the others with it."""
        return step()


class DraftPolicy:
    """How often a rank runs the drafter after a step's forward pass. The drafter has experts, so its passes are
    collective like the step's own."""

    def num_passes(self, num_drafts: int, room: int | None) -> int:
        """As many on every rank, needed or not: ``num_drafts``, which is the server's setting. ``room`` is how many
        drafts could still serve a request of this rank, 0 when all are about to end, None when it has none."""
        return num_drafts


@dataclass(frozen=True)
class Policies:
    """One of each. Stateful ones belong to one engine, so make a new set for every engine."""

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
