"""Autotuning: at the start, time each tactic (way to compute the experts), and use the fastest for each number of rows.

For each pair of a tactic and a number of rows, an all-reduce averages the time over the ranks, so that all ranks make
the same choice.

Each rank saves the choice in its own file, for the next start. A rank that finds its file needs no timing. But if only
some ranks skipped the timing, the others would wait for them in the all-reduces. So the ranks first vote: they skip the
timing only if every rank has found its file.

Shapes: N rows, K experts that the router chose for a row, P = N K (row, expert) pairs, H hidden, E experts held, I
intermediate, J = 2 I.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hybrid_moe_kernels.moe.reference import combine, expert_by_expert, padded_to_widest, pick_by_pick
from torch import Tensor

from hybrid_moe_ref.engine.step.plan import TUNING_VOTE
from hybrid_moe_ref.files import read_json, write_atomically
from hybrid_moe_ref.layers.moe import Experts
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.observer import ScheduleEntry

REPEATS = 3
MAX_CACHE_BYTES = 1 << 20
Declare = Callable[[tuple[ScheduleEntry, ...]], None]
"""A function that announces the collectives that the rank issues next."""

Chosen = dict[int, str]
"""For each tuned number of rows, the fastest tactic.

A step uses the tactic of the smallest tuned number that is at least its own number of rows. If there is none, it uses
the tactic of the largest."""


TACTICS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "picks": pick_by_pick,
    "experts": expert_by_expert,
    "padded": padded_to_widest,
}
"""The tactics by name. Each computes the output of every (row, expert) pair, [P, H]."""


class ChosenExperts:
    """Computes the experts. The step's number of rows decides by which tactic (way to compute them)."""

    def __init__(self, chosen: Chosen) -> None:
        self._chosen = sorted(chosen.items())

    def __call__(
        self, x_NH: Tensor, weights_NK: Tensor, ids_NK: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor
    ) -> Tensor:
        tactic = next((name for rows, name in self._chosen if x_NH.shape[0] <= rows), self._chosen[-1][1])
        out_PH = TACTICS[tactic](x_NH, ids_NK, gate_up_EJH, down_EHI)
        return combine(out_PH, weights_NK)


class ExpertTuner:
    """Finds the fastest tactic (way to compute the experts) on one rank.

    The policy `Tuning` decides which of the methods to call, and in which order.

    rows       the numbers of rows to tune for
    cache_dir  the folder for saved choices (a tactic for each number of rows); "": choices are not saved
    declare    a function that begins a step with the schedule that it gets. The policy must call it with `TUNING_VOTE`
               before `vote`, and with `timings` before `time_all`
    """

    def __init__(
        self, model: HybridMoE, comm: Communicator, rows: Sequence[int], cache_dir: str, declare: Declare
    ) -> None:
        self._layers = [layer for layer in model.modules() if isinstance(layer, Experts)]
        self._top_k = model.config.num_experts_per_tok
        self._comm = comm
        self._rows = tuple(sorted(set(rows)))
        self.folder = Path(cache_dir) / "autotune" if cache_dir else None
        self.declare = declare

    @property
    def rank(self) -> int:
        return self._comm.rank

    @property
    def key(self) -> str:
        """Return the key of a saved choice of tactics: torch's version, device, dtype, shape of the experts, rows."""
        experts = self._layers[0]
        shape = "x".join(map(str, experts.gate_up_proj.shape))
        device = self._comm.device.type
        rows = ",".join(map(str, self._rows))
        return f"torch {torch.__version__} {device} {experts.gate_up_proj.dtype} {shape} rows {rows}"

    @property
    def timings(self) -> tuple[ScheduleEntry, ...]:
        """Return the collectives of :meth:`time_all`, in order."""
        names = [f"autotune.{rows}.{tactic}" for rows in self._rows for tactic in TACTICS]
        return tuple(ScheduleEntry("ep", "all_reduce", name) for name in names)

    def vote(self, mine: bool) -> bool:
        """Return whether all ranks vote yes, by one all-reduce. mine: this rank's vote"""
        ballot = torch.tensor([int(mine)], dtype=torch.int32, device=self._comm.device)
        return bool(self._comm.all_reduce("ep", ballot, "min", layer=TUNING_VOTE.layer).item())

    @torch.inference_mode()
    def time_all(self) -> Chosen:
        """Return, for each number of rows, the tactic (way to compute the experts) that is fastest over all ranks.

        All ranks call this, because it issues the collectives in `timings`.
        """
        chosen = {}
        for rows in self._rows:
            seconds = {tactic: self._average(self._time(tactic, rows), rows, tactic) for tactic in TACTICS}
            chosen[rows] = min(seconds, key=lambda tactic: seconds[tactic])
        return chosen

    def _average(self, seconds: float, rows: int, tactic: str) -> float:
        x = torch.tensor([seconds], dtype=torch.float64, device=self._comm.device)
        total = self._comm.all_reduce("ep", x, layer=f"autotune.{rows}.{tactic}")
        return float(total.item()) / len(self._comm.members("ep"))

    def _time(self, tactic: str, num_rows: int) -> float:
        experts, device = self._layers[0], self._comm.device
        random = torch.Generator().manual_seed(num_rows)  # the same rows on every rank, as after a real dispatch
        x_NH = torch.randn(num_rows, experts.hidden_size, generator=random).to(device, experts.gate_up_proj.dtype)
        ids_NK = torch.randint(experts.num_experts, (num_rows, self._top_k), generator=random).to(device)
        local_NK = ids_NK - experts.first_expert
        seconds = []
        for _ in range(REPEATS):
            begin = self._now()
            TACTICS[tactic](x_NH, local_NK, experts.gate_up_proj, experts.down_proj)
            seconds.append(self._now() - begin)
        return statistics.median(seconds)

    def _now(self) -> float:
        if self._comm.device.type == "cuda":
            torch.cuda.synchronize(self._comm.device)
        return time.perf_counter()

    def use(self, chosen: Chosen) -> None:
        """Let all layers compute their experts by these tactics from now on.

        chosen: the tactic (way to compute the experts) for each number of rows
        """
        experts = ChosenExperts(chosen)
        for layer in self._layers:
            layer.mlp = experts

    def load(self, file_name: str, key: str) -> Chosen | None:
        """Return the choice that was saved under `key` in the file `file_name`.

        A choice is a tactic (way to compute the experts) for each number of rows.

        Returns None if there is no such choice, if it is for different numbers of rows, or if the file cannot be used
        (absent, damaged or larger than MAX_CACHE_BYTES).
        """
        if self.folder is None:
            return None
        try:
            kept: Any = read_json(self.folder / file_name, MAX_CACHE_BYTES)
            chosen = {int(rows): tactic for rows, tactic in kept[key].items()}
            is_whole = set(chosen) == set(self._rows) and set(chosen.values()) <= set(TACTICS)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return chosen if is_whole else None

    def save(self, file_name: str, key: str, chosen: Chosen) -> None:
        """Save a choice under `key` in the file `file_name`.

        chosen: a tactic (way to compute the experts) for each number of rows

        If the file cannot be written, print a line: the next start then tunes again.
        """
        if self.folder is None:
            return
        path = self.folder / file_name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({key: chosen}))
        except OSError as error:
            print(f"[rank {self.rank}] tuning is not saved: {path}: {error.strerror or error}", flush=True)
