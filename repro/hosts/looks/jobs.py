"""Find the torch.distributed jobs of this host.

Processes form a job if they have rank variables such as RANK, or process titles such as VLLM::Worker_TP0, or a common
parent process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from repro.hosts.looks.proc import PROC as PROC
from repro.hosts.looks.proc import Status, command_of, descendants, environment_of, open_files, read_text
from repro.ingest.names.processes import process_of

RANK_VARIABLES = (
    ("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)  # fmt: skip
KEYS = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID", "OMPI_MCA_ess_base_jobid")
MAX_RANK = 1 << 20
_TITLE = re.compile(r"^(?:VLLM::|sglang::|ray::)")
_PYTHON = re.compile(r"(?:^|/)(?:python|pypy|pt_main_thread)[\d.]*$")
_SERVER = re.compile(r"python|vllm|sglang|ray|VLLM")
_FORKED = "--multiprocessing-fork"


@dataclass(frozen=True, slots=True)
class Member:
    """A process of a job.

    rank         None if it is not known; `collect` then looks for the rank in local variables on the stacks
    role         "worker" for a process that is probably a rank; in a serving engine also "engine" (the process that
                 schedules requests for its workers) or "front end" (the process that started the engines)
    title        the title that the process set, or else its command line
    environment  its environment variables; None if this user is not allowed to read them
    """

    pid: int
    rank: int | None = None
    role: str = "worker"
    title: str = ""
    environment: Mapping[str, str] | None = field(default=None, repr=False)

    @property
    def has_title(self) -> bool:
        """Whether the process set its own title, which shows its role."""
        return _TITLE.match(self.title) is not None


@dataclass(frozen=True, slots=True)
class Job:
    """Processes of this host that form one job.

    name        a text by which the user recognises the job, such as its command and master address
    world_size  number of ranks on all hosts; None if no environment variable says it
    local_size  number of ranks on this host; None if no environment variable says it
    launcher    pid of the parent that all processes share; for a serving engine, of the server's topmost process;
                0 if there is none
    """

    name: str
    members: tuple[Member, ...]
    world_size: int | None = None
    local_size: int | None = None
    launcher: int = 0

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(member.pid for member in self.members)

    def with_ranks(self, ranks: Mapping[int, int], world_size: int | None) -> Job:
        """Return the job with unknown ranks and an unknown world size filled in. Known values stay.

        ranks        the rank of each pid
        world_size   number of ranks on all hosts; None if unknown
        """
        members = tuple(
            replace(member, rank=ranks.get(member.pid)) if member.rank is None else member for member in self.members
        )
        return replace(self, members=members, world_size=self.world_size or world_size)

    def missing_ranks(self, num_unreaped: int) -> list[int]:
        """Return the ranks that certainly belong to this host, but have no process here.

        Returns [] if the world size is not known, or if the rank of a member with the role "worker" is not known.

        num_unreaped: number of the launcher's zombies, which are children that have ended. If there are as many zombies
        as ranks without a process, the zombies are these ranks, so all these ranks belong to this host
        """
        known = {member.rank for member in self.members if member.rank is not None}
        if self.world_size is None or len(known) < sum(member.role == "worker" for member in self.members):
            return []
        missing = sorted(set(range(self.world_size)) - known)
        if self.local_size == self.world_size or num_unreaped == len(missing):
            return missing
        return [rank for rank in missing if known and min(known) < rank < max(known)]


@dataclass(frozen=True, slots=True)
class _Candidate:
    status: Status
    command: str
    environment: Mapping[str, str] | None  # None if this user may not read the variables
    torch: bool

    @property
    def pid(self) -> int:
        return self.status.pid

    @property
    def rank(self) -> tuple[int, int] | None:
        for rank, size in RANK_VARIABLES:
            words = [(self.environment or {}).get(name, "") for name in (rank, size)]
            if all(word.isdigit() and int(word) < MAX_RANK for word in words):
                return int(words[0]), int(words[1])
        return None


def find_jobs(table: Mapping[int, Status]) -> list[Job]:
    """Find the jobs among the processes of this host. The first job is the one with the most processes.

    table: all processes of this host, by pid
    """
    candidates = {row.pid: row for row in _candidates(table)}
    jobs = [*_by_variables(candidates, table), *_by_titles(candidates, table)]
    taken = {pid for job in jobs for pid in job.pids}
    above = {ancestor for pid in taken for ancestor in _ancestors(pid, table)}  # a job's parents form no second job
    jobs += _by_parent({pid: row for pid, row in candidates.items() if pid not in taken | above}, table, taken)
    return sorted(jobs, key=lambda job: (-len(job.members), job.pids))


def choose(jobs: Sequence[Job], table: Mapping[int, Status], pids: Sequence[int]) -> list[Job]:
    """Return the jobs to which these pids belong. The pids that belong to no job form one further job.

    A pid belongs to a job if it is a member, a descendant of a member, or an ancestor of a member up to the launcher.

    table: all processes of this host, by pid
    """
    wanted = set(pids)
    chosen = [job for job in jobs if wanted & {*_with_launchers(job, table), *_below(job, table)}]
    rest = wanted - {pid for job in chosen for pid in (*job.pids, *_below(job, table))}
    rest -= {above for job in chosen for pid in job.pids for above in _ancestors(pid, table)}
    rest -= {above for pid in rest for above in _ancestors(pid, table)}  # without wrappers such as a shell or srun
    if not rest:
        return chosen
    candidates = {row.pid: row for row in _candidates(table)}
    pids = [pid for pid in rest if pid in table]
    members = [_member(pid, candidates.get(pid)) for pid in sorted(_ranks_below(pids, candidates))]
    return [*chosen, Job("the given processes", tuple(members))] if members else chosen


def _member(pid: int, row: _Candidate | None) -> Member:
    return Member(pid, None, "worker", row.command, row.environment) if row else Member(pid)


def _ranks_below(pids: Sequence[int], candidates: Mapping[int, _Candidate]) -> Iterator[int]:
    for pid in pids:
        children = [row.pid for row in candidates.values() if row.status.parent == pid and row.torch]
        yield from children if len(children) > 1 else [pid]


def _below(job: Job, table: Mapping[int, Status]) -> set[int]:
    return {row.pid for pid in job.pids for row in descendants(table, pid)}


def _ancestors(pid: int, table: Mapping[int, Status]) -> Iterator[int]:
    while (row := table.get(pid)) is not None and row.parent in table:
        pid = row.parent
        yield pid


def _with_launchers(job: Job, table: Mapping[int, Status]) -> set[int]:
    """Return the pids of a job's members and, if the job has a launcher, of their ancestors up to the launcher."""
    pids = set(job.pids)
    for pid in job.pids:
        at = table.get(pid)
        while at is not None and at.parent > 1 and at.pid != job.launcher:
            pids.add(at.parent)
            at = table.get(at.parent)
    return pids if job.launcher else set(job.pids)


def _candidates(table: Mapping[int, Status]) -> Iterator[_Candidate]:
    """Yield the processes that can belong to a job: Python processes, and processes with a serving engine's title.

    This process and its ancestors are left out.
    """
    own = set()
    pid = os.getpid()
    while pid in table:
        own.add(pid)
        pid = table[pid].parent
    for pid, status in table.items():
        if pid in own or status.state in "ZX":
            continue
        command = command_of(pid)
        if not (_TITLE.match(command) or _PYTHON.search(command.split(" ")[0]) or _PYTHON.search(status.name)):
            continue
        try:
            environment: Mapping[str, str] | None = environment_of(pid)
        except PermissionError:
            environment = None
        yield _Candidate(status, command, environment, _has_torch(pid))


def _has_torch(pid: int) -> bool:
    try:
        return "libtorch" in read_text(PROC / str(pid) / "maps", 64 << 20)
    except OSError:
        return False


def _topmost(rows: Mapping[int, _Candidate], table: Mapping[int, Status]) -> Iterator[_Candidate]:
    """Yield the processes of one rank that have no ancestor among `rows`.

    rows   the processes that have the same variable RANK, by pid. Their descendants among them, such as data loaders
           and compilers, only inherited RANK, and are not yielded
    """
    for row in rows.values():
        at = table.get(row.status.parent)
        while at is not None and at.pid not in rows:
            at = table.get(at.parent)
        if at is None:
            yield row


def _by_variables(candidates: Mapping[int, _Candidate], table: Mapping[int, Status]) -> Iterator[Job]:
    groups: dict[tuple[str, ...], dict[int, dict[int, _Candidate]]] = {}
    for row in candidates.values():
        if row.rank is not None and not _TITLE.match(row.command):
            environment = row.environment or {}
            key = (*(environment.get(name, "") for name in KEYS), str(row.rank[1]))
            groups.setdefault(key, {}).setdefault(row.rank[0], {})[row.pid] = row
    for by_rank in groups.values():
        tops = {rank: list(_topmost(rows, table)) for rank, rows in by_rank.items()}
        members = [
            Member(row.pid, rank, "worker", row.command, row.environment)
            for rank, rows in sorted(tops.items())
            for row in rows
        ]
        sample = next(row for rows in tops.values() for row in rows)
        environment, size = sample.environment or {}, sample.rank[1] if sample.rank else None
        local = environment.get("LOCAL_WORLD_SIZE", "")
        address = f"{environment.get('MASTER_ADDR', '?')}:{environment.get('MASTER_PORT', '?')}"
        name = f"{sample.command[:80]} (master {address})"
        launcher = _shared_parent(members, table)
        yield Job(name, tuple(members), size, int(local) if local.isdigit() else None, launcher)


def _by_titles(candidates: Mapping[int, _Candidate], table: Mapping[int, Status]) -> Iterator[Job]:
    groups: dict[int, list[_Candidate]] = {}
    for row in candidates.values():
        if _TITLE.match(row.command):
            groups.setdefault(_top_server(row.pid, table), []).append(row)
    for launcher, rows in groups.items():
        members = []
        for row in rows:
            process = process_of(title=row.command)
            members.append(Member(row.pid, process.rank, process.role or "worker", row.command, row.environment))
        titled = {row.pid for row in rows}
        # The processes that started the engines: one server, or offline a front end for each engine.
        fronts = {launcher, *(table[pid].parent for pid in titled)} - titled
        for pid in sorted(fronts & candidates.keys()):
            members.append(Member(pid, None, "front end", candidates[pid].command))
        yield Job(f"{command_of(launcher)[:80] or rows[0].command}", tuple(members), launcher=launcher)


def _top_server(pid: int, table: Mapping[int, Status]) -> int:
    """Return the topmost process of the server to which ``pid`` belongs.

    Go up from ``pid`` as long as the parent's command line contains a word such as "python" or "vllm".
    """
    while table[pid].parent in table and _SERVER.search(command_of(table[pid].parent)[:200]):
        pid = table[pid].parent
    return pid


def _by_parent(
    candidates: Mapping[int, _Candidate], table: Mapping[int, Status], taken: Collection[int]
) -> Iterator[Job]:
    """Find jobs without rank variables: at least two processes that have loaded torch and have the same parent.

    At least two of these children must have a socket of their own, or multiprocessing must have started all of them.

    taken: the pids that already belong to a job; their children form no further job
    """
    families: dict[int, list[_Candidate]] = {}
    for row in candidates.values():
        if row.torch and row.status.parent not in taken:
            families.setdefault(row.status.parent, []).append(row)
    for parent, rows in families.items():
        if parent in (0, 1) or len(rows) < 2:
            continue
        if all(_FORKED in row.command for row in rows) or sum(map(_has_own_socket, rows)) >= 2:
            members = sorted((Member(row.pid, None, "worker", row.command, row.environment) for row in rows),
                             key=lambda member: member.pid)  # fmt: skip
            yield Job(f"{command_of(parent)[:80]} (children of {parent})", tuple(members), launcher=parent)


def _has_own_socket(row: _Candidate) -> bool:
    """Whether a process has a socket that its parent lacks. A forked data loader has none: it only inherits sockets."""
    inherited = _sockets(row.status.parent)
    return any(socket not in inherited for socket in _sockets(row.pid))


def _sockets(pid: int) -> set[str]:
    try:
        return {target for _, target in open_files(pid) if target.startswith("socket:")}
    except PermissionError:
        return set()


def _shared_parent(members: Sequence[Member], table: Mapping[int, Status]) -> int:
    parents = {table[member.pid].parent for member in members if member.pid in table}
    parent = parents.pop() if len(parents) == 1 else 0
    return parent if parent > 1 else 0


def match(
    pattern: re.Pattern[str], table: Mapping[int, Status], command: Callable[[int], str] = command_of
) -> list[int]:
    """Return the pids of the processes whose command line matches ``pattern``, without this process and its ancestors.

    table     all processes of this host, by pid
    command   returns the command line of a pid
    """
    own = set()
    pid = os.getpid()
    while pid in table:
        own.add(pid)
        pid = table[pid].parent
    return [pid for pid in table if pid not in own and pattern.search(command(pid))]
