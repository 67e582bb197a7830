"""Serve with the stand-in: two engines, each with a worker. Prints the exit codes of the engines.

python front_end.py FOLDER fork|spawn
"""

import json
import multiprocessing
import os
import socket
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
    from vllm.config.parallel import ParallelConfig
    from vllm.v1.engine.core import DPEngineCoreProc

    core = DPEngineCoreProc(types.SimpleNamespace(parallel_config=ParallelConfig(rank, 2)), folder)
    try:
        core.run()
    finally:
        core.shutdown()


def main():
    folder, method = Path(sys.argv[1]), sys.argv[2]
    os.environ["METHOD"] = method
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(probe.getsockname()[1]))
    context = multiprocessing.get_context(method)
    engines = [context.Process(target=engine, args=(rank, str(folder))) for rank in (0, 1)]
    for process in engines:
        process.start()
    deadline = time.monotonic() + 220
    while any(process.is_alive() for process in engines) and time.monotonic() < deadline:
        time.sleep(0.02)
    print(json.dumps({"codes": [process.exitcode for process in engines], "ended": time.monotonic()}), flush=True)
    for process in engines:
        process.kill()


if __name__ == "__main__":
    main()
