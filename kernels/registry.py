"""Select the implementation of an operation for a device and a dtype.

    from hybrid_moe_kernels import gated_delta_rule, registry

    y = gated_delta_rule.decode(...)         the call is the same for every implementation
    registry.use("native")                   chooses for this process; builds or loads the library if needed
    with registry.using("torch"): ...
    registry.table("cpu", torch.bfloat16)    {"gated_delta_rule.decode": "native", ...}

A folder has one or more operations. Its `__init__.py` has an `Op` for each, with a check of the arguments;
`reference.py` defines them in torch, and `native.py` and `triton.py` have functions of the same names. If the chosen
backend has no function of that name, or none for that dtype or device, another backend runs the operation. The choices:

    auto      triton on CUDA, torch on other devices
    native    C++ on the CPU for float32 and bfloat16
    triton    also on the CPU, through its interpreter (TRITON_INTERPRET=1)
    torch     the reference
    fla, mamba_ssm   the packages of these names, for comparison

Only the reference is differentiable, so it runs every call that autograd must record.

Each call first checks its arguments, unless HMR_KERNEL_CHECKS=0, `python -O` or `unchecked` switch this off. Without
the check, a wrong argument can make a Triton or native kernel read or write outside of its tensors.

The environment variable HMR_KERNELS sets the initial choice of a process. The library of "native" is built or loaded at
the first call. If the choice cannot run here (no compiler, no Triton), one log line warns about it and torch runs
instead.

An implementation module can define
    DTYPES            the dtypes that it takes as first argument; any, if this is not defined
    DEVICES           the devices on which it runs; any, if this is not defined
    missing() -> str  returns what it lacks on this machine; "" if nothing
"""

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from hybrid_moe_kernels.checks import Inside
from hybrid_moe_kernels.choices import CHOICES as CHOICES
from torch import Tensor

_MODULES = {"torch": "reference"}
_log = logging.getLogger("hybrid_moe_kernels")
_ops: dict[str, "Op"] = {}
_logged: set[str] = set()
_choice = os.environ.get("HMR_KERNELS") or "auto"
_wanted = os.environ.get("HMR_KERNEL_CHECKS", "")
_checks = __debug__ and _wanted != "0"
_unchecked = Inside()
_is_prepared = False


class Implementation(NamedTuple):
    """A backend's function for an op."""

    backend: str
    run: Callable[..., Any]


class Op:
    """One operation, called like its reference. The device and dtype of the first argument select the implementation.

    package     name of the operation's package, such as "hybrid_moe_kernels.norm"
    function    name of the function in each backend's module
    check       takes the arguments of a call; raises ValueError for the first that does not fit
    """

    def __init__(self, package: str, function: str, check: Callable[..., None]) -> None:
        self.package, self.function = package, function
        self.name = f"{package.rpartition('.')[2]}.{function}"
        self.check = check
        self._picked: dict[tuple[torch.device, torch.dtype], Implementation] = {}
        _ops[self.name] = self

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """Check the arguments and run the selected implementation.

        Raises ValueError, before anything is launched, with the name of an argument that does not fit.
        """
        chosen = self._picked.get((x.device, x.dtype)) or self.pick(x.device, x.dtype)
        if chosen.backend != "torch" and torch.is_grad_enabled() and _wants_gradient(x, args):
            chosen = self._reference(x)
        if _checks and not _unchecked.count:
            self.check(x, *args, **options)
        return chosen.run(x, *args, **options)

    def backend(self, x: Tensor) -> str:
        """Return the name of the backend that runs a call with the first argument `x`.

        If autograd records the call, the reference runs instead of this backend.
        """
        return (self._picked.get((x.device, x.dtype)) or self.pick(x.device, x.dtype)).backend

    def pick(self, device: torch.device | str, dtype: torch.dtype) -> Implementation:
        """Select the implementation for this device and dtype under the current choice."""
        place = torch.device(device), dtype
        if place not in self._picked:
            kind = place[0].type
            candidates = (self.implementation(backend, kind, dtype) for backend in _preference(kind))
            self._picked[place] = next(candidate for candidate in candidates if candidate is not None)
        return self._picked[place]

    def _reference(self, x: Tensor) -> Implementation:
        reference = self.implementation("torch", x.device.type, x.dtype)
        assert reference is not None, f"{self.name} has no reference"
        return reference

    def forget(self) -> None:
        """Forget the selected implementations, so that the next call selects again."""
        self._picked.clear()

    def implementation(self, backend: str, device: str, dtype: torch.dtype) -> Implementation | None:
        """Return the backend's implementation; None if it has none for this device and dtype, or cannot run here."""
        path = f"{self.package}.{_MODULES.get(backend, backend)}"
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:  # the backend's file exists, but a package that it imports does not
                _warn_once(f"kernels: {backend} needs the package {error.name}; {_fallback(backend)}")
            return None
        except Exception as error:
            if backend == "torch":
                raise
            # An installed package that cannot load here may raise any exception.
            reason = " ".join(str(error).split())
            _warn_once(
                f"kernels: {backend} cannot be imported ({type(error).__name__}: {reason}); {_fallback(backend)}"
            )
            return None
        run = getattr(module, self.function, None)
        if run is None:
            return None
        for what, mine in (("DEVICES", device), ("DTYPES", dtype)):
            takes = getattr(module, what, (mine,))
            if mine not in takes:
                if backend == _choice:
                    listed = " and ".join(str(each).removeprefix("torch.") for each in takes)
                    here = str(mine).removeprefix("torch.")
                    _warn_once(f"kernels: {backend} runs on {listed}, not on {here}; {_fallback(backend)}")
                return None
        if backend == "native" == _choice and not _is_prepared:
            prepare()
        lack = module.missing() if hasattr(module, "missing") else ""
        if lack:
            _warn_once(f"kernels: {backend}: {lack}; {_fallback(backend)}")
            return None
        return Implementation(backend, run)


def _wants_gradient(x: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether autograd would record the call."""
    others = (each for arg in args for each in (arg if isinstance(arg, list) else (arg,)))
    return x.requires_grad or any(isinstance(each, Tensor) and each.requires_grad for each in others)


def _fallback(backend: str) -> str:
    return "torch runs instead" if backend != "torch" else "no other implementation runs instead"


def _preference(device: str) -> tuple[str, ...]:
    if _choice not in CHOICES:
        raise ValueError(f"kernels (HMR_KERNELS or use): {_choice!r} is not one of {', '.join(CHOICES)}")
    if _choice == "auto":
        return ("triton", "torch") if device == "cuda" else ("torch",)
    if _choice == "native":
        return ("native", "torch") if device == "cpu" else ("triton", "torch")
    return (_choice, "torch") if _choice != "torch" else ("torch",)


def _warn_once(line: str) -> None:
    if line not in _logged:
        _logged.add(line)
        _log.warning(line)


def _forget() -> None:
    for op in _ops.values():
        op.forget()


def use(choice: str) -> None:
    """Set the choice of this process.

    "native" builds or loads its library now, so that no later call does. If that fails, one log line says why, and
    torch runs instead.

    Raises ValueError for an unknown choice.
    """
    global _choice, _is_prepared
    if choice not in CHOICES:
        raise ValueError(f"kernels: {choice!r} is not one of {', '.join(CHOICES)}")
    _choice, _is_prepared = choice, False
    _forget()
    prepare()


def prepare(tick: Callable[[], None] = lambda: None) -> None:
    """If the current choice is "native", build or load its library now. Otherwise do nothing.

    If that fails, one log line says why, and torch runs instead. Without this function, the first call of an operation
    builds or loads the library. So a server calls it before its ranks wait for each other.

    tick: called several times a second during a build, see `native.prepare`
    """
    global _is_prepared
    _is_prepared = True
    if _choice == "native":
        native = importlib.import_module("hybrid_moe_kernels.native")
        started = time.monotonic()

        def tick_and_warn() -> None:
            if time.monotonic() - started > native.SILENT_S:
                _warn_once(f"kernels: native: building {native.path()}, which takes minutes, once for this machine")
            tick()

        if lack := native.prepare(tick_and_warn):
            _warn_once(f"kernels: native: {lack}; torch runs instead")
        _forget()


@contextlib.contextmanager
def using(choice: str) -> Iterator[None]:
    """Set the choice inside the ``with``, then restore the previous one."""
    before = _choice
    use(choice)
    try:
        yield
    finally:
        use(before)


def choice() -> str:
    """Return the current choice."""
    return _choice


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Skip all argument checks inside the ``with``, as HMR_KERNEL_CHECKS=0 and `python -O` do.

    Use it around calls that were checked once already, such as those of a captured graph.
    """
    with _unchecked.block():
        yield


@contextlib.contextmanager
def trusted() -> Iterator[None]:
    """Skip argument checks inside the ``with``, unless the variable HMR_KERNEL_CHECKS is 1.

    A model uses this around its layers, because the model's own code makes the arguments. A step has 200 checks, which
    take a tenth of a small model's time on a CPU.
    """
    if _wanted == "1":
        yield
    else:
        with unchecked():
            yield


def checking() -> bool:
    """Whether arguments are checked."""
    return _checks and not _unchecked.count


def table(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Return the backend of each operation on this device in this dtype. Only packages that are imported count."""
    return {name: op.pick(device, dtype).backend for name, op in sorted(_ops.items())}
