"""Redact witness files: replace identity and strings, and keep every number of an event."""

from __future__ import annotations

from dataclasses import replace

from repro.bundle.redact.recognise import Recogniser
from repro.trace.witness.compact import compact
from repro.trace.witness.parse import parse_header


def redact_witness(data: bytes, name: str, recogniser: Recogniser) -> bytes:
    """Redact a witness's header and strings, and shorten the file. Each string keeps its number.

    Raises WitnessError for what is no witness, ValueError when the new strings take more than a file may hold.
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
