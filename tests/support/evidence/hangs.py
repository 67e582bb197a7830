"""Made-up hangs in the form in which other tools leave them, with the truth about each.

`names` maps rank r of the case to the rank that its files name, so that every case exists with different rank numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from foreign import C10D, call, dump, py_spy, ras, watchdog

Files = dict[str, bytes]
WORKER = "worker_busy_loop (vllm/v1/executor/multiproc_executor.py:1041)"


@dataclass(frozen=True)
class Case:
    """A made-up hang and the truth about it.

    `classes` are the verdicts that are right for all of the evidence or a part of it, `culprits` the ranks that may be
    named. `whole` is the verdict that all of the evidence must have.
    """

    files: Files
    classes: frozenset[str]
    culprits: frozenset[int] = frozenset()
    whole: tuple[str, frozenset[int]] = ("inconclusive", frozenset())


def case(files: dict[str, str | bytes], whole: str, culprits: Sequence[int] = (), also: str = "") -> Case:
    data = {name: content if isinstance(content, bytes) else content.encode() for name, content in files.items()}
    named = frozenset(culprits)
    return Case(data, frozenset({whole, "inconclusive", *also.split()}), named, (whole, named))


def ep(names: Sequence[int]) -> dict[str, tuple[str, list[int]]]:
    return {"1": ("ep", sorted(names))}


def different_sizes(names: Sequence[int]) -> Case:
    history = [call(n, "all_reduce") for n in range(1, 5)]
    files = {
        f"trace_rank_{names[r]}": dump([*history, call(5, "all_reduce", done=False, sizes=((8 + (r == 2),),) * 2)],
                                       ep(names))
        for r in range(4)
    }  # fmt: skip
    return case(files, "deadlock", also="stall")


def one_is_absent(names: Sequence[int]) -> Case:
    history = [call(n, "all_reduce") for n in range(1, 5)]
    files = {
        f"trace_rank_{names[r]}": dump([*history, *([] if r == 2 else [call(5, "all_reduce", done=False)])], ep(names))
        for r in range(4)
    }
    return case(files, "inconclusive", also="clean")


def one_dump_is_stale(names: Sequence[int]) -> Case:
    files = {
        f"trace_rank_{names[r]}": dump(
            [call(n, "all_reduce", done=n < 9, at_ms=n * 60_000) for n in range(1, 4 if r == 2 else 10)], ep(names)
        )
        for r in range(4)
    }
    return case(files, "inconclusive", also="clean")


def uneven_all_to_all(names: Sequence[int]) -> Case:
    files = {
        f"trace_rank_{names[r]}": dump([call(1, "all_to_all", done=False, sizes=((r + 1,), (r + 9,)))], ep(names))
        for r in range(4)
    }
    return case(files, "stall")


def _counters(names: Sequence[int], behind: dict[str, tuple[int, int]]) -> Files:
    groups = {"1": ("tp", sorted(names)), "2": ("dp", sorted(names))}
    files = {}
    for r in range(4):
        status = behind if r == 3 else {"5": (50, 45), "6": (30, 28)}
        entries = [
            call(n, "all_reduce", group=(int(key), name, groups[name][0]), done=False)
            for key, name in (("5", "1"), ("6", "2"))
            for n in range(status[key][1] + 1, status[key][0] + 1)
        ]
        files[f"_dump_{names[r]}"] = dump(entries, groups, status)
    return files


def device_stopped(names: Sequence[int]) -> Case:
    return case({**_counters(names, {"5": (50, 40), "6": (30, 20)})}, "stall", [names[3]])


def host_stopped(names: Sequence[int]) -> Case:
    return case({**_counters(names, {"5": (45, 45), "6": (28, 28)})}, "stall", [names[3]])


def steps(rank: int, fault: str, *, as_json: bool = False, until: int = 8) -> bytes:
    """Return a gloo dump. Each step has an all-reduce of all ranks, three all-gathers and an all-reduce; rank 2 errs in
    the last.
    """
    counts: dict[str, int] = {}
    entries: list[dict[str, object]] = []

    def issue(name: str, op: str, done: bool) -> None:
        counts[name] = counts.get(name, 0) + 1
        entries.append(
            call(counts[name], op, group=(int(name), name, "undefined"), backend="gloo", done=done, at_ms=len(entries))
        )

    for step in range(until):
        last = step == until - 1
        issue("0", "all_reduce", True)
        if last and fault == "extra":
            if rank == 2:
                issue("0", "all_reduce", False)
            else:
                issue("1", "all_gather", False)
            return dump(entries, as_json=as_json)
        for layer in range(3):
            if last and fault == "skipped" and layer == 1 and rank == 2:
                continue
            if last and fault == "absent" and layer == 1 and rank == 2:
                return dump(entries, as_json=as_json)
            stuck = last and ((fault == "skipped" and layer == 2 and rank != 2) or (fault == "absent" and layer == 1))
            issue("1", "all_gather", not stuck)
            if stuck:
                return dump(entries, as_json=as_json)
        stuck = last and fault == "skipped"
        issue("0", "all_reduce", not stuck)
        if stuck:
            return dump(entries, as_json=as_json)
    return dump(entries, as_json=as_json)


def _gloo(names: Sequence[int], fault: str) -> dict[str, str | bytes]:
    return {f"fr/rank{names[r]}.json": steps(r, fault, as_json=True) for r in range(4)}


def skipped(names: Sequence[int]) -> Case:
    return case(_gloo(names, "skipped"), "deadlock", [names[2]], also="clean stall")


def extra(names: Sequence[int]) -> Case:
    return case(_gloo(names, "extra"), "deadlock", [names[2]], also="clean stall")


def straggler(names: Sequence[int]) -> Case:
    return case(_gloo(names, "absent"), "inconclusive", also="clean")


def late_and_then_on(names: Sequence[int]) -> Case:
    """Two sets of dumps: all ranks wait for one rank, which then comes 30 s late, and the job ends."""
    files: dict[str, str | bytes] = _gloo(names, "absent")
    for r in range(4):
        content = json.loads(steps(r, "none", as_json=True))
        for entry in content["entries"]:
            late = entry["process_group"][0] == "1" and entry["collective_seq_id"] == 23
            entry["time_created_ns"] += 30_000_000_000 if r == 2 and late else 0
        files[f"later/rank{names[r]}.json"] = json.dumps(content)
    return case(files, "slow", [names[2]], also="clean")


def two_jobs(names: Sequence[int]) -> Case:
    files: dict[str, str | bytes] = {}
    for r in range(4):
        entries = [call(1, "all_reduce", group=(0, "0", "default_pg"), done=False)]
        size = 4 if r < 2 else 8
        files[f"trace_rank_{names[r]}"] = dump(entries, {"0": ("default_pg", range(size))})
    return case(files, "inconclusive")


def recorded_more_than_the_ring_holds(names: Sequence[int]) -> Case:
    """Transfers around four ranks, of which the dumps show only the end: counts differ, and all transfers are done."""
    files: dict[str, str | bytes] = {}
    for stage, rank in enumerate(names):
        after, before = (stage + 1) % 4, (stage - 1) % 4
        ops = [f"send {stage}->{after}", f"recv {stage}<-{before}"] * 3
        ops = ops[stage % 2 :]
        entries = [call(n + 9, op, group=(3, "11", "pp"), p2p=True, record=n + 900) for n, op in enumerate(ops)]
        last = call(3, "all_reduce", group=(3, "11", "pp"), done=False, record=990)
        files[f"trace_rank_{rank}"] = dump([*entries, last], {"11": ("pp", list(names))})
    return case(files, "stall")


def all_ran_out_of_memory_at_once(names: Sequence[int]) -> Case:
    files: dict[str, str | bytes] = {
        f"log_{r}.txt": f"[rank{names[r]}]:[E1003 11:30:08.{r}5 x.cpp:1] torch.OutOfMemoryError: CUDA out of memory.\n"
        for r in range(4)
    }
    return replace(case(files, "crash"), culprits=frozenset(names))  # this rank's log alone also shows a crash


def an_error_nobody_died_of(names: Sequence[int]) -> Case:
    text = f"[rank{names[1]}]: ValueError: bad prompt\n[rank{names[1]}]: step 5\n"
    return case({"log.txt": text}, "inconclusive")


def two_locks(names: Sequence[int]) -> Case:
    def stack(lock: str) -> list[str]:
        return ["acquire (filelock/_api.py:344)", f"Locals:\n        lock_file: '/c/{lock}.lock'", WORKER]

    files: dict[str, str | bytes] = {
        f"t{look}/s{r}.txt": py_spy(f"VLLM::Worker_TP{names[r]}", stack("ab"[r]), 10 + r)
        for r in range(2) for look in range(2)
    }  # fmt: skip
    return case(files, "inconclusive")


def a_lock_that_nobody_holds(names: Sequence[int]) -> Case:
    lock = ["wait (torch/utils/file_baton.py:49)", "load (torch/utils/cpp_extension.py:1)", WORKER]
    files: dict[str, str | bytes] = {f"s{r}.txt": py_spy(f"VLLM::Worker_TP{names[r]}", lock, 10 + r) for r in range(4)}
    return case(files, "inconclusive")


def engines_and_workers_in_a_cycle(names: Sequence[int]) -> Case:
    """Two looks at a cycle: worker, its engine, the other engine, that engine's worker, and the first worker again."""
    queue = "dequeue (vllm/distributed/device_communicators/shm_broadcast.py:788)"
    stacks = {
        "VLLM::Worker_DP{0}_EP{0}": [queue, WORKER],
        "VLLM::EngineCore_DP{0}": [f"all_reduce ({C10D}:2819)", "sync_dp_state (vllm/config/parallel.py:1)"],
        "VLLM::EngineCore_DP{1}": [queue, "get_response (vllm/v1/executor/multiproc_executor.py:387)"],
        "VLLM::Worker_DP{1}_EP{1}": [f"all_gather ({C10D}:2819)", "moe (vllm/x.py:4)", WORKER],
    }
    files: dict[str, str | bytes] = {
        f"t{look}/s{n}.txt": py_spy(title.format(*names), stack, 10 + n)
        for n, (title, stack) in enumerate(stacks.items()) for look in range(2)
    }  # fmt: skip
    return case(files, "deadlock")


def finished(names: Sequence[int]) -> Case:
    return case(_gloo(names, "none"), "clean")


def everybody_receives(names: Sequence[int]) -> Case:
    files = {}
    members = list(names[:4])
    for stage, rank in enumerate(members):
        after, before = (stage + 1) % 4, (stage - 1) % 4
        pair = [f"recv {stage}<-{before}", f"send {stage}->{after}"]
        ops = (pair if stage else pair[::-1]) * 3 + pair[:1]
        entries = [call(n + 1, op, group=(3, "11", "pp"), p2p=True, done=n < 6) for n, op in enumerate(ops)]
        files[f"trace_rank_{rank}"] = dump(entries, {"11": ("pp", members)})
    return case({**files}, "deadlock", also="clean")


def out_of_memory(names: Sequence[int]) -> Case:
    files: dict[str, str | bytes] = {f"log_{r}.txt": watchdog(names[r], 7, "ALLREDUCE") for r in (0, 1, 3)}
    files["log_2.txt"] = (
        f"[rank{names[2]}]:[E1003 11:30:08.05 x.cpp:1] torch.OutOfMemoryError: CUDA out of memory. Tried 2.50 GiB.\n"
    )
    return case(files, "crash", [names[2]], also="stall")


def survived(names: Sequence[int]) -> Case:
    files: dict[str, str | bytes] = {f"log_{r}.txt": watchdog(names[r], 7, "ALLREDUCE") for r in range(4)}
    head = f"[rank{names[2]}]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB.\n"
    files["log_2.txt"] = head + str(files["log_2.txt"])
    return case(files, "stall")


def retried(names: Sequence[int]) -> Case:
    files: dict[str, str | bytes] = {f"log_{r}.txt": watchdog(names[r], 7, "ALLREDUCE") for r in (0, 1, 3)}
    files["log_2.txt"] = f"[rank{names[2]}]: CUDA out of memory. Tried to allocate 2.50 GiB; retrying with batch 4\n"
    return case(files, "inconclusive", also="stall")


def two_sub_groups_with_equal_numbers(names: Sequence[int]) -> Case:
    files: dict[str, str | bytes] = {
        f"log_{r}.txt": watchdog(names[r], 7, "ALLREDUCE" if r < 2 else "BROADCAST", group=f"{5 + r // 2}(tp)",
                                 group_rank=r % 2)
        for r in range(4)
    }  # fmt: skip
    return case(files, "inconclusive", also="stall")


def one_waits_in_gloo(names: Sequence[int]) -> Case:
    files: dict[str, str | bytes] = {
        f"log_{r}.txt": watchdog(names[r], 413, "BROADCAST", queued=414, group="0(default_pg)") for r in (0, 1, 3)
    }
    files["log_2.txt"] = (
        f"[rank{names[2]}]:[E1003 11:42:08.0585 ProcessGroupNCCL.cpp:1858] [PG ID 0 PG GUID 0(default_pg) Rank 2] "
        "Received a dump signal due to a collective timeout from  rank 1 and we will try our best to dump the debug "
        "info. Last enqueued NCCL work: 412, last completed NCCL work: 412.This is most likely caused by\n"
        f"[rank{names[2]}]: RuntimeError: [/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:4\n"
    )
    return case(files, "deadlock", also="stall")


def one_builds(names: Sequence[int]) -> Case:
    lock = ["acquire (filelock/_api.py:344)", "build_and_load (flashinfer/jit/core.py:286)", WORKER]
    ninja = [
        "_wait (subprocess.py:2053)",
        "run_ninja (flashinfer/jit/cpp_ext.py:310)",
        "build_and_load (x.py:9)",
        WORKER,
    ]
    files: dict[str, str | bytes] = {
        f"pyspy_{100 + r}.txt": py_spy(f"VLLM::Worker_TP{names[r]}", ninja if r == 2 else lock, 100 + r)
        for r in range(4)
    }
    return case(files, "slow", [names[2]])


def a_lock_across_a_collective(names: Sequence[int]) -> Case:
    """One rank is in a collective, and the other three wait for a lock, in two looks."""
    lock = ["acquire (filelock/_api.py:344)", "build_and_load (flashinfer/jit/core.py:286)", WORKER]
    inside = [f"all_reduce ({C10D}:2819)", "step (model.py:4)", WORKER]
    files: dict[str, str | bytes] = {
        f"t{look}/pyspy_{100 + r}.txt": py_spy(f"VLLM::Worker_TP{names[r]}", inside if r == 2 else lock, 100 + r)
        for r in range(4)
        for look in range(2)
    }
    files["console.log"] = "INFO 10-22 09:43:49 [parallel_state.py:1] rank 0 in world size 4 is assigned as TP rank 0\n"
    return case(files, "deadlock", [names[2]])


def engine_and_workers_wait(names: Sequence[int]) -> Case:
    queue = "dequeue (vllm/distributed/device_communicators/shm_broadcast.py:788)"
    files: dict[str, str | bytes] = {
        f"w{r}.txt": py_spy(f"VLLM::Worker_TP{names[r]}", [queue, WORKER], 10 + r) for r in range(2)
    }
    files["e.txt"] = py_spy("VLLM::EngineCore", [queue, "get_response (vllm/v1/executor/multiproc_executor.py:387)"], 9)
    return case(files, "inconclusive")


def counts_that_move(names: Sequence[int]) -> Case:
    rows = ["30 ranks have launched up to operation {}", "2 ranks have launched up to operation {}",
            f"Rank {names[1]} -- GPU 4 managed by process 3 on node h"]  # fmt: skip
    files: dict[str, str | bytes] = {
        f"ras_{n}.txt": ras("MISMATCH", [rows[0].format(count), rows[1].format(count + 1), rows[2]], 32)
        for n, count in ((1, 640), (2, 2105))
    }
    return case(files, "inconclusive")


CASES: dict[str, Callable[[Sequence[int]], Case]] = {
    it.__name__: it
    for it in (
        different_sizes, one_is_absent, one_dump_is_stale, uneven_all_to_all, device_stopped, host_stopped, skipped,
        extra, straggler, late_and_then_on, finished, two_jobs, recorded_more_than_the_ring_holds,
        all_ran_out_of_memory_at_once, an_error_nobody_died_of, two_locks, a_lock_that_nobody_holds,
        engines_and_workers_in_a_cycle, everybody_receives, out_of_memory, survived, retried,
        two_sub_groups_with_equal_numbers, one_waits_in_gloo, one_builds, a_lock_across_a_collective,
        engine_and_workers_wait, counts_that_move,
    )
}  # fmt: skip
