"""A loaded checkpoint against transformers on the same folder: logits, token by token.

Both models compute in float64 throughout. transformers as it is keeps norms, softmax, router, rotary table and
recurrence in float32, also in a float64 model; these casts are widened for one forward pass. What then differs is the
order of sums, so a relative error of more than LIMIT is another constant, another cast or another formula. No choice of
experts is close enough to a tie for 1e-14 to change it.

What a narrower dtype costs is compared besides, as the model that was asked for is not the float64 one: its median
token may be FACTOR times as far from the float64 logits as transformers' in that dtype. bfloat16 changes a third of the
routings, so a mean would be decided by the few tokens that were routed differently. Of 32 small bfloat16 MoE models
with random weights the ratio of one was 0.80 to 1.24, and 1.01 in the middle.
"""

import contextlib
import gc
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from hybrid_moe_ref.checkpoint.families import OWN
from hybrid_moe_ref.checkpoint.shards import read_json
from hybrid_moe_ref.model import HybridMoE

LIMIT, FACTOR = 1e-11, 1.5


class NotCompared(Exception):
    """There is no verdict; the text says why in one line."""


def compare(folder: str, model: HybridMoE, tokens_BT: Tensor) -> dict[str, Any]:
    """Compare `model`, loaded from `folder`, with transformers: its version, errors, and whether they agree.

    Raises NotCompared.
    """
    if read_json(Path(folder) / "config.json").get("model_type") == OWN:
        raise NotCompared("no other implementation knows this stack of layers")
    if importlib.util.find_spec("transformers") is None:
        raise NotCompared("transformers is not installed (pip install transformers)")
    needed = 8 * sum(parameter.numel() for parameter in model.parameters())
    if needed > (there := psutil.virtual_memory().available):
        raise NotCompared(f"a float64 model takes {needed / 1e9:.1f} GB, {there / 1e9:.1f} GB are free")
    if not torch.cuda.is_available():
        sys.modules.setdefault("fla", None)  # type: ignore[arg-type]  # importable without a GPU, it fails when called
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ours_BTV = model(tokens_BT).cpu()
    exact = model if model.dtype == torch.float64 else HybridMoE.from_pretrained(folder, dtype=torch.float64)
    exact_BTV = exact(tokens_BT).cpu()
    del exact
    gc.collect()  # one float64 model at a time
    try:
        truth_BTV = their_logits(folder, torch.float64, tokens_BT)
        answer = {"transformers": transformers.__version__, **judge_exact(exact_BTV, truth_BTV)}
        if model.dtype != torch.float64:
            theirs_BTV = their_logits(folder, model.dtype, tokens_BT)
            rounding = judge_rounding(ours_BTV, theirs_BTV, truth_BTV)
            answer |= rounding | {"agrees": answer["agrees"] and rounding["agrees"]}
        return answer
    except Exception as error:  # someone else's loader or model may raise anything
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise NotCompared(f"transformers: {type(error).__name__}: {reason}") from error


def their_logits(folder: str | Path, dtype: torch.dtype, tokens_BT: Tensor) -> Tensor:
    """Logits of transformers' model of the folder; those of float64 in float64 throughout."""
    import transformers

    # The default computes experts by a kernel that takes neither float64 nor every size.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    widened = float64_throughout(theirs) if dtype == torch.float64 else contextlib.nullcontext()
    with torch.no_grad(), widened:
        logits_BTV: Tensor = theirs.eval()(tokens_BT, use_cache=False).logits
    return logits_BTV


@contextlib.contextmanager
def float64_throughout(theirs: nn.Module) -> Iterator[None]:
    """Make a float64 model of transformers compute everything in float64: inside, its casts to float32 are to float64,
    and its rotary frequencies are not rounded. It changes torch for the whole process: nothing else may run inside."""
    for module in theirs.modules():
        if isinstance(frequencies := getattr(module, "inv_freq", None), Tensor):
            config: Any = module.config
            exponents = torch.arange(0, len(frequencies), dtype=torch.float64) / len(frequencies)
            module.inv_freq = 1 / config.rope_parameters["rope_theta"] ** exponents.to(frequencies.device)
    kept = torch.float32, torch.float, Tensor.float
    torch.float32 = torch.float = torch.float64
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.float32, torch.float, Tensor.float = kept  # type: ignore[method-assign]


def judge_exact(ours_BTV: Tensor, theirs_BTV: Tensor) -> dict[str, Any]:
    """The verdict on float64 logits [B, T, V]."""
    error_BT = errors(ours_BTV, theirs_BTV)
    return {
        "largest_error_in_float64": float(error_BT.max()),
        "tokens": error_BT.numel(),
        "agrees": bool((error_BT <= LIMIT).all()),
    }


def judge_rounding(ours_BTV: Tensor, theirs_BTV: Tensor, truth_BTV: Tensor) -> dict[str, Any]:
    """The verdict on logits [B, T, V] of a narrower dtype, beside those of float64."""
    ours, theirs = (float(errors(x_BTV, truth_BTV).median()) for x_BTV in (ours_BTV, theirs_BTV))
    return {"median_error": ours, "their_median_error": theirs, "agrees": ours <= FACTOR * theirs}


def errors(x_BTV: Tensor, truth_BTV: Tensor) -> Tensor:
    """The relative error [B, T] of each token's logits."""
    truth_BTV = truth_BTV.double()
    return (x_BTV.double() - truth_BTV).norm(dim=-1) / truth_BTV.norm(dim=-1)
