"""One tensor-parallel rank receives another request than the others: wrong tokens, and no collective that differs.

Upstream: SGLang issue 27221, where each tp rank ran its own scheduler and dropped timed-out requests by its own clock,
so the ranks of one tp group ran different batches. The ranks of a tp group hold parts of the same layers, so a sum over
these ranks is correct only if all of them process the same tokens. If the batch of one rank has a different size, the
first all-reduce has a size mismatch; this caused the hang upstream. If all batches have the same size, nothing hangs or
crashes: the ranks sum parts of different sequences and serve wrong tokens. This scenario is the second case, which no
timeout and no comparison of collectives can detect. The first request of one rank has a different prompt of the same
length.

The fix: in the step agreement, the ranks of a tp group also compare a hash of the requests and tokens that each rank is
about to run. A server cannot know which rank is right. So if the hashes differ, all ranks stop with an error that names
the ranks that differ.
"""

from __future__ import annotations

import dataclasses

from hybrid_moe_ref.engine.policies import Policies
from hybrid_moe_ref.engine.serving.scheduler import Request
from repro.lab.scenarios import REFUSED, Expected, Scenario, struck_rank
from repro.lab.settings import RunSettings


def requests(settings: RunSettings, rank: int) -> list[Request]:
    """Return the requests of a rank.

    In fault and fix, the first prompt of one rank begins with a different token than on the other ranks.
    """
    own = settings.requests()[rank]
    if settings.variant == "control" or rank != struck_rank(settings):
        return own
    first, *rest = own
    token = (first.prompt[0] + 1) % settings.model.vocab_size
    return [dataclasses.replace(first, prompt=(token, *first.prompt[1:])), *rest]


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the engine's own policies (the objects that decide for it), in all variants.

    The variants differ by the requests of one rank (:func:`requests`), and by the setting `checks`, which decides
    whether the ranks compare their requests.
    """
    return Policies()


def hang(settings: RunSettings) -> Expected:
    """Predict the verdict `corrupt` without a culprit: the tokens are wrong, but all ranks issue equal collectives."""
    return Expected("corrupt", culprits=())


SCENARIO = Scenario(
    name="tp_requests",
    summary="one tp rank receives another prompt than the others: wrong tokens, and no collective that differs",
    source="sglang#27221",
    policies=policies,
    hang=hang,
    fixed=lambda settings: REFUSED,
    requests=requests,
    # All ranks share the tokens. The model's heads and groups are divided over 8 ranks, as in silent_pairing.
    defaults={
        "tp_size": 8,
        "model": {
            "linear_num_key_heads": 8, "linear_num_value_heads": 8, "linear_key_head_dim": 16,
            "linear_value_head_dim": 16, "mamba_num_groups": 8, "mamba_state_size": 8,
        },
        "engine": {"unfinished_interval": 16},
    },
)  # fmt: skip
