"""Redact witness files: replace the identity of hosts and the strings, and keep every number of an event."""

from __future__ import annotations

from dataclasses import replace

from repro.bundle.redact.recognise import Recogniser
from repro.trace.witness.compact import compact
from repro.trace.witness.parse import parse_header


def redact_witness(data: bytes, name: str, recogniser: Recogniser) -> bytes:
    """Redact the header and the strings of a witness, and leave out the unused space of the file.

    Each string keeps its number, because events refer to strings by number.

    data: the content of the file
    name: the file's name, for error messages
    recogniser: redacts the strings

    Raises WitnessError if the data is not a witness, ValueError if the new strings need more space than a witness has.
    """
    writer, _ = parse_header(data, name)
    writer = replace(
        writer,
        hostname=recogniser.host(writer.hostname),
        boot_id=recogniser.boot(writer.boot_id),
        pid_namespace=recogniser.namespace(writer.pid_namespace),
        run_id=recogniser.string(writer.run_id),
    )
    return compact(data, name, writer=writer, change=recogniser.string)
