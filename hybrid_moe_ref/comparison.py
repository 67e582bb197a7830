"""A loaded checkpoint against transformers on the same folder: logits, token by token.

float32 and float64: a token may differ by LIMIT. Beyond that, a token is excused for which some router's last chosen
expert and the first one left out were tied but for MARGIN, and so are those after it in its sequence: which expert the
tie fell to is in the state and the keys that they read. SETTLED of all tokens must stand before any tie.

bfloat16 and float16 change a third of the routings, so two such models are not compared with each other: each is with
transformers in float32, where that fits into memory beside the model, and ours may be off by FACTOR of theirs. The
median token decides: the few that were routed differently would outweigh all others in a mean, by luck, either way. Of
32 small MoE models with random weights the ratio of one was 0.80 to 1.24, and 1.01 in the middle: a single checkpoint
needs that much room.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_moe_ref.checkpoint.families import OWN
from hybrid_moe_ref.checkpoint.shards import read_json
from hybrid_moe_ref.layers.moe import Router
from hybrid_moe_ref.model import HybridMoE

LIMIT, MARGIN, SETTLED, FACTOR = 5e-5, 1e-5, 0.25, 1.5


def compare(folder: str, model: HybridMoE, tokens_BT: Tensor, logits_BTV: Tensor, margins_BT: Tensor) -> dict[str, Any]:
    """What `check` says of it: "agrees" where there is a verdict, and in "transformers" the version, or why there was
    no comparison."""
    if read_json(Path(folder) / "config.json").get("model_type") == OWN:
        return {"transformers": "not compared: it does not know this stack"}
    if importlib.util.find_spec("transformers") is None:
        return {"transformers": "not compared: not installed"}
    if not torch.cuda.is_available():
        sys.modules.setdefault("fla", None)  # type: ignore[arg-type]  # importable without a GPU, it fails when called
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    answer: dict[str, Any] = {"transformers": transformers.__version__}
    try:
        theirs_BTV = _their_logits(folder, model.dtype, tokens_BT)
        if model.dtype in (torch.float32, torch.float64):
            return answer | judge(logits_BTV, theirs_BTV, margins_BT)
        needed = 4 * sum(parameter.numel() for parameter in model.parameters())
        if needed > (there := psutil.virtual_memory().available):
            told = f"not judged: float32 takes {needed / 1e9:.1f} GB, {there / 1e9:.1f} GB are free"
            return answer | {"truth": told}
        return answer | judge_half(logits_BTV, theirs_BTV, _their_logits(folder, torch.float32, tokens_BT))
    except Exception as error:  # whatever someone else's loader or model raises, here it is a finding
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return answer | {"transformers": f"not compared: {type(error).__name__}: {reason}"}


def _their_logits(folder: str, dtype: torch.dtype, tokens_BT: Tensor) -> Tensor:
    import transformers

    # The default computes experts by a kernel that takes neither float64 nor every size.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    with torch.no_grad():
        logits_BTV: Tensor = theirs.eval()(tokens_BT, use_cache=False).logits
    return logits_BTV


def judge(ours_BTV: Tensor, theirs_BTV: Tensor, margins_BT: Tensor) -> dict[str, Any]:
    """The verdict on logits in float32 or float64."""
    error_BT = _error(ours_BTV, theirs_BTV)
    apart_BT = ~(error_BT <= LIMIT)
    settled_BT = (margins_BT < MARGIN).cumsum(-1) == 0
    excused_BT = apart_BT & ~settled_BT
    agrees = torch.equal(apart_BT, excused_BT) and float(settled_BT.double().mean()) >= SETTLED
    return {
        "largest_error": float(error_BT.max()),
        "tokens_apart": int(apart_BT.sum()),
        "tokens_excused": int(excused_BT.sum()),
        "tokens_settled": int(settled_BT.sum()),
        "tokens": apart_BT.numel(),
        "agrees": agrees,
    }


def judge_half(ours_BTV: Tensor, theirs_BTV: Tensor, truth_BTV: Tensor) -> dict[str, Any]:
    """The verdict on logits of narrower types."""
    ours, theirs = (float(_error(x_BTV, truth_BTV).median()) for x_BTV in (ours_BTV, theirs_BTV))
    return {"error_to_float32": ours, "their_error_to_float32": theirs, "agrees": ours <= FACTOR * theirs}


def _error(x_BTV: Tensor, truth_BTV: Tensor) -> Tensor:
    truth_BTV = truth_BTV.double()
    return (x_BTV.double() - truth_BTV).norm(dim=-1) / truth_BTV.norm(dim=-1)


def logits_and_margins(model: HybridMoE, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V], and for each token how close any router's last chosen expert was to the first one left out, as
    the difference of their scores before the softmax; both on the CPU."""
    margins_N = torch.full((tokens_BT.numel(),), torch.inf)

    def watch(router: Router, args: tuple[Tensor], _: object) -> None:
        scores_NE = F.linear(args[0], router.weight).float().sort(-1, descending=True).values
        if router.top_k < scores_NE.shape[1]:
            margin_N = scores_NE[:, router.top_k - 1] - scores_NE[:, router.top_k]
            torch.minimum(margins_N, margin_N.cpu(), out=margins_N)

    handles = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, Router)]
    logits_BTV = model(tokens_BT).cpu()
    for handle in handles:
        handle.remove()
    return logits_BTV, margins_N.view_as(tokens_BT)
