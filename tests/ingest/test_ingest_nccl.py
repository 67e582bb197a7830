"""What NCCL itself says: its debug log, its RAS, and which rank a GPU or process of the kernel's log belongs to."""

from __future__ import annotations

import io
import json

from foreign import ras, write

from repro.ingest.read import _records, read
from repro.trace.foreign.records import Failure, Launches, Member, Note, RasAnswer


def init(rank, size=4, *, host="node-a", pid=None, comm="0x55aa", name=" commId 0x77", bus=None):
    where = f"{host}:{pid or 100 + rank}:{200 + rank} [{rank}]"
    return (
        f"{where} NCCL INFO ncclCommInitRankConfig comm {comm} rank {rank} nranks {size} cudaDev {rank} nvmlDev {rank} "
        f"busId {bus or f'{0x5D + rank:x}000'}{name} - Init COMPLETE\n"
    )


def launch(rank, op="AllGather", count=512, *, number=0, host="node-a", pid=None, comm="0x55aa"):
    return (
        f"{host}:{pid or 100 + rank}:{200 + rank} [{rank}] NCCL INFO {op}: opCount {number:x} sendbuff 0x7f recvbuff 0x8f "
        f"count {count} datatype 7 op 0 root 0 comm {comm} [nranks=4] stream 0x99\n"
    )


def records(text, name="job.log"):
    return _records(io.BytesIO(text.encode()), name)


def test_launches_are_counted_by_communicator_and_process(tmp_path):
    logs = {f"nccl.{rank}.log": init(rank) + launch(rank) * (7 if rank == 2 else 8) for rank in range(4)}
    launches = [record for record in read([write(tmp_path, logs)]).records if isinstance(record, Launches)]
    assert {row.process.rank: row.count for row in launches} == {0: 8, 1: 8, 2: 7, 3: 8}
    assert {row.group.members for row in launches} == {(0, 1, 2, 3)}
    assert launches[0].calls[-1].arguments == ("all_gather", ((512,),), ("float32",))


def test_the_count_that_nccl_prints_is_hexadecimal_and_is_used_where_the_beginning_is_missing():
    (row,) = records(launch(3, number=0xF6) + launch(3, number=0xF7))
    assert (row.count, row.calls[-1].seq) == (0xF7 + 1, 0xF8)


def test_a_count_that_stays_zero_numbers_nothing():
    (row,) = records(launch(3) + launch(3))
    assert (row.count, row.calls[-1].seq) == (None, None)


def test_a_smaller_communicator_gives_ranks_through_the_one_of_all(tmp_path):
    logs = "".join(init(rank, comm=f"0x{rank}0") for rank in range(4))
    logs += "".join(
        init(rank % 2, 2, pid=100 + rank, comm=f"0x{rank}1", name=f" commId 0x{80 + rank // 2}") for rank in range(4)
    )
    logs += launch(1, pid=103, comm="0x31")
    (row,) = [record for record in read([write(tmp_path, {"a.log": logs})]).records if isinstance(record, Launches)]
    assert (row.process.rank, row.group.members) == (3, (2, 3))


def test_numbers_in_groups_of_which_none_holds_all_processes_are_no_ranks(tmp_path):
    logs = "".join(init(rank % 2, 2, pid=100 + rank, name=f" commId 0x{80 + rank // 2}") for rank in range(4))
    logs += launch(1, pid=103)
    (row,) = [record for record in read([write(tmp_path, {"a.log": logs})]).records if isinstance(record, Launches)]
    assert (row.process.rank, row.group.members) == (None, ())


def test_a_gpu_of_the_kernel_log_is_a_rank_by_its_address(tmp_path):
    xid = "[ 12.5] NVRM: Xid (PCI:0000:5f:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n"
    files = {"nccl.log": "".join(map(init, range(4))), "dmesg_node-a.txt": xid}
    (failure,) = [record for record in read([write(tmp_path, files)]).records if isinstance(record, Failure)]
    assert failure.process.rank == 2 and "Xid 79 (hardware)" in failure.text


def test_an_address_that_two_hosts_have_is_a_rank_only_with_the_host(tmp_path):
    xid = "[ 12.5] NVRM: Xid (PCI:0000:5d:00): 79, pid=0, GPU has fallen off the bus.\n"
    logs = init(0, 2, host="node-a", bus="5d000") + init(1, 2, host="node-b", bus="5d000")
    known = read([write(tmp_path / "one", {"nccl.log": logs, "dmesg_node-b.txt": xid})])
    unknown = read([write(tmp_path / "two", {"nccl.log": logs, "dmesg.txt": xid})])
    ranks = [[r.process.rank for r in evidence.records if isinstance(r, Failure)] for evidence in (known, unknown)]
    assert ranks == [[1], [None]]


def test_a_process_that_the_kernel_killed_is_a_rank_by_its_id(tmp_path):
    killed = "Jun  3 17:48:01 node-a kernel: Out of memory: Killed process 103 (python) total-vm:1kB, anon-rss:2kB\n"
    files = {"nccl.log": "".join(map(init, range(4))), "kern.log": killed}
    (failure,) = [record for record in read([write(tmp_path, files)]).records if isinstance(record, Failure)]
    assert failure.process.rank == 3


def test_a_message_of_another_size_is_noted():
    line = (
        "node-a:100:200 [3] transport/net_ib.cc:2098 NCCL WARN NET/IB : req 0/1 tag 0 peer 10.0.0.2<45231> collective "
        "mismatch error, local size 4096 remote size 8192\n"
    )
    (note,) = records(line)
    assert isinstance(note, Note) and (note.kind, note.value) == ("sizes", "4096 8192")


def test_an_older_line_without_an_id_gives_a_member_too():
    line = "node-a:100:200 [3] NCCL INFO comm 0x55aa rank 3 nranks 8 cudaDev 3 busId 5d000 - Init COMPLETE\n"
    member, _ = records(line)
    assert isinstance(member, Member) and (member.rank, member.size, member.bus) == (3, 8, "0000:5d:00")


# -- RAS


def answer(text, name="ras.txt"):
    return next(record for record in records(text, name) if isinstance(record, RasAnswer))


def test_an_answer_of_ras_gives_counts_by_rank():
    rows = [
        "Rank 0 has launched up to operation 2654 -- GPU 0 managed by process 9 on node a",
        "Rank 1 has launched up to operation 2655 -- GPU 0 managed by process 8 on node b",
    ]
    found = records(ras("MISMATCH", rows, 2), "ras.txt")
    assert found[-1].communicators[0].launched == {"AllGather": {0: 2654, 1: 2655}}
    assert {record.process.pid: record.rank for record in found if isinstance(record, Member)} == {9: 0, 8: 1}


def test_ranks_under_a_count_have_launched_so_many_in_every_wording():
    text = ras(
        "MISMATCH",
        [
            "30 ranks have launched up to operation 640",
            "2 ranks have launched up to operation 641",
            "Rank 12 -- GPU 4 managed by process 3 on node a",
            "Rank 13 [process information not found]",
        ],
        32,
    )
    old = text.replace("different AllGather operation counts", "different collective operation counts")
    assert answer(text).communicators[0].launched == {"AllGather": {12: 641, 13: 641}}
    assert answer(old).communicators[0].launched == {"collectives": {12: 641, 13: 641}}


def test_a_rank_that_launched_nothing_has_launched_none():
    rows = ["7 ranks have launched up to operation 3", "Rank 4 has not launched any operations -- GPU 4"]
    assert answer(ras("MISMATCH", rows)).communicators[0].launched == {"AllGather": {4: 0}}


INCOMPLETE = """
INCOMPLETE
  Missing communicator data from 1 job process
  Process 3487984 on node 172.16.64.213 managing GPU 5

#0-0 (cf264af53edbe986) INCOMPLETE
  Missing communicator data from 3 ranks
  The missing ranks: 2, 5-6

Warnings
========

TIMEOUT
  Encountered 2 communication timeouts while gathering communicator data

DEAD
  1 job process is considered dead (unreachable via the RAS network)
  Process 41 on node 172.16.64.214 managing GPUs 0-7
"""


def test_missing_ranks_dead_processes_and_time_outs_of_ras_are_read():
    text = ras("INCOMPLETE,MISMATCH") + INCOMPLETE
    assert answer(text).communicators[0].missing == (2, 5, 6)
    assert answer(text).communicators[0].errors == "INCOMPLETE"
    notes = [record for record in records(text, "ras.txt") if isinstance(record, Note)]
    assert [(note.process.pid, note.value) for note in notes] == [(3487984, "INCOMPLETE"), (41, "DEAD"), (None, "2")]


def test_no_answer_of_ras_is_a_finding(tmp_path):
    files = {
        "ncclras_1.txt": "",
        "ncclras_2.txt": "Connecting to localhost:28028: Connection refused\n",
        "empty.txt": "",
    }
    evidence = read([write(tmp_path, files)])
    assert [(note.kind, note.source.file) for note in evidence.records] == [
        ("ras", "ncclras_1.txt"),
        ("ras", "ncclras_2.txt"),
    ]
    assert len(evidence.not_understood) == 1


def test_ras_in_json_gives_the_same_as_in_text():
    def rank(number, count, **status):
        return {
            "rank": number,
            "host": "a",
            "pid": 40 + number,
            "cuda_dev": number,
            "status": {"init_state": 0, "abort_flag": False, **status},
            "collective_counts": {"AllGather": count},
        }

    row = {
        "hash": "0x2a",
        "secondary_hash": "0x1",
        "size": 3,
        "ranks": [rank(0, 640), rank(1, 641)],
        "missing_ranks": [
            {"rank": 2, "host": "a", "pid": 42, "status": {"unresponsive": True, "considered_dead": True}}
        ],
    }
    content = {
        "nccl_version": "2.28.7",
        "timestamp": "2026-03-01 10:00:00",
        "ras": {"timeouts_count": 0},
        "communicators": [row],
    }
    found = records(json.dumps(content), "ras.json")
    communicator = found[-1].communicators[0]
    assert (communicator.name, communicator.errors) == ("(000000000000002a)", "INCOMPLETE,MISMATCH")
    assert (communicator.launched, communicator.missing) == ({"AllGather": {0: 640, 1: 641}}, (2,))
    assert [(r.process.pid, r.value) for r in found if isinstance(r, Note)] == [(42, "is dead")]
    assert {r.process.pid: r.rank for r in found if isinstance(r, Member)} == {40: 0, 41: 1, 42: 2}


def test_a_line_of_the_monitor_mode_is_a_note():
    (note,) = records("[2025-11-03 17:48:01] PEER_DEAD: Process 4242 on node 10.0.0.2 managing GPUs 0-7\n")
    assert (note.kind, note.value, note.process.pid) == ("ras", "DEAD", 4242)


def test_an_answer_of_ras_that_is_cut_after_nccl_version_has_no_version():
    text = ras("MISMATCH", ["Rank 0 has launched up to operation 5 -- x"]).replace(
        "NCCL version 2.", "NCCL version \n2.", 1
    )
    (answer,) = [record for record in records(text, "ras.txt") if isinstance(record, RasAnswer)]
    assert answer.version == ""
