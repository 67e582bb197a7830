"""One tensor-parallel rank is given other requests than its peers, which run the same layers for them.

Mirrors SGLang issue 27221: each tp rank ran its own scheduler and dropped timed-out requests by its own clock, so the
ranks of one tp group ran different batches. The ranks of a tp group hold parts of the same layers, and every sum over
them is meaningful only if all of them feed the same tokens. What follows depends on the shapes. A batch of another
size is a size mismatch in the first all-reduce: that was the hang upstream. A batch of the same size hangs nothing and
crashes nothing: every rank adds up parts of different sequences and serves wrong tokens. This scenario shows the
second case, because no timeout and no comparison of collectives can see it.

Here the front end of one rank delivers its first request with another prompt of the same length.

The cure: the step's agreement covers the ranks of a tp group, with a hash of the requests and tokens that each is about
to run. A server cannot know which rank has the right ones, so all ranks stop and name both sides.
"""

from __future__ import annotations

import dataclasses

from hybrid_moe_ref.engine.policies import Policies
from hybrid_moe_ref.engine.scheduler import Request
from repro.lab.scenarios import REFUSED, Expected, Scenario, struck_rank
from repro.lab.settings import RunSettings


def requests(settings: RunSettings, rank: int) -> list[Request]:
    """fault and fix: the first prompt of one rank begins with another token than on the ranks of its tp group."""
    own = settings.requests()[rank]
    if settings.variant == "control" or rank != struck_rank(settings):
        return own
    first, *rest = own
    token = (first.prompt[0] + 1) % settings.model.vocab_size
    return [dataclasses.replace(first, prompt=(token, *first.prompt[1:])), *rest]


def policies(settings: RunSettings, rank: int) -> Policies:
    """The engine's own in every variant: what differs is what reaches the rank, and whether the ranks compare it."""
    return Policies()


def hang(settings: RunSettings) -> Expected:
    """Wrong tokens, and nothing in the collectives to name a rank by."""
    return Expected("corrupt", culprits=())


SCENARIO = Scenario(
    name="tp_requests",
    summary="one tp rank is given another prompt than its peers: wrong tokens, and no collective that differs",
    source="sglang#27221",
    policies=policies,
    hang=hang,
    fixed=lambda settings: REFUSED,
    requests=requests,
    # All ranks share the tokens. The heads and groups of the model divide over 8 ranks as in silent_pairing.
    defaults={
        "tp_size": 8,
        "model": {
            "linear_num_key_heads": 8, "linear_num_value_heads": 8, "linear_key_head_dim": 16,
            "linear_value_head_dim": 16, "mamba_num_groups": 8, "mamba_state_size": 8,
        },
        "engine": {"unfinished_interval": 16},
    },
)  # fmt: skip
