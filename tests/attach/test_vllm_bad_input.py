"""The recorder in a server that is not as expected: the server serves on, and each gap is one line."""

from __future__ import annotations

import errno
import os
import textwrap
import time
from pathlib import Path

import pytest

from hybrid_moe_ref.parallel.observer import Collective
from repro.attach.record import rank as this
from repro.attach.vllm import harmless, hooks, worker
from repro.attach.vllm.processes import engine, mirror, notes
from repro.attach.vllm.qualified import qualified
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.file import read, read_dir
from repro.trace.witness.format import Kind
from repro.verdict import judge

ROOT = Path(__file__).parents[2]
CALL = Collective("dp.cpu", "all_reduce", "step", (8,), "int32", "sum")

SERVER = '''
"""A stand-in of a server of vLLM: front end, engine and worker of two ranks, started by {method}."""
import multiprocessing, os, sys, types
from repro.attach.vllm.plugin import register

CONFIG = types.SimpleNamespace(world_size=1, data_parallel_size=2, world_size_across_dp=2, data_parallel_rank=0)
VLLM = types.SimpleNamespace(parallel_config=CONFIG)


def worker(rank):
    register()  # as each process of vLLM does
    from repro.attach.record import rank as this
    from vllm.v1.executor.multiproc_executor import WorkerProc
    from vllm.v1.worker.gpu_worker import Worker
    this.become(rank, 2)  # torch.distributed would
    CONFIG.data_parallel_rank = rank
    made = Worker()
    made.vllm_config = VLLM
    made.init_device()
    made.load_model()
    made.execute_model(types.SimpleNamespace(total_num_scheduled_tokens=3, num_scheduled_tokens={{"a": 3}}))
    WorkerProc().shutdown()


def engine(rank, context):
    register()
    from vllm.v1.engine.core import DPEngineCoreProc
    CONFIG.data_parallel_rank = rank
    DPEngineCoreProc()._init_data_parallel(VLLM)
    child = context.Process(target=worker, args=(rank,))
    child.start()
    child.join()
    assert child.exitcode == 0


def front_end(rank):
    register()
    from vllm.v1.engine.core_client import MPClient
    context = multiprocessing.get_context("{method}")
    CONFIG.data_parallel_rank = rank
    MPClient(VLLM)
    child = context.Process(target=engine, args=(rank, context))
    child.start()
    child.join()
    assert child.exitcode == 0


if __name__ == "__main__":
    front_end(int(sys.argv[1]))
    print("served")
'''

CLASSES = {
    "vllm.v1.worker.gpu_worker": "class Worker:\n" + "".join(
        f"    def {name}(self, *args): pass\n"
        for name in ("init_device", "load_model", "determine_available_memory", "initialize_from_config",
                     "compile_or_warm_up_model", "execute_model", "execute_dummy_batch")
    ),
    "vllm.v1.executor.multiproc_executor": "class WorkerProc:\n    def shutdown(self): pass\n"
    "class MultiprocExecutor:\n    def execute_model(self): pass\n    def execute_dummy_batch(self): pass\n",
    "vllm.v1.engine.core": "class EngineCoreProc:\n    def _process_input_queue(self): pass\n"
    "class DPEngineCoreProc(EngineCoreProc):\n    def _init_data_parallel(self, config): pass\n"
    "    def _has_global_unfinished_reqs(self, unfinished): return unfinished\n",
    "vllm.v1.engine.core_client": "class MPClient:\n    def __init__(self, config): pass\n"
    "class SyncMPClient(MPClient):\n    def get_output(self): pass\n",
}  # fmt: skip


def make_vllm(folder: Path, classes: dict[str, str]) -> None:
    """Write a package vllm with all modules that have hooks; those without text are empty."""
    for name in {hook.module for hook in hooks.HOOKS}:
        path = folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(classes.get(name, ""))
    for path in [folder / "vllm", *(folder / "vllm").rglob("*")]:
        if path.is_dir() and not (path / "__init__.py").exists():
            (path / "__init__.py").touch()


@pytest.fixture
def run(programs, tmp_path):
    """A function that runs a server to its end."""

    def run(code: str, *arguments: str, **variables: str):
        (tmp_path / "server.py").write_text(textwrap.dedent(code))
        env = {name: value for name, value in os.environ.items() if not name.startswith("HMR_")}
        env |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", **variables}
        return programs.run(tmp_path / "server.py", *arguments, env=env)

    return run


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_processes_of_a_rank_are_recorded_however_they_are_started(run, tmp_path, method):
    make_vllm(tmp_path, CLASSES)
    for rank in ("0", "1"):
        done = run(SERVER.format(method=method), rank, HMR_RECORD=str(tmp_path / "rec"))
        assert done.stdout == "served\n", done.stderr
    written = sorted(path.name for path in (tmp_path / "rec" / "events").iterdir())
    assert written == [f"rank00{rank}.{kind}" for rank in (0, 1) for kind in ("engine", "front", "wit")]
    for witness in read_dir(tmp_path / "rec" / "events")[0].values():
        phases = [witness.text(event.phase) for event in witness.events() if event.kind == Kind.PHASE]
        assert phases == ["start", "load", "start", "serve"] and witness.last.kind == Kind.DONE


def test_a_vllm_without_any_of_the_hooks_serves_and_each_hook_is_one_line(run, tmp_path):
    make_vllm(tmp_path, {})
    modules = sorted({hook.module for hook in hooks.HOOKS})
    code = f"""
        import importlib
        from repro.attach.vllm.plugin import register
        register()
        register()  # vLLM may call it again
        for name in {modules}:
            importlib.import_module(name)
        print("served")
    """
    done = run(code, HMR_RECORD=str(tmp_path / "rec"))
    assert (done.returncode, done.stdout) == (0, "served\n"), done.stderr
    lines = [line for line in done.stderr.splitlines() if "this vLLM has no" in line]
    assert len(lines) == len(set(lines)) == len(hooks.HOOKS), done.stderr
    assert done.stderr.splitlines() == lines


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_cache_that_cannot_be_written_is_one_line_of_the_server_which_is_recorded_in_python(run, tmp_path, method):
    make_vllm(tmp_path, CLASSES)
    (tmp_path / "file").touch()
    variables = {"HMR_RECORD": str(tmp_path / "rec"), "XDG_CACHE_HOME": str(tmp_path / "file")}
    done = run(SERVER.format(method=method), "0", **variables)
    assert done.stdout == "served\n", done.stderr
    lines = [line for line in done.stderr.splitlines() if "this vLLM has no" not in line]
    assert len(lines) == 1 and "without the compiled hooks" in lines[0], lines
    (witness,) = read_dir(tmp_path / "rec" / "events")[0].values()
    assert witness.last.kind == Kind.DONE


@pytest.mark.parametrize("place", ["/proc/rec", "{tmp}/file/rec"])
def test_a_folder_that_cannot_be_written_is_a_line_for_each_process_and_the_server_serves(run, tmp_path, place):
    make_vllm(tmp_path, CLASSES)
    (tmp_path / "file").touch()
    done = run(SERVER.format(method="fork"), "0", HMR_RECORD=place.format(tmp=tmp_path))
    assert done.stdout == "served\n", done.stderr
    lines = [line for line in done.stderr.splitlines() if "this vLLM has no" not in line]
    assert len(lines) == 3 and all("not recorded" in line for line in lines), lines


def test_a_full_disk_ends_the_recording_of_a_rank_and_nothing_else(tmp_path, monkeypatch, capsys):
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(this, "_base", tmp_path)
    monkeypatch.setattr(this, "_owner_pid", 0)
    monkeypatch.setattr(this, "current", None)
    monkeypatch.setattr(engine, "current", None)
    monkeypatch.setattr(engine, "_owner_pid", 0)
    monkeypatch.setattr(harmless, "_reported", set())
    this.become(0, 2)
    engine.begin(type("Config", (), {"world_size_across_dp": 2, "data_parallel_rank": 0, "world_size": 1}))
    assert this.current is None and engine.current is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("No space left on device" in line for line in lines), lines


def test_a_step_agreement_of_another_form_is_one_line_and_its_result_is_unchanged(tmp_path, monkeypatch, capsys):
    (tmp_path / "events").mkdir()
    rank = this.Rank(Recorder.open(tmp_path / "events" / "rank000.wit", 0, 2, run_id="x"), 0, tmp_path)
    config = type("Config", (), {"world_size": 1, "data_parallel_size": 1, "world_size_across_dp": 2})
    monkeypatch.setattr(worker, "current", worker.Worker(rank, config))
    monkeypatch.setattr(harmless, "_reported", set())
    for _ in range(2):
        assert worker.agreeing(lambda: "rows of a later version")() == "rows of a later version"
    (line,) = capsys.readouterr().err.splitlines()
    assert "after a step agreement is not recorded" in line and "the server is not affected" in line


def test_an_exception_of_vllm_is_not_taken_for_one_of_the_recorder(tmp_path):
    with pytest.raises(KeyboardInterrupt), harmless.Harmless("anything"):
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="of the model"):
        engine.constructing(_failing)(None, None)


def _failing(*args: object) -> None:
    raise RuntimeError("of the model")


def test_a_rank_without_the_plug_in_is_asked_for_and_nobody_is_a_culprit(tmp_path):
    (tmp_path / "events").mkdir()
    recorder = Recorder.open(tmp_path / "events" / "rank000.wit", 0, 2, run_id="x")
    recorder.groups({"dp.cpu": (0, 1), mirror.GROUP: (0, 1)})
    recorder.phase("serve")
    recorder.enter(CALL)
    witnesses = {0: read(tmp_path / "events" / "rank000.wit")}
    judged = judge(witnesses, num_ranks=2, now_ns=time.monotonic_ns() + 10**10, quiet_window_s=1.0)
    verdict = qualified(judged, tmp_path)
    assert (verdict.verdict, verdict.culprits, verdict.confidence) == ("inconclusive", (), "undecided"), verdict
    assert any("rank 1 left no witness" in line and "HMR_RECORD" in line for line in verdict.evidence), verdict.evidence


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "1e300"])
def test_a_quiet_window_that_is_no_number_is_a_line_and_the_default(monkeypatch, capsys, text):
    monkeypatch.setenv("HMR_QUIET_WINDOW", text)
    assert this._quiet_window_s() == this.QUIET_WINDOW_S
    assert f"HMR_QUIET_WINDOW={text} is not a number of seconds above 0" in capsys.readouterr().err


def test_notes_whose_file_is_empty_are_none(tmp_path):
    (tmp_path / "events").mkdir()
    notes.path_of(tmp_path, 0).touch()  # the disk was full
    assert notes.open_notes(tmp_path, 0) is None
