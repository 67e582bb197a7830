"""Whether the ranks of runs fit into this machine's memory, asked before any starts.

``python -m repro.memory`` reads a list of settings from standard input, and prints what does not fit. A process of its
own, as it needs torch, which the launcher never loads.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable

from hybrid_moe_ref.config import ConfigError
from repro.settings import RunSettings


def refuse_too_large(runs: Iterable[RunSettings]) -> None:
    """Raises ConfigError for a run whose ranks cannot fit, with what they need and what is there."""
    asked = json.dumps([settings.to_mapping() for settings in runs])
    command = [sys.executable, "-m", "repro.memory"]
    answer = subprocess.run(command, input=asked, stdout=subprocess.PIPE, text=True)
    if told := answer.stdout.strip():
        raise ConfigError(told)


def shortage_of(settings: RunSettings) -> str:
    """What the run needs and the machine has, "" where that is enough. A GPU's memory is not looked at."""
    import torch

    from hybrid_moe_ref import memory
    from hybrid_moe_ref.parallel.layout import sizes_of_a_rank

    if settings.backend == "nccl":
        return ""
    server = settings.server()
    try:
        rank = sizes_of_a_rank(server.model, server.parallel, getattr(torch, server.engine.dtype))
        memory.check_memory(rank, server.engine.num_pages, "cpu", settings.num_ranks)
    except ConfigError as error:
        return str(error)
    except RuntimeError as error:  # sizes beyond what a tensor can have
        if not (told := memory.shortage(error)):
            raise
        return told
    return ""


def main() -> None:
    """Entry point."""
    told = (shortage_of(RunSettings.from_mapping(document)) for document in json.load(sys.stdin))
    print(next(filter(None, told), ""))


if __name__ == "__main__":
    main()
