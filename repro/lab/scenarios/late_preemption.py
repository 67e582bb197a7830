"""A rank finds in the middle of a step that its cache is full, preempts a request, and begins another step.

No upstream report describes exactly this. But in some reports the free cache pages of a rank decide which collectives
this rank issues:

- TensorRT-LLM pull request 14020: ranks whose free blocks differ by one take part in different collectives.
- sglang issue 30760: a loop contains a collective, and the free pages of a rank decide when this rank leaves the loop.
- TensorRT-LLM pull request 9659: rank A cannot run the batch that rank B scheduled, because the cache of A is full.

Here a rank takes the pages of a step when the model needs them, which is after the ranks have agreed on the step. If no
page is free, the rank preempts a request, begins another step, and waits in the agreement of this next step. The other
ranks expect the rows of this rank, and wait for it in the first dispatch of the old step.

The fix: before the agreement, a rank counts the pages that the step needs, and preempts a request if necessary. Then a
preemption only makes the rank's number of rows smaller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from hybrid_moe_ref.config import EngineConfig
from hybrid_moe_ref.engine.policies import NewTokens, Policies, Preemption
from hybrid_moe_ref.engine.server_config import ServerConfig
from hybrid_moe_ref.engine.serving.scheduler import Scheduler
from hybrid_moe_ref.engine.step.protocol import protocol_of
from repro.lab.scenarios import CLEAN, Expected, Scenario
from repro.lab.settings import RunSettings

FIRST_DISPATCH = "ep all_gather_v of layers.0.moe"


class PreemptInTheStep(Preemption):
    """The fault: a rank takes pages when the model needs them. So it notices a full cache in the middle of a step."""

    def before_step(self, make_room: Callable[[], None]) -> None:
        """Do nothing, instead of calling ``make_room``, which preempts requests. So a step can need too many pages."""

    def run(self, step: Callable[[], NewTokens], make_room: Callable[[], None]) -> NewTokens:
        from hybrid_moe_ref.cache.hybrid_cache import CacheExhausted

        try:
            return step()
        except CacheExhausted:
            make_room()
            return []


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    In the fault, a rank whose cache is full preempts a request within the step; in control and fix, before the step.
    """
    return Policies(preemption=PreemptInTheStep()) if settings.variant == "fault" else Policies()


def pressed(settings: RunSettings) -> EngineConfig:
    """Return the engine configuration with the trigger: a cache with pages for only two new requests.

    If two requests run, and one of them grows beyond a page of tokens, it needs a further page, but no page is free.
    """
    pages = settings.page_layout()
    return dataclasses.replace(settings.engine, num_pages=2 * pages.pages_for(pages.tokens))


def server(settings: RunSettings, rank: int) -> ServerConfig:
    """Return the server's configuration.

    In the control, the cache is never full. In fault and fix, the cache becomes full on some ranks.
    """
    config = settings.server()
    return config if settings.variant == "control" else dataclasses.replace(config, engine=pressed(settings))


def hang(settings: RunSettings) -> Expected:
    """Predict a deadlock in the first step in which some ranks, but not all, have no free page."""
    engine = pressed(settings)
    pages_for = settings.page_layout().pages_for
    schedulers = [Scheduler(requests, engine, pages_for) for requests in settings.requests()]
    serve_step = 0
    while any(scheduler.unfinished for scheduler in schedulers):
        for scheduler in schedulers:
            scheduler.schedule(serve_step)
        short = tuple(rank for rank, scheduler in enumerate(schedulers) if scheduler.num_free_pages < 0)
        if 0 < len(short) < settings.num_ranks:
            # Step 0 is the profile run, so serve step i is step i + 1. If the step ends with the all-reduce that asks
            # for unfinished work, the culprits wait there; otherwise they wait in the agreement of the next step.
            asks = protocol_of(engine).asks(serve_step + 1)
            step, layer = (serve_step + 1, "unfinished") if asks else (serve_step + 2, "step")
            return Expected("deadlock", "skipped", short, step, layer, planned=FIRST_DISPATCH)
        for scheduler in schedulers:
            scheduler.make_room() if short else scheduler.pretend()
        serve_step += 1
    return CLEAN


SCENARIO = Scenario(
    name="late_preemption",
    summary="a rank whose cache is full preempts a request in the middle of a step, and leaves the step",
    source="generic; TensorRT-LLM#14020, sglang#30760, TensorRT-LLM#9659",
    policies=policies,
    hang=hang,
    server=server,
    defaults={
        # With 8 heads of keys and values a page holds 16 tokens, and requests need more than one page while they run.
        "model": {"num_key_value_heads": 8},
        "workload": {"max_prompt_tokens": 14, "max_new_tokens": 16, "max_arrival_step": 2},
    },
)
