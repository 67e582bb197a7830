"""Inject each fault into the real vLLM, and compare what names it: the recorder, `collect` alone, `diagnose` alone.

    python tests/vllm/judge_faults.py --vllm VENV --out DIR [FAULT…]

VENV is an environment with vLLM's CPU build and the entry points of this project. Each fault is served twice: recorded
and watched, and without a recorder, where `collect` looks at the processes and `diagnose` reads the logs that vLLM
leaves. Prints a table. Exit code 0 if the recorder names every fault and nothing names a wrong rank.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve import descendants
from server import ROOT, command, environment

WAVES = "5:8,5:30"


@dataclass(frozen=True)
class Expected:
    """The right answer for a fault.

    verdicts  the classes that are right
    culprit   the rank that is to be named
    mentions  words of which one must be in the answer of the recorder: the place of the fault
    after_s   seconds from the fault until the hang is complete
    within_s  the recorder must print within so many seconds of a wait that others wait; 0: it need not
    """

    verdicts: tuple[str, ...]
    culprit: int
    mentions: tuple[str, ...]
    after_s: float = 8.0
    within_s: float = 0.0


EXPECTED = {
    "skipped_dummy": Expected(("deadlock",), 0, ("left out execution 13",), 20),
    "extra_collective": Expected(("deadlock",), 1, ("layers.0.linear_attn",)),
    "straggler": Expected(("slow", "stall"), 1, ("step 8", "step 7"), 6),
    "lock": Expected(("deadlock",), 0, (".lock",)),
    "killed_worker": Expected(("crash",), 1, ("step 8",), 1),
    "building": Expected(("slow",), 1, ("fused_gdn",), 6, within_s=5),
}


@dataclass(frozen=True)
class Answer:
    """What a tool said: class, culprits, and all its text."""

    verdict: str
    culprits: tuple[int, ...]
    text: str

    @classmethod
    def of(cls, printed: str) -> Answer:
        try:
            document: dict[str, Any] = json.loads(printed[printed.index("{") :])
        except ValueError:
            return cls("nothing", (), printed)
        return cls(document["verdict"], tuple(document.get("culprits", ())), json.dumps(document))

    def cell(self, expected: Expected) -> str:
        """ "deadlock 0" with a mark: = right, ~ right class without a culprit, ? other, ! wrong rank."""
        if self.culprits and self.culprits != (expected.culprit,):
            mark = "!"
        elif self.verdict in expected.verdicts:
            mark = "=" if self.culprits else "~"
        else:
            mark = "?"
        return f"{mark} {self.verdict} {','.join(map(str, self.culprits))}".strip()


class Trial:
    """One fault in one folder."""

    def __init__(self, fault: str, vllm: Path, out: Path) -> None:
        self.fault, self.out, self.expected = fault, out / fault, EXPECTED[fault]
        self.out.mkdir(parents=True)
        self._vllm = vllm
        self._points = out / "entry_points"

    def _environment(self, name: str) -> dict[str, str]:
        """The environment of one server; its cache of built extensions is cold."""
        lock, extensions = self.out / f"{name}.lock", self.out / f"{name}-extensions"
        return environment(
            self._points, HMR_FAULT=self.fault, HMR_FAULT_LOCK=str(lock), TORCH_EXTENSIONS_DIR=str(extensions)
        )

    def _serve(self, name: str) -> list[str]:
        return command(self._vllm, self.out / name, WAVES)

    def recorded(self) -> Answer:
        record = [sys.executable, "-m", "repro", "record", "--to", str(self.out / "record"), "--quiet-window", "4"]
        done = subprocess.run(
            [*record, "--end", "--json", "--", *self._serve("recorded")],
            env=self._environment("recorded"), capture_output=True, text=True, cwd=ROOT, timeout=450,
        )  # fmt: skip
        (self.out / "record.txt").write_text(done.stdout + done.stderr)
        verdict = self.out / "record" / "verdict.json"
        answer = Answer.of(verdict.read_text() if verdict.exists() else "")
        printed = done.stdout + done.stderr
        if self.expected.within_s:
            waits_s = [int(text) for text in re.findall(r"slow: [^\n]*?waits [^;\n]* for (\d+) s", printed)]
            if not waits_s or waits_s[0] > self.expected.within_s:
                return Answer("told too late", (), printed)
        return answer if answer.culprits else _live(printed) or answer

    def unrecorded(self) -> tuple[Answer, Answer]:
        """What `collect` and `diagnose` say of a server that nobody records."""
        with (self.out / "serve.txt").open("w") as log:
            server = subprocess.Popen(self._serve("plain"), env=self._environment("plain"), stdout=log, stderr=log)
        try:
            self._wait_for_fault(server)
            time.sleep(self.expected.after_s)
            processes = [str(pid) for pid in descendants(server.pid) if _title(pid).startswith("VLLM::")]
            logs = sorted(map(str, (self.out / "plain").glob("*.log")))
            collected = _asked(self.out, "collect", "--to", str(self.out / "collect"), *processes, "--log", *logs)
        finally:
            with contextlib.suppress(OSError):
                server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)
        return collected, _asked(self.out, "diagnose", *logs)

    def _wait_for_fault(self, server: subprocess.Popen[bytes]) -> None:
        logs = [self.out / "plain" / f"rank{rank}.log" for rank in (0, 1)]
        deadline = time.monotonic() + 300
        while server.poll() is None and time.monotonic() < deadline:
            if any("HMR_FAULT:" in log.read_text(errors="replace") for log in logs if log.exists()):
                return
            time.sleep(0.2)


def never_ends(vllm: Path, out: Path) -> list[str]:
    """Look at a program that never ends: its front ends wait at exit for engines that wait for requests.

    Returns what the recorder and `collect` say wrongly, one line each: no deadlock, nobody guilty, and the place named.
    """
    out.mkdir(parents=True)
    wrong = []
    record = [sys.executable, "-m", "repro", "record", "--to", str(out / "record"), "--quiet-window", "2", "--json"]
    serve = [*command(vllm, out / "serve", WAVES, 300), "--leave"]
    with (out / "record.txt").open("w") as log:
        recorder = subprocess.Popen([*record, "--", *serve], env=environment(out), cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 250
        while "waits at exit" not in (out / "record.txt").read_text() and time.monotonic() < deadline:
            time.sleep(0.5)
        watched = _asked(out, "watch", str(out / "record"))
        processes = [str(pid) for pid in descendants(recorder.pid)[1:]]  # without serve.py, which forked the ranks
        collected = _asked(out, "collect", "--to", str(out / "collect"), *processes)
    finally:
        recorder.send_signal(signal.SIGINT)
        recorder.wait(timeout=90)
    if "waits at exit" not in (out / "record.txt").read_text():
        wrong.append("record did not say that the program never ends")
    for name, answer in (("watch", watched), ("collect", collected)):
        print(f"{name}: {answer.verdict} {list(answer.culprits)}", flush=True)
        named = re.search("at (its )?exit", answer.text)
        if answer.culprits or answer.verdict in ("deadlock", "crash", "nothing") or not named:
            wrong.append(f"{name} says {answer.verdict} {answer.culprits}; see {out / name}.txt")
    return wrong


def _asked(out: Path, name: str, *arguments: str) -> Answer:
    done = subprocess.run(
        [sys.executable, "-m", "repro", name, "--json", *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    (out / f"{name}.txt").write_text(done.stdout + done.stderr)
    return Answer.of(done.stdout)


def _live(printed: str) -> Answer | None:
    """What the watch said while a rank was slow: such a run ends well, and its verdict may be clean."""
    for sentences in re.findall(r"^\s*slow: (.+)$", printed, re.MULTILINE):
        working = [sentence for sentence in sentences.split("; ") if re.match(r"rank \d+ (builds|runs)\b", sentence)]
        if len(working) == 1:
            return Answer("slow", (int(working[0].split()[1]),), sentences)
    return None


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("faults", nargs="*", default=list(EXPECTED))
    args = parser.parse_args()
    print("| fault | recorder | collect | diagnose | place named by the recorder |\n|---|---|---|---|---|", flush=True)
    bad = 0
    for fault in args.faults:
        trial = Trial(fault, args.vllm.absolute(), args.out.absolute())
        recorded = trial.recorded()
        answers = (recorded, *trial.unrecorded())
        cells = [answer.cell(trial.expected) for answer in answers]
        place = next((words for words in trial.expected.mentions if words in recorded.text), "no")
        bad += not cells[0].startswith("=") or place == "no" or any(cell.startswith("!") for cell in cells)
        print("|", " | ".join((fault, *cells, place)), "|", flush=True)
    print("= right class and rank, ~ right class and no culprit, ? something else, ! wrong rank")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
