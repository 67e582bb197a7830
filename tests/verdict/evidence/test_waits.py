"""The wait-for graph of a verdict: whole, with its reasons, in the document, and the same wherever it is shown."""

from __future__ import annotations

import json

from reported import write_hang
from rich.console import Console
from scene import MS, Scene
from serving import eight_ranks, held, look

from hybrid_moe_ref.parallel.observer import Collective
from repro import report
from repro.bundle.issue import issue
from repro.commands.cli import main
from repro.report import terminal
from repro.report.gather import gather
from repro.store.run_dir import write_json
from repro.verdict import judge
from repro.verdict.result import Wait
from repro.watch.document import read_document

DP = Collective("dp", "all_reduce", "step", (64,), "int32", "sum")
EP = Collective("ep", "all_reduce", "layers.0.moe", (8,), "int32", "sum")
TP = Collective("tp", "all_reduce", "layers.0.moe", (8,), "int32", "sum")


def waits_of(scene: Scene, **options) -> list[tuple]:
    verdict = judge(
        scene.witnesses(), num_ranks=scene.num_ranks, now_ns=scene.now_ns + 1_200 * MS, quiet_window_s=1.0, **options
    )
    return [(wait.ranks, wait.waits_in, wait.awaited, wait.why) for wait in verdict.waits]


def test_the_graph_holds_the_ranks_that_wait_for_a_cycle_too() -> None:
    scene = Scene(4, {"dp": (0, 1), "ep": (0, 1), "tp": (0, 2, 3)})
    scene.enter((2, 3), TP)
    scene.enter((0,), DP)
    scene.enter((1,), EP)
    assert waits_of(scene) == [
        ((0,), "dp all_reduce #1", (1,), "rank 1 has not issued it"),
        ((1,), "ep all_reduce #1", (0,), "rank 0 has not issued it"),
        ((2, 3), "tp all_reduce #1", (0,), "rank 0 has not issued it"),
    ]


def test_each_reason_names_its_own_ranks() -> None:
    scene = Scene(5, {"dp": range(5)})
    scene.enter((0, 1), DP)
    scene.recorders[1].failed("ValueError: x")
    scene.recorders[2].local("heartbeat", "works")
    witnesses = {rank: witness for rank, witness in scene.witnesses().items() if rank != 3}
    verdict = judge(witnesses, num_ranks=5, now_ns=scene.now_ns + 2_000 * MS, quiet_window_s=1.0)
    why = "ranks 2,4 have not issued it; rank 1 has issued it and cannot go on; rank 3 left no whole witness"
    assert verdict.waits == (Wait((0,), "dp all_reduce #1", (1, 2, 3, 4), why),)


def test_a_lock_without_an_owner_among_the_ranks_is_named_as_such() -> None:
    made = eight_ranks()
    for recorder in made.recorders[1:]:
        recorder.local("lock_wait", "/l", holder=4711)
    (of_process,) = look(made, lock_holders=held("/l", 4711)).waits
    assert of_process == Wait(tuple(range(1, 8)), "lock /l", (), "process 4711, which is no rank, holds it")
    (of_nobody,) = look(made, lock_holders=held("/l", 0)).waits
    assert of_nobody.why == "no process holds it any more"
    made.recorders[0].local("lock_held", "/l")
    (of_rank,) = look(made, lock_holders=held("/l", 100)).waits
    assert (of_rank.awaited, of_rank.why) == ((0,), "rank 0 holds it")


def test_members_with_different_sizes_wait_for_each_other() -> None:
    scene = Scene(2, {"dp": (0, 1)})
    scene.enter((0,), DP)
    scene.enter((1,), DP._replace(sizes=(65,)))
    (wait,) = waits_of(scene)
    assert wait[2] == (0, 1) and wait[3] == "it was issued with different sizes"
    assert "wait for each other" in Wait(*wait).words()


def test_all_in_one_collective_that_every_member_has_issued_wait_for_no_rank() -> None:
    scene = Scene(2, {"dp": (0, 1)})
    scene.enter((0, 1), DP)
    assert waits_of(scene) == [((0, 1), "dp all_reduce #1", (), "every member has issued it")]


def test_page_issue_and_terminal_say_the_same_waits_as_the_document(tmp_path, capsys) -> None:
    root, _ = write_hang(tmp_path)
    document = read_document(root / "verdict.json")
    words = [wait.words() for wait in document.waits]
    assert words == [
        "ranks 0-2 in dp all_reduce #4 wait for 3: rank 3 has not issued it",
        "rank 3 in ep all_gather_v #5 waits for 0-2: ranks 0-2 have not issued it",
    ]
    facts = report.write(root)
    assert main(["watch", str(root)]) in (0, 1)
    watched = capsys.readouterr().out
    terminal.summary(Console(width=200), [document])
    shown = capsys.readouterr().out
    page, picture = ((root / name).read_text() for name in ("report.html", "timeline.svg"))
    for sentence in words:
        assert sentence in issue(facts, []) and sentence in picture, sentence
        assert sentence in watched and f"fault: {sentence}" in shown, sentence
        assert sentence[1:] in page, sentence


def test_the_waits_of_a_document_of_an_older_version_are_its_cycle(tmp_path) -> None:
    root, _ = write_hang(tmp_path)
    document = json.loads((root / "verdict.json").read_text())
    del document["waits"]
    write_json(root / "verdict.json", document)
    shown = gather(root).verdict.waits
    assert [list(wait.ranks) for wait in shown] == [link["ranks"] for link in document["cycle"]] != []


def test_the_graph_of_many_ranks_at_many_places_stays_a_small_document(monkeypatch) -> None:
    num_ranks = 300
    monkeypatch.setattr("repro.verdict.evidence.edges.MOST_RANKS", 2_000)
    scene = Scene(num_ranks, {"dp": range(num_ranks)})
    for rank in range(num_ranks - 1):  # each but the last is one collective further than the next
        for _ in range(min(rank, 30)):
            scene.all_of((rank,), DP)
        scene.enter((rank,), DP)
    waits = waits_of(scene)
    assert 0 < sum(len(wait[0]) + len(wait[2]) for wait in waits) <= 2_000
