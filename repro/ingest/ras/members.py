"""Global ranks from the members of an answer's largest communicator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from repro.trace.observed import Member, RasCommunicator


def of_the_world(members: Iterable[Member], communicators: Sequence[RasCommunicator]) -> list[Member]:
    """The members of the one communicator that is larger than all others: their numbers there are global ranks."""
    sizes = sorted((row.size for row in communicators), reverse=True)
    if not sizes or sizes[1:2] == sizes[:1]:
        return []
    return [member for member in members if member.size == sizes[0]]
