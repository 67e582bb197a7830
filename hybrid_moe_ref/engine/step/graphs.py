"""Graphs: steps of a few sizes that are captured at start and replayed while serving.

A captured step has a fixed number of rows and fixed collectives. A step with fewer rows is padded to a captured size.
All ranks must replay the same size, so mode and size are part of the step agreement (C1). Collectives are not captured:
on a GPU, the graphs contain only norms, routers, shared experts and dense MLPs. A CPU cannot capture, so it runs these
modules as usual, with the same padding. On both devices, a rank records which collectives a captured step issues. If a
replay would issue a different collective, the schedule guard refuses it before it is issued, and all ranks stop (with
checks="observe", only this rank stops).

Shapes: N rows of a step, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hybrid_moe_ref.batch import Batch, Group
from hybrid_moe_ref.engine.step.plan import EAGER
from hybrid_moe_ref.layers.moe import MLP, MoE, Router
from hybrid_moe_ref.layers.norm import RMSNorm
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.checks.guard import ScheduleGuard, collective_words
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.observer import Collective


class Graphs:
    """The captured steps of one rank, by mode (EAGER or GRAPH) and number of rows."""

    def __init__(self, model: HybridMoE, comm: Communicator) -> None:
        self._comm = comm
        self._model = model
        self._captured: dict[tuple[int, int], tuple[Collective, ...]] = {}
        self._modules: list[CapturedModule] = []

    @property
    def captured(self) -> dict[tuple[int, int], tuple[Collective, ...]]:
        """Return, for each (mode, number of rows), the collectives that the captured step issued, in order.

        A replay issues the same collectives.
        """
        return dict(self._captured)

    @contextlib.contextmanager
    def running(self, mode: int, size: int) -> Iterator[None]:
        """Capture or replay the step whose layers run inside this ``with`` block.

        The first step of a mode and size (number of rows) is captured, and later steps replay it. If `mode` is EAGER,
        the layers just run.

        Raises ScheduleMismatch if a replay does not issue the same collectives as the captured step: before it issues a
        different one, or at the end if one is missing. With checks="observe", only this rank raises the error,
        otherwise every rank.
        """
        if mode == EAGER:
            yield
            return
        # done after the compilation, so that the compiled code is captured
        if not self._captured and self._comm.device.type == "cuda":
            self._modules = [CapturedModule(module) for module in row_wise(self._model)]
        recorded = self._captured.get((mode, size))
        tape = Tape(recorded, self._comm.guard)
        for module in self._modules:
            module.capturing, module.replaying = recorded is None, True
        try:
            with self._comm.taped(tape.on_collective):
                yield
            tape.end()
        finally:
            for module in self._modules:
                module.replaying = False
        self._captured.setdefault((mode, size), tuple(tape.collectives))


class Tape:
    """Records the collectives of a step that is captured, or compares those of a replay with the recorded ones.

    recorded: the collectives of the captured step, for a replay; None while the step is captured
    """

    def __init__(self, recorded: Sequence[Collective] | None, guard: ScheduleGuard) -> None:
        self._recorded = recorded
        self._guard = guard
        self.collectives: list[Collective] = []

    def on_collective(self, collective: Collective) -> None:
        """Record a collective before it is issued. Raises ScheduleMismatch if a replay departs from the capture."""
        index = len(self.collectives)
        if self._recorded is not None:
            planned = self._recorded[index] if index < len(self._recorded) else None
            if collective != planned:
                captured = collective_words(planned) if planned else "no further collective"
                self._guard.refuse(
                    f"would issue {collective_words(collective)} in a replay, but the captured step issued {captured}"
                )
        self.collectives.append(collective)

    def end(self) -> None:
        """Raise ScheduleMismatch if a replay has ended without issuing every collective of the captured step."""
        if self._recorded is not None and len(self.collectives) < len(self._recorded):
            missing = collective_words(self._recorded[len(self.collectives)])
            self._guard.refuse(f"ended a replay, but the captured step also issued {missing}")


def pad(tokens_N: Tensor, batch: Batch, size: int) -> tuple[Tensor, Batch]:
    """Pad a step to `size` rows. Returns the padded tokens and batch.

    Each added row is a sequence of one token, without state, so no other row sees it. The hidden states of the added
    rows come last.
    """
    missing = size - batch.num_tokens
    if missing == 0:
        return tokens_N, batch
    device = tokens_N.device
    rows_BT = torch.arange(batch.num_tokens, size, device=device)[:, None]
    padding: Group = Group(rows_BT, torch.zeros_like(rows_BT), starts=(0,) * missing, length=1)
    return (
        torch.cat([tokens_N, tokens_N.new_zeros(missing)]),
        Batch((*batch.groups, padding), size, batch.last_rows),
    )


def row_wise(model: HybridMoE) -> list[nn.Module]:
    """Return the modules that compute each row alone and do not communicate: norms, routers, shared experts, MLPs."""
    modules: list[nn.Module] = []
    for block in model.blocks:
        modules += [block.input_layernorm, block.post_attention_layernorm]
        modules += [block.mlp.gate, block.mlp.shared_expert] if isinstance(block.mlp, MoE) else [block.mlp]
    return [m for m in modules if isinstance(m, RMSNorm | Router | MLP) and not m._forward_hooks]


class CapturedModule:
    """A module from `row_wise` whose forward is replayed as a CUDA graph, with one graph for each number of rows."""

    def __init__(self, module: nn.Module) -> None:
        self.capturing = self.replaying = False
        self._eager = module.forward
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, object]] = {}
        module.forward = self._run

    def _run(self, x_NH: Tensor) -> object:
        if not self.replaying or not x_NH.shape[0]:
            return self._eager(x_NH)
        if self.capturing and x_NH.shape[0] not in self._graphs:
            self._capture(x_NH)
        if x_NH.shape[0] not in self._graphs:
            return self._eager(x_NH)
        graph, input_NH, output = self._graphs[x_NH.shape[0]]
        input_NH.copy_(x_NH)
        graph.replay()
        return output

    def _capture(self, x_NH: Tensor) -> None:
        input_NH = x_NH.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # libraries allocate memory in this run, because they must not do so during the capture
        with torch.cuda.stream(side):
            self._eager(input_NH)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._eager(input_NH)
        self._graphs[x_NH.shape[0]] = graph, input_NH, output
