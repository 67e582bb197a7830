"""A small witness: four ranks, two groups, three rounds."""

from __future__ import annotations

from scene import Scene

from hybrid_moe_ref.parallel.observer import Collective
from repro.trace.witness.format import (
    GROUP_BYTES,
    GROUPS_AT,
    Geometry,
)

TINY = Geometry(ring_records=32, vector_words=64, string_bytes=512, group_slots=4)
REDUCE = Collective("dp", "all_reduce", "", (32,), "int32", "sum")
SLOT = GROUPS_AT + GROUP_BYTES  # of the second group
GATHER = Collective("ep", "all_gather_v", "layers.0.mlp", (3, 0, 2, 1), "float32")


def sample(shape: Geometry = TINY, rounds: int = 3) -> Scene:
    scene = Scene(4, {"dp": range(4), "ep": range(4)}, shape=shape)
    scene.phase("serve")
    for _ in range(rounds):
        scene.all_of(range(4), REDUCE)
        scene.all_of(range(4), GATHER)
    scene.enter([0], GATHER)
    return scene
