"""A program with calls of many shapes on torch's fake backend, where every collective returns at once."""

from __future__ import annotations

import threading

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from repro.attach.record import rank as this

dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
pair = dist.new_group([1, 3], group_desc="pair")
x, y = torch.zeros(8), torch.zeros(2, 4, dtype=torch.int32)


def twice(call) -> None:
    for _ in range(2):
        call()


def deeper(call) -> None:
    twice(call)


class Layer(torch.nn.Module):
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor


layers = torch.nn.Sequential(Layer(), Layer())


def calls() -> None:
    for _ in range(3):
        layers(x)
    for tensor in (x, y, x, y, torch.zeros(9)):  # one line, and calls that differ in one thing
        dist.all_reduce(tensor)
    for asynchronous in (False, True, False, True):
        work = dist.all_reduce(x, async_op=asynchronous)
        if work is not None:
            work.wait()
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.SUM):
        twice(lambda op=op: dist.all_reduce(x, op))
    for group in (None, pair):
        deeper(lambda group=group: dist.all_reduce(y, group=group))
        twice(lambda group=group: dist.barrier(group))
    for root in (1, 3):
        twice(lambda root=root: dist.broadcast(x, root))
        twice(lambda root=root: dist.reduce(x, root))
    twice(lambda: dist.all_gather_single(torch.zeros(32), x))
    twice(lambda: dist.reduce_scatter_single(torch.zeros(2), x))
    twice(lambda: dist.all_gather([torch.zeros(8) for _ in range(4)], x))
    twice(lambda: dist.all_to_all_single(torch.zeros(8), x))
    twice(lambda: dist.gather(x, None, 0))
    twice(lambda: dist.all_reduce(x, async_op=True).wait())
    works = [dist.all_reduce(x, async_op=True), dist.broadcast(y, 0, async_op=True), dist.isend(x, 2)]
    for work in reversed(works):
        work.wait()
    works = [dist.all_reduce(x, async_op=True) for _ in range(200)]
    for work in (*works, works[0]):
        work.wait()
    dist.all_reduce(x, async_op=True)  # nobody waits for it
    dist.recv(x, 0)
    with dist._coalescing_manager(async_ops=True) as manager:
        dist.all_reduce(x)
        dist.all_reduce(y)
    manager.wait()
    dist.group.WORLD.allreduce([x]).wait()  # a direct call of c10d, without options
    dist.group.WORLD.allreduce([x, x], dist.ReduceOp.MAX).wait()
    dist.all_reduce(torch.nn.Parameter(x))
    dist.all_reduce(torch.zeros(3, dtype=torch.bfloat16))


class MyOptions(dist.AllreduceOptions):
    asyncOp = property(lambda _: True, lambda self, value: dist.AllreduceOptions.asyncOp.__set__(self, value))


def options() -> None:
    """Options that are set early, late, twice, elsewhere or not at all."""
    group, op = dist.group.WORLD, dist.ReduceOp
    opts, own = dist.AllreduceOptions(), MyOptions()

    def changed(options: dist.AllreduceOptions, **values: object) -> None:
        for name, value in values.items():
            setattr(options, name, value)
        if options is opts:
            group.allreduce([x], opts).wait()

    def rejected(**values: object) -> None:
        try:
            changed(opts, **values)
        except TypeError:
            changed(opts)

    for reduction in (op.SUM, op.MAX, op.MIN, op.PRODUCT):
        for asynchronous in (True, False):
            changed(opts, reduceOp=reduction, asyncOp=asynchronous)
    changed(opts)
    for name, value in (("asyncOp", True), ("reduceOp", op.SUM)):
        changed(opts, **{name: value})
    opts.reduceOp = op.MAX
    opts.reduceOp.op = op.MIN
    changed(opts)
    changed(opts, reduceOp=op(op.PRODUCT))
    opts.reduceOp = op.SUM
    in_thread(lambda: setattr(opts, "reduceOp", op.MAX))
    changed(opts)
    opts.reduceOp = op.MIN
    changed(own, reduceOp=op.MAX, asyncOp=False)
    changed(opts)
    changed(own, reduceOp=op.MAX, asyncOp=False)
    group.allreduce([x], own).wait()
    for _ in range(2):
        opts.reduceOp = op.MAX
        rejected(reduceOp=None)
        rejected(asyncOp="yes")
        rejected(reduceOp=op.PREMUL_SUM)
    rooted = dist.BroadcastOptions()
    for rooted.rootRank in (1, 3, 1):
        group.broadcast([x], rooted).wait()
    recorded = this.current
    for root in (2, 1):
        this.use(None)  # as a test harness does between two tests
        rooted.rootRank = root
        this.use(recorded)
        group.broadcast([x], rooted).wait()
    opts.asyncOp = False
    work = group.allreduce([x], opts)
    in_thread(work.wait)
    works = [group.allreduce([x], opts) for _ in range(3)]
    for work in works:
        work.wait()


def in_thread(call) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


options()
calls()
in_thread(calls)
native = torch._C._distributed_c10d
hooks = [vars(native.ProcessGroup)[name] for name in ("allreduce", "_allgather_base", "barrier")]
print(*[type(hook).__name__ for hook in (*hooks, vars(native.Work)["wait"])])
