"""Find the global rank of each process in an answer of NCCL's RAS: its rank in the largest communicator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from repro.trace.foreign.records import Member, RasCommunicator


def of_the_world(members: Iterable[Member], communicators: Sequence[RasCommunicator]) -> list[Member]:
    """Return those ``members`` that are in the largest communicator; [] if two communicators have the largest size.

    We assume that the largest communicator contains all ranks, so that the ranks in it are global ranks.

    members         the processes of all communicators: a process in two communicators appears twice
    communicators   all communicators in the answer
    """
    sizes = sorted((row.size for row in communicators), reverse=True)
    if not sizes or sizes[1:2] == sizes[:1]:
        return []
    return [member for member in members if member.size == sizes[0]]
