"""Safely open, read and write files that other programs can write or replace. Nothing here imports torch."""

from hybrid_moe_ref.files.bounded_json import MAX_JSON_BYTES, MAX_JSON_DEPTH, MAX_JSON_MEMORY, parse_json, read_json
from hybrid_moe_ref.files.opening import DamagedFile, open_own, open_regular, read_at_most
from hybrid_moe_ref.files.writing import room_for, sync, write_atomically

__all__ = [
    "MAX_JSON_BYTES",
    "MAX_JSON_DEPTH",
    "MAX_JSON_MEMORY",
    "DamagedFile",
    "open_own",
    "open_regular",
    "parse_json",
    "read_at_most",
    "read_json",
    "room_for",
    "sync",
    "write_atomically",
]
