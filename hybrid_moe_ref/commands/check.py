"""The command `check`: load a checkpoint folder, and compare it with transformers."""

import argparse
from typing import Any

from hybrid_moe_ref.commands.output import show
from hybrid_moe_ref.commands.source import Source, load


def run(args: argparse.Namespace) -> int:
    """Load and describe a checkpoint. Compare its logits with those of transformers, unless `--load-only` is given.

    Returns 1 if the logits differ, if they could not be compared, or if a logit is not finite; otherwise 0.
    """
    import torch

    from hybrid_moe_ref import checkpoint
    from hybrid_moe_ref.commands.comparison import NotCompared, compare

    model = load(args, Source.of(args.model, only_folders=True))
    config = model.config
    tokens_BT = torch.randint(config.vocab_size, (4, 65), generator=torch.Generator().manual_seed(0))
    answer: dict[str, Any] = {
        "folder": args.model,
        **checkpoint.describe(args.model, model),
        "layer_pattern": config.layer_pattern,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "mtp_layers": config.num_mtp_layers,
        "stop_ids": list(model.stop_ids),
        "finite": bool(model(tokens_BT).isfinite().all()),
    }
    agrees = True
    if not args.load_only:
        try:
            answer |= compare(args.model, model, tokens_BT)
            agrees = answer["agrees"]
        except NotCompared as reason:
            answer["not_compared"] = str(reason)
            agrees = False
    show(answer, args.json)
    return 0 if answer["finite"] and agrees else 1
