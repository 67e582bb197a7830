"""The command `bench`: speed and peak memory of prefill and decode."""

import argparse
import time

from hybrid_moe_ref.commands.output import show
from hybrid_moe_ref.commands.source import Source, load


def run(args: argparse.Namespace) -> int:
    """Print the time and speed of the fastest prefill (of three) and of the fastest decode step, and the peak memory.

    Also prints the median time of a decode step.
    """
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
    show(answer, args.json)
    return 0
