"""A program with classes of its own: of a process group, and a mode that sees each call of a tensor."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
world, cpu, x = dist.group.WORLD, torch.device("cpu"), torch.ones(3)


class Group(dist.ProcessGroup):
    def getBackendName(self) -> str:
        return "own"


class Interrupting(TorchFunctionMode):
    """Ends the first call of numel as Ctrl-C does at that moment."""

    pressed = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.numel and not self.pressed:
            self.pressed = True
            raise KeyboardInterrupt
        return function(*args, **(kwargs or {}))


def attempt(call) -> None:
    try:
        print(type(call()).__name__)
    except (Exception, KeyboardInterrupt) as error:
        print(type(error).__name__)


own = Group(0, 2)
own._register_backend(cpu, dist.ProcessGroup.BackendType.CUSTOM, world._get_backend(cpu))
attempt(lambda: own.allreduce([x], dist.AllreduceOptions()))
attempt(lambda: own.broadcast([x], dist.BroadcastOptions()))
with Interrupting():
    attempt(lambda: world.allreduce([x], dist.AllreduceOptions()))
attempt(lambda: world.send([x], 7, 0))
attempt(lambda: world.send([object()], 1, 0))
