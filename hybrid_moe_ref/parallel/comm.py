"""The only file that issues collectives. It calls an Observer before and after each collective.

``observer.enter`` is called before a collective is issued, and ``observer.leave`` after it has completed. So a rank
waits in the last collective that has an ``enter`` and no ``leave``. Under NCCL a call returns as soon as the collective
is queued, so there ``leave`` only means that the collective is queued.

The collectives with uneven sizes (all_gather_v, reduce_scatter_v) take the number of rows of each rank, on which all
ranks have agreed at the start of the step. A rank with zero rows takes part like any other rank.

Shape suffixes: N rows of this rank, S rows of all ranks (sum of sizes), R ranks, B bytes of a packed row, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid_moe_ref.config import ParallelConfig
from hybrid_moe_ref.parallel.checks.guard import ScheduleGuard
from hybrid_moe_ref.parallel.checks.strict import StrictComparison
from hybrid_moe_ref.parallel.groups import RankGroups, create_groups
from hybrid_moe_ref.parallel.halt import Halt, RollCall, ScheduleMismatch, Watchdog, wait_or_halt
from hybrid_moe_ref.parallel.observer import Collective, NullObserver, Observer
from hybrid_moe_ref.parallel.packing import pack, unpack

# torch 2.13 renamed these two functions and warns about the old names; 2.11 and 2.12 have only the old ones.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


class Communicator(RankGroups):
    """Issues the collectives of one rank in its groups, and reports each collective to an observer."""

    def __init__(
        self,
        rank: int,
        device: torch.device,
        groups: dict[str, dist.ProcessGroup],
        observer: Observer | None = None,
        store: dist.Store | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        super().__init__(rank, {name: tuple(dist.get_process_group_ranks(group)) for name, group in groups.items()})
        self.device = device
        self.observer: Observer = observer or NullObserver()
        self._store = store
        self._timeout_s = timeout_s
        self._halt = Halt(store)
        self._strict: StrictComparison | None = None
        self._watchdog = Watchdog(rank, self._halt)
        self._meeting: StrictComparison | None = None
        self._on_collective: Callable[[Collective], None] | None = None
        self._was_used = False
        self.guard = ScheduleGuard(rank, self._halt)
        self._groups = groups
        self._on_nccl = {name: dist.get_backend(group) == "nccl" for name, group in groups.items()}
        every_rank = sorted({member for members in self._members.values() for member in members})
        self._roll_call = RollCall(rank, every_rank, store) if store is not None else None
        self.observer.groups(self._members)

    @classmethod
    def connect(
        cls,
        parallel: ParallelConfig,
        rank: int,
        *,
        backend: str = "gloo",
        store: dist.Store | None = None,
        device: torch.device | str = "cpu",
        observer: Observer | None = None,
        timeout_s: float = 1800.0,
    ) -> Communicator:
        """Join the job and create its groups. Without a ``store``, use torchrun's environment variables.

        backend    torch.distributed's backend, such as "gloo" or "nccl"
        device     the device of the tensors that this rank sends
        observer   gets a call before and after each collective
        timeout_s  time limit for joining, and for each collective

        Raises the error of torch.distributed if a peer does not join within ``timeout_s``.
        """
        device = torch.device(device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # NCCL and Triton use the current device, which must be this rank's
        timeout = timedelta(seconds=timeout_s)
        if store is None:
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        groups = create_groups(parallel, rank, backend, store, timeout)
        return cls(rank, device, groups, observer, dist.PrefixStore("hybrid_moe_ref", store), timeout_s)

    def start_strict_comparison(self) -> None:
        """From now on, compare each collective with those of the other members, through the store, before it is issued.

        The comparison waits for a late member as long as the collective itself would.
        """
        assert self._store is not None, "the strict check needs a store"
        self._strict = self._strict or StrictComparison(
            self.rank, self._store, self._halt, self._timeout_s, self._watchdog.error
        )

    @contextlib.contextmanager
    def patiently(self, patience_s: float) -> Iterator[None]:
        """Inside the ``with``, let the members of a collective wait for each other before they issue it.

        They wait through the store. So a member can be up to `patience_s` seconds late, even if the timeout of the
        collective itself is shorter. A waiting rank checks whether the processes of the other ranks still exist.
        """
        if self._store is None:
            yield
            return
        if self._meeting is None:
            store = dist.PrefixStore("meeting", self._store)
            watchdog = Watchdog(self.rank, self._halt)
            watchdog.roll_call = self._roll_call
            self._meeting = StrictComparison(self.rank, store, self._halt, patience_s, watchdog.error)
        before, self._strict = self._strict, self._meeting
        try:
            yield
        finally:
            self._strict = before

    @contextlib.contextmanager
    def taped(self, on_collective: Callable[[Collective], None]) -> Iterator[None]:
        """Inside the ``with``, call ``on_collective`` before every collective.

        on_collective: raises an error to refuse the collective, which is then not issued
        """
        self._on_collective = on_collective
        try:
            yield
        finally:
            self._on_collective = None

    def stop_all(self, message: str) -> str:
        """Publish `message`, so that every rank stops.

        A rank that waits in a collective raises ScheduleMismatch with the message. A rank that does not wait gets the
        message from `stopped_by`.

        Returns the message that stops the ranks: `message`, or the message of a rank that published one earlier.
        """
        return str(self._halt.publish(ScheduleMismatch(message)))

    def stopped_by(self) -> str:
        """Return the message of the rank that stopped the job; "" while the job runs."""
        return str(self._halt.published() or "")

    def begin_use(self) -> None:
        """Note that an engine starts on these groups. Raises RuntimeError if an earlier engine on them was stopped.

        The new engine is refused because its first collectives would pair with unfinished collectives of the earlier
        engine.
        """
        message = self.stopped_by() if self._was_used else ""
        if message:
            raise RuntimeError(f"this communicator was stopped ({message}): connect a new one")
        self._was_used = True

    def check_running(self) -> None:
        """Raise the error with which a rank stopped the job, if one did."""
        if error := self._halt.published():
            raise error

    def start_watchdog(self) -> None:
        """From now on, while this rank waits in a collective, check whether the processes of the other ranks exist.

        If one of these processes has ended, this rank stops all ranks with PeerLost. This has no effect on collectives
        of NCCL, where ``wait`` returns at once and only orders streams.
        """
        assert self._roll_call is not None, "the check for lost peers needs a store"
        self._watchdog.roll_call = self._roll_call

    def limit_waits(self, limit_s: float) -> None:
        """From now on, stop all ranks if this rank waits over ``limit_s`` seconds in one collective (0: no limit)."""
        self._watchdog.limit_s = limit_s

    def close(self) -> None:
        """Leave the job. If other ranks still wait for this rank in a collective, this collective then fails."""
        dist.destroy_process_group()

    def all_reduce(self, group: str, x: Tensor, reduce_op: str = "sum", *, layer: str = "") -> Tensor:
        """Reduce ``x`` in place over ``group``. Every rank ends with the result, which is returned, too.

        reduce_op  sum, min or max
        layer      the module to which the collective belongs, for the observer; "" for none
        """
        event = Collective(group, "all_reduce", layer, (x.numel(),), _name(x.dtype), reduce_op)
        self._enter(event)
        pg = self._groups[group]
        self._wait(group, dist.all_reduce(x, op=_REDUCE_OPS[reduce_op], group=pg, async_op=True))
        self.observer.leave(event)
        return x

    def all_gather_v(
        self,
        group: str,
        tensors: Sequence[Tensor],
        sizes: Sequence[int],
        *,
        layer: str = "",
        broadcast_uneven: bool = False,
    ) -> list[Tensor]:
        """Gather the rows of several tensors at once: each [N, ...] becomes [S, ...], with the ranks in group order.

        N is this rank's number of rows, and S is the sum of ``sizes``.

        sizes             ``sizes[r]`` is the number of rows of group rank r, equal for all tensors
        layer             the module to which the collective belongs, for the observer; "" for none
        broadcast_uneven  if the sizes are uneven, let each rank broadcast its rows instead of one all-gather, as vLLM
                          and TensorRT-LLM do

        The tensors can differ in dtype, because rows are sent as bytes.

        Raises ValueError if this rank's number of rows is not the agreed size.
        """
        sizes = tuple(sizes)
        num_rows = sizes[self.group_rank(group)]
        for x in tensors:
            if x.shape[0] != num_rows:
                raise ValueError(
                    f"{group} all_gather_v at {layer}: this rank has {x.shape[0]} rows, but the agreed "
                    f"size is {num_rows}"
                )
        packed_NB = pack(tensors)
        event = Collective(group, "all_gather_v", layer, sizes, "uint8")
        self._enter(event)
        gather = self._broadcast_rows if broadcast_uneven and min(sizes) != max(sizes) else self._gather_rows
        packed_SB = gather(group, packed_NB, sizes)
        self.observer.leave(event)
        return unpack(packed_SB, tensors)

    def reduce_scatter_v(self, group: str, x_SH: Tensor, sizes: Sequence[int], *, layer: str = "") -> Tensor:
        """Sum x_SH over ``group`` and return this rank's rows of the sum, [N, H].

        x_SH    rows for all ranks in group order, [sum of ``sizes``, hidden size]
        sizes   ``sizes[r]`` is the number of rows that group rank r gets; N is this rank's
        layer   the module to which the collective belongs, for the observer; "" for none

        Raises ValueError if the number of rows of ``x_SH`` is not the sum of the agreed sizes.
        """
        sizes = tuple(sizes)
        if x_SH.shape[0] != sum(sizes):
            raise ValueError(
                f"{group} reduce_scatter_v at {layer}: this rank has {x_SH.shape[0]} rows, but the agreed "
                f"sizes add up to {sum(sizes)}"
            )
        event = Collective(group, "reduce_scatter_v", layer, sizes, _name(x_SH.dtype), "sum")
        self._enter(event)
        sum_NH = self._reduce_rows(group, x_SH.contiguous(), sizes)
        self.observer.leave(event)
        return sum_NH

    def all_gather_text(self, group: str, text: str, *, layer: str = "") -> list[str]:
        """Return the texts of all ranks of ``group``, in group order.

        This takes two collectives, so use it only rarely.

        text    this rank's text
        layer   the module to which the collectives belong, for the observer; "" for none
        """
        mine = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        lengths = torch.zeros(len(self.members(group)), dtype=torch.int64)
        lengths[self.group_rank(group)] = mine.numel()
        sizes = self.all_reduce(group, lengths, layer=layer).tolist()
        (gathered,) = self.all_gather_v(group, [mine[:, None]], sizes, layer=layer)
        return [bytes(part.flatten().tolist()).decode().strip() for part in gathered.split(sizes)]

    def _enter(self, event: Collective) -> None:
        self.guard.admit(event)
        self._watchdog.entered(event)
        if self._on_collective is not None:
            self._on_collective(event)
        self.observer.enter(event)
        if self._strict is not None:
            self._strict.check(event, self.members(event.group))

    def _wait(self, group: str, work: dist.Work) -> None:
        """Wait for a collective (``work``). Meanwhile check whether another rank has stopped the job.

        Under NCCL this check does not happen, because ``wait`` returns at once and only orders streams.
        """
        if self._on_nccl[group]:
            work.wait()
        else:
            wait_or_halt(work, self._halt, self._watchdog)

    def _gather_rows(self, group: str, rows_NB: Tensor, sizes: tuple[int, ...]) -> Tensor:
        pg, widest = self._groups[group], max(sizes)
        if self._on_nccl[group] and min(sizes) != widest:
            # NCCL has an uneven all-gather: a grouped broadcast from each rank.
            rows_SB = rows_NB.new_empty(sum(sizes), rows_NB.shape[1])
            self._wait(group, dist.all_gather(list(rows_SB.split(sizes)), rows_NB, group=pg, async_op=True))
            return rows_SB
        # gloo has no uneven all-gather: every rank sends as many rows as the largest size, and all ranks trim them.
        padded_NB = torch.nn.functional.pad(rows_NB, (0, 0, 0, widest - rows_NB.shape[0]))
        rows_SB = rows_NB.new_empty(len(sizes) * widest, rows_NB.shape[1])
        self._wait(group, _all_gather_single(rows_SB, padded_NB, group=pg, async_op=True))
        if min(sizes) == widest:
            return rows_SB
        return torch.cat([rows[:size] for rows, size in zip(rows_SB.split(widest), sizes, strict=True)])

    def _broadcast_rows(self, group: str, rows_NB: Tensor, sizes: tuple[int, ...]) -> Tensor:
        pg, rows_SB = self._groups[group], rows_NB.new_empty(sum(sizes), rows_NB.shape[1])
        for root, part in enumerate(rows_SB.split(sizes)):
            if root == self.group_rank(group):
                part.copy_(rows_NB)
            self._wait(group, dist.broadcast(part, group_src=root, group=pg, async_op=True))
        return rows_SB

    def _reduce_rows(self, group: str, x_SH: Tensor, sizes: tuple[int, ...]) -> Tensor:
        pg, num_rows = self._groups[group], sizes[self.group_rank(group)]
        if self._on_nccl[group]:
            out_NH = x_SH.new_empty(num_rows, x_SH.shape[1])
            if min(sizes) == max(sizes):
                self._wait(group, _reduce_scatter_single(out_NH, x_SH, group=pg, async_op=True))
            else:
                self._wait(group, dist.reduce_scatter(out_NH, list(x_SH.split(sizes)), group=pg, async_op=True))
            return out_NH
        # gloo implements reduce_scatter by an all_reduce, which sends R times the bytes. An all-to-all and a local sum
        # in rank order give the same result in a quarter of the time.
        num_ranks = len(sizes)
        parts_RNH = x_SH.new_empty(num_ranks * num_rows, x_SH.shape[1])
        per_rank = [num_rows] * num_ranks
        self._wait(group, dist.all_to_all_single(parts_RNH, x_SH, per_rank, list(sizes), group=pg, async_op=True))
        return parts_RNH.view(num_ranks, num_rows, x_SH.shape[1]).sum(dim=0)


@lru_cache(maxsize=64)
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
