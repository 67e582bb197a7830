"""What the registry does about a backend that is not all there."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hybrid_moe_kernels import native, norm, registry
from ranks import run_ranks

from hybrid_moe_ref.engine.lifecycle import Engine
from hybrid_moe_ref.parallel.comm import Communicator
from repro.lab.outcome import reference
from repro.lab.settings import DEFAULT_ENGINE, RunSettings

X, WEIGHT = torch.ones(2, 4), torch.zeros(4)


@pytest.fixture(autouse=True)
def nothing_logged(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_logged", set())
    registry.use(registry.choice())  # what was picked is forgotten, before and after a test
    yield
    registry.use(registry.choice())


def serve(monkeypatch, backend: str, module: types.ModuleType | Exception) -> None:
    """What importing an op's backend gives."""
    real = importlib.import_module

    def load(path: str, package: str | None = None):
        if not path.endswith(f".{backend}"):
            return real(path, package)
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.setattr(importlib, "import_module", load)


@pytest.mark.parametrize(
    "error", [ImportError("cannot import name 'knobs'"), RuntimeError("0 active drivers\n(2 wanted)")], ids=str
)
def test_a_backend_that_does_not_import_is_one_line(error, monkeypatch, caplog) -> None:
    serve(monkeypatch, "triton", error)
    with registry.using("triton"):
        for _ in range(2):
            assert norm.rms_norm(X, WEIGHT, 1e-6).sum() == pytest.approx(8)
            assert norm.rms_norm.pick("cpu", torch.bfloat16).backend == "torch"
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    assert caplog.messages == [f"kernels: triton cannot be imported ({text}); torch runs instead"]


def test_a_reference_that_does_not_import_is_an_error(monkeypatch) -> None:
    serve(monkeypatch, "reference", ImportError("broken"))
    with pytest.raises(ImportError, match="broken"):
        norm.rms_norm(X, WEIGHT, 1e-6)


def test_a_choice_that_does_not_take_the_device_or_dtype_is_one_line(monkeypatch, caplog) -> None:
    module = types.ModuleType("fla")
    module.rms_norm = lambda *args: "ran"  # type: ignore[attr-defined]
    module.DEVICES, module.DTYPES = ("cuda",), (torch.float32, torch.bfloat16)  # type: ignore[attr-defined]
    serve(monkeypatch, "fla", module)
    with registry.using("fla"):
        for _ in range(2):
            assert norm.rms_norm.pick("cpu", torch.float32).backend == "torch"
        assert norm.rms_norm.pick("cuda", torch.float32).backend == "fla"
        assert norm.rms_norm.pick("cuda", torch.float64).backend == "torch"
        assert norm.norm_then_gate.pick("cpu", torch.float32).backend == "torch"  # it has none: nothing to say
    assert caplog.messages == [
        "kernels: fla runs on cuda, not on cpu; torch runs instead",
        "kernels: fla runs on float32 and bfloat16, not on float64; torch runs instead",
    ]


def test_a_call_that_autograd_records_runs_the_reference(monkeypatch) -> None:
    module = types.ModuleType("fla")
    module.rms_norm = lambda *args: X  # type: ignore[attr-defined]
    serve(monkeypatch, "fla", module)
    with registry.using("fla"):
        assert norm.rms_norm(X, WEIGHT, 1e-6) is X
        assert norm.rms_norm(X, WEIGHT.clone().requires_grad_(), 1e-6).requires_grad
        assert norm.rms_norm(X.clone().requires_grad_(), WEIGHT, 1e-6).requires_grad
        with torch.no_grad():
            assert norm.rms_norm(X, WEIGHT.clone().requires_grad_(), 1e-6) is X


def test_a_call_is_checked_except_inside_unchecked(monkeypatch) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(norm.rms_norm, "check", lambda *args: checked.append(args))
    norm.rms_norm(X, WEIGHT, 1e-6)
    with registry.unchecked():
        assert not registry.checking()
        norm.rms_norm(X, WEIGHT, 1e-6)
    assert len(checked) == 1 and registry.checking()


def test_blocks_of_two_threads_may_overlap_and_checks_are_on_again_afterwards() -> None:
    first, second = registry.unchecked(), registry.unchecked()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not registry.checking()
    second.__exit__(None, None, None)
    assert registry.checking()


@pytest.mark.parametrize(("wanted", "checks"), [("", False), ("1", True)])
def test_what_a_model_calls_is_checked_when_that_is_asked_for(monkeypatch, wanted, checks) -> None:
    monkeypatch.setattr(registry, "_wanted", wanted)
    with registry.trusted():
        assert registry.checking() is checks
    assert registry.checking()


@pytest.mark.full
@pytest.mark.parametrize(("options", "environment"), [([], {}), (["-O"], {}), ([], {"HMR_KERNEL_CHECKS": "0"})])
def test_a_process_can_do_without_checks(options, environment) -> None:
    code = """
import torch
from hybrid_moe_kernels import norm
norm.rms_norm.check = lambda *args: print("checked")
norm.rms_norm(torch.ones(2, 4), torch.zeros(4), 1e-6)
"""
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0 and done.stdout == ("" if options or environment else "checked\n"), done.stderr


def prepared_by(monkeypatch, prepare) -> None:
    """As in a process that HMR_KERNELS=native started, and whose library `prepare` loads."""
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_error", "")
    monkeypatch.setattr(registry, "_choice", "native")
    monkeypatch.setattr(registry, "_is_prepared", False)
    monkeypatch.setattr(native, "prepare", prepare)
    registry._forget()


def test_the_first_call_loads_the_library_that_the_environment_asks_for(monkeypatch, caplog) -> None:
    library, calls = types.SimpleNamespace(rms_norm=lambda *args: "native ran"), []

    def load(tick: Any) -> str:
        calls.append(tick)
        monkeypatch.setattr(native, "_library", library)
        return ""

    prepared_by(monkeypatch, load)
    assert norm.rms_norm(X.double(), WEIGHT.double(), 1e-6).sum() == pytest.approx(8) and not calls, "torch's dtype"
    assert norm.rms_norm(X, WEIGHT, 1e-6) == "native ran"
    assert norm.rms_norm.pick("cpu", torch.bfloat16).backend == "native"
    assert registry.table()["norm.rms_norm"] == "native"
    assert len(calls) == 1 and "torch runs instead" not in "".join(caplog.messages[1:])
    monkeypatch.setattr(native, "_library", None)  # or what is picked would stay


def test_a_long_build_at_the_first_call_is_one_line_and_so_is_a_failed_one(monkeypatch, caplog) -> None:
    def build(tick: Any) -> str:
        monkeypatch.setattr(native, "SILENT_S", -1.0)
        tick()
        tick()
        monkeypatch.setattr(native, "_error", "the build failed: no")
        return native.missing()

    prepared_by(monkeypatch, build)
    for _ in range(2):
        assert norm.rms_norm(X, WEIGHT, 1e-6).sum() == pytest.approx(8)
    building, failed = caplog.messages
    assert building.startswith(f"kernels: native: building {native.path()}, which takes minutes")
    assert failed == "kernels: native: the build failed: no; torch runs instead"


@pytest.mark.full
@pytest.mark.usefixtures("native_library")
def test_the_environment_variable_is_enough_for_a_model_of_the_python_interface() -> None:
    code = """
import torch
from hybrid_moe_kernels import registry
from hybrid_moe_ref import HybridMoE, preset
HybridMoE(preset("tiny"), device="meta").init_weights(0)(torch.tensor([[1, 2, 3]]))
print(sorted(name for name, backend in registry.table().items() if backend != "native"))
"""
    environment = os.environ | {"HMR_KERNELS": "native"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "['moe.route']\n", ""), done.stderr


@pytest.mark.full  # ranks, each with a library to load
@pytest.mark.usefixtures("native_library")
def test_the_engine_prepares_native_kernels_and_serves_the_same_tokens(tmp_path, monkeypatch) -> None:
    engine = dataclasses.replace(DEFAULT_ENGINE, dtype="float32")  # native kernels know no float64
    settings = RunSettings("metadata_rebuild", "control", num_ranks=2, engine=engine)

    def run(rank, store):
        monkeypatch.setattr(native, "_library", None)  # as in a process of its own
        monkeypatch.setattr(registry, "_choice", "native")  # as HMR_KERNELS sets it
        server = settings.server()
        comm = Communicator.connect(server.parallel, rank, store=store, timeout_s=60)
        return Engine(server, comm).serve(settings.requests()[rank]), registry.table(), registry._logged

    outcomes = run_ranks(2, tmp_path, run, deadline_s=100)
    for _, table, said in outcomes:
        assert table["gated_delta_rule.decode"] == "native" and not said
    assert outcomes[0][0] | outcomes[1][0] == reference.compute(settings)
