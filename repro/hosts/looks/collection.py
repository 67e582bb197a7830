"""Collect evidence from a running job, as files for `diagnose`.

The processes are examined twice, some seconds apart. Each examination is called a look.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hybrid_moe_ref.files import write_atomically
from repro.hosts.looks import machine, offers
from repro.hosts.looks.jobs import Job, Member
from repro.hosts.looks.log_files import LogFile, copy_logs, outputs_of
from repro.hosts.looks.look import host_name, look_at
from repro.hosts.looks.proc import command_of, descendants, read_all
from repro.hosts.looks.py_spy import find_py_spy, take_stacks
from repro.hosts.looks.rights import why_hidden
from repro.hosts.looks.signal_stacks import stacks_by_signal
from repro.hosts.looks.variables import Threads, may_move, ranks_by_variables, stripped
from repro.store.run_dir import RunDir, write_json

LOOKS = 2
SAMPLES = ("b", "c", "d")
"""Names of additional stacks between the two looks, for ranks whose first stack does not show whether they wait."""
MAX_CHILD_STACKS = 64
_PYTHON = ("python", "pt_main", "pt_data")
NOT_INSTALLED = "py-spy is not installed, so no stacks were taken: pip install py-spy"


@dataclass
class Collection:
    """One run of `hmr collect`: the job, and what `collect` has found so far.

    job       the job; `collect` fills in ranks that it finds in local variables on the stacks
    signal    number of a signal at which the job's handler writes stacks; 0 if the user allowed none
    logs      log files that the user named
    numbered  True if the real ranks could not be found. Then the processes that can be ranks are numbered from 0, in
              the order of their pids
    hidden    the keys are sentences: for each piece of evidence that could not be taken, what is missing, and why
    """

    run_dir: RunDir
    job: Job
    signal: int = 0
    logs: Sequence[LogFile] = ()
    numbered: bool = False
    hidden: dict[str, None] = field(default_factory=dict)
    _moving: list[int] = field(default_factory=list)

    @property
    def host(self) -> str:
        return file_name(host_name())

    @property
    def ranks(self) -> dict[int, Member]:
        return {member.rank: member for member in self.job.members if member.rank is not None}

    def collect(self, interval_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
        """Examine the processes twice, with ``interval_s`` seconds from the first look to the second.

        Between the two looks, ask the job's processes for dumps, read the kernel log, and copy the job's logs.
        Also take more stacks of the processes whose first stack does not show whether they wait. Raises OSError if a
        file cannot be written.
        """
        for number in range(1, LOOKS + 1):
            began_s = time.monotonic()
            if number > 1:
                self._take_offers()
                self._read_kernel_log()
                self._copy_logs()
                for sample in SAMPLES:
                    sleep(max(0.0, interval_s - (time.monotonic() - began_s)) / (len(SAMPLES) + 1))
                    self._sample_moving(sample)
                sleep(max(0.0, interval_s - (time.monotonic() - began_s)))
            self._look(number)

    def _sample_moving(self, sample: str) -> None:
        """Take another stack of each process that possibly makes progress, although its first stack looks like a wait.

        sample: a letter ("b", "c" or "d") that becomes part of the name of each stack file
        """
        program = find_py_spy()
        for pid, answer in (take_stacks(program, self._moving) if program else {}).items():
            if answer.threads:
                text = json.dumps(stripped(answer.threads, pid, self._title(pid)))
                self._write_stack(pid, f"look1{sample}", "json", f"{text}\n")

    def _look(self, number: int) -> None:
        stacks = self._take_stacks(number)
        self._moving = [pid for pid in self.job.pids if pid in stacks and may_move(stacks[pid], pid)]
        document = look_at(self.job, number, stacks, list(self.hidden), numbered=self.numbered)
        write_json(self.run_dir.facts / f"{self.host}.look{number}.json", document, durable=True)

    def _take_stacks(self, number: int) -> dict[int, Threads]:
        """Take and save stacks. Returns the threads of each process that py-spy could read, by pid.

        If py-spy could not read a process of the job, ask torch's worker server, an HTTP server inside the process, for
        the stacks. If the server does not answer, and the user named a signal, send this signal to the process, whose
        handler then writes the stacks.

        number: 1 for the first look, 2 for the second look
        """
        pids = list(_pids_with_stacks(self.job))
        program = find_py_spy()
        answers = take_stacks(program, pids) if program else {}
        stacks: dict[int, Threads] = {pid: answer.threads for pid, answer in answers.items() if answer.threads}
        self._find_ranks(stacks)
        for pid, threads in stacks.items():
            self._write_stack(pid, f"look{number}", "json", json.dumps(stripped(threads, pid, self._title(pid))) + "\n")
        left = [pid for pid in self.job.pids if pid not in stacks and pid in pids]
        for pid, text in self._other_stacks(left):
            self._write_stack(pid, f"look{number}", "txt", text)
            left.remove(pid)
        if left and not program:
            self.hidden[NOT_INSTALLED] = None
        for pid in left if program else ():
            self.hidden[f"no stack of {self._name(pid)}: {why_hidden(pid) or answers[pid].failure}"] = None
        return stacks

    def _other_stacks(self, pids: list[int]) -> Iterator[tuple[int, bytes]]:
        members = {member.pid: member for member in self.job.members}
        answered = set()
        for pid in pids:
            if text := offers.ask_worker_server(members[pid], "dump_traceback"):
                answered.add(pid)
                yield pid, text
        if self.signal:
            yield from stacks_by_signal([pid for pid in pids if pid not in answered], self.signal).items()

    def _take_offers(self) -> None:
        """Ask the job's processes for Flight Recorder dumps, and NCCL's RAS for the state of the job. Save the answers.

        The dumps come through torch's worker server or torch's dump pipe.
        """
        folder = self.run_dir.root / "fr" / self.host
        folder.mkdir(exist_ok=True)
        for rank, member in self.ranks.items():
            for question in ("fr_trace_json", "dump_nccl_trace_json"):
                if dump := offers.ask_worker_server(member, question):
                    write_atomically(folder / f"{question}_rank_{rank}.json", dump)
        for rank, path in offers.request_dumps(self.ranks).items():
            try:
                write_atomically(folder / f"nccl_trace_rank_{rank}", offers.read_dump(path))
            except (OSError, ValueError) as error:
                self.hidden[f"no recorder dump of rank {rank}: {error}"] = None
        addresses = {(member.environment or {}).get("NCCL_RAS_ADDR", "") for member in self.job.members}
        for number, address in enumerate(sorted(addresses), 1):
            if answer := offers.ask_ras(address):
                write_atomically(self.run_dir.root / "logs" / f"ras_{self.host}_{number}.txt", answer)

    def _copy_logs(self) -> None:
        """Copy the log files that the user named, and the log files that the job's processes write to."""
        files = outputs_of(self.job, read_all())
        given = {(status.st_dev, status.st_ino) for log in self.logs if (status := log.path.stat())}
        found = [log for file, log in files.items() if file not in given]
        for line in copy_logs([*self.logs, *found], self.run_dir.root / "logs"):
            self.hidden[line] = None

    def _read_kernel_log(self) -> None:
        rows = [row for pid, row in read_all().items() if pid in self.job.pids]
        if not rows:
            return
        size = self.job.world_size
        complete = size is not None and set(self.ranks) >= set(range(size))
        # if all ranks are there, the kernel has killed none of them, so only errors of devices are of interest
        names = set() if complete else {row.name for row in rows}
        try:
            lines = machine.kernel_lines(min(row.started_s for row in rows), names)
        except machine.OtherClock as error:
            self.hidden[f"the kernel log: {error}"] = None
            return
        except OSError as error:
            self.hidden[
                f"the kernel log: {error.strerror}; run collect as root, or: sysctl kernel.dmesg_restrict=0"
            ] = None
            return
        if lines:
            write_atomically(self.run_dir.root / "logs" / f"dmesg-{self.host}.txt", "\n".join(lines) + "\n")

    def _find_ranks(self, stacks: Mapping[int, Threads]) -> None:
        """Set unknown ranks from local variables on the stacks.

        If still no rank is known, number the processes that can be ranks from 0, in the order of their pids.
        """
        unknown = [member for member in self.job.members if member.rank is None and member.role == "worker"]
        if not unknown:
            return
        ranks, size = ranks_by_variables({member.pid: stacks.get(member.pid, ()) for member in unknown})
        if not ranks and not self.ranks:
            self.numbered = True
            ranks = {member.pid: number for number, member in enumerate(sorted(unknown, key=lambda row: row.pid))}
        self.job = self.job.with_ranks(ranks, size)

    def _write_stack(self, pid: int, look: str, form: str, content: str | bytes) -> None:
        folder = self.run_dir.root / "stacks" / self.host
        folder.mkdir(exist_ok=True)
        rank = next((rank for rank, member in self.ranks.items() if member.pid == pid), None)
        name = f"pid_{pid}" if rank is None else f"rank_{rank}_pid_{pid}"
        write_atomically(folder / f"{name}.{look}.{form}", content)

    def _title(self, pid: int) -> str:
        """Return the title, or the command line, of a process for its stack file.

        Return "" for a member of the job that has a rank but no title of its own: the name of the stack file shows this
        rank.
        """
        member = next((member for member in self.job.members if member.pid == pid), None)
        if member is None:
            return command_of(pid)[:300]
        return "" if member.rank is not None and not member.has_title else member.title[:300]

    def _name(self, pid: int) -> str:
        return next((f"rank {rank}" for rank, member in self.ranks.items() if member.pid == pid), f"process {pid}")


def _pids_with_stacks(job: Job) -> Iterator[int]:
    """Yield the pids of the job's processes, then those of their Python descendants, such as data loaders."""
    table = read_all()
    yield from (pid for pid in job.pids if pid in table)
    rows = [row for pid in job.pids for row in descendants(table, pid)]
    children = [row.pid for row in rows if row.name.startswith(_PYTHON) and row.state != "Z"]
    yield from (pid for pid in children[:MAX_CHILD_STACKS] if pid not in job.pids)


def file_name(text: str) -> str:
    """Return a text as part of a file name: each character except letters, digits, "-" and "_" becomes "-"."""
    return "".join(character if character.isalnum() or character in "-_" else "-" for character in text)[:80]
