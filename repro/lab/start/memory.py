"""Check before any rank starts whether the ranks of a run fit into this machine's memory.

``python -m repro.lab.start.memory`` reads a list of settings from standard input. For the first run that does not fit,
it prints how much memory the ranks need and how much there is. This is a separate process because it needs torch, which
the launcher never loads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable

from hybrid_moe_ref.config import ConfigError
from repro.lab.settings import RunSettings

RANK_BYTES = 48 << 20
"""Memory in bytes that one rank of the smallest model needs, without the memory pages that forked ranks share."""


def refuse_too_large(runs: Iterable[RunSettings]) -> None:
    """Raise ConfigError for the first run whose ranks do not fit into this machine's memory.

    The error says how much memory the ranks need and how much there is. Raises RuntimeError if the check itself fails.
    """
    documents = json.dumps([settings.to_mapping() for settings in runs])
    command = [sys.executable, "-m", "repro.lab.start.memory"]
    answer = subprocess.run(command, input=documents, capture_output=True, text=True)
    if answer.returncode:
        last = answer.stderr.strip().splitlines()[-1:] or [f"exit code {answer.returncode}"]
        raise RuntimeError(f"cannot determine whether the run fits into memory: {last[0]}")
    if shortage := answer.stdout.strip():
        raise ConfigError(shortage)


def refuse_too_many(runs: Iterable[RunSettings]) -> None:
    """Raise ConfigError for the first run whose ranks would not fit into the memory even with the smallest model.

    This check is cheap, because it needs no torch. :func:`refuse_too_large` counts the memory of the run's own model.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for settings in runs:
        if (needed := settings.num_ranks * RANK_BYTES) > total:
            text = (
                f"{settings.num_ranks} ranks take at least {needed / 1e9:.0f} GB, but this machine has "
                f"{total / 1e9:.0f}"
            )
            raise ConfigError(text, "num_ranks")


def shortage_of(settings: RunSettings) -> str:
    """Return a text that says how much memory the ranks need and how much there is; "" if the ranks fit.

    Under NCCL, return "": GPU memory is not checked.
    """
    import torch

    from hybrid_moe_ref import memory
    from hybrid_moe_ref.parallel.sharding.layout import sizes_of_a_rank

    if settings.backend == "nccl":
        return ""
    server = settings.server()
    try:
        rank = sizes_of_a_rank(server.served_model, server.parallel, getattr(torch, server.engine.dtype))
        memory.check_memory(rank, server.engine.num_pages, "cpu", settings.num_ranks)
    except ConfigError as error:
        return str(error)
    return ""


def main() -> None:
    """Read the settings of several runs from standard input, as a list in JSON. Check that each fits into memory.

    Print the :func:`shortage_of` the first run in the list that does not fit; if all fit, print an empty line.
    """
    shortages = (shortage_of(RunSettings.from_mapping(document)) for document in json.load(sys.stdin))
    print(next(filter(None, shortages), ""), flush=True)
    os._exit(0)  # an interpreter that has imported torch takes most of a second to end


if __name__ == "__main__":
    main()
