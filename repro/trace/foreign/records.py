"""Records of evidence from other tools: one type for each kind of fact that a tool reports about a rank.

The readers in `repro.ingest` produce these records, and `repro.verdict.partial` judges them. A field that the evidence
does not give stays at its default, and no rule concludes anything from such a field. For example, `rank` is None if
only a group rank is known, `seq` is None if the tool prints no number, and `at_s` is None if it prints no time.

Ranks are global ranks. A reader that finds a group rank converts it, or leaves `rank` None.
Times (`at_s`, `since_s`) are seconds since the start of the year on the clock that the tool printed. Most tools print
no year and no time zone, so times of two hosts can only be compared with caution.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from repro.trace.foreign.operations import NOWHERE as NOWHERE
from repro.trace.foreign.operations import Call as Call
from repro.trace.foreign.operations import Group as Group
from repro.trace.foreign.operations import Source as Source
from repro.trace.foreign.recorder_dump import GroupRecord as GroupRecord
from repro.trace.foreign.recorder_dump import RecorderDump as RecorderDump


@dataclass(frozen=True, slots=True)
class TimedOut:
    """A collective that a watchdog reported as timed out.

    rank        global rank; None if only the group rank is printed
    group_rank  rank in the group
    since_s     start of the wait: the time stamp of the report minus the time that the collective ran
    """

    rank: int | None
    group_rank: int | None
    group: Group | None
    call: Call
    ran_s: float
    at_s: float | None = None
    since_s: float | None = None
    source: Source = NOWHERE


@dataclass(frozen=True, slots=True)
class Progress:
    """Counters of one rank in one group: the last operation queued and the last one completed; None if unknown.

    stuck       number of the operation that the watchdog gave up; None if the line names no operation
    """

    rank: int | None
    group_rank: int | None
    group: Group
    enqueued: int | None
    completed: int | None
    at_s: float | None = None
    source: Source = NOWHERE
    stuck: int | None = None


@dataclass(frozen=True, slots=True)
class Process:
    """A process of a job, the rank that it belongs to, and its role (worker, engine, front end)."""

    pid: int | None = None
    title: str = ""
    rank: int | None = None
    role: str = ""

    def __str__(self) -> str:
        part = {"engine": " (engine)", "front end": " (front end)"}.get(self.role, "")
        if self.rank is not None:
            return f"rank {self.rank}{part}"
        return self.title or (f"process {self.pid}" if self.pid is not None else "a process")


@dataclass(frozen=True, slots=True)
class Member:
    """The membership of a process in an NCCL communicator.

    name        the communicator's name, equal in all its processes
    pointer     the communicator's name in later lines of this process
    rank        rank in the communicator
    bus         PCI address of the GPU, "0000:5d:00"; "" if it is not printed
    """

    process: Process
    host: str
    name: str
    pointer: str
    rank: int
    size: int
    bus: str = ""
    source: Source = NOWHERE


@dataclass(frozen=True, slots=True)
class Launches:
    """Launches of one process on one NCCL communicator, from its NCCL_DEBUG=INFO log, which does not show completion.

    group       the communicator; `members` are global ranks, () if they are not known
    count       number of launches since the communicator began; None if the log does not show its beginning
    calls       the newest launches, oldest first
    """

    process: Process
    host: str
    pointer: str
    group: Group
    count: int | None
    calls: tuple[Call, ...]
    source: Source = NOWHERE


@dataclass(frozen=True, slots=True)
class Stack:
    """One thread of a process at one moment. `frames` are as in `Call`; `activity` is a name from activities.toml.

    activity    collective, lock, building, compiling, device, queue, idle, answer, loading, saving, data, debugger, ""
    detail      the collective, the lock's file, the module that is built, or other details of the activity
    look        number of the look, from 0, if the same process was looked at several times
    group       of a collective: the variable that holds its process group; "default" if none is given, "" if unknown
    other_groups  names of other variables of these frames that hold another group
    peer        of a send or receive: the rank of the other end in its group; None if unknown
    """

    process: Process
    frames: tuple[str, ...]
    activity: str = ""
    detail: str = ""
    thread: str = ""
    look: int = 0
    source: Source = NOWHERE
    group: str = ""
    other_groups: tuple[str, ...] = ()
    peer: int | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of a process, past or imminent: out of memory, a device error, an exception, a signal.

    kind        memory, device, exception, killed, ended, start, consequence (of another rank's end), timeout
    bus         for a device error that the kernel reports: the PCI address of the GPU, "0000:5d:00"
    host        the host that printed the line; "" if the line does not name it
    """

    process: Process
    kind: str
    text: str
    at_s: float | None = None
    source: Source = NOWHERE
    bus: str = ""
    host: str = ""


@dataclass(frozen=True, slots=True)
class Left:
    """A process that noticed the end of another one.

    `rank` is the rank that ended; None if only its address is known.
    """

    seen_by: Process
    rank: int | None
    text: str
    at_s: float | None = None
    source: Source = NOWHERE


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A difference between two ranks that TORCH_DISTRIBUTED_DEBUG=DETAIL detected before a collective."""

    rank: int
    call: Call
    other: int | None
    other_call: Call | None
    aspects: str
    source: Source = NOWHERE


@dataclass(frozen=True, slots=True)
class RasCommunicator:
    """One communicator in an answer of NCCL's RAS. `launched`: operation -> {rank in the communicator: launches}.

    `launched` counts what the host queued. It does not show completion.
    """

    name: str
    size: int
    status: str
    errors: str
    launched: dict[str, dict[int, int]] = field(default_factory=dict)
    others: dict[str, tuple[int, int]] = field(default_factory=dict)
    """operation -> (number of ranks not listed one by one, their launches)"""

    missing: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RasAnswer:
    """One answer of NCCL's RAS. `order` sorts several answers of one job."""

    communicators: tuple[RasCommunicator, ...]
    version: str = ""
    order: str = ""
    source: Source = NOWHERE


@dataclass(frozen=True, slots=True)
class Note:
    """A line that gives context, or that is often misunderstood: a heartbeat, a warning, a version, a world size.

    kind        heartbeat, loopback, incomplete, version, world, watchdog, stuck, compiled, barrier, torchrun, engine
                size (workers of a vLLM engine), local rank, deepep, network, ras, repeated, process (a pid and its
                rank),
                sizes (NCCL received a message of another size), unreadable (a tool that failed to look)
    """

    kind: str
    text: str
    process: Process = Process()
    value: str = ""
    at_s: float | None = None
    source: Source = NOWHERE


@dataclass(frozen=True, slots=True)
class Child:
    """A process below a rank's process, such as a compiler or a data loader.

    `state` and `cpu_s` are as in `ProcessLook`.
    """

    pid: int
    name: str
    command: str
    state: str
    age_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class ProcessLook:
    """What the operating system reported about a process at one moment.

    at_s      when, in seconds on the host's clock; only differences between looks at one host are meaningful
    state     R runs, S sleeps, D waits for a device, T stopped, t stopped by a debugger, Z ended and not reaped
    cpu_s     processor seconds of the process so far, without its children
    first_thread_cpu_s  processor seconds of the thread that runs the program
    switches  how often its first thread has left a processor; for a blocked thread this does not grow
    place     the function of the kernel in which it waits; "" if hidden
    """

    process: Process
    host: str
    look: int
    at_s: float
    state: str
    cpu_s: float
    first_thread_cpu_s: float
    switches: int
    place: str = ""
    children: tuple[Child, ...] = ()
    source: Source = NOWHERE


@dataclass(frozen=True, slots=True)
class LockLook:
    """A lock file at one moment.

    kind      flock, fcntl, or baton: a file whose existence is the lock
    holders   ids of the processes that hold the lock; `names` describes these processes
    waiters   ids of the processes that the system shows blocked; programs that poll are not among them
    hidden    number of Python processes whose open files could not be read; any of them may hold the lock
    age_s     seconds since the file was last changed; None if that is not known
    """

    path: str
    kind: str
    host: str
    look: int
    holders: tuple[int, ...]
    waiters: tuple[int, ...] = ()
    hidden: int = 0
    age_s: float | None = None
    names: tuple[str, ...] = ()
    source: Source = NOWHERE


@dataclass(frozen=True, slots=True)
class Connections:
    """TCP connections between the processes of a job on one host.

    between   (pid, a larger pid) -> number of connections between the two
    unread    pid -> bytes that wait in its receive queues
    closed    pids of processes whose connection was closed at the other end
    """

    host: str
    look: int
    between: dict[tuple[int, int], int]
    unread: dict[int, int] = field(default_factory=dict)
    closed: tuple[int, ...] = ()
    source: Source = NOWHERE


Observation = (
    RecorderDump | TimedOut | Progress | Member | Launches | Stack | Failure | Left | Mismatch | RasAnswer | Note
    | ProcessLook | LockLook | Connections
)  # fmt: skip
