"""`vllm serve` of vLLM's CPU build with a quick start: only this process imports vLLM, and the others are forked.

    python tests/vllm/serve_api.py serve MODEL [flags of vllm serve]

Run it with the interpreter of vLLM's environment. MODEL is a folder; the tiny model of serve.py is written into it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path

import serve

VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HMR_CPU_EP": "1",
    "VLLM_ENGINE_READY_TIMEOUT_S": "1500",
}  # fmt: skip


def main() -> None:
    serve._with_libgomp()
    os.environ.update(VARIABLES)
    model = Path(sys.argv[2])
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(serve.MODELS["hybrid"]))
    serve._preload()
    _name_the_distribution()
    from vllm.entrypoints.cli.main import main as run

    run()


def _name_the_distribution() -> None:
    """Make vLLM's command line find a version: it asks for that of "vllm", and the CPU build is called "vllm-cpu"."""
    version = importlib.metadata.version

    def of(name: str) -> str:
        return f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)

    importlib.metadata.version = of


if __name__ == "__main__":
    main()
