"""What `make test-vllm` runs: serve the real vLLM recorded, compare, inject the faults, and look for what is left.

python tests/vllm/check.py --vllm VENV --out DIR [--no-faults]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from server import HERE, ROOT, command, environment

WAVES = "5:8,5:12 3:40,4:1 9:2,6:70 30:100,2:3 2:1,3:1"
"""Waves in which ranks become idle, of about 240 executions. A prompt of one token ends vLLM 0.32 on a CPU (conv1d)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "vllm")
    parser.add_argument("--no-faults", action="store_true")
    args = parser.parse_args()
    out, vllm = args.out.absolute(), args.vllm.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    failed = []

    began_s = time.monotonic()
    plain = _serve(vllm, out, "plain")
    recorded = _serve(vllm, out, "recorded", HMR_RECORD=str(out / "record"))
    print(f"served twice in {time.monotonic() - began_s:.0f} s", flush=True)
    if plain != recorded:
        failed.append("the recorder changed what was served")
    verdict = subprocess.run(
        [sys.executable, "-m", "repro", "watch", str(out / "record"), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if json.loads(verdict.stdout or "{}").get("verdict") != "clean":
        failed.append(f"the recording is not clean: {verdict.stdout[-400:]}{verdict.stderr[-400:]}")
    if subprocess.run([sys.executable, str(HERE / "compare.py"), str(out / "record")]).returncode:
        failed.append("vLLM's schedule and ours differ")
    if not args.no_faults:
        judge = [sys.executable, str(HERE / "judge_faults.py"), "--vllm", str(vllm), "--out", str(out / "faults")]
        if subprocess.run(judge).returncode:
            failed.append("not every fault was named")
    left = _left(str(out))
    if left:
        failed.append(f"processes are left: {left}")
    print("\n".join(failed) or "test-vllm: all as expected")
    return int(bool(failed))


def _serve(vllm: Path, out: Path, name: str, **variables: str) -> list[object]:
    """Serve the waves; returns the tokens of each rank."""
    done = subprocess.run(
        command(vllm, out / name, WAVES), env=environment(out / "entry_points", **variables), capture_output=True
    )
    if done.returncode:
        sys.exit(f"serve.py ended with {done.returncode}; see {out / name}")
    return [json.loads((out / name / f"outputs{rank}.json").read_text()) for rank in (0, 1)]


def _left(word: str) -> list[str]:
    """Processes whose command line names the folder of this check, without this one and those that started it."""
    own, lines = {os.getpid()}, []
    pid = os.getppid()
    while pid > 1:
        own.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in own:
            try:
                text = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            if word in text:
                lines.append(f"{entry.name} {text[:120]}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
