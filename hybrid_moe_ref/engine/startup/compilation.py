"""Compile modules of the model by torch.compile, before any rank waits in a collective for the result.

The compiled modules are those that compute each row alone: norms, routers, shared experts and dense MLPs. Mixers,
routed experts and collectives are not compiled, so the compiler never sees a hook that communicates. Modules of the
same kind in different layers share their compiled code. There are two versions of this code: for one row, and for more
rows.

One rank of the host compiles first and saves the result in Inductor's cache. Meanwhile the other ranks of the host wait
for a lock, up to a deadline; the lock names the rank that has it. Then they load the result.

Shapes: N rows, H hidden.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hybrid_moe_kernels.build_lock import BEAT_S, BuildLock, every
from hybrid_moe_kernels.extension import BuildFailed
from torch import Tensor, nn

from hybrid_moe_ref.engine.startup.builds import BuildPlace
from hybrid_moe_ref.engine.step.graphs import row_wise
from hybrid_moe_ref.model import HybridMoE

NUM_ROWS = (1, 2)
"""Numbers of rows to compile for: torch.compile treats a size of one differently from all larger sizes."""


class Compiler:
    """The compiler of one rank: installs compiled modules in the model, and runs them once so that they are compiled.

    place: the cache folder; the observer, which records the compilation; and a check, called in between, that
    raises an error if another rank has stopped the job
    """

    def __init__(self, model: HybridMoE, place: BuildPlace) -> None:
        self._model = model
        self.place = place
        self._parts: list[CompiledModule] = []

    @property
    def folder(self) -> Path:
        """Return the folder for Inductor's output."""
        return self.place.cache / f"inductor-torch{torch.__version__}"

    @property
    def done(self) -> Path:
        """Return the path of a marker file. It exists if `folder` has the compiled modules for models of this size."""
        kinds = set()
        for part in row_wise(self._model):
            weights = [(name, tuple(x.shape), x.dtype, x.device.type) for name, x in part.named_parameters()]
            kinds.add(f"{type(part).__name__} {weights}")
        return self.folder / f"done-{hashlib.sha256(repr(sorted(kinds)).encode()).hexdigest()[:12]}"

    def install(self) -> None:
        """Replace the `forward` of each norm, router, shared expert and dense MLP by a compiled function.

        torch.compile compiles this function when it is first called.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder)
        import torch._inductor.config as inductor  # takes seconds, so only ranks that compile import it

        inductor.compile_threads = 1  # no process pool, because the ranks already share the machine's cores
        announced = _Announcements(self.place)
        compiled: dict[type[nn.Module], Callable[..., Any]] = {}
        for module in row_wise(self._model):
            kind = type(module)
            if kind not in compiled:
                compiled[kind] = torch.compile(kind.forward, dynamic=True)
            part = CompiledModule(module, compiled[kind], announced)
            module.forward = part.run
            self._parts.append(part)

    @torch.inference_mode()
    def compile_all(self) -> None:
        """Call every compiled module for every number of rows in NUM_ROWS, so that it compiles now."""
        weight = self._model.model.embed_tokens.weight
        for part in self._parts:
            for num_rows in NUM_ROWS:
                part.run(torch.zeros(num_rows, weight.shape[1], dtype=weight.dtype, device=weight.device))

    def compile_in_turn(self) -> None:
        """Compile if no rank of this host has compiled; otherwise wait for the compiling rank and load its output.

        Raises BuildFailed, with the compiler's reason in one line, if a module does not compile; LockTimeout after
        `place.deadline_s` seconds; and ScheduleMismatch if another rank has stopped the job.
        """
        try:
            self.install()
            lock = BuildLock(
                self.folder.with_name(f"{self.folder.name}.lock"),
                self.place.rank, self.place.deadline_s, self.place.observer.local, self.place.check,
            )  # fmt: skip
            if not self.done.exists():
                with lock, every(BEAT_S, lock.beat):
                    if not self.done.exists():
                        self.compile_all()
                        self.done.touch()
            self.compile_all()
        except OSError as error:
            reason = error.strerror or error
            raise BuildFailed(
                f"cannot compile in {self.folder}: {reason}; choose another folder with engine.cache_dir"
            ) from error
        except RuntimeError as error:
            if type(error).__module__.startswith("hybrid_moe_"):
                raise  # an error of this program, not of the compiler
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise BuildFailed(f"torch.compile: {reason}; to start without it, set engine.compile to false") from error


class _Announcements:
    """Reports to the observer when a module compiles: at its first call with one row, and its first with more rows."""

    def __init__(self, place: BuildPlace) -> None:
        self._place = place
        self._seen: set[tuple[str, int]] = set()

    @contextlib.contextmanager
    def around(self, part: str, num_rows: int) -> Iterator[None]:
        kind = (part, min(num_rows, max(NUM_ROWS)))
        if kind in self._seen:
            yield
            return
        self._place.check()  # a running compilation cannot be stopped, but the next one need not start
        name = f"torch.compile of {part}, {'one row' if num_rows == 1 else 'rows'}"
        local = self._place.observer.local
        local("build_begin", name)
        try:
            with every(BEAT_S, lambda: local("heartbeat", name)):
                yield
        finally:
            local("build_end", name)
        self._seen.add(kind)


class CompiledModule:
    """A module whose forward is compiled. A call with 0 rows runs eagerly, to save one more compilation."""

    def __init__(self, module: nn.Module, compiled: Callable[..., Any], announced: _Announcements) -> None:
        self._module, self._compiled, self._announced = module, compiled, announced
        self._eager = module.forward

    def run(self, x_NH: Tensor) -> Any:
        if not x_NH.shape[0]:
            return self._eager(x_NH)
        with self._announced.around(type(self._module).__name__, x_NH.shape[0]):
            return self._compiled(self._module, x_NH)
