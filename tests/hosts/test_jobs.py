"""Jobs among the processes of a host: by rank variables, by titles, by one parent; and the job that a user names."""

from __future__ import annotations

import pytest

from repro.hosts.looks import jobs
from repro.hosts.looks.proc import Status


@pytest.fixture
def host(monkeypatch):
    """A host of invented processes: pid -> (parent, command, environment); a command of Python has torch loaded."""

    def make(processes, sockets=()):
        monkeypatch.setattr(jobs, "command_of", lambda pid: processes[pid][1] if pid in processes else "")
        monkeypatch.setattr(jobs, "environment_of", lambda pid: processes[pid][2])
        monkeypatch.setattr(jobs, "_has_torch", lambda pid: "python" in processes[pid][1])
        monkeypatch.setattr(jobs, "_sockets", lambda pid: {f"socket:[{pid}]"} if pid in sockets else set())
        return {
            pid: Status(pid, parent, command.split()[0], "S", 0.0, 0.0, 0.0)
            for pid, (parent, command, _) in processes.items()
        }

    return make


def rank(number, size=2, port="29500"):
    return {"RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_PORT": port}


TORCHRUN = {
    10: (1, "python -m torch.distributed.run train.py", {}),
    11: (10, "python train.py", rank(0)),
    12: (10, "python train.py", rank(1)),
    13: (12, "python train.py", rank(1)),  # its data loader
    14: (12, "ninja -v", rank(1)),
}


def test_the_children_of_a_rank_inherit_its_variables_and_are_no_ranks(host):
    (job,) = jobs.find_jobs(host(TORCHRUN))
    assert [(member.pid, member.rank) for member in job.members] == [(11, 0), (12, 1)]
    assert (job.world_size, job.local_size, job.launcher) == (2, 2, 10)


def test_jobs_of_two_masters_are_two_jobs(host):
    others = {pid + 100: (1, "python train.py", rank(pid - 11, port="29501")) for pid in (11, 12)}
    assert sorted(job.pids for job in jobs.find_jobs(host({**TORCHRUN, **others}))) == [(11, 12), (111, 112)]


def test_a_serving_engine_is_one_job_with_the_parts_of_each_process(host):
    table = host({
        20: (1, "python /usr/bin/vllm serve model", {}), 21: (20, "VLLM::EngineCore_DP0", {}),
        22: (21, "VLLM::Worker_TP0", {}), 23: (21, "VLLM::Worker_TP1", {}),
    })  # fmt: skip
    (job,) = jobs.find_jobs(table)
    parts = {member.pid: (member.rank, member.role) for member in job.members}
    assert parts == {20: (None, "front end"), 21: (0, "engine"), 22: (0, "worker"), 23: (1, "worker")}


def test_children_of_one_parent_are_a_job_if_they_talk_to_each_other(host):
    table = {30: (1, "python train.py", {}), 31: (30, "python train.py", {}), 32: (30, "python train.py", {})}
    assert jobs.find_jobs(host(table)) == [], "two data loaders of one process look like this"
    (job,) = jobs.find_jobs(host(table, sockets=(31, 32)))
    assert job.pids == (31, 32) and job.launcher == 30


def test_front_ends_that_one_parent_forked_are_no_job_beside_their_engines(host):
    table = host({
        49: (1, "python test.py", {}), 50: (49, "python serve.py", {}),
        51: (50, "python serve.py", {}), 52: (51, "VLLM::EngineCore_DP0", {}), 53: (52, "VLLM::Worker_DP0_EP0", {}),
        54: (50, "python serve.py", {}), 55: (54, "VLLM::EngineCore_DP1", {}), 56: (55, "VLLM::Worker_DP1_EP1", {}),
    }, sockets=(51, 54))  # fmt: skip
    (job,) = jobs.find_jobs(table)
    roles = {member.pid: member.role for member in job.members}
    assert {52, 53, 55, 56} <= roles.keys()
    assert roles[51] == roles[54] == "front end", "their stacks show whether they wait at exit"


@pytest.mark.parametrize("named", [[11], [12, 11], [10], [13], [14, 12]])
def test_a_job_is_chosen_by_any_of_its_processes_its_launcher_or_a_child(host, named):
    table = host(TORCHRUN)
    assert [job.pids for job in jobs.choose(jobs.find_jobs(table), table, named)] == [(11, 12)], named


def test_a_process_of_no_job_is_taken_as_it_is_and_its_wrapper_is_not(host):
    table = host({40: (1, "srun ./tool", {}), 41: (40, "python tool.py", {})})
    (job,) = jobs.choose(jobs.find_jobs(table), table, [40, 41])
    assert job.pids == (41,)
