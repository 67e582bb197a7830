"""Describe this process, for the header of the witness file that this process writes."""

from __future__ import annotations

import os
import socket
import time

from repro.trace.start_ticks import read_start_ticks
from repro.trace.witness.format import Identity


def myself(rank: int, num_ranks: int) -> Identity:
    """Describe this process for the header of its witness: host, pid, start time, clocks.

    A field that /proc does not show is empty or 0.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot_id = file.read().strip()
        start_ticks = read_start_ticks(os.getpid())
    except OSError:
        boot_id, start_ticks = "", 0
    try:
        pid_namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        pid_namespace = 0
    return Identity(
        rank,
        num_ranks,
        hostname=socket.gethostname(),
        boot_id=boot_id,
        pid=os.getpid(),
        pid_start_ticks=start_ticks,
        pid_namespace=pid_namespace,
        wall_offset_ns=time.time_ns() - time.monotonic_ns(),
    )
