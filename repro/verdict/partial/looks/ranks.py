"""Describe what each rank did between the first and the last look.

A look is one observation of the processes by `hmr collect`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from repro.trace.foreign.records import Child, ProcessLook, Stack
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.words import program_frames

SHORTEST_S = 0.5
"""Two looks must be at least this many seconds apart to show whether a rank did something between them."""
STILL_SWITCHES_PER_S = 1.5
"""If a thread has at most this many context switches per second, it does nothing. A blocked thread has almost none, a
thread that polls has about ten."""
BUSY_CORES = 0.05
SPINNING_LOOKS = 4
"""If this many stacks show a rank at the same frames of a collective, the rank waits in the collective by spinning."""
COMPILERS = (
    "nvcc", "cicc", "ptxas", "fatbinary", "cudafe++", "ninja", "cc1plus", "cc1", "g++", "gcc", "c++", "clang",
    "clang++", "hipcc", "ld", "collect2", "as", "cmake", "make", "nvlink", "lld",
)  # fmt: skip
WAITING = ("collective", "device", "backward", "lock", "idle", "answer", "queue", "exit")
"""The activities (`Stack.activity`) of a rank that waits for another process or for its device."""
_VERBS = {
    "collective": "waits in", "device": "waits for", "backward": "waits in", "lock": "waits for", "building": "builds:",
    "compiling": "compiles:", "idle": "is idle:", "answer": "waits for", "queue": "waits for", "exit": "waits for",
    "saving": "saves", "loading": "loads", "data": "waits for", "debugger": "is at", "sleep": "is in",
}  # fmt: skip
_SOURCES = (".cu", ".cpp", ".cc", ".c", ".cxx", ".hip", ".ptx", ".cubin")
_MODULE = re.compile(r"-DTORCH_EXTENSION_NAME=(\w+)")
POLLING = ("the start of a process group", "a wait for torch's store")
"""Values of `Stack.detail` for waits in which torch polls. The thread then has context switches although it waits."""
AMONG_RANKS = ("collective", "device", "backward")


@dataclass(frozen=True, slots=True)
class RankLook:
    """What two looks show about one rank's process. A look is one observation by `hmr collect`.

    first, last   the process at the first and at the last look; the same record if there was only one look
    stacks        the stacks of the main thread, oldest first: those of the looks, and any that were taken between them;
                  () if none could be taken
    """

    rank: int
    first: ProcessLook
    last: ProcessLook
    stacks: tuple[Stack, ...] = ()

    @property
    def apart_s(self) -> float:
        return self.last.at_s - self.first.at_s

    @property
    def ended(self) -> bool:
        return self.last.state in ("Z", "X")

    @property
    def stopped(self) -> bool:
        return self.last.state in ("T", "t") and self.first.state in ("T", "t")

    @property
    def cores(self) -> float:
        """How many processors the rank and its child processes kept busy, on average, between first and last look.

        0 if the two looks are less than SHORTEST_S seconds apart.
        """
        if self.apart_s < SHORTEST_S:
            return 0.0
        before = {child.pid: child.cpu_s for child in self.first.children}
        children_s = sum(max(0.0, child.cpu_s - before.get(child.pid, 0.0)) for child in self.last.children)
        return max(0.0, self.last.cpu_s - self.first.cpu_s + children_s) / self.apart_s

    @property
    def first_thread_cores(self) -> float:
        """Which share of one processor the main thread used between the first and the last look: 0 to 1.

        0 if the two looks are less than SHORTEST_S seconds apart.
        """
        if self.apart_s < SHORTEST_S:
            return 0.0
        return max(0.0, self.last.first_thread_cpu_s - self.first.first_thread_cpu_s) / self.apart_s

    @property
    def idle(self) -> bool:
        """Whether the rank used almost no processor time between the looks: it waits or polls."""
        return self.apart_s >= SHORTEST_S and self.cores < BUSY_CORES

    @property
    def still(self) -> bool:
        """Whether the main thread and the child processes of the rank did nothing between the looks.

        Return False also if the process possibly lacked a processor. This is so if it was ready to run in both looks;
        or if it was ready to run in one look, and its frames differ between the looks.
        """
        # with equal frames, one such look proves nothing: a waiting process that polls is ready to run now and then
        num_ready = (self.first.state, self.last.state).count("R")
        if num_ready == 2 or (num_ready and not self.same_frames):
            return False
        switches = self.last.switches - self.first.switches
        return (
            self.apart_s >= SHORTEST_S and self.cores < BUSY_CORES and switches <= STILL_SWITCHES_PER_S * self.apart_s
        )

    @property
    def stack(self) -> Stack | None:
        return self.stacks[-1] if self.stacks else None

    @property
    def activity(self) -> str:
        return self.stack.activity if self.stack else ""

    @property
    def same_frames(self) -> bool:
        """Whether all looks show the same frames of the program itself. The frames of torch may differ.

        False if the rank has fewer than two stacks.
        """
        return len(self.stacks) > 1 and len({program_frames(stack.frames, 6) for stack in self.stacks}) == 1

    @property
    def waits(self) -> bool:
        """Whether the rank waited for other ranks at the same place in all looks, and did nothing else between them."""
        if not self.same_frames or any(stack.activity not in AMONG_RANKS for stack in self.stacks):
            return False
        if self.activity == "device":
            return True  # a thread that waits for CUDA may keep a processor busy
        polls = self.stack is not None and self.stack.detail in POLLING and self.cores < BUSY_CORES
        return self.still or polls

    @property
    def spins(self) -> bool:
        """Whether the rank spins in a collective: all its stacks are in a collective, and have the same frames.

        The rank must have at least SPINNING_LOOKS stacks.
        """
        collective = all(stack.activity in AMONG_RANKS for stack in self.stacks)
        return len(self.stacks) >= SPINNING_LOOKS and collective and len({stack.frames for stack in self.stacks}) == 1

    @property
    def compilers(self) -> tuple[Child, ...]:
        return tuple(child for child in self.last.children if child.name in COMPILERS)

    @property
    def source(self) -> str:
        return str(self.stack.source if self.stack else self.last.source)

    @property
    def at(self) -> str:
        """Return what the rank does, where, and the source: "waits in all_reduce at step (train.py:40) (stacks/…)"."""
        stack = self.stack
        if stack is None:
            place = f" in the kernel's {self.last.place}" if self.last.place else ""
            return f"waits{place}; its stack was not seen ({self.last.source})"
        return f"{what_it_does(stack)} at {place_of(stack)} ({stack.source})"


def rank_looks(job: JobRecords) -> dict[int, RankLook]:
    """Return, for each rank, what the looks show about its worker process. A rank with two workers is left out."""
    rows: dict[int, list[ProcessLook]] = {}
    for record in job.process_looks:
        if record.process.rank is not None and record.process.role in ("worker", ""):
            rows.setdefault(record.process.rank, []).append(record)
    stacks = job.main_stacks()
    looks = {}
    for rank, records in sorted(rows.items()):
        ordered = sorted(records, key=lambda record: record.look)
        pids = {(record.host, record.process.pid) for record in ordered}
        if len(pids) == 1:
            pid = ordered[0].process.pid
            own = tuple(stack for stack in stacks.get(rank, ()) if stack.process.pid == pid)
            looks[rank] = RankLook(rank, ordered[0], ordered[-1], own)
    return looks


def place_of(stack: Stack) -> str:
    """Return where a thread is, as text: "wait (threading.py:320) < step (train.py:40)".

    These are the innermost frame outside torch, and the next outer frame of the program.
    """
    own = [frame for frame in stack.frames if "(torch/" not in frame and ".so" not in frame]
    files = [frame for frame in own[1:] if "/" not in frame.rpartition("(")[2]]
    return " < ".join([*own[:1], *files[:1]]) or (stack.frames[0] if stack.frames else "?")


def call_of(look: RankLook) -> str:
    """Return the collective in which a rank waits, as text: "all_reduce of group tp_group"."""
    stack = look.stack
    if stack is None:
        return "a wait"
    if stack.activity == "backward":
        return "the gradient all-reduce of its backward pass"
    if stack.activity == "device":
        return f"a wait for its device ({stack.detail})"
    group = "" if stack.group in ("", "default") else f" of group {stack.group}"
    if stack.group == "default" and stack.detail not in POLLING:
        group = " of the default group"
    peer = ""
    if stack.peer is not None and stack.detail in ("send", "isend", "recv", "irecv"):
        peer = f" {'to' if 'send' in stack.detail else 'from'} rank {stack.peer}"
    return f"{stack.detail}{peer}{group}"


def build_lines(look: RankLook) -> list[str]:
    """Return a sentence for each compiler that the rank runs, at most three.

    If the rank's stack shows that the rank itself builds, add a sentence that says where in the code it is.
    """
    lines = [
        f"Rank {look.rank} has had the child process {child.pid} for {child.age_s:.0f} s, with {child.cpu_s:.1f} s of "
        f"processor time: {_short(child)} ({look.last.source})"
        for child in sorted(look.compilers, key=lambda row: -row.cpu_s)[:3]
    ]
    if look.stack is not None and look.activity in ("building", "compiling"):
        lines.append(f"Rank {look.rank} {look.at}")
    return lines


def _short(child: Child) -> str:
    """Shorten the command of a compiler to its name, the module and the source file: "nvcc module moe_ops kernel.cu".

    If the command has no source file, return its beginning.
    """
    sources = [word for word in child.command.split() if word.endswith(_SOURCES)]
    module = _MODULE.search(child.command)
    words = [child.name, *([f"module {module[1]}"] if module else []), *sources[-1:]]
    return " ".join(words) if len(words) > 1 else child.command[:100] or child.name


def what_it_does(stack: Stack) -> str:
    """Return what a thread does, as the predicate of a sentence: "waits in all_reduce"."""
    verb = _VERBS.get(stack.activity, f"is in {stack.activity}:" if stack.activity else "runs")
    return f"{verb} {stack.detail}".rstrip()


def seconds_between(looks: Sequence[RankLook]) -> float:
    return min((look.apart_s for look in looks), default=0.0)


def wait_row(ranks: Sequence[int], waits_in: str, awaited: Sequence[int], why: str, source: str) -> dict[str, Any]:
    """Return a dict that describes one wait, for `Diagnosis.waits`.

    ranks     the ranks that wait
    waits_in  the collective or the lock, as text
    awaited   the ranks for which they wait; [] if they wait for no rank
    why       why the wait does not end
    source    the file that shows the wait
    """
    return {"ranks": list(ranks), "waits_in": waits_in, "for": list(awaited), "why": why, "source": source}
