"""Compute the single-process reference: the tokens that one process with the whole model generates for all requests.

``python -m repro.lab.outcome.reference RUN_DIR`` reads config.json in the run directory and writes reference.json
there. The program runs at the same time as the ranks. It is killed when the process that started it ends.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from repro.hosts.parent import die_with_parent
from repro.lab.settings import RunSettings, read_settings
from repro.store.run_dir import RunDir, write_json


def compute(settings: RunSettings) -> dict[str, list[int]]:
    """Return a dict from request id to the greedily decoded tokens. Each prompt runs in a batch of its own."""
    import torch

    from hybrid_moe_ref.model import HybridMoE

    torch.set_num_threads(1)
    model = HybridMoE(settings.model, device="meta", dtype=getattr(torch, settings.engine.dtype))
    model.init_weights(settings.seed)
    tokens = {}
    for requests in settings.requests()[:: settings.tp_size]:
        for request in requests:
            new_tokens_BT = model.generate(torch.tensor([request.prompt]), request.max_new_tokens)
            tokens[request.request_id] = new_tokens_BT[0].tolist()
    return tokens


def main() -> None:
    """Write reference.json into the run directory named on the command line."""
    die_with_parent()
    run_dir = RunDir(Path(sys.argv[1]))
    write_json(run_dir.reference, compute(read_settings(run_dir.config)))
    os._exit(0)  # an interpreter that has imported torch takes most of a second to end


if __name__ == "__main__":
    main()
