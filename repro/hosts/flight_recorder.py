"""Dump the Flight Recorder (torch's buffer of the latest collectives) of this process, without importing torch."""

from __future__ import annotations

import re
import sys

_HAS_ENTRIES = re.compile(rb'"entries":\s*\[\s*\{')


def dump() -> bytes | None:
    """Return the dump of this process's Flight Recorder as JSON; None if torch is not imported or has no recorder.

    A CUDA build of torch has two recorders, one for NCCL and one for gloo. If the recorder for NCCL has entries, return
    its dump; if not, return the dump of the recorder for gloo. Raises RuntimeError if torch cannot dump.
    """
    c10d = sys.modules.get("torch._C._distributed_c10d")
    dumped = None
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        if function := getattr(c10d, name, None):
            dumped = bytes(function(True, False))
            if _HAS_ENTRIES.search(dumped):
                return dumped
    return dumped
