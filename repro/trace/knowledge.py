"""The aspects of a rank that a trace can show.

A rule never uses an aspect that the trace lacks, so that missing data does not look like a missing event.
"""

from __future__ import annotations

import enum


class Knows(enum.Flag):
    """The aspects of a rank that a trace shows.

    ORDER       the order and the sequence numbers of the collectives of each group
    COMPLETION  which collectives are over
    ARGUMENTS   data type, sizes, reduction and root of each collective
    LAYERS      the module that each collective belongs to
    STEPS       where each step begins
    SCHEDULE    the schedule that the rank declared for each step, if it declared one
    LOCKS       the locks that it waits for and holds, and the builds that it runs
    TIME        when each event happened
    LIVENESS    whether the process exists
    """

    ORDER = enum.auto()
    COMPLETION = enum.auto()
    ARGUMENTS = enum.auto()
    LAYERS = enum.auto()
    STEPS = enum.auto()
    SCHEDULE = enum.auto()
    LOCKS = enum.auto()
    TIME = enum.auto()
    LIVENESS = enum.auto()


NOTHING = Knows(0)
EVERYTHING = ~NOTHING
WITNESS = EVERYTHING & ~Knows.LIVENESS
"""The aspects that a recorder of a whole program writes.

Whether a process exists is known from the operating system.
"""

UNDECLARED = WITNESS & ~(Knows.STEPS | Knows.SCHEDULE)
"""What a recorder shows of a program that declares no steps: their absence from the witness means nothing."""

COLLECTIVES = Knows.ORDER | Knows.COMPLETION
"""The aspects that are needed to say which collective a rank waits in."""

PLAN = Knows.STEPS | Knows.SCHEDULE | Knows.LAYERS
"""The aspects that are needed to compare what a rank issued with its declared schedule."""
