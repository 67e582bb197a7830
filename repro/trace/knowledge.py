"""What a file of evidence can show about a rank: the order of its collectives, their arguments, times, and so on.

Each of these is an aspect. A rule of the judge never uses an aspect that the file lacks. For example, no rule concludes
that a rank holds no lock from a file that cannot show locks.
"""

from __future__ import annotations

import enum


class Knows(enum.Flag):
    """What a file of evidence can show about a rank. Each flag is one aspect.

    ORDER       the order and the sequence numbers of the collectives of each group
    COMPLETION  which collectives are complete
    ARGUMENTS   data type, sizes, reduction and root of each collective
    LAYERS      the module that each collective belongs to
    STEPS       where each step begins
    SCHEDULE    the schedule that the rank declared for each step, if it declared one
    LOCKS       the locks that the rank waits for and holds, and the builds that it runs
    TIME        when each event happened
    LIVENESS    whether the rank's process exists
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
"""The aspects that the recorder writes for a program that declares its steps and schedules.

LIVENESS is not among them: only the operating system knows whether a process exists.
"""

UNDECLARED = WITNESS & ~(Knows.STEPS | Knows.SCHEDULE)
"""The aspects that the recorder writes for a program that declares no steps and no schedules."""

COLLECTIVES = Knows.ORDER | Knows.COMPLETION
"""The aspects that a rule needs to find the collective that a rank waits in."""

PLAN = Knows.STEPS | Knows.SCHEDULE | Knows.LAYERS
"""The aspects that a rule needs to compare what a rank issued with the schedule that it declared."""
