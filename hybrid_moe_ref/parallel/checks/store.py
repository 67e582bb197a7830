"""Open a store on loopback, through which the ranks of one host compare every collective (the strict check)."""

from __future__ import annotations

import socket

import torch.distributed as dist

LOOPBACK = "127.0.0.1"


def loopback_store(meeting: dist.Store, rank: int, num_ranks: int) -> dist.Store:
    """Open a TCP store that listens only on loopback.

    Rank 0 runs the new store, and publishes its port in ``meeting``, a store that all ranks already have. The new store
    is faster than a file store: it answers in microseconds instead of milliseconds.
    """
    if rank != 0:
        return dist.TCPStore(LOOPBACK, int(meeting.get("loopback")), num_ranks, False)
    listener = socket.create_server((LOOPBACK, 0), backlog=num_ranks + 8)
    port = listener.getsockname()[1]
    store = dist.TCPStore(LOOPBACK, port, num_ranks, True, wait_for_workers=False, master_listen_fd=listener.detach())
    meeting.set("loopback", str(port))
    return store
