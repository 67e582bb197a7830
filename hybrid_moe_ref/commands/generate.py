"""The command `generate`: continue a prompt, in this process or on several ranks; print each token at once."""

import argparse
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from hybrid_moe_ref.commands.output import IdPrinter, Printer, TextPrinter
from hybrid_moe_ref.commands.source import Source, load, use_kernels
from hybrid_moe_ref.config import ConfigError, EngineConfig, InputError, ParallelConfig

LAYOUTS = {
    "single": None,
    "dp8ep8": ParallelConfig(dp_size=8),
    "tp8": ParallelConfig(tp_size=8, expert_parallel=False),
}
MAX_RANKS = 64
"""Largest number of ranks that are started for one prompt on one machine."""


def run(args: argparse.Namespace) -> int:
    parallel = parallel_of(args)
    _refuse_options_without_effect(args, parallel)
    source = Source.of(args.model)
    tokenizer = _tokenizer(source) if args.prompt is not None else None
    ids = tokenizer.encode(args.prompt).ids if tokenizer else args.tokens
    if not ids:
        raise ConfigError("the prompt is empty or has no token", "--prompt")
    printer: Printer = TextPrinter(tokenizer) if tokenizer else IdPrinter()
    if parallel is None:
        _generate_here(args, source, ids, printer)
    else:
        _generate_on_ranks(args, source, ids, parallel, printer)
    return 0


def parallel_of(args: argparse.Namespace) -> ParallelConfig | None:
    """Return how the ranks share the model; None for a single process without ranks.

    Raises ConfigError for options that contradict each other, and for more than MAX_RANKS ranks.
    """
    if args.dp is None and args.tp is None and args.ep is None:
        return LAYOUTS[args.layout or "single"]
    if args.layout:
        raise ConfigError(
            f"{args.layout!r} already sets the number of ranks; leave out --dp, --tp and --ep", "--layout"
        )
    dp_size, tp_size = args.dp or 1, args.tp or 1
    if dp_size * tp_size > MAX_RANKS:
        raise ConfigError(
            f"{dp_size} x {tp_size} ranks are more than {MAX_RANKS}, the most for one machine", "--dp, --tp"
        )
    if dp_size * tp_size == 1 and args.ep is not None:
        raise ConfigError("has no effect on one rank; add --dp N or --tp N", "--ep" if args.ep else "--no-ep")
    return ParallelConfig(dp_size, tp_size, expert_parallel=dp_size > 1 if args.ep is None else args.ep)


def _refuse_options_without_effect(args: argparse.Namespace, parallel: ParallelConfig | None) -> None:
    if parallel is None:
        for option, value in (("--checks", args.checks), ("--mode", args.mode), ("--allow-unsafe", args.allow_unsafe)):
            if value:
                raise ConfigError("has no effect without ranks; add --layout dp8ep8, or --dp N", option)
        if args.prefill_chunk and args.drafts:
            raise ConfigError(
                f"{args.prefill_chunk} cannot be combined with --drafts in a single process", "--prefill-chunk"
            )


def _generate_here(args: argparse.Namespace, source: Source, ids: list[int], printer: Printer) -> None:
    import torch

    from hybrid_moe_ref.generation.greedy import stream
    from hybrid_moe_ref.generation.speculative import speculative_stream

    model = load(args, source, [len(ids) + args.max_new_tokens])
    prompt_T = torch.tensor(ids, dtype=torch.long)
    stop_ids = () if args.ignore_eos else model.stop_ids
    if args.drafts:
        tokens = speculative_stream(model, prompt_T, args.max_new_tokens, num_drafts=args.drafts, stop_ids=stop_ids)
    else:
        options: dict[str, Any] = {"prefill_chunk": args.prefill_chunk, "stop_ids": stop_ids}
        tokens = (int(token_B[0]) for token_B in stream(model, [prompt_T], args.max_new_tokens, **options))
    for token in tokens:
        printer.show(token)
    printer.end()


def _generate_on_ranks(
    args: argparse.Namespace, source: Source, ids: list[int], parallel: ParallelConfig, printer: Printer
) -> None:
    import torch

    from hybrid_moe_ref import checkpoint
    from hybrid_moe_ref.cache.hybrid_cache import cache_layout
    from hybrid_moe_ref.engine.local import generate
    from hybrid_moe_ref.engine.server_config import ServerConfig
    from hybrid_moe_ref.engine.serving.scheduler import Request
    from hybrid_moe_ref.engine.startup.refusal import check_start
    from hybrid_moe_ref.memory import check_memory
    from hybrid_moe_ref.model import check_token_ids
    from hybrid_moe_ref.parallel.sharding.layout import sizes_of_a_rank

    if args.device not in ("cpu", "cuda"):
        raise ConfigError(f"{args.device!r} is not 'cpu' or 'cuda'; 'cuda' gives each rank a GPU in turn", "--device")
    if args.device == "cuda" and not torch.cuda.device_count():
        raise ConfigError("torch finds no GPU on this machine", "--device cuda")
    check_token_ids(torch.tensor(ids), source.config.vocab_size)
    at_once = min(args.prefill_chunk or len(ids), len(ids))
    engine = EngineConfig(
        max_num_seqs=1,
        max_num_batched_tokens=max(1 + args.drafts, at_once),
        unfinished_interval=4,
        dtype=source.dtype(args.dtype),
        num_drafts=args.drafts,
        mode=args.mode or "eager",
    )
    served = source.config if args.drafts else dataclasses.replace(source.config, num_mtp_layers=0)
    rank = sizes_of_a_rank(served, parallel, getattr(torch, engine.dtype))
    num_pages = cache_layout(rank.config, rank.dtype).pages_for(len(ids) + args.max_new_tokens)
    suggestion = source.suggestion(args.dtype)
    check_memory(rank, num_pages, args.device, parallel.world_size, suggestion=suggestion)
    server = ServerConfig(
        source.config,
        parallel,
        dataclasses.replace(engine, num_pages=num_pages),
        args.seed,
        args.checks or "agree",
        checkpoint=str(source.folder or ""),
        allow_unsafe=args.allow_unsafe,
    )
    check_start(server)
    use_kernels(args.kernels)  # forked ranks inherit the kernels and the library that this process chose
    stop_ids = checkpoint.read_stop_ids(source.folder) if source.folder and not args.ignore_eos else ()
    request = Request("prompt", tuple(ids), args.max_new_tokens, stop_ids=stop_ids)
    generate(server, request, args.device, printer.show, printer.end)


def _tokenizer(source: Source) -> Any:
    if source.folder is None:
        raise ConfigError(f"the preset {source.name!r} has no tokenizer: give token ids with --tokens", "--prompt")
    path = Path(source.folder) / "tokenizer.json"
    if not path.exists():
        raise ConfigError(f"there is no {path}; give token ids with --tokens", "--prompt")
    if importlib.util.find_spec("tokenizers") is None:
        missing = "the package tokenizers is not installed: pip install tokenizers, or give token ids with --tokens"
        raise ConfigError(missing, "--prompt")
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
