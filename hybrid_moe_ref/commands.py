"""What `python -m hybrid_moe_ref` can do: one function per command, which prints and returns the exit status.

torch is imported by those that need it.
"""

import argparse
import dataclasses
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_moe_ref.config import DTYPES, PRESETS, ConfigError, EngineConfig, ModelConfig, ParallelConfig, preset
from hybrid_moe_ref.pages import page_layout

if TYPE_CHECKING:
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
    _refuse_idle_options(args)
    tokenizer = _tokenizer(Path(args.model)) if args.prompt is not None else None
    ids = tokenizer.encode(args.prompt).ids if tokenizer else args.tokens
    show: Callable[[int], None] = _show_id
    if tokenizer:
        show = partial(_show_text, tokenizer, args.max_new_tokens, [], [])
    if args.layout == "single":
        _generate_here(args, ids, show)
    else:
        _generate_on_ranks(args, ids, show)
    print()
    return 0


def _refuse_idle_options(args: argparse.Namespace) -> None:
    """What was asked for and would change nothing."""
    if args.layout == "single":
        idle = {"--checks": args.checks, "--mode": args.mode, "--allow-unsafe": args.allow_unsafe}
        why = f"is for ranks, the layout is {args.layout!r}"
    else:
        idle = {"--kernels": args.kernels, "--prefill-chunk": args.prefill_chunk}
        why = f"needs the layout 'single', not {args.layout!r}"
    for option, value in idle.items():
        if value:
            raise ConfigError(why, option)
    if args.prefill_chunk and args.drafts:
        raise ConfigError(f"{args.prefill_chunk} cannot be had with --drafts {args.drafts}", "--prefill-chunk")


def _show_id(token: int) -> None:
    print(token, end=" ", flush=True)


def _show_text(tokenizer: Any, count: int, new: list[int], printed: list[str], token: int) -> None:
    """Some characters are made of several tokens, and the first of them decode to a replacement: text is held back
    until it ends otherwise, or with the last of the `count` tokens."""
    new.append(token)
    text = tokenizer.decode(new)
    if not text.endswith("\ufffd") or len(new) == count:
        printed.append(text[sum(map(len, printed)) :])
        print(printed[-1], end="", flush=True)


def _generate_here(args: argparse.Namespace, ids: list[int], show: Callable[[int], None]) -> None:
    import torch

    from hybrid_moe_ref.generation import stream
    from hybrid_moe_ref.speculative import speculative_stream

    model = _load(args, [len(ids) + args.max_new_tokens])
    prompt_T = torch.tensor(ids, dtype=torch.long)
    if args.drafts:
        tokens = speculative_stream(model, prompt_T, args.max_new_tokens, num_drafts=args.drafts)
    else:
        chosen = stream(model, [prompt_T], args.max_new_tokens, prefill_chunk=args.prefill_chunk)
        tokens = (int(token_B[0]) for token_B in chosen)
    for token in tokens:
        show(token)


def _generate_on_ranks(args: argparse.Namespace, ids: list[int], show: Callable[[int], None]) -> None:
    """The same on eight ranks of this machine."""
    import torch

    from hybrid_moe_ref.cache import cache_layout
    from hybrid_moe_ref.engine.local import generate
    from hybrid_moe_ref.engine.refusal import preflight
    from hybrid_moe_ref.engine.server_config import ServerConfig
    from hybrid_moe_ref.memory import check_memory
    from hybrid_moe_ref.model import check_token_ids
    from hybrid_moe_ref.parallel.layout import sizes_of_a_rank

    parallel = {"dp8ep8": ParallelConfig(dp_size=8), "tp8": ParallelConfig(tp_size=8, expert_parallel=False)}[
        args.layout
    ]
    if args.device not in ("cpu", "cuda"):
        raise ConfigError(f"{args.device!r} is not 'cpu' or 'cuda', which is every GPU in turn", "--device")
    if args.device == "cuda" and not torch.cuda.device_count():
        raise ConfigError("'cuda', but this machine has 0 GPUs that torch can use", "--device")
    config, saved_dtype = _config_of(args)
    check_token_ids(torch.tensor(ids), config.vocab_size)
    engine = EngineConfig(
        max_num_seqs=1,
        max_num_batched_tokens=max(1 + args.drafts, len(ids)),
        unfinished_interval=4,
        dtype=args.dtype or saved_dtype or "float32",
        num_drafts=args.drafts,
        mode=args.mode or "eager",
    )
    served = config if args.drafts else dataclasses.replace(config, num_mtp_layers=0)
    rank = sizes_of_a_rank(served, parallel, getattr(torch, engine.dtype))
    num_pages = cache_layout(rank.config, rank.dtype).pages_for(len(ids) + args.max_new_tokens)
    check_memory(rank, num_pages, args.device, parallel.world_size)
    server = ServerConfig(
        config,
        parallel,
        dataclasses.replace(engine, num_pages=num_pages),
        args.seed,
        args.checks or "agree",
        checkpoint=args.model if _is_folder(args) else "",
        allow_unsafe=args.allow_unsafe,
    )
    preflight(server)
    generate(server, ids, args.max_new_tokens, args.device, show)


def check(args: argparse.Namespace) -> int:
    """Load a checkpoint, say what was found, and compare with transformers where it is installed."""
    import torch

    from hybrid_moe_ref import checkpoint
    from hybrid_moe_ref.comparison import compare, logits_and_margins

    model = _load(args)
    config = model.config
    tokens_BT = torch.randint(config.vocab_size, (4, 65), generator=torch.Generator().manual_seed(0))
    logits_BTV, margins_BT = logits_and_margins(model, tokens_BT)
    answer: dict[str, Any] = {
        "folder": args.model,
        **checkpoint.describe(args.model, model),
        "layer_pattern": config.layer_pattern,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "mtp_layers": config.num_mtp_layers,
        "finite": bool(logits_BTV.isfinite().all()),
        **compare(args.model, model, tokens_BT, logits_BTV, margins_BT),
    }
    _show(answer, args.json)
    return 0 if answer["finite"] and answer.get("agrees", True) else 1


def bench(args: argparse.Namespace) -> int:
    """Milliseconds of a prefill and of a decode step, best of several, and the process's peak memory."""
    import torch

    from hybrid_moe_ref.batch import Batch
    from hybrid_moe_ref.cache import HybridCache
    from hybrid_moe_ref.generation import pages_needed, prefill
    from hybrid_moe_ref.memory import peak_rss

    if args.threads:
        torch.set_num_threads(args.threads)
    B, T = args.batch, args.prompt_tokens
    model = _load(args, [T + args.new_tokens] * B)
    torch.set_flush_denormal(True)  # random weights drive states there, where CPUs crawl
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


def _is_folder(args: argparse.Namespace) -> bool:
    return args.command == "check" or (Path(args.model) / "config.json").exists()


def _config_of(args: argparse.Namespace) -> tuple[ModelConfig, str | None]:
    """Of a checkpoint folder, with the dtype it was saved in, or of a preset."""
    if _is_folder(args):
        from hybrid_moe_ref import checkpoint

        config, saved_dtype = checkpoint.read_config(args.model)
        return checkpoint.with_mtp_of(config, checkpoint.Shards(Path(args.model))), saved_dtype
    if Path(args.model).exists():
        raise ConfigError(f"{args.model} has no config.json")
    if args.model not in PRESETS:
        raise ConfigError(f"{args.model!r} is neither a folder nor a preset ({', '.join(PRESETS)})")
    return preset(args.model), None


def _load(args: argparse.Namespace, lengths: Sequence[int] = ()) -> "HybridMoE":
    """A checkpoint folder, or a preset with random weights, where it fits in memory beside a cache for sequences of
    these lengths."""
    import torch
    from hybrid_moe_kernels import registry

    from hybrid_moe_ref.generation import pages_needed
    from hybrid_moe_ref.memory import check_memory
    from hybrid_moe_ref.model import HybridMoE, check_device

    config, saved_dtype = _config_of(args)
    name = args.dtype or (saved_dtype if saved_dtype in DTYPES else None) or "float32"
    dtype = getattr(torch, name)
    check_device(args.device, dtype)
    model = HybridMoE(config, device="meta", dtype=dtype)
    check_memory(model, pages_needed(model, list(lengths)), args.device)
    registry.use(args.kernels or registry.choice())
    if _is_folder(args):
        return HybridMoE.from_pretrained(args.model, dtype=dtype if args.dtype else None, device=args.device)
    return model.init_weights(args.seed, args.device)


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
