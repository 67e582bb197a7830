"""Our model against transformers on the CPU: the same weights, prompts and threads, in one process.

    python benchmarks/bench_model.py [--dtype float32] [--kernels torch native] [--threads 2] [--rounds 5] [--json FILE]

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
from pathlib import Path
from typing import Any

import torch
from hybrid_moe_kernels import registry

from hybrid_moe_ref import Batch, HybridCache, HybridMoE, ModelConfig, preset
from hybrid_moe_ref.generation import pages_needed, prefill
from hybrid_moe_ref.pages import page_layout

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
    def __init__(self, model: HybridMoE, batch: int, kernels: str = "torch") -> None:
        self.model, self.batch, self.kernels = model, batch, kernels
        pages = pages_needed(model, [PROMPT + STEPS] * batch)
        self.cache = HybridCache(model.config, pages, dtype=model.dtype)

    def prefill(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        registry.use(self.kernels)
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


clock: list[Callable[[], float]] = [time.perf_counter]


def timed(call: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
    start = clock[0]()
    result = call(tokens)
    return 1e3 * (clock[0]() - start), result


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


def floor_ms(model: HybridMoE, batch: int) -> float:
    """The weights and states that a decode step touches, over the bandwidth that a copy of 256 MB reaches."""
    config, touched = model.config, 0.0
    expected = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** batch  # of the experts, by chance
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name:
            touched += parameter.numel() * parameter.itemsize * (expected if ".experts." in name else 1)
    layout = page_layout(config, model.dtype.itemsize)
    for kind in config.layer_pattern:
        if kind == "A":
            touched += batch * PROMPT * 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
        else:
            touched += 2 * batch * layout.states[kind].num_bytes  # read and written
    source = torch.zeros(1 << 28, dtype=torch.uint8)
    target = torch.ones_like(source)
    copy_ms = min(timed(target.copy_, source)[0] for _ in range(10))
    return touched / (2 * source.numel() / copy_ms)


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
    if which.startswith("ours"):
        kernels = which.removeprefix("ours ")
        runner: Any = Ours(HybridMoE(config, device="meta", dtype=dtype).init_weights(0), 1, kernels)
    else:
        theirs = build_theirs(config, dtype).to_empty(device="cpu")
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
        for parameter in theirs.parameters():
            parameter.normal_(std=0.02)
        runner = Theirs(theirs, which)
    tokens_B = runner.prefill(torch.zeros(1, PROMPT, dtype=torch.long))
    for _ in range(STEPS):
        tokens_B = runner.decode(tokens_B)
    # Not getrusage: its maximum survives exec, so a child would answer with its parent's.
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=list(EXPERTS))
    parser.add_argument("--kernels", nargs="+", choices=("torch", "native"), default=["torch", "native"])
    parser.add_argument(
        "--cpu-time", action="store_true", help="of one thread: what others do on the machine counts less"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cpu_time:
        clock[0], args.threads = time.process_time, 1
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    config, dtype = preset("race"), getattr(torch, args.dtype)
    if "native" in args.kernels:
        with registry.using("native"):
            if registry.table("cpu", dtype)["moe.mixture"] != "native":  # the registry has said why
                args.kernels.remove("native")
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
            "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
            "clock": "CPU time" if args.cpu_time else "wall",
            "dtype": args.dtype,
            "prompt_tokens": PROMPT,
            "rows": [],
        }
        r = torch.Generator().manual_seed(1)
        for batch in args.batch:
            tokens_BT = torch.randint(config.vocab_size, (batch, PROMPT), generator=r)
            if dtype == torch.float32:
                want = theirs(tokens_BT[:1], use_cache=False).logits
                for kernels in args.kernels:
                    with registry.using(kernels):
                        error_T = ((ours(tokens_BT[:1]) - want).norm(dim=-1) / want.norm(dim=-1))[0]
                    # A near tie in a router may fall the other way for a token in thousands.
                    off = int((error_T > 5e-5).sum())
                    assert off <= PROMPT // 200, f"the logits of {kernels} differ at {off} of {PROMPT} tokens: no race"
            runners: dict[str, Any] = {f"ours {kernels}": Ours(ours, batch, kernels) for kernels in args.kernels}
            runners |= {name: Theirs(theirs, name) for name in args.experts}
            times = race(runners, tokens_BT, args.rounds)
            peers = [times[name] for name in args.experts]
            row: dict[str, Any] = {"batch": batch, "times": times, "decode_floor_ms": floor_ms(ours, batch)}
            for kernels in args.kernels:
                for key in ("prefill_ms", "decode_ms"):
                    ratio = min(peer[key] for peer in peers) / times[f"ours {kernels}"][key]
                    row[f"{kernels}_{key.removesuffix('_ms')}_ratio"] = ratio
            record["rows"].append(row)
            for name, result in times.items():
                prefill_ms, decode_ms = result["prefill_ms"], result["decode_ms"]
                print(f"batch {batch}  {name:12} prefill {prefill_ms:8.1f} ms   decode {decode_ms:6.2f} ms")
            for kernels in args.kernels:
                ratios = f"prefill {row[f'{kernels}_prefill_ratio']:.2f}, decode {row[f'{kernels}_decode_ratio']:.2f}"
                over = times[f"ours {kernels}"]["decode_ms"] / row["decode_floor_ms"]
                print(f"batch {batch}  best of transformers / ours {kernels}: {ratios}; decode {over:.2f} x its floor")
    record["peak_mib"] = {name: peak_mib(name, args.dtype, args.threads) for name in runners}
    print("peak MiB " + ", ".join(f"{name} {value:.0f}" for name, value in record["peak_mib"].items()))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
