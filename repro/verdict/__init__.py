"""Judge a run: find out from witnesses and facts which ranks wait for which other ranks, in what, and why.

    verdict = judge(witnesses, facts, num_ranks=8, now_ns=time.monotonic_ns(), quiet_window_s=1.0)
    print(verdict.sentence())

The judge is a pure function: it uses no torch, no files and no clock. ``docs/VERDICTS.md`` says what proves a verdict
of each class, and what would refute the verdict.
"""

from repro.verdict.facts import Facts
from repro.verdict.judge import judge
from repro.verdict.result import Position, Verdict

__all__ = ["Facts", "Position", "Verdict", "judge"]
