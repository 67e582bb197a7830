"""The commands of `python -m hybrid_moe_ref`: one function per command, which prints and returns the exit status.

Only the functions that need torch import it.
"""

import argparse
import json
import time
from typing import Any

from hybrid_moe_ref.cache.pages import page_layout
from hybrid_moe_ref.config import preset
from hybrid_moe_ref.sources import Source, load

_ITEMSIZES = {"float8": 1, "bfloat16": 2, "float16": 2, "float32": 4}


_NOTES = {"active": "without the embedding table"}


def _show(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    for name, value in answer.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        elif isinstance(value, int) and value >= 1_000_000:
            note = f", {_NOTES[name]}" if name in _NOTES else ""
            value = f"{value:,} ({value / 1e9:.2f} B{note})"
        print(f"{name:24} {value}")


def params(args: argparse.Namespace) -> int:
    """Print parameter totals. Active are those that one token's forward pass multiplies with: all but the embedding
    table and the experts that the router leaves out. Published names, such as A17B, count the table too. The MTP layer
    is counted apart."""
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
    _show(answer, args.json)
    return 0


def pages(args: argparse.Namespace) -> int:
    """Print the unified page size of KV entries and recurrent states."""
    layout = page_layout(preset(args.preset), kv_itemsize=_ITEMSIZES[args.kv_dtype], tp_size=args.tp)
    answer = {
        "preset": args.preset,
        "tp": args.tp,
        "kv_dtype": args.kv_dtype,
        "tokens": layout.tokens,
        "padding_percent": round(100 * layout.padding, 2),
        "page_bytes": layout.page_bytes,
        "kv_bytes_per_token": layout.bytes_per_token,
        "state_bytes": {kind: size.num_bytes for kind, size in layout.states.items()},
        "layers_per_group": layout.group_size,
        "groups": len(layout.groups),
    }
    if args.json:
        _show(answer, True)
    else:
        for name, value in answer.items():
            print(f"{name:20} {value}")
    return 0


def generate(args: argparse.Namespace) -> int:
    """Continue a prompt."""
    from hybrid_moe_ref import continuation

    return continuation.generate(args)


def check(args: argparse.Namespace) -> int:
    """Load a checkpoint, print what was found, and compare with transformers. Returns 1 when they differ, when there
    was no comparison, or when a logit is not finite."""
    import torch

    from hybrid_moe_ref import checkpoint
    from hybrid_moe_ref.comparison import NotCompared, compare

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
    _show(answer, args.json)
    return 0 if answer["finite"] and agrees else 1


def bench(args: argparse.Namespace) -> int:
    """Print the best time of a prefill and of a decode step in milliseconds, and the process's peak memory."""
    import torch

    from hybrid_moe_ref.batch import Batch
    from hybrid_moe_ref.cache.hybrid_cache import HybridCache
    from hybrid_moe_ref.generation.greedy import pages_needed, prefill
    from hybrid_moe_ref.memory import peak_rss

    if args.threads:
        torch.set_num_threads(args.threads)
    B, T = args.batch, args.prompt_tokens
    model = load(args, Source.of(args.model), [T + args.new_tokens] * B)
    torch.set_flush_denormal(True)  # with random weights, states become denormal, which is slow on CPUs
    tokens_BT = torch.randint(model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))
    prompts = list(tokens_BT.to(model.device))
    num_pages = pages_needed(model, [T + args.new_tokens] * B)
    cache = HybridCache(model.config, num_pages, model.device, model.dtype)

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter()

    prefill_s, decode_s = [], []
    for _ in range(3):
        sequences = [cache.allocate() for _ in range(B)]
        start = now()
        tokens_B = prefill(model, prompts, sequences, cache)
        prefill_s.append(now() - start)
        for _ in range(args.new_tokens):
            start = now()
            hidden_BH = model.step(tokens_B, Batch.of([(sequence, 1) for sequence in sequences]), cache)
            tokens_B = model.logits(hidden_BH).argmax(-1)
            decode_s.append(now() - start)
        for sequence in sequences:
            cache.free(sequence)
    answer = {
        "model": args.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": B,
        "prompt_tokens": T,
        "prefill_ms": min(prefill_s) * 1e3,
        "prefill_tokens_per_s": B * T / min(prefill_s),
        "decode_ms": min(decode_s) * 1e3,
        "decode_median_ms": sorted(decode_s)[len(decode_s) // 2] * 1e3,
        "decode_tokens_per_s": B / min(decode_s),
        "peak_rss_mib": peak_rss() / 2**20,
    }
    if model.device.type == "cuda":
        answer["peak_gpu_mib"] = torch.cuda.max_memory_allocated(model.device) / 2**20
    _show(answer, args.json)
    return 0
