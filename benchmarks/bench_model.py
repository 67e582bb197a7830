"""Our plain-torch model against transformers on the CPU: the same weights, prompts and threads, in one process.

    python benchmarks/bench_model.py [--dtype float32] [--threads 2] [--rounds 5] [--json FILE]

Prefill of 512 tokens and decode steps after them, batch 1 and 8, the race preset. Rounds alternate between the
implementations, so that a busy machine slows both; the best of all rounds counts. transformers is measured with each of
its expert implementations, and the best one is the peer. Denormals are flushed for both. Peak memory is of a fresh
process each. A speed counts only if the logits agree, so that is checked first.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from hybrid_moe_ref import Batch, HybridCache, HybridMoE, ModelConfig, preset
from hybrid_moe_ref.generation import pages_needed, prefill

PROMPT, STEPS = 512, 24
EXPERTS = ("grouped_mm", "eager", "batched_mm")


def build_theirs(config: ModelConfig, dtype: torch.dtype) -> Any:
    sys.modules.setdefault("fla", None)  # type: ignore[arg-type]  # importable without a GPU, it fails when called
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    from hybrid_moe_ref.checkpoint.families import to_json

    raw = to_json(config, "qwen3_5_moe_text", str(dtype).removeprefix("torch."))
    with torch.device("meta"):
        model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**raw)).to(dtype)
    return model.eval().requires_grad_(False)


def share_weights(ours: HybridMoE, theirs: Any) -> None:
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    rotary = theirs.model.rotary_emb  # its table is no weight, and still on meta
    theirs.model.rotary_emb = type(rotary)(theirs.config)


class Ours:
    def __init__(self, model: HybridMoE, batch: int) -> None:
        self.model, self.batch = model, batch
        pages = pages_needed(model, [PROMPT + STEPS] * batch)
        self.cache = HybridCache(model.config, pages, dtype=model.dtype)

    def prefill(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        self.sequences = [self.cache.allocate() for _ in range(self.batch)]
        return prefill(self.model, list(tokens_BT), self.sequences, self.cache)

    def decode(self, tokens_B: torch.Tensor) -> torch.Tensor:
        batch = Batch.of([(sequence, 1) for sequence in self.sequences])
        return self.model.logits(self.model.step(tokens_B, batch, self.cache)).argmax(-1)

    def end(self) -> None:
        for sequence in self.sequences:
            self.cache.free(sequence)


class Theirs:
    def __init__(self, model: Any, experts: str) -> None:
        self.model, self.experts = model, experts

    def prefill(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        self.model.set_experts_implementation(self.experts)
        out = self.model(tokens_BT, use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values
        return out.logits[:, -1].argmax(-1)

    def decode(self, tokens_B: torch.Tensor) -> torch.Tensor:
        out = self.model(tokens_B[:, None], past_key_values=self.past, use_cache=True)
        return out.logits[:, -1].argmax(-1)

    def end(self) -> None:
        del self.past


def timed(call: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    result = call(tokens)
    return 1e3 * (time.perf_counter() - start), result


def race(runners: dict[str, Any], tokens_BT: torch.Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Best milliseconds of a prefill and of a decode step."""
    best = {name: {"prefill_ms": float("inf"), "decode_ms": float("inf")} for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            ms, tokens_B = timed(runner.prefill, tokens_BT)
            best[name]["prefill_ms"] = min(best[name]["prefill_ms"], ms)
            for _ in range(STEPS):
                ms, tokens_B = timed(runner.decode, tokens_B)
                best[name]["decode_ms"] = min(best[name]["decode_ms"], ms)
            runner.end()
    return best


def peak_mib(which: str, dtype: str, threads: int) -> float:
    """Peak resident memory of a fresh process that makes one model with random weights, prefills and decodes."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", which, "--dtype", dtype, "--threads", str(threads)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def print_peak(which: str, config: ModelConfig, dtype: torch.dtype) -> None:
    import resource

    if which == "ours":
        runner: Any = Ours(HybridMoE(config, device="meta", dtype=dtype).init_weights(0), 1)
    else:
        theirs = build_theirs(config, dtype).to_empty(device="cpu")
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
        for parameter in theirs.parameters():
            parameter.normal_(std=0.02)
        runner = Theirs(theirs, which)
    tokens_B = runner.prefill(torch.zeros(1, PROMPT, dtype=torch.long))
    for _ in range(STEPS):
        tokens_B = runner.decode(tokens_B)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=["grouped_mm", "eager"])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    config, dtype = preset("race"), getattr(torch, args.dtype)
    with torch.inference_mode():
        if args.peak:
            print_peak(args.peak, config, dtype)
            return 0
        ours = HybridMoE(config, device="meta", dtype=dtype).init_weights(0)
        theirs = build_theirs(config, dtype)
        share_weights(ours, theirs)
        import transformers

        record: dict[str, Any] = {
            "hardware": f"{platform.processor() or platform.machine()}, {args.threads} threads",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "dtype": args.dtype,
            "prompt_tokens": PROMPT,
            "rows": [],
        }
        r = torch.Generator().manual_seed(1)
        for batch in args.batch:
            tokens_BT = torch.randint(config.vocab_size, (batch, PROMPT), generator=r)
            if dtype == torch.float32:
                want = theirs(tokens_BT[:1], use_cache=False).logits
                error = float((ours(tokens_BT[:1]) - want).norm() / want.norm())
                assert error < 1e-4, f"the logits differ by {error:.1e}: no race"
            runners: dict[str, Any] = {"ours": Ours(ours, batch)} | {
                name: Theirs(theirs, name) for name in args.experts
            }
            times = race(runners, tokens_BT, args.rounds)
            peers = [times[name] for name in args.experts]
            row: dict[str, Any] = {"batch": batch, "times": times}
            for key in ("prefill_ms", "decode_ms"):
                row[f"{key.removesuffix('_ms')}_ratio"] = min(peer[key] for peer in peers) / times["ours"][key]
            record["rows"].append(row)
            for name, result in times.items():
                prefill_ms, decode_ms = result["prefill_ms"], result["decode_ms"]
                print(f"batch {batch}  {name:12} prefill {prefill_ms:8.1f} ms   decode {decode_ms:6.2f} ms")
            ratios = f"prefill {row['prefill_ratio']:.2f}, decode {row['decode_ratio']:.2f}"
            print(f"batch {batch}  best of transformers / ours: {ratios}")
    record["peak_mib"] = {name: peak_mib(name, args.dtype, args.threads) for name in ("ours", *args.experts)}
    print("peak MiB " + ", ".join(f"{name} {value:.0f}" for name, value in record["peak_mib"].items()))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
