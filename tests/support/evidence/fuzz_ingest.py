"""Feed damaged and hostile evidence to `diagnose`.

    python tests/support/evidence/fuzz_ingest.py --inputs 1000000 --seed 0

It must not crash, run code of a file, hang or take gigabytes, and each refusal must name a place. Each input is made
from its own seed, which a failure names: `--inputs 1 --seed N` makes that input again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import json
import os
import pickle
import random
import re
import resource
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from foreign import call, dump, py_spy, ras, watchdog

from hybrid_moe_ref.files import DamagedFile
from repro.commands.diagnose import lines
from repro.ingest.read import Evidence, read, read_files
from repro.store.text import escape_lines
from repro.trace.foreign import json_lines
from repro.verdict.partial import diagnose

MAX_SECONDS, MAX_MIB = 5.0, 1024
MOST_BYTES = (*[1 << 14] * 15, *[1 << 17] * 4, 1 << 20)
"""Damaged input is cut to one of these sizes: most damage needs no large input, and large inputs take most of the
time.
"""
REFUSAL = re.compile(r"^.+:\d+: .+", re.DOTALL)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x9b]")
HOSTILE = (
    "\x1b]0;title\x07\x1b[2J", "A" * 3000, "../../etc/passwd", "<script>alert(1)</script>", "{0.__class__}", "%s%n", "\u202e", "",
    None, -1, 0, 1 << 70, 10**400, float("nan"), float("inf"), [], {}, [[]], [[[1]]], {"a": {}}, True, b"bytes", "rank 7", "[0, 1, 99999999]",
)  # fmt: skip
NCCL = (
    "node-a:100:200 [0] NCCL INFO ncclCommInitRankConfig comm 0x55aa rank 0 nranks 2 cudaDev 0 nvmlDev 0 busId 5d000 commId 0x7 - Init COMPLETE\n"
    "node-a:100:200 [0] NCCL INFO AllGather: opCount f7 sendbuff 0x7f recvbuff 0x8f count 512 datatype 7 op 0 root 0 comm 0x55aa [nranks=2] stream 0x9\n"
)
OTHER = (
    "[ 12.5] NVRM: Xid (PCI:0000:5d:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n"
    "[E ProcessGroupGloo.cpp:138] [Rank 0]: Ranks 4, 5, 6, 7 failed to pass monitoredBarrier in 30000 ms\n"
    "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:41822\n"
    "  rank      : 7 (local_rank: 7)\n  exitcode  : -9 (pid: 4242)\n"
    "(Worker_DP0_EP0 pid=15) ERROR 07-13 10:41:52 [m.py:596] torch.OutOfMemoryError: CUDA out of memory.\n"
    "DeepEP timeout check failed: rank = 6, thread = 5, value = 1024)\n"
    'Thread 1 (Thread 0x7f (LWP 41) "python"):\n#0  0x7f in sched_yield () from /lib/libc.so.6\n#1  0x7f in ?? () from /l/libcuda.so.1\n\n'
    "Detected mismatch between collectives on ranks. Rank 1 is running collective: CollectiveFingerPrint(SequenceNumber=31, "
    "OpType=ALLREDUCE, TensorShape=[10], TensorDtypes=Float), but Rank 0 is running collective: "
    "CollectiveFingerPrint(SequenceNumber=31OpType=BARRIER).Collectives differ in the following aspects: \t Op type: ALLREDUCEvs BARRIER\n"
)


def samples() -> dict[str, bytes]:
    entries = [call(n, "all_reduce", frames=[("f", "x.py", 1)], done=n < 5) for n in range(1, 6)]
    entries += [call(n, "recv 0<-1", p2p=True, done=False) for n in range(2)]
    groups = {"1": ("ep", [0, 1])}
    ras_json = {"nccl_version": "2.28.7", "communicators": [{"hash": "0x2a", "size": 2, "ranks": [
        {"rank": 0, "host": "a", "pid": 41, "status": {"abort_flag": 0}, "collective_counts": {"AllGather": 4}}],
        "missing_ranks": [{"rank": 1, "pid": 42, "status": {"unresponsive": True}}]}], "ras": {}}  # fmt: skip
    stack = [
        {
            "pid": 4,
            "thread_name": "MainThread",
            "frames": [{"name": "acquire", "filename": "filelock/_api.py", "line": 3, "locals": []}],
        }
    ]
    return {
        "trace_rank_0": dump(entries, groups, {"1": (5, 4)}), "trace_rank_1": dump(entries[:4], groups, {"1": (4, 4)}),
        "rank_2.json": dump(entries, groups, {"1": (5, 4)}, as_json=True), "rank_3.log": watchdog(3, 5, "ALLREDUCE").encode(),
        "stack.txt": py_spy("VLLM::Worker_TP0", ["acquire (filelock/_api.py:344)", "main (x.py:1)"]).encode(),
        "stack.json": json.dumps(stack).encode(), "ras.json": json.dumps(ras_json).encode(),
        "ras.txt": ras("MISMATCH", ["7 ranks have launched up to operation 4", "Rank 0 has launched up to operation 5 -- x"]).encode(),
        "nccl.log": NCCL.encode(), "other.log": OTHER.encode(),
    }  # fmt: skip


SAMPLES = samples()
SAVED = "records.jsonl"


@functools.cache
def saved() -> bytes:
    """Return the records of all samples as `diagnose` saves them."""
    evidence = read_memory(SAMPLES)
    return b"".join(json_lines.encode(evidence.records, evidence.files, evidence.not_understood))


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return the data with bytes that are changed, cut, repeated or inserted from another sample."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 2, 5, 30))):
        place = rng.randrange(len(out) + 1)
        match rng.randrange(5):
            case 0:
                out[place : place + rng.choice((0, 1, 5))] = rng.randbytes(rng.choice((0, 1, 4)))
            case 1:
                del out[place : place + rng.choice((1, 10, 1000))]
            case 2:
                out[place:place] = out[place : place + rng.randrange(200)] * rng.choice((1, 3, 50))
            case 3:
                other = rng.choice(list(SAMPLES.values()))
                start = rng.randrange(len(other))
                out[place:place] = other[start : start + rng.randrange(300)]
            case _:
                out[place:place] = rng.choice(
                    (b"(", b" (", b"[", b"9" * 500, b"A.", b"Rank ", b"\x1b[2J", b"\n", b" ")
                ) * rng.choice((1, 1, 1, 40, 40, 40, 40, 40, 2000))
    return bytes(out[: rng.choice(MOST_BYTES)])


def damaged_values(rng: random.Random, lines: bytes) -> bytes:
    """Return lines of JSON in which some values have another type."""
    rows = lines.splitlines()
    for _ in range(rng.choice((1, 1, 3))):
        place = rng.randrange(len(rows))
        rows[place] = json.dumps(_restructured(rng, json.loads(rows[place])), default=str).encode()
    return b"\n".join(rows)


def restructured(rng: random.Random, name: str) -> bytes:
    """Return a structured sample in which some values have another type, are missing, repeated or shared."""
    as_json = name.endswith(".json")
    content = _restructured(rng, json.loads(SAMPLES[name]) if as_json else pickle.loads(SAMPLES[name]))
    if as_json:
        return json.dumps(content, default=str).encode()
    for _ in range(rng.choice((0, 0, 8))):  # a list that holds itself twice grows with every level when it is printed
        content = (
            {**content, "entries": [content.get("entries"), content.get("entries")]}
            if isinstance(content, dict)
            else content
        )
    return pickle.dumps(content, protocol=rng.choice((2, 4)))


def _restructured(rng: random.Random, content: Any) -> Any:
    """Return the content with some values that have another type, are missing, repeated or shared."""
    for _ in range(rng.choice((1, 1, 3, 10))):
        at = content
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
            if not keys:
                break
            key = rng.choice(keys)
            if rng.random() < 0.35 or not isinstance(at[key], dict | list):
                match rng.randrange(4):
                    case 0:
                        del at[key]
                    case 1 if isinstance(at, list):
                        at[key:key] = [copy.deepcopy(at[key]) for _ in range(rng.choice((1, 1, 3, 3, 3, 300)))]
                    case _:
                        at[key] = copy.deepcopy(rng.choice(HOSTILE))
                break
            at = at[key]
    return content


@functools.cache
def bomb(mib: int) -> bytes:
    """Return a zip with one entry of ``mib`` MiB of zeros, and a log that is intact."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros_rank_1", b"\0" * (mib << 20))
        archive.writestr("good.log", b"[rank0]: KeyError: 'x'\n")
    return raw.getvalue()


def planted(rng: random.Random, folder: Path) -> None:
    """Put things into a folder that are not regular files, and files named as zips that are damaged or too large."""
    match rng.randrange(6):
        case 0:
            (folder / "link").symlink_to("/etc/passwd")
        case 1:
            (folder / "loop").symlink_to(folder)
        case 2:
            os.mkfifo(folder / "pipe_rank_1")
        case 3:
            (folder / "device").symlink_to("/dev/zero")
        case 4:
            (folder / "bomb.zip").write_bytes(bomb(rng.choice((1, 1, 1, 1, 1, 1, 1, 1, 1, 65))))
        case _:
            raw = io.BytesIO()
            with zipfile.ZipFile(
                raw, "w", rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_LZMA))
            ) as archive:
                for name, data in SAMPLES.items():
                    archive.writestr(name, data)
            (folder / "damaged.zip").write_bytes(b"PK\x03\x04" + damaged(rng, raw.getvalue())[4:])


def one(seed: int, folder: Path | None = None) -> str:
    """Make the input of a seed and diagnose it. Returns "" or what is wrong."""
    rng = random.Random(seed)
    files: dict[str, bytes] = {}
    for name in rng.sample(list(SAMPLES), rng.choice((1, 1, 2, 4))):
        structured = name.endswith(".json") or name.startswith("trace")
        data = restructured(rng, name) if structured and rng.random() < 0.6 else damaged(rng, SAMPLES[name])
        files[rng.choice((name, name, "trace_rank_0", f"x\x1b[31m{name}"))] = data
    if rng.random() < 0.1:
        files[SAVED] = damaged_values(rng, saved()) if rng.random() < 0.7 else damaged(rng, saved())
    began = time.process_time()
    if folder is not None:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        (folder / "good_rank_9.log").write_text(watchdog(9, 5, "ALLREDUCE"))
        planted(rng, folder)
        evidence = read([folder])
        if not any(getattr(record, "rank", None) == 9 for record in evidence.records):
            return "the good file was not used"
    else:
        evidence = read_memory(files)
    wrong = [line for line in evidence.not_understood if not REFUSAL.match(line)]
    if wrong:
        return f"a refusal without a place: {wrong[0]!r}"
    if evidence.records:
        text = escape_lines("\n".join(lines(diagnose(evidence.records), evidence)))
        if CONTROL.search(text):
            return f"a control character is printed: {text!r}"
    seconds = time.process_time() - began
    return f"it took {seconds:.1f} s of a processor" if seconds > MAX_SECONDS else ""


def read_memory(files: dict[str, bytes]) -> Evidence:
    """Read files that exist only in memory."""
    evidence = Evidence()
    read_files(((name, io.BytesIO(data)) for name, data in files.items()), evidence)
    if SAVED in files:
        try:
            evidence = evidence.joined(Evidence(*json_lines.decode(io.BytesIO(files[SAVED]), SAVED)))
        except DamagedFile as error:
            evidence.not_understood.append(str(error))
    return evidence


def fuzz(inputs: int, seed: int) -> list[str]:
    """Try ``inputs`` inputs; every 50th is a folder on disk. Returns what went wrong, one problem in a line."""
    wrong = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # memory that this process took before
    for number in range(seed, seed + inputs):
        try:
            if number % 50 == 0:
                with tempfile.TemporaryDirectory() as folder:
                    found = one(number, Path(folder))
            else:
                found = one(number)
        except Exception as error:
            found = f"{type(error).__name__}: {str(error)[:200]}"
        if found:
            wrong.append(f"seed {number}: {found}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) - before
    return [*wrong, f"{grown} MiB of memory"] if grown > MAX_MIB else wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--debug", action="store_true", help="let the first error through, with its traceback")
    args = parser.parse_args()
    if args.debug:
        print(one(args.seed))
        return 0
    began = time.monotonic()
    wrong = fuzz(args.inputs, args.seed)
    for line in wrong[:50]:
        print(line)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(
        f"{args.inputs} inputs from seed {args.seed}: {len(wrong)} wrong, {time.monotonic() - began:.0f} s, {peak} MiB"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
