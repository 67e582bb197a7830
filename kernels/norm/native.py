"""Root-mean-square norms in C++."""

from typing import Any

from hybrid_moe_kernels import native
from hybrid_moe_kernels.native import DEVICES, DTYPES, missing

__all__ = ["DEVICES", "DTYPES", "gate_then_norm", "missing", "norm_then_gate", "rms_norm"]


def rms_norm(*args: Any, **options: Any) -> Any:
    """Divide by the root mean square and multiply by 1 + weight, in C++.

    Same arguments and result as `reference.rms_norm`.
    """
    return native.library().rms_norm(*args, **options)


def norm_then_gate(*args: Any, **options: Any) -> Any:
    """Normalise, and then gate: the output norm of Gated DeltaNet, in C++.

    Same arguments and result as `reference.norm_then_gate`.
    """
    return native.library().norm_then_gate(*args, **options)


def gate_then_norm(*args: Any, **options: Any) -> Any:
    """Gate, and then normalise: the output norm of Mamba-2, in C++.

    Same arguments and result as `reference.gate_then_norm`.
    """
    return native.library().gate_then_norm(*args, **options)
