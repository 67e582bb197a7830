"""python -m hybrid_moe_ref {params,pages,generate,check,bench}

Exit status: 0; 1 when `check` finds a difference; 2 with one line on standard error when the arguments or files make
no sense; 130 when interrupted.
"""

import argparse
import sys
from typing import Any

from hybrid_moe_ref.config import DTYPES, ENGINE_MODES, ConfigError
from hybrid_moe_ref.engine.server_config import CHECKS

KERNELS = ("auto", "torch", "native", "triton")
LAYOUTS = ("single", "dp8ep8", "tp8")


class Parser(argparse.ArgumentParser):
    """Usage errors in one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,2,3") from None


def parser() -> Parser:
    top = Parser(prog="python -m hybrid_moe_ref", description="Reference hybrid MoE models.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    params = commands.add_parser("params", help="parameter totals of a preset")
    params.add_argument("preset", metavar="PRESET")

    pages = commands.add_parser("pages", help="the unified page of KV entries and recurrent states of a preset")
    pages.add_argument("preset", metavar="PRESET")
    pages.add_argument("--tp", type=positive, default=1, metavar="N", help="tensor-parallel ranks")
    pages.add_argument("--kv-dtype", choices=("fp8", "bf16", "fp16", "fp32"), default="bf16")

    generate = commands.add_parser("generate", help="continue a prompt greedily")
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="needs a tokenizer.json in the checkpoint folder")
    prompt.add_argument("--tokens", type=token_ids, metavar="IDS", help="token ids such as 1,2,3")
    generate.add_argument("--max-new-tokens", type=positive, default=32, metavar="N")
    generate.add_argument("--prefill-chunk", type=positive, metavar="N", help="prompt tokens per step (default: all)")
    generate.add_argument("--drafts", type=int, default=0, metavar="N", help="tokens that the MTP layer guesses ahead")
    generate.add_argument("--layout", choices=LAYOUTS, default="single")
    generate.add_argument(
        "--checks", choices=CHECKS, help="how the ranks of a layout are kept in step (default: agree)"
    )
    generate.add_argument("--mode", choices=ENGINE_MODES, help="of the steps of a layout (default: eager)")
    generate.add_argument("--allow-unsafe", action="store_true", help="start a layout whose ranks could hang")

    check = commands.add_parser("check", help="load a checkpoint folder, and compare with transformers if installed")

    bench = commands.add_parser("bench", help="speed and peak memory of prefill and decode")
    bench.add_argument("--prompt-tokens", type=positive, default=512, metavar="N")
    bench.add_argument("--new-tokens", type=positive, default=32, metavar="N")
    bench.add_argument("--batch", type=positive, default=1, metavar="B")
    bench.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")

    for command in (generate, check, bench):
        what = "DIR" if command is check else "MODEL"
        command.add_argument(
            "model", metavar=what, help="checkpoint folder" + (", or preset" if what == "MODEL" else "")
        )
        command.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's, or float32")
        command.add_argument("--device", default="cpu")
        command.add_argument(
            "--kernels", choices=KERNELS, help="what computes the layers; native is built here first (default: auto)"
        )
        if command is not check:
            command.add_argument("--seed", type=int, default=0, help="of a preset's random weights")
    for command in (params, pages, check, bench):
        command.add_argument("--json", action="store_true", help="print JSON")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        from hybrid_moe_ref import commands

        status: int = getattr(commands, args.command)(args)
        return status
    except (ConfigError, ValueError, OSError, MemoryError) as error:
        text = str(error) or type(error).__name__
        print(f"hybrid_moe_ref: {text}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from hybrid_moe_ref.memory import shortage

        if not (text := shortage(error)):
            raise
        print(f"hybrid_moe_ref: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
