"""Map the witness file of a rank into the memory of the process that writes it."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace

from repro.trace.identity import myself
from repro.trace.knowledge import Knows
from repro.trace.witness.file import create
from repro.trace.witness.format import CRC, HEADER, Geometry, Identity, pack_header
from repro.trace.witness.parse import WitnessError, parse_header


def map_file(
    path: str | os.PathLike[str], rank: int, num_ranks: int, *, run_id: str, shape: Geometry | None, knows: Knows
) -> tuple[mmap.mmap, Identity, Geometry]:
    """Map a witness file into memory, and write this process as the writer into the header of the file.

    If the launcher has not created the file in advance, create the file.

    run_id   the run id for the header; "" keeps the run id that the launcher wrote
    shape    for a new file: how many events, sizes, strings and groups it has room for; None: the usual room
    knows    for the header: what the recorder writes, such as steps and locks (see `repro.trace.knowledge`)

    Returns the mapped memory, the description of this process in the header, and the shape of the file. Raises
    WitnessError if the file already has a writer, or was made for another rank.
    """
    if not os.path.exists(path):
        create(path, Identity(rank, num_ranks, run_id), shape)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        planned, shape = parse_header(os.pread(descriptor, HEADER.size + CRC.size, 0), str(path))
        if planned.pid:
            raise WitnessError(f"{path}:0: the file already has a writer, process {planned.pid}")
        if (planned.rank, planned.num_ranks) != (rank, num_ranks):
            raise WitnessError(
                f"{path}:0: the file was made for rank {planned.rank} of {planned.num_ranks}, "
                f"but rank {rank} of {num_ranks} opens it"
            )
        buffer = mmap.mmap(descriptor, shape.file_bytes)
    finally:
        os.close(descriptor)
    writer = replace(myself(rank, num_ranks), run_id=run_id or planned.run_id, knows=knows)
    header = pack_header(writer, shape)
    buffer[: len(header)] = header
    return buffer, writer, shape
