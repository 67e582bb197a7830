"""A run directory without a run: the witnesses of a Scene, judged and written as a run would have written them."""

from __future__ import annotations

from pathlib import Path

from scene import Scene

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from repro.lab.description import describe
from repro.lab.settings import RunSettings
from repro.store.run_dir import RunDir, write_json
from repro.store.schema import to_json
from repro.verdict import Verdict, judge
from repro.watch.document import Document, Durations, Expectation
from repro.watch.document import describe as describe_verdict

MOE, GDN = "layers.0.moe", "layers.0.gated_delta_net"
AGREE = Collective("dp", "all_reduce", "step", (64,), "int32", "sum")
EXTRA = Collective("dp", "all_reduce", GDN, (64,), "int32", "sum")


def write_hang(out: Path, num_ranks: int = 4, *, layer: str = MOE, op: str = "all_gather_v") -> tuple[Path, Scene]:
    """Write the hang of metadata_rebuild: two complete steps, and a third in which all ranks but the last rebuild."""
    everyone = tuple(range(num_ranks))
    scene = Scene(num_ranks, {"dp": everyone, "ep": everyone})
    dispatch = Collective("ep", op, layer, (1,) * num_ranks, "uint8")
    combine = Collective("ep", "reduce_scatter_v", layer, (1,) * num_ranks, "float64", "sum")
    schedule = [ScheduleEntry(c.group, c.op, c.layer) for c in (AGREE, dispatch, combine)]
    for phase in ("load", "serve"):
        scene.phase(phase)
    for step in range(2):
        scene.begin_step(step, schedule, everyone)
        for call in (AGREE, dispatch, combine):
            scene.all_of(everyone, call)
    scene.begin_step(2, schedule, everyone[:-1])
    scene.all_of(everyone, AGREE)
    scene.enter(everyone[:-1], EXTRA)
    scene.enter(everyone[-1:], dispatch)
    return write_run(out, scene, "fault"), scene


def write_run(out: Path, scene: Scene, variant: str) -> Path:
    """Write the files of a run that ended one quiet window after the present state of the scene."""
    run_dir = RunDir.create(out, "metadata_rebuild", variant, 0)
    settings = RunSettings("metadata_rebuild", variant, num_ranks=scene.num_ranks)
    write_json(run_dir.description, describe(settings).to_mapping())
    write_json(run_dir.config, settings.to_mapping())
    for rank, data in enumerate(scene.files):
        run_dir.witness(rank).write_bytes(bytes(data))
        run_dir.log(rank).write_text("")
        run_dir.stack(rank).write_text(
            'Thread 0x01 (most recent call first):\n  File "threading.py", line 1 in run\n\n'
            f'Current thread 0x02 (most recent call first):\n  File "comm.py", line {rank // 2} in wait\n'
        )
        write_json(run_dir.flight_recorder(rank), {"entries": []})
    verdict = judge(
        scene.witnesses(), num_ranks=scene.num_ranks, now_ns=scene.now_ns + 1_200_000_000, quiet_window_s=1.0
    )
    write_json(run_dir.verdict, to_json(document(verdict, scene.num_ranks, variant)))
    return run_dir.root


def document(verdict: Verdict, num_ranks: int, variant: str) -> Document:
    """Return the verdict.json that the watcher would write."""
    return describe_verdict(
        verdict,
        scenario="metadata_rebuild",
        variant=variant,
        backend="gloo",
        num_ranks=num_ranks,
        expected=Expectation("deadlock", "extra"),
        matches_expected=True,
        seconds=Durations(1.2, 4.5),
    )
