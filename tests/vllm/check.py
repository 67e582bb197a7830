"""What `make test-vllm` runs: serve the real vLLM recorded, compare, inject the faults, and look for what is left.

python tests/vllm/check.py --vllm VENV --out DIR [--old VENV] [PART…]

schedule  serve with the recorder and without: equal tokens, a clean record, the schedule of our engine (protocol 0.33)
question  the same with the question of vLLM 0.20 (question.py): our engine under protocol 0.20
compiled  one rank with torch.compile: it serves, and the record is clean
exit      a program that never ends, because its front ends wait for engines that wait for requests
faults    six injected faults (judge_faults.py)
upstream  tests/upstream, which have the form of vLLM's own
cells     the experiment of `python -m repro cells`, with a real build of one rank (cells.py)
old       vLLM 0.20 itself, in the environment --old: our engine under protocol 0.20
soak      30 minutes with idle ranks (soak.py); only if named
overhead  what the recorder costs a step (overhead.py); only if named
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import judge_faults
from server import HERE, ROOT, command, environment

from repro.attach.vllm.guard.ending.stop import EXIT_CODE

WAVES = "5:8,5:12 3:40,4:1 9:2,6:70 30:100,2:3 2:1,3:1"
"""Waves in which ranks become idle, of about 240 executions. A prompt of one token ends vLLM 0.32 on a CPU (conv1d)."""

USUAL = ("schedule", "question", "compiled", "exit", "faults", "guard", "upstream", "cells")


class Check:
    """The parts. Each returns what is wrong, one line each."""

    def __init__(self, vllm: Path, old: Path | None, out: Path) -> None:
        self._vllm, self._old, self._out = vllm, old, out
        self._tokens: list[object] = []
        self.parts: dict[str, Callable[[], list[str]]] = {
            "schedule": self.schedule, "question": self.question, "compiled": self.compiled, "exit": self.exit,
            "faults": self.faults, "guard": self.guard, "upstream": self.upstream, "cells": self.cells,
            "old": self.old, "soak": self.soak, "overhead": self.overhead,
        }  # fmt: skip

    def schedule(self) -> list[str]:
        plain, wrong = self._serve("plain")
        self._tokens = plain
        recorded, more = self._serve("recorded", recorded=True)
        if plain != recorded:
            wrong.append("the recorder changed what was served")
        return wrong + more + self._compared("recorded", "0.33")

    def question(self) -> list[str]:
        tokens, wrong = self._serve("question", recorded=True, HMR_QUESTION="0.20")
        if self._tokens and tokens != self._tokens:
            wrong.append("the question of 0.20 changed what was served")
        return wrong + self._compared("question", "0.20")

    def compiled(self) -> list[str]:
        return self._serve("compiled", ["--ranks", "1", "--compiled"], "5:20 9:30", recorded=True)[1]

    def exit(self) -> list[str]:
        return judge_faults.never_ends(self._vllm, self._out / "exit")

    def faults(self) -> list[str]:
        wrong = self._run("judge_faults.py", "--vllm", str(self._vllm), "--out", str(self._out / "faults"))
        return ["not every fault was named"] if wrong else []

    def upstream(self) -> list[str]:
        python, beside, tests = self._vllm / "bin" / "python", self._out / "pytest", ROOT / "tests" / "upstream"
        pip = [str(python), "-m", "pip", "install", "-q", "--target", str(beside), "pytest"]
        if subprocess.run(pip).returncode:  # beside the environment of vLLM, which may not be ours
            return ["tests/upstream did not run: pytest could not be installed"]
        alone = ["-c", os.devnull, "--rootdir", str(tests), "--confcutdir", str(tests), "-p", "no:cacheprovider"]
        test = [str(python), "-m", "pytest", *alone, "-q", "-rxs", str(tests)]
        done = subprocess.run(test, env={**os.environ, "PYTHONPATH": str(beside)})
        return ["tests/upstream failed"] * bool(done.returncode)

    def cells(self) -> list[str]:
        return ["the experiment of cells did not go as expected"] * bool(self._run("cells.py", *self._target("cells")))

    def guard(self) -> list[str]:
        wrong = self._run("guard_faults.py", "--vllm", str(self._vllm), "--out", str(self._out / "guard"))
        return ["the guard did not stop every fault, or stopped what is none"] * bool(wrong) + self.guarded_server()

    def guarded_server(self) -> list[str]:
        """Kill a worker of `vllm serve`: the server must end within 2 s, and its exit code must say why."""
        serve = [str(self._vllm / "bin" / "python"), str(HERE / "guard_server.py"), "--out", str(self._out / "server")]
        variables = environment(self._out / "entry_points", HMR_GUARD="agree", HMR_CPU_EP="1")
        done = subprocess.run(serve, env=variables, capture_output=True, text=True)
        end = json.loads(done.stdout.strip() or "{}")
        print(f"vllm serve, one worker killed: {end}")
        return ["vllm serve did not end as it should"] * (end.get("code") != EXIT_CODE or end["ended_s"] > 2)

    def old(self) -> list[str]:
        if self._old is None:
            return ["name an environment with vLLM 0.20: --old VENV"]
        self._vllm, before = self._old, self._vllm
        try:
            _, wrong = self._serve("old", ["--model", "attention"], recorded=True)
        finally:
            self._vllm = before
        return wrong + self._compared("old", "0.20")

    def soak(self) -> list[str]:
        return ["false alarms"] if self._run("soak.py", *self._target("soak")) else []

    def overhead(self) -> list[str]:
        return ["the recorder costs more than 1 %"] if self._run("overhead.py", *self._target("overhead")) == 1 else []

    def _target(self, name: str) -> list[str]:
        return ["--vllm", str(self._vllm), "--out", str(self._out / name)]

    def _run(self, program: str, *arguments: str) -> int:
        return subprocess.run([sys.executable, str(HERE / program), *arguments]).returncode

    def _serve(
        self, name: str, more: list[str] | None = None, waves: str = WAVES, recorded: bool = False, **variables: str
    ) -> tuple[list[object], list[str]]:
        """Serve the waves; returns each rank's tokens, and what is wrong: a failure, or a record that is not clean."""
        folder, record = self._out / name, self._out / f"{name}-record"
        if recorded:
            variables["HMR_RECORD"] = str(record)
        points = self._out / "entry_points"
        serve = [*command(self._vllm, folder, waves), *(more or [])]
        done = subprocess.run(serve, env=environment(points, **variables), capture_output=True)
        if done.returncode:
            return [], [f"serve.py ended with {done.returncode}; see {folder}"]
        tokens = [json.loads(path.read_text()) for path in sorted(folder.glob("outputs*.json"))]
        if not recorded:
            return tokens, []
        watch = [sys.executable, "-m", "repro", "watch", str(record), "--json"]
        verdict = subprocess.run(watch, cwd=ROOT, capture_output=True, text=True)
        if json.loads(verdict.stdout or "{}").get("verdict") == "clean":
            return tokens, []
        return tokens, [f"the record of {name} is not clean: {verdict.stdout[-400:]}{verdict.stderr[-400:]}"]

    def _compared(self, name: str, protocol: str) -> list[str]:
        differs = self._run("compare.py", str(self._out / f"{name}-record"), "--protocol", protocol)
        return [f"the schedules of vLLM ({name}) and of our engine under protocol {protocol} differ"] if differs else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True)
    parser.add_argument("--old", type=Path, help="an environment with vLLM 0.20, for the part old")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "vllm")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: {' '.join(USUAL)}")
    args = parser.parse_args()
    out = args.out.absolute()
    check = Check(args.vllm.absolute(), args.old.absolute() if args.old else None, out)
    if unknown := sorted({*args.parts} - {*check.parts}):
        parser.error(f"there is no part {', '.join(unknown)}; the parts are {', '.join(check.parts)}")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    failed: list[str] = []
    began_s = time.monotonic()
    for part in args.parts or USUAL:
        print(f"-- {part}", flush=True)
        part_s = time.monotonic()
        wrong = check.parts[part]()
        failed += [f"{part}: {line}" for line in wrong]
        print(f"-- {part}: {time.monotonic() - part_s:.0f} s, {'; '.join(wrong) or 'as expected'}", flush=True)
    left = _left(str(out))
    if left:
        failed.append(f"processes are left: {left}")
    print(*failed, sep="\n")
    print(f"test-vllm: {'not ' if failed else ''}all as expected, {time.monotonic() - began_s:.0f} s")
    return int(bool(failed))


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
