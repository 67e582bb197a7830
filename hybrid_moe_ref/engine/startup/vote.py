"""The vote that ends a phase of local work: all ranks continue, or all stop with the same error.

The vote of the phase `prepare` is the first collective of a server. Without a vote, the other ranks would wait in a
step for a rank that failed in its local work. And ranks with different configurations would issue different
collectives.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from hybrid_moe_kernels import registry

from hybrid_moe_ref.engine.policies import Ballot
from hybrid_moe_ref.engine.server_config import ServerConfig, configuration_differences
from hybrid_moe_ref.engine.startup.builds import DEADLINE_S
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.halt import ScheduleMismatch

ERROR_BYTES = 512
"""Every rank gets this many bytes of the first error's text."""

NO_RANK = 2**31 - 1
"""The number that a rank without an error contributes to the vote, in place of its rank."""

COULD_NOT_PREPARE = "could not prepare"
CONFIGURED_DIFFERENTLY = "the ranks are configured differently"
SAME_CONFIGURATION = "start every rank with the same configuration"


class PrepareFailed(RuntimeError):
    """A rank could not prepare, or the ranks' configurations differ. Raised on every rank with the same message."""


class StartVote:
    """Does the local work of one rank, and then votes: have all ranks succeeded, with the same settings and kernels?

    If not, every rank raises the same error. So no rank waits for a rank that cannot go on.
    """

    def __init__(self, config: ServerConfig, comm: Communicator, ballot: Ballot) -> None:
        self._config = config
        self._comm = comm
        self._ballot = ballot

    def all_or_none(self, work: Callable[[], None]) -> None:
        """Do local work that can fail or take long, then vote. All ranks call this.

        Raises PrepareFailed, on every rank, with the error of one rank or with the settings that differ. Raises
        ScheduleMismatch if a rank that is already past this phase stopped the job.
        """
        self._comm.guard.finish()
        error = ""
        try:
            work()
        except ScheduleMismatch:
            pass  # the rank that stopped the others published the reason
        except Exception as failure:  # stops ranks that still work at once, the other ranks in the vote
            error = f"{type(failure).__name__}: {failure}"
            self._comm.stop_all(f"rank {self._comm.rank} {COULD_NOT_PREPARE}: {error}")
        try:
            # The vote waits for ranks that still build or compile, even if the timeout of a collective is shorter. It
            # does so whatever `checks` is: the vote compares configurations, so it must not depend on them.
            with self._comm.patiently(DEADLINE_S):
                self._vote(error)
        except (ScheduleMismatch, PrepareFailed) as stopped:  # the published message is the same on all ranks
            raise _stopped(self._comm.stopped_by() or str(stopped)) from None
        if message := self._comm.stopped_by():
            raise _stopped(message)

    def _vote(self, error: str) -> None:
        """Vote: raise PrepareFailed on every rank if a rank has an error, or if the configurations differ.

        error: the error of this rank; "" if its work succeeded
        """
        shared = self._shared_text()
        digest = self._ballot.digest(shared)
        ballot = torch.tensor([self._comm.rank if error else NO_RANK, digest, -digest])
        first_failed, lowest, negative_highest = self._over_all_ranks(ballot, "min", "vote")
        if first_failed != NO_RANK:  # a rank that failed may have other kernels, so its error has precedence
            text = self._text_of(first_failed, error)
            raise PrepareFailed(f"rank {first_failed} {COULD_NOT_PREPARE}: {text}")
        if lowest != -negative_highest:
            texts = self._comm.all_gather_text(self._comm.everyone, shared, layer="configuration")
            differences = configuration_differences(texts)
            only_kernels = all(line.startswith("kernels.") for line in differences)
            change = "choose kernels that every host has (HMR_KERNELS)" if only_kernels else SAME_CONFIGURATION
            raise PrepareFailed(f"{CONFIGURED_DIFFERENTLY}: {'; '.join(differences)}: {change}")

    def _text_of(self, rank: int, error: str) -> str:
        """Return the error of `rank`, on every rank. All ranks call this, each with its own `error`."""
        mine = error.encode()[:ERROR_BYTES] if rank == self._comm.rank else b""
        letters = torch.tensor(list(mine.ljust(ERROR_BYTES, b"\0")), dtype=torch.int32)
        return bytes(self._over_all_ranks(letters, "sum", "first error")).rstrip(b"\0").decode(errors="replace")

    def _shared_text(self) -> str:
        """Return what must be equal on all ranks, as one line of JSON: settings, and the backend of each operation.

        Two hosts with the same settings can have different kernels, for example if only one of them has a GPU, a
        compiler or a package.
        """
        dtype = getattr(torch, self._config.engine.dtype)
        shared = self._config.shared() | {"kernels": registry.table(self._comm.device.type, dtype)}
        return json.dumps(shared, sort_keys=True)

    def _over_all_ranks(self, x: torch.Tensor, reduce_op: str, layer: str) -> list[int]:
        numbers: list[int] = self._comm.all_reduce(self._comm.everyone, x, reduce_op, layer=layer).tolist()
        return numbers


def _stopped(message: str) -> RuntimeError:
    """Return the error to raise for the message with which a rank stopped the job.

    The error is PrepareFailed if a rank could not prepare or has another configuration. It is ScheduleMismatch if a
    rank was past this phase and its guard refused a collective.
    """
    in_prepare = COULD_NOT_PREPARE in message or CONFIGURED_DIFFERENTLY in message
    return PrepareFailed(message) if in_prepare else ScheduleMismatch(message)
