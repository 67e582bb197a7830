"""Run the experiment of `cells` with vLLM's CPU build: the cells that a CPU has, each in a cold and a warm cache.

    python tests/vllm/cells.py --vllm VENV --out DIR [--only WORDS]

Fails if a start did not become ready, or if a cell is missing from the table. How long a cold and a warm start take is
printed; nothing is asserted about it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from server import HERE, ROOT, environment

FLAGS = (
    "--load-format", "dummy", "--skip-tokenizer-init", "--max-model-len", "256", "--max-num-seqs", "4",
    "--max-num-batched-tokens", "256", "--api-server-count", "1",
)  # fmt: skip
CELLS = ("dp2ep2eager-cpu-cpu-cold", "dp2ep2eager-cpu-cpu-warm", "tp2-cpu-cpu-cold", "tp2-cpu-cpu-warm")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="cpu")
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    program = f"{args.vllm.absolute()}/bin/python {HERE / 'serve_api.py'} serve"
    words = ["--vllm", program, "--model", str(out / "model"), "--ranks", "2", "--eager", "--only", args.only]
    limits = ["--to", str(out / "cells"), "--limit", "900", "--needs", "1"]
    command = [sys.executable, "-m", "repro", "cells", *words, *limits, "--", *FLAGS]
    code = subprocess.run(command, cwd=ROOT, env=environment(out / "entry_points")).returncode
    results = {each["name"]: each for each in json.loads((out / "cells" / "results.json").read_text())}
    bad = [name for name, each in results.items() if each["state"] not in ("ready", "not run")]
    bad += [name for name in CELLS if args.only == "cpu" and name not in results]
    print((out / "cells" / "table.txt").read_text())
    print("\n".join(f"not ready: {name}" for name in bad) or f"cells: all starts became ready; exit code {code}")
    return int(bool(bad) or code not in (0, 1))


if __name__ == "__main__":
    sys.exit(main())
