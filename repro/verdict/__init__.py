"""Judge a run: from witnesses and facts to a verdict that says which ranks wait for which, where, and why.

    verdict = judge(witnesses, facts, num_ranks=8, now_ns=time.monotonic_ns(), quiet_window_s=1.0)
    print(verdict.sentence())

Pure: no torch, no files, no clock. ``docs/VERDICTS.md`` says what proves each class and what would refute it.
"""

from repro.verdict.facts import Facts
from repro.verdict.judge import judge
from repro.verdict.result import Position, Verdict

__all__ = ["Facts", "Position", "Verdict", "judge"]
