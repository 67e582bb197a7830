"""Run the experiment of `cells` with vLLM's CPU build, in two parts:

    builds    DP2 + EP2, eager. Rank 1 builds a C++ extension as it warms up (the fault `building`), and rank 0 waits:
              the cold start is slow with rank 1 as the culprit, and the warm one finds the extension
    compiled  TP2, compiled by torch.compile: a cold and a warm start

    python tests/vllm/cells.py --vllm VENV --out DIR [PART…]

Prints the tables, and what is not as expected. Nothing is asserted about times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server import HERE, ROOT, environment

FLAGS = (
    "--load-format", "dummy", "--skip-tokenizer-init", "--max-model-len", "256", "--max-num-seqs", "4",
    "--max-num-batched-tokens", "256", "--api-server-count", "1",
)  # fmt: skip
COLD, WARM = "{}-cpu-cpu-cold", "{}-cpu-cpu-warm"


class Experiments:
    """The parts. Each returns what is wrong, one line each."""

    def __init__(self, vllm: Path, out: Path) -> None:
        self._vllm, self._out = vllm, out
        self.parts = {"builds": self.builds, "compiled": self.compiled}

    def compiled(self) -> list[str]:
        found = self._run("compiled", "TP2 cpu", silence_s=120)
        return self._ready(found, "tp2")

    def builds(self) -> list[str]:
        found = self._run("builds", "DP2+EP2 eager cpu", silence_s=10, HMR_FAULT="building")
        wrong = self._ready(found, name := "dp2ep2eager")
        cold, warm = found.get(COLD.format(name), {}), found.get(WARM.format(name), {})
        if (cold.get("verdict"), cold.get("culprits")) != ("slow", [1]):
            wrong.append(f"the cold start is not slow with rank 1: {cold}")
        if warm.get("culprits"):
            wrong.append(f"the warm start names a rank: {warm}")
        return wrong

    def _run(self, part: str, only: str, silence_s: float, **variables: str) -> dict[str, Mapping[str, Any]]:
        """Run the cells with the words ``only``; returns their outcomes by name."""
        to = self._out / part
        words = [
            "--vllm",
            f"{self._vllm}/bin/python {HERE / 'serve_api.py'} serve",
            "--model",
            str(self._out / "model"),
        ]
        words += ["--ranks", "2", "--eager", "--only", only, "--to", str(to), "--silence", str(silence_s)]
        command = [sys.executable, "-m", "repro", "cells", *words, "--limit", "900", "--needs", "1", "--", *FLAGS]
        subprocess.run(command, cwd=ROOT, env=environment(self._out / "entry_points", **variables))
        results = json.loads((to / "results.json").read_text())
        return {each["name"]: each for each in results}

    def _ready(self, found: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
        cells = (COLD.format(name), WARM.format(name))
        return [
            f"{cell} was not ready: {found.get(cell)}" for cell in cells if found.get(cell, {}).get("state") != "ready"
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("parts", nargs="*", metavar="PART")
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    experiments = Experiments(args.vllm.absolute(), out)
    wrong = [line for part in args.parts or experiments.parts for line in experiments.parts[part]()]
    print("\n".join(wrong) or "cells: all as expected")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
