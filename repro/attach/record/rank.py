"""This process as a recorded rank: its witness file, the thread that answers the watcher, and how the process ends.

A process becomes a rank when it imports torch.distributed with RANK and WORLD_SIZE set, or when it calls
init_process_group. If several processes have the same RANK, only the first is recorded: the others are helpers, such as
data loaders, that inherited the variable.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repro.attach.notice import notice
from repro.attach.record import compiled
from repro.attach.record.imports import replace
from repro.trace.knowledge import UNDECLARED, WITNESS

if TYPE_CHECKING:
    from repro.trace.recording.recorder import Recorder

QUIET_WINDOW_S = 5.0
"""The quiet window of a recorded job.

It is longer than the 1 s of the lab's runs, because a user's job can compute, load data or save for seconds between two
collectives.
"""

LONGEST_WATCH_S = 1e6

DEVICE_GROUPS = "device_groups"
"""File in a job's folder with the names of the groups whose collectives are queued on a device, one in a line."""

JOB = "job"
"""Name of a symbolic link in the folder of a recording. Its target is the key of the job that uses this folder."""


class _Thread(threading.local):
    """The state of one thread: ``layer`` is the name of the module that runs in it."""

    layer = ""


_library: Any = compiled.load()


class Rank:
    """A recorded rank. Several threads of the program record events; ``lock`` lets one thread record at a time.

    The lock is reentrant: while a thread writes an event, a signal handler of the program, or the finaliser of an
    object that Python collects, can cause another event in the same thread.
    """

    def __init__(self, recorder: Recorder, rank: int, root: Path) -> None:
        self.recorder = recorder
        self.rank = rank
        self.root = root
        self.lock = threading.RLock()
        self.local = _Thread() if _library is None else _library.Thread()
        self.attended: list[Callable[[], None]] = []  # functions that the attendant calls regularly

    @contextlib.contextmanager
    def in_layer(self, name: str) -> Iterator[None]:
        """Record ``name`` as the module of all collectives that this thread issues within the ``with`` block."""
        outer, self.local.layer = self.local.layer, name
        try:
            yield
        finally:
            self.local.layer = outer

    def phase(self, name: str) -> None:
        with self.lock:
            self.recorder.phase(name)

    def local_event(self, event: str, name: str, holder: int = -1) -> None:
        with self.lock:
            self.recorder.local(event, name, holder)

    def note_device_group(self, name: str) -> None:
        """Tell the watcher, in a file, that the collectives of the group ``name`` are queued on a device.

        The watcher then knows that a call of such a collective returns before the collective completes.
        """
        with contextlib.suppress(OSError), (self.root / DEVICE_GROUPS).open("a") as file:
            file.write(f"{name}\n")


current: Rank | None = None
"""The rank that this process is; None if it is not a rank. The hooks of collectives read it at each call."""

knows = UNDECLARED
"""What the witness of this process can show (see repro.trace.knowledge).

Without a call of `declares_steps`, the witness cannot show which steps have begun, because a program declares no steps.
"""

with_modules = False
_base: Path | None = None
_meeting = ""  # the name given to `meet_at`; "" without a call
_owner_pid = 0
_ended = False


def configure(base: Path, modules: bool) -> None:
    """Set where this process writes its witness if it becomes a rank. A forked child does not write into this witness.

    base: the folder of the recording; modules: whether to record the module of each collective
    """
    global _base, with_modules
    _base, with_modules = base.absolute(), modules
    os.register_at_fork(after_in_child=_forget)


def is_configured() -> bool:
    """Whether recording has been set up by `configure`."""
    return _base is not None


def meet_at(meeting: str) -> None:
    """Set the name of the job to which this process and its forked children belong.

    Processes record into the same folder if this name, the number of ranks, and torchrun's restart count are equal in
    all of them. Without this call, the name is the rendezvous of the ranks: their init_method, or the address and port
    at which they connect.

    meeting: the name of the job, such as "vllm"
    """
    global _meeting
    _meeting = meeting


def declares_steps() -> None:
    """Note that a plug-in declares the steps of this process.

    The judge then knows that a step which is not in the witness has not begun.
    """
    global knows
    knows = WITNESS


def folder(num_ranks: int) -> Path:
    """Return the folder of the job to which this process belongs; make the folder, with run.json, if it does not exist.

    A process that is no rank can call this, too. Raises OSError if the folder cannot be made.

    num_ranks: the number of ranks of the job
    """
    assert _base is not None, "configure() comes first"
    root = _folder_of_job(_base, _key(num_ranks, ""))
    _describe(root, num_ranks)
    return root


def _forget() -> None:
    """Stop recording in a forked child, because the witness belongs to the parent."""
    use(None)


def use(rank: Rank | None) -> None:
    """Set the rank for which the hooks of this process record; None switches the hooks off."""
    global current
    current = rank
    if _library is not None:
        _library.record(rank is not None, getattr(rank.recorder, "tape", None) if rank is not None else None)


def become_from_environment() -> None:
    """If the variables RANK and WORLD_SIZE are set, record this process as the rank that they give; else do nothing."""
    rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if rank.isdigit() and world.isdigit() and int(rank) < int(world):
        become(int(rank), int(world))


def become(rank: int, num_ranks: int, meeting: str = "") -> None:
    """Open the witness of a rank, and record this process as this rank from now on. A second call does nothing.

    If another process has already opened the witness of this rank, or if the witness cannot be opened, print that this
    process is not recorded. Does nothing before `configure`.

    meeting: the rendezvous of the job's ranks, such as init_method, if it is not the address and port in the
    environment. A name that was given to `meet_at` is used instead
    """
    global _owner_pid
    if _base is None or current is not None or _owner_pid == os.getpid():
        return
    _owner_pid = os.getpid()
    from repro.attach.record.compiled.recorder import recorder_type
    from repro.trace.witness.parse import WitnessError

    try:
        root = _folder_of_job(_base, _key(num_ranks, meeting))
        _describe(root, num_ranks)
        recorder = recorder_type().open(
            root / "events" / f"rank{rank:03d}.wit", rank, num_ranks, run_id=root.name[:60], knows=knows
        )
    except (OSError, WitnessError) as error:
        notice(f"[rank {rank}] repro record: this process is not recorded: {error}")
        return
    me = Rank(recorder, rank, root)
    use(me)
    me.phase("start")
    _end_with_the_process()
    from repro.attach.record.attendant import Attendant

    Attendant(me).start()


@contextlib.contextmanager
def recorded_as(rank: Rank, layer: str) -> Iterator[None]:
    """Record the collectives of this process within the ``with`` block.

    rank: the recorded rank that gets the records; layer: the name that each record gives as its layer
    """
    before = current
    use(rank)
    try:
        with rank.in_layer(layer):
            yield
    finally:
        use(before)


def _key(num_ranks: int, meeting: str) -> str:
    """Return a text that identifies the job of this process. It is equal in all ranks of the job, and in no other job.

    meeting: the rendezvous of the ranks; "" if it is the address and port in the environment
    """
    environ = os.environ
    place = _meeting or meeting or f"{environ.get('MASTER_ADDR', '')}-{environ.get('MASTER_PORT', '')}"
    parts = (place, f"{num_ranks}ranks", environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return "".join(c if c.isalnum() or c in "-." else "_" for c in "-".join(parts))[-150:]


def _folder_of_job(base: Path, key: str) -> Path:
    """Return the folder of the job that ``key`` identifies; make it and its subfolders if they do not exist.

    The first job of the recording has the folder ``base``, each later job has ``base/jobs/KEY``.
    """
    base.mkdir(parents=True, exist_ok=True)
    try:
        os.symlink(key, base / JOB)  # creating the link is atomic, and its target is its content
    except FileExistsError:
        if os.readlink(base / JOB) != key:
            base = base / "jobs" / key
    for part in ("events", "stacks", "fr", "logs"):
        (base / part).mkdir(parents=True, exist_ok=True)
    return base


def _describe(root: Path, num_ranks: int) -> None:
    """Write run.json into the job's folder ``root``, unless the file exists. The watcher waits for this file."""
    from hybrid_moe_ref.files import write_atomically
    from repro.store.run_dir import RunDir

    path = RunDir(root).description
    if path.exists():
        return
    import json

    title = " ".join([os.path.basename(sys.argv[0] or "python"), *sys.argv[1:]])[:200] if hasattr(sys, "argv") else ""
    fields = {
        "title": title or "recorded program",
        "num_ranks": num_ranks,
        "quiet_window_s": _quiet_window_s(),
        "deadline_s": LONGEST_WATCH_S,
        "schema_version": 1,
    }
    write_atomically(path, json.dumps(fields, indent=1))


def _quiet_window_s() -> float:
    """Return HMR_QUIET_WINDOW in seconds, or the default if the variable is empty or not valid.

    An invalid value must not end the user's program, so it only causes a printed line.
    """
    text = os.environ.get("HMR_QUIET_WINDOW", "")
    with contextlib.suppress(ValueError):
        if not text or 0 < float(text) <= LONGEST_WATCH_S:
            return float(text or QUIET_WINDOW_S)
    notice(f"repro record: HMR_QUIET_WINDOW={text} is not a number of seconds above 0: {QUIET_WINDOW_S:g} is used")
    return QUIET_WINDOW_S


# -- the end ---------------------------------------------------------------------------------------------------------


def _end_with_the_process() -> None:
    """Register handlers that record how the process ends: done, or failed with an exception."""
    from multiprocessing import util

    atexit.register(done)
    util.Finalize(None, done, exitpriority=-1000)  # a child process of multiprocessing runs no atexit functions
    replace(sys, "excepthook", _reporting)


def _reporting(hook: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(hook)
    def excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> Any:
        failed(error)
        return hook(kind, error, trace)

    return excepthook


def failed(error: BaseException) -> None:
    """Record that an exception ends this rank, unless it is a SystemExit without an error code.

    A KeyboardInterrupt is recorded too, so that the judge knows that the user interrupted the rank.
    """
    global _ended
    if current is None or _ended or (isinstance(error, SystemExit) and not error.code):
        return
    _ended = True
    with current.lock:
        current.recorder.failed(f"{type(error).__name__}: {error}")


def done() -> None:
    """Stop recording. If `failed` has recorded no exception, also record that this rank ends without an error."""
    global _ended
    rank = current
    use(None)
    if rank is None or _ended:
        return
    _ended = True
    from repro.attach.record.collectives import note_completions

    note_completions(rank)
    with rank.lock:
        rank.recorder.done()
