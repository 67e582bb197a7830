"""The witness file: what a reader gets back, from whole files, torn ones and such as never were one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from scene import Scene
from witness_sample import GATHER, REDUCE, TINY, sample

from hybrid_moe_ref.parallel.observer import Collective
from repro.trace.knowledge import WITNESS, Knows
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.compact import compact
from repro.trace.witness.file import Tail, WitnessError, create, parse, read, read_dir
from repro.trace.witness.format import (
    COLUMNS,
    FIXED,
    KNOWS_AT,
    LIVE_AT,
    RECORD,
    SEALED,
    VARIABLE,
    VERSION,
    Event,
    Geometry,
    Identity,
    Kind,
    column,
)
from repro.verdict import judge


def test_what_was_recorded_is_read_back() -> None:
    witness = sample().witnesses()[0]
    assert witness.problems == ()
    assert witness.complete
    assert [Kind(event.kind).name for event in witness.events()][:3] == ["PHASE", "ENTER", "LEAVE"]
    last = witness.last
    assert last is not None
    assert witness.signature(last.sig) == ("ep", "all_gather_v", "layers.0.mlp", "float32", "")
    assert witness.sizes(last.vector, last.num_sizes) == (3, 0, 2, 1)
    assert witness.text(last.phase) == "serve"
    assert [(g.name, g.members, g.issued, g.left) for g in witness.groups] == [
        ("dp", (0, 1, 2, 3), 3, 3),
        ("ep", (0, 1, 2, 3), 4, 3),
    ]


def test_a_wrapped_ring_keeps_the_newest_events_and_the_last_of_each_group() -> None:
    scene = sample()
    for _ in range(40):
        scene.all_of(range(4), REDUCE)
    witness = scene.witnesses()[0]
    assert witness.problems == ()
    assert witness.num_events == 94
    assert witness.first_event == 94 - TINY.ring_records + 1
    assert [g.issued for g in witness.groups] == [43, 4]
    ep = witness.groups[1]
    assert ep.last is not None
    assert (ep.left, witness.sizes(ep.last.vector, ep.last.num_sizes)) == (3, (3, 0, 2, 1))


def test_ranks_with_equal_schedules_have_equal_rolling_hashes() -> None:
    scene = sample()
    hashes = [[group.hash for group in witness.groups] for witness in scene.witnesses().values()]
    assert hashes[1] == hashes[2] == hashes[3]
    assert hashes[0][1] != hashes[1][1]


def test_a_wrong_pairing_older_than_the_ring_is_seen_by_the_hash() -> None:
    send, receive = (Collective("ep", op, "", (4,), "float32", "", peer) for op, peer in (("send", 1), ("recv", 0)))
    for calls in ((GATHER, GATHER, GATHER, GATHER), (send, receive)):
        scene = Scene(4, {"dp": range(4), "ep": range(4)}, shape=TINY)
        for rank, call in enumerate(calls):
            for number in range(50):
                scene.all_of([rank], call._replace(dtype="int32") if (rank, number) == (1, 3) else call)
        verdict = judge(scene.witnesses(), num_ranks=4, now_ns=scene.now_ns + 2 * 10**9, quiet_window_s=1.0)
        assert (verdict.verdict, verdict.culprits, verdict.confidence) == ("corrupt", (), "undecided"), calls
        assert "as their rolling hashes differ" in " ".join(verdict.evidence)


def test_a_full_string_area_costs_names_but_no_events() -> None:
    scene = Scene(1, {"dp": [0]}, shape=Geometry(64, 64, 32, 4))
    scene.phase("a phase with a name that does not fit into so few bytes")
    scene.all_of([0], REDUCE)
    witness = scene.witnesses()[0]
    assert witness.num_events == 3
    assert judge({0: witness}, num_ranks=1, now_ns=0, quiet_window_s=1.0).ranks[0].phase == "?"


def test_a_directory_gives_the_good_files_and_names_the_bad(tmp_path: Path) -> None:
    for rank in range(3):
        (tmp_path / f"rank{rank:03d}.wit").write_bytes(sample().files[rank])
    (tmp_path / "rank001.wit").write_bytes(b"")
    os.mkfifo(tmp_path / "rank003.wit")  # nobody writes to it, so a reader that waited would wait for ever
    (tmp_path / "rank004.wit").write_bytes(sample().files[0])
    (tmp_path / "rank005.wit").mkdir()
    witnesses, refused = read_dir(tmp_path)
    assert sorted(witnesses) == [0, 2]
    assert "rank001.wit:0:" in refused[0]
    assert "rank003.wit:0: not a regular file" in refused[1]
    assert "already the witness of" in refused[2]
    assert refused[3] == f"{tmp_path}/rank005.wit:0: not a regular file"
    with pytest.raises(WitnessError, match="not a regular file"):
        Tail(tmp_path / "rank003.wit")


def test_a_tail_follows_a_live_file(tmp_path: Path) -> None:
    path = tmp_path / "rank000.wit"
    create(path, Identity(0, 2, "run"), TINY)
    tail = Tail(path)
    assert (tail.num_events(), tail.last_event_ns(), tail.writer().pid) == (0, 0, 0)
    recorder = Recorder.open(path, 0, 2)
    recorder.groups({"dp": (0, 1)})
    recorder.enter(REDUCE)
    assert tail.num_events() == 1
    assert tail.last_event_ns() > 0
    assert tail.writer().pid == os.getpid()
    assert tail.witness().writer.run_id == "run"
    recorder.local("heartbeat", "build")
    assert tail.num_events() == 1
    assert tail.heartbeat_ns() >= tail.last_event_ns()
    tail.close()


def test_a_file_is_made_whole_and_only_once(tmp_path: Path) -> None:
    path = tmp_path / "rank000.wit"
    create(path, Identity(0, 1), TINY)
    assert path.stat().st_blocks * 512 >= TINY.file_bytes
    assert read(path).num_events == 0
    with pytest.raises(FileExistsError):
        create(path, Identity(0, 1), TINY)


def test_a_witness_says_which_aspects_its_recorder_writes(tmp_path):
    path = tmp_path / "rank000.wit"
    Recorder.open(path, 0, 2, knows=Knows.ORDER | Knows.TIME).done()
    assert read(path).knows == Knows.ORDER | Knows.TIME
    assert parse(compact(path.read_bytes(), "x"), "x").knows == Knows.ORDER | Knows.TIME


def test_a_witness_without_that_word_shows_all_that_recorders_wrote_before_it(tmp_path):
    path = tmp_path / "rank000.wit"
    Recorder.open(path, 0, 2).done()
    data = bytearray(path.read_bytes())
    data[KNOWS_AT:LIVE_AT] = bytes(LIVE_AT - KNOWS_AT)
    assert parse(bytes(data), "x").knows == WITNESS


def test_the_layout_of_a_record_is_that_of_its_version() -> None:
    """Files of this version are read on other machines and later: another layout needs another version."""
    layout = [part.format for part in (RECORD, FIXED, VARIABLE, SEALED)]
    assert (VERSION, *layout) == (2, "<qIHHHHBxxxQQQQqII", "<qIHHHHBxxx", "<QQQQqI", "<24s44sI")
    record = bytes(range(RECORD.size))
    for name, (code, _) in COLUMNS.items():
        value = getattr(Event._make(RECORD.unpack(record)), name)
        assert column(record * 3, name) == [value] * 3, (name, code)


def test_the_last_kind_of_each_collective_is_that_of_the_newest_event_still_known() -> None:
    dp, ep = ("dp", (0, 1, 2, 3)), ("ep", (0, 1, 2, 3))
    short = sample(rounds=1).witnesses()
    assert short[0].last_kinds() == {(dp, 1): Kind.LEAVE, (ep, 1): Kind.LEAVE, (ep, 2): Kind.ENTER}
    assert short[1].last_kinds() == {(dp, 1): Kind.LEAVE, (ep, 1): Kind.LEAVE}
    scene = sample(rounds=2)
    for _ in range(20):
        scene.all_of([1], REDUCE)
    kinds = scene.witnesses()[1].last_kinds()
    assert kinds.pop((ep, 2)) == Kind.ENTER, "overwritten in the ring, and kept in the group's slot"
    assert set(kinds) == {(dp, seq) for seq in range(7, 23)} and set(kinds.values()) == {Kind.LEAVE}


def test_a_group_without_a_slot_is_known_to_be_possible_once_all_slots_are_taken() -> None:
    for num_groups, free in ((3, True), (4, False)):
        scene = Scene(1, {f"group{number}": [0] for number in range(num_groups)}, shape=TINY)
        scene.phase("serve")
        assert scene.witnesses()[0].has_free_slots == free


def test_a_file_has_the_length_of_its_geometry(tmp_path: Path) -> None:
    create(tmp_path / "w", Identity(0, 1), TINY)
    assert (tmp_path / "w").stat().st_size == TINY.file_bytes
    assert read(tmp_path / "w").problems == ()
