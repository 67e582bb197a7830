"""Make the verdict for a run whose watcher failed: `inconclusive`, because the failure proves nothing about the run."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Sequence

from repro.store.run_dir import RunDir, write_atomically
from repro.verdict import Verdict

MAX_CAUSE = 300
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def failed(run_dir: RunDir, what: str, errors: Sequence[Exception], gaps: Sequence[str] = ()) -> Verdict:
    """Write the tracebacks of the errors to logs/watcher.log, and return the verdict `inconclusive`.

    The first line of the verdict's evidence names the first error.

    what    the part of this program that failed, for the evidence: "the watcher"
    gaps    a line for each piece of evidence that is missing
    """
    log = run_dir.watcher_log
    try:
        log.parent.mkdir(exist_ok=True)
        write_atomically(log, "\n".join("".join(traceback.format_exception(error)) for error in errors))
        where = f"the traceback is in logs/{log.name}"
    except OSError as full:  # the disk may be full; the verdict is smaller than the tracebacks, and may still fit
        where = f"the traceback could not be written: {full.strerror}"
    cause = " ".join(f"{type(errors[0]).__name__}: {errors[0]}".split())[:MAX_CAUSE]
    if isinstance(errors[0], OSError) and errors[0].errno in NO_ROOM:
        line = (
            f"cannot write {errors[0].filename or 'the verdict'}: {errors[0].strerror}, which says nothing about the "
            f"run; what was recorded is in {run_dir.root}: make room there, and judge it again with "
            f"`python -m repro watch {run_dir.root}`"
        )
        return Verdict("inconclusive", evidence=(line, *gaps), confidence="undecided")
    line = f"{what} failed, so nothing is known about the run: {cause}; {where}"
    return Verdict("inconclusive", evidence=(line, *gaps), confidence="undecided")
