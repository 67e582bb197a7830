"""Accept those drafts that the model itself would choose, and undo the step of a request with a rejected draft.

A recurrent state cannot be truncated to the last accepted draft. After a rejected draft the request's state returns to
the start of the step, and the next step runs the accepted tokens again, without new drafts. So a rejected draft costs
rows of the next step. A rejected draft never costs an additional step, in which the other ranks would not take part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from hybrid_moe_ref.cache.hybrid_cache import Sequence, Snapshot
from hybrid_moe_ref.engine.serving.scheduler import Running


@dataclass(frozen=True, eq=False)
class Verification:
    """Verifies the drafts of one step, and undoes the step for a request with a rejected draft.

    running    the requests of the step
    sequences  the cached sequence of each request
    before     a snapshot of each sequence before the step; None for a request without drafts
    """

    running: list[Running]
    sequences: list[Sequence]
    before: list[Snapshot | None]

    @classmethod
    def begin(cls, running: list[Running], sequences: list[Sequence]) -> Self:
        """Call this before the step runs. Saves a snapshot of each request with drafts, to undo rejected drafts later.

        running, sequences: the requests of the step, and the cached sequence of each
        """
        before = [
            sequence.cache.snapshot(sequence) if request.drafts else None
            for request, sequence in zip(running, sequences, strict=True)
        ]
        return cls(running, sequences, before)

    @property
    def counts(self) -> list[int]:
        """Return, for each request, the number of its rows after which the model chooses a token.

        These are the row of the last known token and the rows of the drafts. A request that still has pending tokens
        after this step has no such row.
        """
        return [1 + len(running.drafts) if running.makes_tokens else 0 for running in self.running]

    def new_tokens(self, chosen: list[list[int]]) -> list[list[int]]:
        """Return, for each request, its accepted drafts and the model's next token after these drafts.

        The result is [] for a request that still has pending tokens after this step. For a request with a rejected
        draft, this method sets the cache back to its state before the step.

        chosen: for each request, the model's choices after the rows that `counts` describes
        """
        new = []
        for running, sequence, before, choices in zip(self.running, self.sequences, self.before, chosen, strict=True):
            num_right = next((i for i, draft in enumerate(running.drafts) if draft != choices[i]), len(running.drafts))
            if num_right < len(running.drafts):
                assert before is not None
                sequence.cache.restore(sequence, before)
            new.append(choices[: num_right + 1])
        return new
