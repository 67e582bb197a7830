"""The guard in real processes with gloo: two ranks, each an engine and a worker, in the form of vLLM's (stand_in/)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)
DEADLINE_S = 250.0
"""On a busy machine the processes take long to start."""

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


class Served:
    """What a run of the stand-in left."""

    def __init__(self, folder: Path, printed: str) -> None:
        self.codes = json.loads(printed)["codes"]
        self.ended_s = json.loads(printed)["ended"]
        assert json.loads(printed)["orphans"] == 0, "workers outlived their engines"
        logs = [(folder / f"rank{rank}.log").read_text() for rank in (0, 1)]
        self.lines = [[line for line in log.splitlines() if "repro guard" in line] for log in logs]
        self.logs = "\n".join(logs)
        outputs = [folder / f"outputs{rank}.json" for rank in (0, 1)]
        self.outputs = [json.loads(path.read_text()) if path.exists() else None for path in outputs]

    def refusals(self) -> list[set[str]]:
        """The sentences that the processes of each rank printed."""
        return [{line.partition("refused: ")[2] for line in lines if "refused: " in line} for lines in self.lines]


@pytest.fixture
def serve(programs) -> Callable[..., Served]:
    """A function that serves with the stand-in until both engines have ended."""

    def serve(folder: Path, method: str = "fork", **variables: str) -> Served:
        path = os.pathsep.join(map(str, (HERE / "stand_in", ROOT)))
        env = {**os.environ, "PYTHONPATH": path, **variables}
        folder.mkdir(exist_ok=True)
        done = programs.run(HERE / "stand_in" / "front_end.py", str(folder), method, env=env, timeout_s=DEADLINE_S)
        assert done.returncode == 0, done.stderr[-2000:]
        return Served(folder, done.stdout)

    return serve


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.full)])
def test_with_the_guard_a_server_gives_the_outputs_that_it_gives_without(serve, tmp_path, method):
    plain = serve(tmp_path / "plain")
    guarded = serve(tmp_path / "guarded", method, HMR_GUARD="agree")
    assert plain.codes == guarded.codes == [0, 0], guarded.logs[-3000:]
    assert plain.outputs == guarded.outputs and len(plain.outputs[0]) == 40
    assert not any(plain.lines)
    for lines in guarded.lines:
        assert any("agree: all 2 ranks are guarded" in line for line in lines)
        assert any("prepare: all ranks are ready" in line for line in lines)


def test_a_killed_worker_ends_all_processes_with_its_name(serve, tmp_path):
    # only the worker's engine knows the signal, and on a busy machine it speaks late
    served = serve(tmp_path, HMR_GUARD="agree", STAND_IN_FAULT="killed", STAND_IN_PARENT_FIRST_S="20")
    killed_s = float((tmp_path / "killed").read_text())
    assert served.codes == [86, 86], served.logs[-3000:]
    for sentences in served.refusals():
        assert len(sentences) == 1, served.logs[-3000:]
        (sentence,) = sentences
        assert sentence.startswith("rank 1 is gone: its worker (pid "), served.logs[-3000:]
        assert sentence.endswith("was ended by SIGKILL"), served.logs[-3000:]
    print(f"all gone {served.ended_s - killed_s:.2f} s after the kill, load {os.getloadavg()[0]:.0f}")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("extra", "rank 1 would issue dp.cpu all_reduce of the step agreement (refused before it was issued)"),
        ("skipped", "rank 0 left out execution 13: its engine counted 13 executions and requested 12"),
        ("raises", "rank 1 failed: RuntimeError: no memory"),
        ("engine", "rank 1 failed: its engine raised ValueError: no such request"),
    ],
)
def test_a_fault_of_one_rank_stops_both_with_one_sentence_and_the_exit_code(serve, tmp_path, fault, words):
    served = serve(tmp_path, HMR_GUARD="agree", STAND_IN_FAULT=fault, HMR_GUARD_DIR=str(tmp_path / "evidence"))
    assert served.codes == [86, 86], served.logs[-3000:]
    first, second = served.refusals()
    assert first == second and len(first) == 1 and next(iter(first)).startswith(words), (first, second)
    kept = [json.loads(line) for line in (tmp_path / "evidence" / "guard.jsonl").read_text().splitlines()]
    assert {line["sentence"] for line in kept} == first and len(kept) >= 3


def test_a_rank_without_the_plug_in_ends_the_start_of_the_others(serve, tmp_path):
    served = serve(tmp_path, HMR_GUARD="agree", HMR_GUARD_DEADLINE="3", RANK1=json.dumps({"HMR_GUARD": ""}))
    assert served.codes[0] == 86, served.logs[-3000:]
    ((sentence,), nothing) = served.refusals()
    assert sentence.startswith("rank 1 did not answer within 3 s: it may lack the plug-in") and not nothing


@pytest.mark.full
def test_ranks_in_different_modes_do_not_start_and_observe_serves_on(serve, tmp_path):
    served = serve(tmp_path / "differ", HMR_GUARD="agree", RANK1=json.dumps({"HMR_GUARD": "observe"}))
    assert served.codes[0] == 86 and "HMR_GUARD is agree on rank 0, observe on rank 1" in served.logs
    alone = serve(
        tmp_path / "observe", HMR_GUARD="observe", HMR_GUARD_DEADLINE="2", RANK1=json.dumps({"HMR_GUARD": ""})
    )
    assert alone.codes == [0, 0], alone.logs[-3000:]
    assert "would refuse: rank 1 did not answer within 2 s" in alone.logs and "the guard is off" in alone.logs
