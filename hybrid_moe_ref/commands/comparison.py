"""Compare the logits of our model, token by token, with those that transformers computes from the same checkpoint.

First, both models compute in float64. Even a float64 model of transformers casts to float32 in norms, softmax, router,
rotary table and recurrence, so the comparison replaces these casts by casts to float64. Then the two models differ only
in the order of sums. This order changes the router's numbers by 1e-14, which does not change the chosen experts. So a
relative error of more than LIMIT means that a constant, a cast or a formula differs.

Then both models compute in the requested dtype, and the error of each token is measured against the float64 logits of
transformers. The models agree if our median error is at most FACTOR times the median error of transformers. The median
is used because bfloat16 changes a third of the router's choices, and a mean would depend on the few tokens for which
the router chose different experts. For 32 small bfloat16 MoE models with random weights, the ratio of the two medians
was between 0.80 and 1.24; the median of these ratios was 1.01.
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
    """No comparison was possible. The text says why in one line."""


def compare(folder: str, model: HybridMoE, tokens_BT: Tensor) -> dict[str, Any]:
    """Compare the logits of `model`, which was loaded from `folder`, with those of transformers.

    Returns a dict with the version of transformers, the number of tokens, the errors, and under "agrees" whether the
    errors are within the limits.

    tokens_BT: token ids, [sequences, tokens]

    Raises NotCompared if the checkpoint has a model type that only this project implements, if transformers is missing
    or fails, or if a float64 model does not fit into memory.
    """
    if read_json(Path(folder) / "config.json").get("model_type") == OWN:
        raise NotCompared("no other implementation has this stack of layers")
    if importlib.util.find_spec("transformers") is None:
        raise NotCompared("transformers is not installed (pip install transformers)")
    needed = 8 * sum(parameter.numel() for parameter in model.parameters())
    if needed > (there := psutil.virtual_memory().available):
        raise NotCompared(f"a float64 model takes {needed / 1e9:.1f} GB, but only {there / 1e9:.1f} GB are free")
    if not torch.cuda.is_available():
        sys.modules.setdefault("fla", None)  # type: ignore[arg-type]  # importable without a GPU, it fails when called
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ours_BTV = model(tokens_BT).cpu()
    exact = model if model.dtype == torch.float64 else HybridMoE.from_pretrained(folder, dtype=torch.float64)
    exact_BTV = exact(tokens_BT).cpu()
    del exact
    gc.collect()  # one float64 model at a time, to save memory
    try:
        truth_BTV = their_logits(folder, torch.float64, tokens_BT)
        answer = {"transformers": transformers.__version__, **judge_exact(exact_BTV, truth_BTV)}
        if model.dtype != torch.float64:
            theirs_BTV = their_logits(folder, model.dtype, tokens_BT)
            rounding = judge_rounding(ours_BTV, theirs_BTV, truth_BTV)
            answer |= rounding | {"agrees": answer["agrees"] and rounding["agrees"]}
        return answer
    except Exception as error:  # transformers may raise anything
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise NotCompared(f"transformers: {type(error).__name__}: {reason}") from error


def their_logits(folder: str | Path, dtype: torch.dtype, tokens_BT: Tensor) -> Tensor:
    """Return the logits [sequences, tokens, vocabulary] that transformers computes with the model in the folder.

    If `dtype` is float64, transformers computes everything in float64, also what it normally computes in float32.
    """
    import transformers

    # The default kernel of the experts supports neither float64 nor every size.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    widened = float64_throughout(theirs) if dtype == torch.float64 else contextlib.nullcontext()
    with torch.no_grad(), widened:
        logits_BTV: Tensor = theirs.eval()(tokens_BT, use_cache=False).logits
    return logits_BTV


@contextlib.contextmanager
def float64_throughout(theirs: nn.Module) -> Iterator[None]:
    """Make a float64 model of transformers compute everything in float64 while the ``with`` block runs.

    The model's casts to float32 become casts to float64, and its rotary frequencies are not rounded. This function
    changes torch for the whole process, so run nothing else in the process at the same time.
    """
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
    """Compare the float64 logits [sequences, tokens, vocabulary] of our model with those of transformers.

    Returns the largest relative error of a token, the number of tokens, and under "agrees" whether all errors are
    within LIMIT.
    """
    error_BT = errors(ours_BTV, theirs_BTV)
    return {
        "largest_error_in_float64": float(error_BT.max()),
        "tokens": error_BT.numel(),
        "agrees": bool((error_BT <= LIMIT).all()),
    }


def judge_rounding(ours_BTV: Tensor, theirs_BTV: Tensor, truth_BTV: Tensor) -> dict[str, Any]:
    """Compare the logits of both models in a narrower dtype with the float64 logits `truth_BTV` of transformers.

    All logits are [sequences, tokens, vocabulary].

    Returns the median relative errors of our model and of transformers, and under "agrees" whether our median is at
    most FACTOR times the median of transformers.
    """
    ours, theirs = (float(errors(x_BTV, truth_BTV).median()) for x_BTV in (ours_BTV, theirs_BTV))
    return {"median_error": ours, "their_median_error": theirs, "agrees": ours <= FACTOR * theirs}


def errors(x_BTV: Tensor, truth_BTV: Tensor) -> Tensor:
    """Return each token's relative error, [sequences, tokens]: norm of (x_BTV - truth_BTV) / norm of truth_BTV."""
    truth_BTV = truth_BTV.double()
    return (x_BTV.double() - truth_BTV).norm(dim=-1) / truth_BTV.norm(dim=-1)
