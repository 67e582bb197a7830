"""What `python -m hybrid_moe_ref` can do: one function per command, which prints and returns the exit status.

torch is imported by those that need it.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_moe_ref.config import PRESETS, ConfigError, EngineConfig, ModelConfig, ParallelConfig, preset
from hybrid_moe_ref.pages import page_layout

if TYPE_CHECKING:
    from torch import Tensor

    from hybrid_moe_ref.model import HybridMoE

_ITEMSIZES = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4}


def _show(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    for name, value in answer.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        elif isinstance(value, int) and value >= 1_000_000:
            value = f"{value:,} ({value / 1e9:.2f} B)"
        print(f"{name:20} {value}")


def params(args: argparse.Namespace) -> int:
    """Parameter totals. Active are those that one token's forward pass multiplies with: all but the embedding table
    and the experts that the router leaves out. The MTP layer is counted apart."""
    from hybrid_moe_ref.model import HybridMoE

    config = preset(args.preset)
    counts = {name: p.numel() for name, p in HybridMoE(config, device="meta").named_parameters()}
    mtp = sum(counts.pop(name) for name in list(counts) if name.startswith("mtp."))
    routed = sum(count for name, count in counts.items() if ".experts." in name)
    total = sum(counts.values())
    idle = routed - routed * config.num_experts_per_tok // config.num_experts if config.num_experts else 0
    if not config.tie_word_embeddings:
        idle += counts["model.embed_tokens.weight"]
    answer = {
        "preset": args.preset,
        "layers": config.num_layers,
        "total": total,
        "active": total - idle,
        "routed_experts": routed,
        "mtp": mtp,
    }
    _show(answer, args.json)
    return 0


def pages(args: argparse.Namespace) -> int:
    """The unified page of KV entries and recurrent states."""
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
    """Continue a prompt, printing each token as it comes."""
    import torch

    from hybrid_moe_ref.generation import stream
    from hybrid_moe_ref.speculative import speculative_stream

    tokenizer = _tokenizer(Path(args.model)) if args.prompt is not None else None
    ids = tokenizer.encode(args.prompt).ids if tokenizer else args.tokens
    new: list[int] = []

    def show(token: int) -> None:
        # Some characters are made of several tokens, so the text is decoded anew and only what is added is printed.
        before = tokenizer.decode(new) if tokenizer else ""
        new.append(token)
        print(tokenizer.decode(new)[len(before) :] if tokenizer else f"{token} ", end="", flush=True)

    if args.layout != "single":
        _generate_on_ranks(args, ids, show)
        print()
        return 0
    model = _load(args)
    prompt_T = torch.tensor(ids, dtype=torch.long, device=model.device)
    if args.drafts:
        tokens = speculative_stream(model, prompt_T, args.max_new_tokens, num_drafts=args.drafts)
    else:
        chosen = stream(model, [prompt_T], args.max_new_tokens, prefill_chunk=args.prefill_chunk)
        tokens = (int(token_B[0]) for token_B in chosen)
    for token in tokens:
        show(token)
    print()
    return 0


def _generate_on_ranks(args: argparse.Namespace, ids: list[int], show: Callable[[int], None]) -> None:
    """The same on eight ranks of this machine."""
    from hybrid_moe_ref import checkpoint
    from hybrid_moe_ref.engine.local import generate
    from hybrid_moe_ref.engine.refusal import preflight
    from hybrid_moe_ref.engine.server_config import ServerConfig

    if args.prefill_chunk:
        raise ConfigError("chunked prefill needs the layout 'single'", "--layout")
    folder = args.model if (Path(args.model) / "config.json").exists() else ""
    config, saved_dtype = checkpoint.read_config(folder) if folder else (preset(args.model), None)
    if folder:
        config = checkpoint.without_absent_mtp(config, checkpoint.Shards(Path(folder)))
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {config.vocab_size}")
    dtype = args.dtype or saved_dtype or "float32"
    pages = page_layout(config, _ITEMSIZES[{"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "fp32")])
    engine = EngineConfig(
        max_num_seqs=1,
        max_num_batched_tokens=max(1 + args.drafts, len(ids)),
        num_pages=2 * pages.pages_for(len(ids) + args.max_new_tokens),
        unfinished_interval=4,
        dtype=dtype,
        num_drafts=args.drafts,
        mode=args.mode,
    )
    layouts = {"dp8ep8": ParallelConfig(dp_size=8), "tp8": ParallelConfig(tp_size=8, expert_parallel=False)}
    server = ServerConfig(
        config, layouts[args.layout], engine, args.seed, args.checks, checkpoint=folder, allow_unsafe=args.allow_unsafe
    )
    preflight(server)
    generate(server, ids, args.max_new_tokens, args.device, show)


def check(args: argparse.Namespace) -> int:
    """Load a checkpoint, say what was found, and compare with transformers where it is installed."""
    import torch

    model = _load(args)
    config = model.config
    r = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(config.vocab_size, (1, 65), generator=r)
    logits_BTV = model(tokens_BT.to(model.device)).cpu()
    answer: dict[str, Any] = {
        "folder": args.model,
        "layer_pattern": config.layer_pattern,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "mtp_layers": config.num_mtp_layers,
        "finite": bool(logits_BTV.isfinite().all()),
        **_compare(args.model, model, tokens_BT, logits_BTV),
    }
    _show(answer, args.json)
    return 0 if answer["finite"] and answer.get("agrees", True) else 1


def _compare(folder: str, model: "HybridMoE", tokens_BT: "Tensor", logits_BTV: "Tensor") -> dict[str, Any]:
    """Relative error of our logits against transformers' on the same checkpoint."""
    import torch

    from hybrid_moe_ref.checkpoint.families import OWN
    from hybrid_moe_ref.checkpoint.shards import read_json

    if read_json(Path(folder) / "config.json").get("model_type") == OWN:
        return {"transformers": "not compared: it does not know this stack"}
    if importlib.util.find_spec("transformers") is None:
        return {"transformers": "not compared: not installed"}
    if not torch.cuda.is_available():
        sys.modules.setdefault("fla", None)  # type: ignore[arg-type]  # importable without a GPU, it fails when called
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
    with torch.no_grad():
        want_BTV = theirs(tokens_BT, use_cache=False).logits.double()
    error = float((logits_BTV.double() - want_BTV).norm() / want_BTV.norm())
    limit = {torch.float64: 1e-9, torch.float32: 5e-5}.get(model.dtype)
    answer: dict[str, Any] = {"transformers": transformers.__version__, "relative_error": error}
    # Two half-precision models route some tokens differently: that says nothing about either.
    return answer | ({"agrees": error <= limit} if limit else {})


def bench(args: argparse.Namespace) -> int:
    """Milliseconds of a prefill and of a decode step, best of several, and the process's peak memory."""
    import resource

    import torch

    from hybrid_moe_ref.batch import Batch
    from hybrid_moe_ref.cache import HybridCache
    from hybrid_moe_ref.generation import pages_needed, prefill

    if args.threads:
        torch.set_num_threads(args.threads)
    model, B, T = _load(args), args.batch, args.prompt_tokens
    torch.set_flush_denormal(True)  # random weights drive states there, where CPUs crawl
    prompts = list(torch.randint(model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(0)))
    prompts = [prompt.to(model.device) for prompt in prompts]
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
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    _show(answer, args.json)
    return 0


def _load(args: argparse.Namespace) -> "HybridMoE":
    """A checkpoint folder, or a preset with random weights."""
    import torch
    from hybrid_moe_kernels import registry

    from hybrid_moe_ref.model import HybridMoE, check_device

    registry.use(args.kernels or registry.choice())
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if (Path(args.model) / "config.json").exists() or args.command == "check":
        return HybridMoE.from_pretrained(args.model, dtype=dtype, device=args.device)
    if Path(args.model).exists():
        raise ConfigError(f"{args.model} has no config.json")
    if args.model not in PRESETS:
        raise ConfigError(f"{args.model!r} is neither a folder nor a preset ({', '.join(PRESETS)})")
    config, dtype = preset(args.model), dtype or torch.float32
    check_device(args.device, dtype)
    _check_memory(config, dtype.itemsize, args.device)
    model = HybridMoE(config, device="meta", dtype=dtype)
    return model.init_weights(args.seed, args.device)


def _check_memory(config: ModelConfig, itemsize: int, device: str) -> None:
    """A model that cannot fit is one line at once, not a machine that swaps."""
    from hybrid_moe_ref.model import HybridMoE

    if device != "cpu":
        return
    needed = itemsize * sum(parameter.numel() for parameter in HybridMoE(config, device="meta").parameters())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ConfigError(f"the model needs {needed / 1e9:.1f} GB, this machine has {there / 1e9:.1f} GB")


def _tokenizer(folder: Path) -> Any:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ConfigError(f"{path} is not there: give token ids with --tokens", "--prompt")
    if importlib.util.find_spec("tokenizers") is None:
        raise ConfigError("the package tokenizers is not installed: give token ids with --tokens", "--prompt")
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path}: {error}") from None
