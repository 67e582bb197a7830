"""The exit codes of every command."""

EXPECTED = 0
"""The verdict is the expected one. For a job that is not ours (`diagnose`, `collect`, `watch`), every verdict except
inconclusive counts as expected."""

UNEXPECTED = 1
"""A verdict other than the expected one."""

USAGE = 2
"""A wrong argument or configuration, or a file that cannot be read."""

CANNOT_TELL = 125
"""An inconclusive verdict, a run that is not possible on this machine, or a failure of this program."""

INTERRUPTED = 130
