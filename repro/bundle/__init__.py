"""Pack a run into one zip for a bug report: evidence, pictures, the text of the issue, and commands to repeat the run.

A bundle keeps only what is recognised as harmless: known fields, known words, numbers, files of known packages. If a
string is not recognised, but distinguishes things (for example the name of a group), it is replaced by a stand-in such
as "name-003". Everything else is left out and counted.
"""

from repro.bundle.archive import ArchiveError, opened, verify
from repro.bundle.assemble import Made, make
from repro.bundle.evidence import make_of_evidence
from repro.bundle.leaks import LeakError

__all__ = ["ArchiveError", "LeakError", "Made", "make", "make_of_evidence", "opened", "verify"]
