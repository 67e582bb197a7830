"""Serve with the stand-in: two engines, each with a worker. Prints the exit codes of the engines.

python front_end.py FOLDER fork|spawn
"""

import json
import multiprocessing
import os
import sys
import time
import types
from pathlib import Path


def engine(rank, folder):
    os.environ.update(json.loads(os.environ.get(f"RANK{rank}", "{}")))
    log = os.open(Path(folder) / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 2)
    from repro.attach.vllm.guard.plugin import register

    register()
    if patience_s := os.environ.get("STAND_IN_PARENT_FIRST_S"):
        from repro.attach.vllm.guard.ending import guard_thread, stop

        guard_thread.PARENT_FIRST_S = stop.EXPLAIN_S = float(patience_s)
    from vllm.config.parallel import ParallelConfig
    from vllm.v1.engine.core import DPEngineCoreProc

    core = DPEngineCoreProc(types.SimpleNamespace(parallel_config=ParallelConfig(rank, 2)), folder)
    try:
        core.run()
    finally:
        core.shutdown()


def orphans():
    """The processes of this session whose parent, an engine, has ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended
            continue
        if int(session) == os.getsid(0) and state != "Z" and int(parent) != os.getpid() != int(path.parent.name):
            found.append(int(path.parent.name))
    return found


def main():
    folder, method = Path(sys.argv[1]), sys.argv[2]
    os.environ["METHOD"] = method
    context = multiprocessing.get_context(method)
    engines = [context.Process(target=engine, args=(rank, str(folder))) for rank in (0, 1)]
    for process in engines:
        process.start()
    deadline = time.monotonic() + 220
    while any(process.is_alive() for process in engines) and time.monotonic() < deadline:
        time.sleep(0.02)
    ended_s = time.monotonic()
    while orphans() and time.monotonic() < min(ended_s + 60, deadline):  # workers that still have to end themselves
        time.sleep(0.02)
    codes = [process.exitcode for process in engines]
    print(json.dumps({"codes": codes, "ended": ended_s, "orphans": len(orphans())}), flush=True)
    for process in engines:
        process.kill()


if __name__ == "__main__":
    main()
