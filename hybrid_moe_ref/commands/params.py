"""The command `params`: parameter totals of a preset."""

import argparse

from hybrid_moe_ref.commands.output import show
from hybrid_moe_ref.config import preset


def run(args: argparse.Namespace) -> int:
    """Print the parameter totals of a preset.

    The active parameters are those that the forward pass of one token multiplies with. These are all parameters except
    the embedding table (if it is not also the head) and the experts that the router does not choose. In the names of
    published models, such as "A17B" for 17 billion active parameters, the table counts too; so this number is printed
    as well. The MTP layer is counted separately.
    """
    from hybrid_moe_ref.model import HybridMoE

    config = preset(args.preset)
    counts = {name: p.numel() for name, p in HybridMoE(config, device="meta").named_parameters()}
    mtp = sum(counts.pop(name) for name in list(counts) if name.startswith("mtp."))
    routed = sum(count for name, count in counts.items() if ".experts." in name)
    total = sum(counts.values())
    idle = routed - routed * config.num_experts_per_tok // config.num_experts if config.num_experts else 0
    embedding = 0 if config.tie_word_embeddings else counts["model.embed_tokens.weight"]
    idle += embedding
    answer = {
        "preset": args.preset,
        "layers": config.num_layers,
        "total": total,
        "active": total - idle,
        "active_with_embedding": total - idle + embedding,
        "routed_experts": routed,
        "mtp": mtp,
    }
    show(answer, args.json)
    return 0
