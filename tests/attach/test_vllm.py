"""The plug-in of vLLM, with stand-ins of vLLM's classes: what it records, and that it never disturbs the server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
import types
from pathlib import Path

import pytest

from hybrid_moe_ref.parallel.observer import Collective
from repro.attach.record import groups
from repro.attach.record import rank as this
from repro.attach.vllm import exchange, hooks, worker
from repro.attach.vllm.processes import engine, front, mirror, notes
from repro.attach.vllm.processes.notes import Activity, Note
from repro.attach.vllm.qualified import at_exit, qualified
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.file import read
from repro.trace.witness.format import Kind
from repro.verdict import judge

ROOT = Path(__file__).parents[2]
ENTRY_POINTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
    "vllm.general_plugins"
]
CONFIG = types.SimpleNamespace(world_size=1, data_parallel_size=2, world_size_across_dp=2, data_parallel_rank=0)
AGREEMENT = Collective("dp.cpu", "all_reduce", "step", (8,), "int32", "sum")
DISPATCH = Collective("dp", "all_gather_v", "model.layers.0.mlp.experts", (5, 10), "bfloat16")
COMBINE = Collective("dp", "reduce_scatter_v", "model.layers.0.mlp.experts", (5, 10), "bfloat16")


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function that makes the worker of a rank, with the notes of its engine."""
    (tmp_path / "events").mkdir()
    monkeypatch.setattr(worker, "current", None)
    monkeypatch.setattr(engine, "current", None)
    monkeypatch.setattr(this, "_ended", False)

    def worker_of(number: int) -> tuple[worker.Worker, notes.Notes]:
        recorder = Recorder.open(tmp_path / "events" / f"rank{number:03d}.wit", number, 2, run_id="x")
        rank = this.Rank(recorder, number, tmp_path)
        monkeypatch.setattr(this, "current", rank)
        return worker.Worker(rank, CONFIG), notes.create(tmp_path, number)

    return worker_of


def execute(at: worker.Worker, *collectives: Collective, live: int = 1) -> None:
    """One execution of the model with these collectives, the first of which is the step agreement."""
    at.begin_execution(live)
    assert at.begin_step()
    recorder = at.rank.recorder
    for number, collective in enumerate(collectives):
        recorder.enter(collective)
        recorder.leave(collective)
        if number == 0:
            at.agreed((0, 0))
    at.progress.executing = False


def ask(at: worker.Worker, engine_notes: notes.Notes, answered: bool = True) -> None:
    """The engine asks; the worker learns of that while it is idle, or at the next message."""
    engine_notes[Note.ASKED] += 1
    engine_notes[Note.ANSWERED] += answered
    assert at.mirror is not None
    at.mirror.since_ns = time.monotonic_ns() - 2 * mirror.IDLE_NS
    at.mirror.note_idle()


def witness_of(tmp_path: Path, number: int):
    return read(tmp_path / "events" / f"rank{number:03d}.wit")


def verdict_of(tmp_path: Path, num_ranks: int = 2):
    witnesses = {number: witness_of(tmp_path, number) for number in range(num_ranks)}
    return judge(witnesses, num_ranks=num_ranks, now_ns=time.monotonic_ns() + 10**10, quiet_window_s=1.0)


def test_a_rank_whose_engine_left_out_an_execution_is_the_culprit_of_a_deadlock_through_four_processes(make, tmp_path):
    for number, executions in ((0, 5), (1, 5)):
        at, engine_notes = make(number)
        for _ in range(executions):
            execute(at, AGREEMENT, DISPATCH, COMBINE)
            engine_notes[Note.COUNTED] += 1
        if number == 0:
            engine_notes[Note.COUNTED] += 1  # the sixth, which it did not request
            engine_notes[Note.SKIPPED] += 1
            engine_notes[Note.FIRST] = 3
            ask(at, engine_notes, answered=False)
        else:
            at.begin_execution(1)
            at.begin_step()
            at.rank.recorder.enter(AGREEMENT)
            engine_notes[Note.ACTIVITY] = Activity.WAITS_FOR_WORKER
    verdict = qualified(verdict_of(tmp_path), tmp_path)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "skipped", (0,)), verdict
    line = "rank 0: engine left out execution 3, although the engine had counted this execution"
    assert line in verdict.evidence
    assert verdict.confidence == "certain", "the engine's own count, and no habit, shows it"
    places = {position.rank: (position.group, position.seq) for position in verdict.ranks}
    assert places == {0: ("engines", 1), 1: ("dp.cpu", 6)}
    assert any("ended step 5 without dp.cpu all_reduce of step" in line for line in verdict.evidence), verdict.evidence


def test_one_more_agreement_in_a_layer_is_named_with_the_layer_by_the_rank_s_own_habit(make, tmp_path):
    for number in (0, 1):
        at, _ = make(number)
        for _ in range(4):
            execute(at, AGREEMENT, DISPATCH, COMBINE)
        at.begin_execution(1)
        at.begin_step()
        recorder = at.rank.recorder
        recorder.enter(AGREEMENT)
        recorder.leave(AGREEMENT)
        at.agreed((0, 0))
        recorder.enter(AGREEMENT._replace(layer="model.layers.0.linear_attn") if number == 1 else DISPATCH)
    verdict = qualified(verdict_of(tmp_path), tmp_path)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "extra", (1,)), verdict
    assert verdict.confidence == "likely" and any("vLLM declares no schedule" in line for line in verdict.evidence)
    assert any("model.layers.0.linear_attn" in line for line in verdict.evidence), verdict.evidence


def test_executions_that_vary_are_not_declared(make, tmp_path):
    at, _ = make(0)
    for _ in range(4):
        execute(at, AGREEMENT, DISPATCH, COMBINE)
    execute(at, AGREEMENT, DISPATCH)
    execute(at, AGREEMENT, DISPATCH, COMBINE)
    execute(at, AGREEMENT, DISPATCH, COMBINE)
    witness = witness_of(tmp_path, 0)
    declared = [witness.schedule(event.sig) for event in witness.events() if event.kind == Kind.STEP]
    whole = tuple((each.group, each.op, each.layer) for each in (DISPATCH, COMBINE))
    assert declared.count(whole) == 2, "the fourth execution declares the habit, the fifth breaks it, no other follows"


def test_a_question_between_two_executions_is_no_part_of_what_the_rank_declares(make, tmp_path):
    at, engine_notes = make(0)
    for _ in range(6):
        execute(at, AGREEMENT, DISPATCH)
        ask(at, engine_notes)
        at.mirror.woken()
    witness = witness_of(tmp_path, 0)
    declared = [witness.schedule(event.sig) for event in witness.events() if event.kind == Kind.STEP]
    assert declared[-2:] == [(tuple(AGREEMENT[:3]),), (tuple(DISPATCH[:3]),)]
    assert sum(group.issued for group in witness.groups if group.name == mirror.GROUP) == 6


def test_an_idle_worker_says_whether_its_engine_waits_for_requests(make, tmp_path, monkeypatch):
    at, engine_notes = make(0)
    execute(at, AGREEMENT)
    engine_notes[Note.ACTIVITY] = Activity.WAITS_FOR_REQUESTS
    now_ns = time.monotonic_ns()
    monkeypatch.setattr(mirror, "time", types.SimpleNamespace(monotonic_ns=lambda: now_ns))
    at.mirror.since_ns = now_ns - mirror.IDLE_NS + 1
    at.mirror.note_idle()
    assert witness_of(tmp_path, 0).text(witness_of(tmp_path, 0).last.phase) == "serve", "not idle for long enough"
    at.mirror.since_ns -= 1
    at.mirror.note_idle()
    at.mirror.note_idle()
    witness = witness_of(tmp_path, 0)
    phases = [witness.text(event.phase) for event in witness.events() if event.kind == Kind.PHASE]
    assert phases == ["serve", "idle, engine waits for requests"]
    at.mirror.woken()
    witness = witness_of(tmp_path, 0)
    assert witness.text(witness.last.phase) == "serve"


def test_a_rank_whose_engine_waits_for_requests_is_a_suspect_and_no_culprit(make, tmp_path):
    for number in (0, 1):
        at, engine_notes = make(number)
        execute(at, AGREEMENT)
        if number == 0:
            at.begin_execution(1)
            at.begin_step()
            at.rank.recorder.enter(AGREEMENT)
        else:
            engine_notes[Note.ACTIVITY] = Activity.WAITS_FOR_REQUESTS
            at.mirror.since_ns = time.monotonic_ns() - 2 * mirror.IDLE_NS
            at.mirror.note_idle()
    verdict = qualified(verdict_of(tmp_path), tmp_path)
    assert (verdict.verdict, verdict.culprits, verdict.suspects) == ("slow", (), (1,)), verdict
    assert any(line.startswith("rank 1 waits for requests") for line in verdict.evidence), verdict.evidence


@pytest.mark.parametrize(
    ("activity", "line"),
    [
        (Activity.EXITS, "waits at exit for its engine, which waits for requests: no deadlock, but the program never"),
        (Activity.WAITS_FOR_OUTPUTS, "the front end of ranks 0,1 waits for outputs that its engine does not work on"),
        (Activity.WORKS, "ranks 0,1 are idle, and the engines wait for requests: an idle server looks like this"),
    ],
)
def test_ranks_that_are_all_idle_are_nobody_s_fault_and_their_front_ends_say_why(make, tmp_path, activity, line):
    for number in (0, 1):
        at, engine_notes = make(number)
        execute(at, AGREEMENT)
        engine_notes[Note.ACTIVITY] = Activity.WAITS_FOR_REQUESTS
        notes.create(tmp_path, number, notes.FRONT)[Note.ACTIVITY] = activity
        at.mirror.since_ns = time.monotonic_ns() - 2 * mirror.IDLE_NS
        at.mirror.note_idle()
    judged = verdict_of(tmp_path)
    verdict = qualified(judged, tmp_path)
    assert (verdict.verdict, verdict.culprits, verdict.suspects) == ("inconclusive", (), ()), verdict
    assert any(line in text for text in verdict.evidence), verdict.evidence
    assert bool(at_exit(judged)) == (activity == Activity.EXITS)


def test_a_front_end_notes_what_it_waits_for_and_that_it_exits(tmp_path, monkeypatch):
    (tmp_path / "events").mkdir()
    monkeypatch.setattr(front, "current", None)
    monkeypatch.setattr(front, "_owner_pid", 0)
    monkeypatch.setattr(this, "folder", lambda num_ranks: tmp_path)
    exits = []
    monkeypatch.setattr(front.util, "Finalize", lambda owner, function, exitpriority: exits.append(function))
    seen = []

    def look(self, *args, **options):
        theirs = notes.open_notes(tmp_path, 0, notes.FRONT)
        seen.append(Activity(theirs[Note.ACTIVITY]) if theirs else None)

    config = types.SimpleNamespace(parallel_config=CONFIG)
    front.starting(look)(None, False, vllm_config=config)
    front.receiving(look)(None)
    look(None)
    exits[0]()
    look(None)
    assert seen == [Activity.STARTS_ENGINE, Activity.WAITS_FOR_OUTPUTS, Activity.WORKS, Activity.EXITS]
    assert notes.open_notes(tmp_path, 0, notes.FRONT)[Note.PID] == os.getpid()
    front.starting(look)(None, False, vllm_config=config)  # another client in this process
    monkeypatch.setattr(front, "_owner_pid", 0)
    front.starting(look)(None, False, vllm_config=config)  # another front end of the rank: the first one is kept


def test_answered_questions_are_recorded_in_order_when_the_engine_s_next_message_comes(make, tmp_path):
    at, engine_notes = make(0)
    execute(at, AGREEMENT)
    engine_notes[Note.ASKED] = engine_notes[Note.ANSWERED] = 2
    at.mirror.since_ns = time.monotonic_ns()
    at.mirror.woken()
    execute(at, AGREEMENT)
    witness = witness_of(tmp_path, 0)
    groups = [group.name for group in witness.groups]
    order = [(groups[e.group], e.seq, Kind(e.kind)) for e in witness.events() if e.kind in (Kind.ENTER, Kind.LEAVE)]
    assert order == [
        ("dp.cpu", 1, Kind.ENTER), ("dp.cpu", 1, Kind.LEAVE),
        ("engines", 1, Kind.ENTER), ("engines", 1, Kind.LEAVE), ("engines", 2, Kind.ENTER), ("engines", 2, Kind.LEAVE),
        ("dp.cpu", 2, Kind.ENTER), ("dp.cpu", 2, Kind.LEAVE),
    ]  # fmt: skip


def test_an_exception_of_the_model_is_recorded_and_raised_as_it_was(make, tmp_path, monkeypatch):
    at, _ = make(0)
    monkeypatch.setattr(worker, "current", at)

    def execute_model(self, scheduler_output):
        raise RuntimeError("no memory")

    scheduled = types.SimpleNamespace(total_num_scheduled_tokens=3, num_scheduled_tokens={"a": 3})
    with pytest.raises(RuntimeError, match="no memory"):
        worker.executing(execute_model)(None, scheduled)
    witness = witness_of(tmp_path, 0)
    assert (witness.last.kind, witness.text(witness.last.sig)) == (Kind.FAILED, "RuntimeError: no memory")


def test_a_worker_is_done_when_its_shutdown_begins_and_nothing_follows(make, tmp_path, monkeypatch):
    at, _ = make(0)
    execute(at, AGREEMENT)
    worker.ending(lambda self: worker.current and worker.current.phase("late"))(None)
    assert this.current is None
    witness = witness_of(tmp_path, 0)
    assert witness.last.kind == Kind.DONE


def test_the_engine_counts_executions_and_those_that_it_did_not_request(tmp_path, monkeypatch):
    (tmp_path / "events").mkdir()
    mine = notes.create(tmp_path, 0)
    monkeypatch.setattr(engine, "current", mine)
    monkeypatch.setattr(engine, "_requested", False)
    count = engine.counting(lambda self, unfinished: unfinished)
    dummy = engine.requesting_dummy(lambda self: None)
    execute_model = engine.requesting(lambda self, scheduled: None)
    for request in (dummy, None, dummy):
        if request:
            request(None)
        assert count(None, True)
    execute_model(None, types.SimpleNamespace(total_num_scheduled_tokens=0))
    assert not count(None, False), "an execution without tokens runs no model"
    theirs = notes.open_notes(tmp_path, 0)
    assert theirs is not None
    numbers = [theirs[note] for note in (Note.COUNTED, Note.SKIPPED, Note.FIRST, Note.WAVES)]
    assert numbers == [4, 2, 2, 1]


def test_a_hook_that_dynamo_traces_does_nothing_while_torch_compiles(make, monkeypatch):
    at, _ = make(0)
    monkeypatch.setattr(worker, "current", at)
    monkeypatch.setattr("torch.compiler.is_dynamo_compiling", lambda: True)
    monkeypatch.setattr(at, "rank", None)  # its use would fail
    assert worker.in_layer("prefix")(lambda self: 7)(None) == 7
    assert exchange.exchanging("all_gather_v", 1)(lambda self, rows: rows)(None, 8) == 8


def test_a_hook_that_this_vllm_lacks_is_one_line_and_the_others_stand(capsys):
    module = types.ModuleType("vllm.config.parallel")

    class ParallelConfig:  # vLLM 0.20
        @staticmethod
        def has_unfinished_dp(group, unfinished):
            return unfinished

    module.ParallelConfig = ParallelConfig
    present = next(hook for hook in hooks.HOOKS if hook.module == "vllm.config.parallel")
    missing = present._replace(names=("ParallelConfig.gone",))
    hooks._apply([missing, present], module)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "no ParallelConfig.gone in vllm.config.parallel" in lines[0], lines
    assert isinstance(vars(ParallelConfig)["has_unfinished_dp"], staticmethod)
    assert ParallelConfig.has_unfinished_dp.__wrapped__ is not None
    assert ParallelConfig.has_unfinished_dp(None, True) is True


@pytest.mark.parametrize("name", sorted(ENTRY_POINTS))
def test_without_its_variable_an_entry_point_imports_nothing_of_ours_but_its_module(name):
    module = ENTRY_POINTS[name].partition(":")[0]
    code = (
        f"import sys; from {module} import register; register()\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('repro', 'hybrid_moe_ref', 'vllm')))"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("HMR_")}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    parts = module.split(".")
    expected = [".".join(parts[: length + 1]) for length in range(len(parts))]
    assert done.stdout.strip() == str(expected), done.stdout + done.stderr


def test_a_recording_that_begins_after_torch_was_imported_replaces_what_torch_distributed_exports(monkeypatch):
    module, package = types.ModuleType("fake.distributed.c10d"), types.ModuleType("fake.distributed")
    module.new_group = package.new_group = lambda: "group"
    package.other = module.new_group
    monkeypatch.setitem(sys.modules, "fake.distributed", package)
    groups.replace_function(module, "new_group", lambda original: lambda: f"recorded {original()}")
    assert (module.new_group(), package.new_group(), package.other()) == ("recorded group", "recorded group", "group")
