"""Following witness files while they are written, and reading them meanwhile."""

from __future__ import annotations

import io
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from hybrid_moe_ref.parallel.observer import Collective
from repro.trace.identity import myself
from repro.trace.recording.recorder import Recorder
from repro.trace.witness import file as files
from repro.trace.witness.file import Tail, create, parse, read
from repro.trace.witness.format import GUARD, HEART_AT, LIVE_AT, WORD, Geometry, Identity, pack_header

TINY = Geometry(ring_records=32, vector_words=64, string_bytes=512, group_slots=4)
REDUCE = Collective("dp", "all_reduce", "", (32,), "int32", "sum")


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """A soft limit of 64 descriptors beyond those that are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = max(int(name) for name in os.listdir("/proc/self/fd")) + 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    yield few
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_ranks_are_followed_than_the_soft_limit_allows_descriptors(tmp_path: Path, few_descriptors: int) -> None:
    num_ranks = few_descriptors + 6
    for rank in range(num_ranks):
        create(tmp_path / f"rank{rank:03d}.wit", Identity(rank, num_ranks), TINY)
    tails = [Tail(tmp_path / f"rank{rank:03d}.wit") for rank in range(num_ranks)]
    assert [tail.writer().rank for tail in tails] == list(range(num_ranks))
    for tail in tails:
        tail.close()


def test_a_header_that_is_half_written_keeps_the_identity_before_it(tmp_path: Path) -> None:
    path = tmp_path / "rank001.wit"
    create(path, Identity(1, 2, "run"), TINY)
    tail = Tail(path)
    header = pack_header(myself(1, 2), TINY)
    with open(path, "r+b") as file:
        file.write(header[:100])
        file.flush()
        assert (tail.writer().pid, tail.writer().run_id) == (0, "run")
        file.write(header[100:])
    assert tail.writer().pid == os.getpid()


def test_a_tail_keeps_its_count_and_heartbeat_where_their_words_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "rank000.wit"
    recorder = Recorder.open(path, 0, 1, shape=TINY)
    recorder.enter(REDUCE)
    recorder.local("heartbeat", "build")
    tail = Tail(path)
    before = tail.num_events(), tail.heartbeat_ns()
    assert before[0] == 1 and before[1] > 0
    with open(path, "r+b") as file:
        for at, value in ((LIVE_AT, 7 * GUARD + 1), (HEART_AT, 1)):
            file.seek(at)
            file.write(WORD.pack(value))
    assert (tail.num_events(), tail.heartbeat_ns()) == before
    assert len(read(path).problems) == 2


def test_a_store_under_way_is_no_damage_to_a_reader_that_looks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rank000.wit"
    recorder = Recorder.open(path, 0, 1, shape=TINY)
    recorder.enter(REDUCE)
    whole = path.read_bytes()
    record = TINY.ring_at + 8
    torn = whole[:record] + b"\xff" + whole[record + 1 :]
    looks = iter((torn, whole))
    monkeypatch.setattr(files, "_bytes_of", lambda path: next(looks))
    assert read(path).problems == ()
    looks = iter((torn, torn))
    assert read(path).damaged


def test_a_vector_that_is_overwritten_while_the_file_is_copied_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "rank000.wit"
    recorder = Recorder.open(path, 0, 1, shape=TINY)
    for number in range(9):  # 7 words each: the next one overwrites the first
        recorder.enter(REDUCE._replace(sizes=(number,) * 6))
    with open(path, "rb", buffering=0) as file:
        begun = file.read(TINY.vectors_at)
        recorder.enter(REDUCE._replace(sizes=(9,) * 6))
        copy = begun + file.read()
    assert parse(copy, "x").damaged

    class Copied(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return copy if self.tell() == 0 else super().read(size)

    with mock.patch.object(files, "_opened", lambda path: Copied(path.read_bytes())):
        assert read(path).problems == ()


def test_a_live_file_is_never_taken_for_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "rank000.wit"
    recorder = Recorder.open(path, 0, 1, shape=Geometry(ring_records=4096, vector_words=64, string_bytes=1 << 16))
    stop = threading.Event()

    def record() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            call = Collective("dp", "all_gather_v", f"layer {number % 50}", (number, number + 1))
            recorder.enter(call)
            recorder.leave(call)
            recorder.local("heartbeat", "build")

    writer = threading.Thread(target=record)
    writer.start()
    try:
        problems = [problem for _ in range(60) for problem in read(path).problems]
    finally:
        stop.set()
        writer.join()
    assert problems == []
