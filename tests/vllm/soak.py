"""Serve for a long time with idle ranks, recorded and watched, and count what the watch says: 0 false alarms.

    python tests/vllm/soak.py --vllm VENV --out DIR [--seconds 1800]

Every 10 s a wave begins, of both ranks, of one of them, or of none. `record` watches the server, and `watch` judges the
files once a minute. Nothing is wrong with the server, so each of these is an alarm: a verdict other than clean at the
end, a look that says more than clean, slow or inconclusive, a culprit, and a line of `record` about a step. A look at
ranks in the middle of a step says slow, and names nobody: some ranks work, and others wait for them. What `record` says
of the start is printed, and is no alarm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from server import ROOT, command, environment

WAVES = "5:20,5:30 3:40,4:1 2:1,6:40 0:0,0:0 2:1,9:25 0:0,0:0"
"""In a wave of one new token a rank soon is idle. Offline, a rank that gets no request at all makes the others wait."""
PERIOD_S = 10.0
LOOK_S = 60.0
QUIET_WINDOW_S = 5
NO_ALARM = ("clean", "slow", "inconclusive")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1800.0)
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True)
    serve = command(args.vllm.absolute(), out / "serve", WAVES, args.seconds + 900)
    serve += ["--seconds", str(args.seconds), "--period", str(PERIOD_S)]
    record = [sys.executable, "-m", "repro", "record", "--to", str(out / "record"), "--json"]
    record += ["--quiet-window", str(QUIET_WINDOW_S), "--", *serve]
    began_s = time.monotonic()
    with (out / "record.json").open("w") as to, (out / "record.txt").open("w") as lines:
        recorder = subprocess.Popen(record, env=environment(out / "entry_points"), cwd=ROOT, stdout=to, stderr=lines)
        looks: list[dict[str, Any]] = []
        while _running(recorder):
            if (out / "serve" / "up0").exists() and (out / "serve" / "up1").exists():
                looks += _look(out / "record")
    (out / "looks.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    notices = [line.strip() for line in (out / "record.txt").read_text().splitlines() if ": rank" in line]
    end = json.loads((out / "record.json").read_text() or "{}").get("verdict", "nothing")
    alarms = [f"at the end: {end}"] if end != "clean" else []
    alarms += [f"notice: {line}" for line in notices if line.split(":")[0] not in NO_ALARM or "(step " in line]
    alarms += [f"watch: {look['verdict']} {look['culprits']}: {look['sentences']}" for look in looks if _alarms(look)]
    print(f"{time.monotonic() - began_s:.0f} s, {len(looks)} looks: {_counts(looks)}; record ended with {end}")
    print(*(f"notice: {line}" for line in notices), sep="\n")
    print(*alarms, f"false alarms: {len(alarms)}", sep="\n")
    return int(bool(alarms) or recorder.returncode != 0)


def _running(recorder: subprocess.Popen[bytes]) -> bool:
    try:
        recorder.wait(LOOK_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _look(recording: Path) -> list[dict[str, Any]]:
    watch = [sys.executable, "-m", "repro", "watch", str(recording), "--json"]
    done = subprocess.run(watch, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.stdout:
        return [json.loads(done.stdout)]
    return [{"verdict": f"watch failed: {done.stderr[-300:]}", "culprits": [], "sentences": []}]


def _alarms(look: dict[str, Any]) -> bool:
    return bool(look["culprits"]) or look["verdict"] not in NO_ALARM


def _counts(looks: list[dict[str, Any]]) -> dict[str, int]:
    verdicts = [str(look["verdict"]) for look in looks]
    return {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))}


if __name__ == "__main__":
    sys.exit(main())
