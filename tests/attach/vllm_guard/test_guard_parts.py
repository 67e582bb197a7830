"""Small parts of the guard: digests, the sequence of a rank, the board, the end of a process, the hooks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import pytest
import torch

from repro.attach.vllm.guard import engine, hooks, worker
from repro.attach.vllm.guard.ending.stop import TELL_S, Refused, Stop
from repro.attach.vllm.guard.meeting import board, settings
from repro.attach.vllm.guard.meeting.board import RING, Field
from repro.attach.vllm.guard.schedule.entry import as_words, digest_of, entry_of
from repro.attach.vllm.guard.schedule.guard import kind_of
from repro.attach.vllm.guard.schedule.post import Post, difference
from repro.attach.vllm.guard.schedule.stream import MAX_SENT, Stream

AGREEMENT = entry_of("dp.cpu", "all_reduce", "the step agreement")
DISPATCH, COMBINE = entry_of("ep", "all_gather_v", "0"), entry_of("ep", "reduce_scatter_v", "0")


def step(stream: Stream, *entries, kind=(0, 0)) -> list[bool]:
    """One step; returns whether each entry, with its agreement first, departed from the schedule."""
    departs = [stream.departs(AGREEMENT, ends=True)]
    stream.append(AGREEMENT)
    stream.agreed(kind)
    for entry in entries:
        departs.append(stream.departs(entry))
        stream.append(entry)
    return departs


def test_a_digest_is_the_same_in_every_process_and_fits_two_int32():
    code = "from repro.attach.vllm.guard.schedule.entry import digest_of; print(digest_of('ep'))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert int(other.stdout) == digest_of("ep")
    for digest in (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, digest_of("x")):
        words = torch.tensor(as_words(digest), dtype=torch.int32)
        low, high = (int(word) & 0xFFFFFFFF for word in words)
        assert low | high << 32 == digest


def test_a_schedule_is_expected_after_three_equal_steps_and_no_longer_after_a_departure():
    stream = Stream()
    before = stream.expected()
    for _ in range(3):
        assert step(stream, DISPATCH, COMBINE) == [False] * 3
    step(stream, DISPATCH, COMBINE)
    assert stream.expected() != before
    assert step(stream, DISPATCH, DISPATCH) == [False, False, True]
    assert stream.departed == stream.count - 1
    step(stream, DISPATCH, COMBINE)
    assert stream.expected() == before, "the kind varies"
    assert step(stream, COMBINE) == [False, False]


def test_an_agreement_before_the_end_of_the_schedule_departs_from_it():
    stream = Stream()
    for _ in range(5):
        step(stream, DISPATCH, COMBINE)
    step(stream, DISPATCH)
    assert stream.departs(AGREEMENT, ends=True)


def test_steps_of_another_kind_have_a_schedule_of_their_own():
    one, other = Stream(), Stream()
    for _ in range(5):
        step(one, DISPATCH, COMBINE)
        step(other, DISPATCH, COMBINE)
        assert step(one, kind=(0, 2)) == [False]
    assert one.expected() != other.expected()


def test_a_long_past_is_dropped_and_the_numbers_stay():
    stream = Stream()
    for _ in range(3 * MAX_SENT):
        step(stream, DISPATCH, COMBINE)
    first, entries = stream.last()
    assert len(entries) == MAX_SENT and first + len(entries) == stream.count == 9 * MAX_SENT
    assert entries[-1] is COMBINE


def test_the_kind_of_a_step_is_the_lowest_graph_mode_and_microbatch_of_all_ranks():
    assert kind_of([[5, 1], [8, 8], [1, 0], [2, 2]]) == (0, 2)
    assert kind_of([[0, 0]] * 5) is None
    assert kind_of([[5, 1], [2, 1], [0, 0], [0, 0], [1, 1], [3, 3], [0, 0]]) == (1, 1)


def test_three_ranks_of_which_one_leaves_the_schedule():
    posts = [Post(rank, 4, (("ep", "all_gather_v", "0"),)) for rank in (0, 2)]
    posts.append(Post(1, 4, (), next=("ep", "broadcast", "1"), departed=4))
    expected = (
        "rank 1 would issue ep broadcast of 1 (refused before it was issued); the agreed schedule has ep all_gather_v "
        "of 0, which ranks 0,2 issued"
    )
    assert difference(posts) == expected
    assert difference(posts[:2]) == ""
    assert Post.read(posts[2].text()) == posts[2]


def test_entries_that_only_one_rank_still_knows_are_not_compared():
    assert difference([Post(0, 0, (("a", "b", ""),)), Post(1, 1, (("c", "d", ""),))]) == ""


# -- the board -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.delenv(board.VARIABLE, raising=False)
    made = board.create()
    yield made
    os.close(int(os.environ.pop(board.VARIABLE).rpartition("/")[2]))


def test_a_spawned_child_finds_the_board_of_its_engine_and_the_engine_the_store_of_its_worker(fresh):
    code = (
        "from repro.attach.vllm.guard.meeting import board; mine = board.inherited(); mine.meet_at('10.0.0.7', 29500); "
        "print(mine.counted_at(1), mine.executions(), mine.questions())"
    )
    fresh[Field.COUNTED] = 7
    fresh.request()
    fresh[Field.ASKED] = 2
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.stdout.split("\n")[0] == "7 (1, 7) (2, 0)", done.stderr
    assert fresh.meeting() == ("10.0.0.7", 29500)


def test_a_count_is_known_for_the_last_requests_only(fresh):
    assert fresh.counted_at(0) == -1 and fresh.counted_at(1) == -1
    for number in range(1, RING + 5):
        fresh.request()
        assert fresh.counted_at(number) == number - 1
        fresh[Field.COUNTED] += 1
    assert fresh.counted_at(3) == -1 and fresh.counted_at(RING + 5) == -1


def test_without_an_engine_there_is_no_board(monkeypatch):
    monkeypatch.setenv(board.VARIABLE, "/proc/1/fd/99999")
    assert board.inherited() is None


# -- the engine ------------------------------------------------------------------------------------------------------


class FakeGuardThread:
    def __init__(self) -> None:
        self.refused: list[str] = []
        self.stop = types.SimpleNamespace(explain=lambda error: None)

    def refuse_here(self, sentence: str) -> None:
        self.refused.append(sentence)


@pytest.fixture
def guard_thread(fresh, monkeypatch):
    found = FakeGuardThread()
    monkeypatch.setattr(engine, "current", fresh)
    monkeypatch.setattr(engine, "guard_thread", found)
    monkeypatch.setattr(engine, "_rank", 0)
    monkeypatch.setattr(engine, "_counts_requests", False)
    return found


def test_an_engine_that_counts_an_execution_that_it_did_not_request_is_refused_at_once(guard_thread):
    core = types.SimpleNamespace(model_executor=types.SimpleNamespace(is_sleeping=False))
    count, dummy = engine.counting(lambda self: True), engine.requesting_dummy(lambda self: None)
    execute = engine.requesting(lambda self, scheduled: None)
    for number in range(1, 5):
        if number % 2:
            execute(None, types.SimpleNamespace(total_num_scheduled_tokens=3))
        else:
            dummy(None)
        assert count(core)
    assert not guard_thread.refused
    execute(None, types.SimpleNamespace(total_num_scheduled_tokens=0))
    count(core)
    count(core)
    assert guard_thread.refused == [
        "rank 0 left out execution 5: its engine counted 5 executions and requested 4 of its worker, so the other "
        "ranks would wait for rank 0 in their step agreement"
    ]


def test_a_sleeping_engine_and_one_whose_requests_are_not_seen_are_not_refused(guard_thread):
    count = engine.counting(lambda self: True)
    count(types.SimpleNamespace())
    engine.requesting_dummy(lambda self: None)(None)
    for _ in range(3):
        count(types.SimpleNamespace(model_executor=types.SimpleNamespace(is_sleeping=True)))
    assert not guard_thread.refused


def test_an_engine_that_fails_speaks_before_its_front_end_hears_of_it(guard_thread):
    heard: list[str] = []
    guard_thread.fail = heard.append
    send = engine.dying(lambda self: heard.append("told"))
    try:
        raise RuntimeError("cancelled")
    except RuntimeError:
        send(None)
    assert heard == ["rank 0 failed: its engine raised RuntimeError: cancelled", "told"]


# -- the end ---------------------------------------------------------------------------------------------------------


def test_a_refusal_is_printed_once_and_kept_as_evidence(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HMR_GUARD_DIR", str(tmp_path / "evidence"))
    stop = Stop("rank 1", True, leave=lambda code: None)
    stop.begin("rank 0 is gone")
    stop.begin("another reason")
    assert capfd.readouterr().err == "[rank 1] repro guard: refused: rank 0 is gone\n"
    (line,) = (tmp_path / "evidence" / "guard.jsonl").read_text().splitlines()
    assert json.loads(line)["sentence"] == "rank 0 is gone" and json.loads(line)["pid"] == os.getpid()


def test_after_a_refusal_the_front_end_is_told_first_and_the_others_have_time_to_read_the_reason(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("HMR_GUARD_DIR", str(tmp_path))
    kept_before: list[bool] = []
    waited: list[float] = []
    stop = Stop(
        "rank 0", True, lambda code: None, clock=iter([10.0, 10.1]).__next__, wait=waited.append,
        tell=lambda: kept_before.append((tmp_path / "guard.jsonl").exists()),
    )  # fmt: skip
    stop.begin("rank 1 could not prepare")
    assert kept_before == [False] and (tmp_path / "guard.jsonl").exists(), "a slow disk does not delay the front end"
    assert str(stop.refused()) == "rank 1 could not prepare"
    assert waited == [pytest.approx(TELL_S - 0.1)], "the store is in this process, and is gone after the exception"


def test_a_folder_that_cannot_be_written_changes_nothing(monkeypatch):
    monkeypatch.setenv("HMR_GUARD_DIR", "/proc/nowhere")
    Stop("rank 1", True).observe("x")


def test_a_collective_that_fails_because_a_peer_is_gone_raises_the_reason():
    stop = Stop("rank 1", True, leave=lambda code: None)
    stop.begin("rank 0 is gone")
    with pytest.raises(Refused, match="rank 0 is gone"):
        stop.explain(RuntimeError("Connection reset by peer"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_of_multiprocessing_ends_with_the_guard_s_exit_code(method, tmp_path):
    code = (
        "import multiprocessing as mp\n"
        "from repro.attach.vllm.guard.ending.stop import Stop\n"
        "def work():\n"
        "    Stop('rank 1', True).begin('rank 0 is gone')\n"
        "    raise RuntimeError('as vLLM would')\n"
        "if __name__ == '__main__':\n"
        f"    p = mp.get_context('{method}').Process(target=work); p.start(); p.join(); print(p.exitcode)\n"
    )
    (tmp_path / "program.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "86", done.stderr


# -- hooks -----------------------------------------------------------------------------------------------------------


def test_a_missing_hook_is_one_line_and_an_essential_one_ends_the_start(monkeypatch, capfd):
    monkeypatch.setattr(worker, "missing", [])
    module = types.ModuleType("vllm.distributed.parallel_state")
    module.GroupCoordinator = type(
        "GroupCoordinator", (), {"__init__": lambda self: None, "all_gatherv": lambda self: 1}
    )
    hooks._apply([hook for hook in hooks.HOOKS if hook.module == module.__name__], module)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all(
        "repro guard: this vLLM has no GroupCoordinator.reduce_scatterv" in line for line in lines
    )
    assert worker.missing == ["vllm.distributed.parallel_state.GroupCoordinator.reduce_scatterv"]
    config = types.SimpleNamespace()
    sentence = settings.judge({0: settings.ballot(config, "agree", worker.missing, False)})
    assert "set HMR_GUARD=observe, or unset it" in sentence and "reduce_scatterv" in sentence


def test_without_a_guard_the_hooks_only_call_the_original(monkeypatch):
    monkeypatch.setattr(worker, "current", None)
    assert worker.exchanging("all_gather_v")(lambda self, rows: rows)(None, 8) == 8
    assert worker.calling("all_reduce")(lambda self: 7)(None) == 7
    assert worker.executing(lambda self, scheduled: 6)(None, None) == 6
    assert worker.in_layer("prefix")(lambda self: 5)(None) == 5
    calls = []
    dist = types.SimpleNamespace(all_reduce=lambda *args, **options: calls.append((args, options)), barrier=3)
    wide = worker.widening(dist)
    wide.all_reduce("rows", group="g")
    assert calls == [(("rows",), {"group": "g"})] and wide.barrier == 3 and worker.widening(wide) is wide


def test_dynamo_sees_only_the_original(monkeypatch):
    monkeypatch.setattr(worker, "current", object())
    monkeypatch.setattr("torch.compiler.is_dynamo_compiling", lambda: True)
    assert worker.exchanging("all_gather_v")(lambda self: 7)(None) == 7
    assert worker.in_layer("prefix")(lambda self: 5)(None) == 5


@pytest.mark.parametrize("value", [None, "on"])
def test_without_its_variable_the_plug_in_imports_nothing_of_ours_but_itself(value):
    code = (
        "import sys; from repro.attach.vllm.guard.plugin import register; register()\n"
        "ours = ('repro', 'hybrid_moe_ref', 'vllm', 'torch')\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ours))"
    )
    env = {name: text for name, text in os.environ.items() if not name.startswith("HMR_")}
    env |= {"HMR_GUARD": value} if value else {}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=env, capture_output=True, text=True)
    prints = ["repro.attach.notice"] if value else []
    packages = ["repro", "repro.attach", *prints, "repro.attach.vllm", "repro.attach.vllm.guard"]
    assert done.stdout.strip() == str([*packages, "repro.attach.vllm.guard.plugin"]), done.stdout + done.stderr
    assert bool(value) == ("set it to observe or agree" in done.stderr)


@pytest.mark.parametrize(
    ("program", "engine_code", "expected"), [("vllm", 86, 86), ("vllm", 1, 3), ("offline.py", 86, 3)]
)
def test_vllm_s_own_server_ends_with_the_exit_code_of_a_refused_engine_and_other_programs_as_they_like(
    program, engine_code, expected
):
    code = (
        "import multiprocessing as mp, os, sys, time, types\n"
        "from repro.attach.vllm.guard import frontend\n"
        f"sys.argv[0] = '/usr/bin/{program}'\n"
        "engine = mp.get_context('fork').Process(target=os._exit, args=(" + str(engine_code) + ",))\n"
        "engine.start()\n"
        "manager = types.SimpleNamespace(processes=[engine])\n"
        "frontend.monitoring(lambda self: engine.join())(manager)\n"
        f"time.sleep({60 if expected == 86 else 1})\n"  # the guard waits before it ends a server, and says so before
        "os._exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == expected, done.stderr
    assert ("ends with exit code 86" in done.stderr) == (expected == 86)
