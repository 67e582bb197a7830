"""A job on two hosts: `collect` on each of them, and `diagnose` joins the folders.

The hosts are namespaces of this machine: network, process ids and host name of their own, with one cable between them.
So both have processes with the same ids.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hanging import ROOT

from repro.hosts.parent import die_with_parent

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
PORT = 29800
PROGRAM = """
import os, time
import torch
import torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
dist.barrier()
open(f"{os.environ['FOLDER']}/started{dist.get_rank()}", "w").close()
if os.environ["RANK"] == os.environ["ODD"]:
    time.sleep(600)
dist.all_reduce(torch.ones(4))
time.sleep(600)
"""


class NamespaceHost:
    """Two ranks in namespaces of their own. They start when `go` is called."""

    def __init__(self, number: int, folder: Path, odd: int) -> None:
        self.device, self.address = f"hmr{number}", f"10.77.0.{number + 1}"
        (folder / "job.py").write_text(PROGRAM)
        ranks = " ".join(f"RANK={rank} {sys.executable} {folder}/job.py &" for rank in (2 * number, 2 * number + 1))
        variables = {
            **os.environ, "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(PORT), "WORLD_SIZE": "4", "ODD": str(odd),
            "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": self.device, "OMP_NUM_THREADS": "1", "FOLDER": str(folder),
        }  # fmt: skip
        script = f"hostname host{number}; ip link set lo up; read go; {ranks} wait"
        namespaces = ["unshare", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (folder / f"host{number}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*namespaces, "bash", "-c", script], stdin=subprocess.PIPE, stdout=log, stderr=log, env=variables,
                preexec_fn=die_with_parent,
            )  # fmt: skip
        end_s = time.monotonic() + 20
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while not (pids := children.read_text().split()):
            assert self.process.poll() is None and time.monotonic() < end_s, "no namespace was made"
            time.sleep(0.05)
        self.pid = pids[0]

    def within(self, *command: str, what: str = "-a") -> subprocess.CompletedProcess[str]:
        """Run a command in the namespaces of this host."""
        return subprocess.run(
            ["nsenter", "-t", self.pid, what, *command], capture_output=True, text=True, cwd=ROOT, timeout=300
        )

    def plug_in(self) -> None:
        for command in (f"addr add {self.address}/24 dev {self.device}", f"link set {self.device} up"):
            done = self.within("ip", *command.split(), what="-n")
            assert done.returncode == 0, done.stderr

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()


@contextlib.contextmanager
def two_hosts(folder: Path, odd: int) -> Iterator[list[NamespaceHost]]:
    if os.geteuid() or not all(map(shutil.which, ("unshare", "nsenter", "ip", "hostname"))):
        pytest.skip("only root makes network namespaces")
    if subprocess.run(["unshare", "--net", "--uts", "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no namespaces")
    hosts: list[NamespaceHost] = []
    try:
        hosts += [NamespaceHost(0, folder, odd), NamespaceHost(1, folder, odd)]
        cable = f"link add hmr0 netns {hosts[0].pid} type veth peer name hmr1 netns {hosts[1].pid}"
        if subprocess.run(["ip", *cable.split()], capture_output=True).returncode:
            pytest.skip("this machine allows no virtual network devices")
        for host in hosts:
            host.plug_in()
            host.go()
        yield hosts
    finally:
        for host in hosts:
            host.process.kill()  # unshare --kill-child ends the rest
            host.process.communicate()


def test_the_folders_of_two_hosts_name_the_rank_that_neither_of_them_names_alone(tmp_path):
    with two_hosts(tmp_path, odd=3) as hosts:
        end_s = time.monotonic() + 600
        while len(list(tmp_path.glob("started*"))) < 4:
            logs = [(tmp_path / f"host{number}.log").read_text() for number in (0, 1)]
            assert time.monotonic() < end_s and all(host.process.poll() is None for host in hosts), logs
            time.sleep(0.2)
        time.sleep(1.0)
        alone = []
        for number, host in enumerate(hosts):
            out = tmp_path / f"runs{number}"
            done = host.within(sys.executable, "-m", "repro", "collect", "--json", "--to", str(out))
            alone.append(json.loads(done.stdout))
            assert f"{2 * number},{2 * number + 1} of 4" in done.stderr, done.stderr
        command = [
            sys.executable,
            "-m",
            "repro",
            "diagnose",
            "--json",
            str(tmp_path / "runs0"),
            str(tmp_path / "runs1"),
        ]
        joined = json.loads(subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300).stdout)
    assert [document["culprits"] for document in alone] == [[], []], alone
    assert (joined["verdict"], joined["cause"], joined["culprits"]) == ("stall", "host", [3]), joined
    assert any("Ranks 0-2 wait in all_reduce" in line for line in joined["sentences"]), joined
