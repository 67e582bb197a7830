"""Pack a run into one zip for a bug report: evidence, pictures, the text of the issue, and commands to repeat it.

A bundle carries only what is recognised: known fields, known words, numbers, files of known packages. Everything else
is replaced by a stand-in where it tells things apart, and left out and counted where it does not.
"""

from repro.bundle.archive import ArchiveError, opened, verify
from repro.bundle.assemble import Made, make
from repro.bundle.evidence import make_of_evidence
from repro.bundle.leaks import LeakError

__all__ = ["ArchiveError", "LeakError", "Made", "make", "make_of_evidence", "opened", "verify"]
