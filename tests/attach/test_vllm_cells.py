"""The parts of the experiment `hmr cells`, without a server: cells, caches, when it looks, what it concludes."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path

import pytest

from hybrid_moe_ref.files import DamagedFile
from repro.attach.record import rank, start
from repro.attach.vllm.cells import caches, grid, hypotheses, outcome, trial
from repro.attach.vllm.cells.grid import COLD, CPU, DP_EP, DP_EP_EAGER, JIT, TP, TRITON, WARM, Cell
from repro.attach.vllm.cells.machine import Machine
from repro.attach.vllm.cells.outcome import Answer, Outcome
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.file import Tail, read
from repro.trace.witness.format import Kind

H200S = Machine(gpus=(9.0,) * 8, vllm="0.20.0", recorder=True, py_spy=True)
LAPTOP = Machine(vllm="0.32.0", recorder=True, py_spy=True)


def cell_of(layout: str = DP_EP, gdn: str = JIT, moe: str = JIT, cache: str = COLD) -> Cell:
    return Cell(8, layout, gdn, moe, cache)


# -- which cells there are -------------------------------------------------------------------------------------------


def test_eight_gpus_have_all_sixteen_cells_of_the_report_and_the_decisive_ones_come_first():
    cells = grid.all_cells(8, with_eager=False, on_a_cpu=False)
    assert len(set(cells)) == 16 and not any(map(H200S.why_not, cells))
    assert {(c.layout, c.gdn, c.moe, c.cache) for c in cells} == {
        (layout, gdn, moe, cache)
        for layout in (TP, DP_EP) for gdn in (JIT, TRITON) for moe in (JIT, TRITON) for cache in (COLD, WARM)
    }  # fmt: skip
    assert [c.name for c in cells[:4]] == [
        "dp8ep8-jit-jit-cold", "dp8ep8-jit-jit-warm", "tp8-triton-triton-cold", "tp8-triton-triton-warm",
    ]  # fmt: skip
    assert all(warm == replace(cold, cache=WARM) for cold, warm in zip(cells[::2], cells[1::2], strict=True))


def test_a_cell_has_the_flags_of_the_reports_commands():
    assert cell_of(TP, TRITON, TRITON).flags() == [
        "--tensor-parallel-size", "8", "--gdn-prefill-backend", "triton", "--moe-backend", "triton",
    ]  # fmt: skip
    assert cell_of(DP_EP_EAGER).flags()[:4] == [
        "--data-parallel-size",
        "8",
        "--enable-expert-parallel",
        "--enforce-eager",
    ]
    assert cell_of(DP_EP).flags()[-4:] == ["--gdn-prefill-backend", "flashinfer", "--moe-backend", "flashinfer_cutlass"]
    assert not {"--moe-backend", "--gdn-prefill-backend"} & set(cell_of(TP, CPU, CPU).flags())


def test_each_cell_that_a_machine_cannot_start_has_a_reason_with_what_to_change():
    assert "give --ranks 4" in replace(H200S, gpus=(9.0,) * 4).why_not(cell_of())
    assert "compute capability 9.0" in replace(H200S, gpus=(8.0,) * 8).why_not(cell_of())
    assert not replace(H200S, gpus=(8.0,) * 8).why_not(cell_of(gdn=TRITON))
    cells = grid.all_cells(2, with_eager=True, on_a_cpu=True)
    assert {c.name for c in cells if not LAPTOP.why_not(c)} == {
        "dp2ep2eager-cpu-cpu-cold", "dp2ep2eager-cpu-cpu-warm", "tp2-cpu-cpu-cold", "tp2-cpu-cpu-warm",
    }  # fmt: skip
    assert "GPU" in LAPTOP.why_not(cell_of()) and "eager" in LAPTOP.why_not(cell_of(DP_EP, CPU, CPU))


def test_prebuilt_modules_and_a_missing_py_spy_are_said():
    lines = " ".join(replace(H200S, prebuilt=True, py_spy=False).notes())
    assert "flashinfer-jit-cache" in lines and "pip install py-spy" in lines
    assert not H200S.notes()


def test_only_takes_the_cells_with_all_words():
    cells = grid.all_cells(8, with_eager=True, on_a_cpu=False)
    assert [c.name for c in grid.matching(cells, "TP8 triton cold")] == [
        "tp8-triton-triton-cold", "tp8-jit-triton-cold", "tp8-triton-jit-cold",
    ]  # fmt: skip
    assert not grid.matching(cells, "TP9") and len(grid.matching(cells, "")) == len(cells)


# -- caches ----------------------------------------------------------------------------------------------------------


def test_a_cold_start_has_a_new_folder_and_none_of_the_users_caches(tmp_path):
    first, second = caches.make(tmp_path, "a"), caches.make(tmp_path, "a")
    assert first != second
    theirs = dict.fromkeys((*caches.VARIABLES, *caches.UNSET), "/home/x")
    environment = caches.environment(first, {**theirs, "HF_HOME": "/home/x/hf"})
    assert environment.pop("HF_HOME") == "/home/x/hf"
    assert all(value.startswith(str(first)) and Path(value).is_dir() for value in environment.values())
    assert environment.keys() == caches.VARIABLES.keys()


def test_only_folders_of_the_experiment_are_removed(tmp_path):
    theirs = tmp_path / "flashinfer"
    (theirs / "cached_ops").mkdir(parents=True)
    caches.remove(theirs)
    made = caches.make(tmp_path, "a")
    (tmp_path / "link").symlink_to(made)
    caches.remove(tmp_path / "link")
    assert theirs.is_dir() and made.is_dir()
    caches.remove(made)
    assert not made.exists()


# -- what the answers mean -------------------------------------------------------------------------------------------

DEADLOCK = Answer("deadlock", "extra", (1,), (), ("rank 0 waits in dp", "rank 1 waits in ep"))
SLOW = Answer("slow", "", (3,), (), ("ranks 0-2 wait for lock x", "rank 3 builds x"))


@pytest.mark.parametrize(
    ("state", "recorder", "looks", "silent_s", "expected"),
    [
        (outcome.READY, None, [], 119.0, ("clean", ())),
        (outcome.READY, None, [SLOW], 400.0, ("slow", (3,))),
        (outcome.READY, None, [SLOW, Answer("clean")], 400.0, ("slow", (3,))),
        (outcome.READY, None, [], 400.0, ("slow", ())),
        (outcome.HUNG, DEADLOCK, [SLOW], 130.0, ("deadlock", (1,))),
        (outcome.HUNG, Answer("deadlock"), [DEADLOCK], 130.0, ("deadlock", (1,))),
        (outcome.HUNG, Answer("stall"), [DEADLOCK], 130.0, ("stall", ())),
        (outcome.HUNG, Answer("inconclusive"), [SLOW], 130.0, ("slow", (3,))),
        (outcome.LIMIT, None, [Answer("clean")], 0.0, ("slow", ())),
        (outcome.LIMIT, None, [SLOW], 130.0, ("slow", (3,))),
        (outcome.LIMIT, None, [], 0.0, ("inconclusive", ())),
        (outcome.ENDED, Answer("crash", "killed", (2,)), [], 0.0, ("crash", (2,))),
    ],
)
def test_the_class_of_a_start(state, recorder, looks, silent_s, expected):
    answer = outcome.conclude(state, recorder, looks, silent_s, window_s=120.0)
    assert (answer.verdict, answer.culprits) == expected


def test_the_place_is_that_of_the_culprit():
    assert DEADLOCK.where() == "rank 1 waits in ep" and SLOW.where() == "rank 3 builds x"
    assert Answer("stall", sentences=("all wait",)).where() == "all wait" and not Answer("clean").where()


def outcomes_of(**verdicts: str) -> dict[str, Outcome]:
    """Outcomes by name: "hung" or the class of a start that became ready."""
    return {
        name.replace("_", "-"): Outcome(name.replace("_", "-"), outcome.HUNG, "deadlock")
        if verdict == "hung"
        else Outcome(name.replace("_", "-"), outcome.READY, verdict)
        for name, verdict in verdicts.items()
    }


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        ({"dp8ep8_jit_jit_cold": "slow", "dp8ep8_jit_jit_warm": "clean"}, "only the cold start stalls: H1 or H2"),
        ({"dp8ep8_jit_jit_cold": "hung", "dp8ep8_jit_jit_warm": "hung", "tp8_jit_jit_warm": "clean"}, "H4 or H5"),
        ({"dp8ep8_jit_jit_cold": "slow", "dp8ep8_jit_jit_warm": "hung", "tp8_jit_jit_warm": "hung"}, "alone is not"),
        ({"dp8ep8_jit_jit_cold": "clean", "dp8ep8_jit_jit_warm": "hung"}, "only the warm start stalls"),
        ({"tp8_jit_jit_cold": "slow", "tp8_jit_jit_warm": "slow"}, "without expert parallelism: H3"),
        ({"dp8ep8_jit_jit_cold": "hung", "dp8ep8_jit_jit_warm": "hung"}, "nothing is known of TP"),
        ({"dp8ep8_jit_jit_cold": "clean", "dp8ep8_jit_jit_warm": "clean"}, "no stall"),
    ],
)
def test_the_table_says_which_hypothesis_remains(verdicts, words):
    cells = grid.all_cells(8, with_eager=False, on_a_cpu=False)
    assert words in " ".join(hypotheses.remaining(cells, outcomes_of(**verdicts)))


def test_a_second_start_with_an_incomplete_cache_is_no_evidence_about_warm_caches():
    cells = grid.all_cells(8, with_eager=False, on_a_cpu=False)
    found = outcomes_of(dp8ep8_jit_jit_cold="hung", dp8ep8_jit_jit_warm="hung", tp8_jit_jit_warm="clean")
    found["dp8ep8-jit-jit-warm"] = replace(found["dp8ep8-jit-jit-warm"], partial=True)
    (line,) = hypotheses.remaining(cells, found)
    assert "incomplete cache" in line and "H4" not in line


def test_starts_that_ended_by_themselves_say_nothing_about_a_stall():
    cells = grid.all_cells(8, with_eager=False, on_a_cpu=False)
    ended = {name: replace(each, state=outcome.ENDED) for name, each in outcomes_of(
        dp8ep8_jit_jit_cold="crash", dp8ep8_jit_jit_warm="clean").items()}  # fmt: skip
    assert hypotheses.remaining(cells, ended) == []


def test_a_damaged_outcome_is_named_with_its_file(tmp_path):
    Outcome("a", outcome.READY, "clean", culprits=(1,)).save(tmp_path)
    assert Outcome.load(tmp_path) == Outcome("a", outcome.READY, "clean", culprits=(1,))
    for text in ('{"name": 3, "state": "ready"}', '{"name": "a", "state": "gone"}', "{", "[]"):
        (tmp_path / outcome.FILE).write_text(text)
        with pytest.raises(DamagedFile, match=r"outcome\.json:1"):
            Outcome.load(tmp_path)


# -- when a server is looked at --------------------------------------------------------------------------------------


class FakeServer:
    """A server that is ready from ``ready_at`` on; its log grows at the times in ``log``."""

    pid = 7

    def __init__(self, clock: list[float], ready_at: float = 1e9, log: tuple[float, ...] = ()) -> None:
        self.clock, self.ready_at, self.log = clock, ready_at, log

    def ready(self) -> bool:
        return self.clock[0] >= self.ready_at

    def log_bytes(self) -> int:
        return sum(at <= self.clock[0] for at in self.log)


class FakeTail:
    """A witness whose rank recorded events at ``times``."""

    def __init__(self, clock: list[float], times: tuple[float, ...]) -> None:
        self.clock, self.times = clock, times

    def last_event_ns(self) -> int:
        return int(max((at for at in self.times if at <= self.clock[0]), default=0) * 1e9)


def ticks_of(
    monkeypatch, seconds: float, server: dict, events: tuple[float, ...] = (), limit_s: float = 1e9, loads=(0.0, 0.0)
):
    """Tick once a second for so long; returns the state and the times of the looks. The window is 120 s.

    loads   begin and end of the phase "load"

    The trial itself is left in ``ticks_of.trial``.
    """
    clock, looked = [1000.0], []
    phase = ("load", "profile")
    monkeypatch.setattr(trial, "phase_of", lambda tail: phase[not loads[0] <= clock[0] - 1000 < loads[1]])
    monkeypatch.setattr(trial.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(trial.looks, "collect", lambda pid, to: (looked.append(clock[0] - 1000), (SLOW, ""))[1])
    how = trial.Start((), {}, 0, 120.0, limit_s)
    started = trial.Trial("a", how, Path("a"), lambda: False, lambda text: None)
    shifted = {key: tuple(1000 + at for at in v) if key == "log" else 1000 + v for key, v in server.items()}
    started._server, started._began_s = FakeServer(clock, **shifted), 1000.0
    ticks_of.trial = started
    tails = [FakeTail(clock, tuple(1000 + at for at in events))] if events else []
    while not started._state and clock[0] < 1000 + seconds:
        started._tick(tails)
        clock[0] += 1
    return started._state, looked


def test_a_server_is_looked_at_after_the_window_and_each_time_the_silence_has_doubled(monkeypatch):
    assert ticks_of(monkeypatch, 1000, {}, events=(5,)) == ("", [125, 245, 485, 965])


def test_events_of_a_rank_end_a_silence(monkeypatch):
    assert ticks_of(monkeypatch, 400, {}, events=(5, 100, 200, 310)) == ("", [])
    assert ticks_of(monkeypatch, 400, {}, events=(5, 200, 210)) == ("", [125, 330])


def test_before_the_first_rank_begins_the_silence_is_that_of_the_log(monkeypatch):
    assert ticks_of(monkeypatch, 300, {"log": (1, 90)}) == ("", [210])
    assert ticks_of.trial._silent_s == 0, "no rank waits yet: the time for imports is no stall"
    assert ticks_of(monkeypatch, 300, {"log": (1, 90)}, events=(220,)) == ("", [210])
    assert ticks_of.trial._silent_s == 79


def test_a_silence_in_which_a_checkpoint_is_read_is_no_stall(monkeypatch):
    assert ticks_of(monkeypatch, 1000, {"ready_at": 700}, events=(5, 600), loads=(5, 600)) == ("ready", [])
    assert ticks_of(monkeypatch, 1000, {}, events=(5, 300), loads=(5, 300)) == ("", [420, 540, 780])


def test_the_phase_of_a_rank_is_that_of_its_last_event(tmp_path):
    recorder = Recorder.open(tmp_path / "rank000.wit", 0, 1, run_id="x")
    tail = Tail(tmp_path / "rank000.wit")
    assert trial.phase_of(tail) == ""
    recorder.phase("load")
    assert trial.phase_of(tail) == "load"
    recorder.phase("profile")
    recorder.local("build_begin", "a module")
    assert trial.phase_of(tail) == "profile"


def test_a_server_that_becomes_ready_is_not_looked_at_again(monkeypatch):
    assert ticks_of(monkeypatch, 1000, {"ready_at": 130}, events=(5,)) == ("ready", [125])


def test_a_start_that_is_never_ready_is_looked_at_and_given_up_at_its_limit(monkeypatch):
    every = tuple(float(at) for at in range(1, 400))
    assert ticks_of(monkeypatch, 1000, {}, events=every, limit_s=300) == ("limit", [300])


# -- what the recorder sees of a build -------------------------------------------------------------------------------


def test_a_rank_that_builds_a_module_of_flashinfer_is_recorded_with_the_modules_name(tmp_path, monkeypatch):
    """With a stand-in of flashinfer.jit.core, whose ``run_ninja`` has the arguments of FlashInfer 0.6.8 and 0.7.2."""
    (tmp_path / "events").mkdir()
    recorder = Recorder.open(tmp_path / "events" / "rank000.wit", 0, 1, run_id="x")
    monkeypatch.setattr(rank, "current", rank.Rank(recorder, 0, tmp_path))
    ran = []
    core = types.SimpleNamespace(run_ninja=lambda build_dir, ninja_path, verbose: ran.append(ninja_path))
    start.HOOKS["flashinfer.jit.core"](core)
    core.run_ninja(tmp_path, tmp_path / "gdn_prefill_sm90" / "build.ninja", False)
    witness = read(tmp_path / "events" / "rank000.wit")
    events = [(event.kind, witness.text(event.sig)) for event in witness.events()]
    name = "FlashInfer module gdn_prefill_sm90"
    assert events[-2:] == [(Kind.BUILD_BEGIN, name), (Kind.BUILD_END, name)] and len(ran) == 1
