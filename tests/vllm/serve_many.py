"""Serve several trials one after another, each by serve.py in a process that is forked from one that has imported vLLM.

    python tests/vllm/serve_many.py TRIALS.json

Run it with the interpreter of vLLM's environment. The file has a list of trials:

    out        folder of the trial; waves: as of serve.py; deadline: seconds
    variables  environment variables of all ranks; ranks: those of each rank, by number
    until      texts; the trial ends 3 s after all of them stand in the ranks' logs

Writes OUT/trial.json: the exit code, and for each process when it was first and last seen alive.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import serve

AFTER_S = 3.0
POLL_S = 0.05


def main() -> int:
    serve._with_libgomp()
    trials = json.loads(Path(sys.argv[1]).read_text())
    serve._preload()
    for trial in trials:
        began_s = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _run(trial)
        result = _watch(pid, trial)
        (Path(trial["out"]) / "trial.json").write_text(json.dumps(result))
        print(f"{Path(trial['out']).name}: {result['code']} after {time.monotonic() - began_s:.0f} s", flush=True)
    return 0


def _run(trial: dict[str, Any]) -> None:
    """Become serve.py for this trial."""
    os.environ.update(trial.get("variables", {}))
    original, ranks = serve._serve, trial.get("ranks", {})

    def _serve(rank: int, model: Path, args: Any) -> None:
        os.environ.update(ranks.get(str(rank), {}))
        original(rank, model, args)

    serve._serve = _serve
    sys.argv = ["serve.py", "--out", trial["out"], "--deadline", str(trial["deadline"]), "--waves", *trial["waves"]]
    code = 1
    try:
        code = serve.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def _watch(pid: int, trial: dict[str, Any]) -> dict[str, Any]:
    """Wait for the trial; end it by SIGTERM once its logs have what it waits for."""
    out, seen_s = Path(trial["out"]), 0.0
    lives: dict[int, list[Any]] = {}
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        now_s = time.monotonic()
        for child in serve.descendants(pid):
            name = _name(child)
            if name:
                life = lives.setdefault(child, [name, now_s, now_s])
                life[0], life[2] = name, now_s
        if done:
            return {"code": os.waitstatus_to_exitcode(status), "lives": lives}
        if trial.get("until") and not seen_s and _stands(out, trial["until"]):
            seen_s = now_s
        if seen_s and now_s - seen_s > AFTER_S:
            with contextlib.suppress(OSError):
                os.kill(pid, 15)
            seen_s = now_s + 1e6
        time.sleep(POLL_S)


def _name(pid: int) -> str:
    """The title of a live process; "" for one that has ended."""
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state not in "ZX":
            return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()[:60]
    return ""


def _stands(out: Path, texts: list[str]) -> bool:
    logs = "".join(path.read_text(errors="replace") for path in out.glob("rank*.log"))
    return all(text in logs for text in texts)


if __name__ == "__main__":
    sys.exit(main())
