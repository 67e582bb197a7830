"""Flight Recorder dumps of every version and backend, and pickles that are something else."""

from __future__ import annotations

import pickle

import pytest
from foreign import call, dump, write

from repro.ingest.recorder import flight_recorder, pickles


@pytest.mark.parametrize(
    ("name", "rank"),
    [("nccl_trace_rank_7", 7), ("comm_lib_trace_rank_12", 12), ("rank0.json", 0), ("_dump_15", 15),
     ("trace_rank_host_5.pkl", 5), ("x/node3/rank_4", 4), ("rank_1.trace.json", 1), ("dump", None)],
)  # fmt: skip
def test_the_rank_of_a_dump_stands_in_its_name(name, rank):
    assert flight_recorder.rank_of(name) == rank


@pytest.mark.parametrize("as_json", [True, False])
def test_a_dump_is_read_alike_as_pickle_and_as_json(as_json):
    data = dump(
        [call(1, "_all_gather_base"), call(2, "all_reduce", done=False)],
        {"1": ("ep", [4, 5])},
        {"1": (2, 1)},
        as_json=as_json,
    )
    read_dump = flight_recorder.read(data, "trace_rank_5")
    (record,) = read_dump.groups
    assert (read_dump.rank, record.group.members, record.enqueued, record.completed) == (5, (4, 5), 2, 1)
    assert [(c.op, c.seq, c.done) for c in record.calls] == [("all_gather", 1, True), ("all_reduce", 2, False)]


def test_what_stands_before_a_completed_operation_of_nccl_is_over():
    entries = [call(1, "all_reduce", done=False), call(2, "ALLGATHER_coalesced"), call(3, "all_reduce", done=False)]
    (record,) = flight_recorder.read(dump(entries, {"1": ("ep", [0, 1])}), "r0").groups
    assert [c.done for c in record.calls] == [True, True, False]


def test_an_operation_that_its_time_out_retired_is_not_over():
    entry = call(1, "all_reduce", done=False) | {"retired": True}
    (record,) = flight_recorder.read(dump([entry], {"1": ("ep", [0, 1])}), "r0").groups
    assert not record.calls[0].done


def test_a_pickle_that_names_code_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (write, (tmp_path / "ran", {"x": "y"}))

    with pytest.raises(pickles.UnsafePickle, match=r"foreign\.write"):
        pickles.load(pickle.dumps(Evil(), protocol=2), "x")
    assert not (tmp_path / "ran").exists()


def test_nine_bytes_that_ask_for_gigabytes_are_refused():
    with pytest.raises(ValueError, match=r"memory|readable"):
        pickles.load(b"\x80\x02Nr\xff\xff\xff\x7f.", "x")


def calls_of(content, name="trace_rank_0"):
    data = pickle.dumps(content, protocol=2) if not isinstance(content, bytes) else content
    return [
        (record.group.name, call.op, call.seq, call.done)
        for record in flight_recorder.read(data, name).groups
        for call in record.calls
    ]


def entry(number, name, **more):
    return call(number, name.rpartition(":")[2], backend=name.rpartition(":")[0]) | more


def test_the_bare_list_of_2023_is_read():
    rows = [
        {
            "pg_id": 0,
            "seq_id": 7,
            "profiling_name": "nccl:all_reduce",
            "sizes": [[4, 2]],
            "state": "scheduled",
            "frames": [],
        }
    ]
    assert calls_of(rows) == [("", "all_reduce", 7, False)]
    (record,) = flight_recorder.read(pickle.dumps(rows, protocol=2), "r_0").groups
    assert record.calls[0].sizes == ((4, 2),)


@pytest.mark.parametrize("version", ["2.0", "2.3", "2.4", "2.5", "2.7", "2.9", "2.10"])
def test_every_version_is_read_whatever_it_leaves_out(version):
    content = pickle.loads(dump([call(3, "all_reduce")], {"1": ("ep", [0, 1])}, {"1": (3, 3)})) | {"version": version}
    if version in ("2.0", "2.3", "2.4"):
        content["nccl_version"] = content.pop("comm_lib_version")
    if version in ("2.5", "2.6"):
        del content["comm_lib_version"], content["pg_status"]
    assert calls_of(content) == [("1", "all_reduce", 3, True)]


def test_a_dump_without_entries_gives_its_counters():
    content = b'{"version": "2.10", "pg_config": {}, "pg_status": {"0": {"last_enqueued_collective": "5", "last_completed_collective": "-1"}}}'
    (record,) = flight_recorder.read(content, "rank_0.json").groups
    assert (record.enqueued, record.completed, record.number, list(record.calls)) == (5, None, "0", [])


@pytest.mark.parametrize("backend", ["xccl", "hccl", "mccl"])
def test_other_backends_are_read_as_nccl_is(backend):
    rows = [
        entry(1, f"{backend}:all_reduce", state="completed"),
        entry(2, f"{backend}:all_reduce", state="scheduled", retired=True),
    ]
    assert [done for *_, done in calls_of({"entries": rows})] == [True, False]


def test_torchcomms_shows_an_end_by_retired_alone():
    rows = [
        entry(1, "main: tp:all_reduce", state="scheduled", retired=True),
        entry(2, "main: tp:all_reduce", state="scheduled", retired=False),
    ]
    assert calls_of({"entries": rows}) == [("1", "all_reduce", 1, True), ("1", "all_reduce", 2, False)]


def test_gloo_shows_an_end_by_retired_alone():
    rows = [
        entry(1, "gloo:all_reduce", state="scheduled", retired=False),
        entry(2, "gloo:all_reduce", state="scheduled", retired=True),
    ]
    assert [done for *_, done in calls_of({"entries": rows})] == [False, True]


@pytest.mark.parametrize("over", [True, False])
def test_members_of_a_coalesced_operation_are_over_when_it_is(over):
    member = {"state": "scheduled", "retired": False, "is_p2p": True, "collective_seq_id": 0, "p2p_seq_id": 4}
    earlier = entry(3, "nccl:recv 0<-1", **member | {"p2p_seq_id": 3})
    rows = [earlier, entry(4, "nccl:send 0->1", **member), entry(4, "nccl:recv 0<-1", **member),
            entry(4, "nccl:coalesced", **member | {"state": "completed" if over else "scheduled"})]  # fmt: skip
    assert [done for *_, done in calls_of({"entries": rows})] == [False, over, over, over]


def test_names_of_transfers_count_ranks_of_the_group():
    rows = [entry(1, "nccl:recv 1<-0", is_p2p=True)]
    content = {"entries": rows, "pg_config": {"1": {"name": "1", "desc": "pp", "ranks": "[2, 6]"}}}
    (record,) = flight_recorder.read(pickle.dumps(content, protocol=2), "trace_rank_6").groups
    assert (record.calls[0].op, record.calls[0].peer, record.calls[0].seq) == ("recv", 2, None)


def test_a_ring_that_was_overwritten_is_known_by_its_first_number():
    whole = flight_recorder.read(dump([call(1, "all_reduce")]), "r_0")
    cut = flight_recorder.read(dump([call(1, "all_reduce", record=17)]), "r_0")
    assert (whole.wrapped, cut.wrapped) == (False, True)
    assert str(cut.groups[0].calls[0].source) == "r_0 entry 17"


@pytest.mark.parametrize(
    ("broken", "kept"),
    [({"frames": 5}, 1), ({"input_sizes": "x"}, 1), ({"process_group": [["x"]]}, 1), ({"profiling_name": None}, 1),
     ({"collective_seq_id": "7"}, 1), ({"time_created_ns": float("nan")}, 1), ({"record_id": None}, 1), ({"pg_id": {}}, 1)],
)  # fmt: skip
def test_an_entry_with_a_field_of_another_kind_is_read_as_far_as_it_can_be(broken, kept):
    assert len(calls_of({"entries": [call(1, "all_reduce") | broken, 5, None]})) == kept
