"""Flight Recorder dumps of every version and backend, and pickles that are something else."""

from __future__ import annotations

import pickle

import pytest
from foreign import call, dump, write

from repro.ingest import flight_recorder, pickles


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
        pickles.load(pickle.dumps(Evil(), protocol=2))
    assert not (tmp_path / "ran").exists()


def test_nine_bytes_that_ask_for_gigabytes_are_refused():
    with pytest.raises(ValueError, match=r"memory|readable"):
        pickles.load(b"\x80\x02Nr\xff\xff\xff\x7f.")
