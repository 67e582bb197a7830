"""The only file that issues collectives: named groups, and an Observer that is called before and after each one.

Every collective is announced with ``observer.enter`` before it is issued and ``observer.leave`` after it
completed, so a record of the last ``enter`` without a ``leave`` is where a rank waits. On NCCL a collective is only
queued when its call returns, so there ``leave`` says no more than that.

The -v collectives take the *agreed* size vector of the step. Uneven is legal and zero is a size, not a
return: a rank with no rows takes part like any other.

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
from hybrid_moe_ref.parallel.guard import Halt, ScheduleGuard, ScheduleMismatch
from hybrid_moe_ref.parallel.observer import Collective, NullObserver, Observer
from hybrid_moe_ref.parallel.preflight import StorePreflight
from hybrid_moe_ref.parallel.watchdog import RollCall, Watchdog

# torch 2.13 renamed these two and warns about the old names; 2.11 and 2.12 know only the old ones.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

LOOK_UP_INTERVAL = timedelta(milliseconds=100)
"""How long a rank waits in a collective before it looks whether another rank has stopped the job."""

_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


def group_members(parallel: ParallelConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """The groups that ``rank`` belongs to, as name -> global ranks: "dp" for ranks with requests of their own, "ep" for
    experts, and with several tensor-parallel ranks "tp" for those that share its tokens and "world" for all.

    Ranks are numbered dp-major: rank = dp_rank * tp_size + tp_rank.
    """
    num_ranks = parallel.dp_size * parallel.tp_size
    tp_rank = rank % parallel.tp_size
    groups = {
        "dp": tuple(range(tp_rank, num_ranks, parallel.tp_size)),
        "ep": tuple(range(num_ranks)),
    }
    if parallel.tp_size > 1:
        groups["tp"] = tuple(range(rank - tp_rank, rank - tp_rank + parallel.tp_size))
        groups["world"] = groups["ep"]
    return groups


class Communicator:
    """The process groups of one rank, by name, with an observer in front of every collective.

    "dp" and "world" are always CPU groups (gloo), as "dp" is in vLLM: agreements are a few integers and must not wait
    for a device. "ep" and "tp" carry hidden states and use the backend that was asked for.
    """

    def __init__(
        self,
        rank: int,
        device: torch.device,
        groups: dict[str, dist.ProcessGroup],
        observer: Observer | None = None,
        store: dist.Store | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        self.rank = rank
        self.device = device
        self.observer: Observer = observer or NullObserver()
        self._store = store
        self._timeout_s = timeout_s
        self._halt = Halt(store)
        self._preflight: StorePreflight | None = None
        self._watchdog = Watchdog(rank, self._halt)
        self._meeting: StorePreflight | None = None
        self._hear: Callable[[Collective], None] | None = None
        self._was_used = False
        self.guard = ScheduleGuard(rank, self._halt)
        self._groups = groups
        self._members = {name: tuple(dist.get_process_group_ranks(group)) for name, group in groups.items()}
        everyone = sorted({member for members in self._members.values() for member in members})
        self._roll_call = RollCall(rank, everyone, store) if store is not None else None
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
        """Join the job and make its groups; with no ``store``, by torchrun's environment variables.

        Raises what torch.distributed raises when a peer does not come within ``timeout_s``.
        """
        device = torch.device(device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # what asks for "the" GPU, as NCCL and Triton do, must not get another's
        num_ranks = parallel.dp_size * parallel.tp_size
        timeout = timedelta(seconds=timeout_s)
        if store is None:
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
        mine: dict[str, dist.ProcessGroup] = {}
        # Every rank must take part in making every group, in one order, also of those it does not join.
        made: set[tuple[str, tuple[int, ...]]] = set()
        for other in range(num_ranks):
            for name, members in group_members(parallel, other).items():
                if (name, members) in made:
                    continue
                made.add((name, members))
                group = dist.new_group(
                    list(members),
                    backend="gloo" if name in ("dp", "world") else backend,
                    timeout=timeout,
                    group_desc=name,
                )
                if rank in members:
                    mine[name] = group
        return cls(rank, device, mine, observer, dist.PrefixStore("hybrid_moe_ref", store), timeout_s)

    def start_preflight(self) -> None:
        """From here on compare every collective with its members' through the store before it is issued. A member that
        is late is waited for as it would be in the collective itself.
        """
        assert self._store is not None, "ranks that compare need a store to compare through"
        self._preflight = self._preflight or StorePreflight(
            self.rank, self._store, self._halt, self._timeout_s, self._watchdog.error
        )

    @contextlib.contextmanager
    def patiently(self, patience_s: float) -> Iterator[None]:
        """Within the ``with``, the members of a collective meet in the store before they issue it: however long one of
        them still works, up to `patience_s`, the time limit of the collective itself does not run. Since a rank
        that waits in the store sees no broken connection, it looks whether the others live.
        """
        if self._store is None:
            yield
            return
        if self._meeting is None:
            store = dist.PrefixStore("meeting", self._store)
            looking = Watchdog(self.rank, self._halt)
            looking.roll_call = self._roll_call
            self._meeting = StorePreflight(self.rank, store, self._halt, patience_s, looking.error)
        before, self._preflight = self._preflight, self._meeting
        try:
            yield
        finally:
            self._preflight = before

    @contextlib.contextmanager
    def taped(self, hear: Callable[[Collective], None]) -> Iterator[None]:
        """Within the ``with``, call ``hear`` with every collective before it is issued; it may raise to refuse."""
        self._hear = hear
        try:
            yield
        finally:
            self._hear = None

    def stop_all(self, message: str) -> str:
        """Stop every rank that waits in a collective or asks `stopped_by`; the message that won, maybe another's."""
        return str(self._halt.tell(ScheduleMismatch(message)))

    def stopped_by(self) -> str:
        """The message with which a rank stopped the job, "" while none did."""
        return str(self._halt.heard() or "")

    def begin_use(self) -> None:
        """An engine starts on these groups.

        Raises RuntimeError when an earlier engine on them was stopped: what it left unfinished in a group would pair
        with the first collectives of this one.
        """
        message = self.stopped_by() if self._was_used else ""
        if message:
            raise RuntimeError(f"this communicator was stopped ({message}): connect a new one")
        self._was_used = True

    def check_running(self) -> None:
        """Raises the error with which a rank stopped the job, if one did."""
        if error := self._halt.heard():
            raise error

    def start_watchdog(self) -> None:
        """From here on a rank that waits looks whether the others still live. On NCCL, where a wait only orders
        streams, it does not look.
        """
        assert self._roll_call is not None, "ranks that look for each other need a store to be found in"
        self._watchdog.roll_call = self._roll_call

    def limit_waits(self, limit_s: float) -> None:
        """From here on a rank that has waited so long in one collective stops all; 0 is no limit."""
        self._watchdog.limit_s = limit_s

    def close(self) -> None:
        """Leave the job. Peers that still communicate with this rank fail."""
        dist.destroy_process_group()

    def members(self, group: str) -> tuple[int, ...]:
        """Global ranks of ``group``, in group order."""
        return self._members[group]

    def group_rank(self, group: str) -> int:
        """This rank's place in ``group``."""
        return self._members[group].index(self.rank)

    @property
    def everyone(self) -> str:
        """The name of the CPU group of all ranks: "dp" where each rank has requests of its own."""
        return "world" if "world" in self._members else "dp"

    def all_reduce(self, group: str, x: Tensor, reduce_op: str = "sum", *, layer: str = "") -> Tensor:
        """Reduce ``x`` in place over ``group``; every rank ends with the result. reduce_op: sum, min or max."""
        event = Collective(group, "all_reduce", layer, (x.numel(),), _name(x.dtype), reduce_op)
        self._enter(event)
        pg = self._groups[group]
        self._wait(pg, dist.all_reduce(x, op=_REDUCE_OPS[reduce_op], group=pg, async_op=True))
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
        """Gather rows of several tensors at once: each [N, ...] -> [S, ...], ranks in group order.

        ``sizes[r]`` is the number of rows that group rank r brings; the tensors may differ in dtype, since the
        rows travel as bytes (which is also how fp8 crosses gloo). Uneven rows travel padded to the widest, or with
        ``broadcast_uneven`` in one broadcast per rank, as vLLM's and TensorRT-LLM's do.

        Raises ValueError when this rank's rows are not what the agreed sizes say.
        """
        sizes = tuple(sizes)
        num_rows = sizes[self.group_rank(group)]
        for x in tensors:
            if x.shape[0] != num_rows:
                raise ValueError(f"{group} all_gather_v at {layer}: {x.shape[0]} rows here, {num_rows} agreed")
        parts = [_as_bytes(x) for x in tensors]
        packed_NB = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        event = Collective(group, "all_gather_v", layer, sizes, "uint8")
        self._enter(event)
        gather = self._broadcast_rows if broadcast_uneven and min(sizes) != max(sizes) else self._gather_rows
        packed_SB = gather(group, packed_NB, sizes)
        self.observer.leave(event)
        gathered, column = [], 0
        for x in tensors:
            width = _as_bytes(x[:0]).shape[1]
            rows_SB = _plain(packed_SB[:, column : column + width])
            gathered.append(rows_SB.view(x.dtype).view(packed_SB.shape[0], *x.shape[1:]))
            column += width
        return gathered

    def reduce_scatter_v(self, group: str, x_SH: Tensor, sizes: Sequence[int], *, layer: str = "") -> Tensor:
        """Sum x_SH over ``group`` and return this rank's rows of the sum, [N, H].

        Raises ValueError when ``x_SH`` does not have as many rows as the agreed sizes together.
        """
        sizes = tuple(sizes)
        if x_SH.shape[0] != sum(sizes):
            raise ValueError(f"{group} reduce_scatter_v at {layer}: {x_SH.shape[0]} rows here, {sum(sizes)} agreed")
        event = Collective(group, "reduce_scatter_v", layer, sizes, _name(x_SH.dtype), "sum")
        self._enter(event)
        sum_NH = self._reduce_rows(group, x_SH.contiguous(), sizes)
        self.observer.leave(event)
        return sum_NH

    def all_gather_text(self, group: str, text: str, *, layer: str = "") -> list[str]:
        """The texts of all ranks of ``group``, in group order. For rare cases: it takes two collectives."""
        mine = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        lengths = torch.zeros(len(self.members(group)), dtype=torch.int64)
        lengths[self.group_rank(group)] = mine.numel()
        sizes = self.all_reduce(group, lengths, layer=layer).tolist()
        (gathered,) = self.all_gather_v(group, [mine[:, None]], sizes, layer=layer)
        return [bytes(part.flatten().tolist()).decode().strip() for part in gathered.split(sizes)]

    def _enter(self, event: Collective) -> None:
        self.guard.admit(event)
        self._watchdog.entered(event)
        if self._hear is not None:
            self._hear(event)
        self.observer.enter(event)
        if self._preflight is not None:
            self._preflight.check(event, self.members(event.group))

    def _wait(self, pg: dist.ProcessGroup, work: dist.Work) -> None:
        """On NCCL a wait only orders streams, and is left as it is."""
        if dist.get_backend(pg) == "nccl":
            work.wait()
        else:
            wait_or_halt(work, self._halt, self._watchdog)

    def _gather_rows(self, group: str, rows_NB: Tensor, sizes: tuple[int, ...]) -> Tensor:
        pg, widest = self._groups[group], max(sizes)
        if dist.get_backend(pg) == "nccl" and min(sizes) != widest:
            # NCCL's own uneven all-gather: one broadcast per rank, grouped.
            rows_SB = rows_NB.new_empty(sum(sizes), rows_NB.shape[1])
            self._wait(pg, dist.all_gather(list(rows_SB.split(sizes)), rows_NB, group=pg, async_op=True))
            return rows_SB
        # gloo has no uneven all-gather: every rank sends as many rows as the widest, and all trim.
        padded_NB = torch.nn.functional.pad(rows_NB, (0, 0, 0, widest - rows_NB.shape[0]))
        rows_SB = rows_NB.new_empty(len(sizes) * widest, rows_NB.shape[1])
        self._wait(pg, _all_gather_single(rows_SB, padded_NB, group=pg, async_op=True))
        if min(sizes) == widest:
            return rows_SB
        return torch.cat([rows[:size] for rows, size in zip(rows_SB.split(widest), sizes, strict=True)])

    def _broadcast_rows(self, group: str, rows_NB: Tensor, sizes: tuple[int, ...]) -> Tensor:
        pg, rows_SB = self._groups[group], rows_NB.new_empty(sum(sizes), rows_NB.shape[1])
        for root, part in enumerate(rows_SB.split(sizes)):
            if root == self.group_rank(group):
                part.copy_(rows_NB)
            self._wait(pg, dist.broadcast(part, group_src=root, group=pg, async_op=True))
        return rows_SB

    def _reduce_rows(self, group: str, x_SH: Tensor, sizes: tuple[int, ...]) -> Tensor:
        pg, num_rows = self._groups[group], sizes[self.group_rank(group)]
        if dist.get_backend(pg) == "nccl":
            out_NH = x_SH.new_empty(num_rows, x_SH.shape[1])
            if min(sizes) == max(sizes):
                self._wait(pg, _reduce_scatter_single(out_NH, x_SH, group=pg, async_op=True))
            else:
                self._wait(pg, dist.reduce_scatter(out_NH, list(x_SH.split(sizes)), group=pg, async_op=True))
            return out_NH
        # gloo's reduce_scatter is an all_reduce inside and moves R times the bytes. An all-to-all with a local
        # sum is the same collective to the caller, a quarter of the time, and sums in rank order.
        num_ranks = len(sizes)
        parts_RNH = x_SH.new_empty(num_ranks * num_rows, x_SH.shape[1])
        per_rank = [num_rows] * num_ranks
        self._wait(pg, dist.all_to_all_single(parts_RNH, x_SH, per_rank, list(sizes), group=pg, async_op=True))
        return parts_RNH.view(num_ranks, num_rows, x_SH.shape[1]).sum(dim=0)


def wait_or_halt(work: dist.Work, halt: Halt, watchdog: Watchdog | None = None) -> None:
    """Wait for a collective, and check now and then whether it can still end.

    Raises the error with which another rank stopped the job, what the watchdog finds, and what the collective raises
    when it fails.
    """
    while True:
        try:
            work.wait(LOOK_UP_INTERVAL)
            return
        except RuntimeError:
            if work.is_completed():
                _finish(work, halt, watchdog)  # it ended just then, well or with an error of its own
                return
        if error := halt.heard():
            raise error
        if watchdog and watchdog.finding():
            # A peer may be gone because the collective has ended, and all its work with it, since the last look.
            with contextlib.suppress(RuntimeError):
                work.wait(LOOK_UP_INTERVAL)
            if work.is_completed():
                _finish(work, halt, watchdog)
                return
            if error := watchdog.error():
                raise error


def _finish(work: dist.Work, halt: Halt, watchdog: Watchdog | None) -> None:
    """Raise the error of a rank that stopped the job rather than the closed connection that it left."""
    try:
        work.wait()
    except RuntimeError as failure:
        if error := halt.heard() or (watchdog and watchdog.reason()):
            raise error from failure
        raise


def _as_bytes(x: Tensor) -> Tensor:
    """[N, ...] of any dtype -> [N, bytes of a row], without a copy where the rows lie one after another."""
    return _plain(x.reshape(x.shape[0], x.shape[1:].numel())).view(torch.uint8)


def _plain(x_NB: Tensor) -> Tensor:
    """The same rows with plain strides. `contiguous()` does not do: torch calls any strides of a single row contiguous,
    but views only plain ones as another dtype."""
    plain = x_NB.stride() == (x_NB.shape[1], 1)
    return x_NB if plain else x_NB.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=64)
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
