"""The table of verdict classes. Everything that depends on a verdict's class is read from the class's row."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from repro.exit_codes import CANNOT_TELL, UNEXPECTED

INTERRUPT, END = "interrupt", "end"
"""Events outside the job that can end the job. INTERRUPT: the user pressed Ctrl-C. END: the launcher got a signal and
ended the ranks."""


@dataclass(frozen=True)
class VerdictClass:
    """One verdict class, as a row of the table of classes.

    meaning   what this class says about a run, in one line, as in docs/VERDICTS.md and in the help of the commands
    colour    the colour of the badge on the report's page: green, yellow or red
    hangs     whether some ranks have not finished; None if this differs from run to run
    final     whether the watcher stops at this class, because no rank can change the verdict any more
    decided   whether the evidence was enough to judge the run
    causes    name of a cause -> how a headline describes the cause; a verdict of this class can also have no cause
    outside   the events outside the job that can leave the same evidence as this class: INTERRUPT (the user pressed
              Ctrl-C) or END (the launcher got a signal). If one of them ended the job, the verdict of this class
              becomes `inconclusive`
    live      whether a run of this class can still end normally. The files of such a run look `clean` at its end, so
              only a watcher that ran at the same time can find this class
    """

    name: str
    meaning: str
    colour: str
    hangs: bool | None
    final: bool = True
    decided: bool = True
    causes: Mapping[str, str] = field(default_factory=dict)
    outside: Collection[str] = ()
    live: bool = False

    @property
    def is_finished_wrong(self) -> bool:
        """Whether this class means that every rank has finished, but with a wrong result."""
        return self.hangs is False and self.colour == "red"

    @property
    def exit_code(self) -> int:
        """Return the exit code of a command that finds this class although another class was expected."""
        return UNEXPECTED if self.decided else CANNOT_TELL

    @property
    def junit(self) -> str:
        """Return the JUnit result, "failure" or "error", of a run that has this class although another was expected."""
        return "failure" if self.decided else "error"


_DIFFERENCES = {
    "extra": "a collective too many",
    "skipped": "a collective left out",
    "order": "two groups entered in another order",
    "mismatch": "different collectives under one sequence number",
    "sizes": "sizes that differ",
}
"""The ways in which the collectives of ranks can differ: name of the cause -> how a headline describes the cause."""

_LOCK = {"lock": "a lock that is not released"}

CLASSES = {
    each.name: each
    for each in (
        VerdictClass(
            "deadlock",
            "a rank can never continue, and the evidence explains why",
            "red",
            hangs=True,
            causes=_DIFFERENCES | _LOCK,
        ),
        VerdictClass(
            "stall",
            "all ranks are in the same collective, and the collective does not end",
            "red",
            hangs=True,
            causes={"device": "a device stopped", "host": "a host process stopped"},
        ),
        VerdictClass(
            "slow",
            "a rank works, starts or is suspended while others wait for it",
            "yellow",
            hangs=None,
            final=False,
            causes={"straggler": "a rank that is slower than the others", **_LOCK},
            outside=(INTERRUPT, END),
            live=True,
        ),
        VerdictClass(
            "crash",
            "a process ended or failed first",
            "red",
            hangs=True,
            causes={
                "error": "an error raised",
                "dead_rank": "a process died",
                "memory": "out of memory",
                "hardware": "a device failed",
                "killed": "a process killed",
                "start": "a start that failed",
                **_DIFFERENCES,
                **_LOCK,
            },
            outside=(END,),
        ),
        VerdictClass(
            "corrupt",
            "ranks completed different collectives as if they were one, or the numbers are wrong",
            "red",
            hangs=False,
            causes=_DIFFERENCES,
        ),
        VerdictClass("clean", "every rank finished, and no wrong result was found", "green", hangs=False),
        VerdictClass(
            "inconclusive",
            "evidence is missing or contradicts itself; the verdict says what to collect",
            "yellow",
            hangs=True,
            final=False,
            decided=False,
            causes=_DIFFERENCES | _LOCK,
        ),
    )
}

NO_VERDICT = VerdictClass("", "the run has no verdict yet", "yellow", hangs=False, final=False, decided=False)


def class_of(verdict: str) -> VerdictClass:
    """Return the verdict class with this name. For any other name, return NO_VERDICT: the run has no verdict yet."""
    return CLASSES.get(verdict, NO_VERDICT)


def describe_classes() -> str:
    """Return the part of a command's help that explains the verdict classes: one line for each class."""
    width = max(map(len, CLASSES))
    return "\n".join(f"  {name:{width}}  {each.meaning}" for name, each in CLASSES.items())
