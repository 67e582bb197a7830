"""Records of evidence from other tools: one type for each kind of fact that a tool reports about a rank.

The readers in `repro.ingest` produce these records, and `repro.verdict.partial` judges them. A field that the evidence
does not give stays at its default, and no rule concludes anything from such a field. For example, `rank` is None if
only a group rank is known, `seq` is None if the tool prints no number, and `at_s` is None if it prints no time.

Ranks are global ranks. If a reader finds only a group rank, it converts the number to the global rank, or leaves `rank`
None.

Times (`at_s`, `since_s`) are seconds since the start of the year in which the tool printed the line. The time zone is
that of the printed time. Most tools print no year and no time zone, so times of two hosts can only be compared with
caution. `ProcessLook.at_s` is another kind of time (see there).
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
    """A collective that PyTorch's watchdog reported as timed out.

    rank        global rank; None if only the group rank is printed
    group_rank  rank in the group
    ran_s       for how long the collective had run
    at_s        when the watchdog reported the timeout, in seconds since the start of the year, as printed in the log
    since_s     when the wait began: at_s - ran_s
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
    """How far one rank has come in one group, from a line of PyTorch's watchdog.

    enqueued    number of the last operation that the rank queued; None if unknown
    completed   number of the last operation that completed; None if unknown
    at_s        when the line was printed, in seconds since the start of the year
    stuck       number of the operation that timed out; None if the line names no operation
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
    """A process of a job, as far as the evidence shows it.

    title   title of the process, or the name by which a message calls it; "" if unknown
    rank    global rank; None if unknown, or if the process is no rank
    role    in a serving engine: "worker", "engine" or "front end"; "" if unknown
    """

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
    """One process as a member of one NCCL communicator, from an NCCL log or from an answer of NCCL's RAS.

    name        the communicator's id, equal in all its processes
    pointer     the address by which later log lines of this process name the communicator; "" from RAS
    rank        rank in the communicator, not the global rank
    size        number of ranks in the communicator
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
    """The operations that one process launched on one NCCL communicator, from its log with NCCL_DEBUG=INFO.

    The log does not show whether an operation completed.

    pointer     the address by which the log names the communicator
    group       the communicator; its `members` are global ranks, () if they are not known
    count       number of collectives launched since the communicator was created; None if unknown
    calls       the newest operations, oldest first
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
    """The stack of one thread of a process at one moment.

    frames      "function (file:line)", innermost first
    activity    what the thread does, as a name from activities.toml: collective, lock, building, compiling, device,
                queue, idle, answer, loading, saving, data, debugger, exit, sleep; "" if unknown
    detail      the collective, the lock's file, the module that is built, or other details of the activity
    look        number of this stack among the stacks of the same thread, from 0, in the order of the file names; set
                when the records are judged
    group       for a collective: name of the variable that holds its process group; "default" if the call names no
                group, "" if unknown
    other_groups  for a collective: names of other variables in these frames that hold a process group
    peer        for a send or receive: the global rank of the other end; None if unknown
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
    """A line that says why a process has ended or will end: out of memory, a device error, an exception, a signal.

    kind        memory (out of memory), device (a CUDA or GPU error), exception, killed, ended (a launcher saw the end),
                start (the ranks could not connect), timeout, or consequence (another rank had ended before)
    at_s        when the line was printed, in seconds since the start of the year
    bus         for a device error in the log of the Linux kernel: the PCI address of the GPU, "0000:5d:00"
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
    """A process that left the job, as a line of another process reports: "Connection closed by peer".

    seen_by   the process that printed the line
    rank      the rank that left; None if the line does not name this rank
    at_s      when the line was printed, in seconds since the start of the year
    """

    seen_by: Process
    rank: int | None
    text: str
    at_s: float | None = None
    source: Source = NOWHERE


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Two ranks that called different collectives, as TORCH_DISTRIBUTED_DEBUG=DETAIL reports it before they run.

    rank, call          the rank that the report names first, and the collective that this rank called
    other, other_call   a second rank, and the collective that it called; None if the report names only one rank
    aspects             what differs between the two collectives, for example the shapes
    """

    rank: int
    call: Call
    other: int | None
    other_call: Call | None
    aspects: str
    source: Source = NOWHERE


@dataclass(frozen=True, slots=True)
class RasCommunicator:
    """One communicator in an answer of NCCL's RAS (its service for reliability, availability, serviceability).

    status     RAS's word for the state of the ranks: RUNNING, INIT, FINALIZE or ABORT
    errors     RAS's word for the kind of error, such as MISMATCH (different counts) or INCOMPLETE; OK if there is none
    launched   operation -> rank -> number of launches by this rank; RAS does not say which launches are complete
    others     ranks that the answer only counts: operation -> (how many ranks, number of launches by each of them)
    missing    the ranks from which RAS got no data

    All ranks here are ranks in the communicator, not global ranks.
    """

    name: str
    size: int
    status: str
    errors: str
    launched: dict[str, dict[int, int]] = field(default_factory=dict)
    others: dict[str, tuple[int, int]] = field(default_factory=dict)
    missing: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RasAnswer:
    """One answer of NCCL's RAS service.

    order   what the answers of one job are sorted by: the time of the answer, or a file name if no time is known
    """

    communicators: tuple[RasCommunicator, ...]
    version: str = ""
    order: str = ""
    source: Source = NOWHERE


@dataclass(frozen=True, slots=True)
class Note:
    """A line of a log that proves nothing by itself: a heartbeat, a warning, a version, a world size.

    kind        what the line is about, as a name that the reader chooses: "heartbeat", "version", "world" (number of
                ranks), "process" (a pid and its rank), "sizes" (NCCL received a message of another size), "unreadable"
                (a tool could not read a process), and so on
    text        the content of the line in words, for the report
    value       the number or name that the line gives, for the rules of the judge; "" if there is none
    at_s        when the line was printed, in seconds since the start of the year
    """

    kind: str
    text: str
    process: Process = Process()
    value: str = ""
    at_s: float | None = None
    source: Source = NOWHERE


@dataclass(frozen=True, slots=True)
class Child:
    """A descendant of a rank's process, such as a compiler or a data loader.

    state, cpu_s   as in `ProcessLook`
    age_s          seconds since the process started
    """

    pid: int
    name: str
    command: str
    state: str
    age_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class ProcessLook:
    """What the operating system reported about a process at one moment. We call one such observation a look.

    look      number of the look, from 1
    at_s      time of the look in seconds on the host's clock; compare it only with other looks at the same host
    state     R runs, S sleeps, D waits for a device, T suspended by a signal, t suspended by a debugger,
              Z ended and not reaped, X ended
    cpu_s     processor seconds of the process so far, without its children
    first_thread_cpu_s  processor seconds of the main thread so far
    switches  how often the main thread has left a processor; the number does not grow while the thread is blocked
    place     the function of the Linux kernel in which the main thread waits; "" if it cannot be read
    children  the descendants of the process
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

    look      number of the look (observation of all processes by `hmr collect`) at this moment, from 1
    kind      flock, fcntl, lease, or baton: a file that exists as long as the lock is held
    holders   pids of the processes that hold the lock
    waiters   pids of the processes that the operating system blocks on the lock; a program that polls is not listed
    hidden    number of Python processes whose open files could not be read; possibly one of them holds the lock
    age_s     seconds since the file was last changed; None if unknown
    names     a description of each process of `holders`
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
    """TCP connections between the processes of a job on one host, at one moment.

    look      number of the look (observation of all processes by `hmr collect`) at this moment, from 1
    between   a dict from (pid, larger pid) to the number of connections between these two processes
    unread    a dict from pid to the number of bytes that arrived and that the process has not read
    closed    pids of the processes that have a connection which the other end has closed
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
