"""Files that others may have made: what is read is small, what is written goes nowhere else."""

from __future__ import annotations

import json
import os

import pytest
from hybrid_moe_kernels.build_lock import BuildLock, Holder, LockTimeout

from hybrid_moe_ref.engine.startup.autotune import ExpertTuner
from hybrid_moe_ref.files import MAX_JSON_DEPTH, open_own, open_regular, parse_json, read_json, write_atomically

BOMBS = {
    "objects": lambda: b"[" + b"{}," * 2_000_000 + b"{}]",
    "lists": lambda: b'{"a":[' + b"[]," * 2_000_000 + b"[]]}",
    "keys": lambda: b"{" + b",".join(b'"%x":1' % n for n in range(700_000)) + b"}",
    "numbers": lambda: b"[" + b"1000," * 3_000_000 + b"1]",
    "texts": lambda: b"[" + b'"ab",' * 3_000_000 + b"1]",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_of_many_values_is_refused_before_it_is_parsed(name, monkeypatch):
    monkeypatch.setattr(json, "loads", lambda *args, **options: pytest.fail("was parsed"))
    with pytest.raises(ValueError, match=r"^f:1: the values would take more than 128 MiB"):
        parse_json(BOMBS[name](), "f")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[" * 100_000, "f:1: nested too deep"),
        (b'{"a":' * 100_000, "f:1: nested too deep"),
        (b"[" * (MAX_JSON_DEPTH + 1) + b"]" * (MAX_JSON_DEPTH + 1), "f:1: nested too deep"),
        (b"[1e999]", "f:1: 1e999 is beyond the range of a float"),
        (b"[" + b"9" * 400 + b".5]", "beyond the range of a float"),
        (b"[" + b"9" * 5000 + b"]", "f:1: Exceeds the limit"),
        (b"[NaN]", "f:1: NaN is not JSON"),
        (b"[1,\n2,\n}", "f:3: "),
        (b"\xff", "f:1: not UTF-8 text"),
        (b"", "f:1: Expecting value"),
    ],
)
def test_what_no_run_writes_is_refused_with_file_and_line(data, words):
    with pytest.raises(ValueError) as error:
        parse_json(data, "f")
    assert words in str(error.value)


def test_brackets_in_texts_are_no_depth_and_what_a_run_writes_is_read():
    text = json.dumps({"layer": "[" * 1000, "quoted": '\\"[{' * 100, "nested": json.loads("[" * 60 + "]" * 60)})
    assert parse_json(text.encode(), "f") == json.loads(text)
    ranks = [{"rank": rank, "sizes": list(range(1000, 1512))} for rank in range(512)]
    assert parse_json(json.dumps(ranks, indent=1).encode(), "f") == ranks


def test_half_a_surrogate_pair_becomes_a_character_that_every_file_can_hold():
    text = rb'["\ud83d\ude00", "a\ud800b", "\udc00", "\\ud800"]'
    assert parse_json(text, "f") == ["😀", "a\ufffdb", "\ufffd", "\\ud800"]


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "large"])
def test_what_is_no_small_regular_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "f.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(bytes(4097))
    with pytest.raises((ValueError, IsADirectoryError)):
        read_json(path, 4096)


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_a_lock_file_that_is_a_link_is_refused_and_its_target_stays_whole(tmp_path, make):
    notes, lock = tmp_path / "notes.txt", tmp_path / "x.lock"
    notes.write_text("years of work")
    make(notes, lock)
    with pytest.raises(OSError, match="link") as error, BuildLock(lock, 0, 1.0):
        pass
    assert error.value.filename == str(lock)
    assert notes.read_text() == "years of work" and os.path.lexists(lock)


def test_a_lock_file_that_is_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "x.lock")
    with pytest.raises(OSError, match="not a regular file"), BuildLock(tmp_path / "x.lock", 0, 1.0):
        pass


def test_a_partial_file_that_is_a_link_is_replaced_and_its_target_stays_whole(tmp_path):
    notes, path = tmp_path / "notes.txt", tmp_path / "verdict.json"
    notes.write_text("years of work")
    (tmp_path / f".verdict.json.{os.getpid()}.partial").symlink_to(notes)
    write_atomically(path, "{}", durable=True)
    assert (notes.read_text(), path.read_text(), path.is_symlink()) == ("years of work", "{}", False)


def test_text_that_no_encoding_has_is_written_escaped(tmp_path):
    write_atomically(tmp_path / "f", "a\udcffb")
    assert (tmp_path / "f").read_text() == r"a\udcffb"


# -- what lock files and tuning caches say -----------------------------------------------------------------------------

HOLDER = {"rank": 1, "pid": 42, "host": "h", "since": 0.0}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 2000,
        json.dumps({**HOLDER, "pid": "x"}),
        json.dumps({**HOLDER, "pid": 10**30}),
        json.dumps({**HOLDER, "pid": float("nan")}),
        json.dumps({**HOLDER, "pid": True}),
        json.dumps({**HOLDER, "rank": "\x1b[2J"}),
        json.dumps({**HOLDER, "host": "\x1b[2J"}),
        json.dumps({**HOLDER, "since": None}),
        json.dumps({**HOLDER, "since": "x"}),
        json.dumps({**HOLDER, "more": 1}),
        json.dumps(HOLDER) + " " * 5000,
        "null",
        "",
    ],
)
def test_a_holder_file_that_names_no_process_counts_as_none(tmp_path, text):
    (tmp_path / "x.lock").write_text(text)
    events = []
    with BuildLock(tmp_path / "x.lock", 0, 60.0) as held:
        (tmp_path / "x.lock").write_text(text)  # of a file that others may write to
        waiter = BuildLock(tmp_path / "x.lock", 2, 0.0, notify=lambda *event: events.append(event))
        assert waiter.holder() is None
        with pytest.raises(LockTimeout, match="held by an unnamed process"), waiter:
            pass
    assert events == [("lock_wait", str(held.path), -1)]


def test_a_holder_file_that_names_a_process_is_believed(tmp_path):
    with BuildLock(tmp_path / "x.lock", 3, 60.0) as held:
        holder = held.holder()
    assert holder is not None and (holder.rank, holder.pid) == (3, os.getpid())
    assert Holder.from_json(HOLDER) == Holder(**HOLDER)


@pytest.mark.parametrize("kind", ["deep", "pipe", "device", "large"])
def test_a_tuning_cache_that_cannot_be_read_counts_as_none(tmp_path, kind):
    path = tmp_path / "rank0.json"
    if kind == "deep":
        path.write_text("[" * 2000)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b" " * (2 << 20) + b"{}")
    tuner = ExpertTuner.__new__(ExpertTuner)  # a model and ranks are not needed to look into a file
    tuner.folder = tmp_path
    assert tuner.load("rank0.json", "key") is None


def test_open_own_takes_a_new_file_and_one_that_is_there(tmp_path):
    for _ in range(2):
        os.close(open_own(tmp_path / "f", os.O_RDWR | os.O_CREAT))
    open_regular(tmp_path / "f", 0).close()
