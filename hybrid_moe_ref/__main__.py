"""The command line of the reference model: python -m hybrid_moe_ref {params,pages,generate,check,bench}

The exit status:

    0    success
    1    `check` found a difference or a logit that is not finite, or could not compare
    2    arguments, files or sizes cannot be used; standard error has one line for each problem
    125  this program failed, or a package is not installed
    130  the user interrupted the program

With HMR_DEBUG=1, the program prints the traceback of an error.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybrid_moe_ref.config import DTYPES, ENGINE_MODES, InputError
from hybrid_moe_ref.engine.server_config import CHECKS

KERNELS = ("auto", "torch", "native", "triton")
LAYOUTS = ("single", "dp8ep8", "tp8")
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64", "fp8": "float8"}
KV_DTYPES = ("float8", "bfloat16", "float16", "float32")
INTERNAL_ERROR = 125
MODEL_PACKAGES = ("torch", "numpy", "safetensors")  # the extra "model" in pyproject.toml


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a usage error in one line, with exit status 2."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}\n")


def number(least: int, most: int = 2**62) -> Callable[[str], int]:
    """Return an argparse type for an option that takes whole numbers from `least` to `most`."""

    def whole_number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is {f'less than {least}' if value < least else f'over {most}'}")
        return value

    return whole_number


positive = number(1)


def layout(text: str) -> str:
    if text not in LAYOUTS:
        other = "for other numbers of ranks give --dp N and --tp N"
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(LAYOUTS)}; {other})")
    return text


def token_ids(text: str) -> list[int]:
    try:
        ids = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,2,3") from None
    if max(map(abs, ids), default=0) >= 2**63:
        raise argparse.ArgumentTypeError(f"{max(ids, key=abs)} is not a token id")
    if not ids:
        raise argparse.ArgumentTypeError("the list is empty; give at least one token id")
    return ids


def dtype_of(*names: str) -> Callable[[str], str]:
    """Return an argparse type for an option whose value is one of the dtypes `names`.

    The user can give the long or the short name of a dtype ("bfloat16", "bf16"). The type converts it to the long name.
    """
    shorts = {long: short for short, long in SHORT_DTYPES.items()}

    def dtype(text: str) -> str:
        name = SHORT_DTYPES.get(text, text)
        if name not in names:
            choices = ", ".join(f"{each} ({shorts[each]})" for each in names)
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {choices})")
        return name

    return dtype


def parser() -> Parser:
    top = Parser(prog="python -m hybrid_moe_ref", description="Reference hybrid MoE models.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    params = commands.add_parser("params", help="parameter totals of a preset")
    params.add_argument("preset", metavar="PRESET")

    pages = commands.add_parser("pages", help="the page size that KV entries and recurrent states of a preset share")
    pages.add_argument("preset", metavar="PRESET")
    pages.add_argument("--tp", type=positive, default=1, metavar="N", help="tensor-parallel ranks")
    pages.add_argument("--kv-dtype", type=dtype_of(*KV_DTYPES), default="bfloat16", metavar="DTYPE")

    generate = commands.add_parser("generate", help="continue a prompt greedily")
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt",
        metavar="TEXT",
        help=(
            "the prompt as text, without a chat template; needs the checkpoint's tokenizer.json and the package "
            "tokenizers"
        ),
    )
    prompt.add_argument("--tokens", type=token_ids, metavar="IDS", help="token ids such as 1,2,3")
    generate.add_argument("--max-new-tokens", type=positive, default=32, metavar="N", help="default: 32")
    generate.add_argument("--ignore-eos", action="store_true", help="continue after a token that ends the text")
    generate.add_argument(
        "--prefill-chunk", type=positive, metavar="N", help="most prompt tokens in a step (default: all)"
    )
    generate.add_argument(
        "--drafts",
        type=number(0),
        default=0,
        metavar="N",
        help="number of tokens that the MTP layer proposes in each step (default: 0)",
    )
    generate.add_argument(
        "--layout",
        type=layout,
        metavar="{" + ",".join(LAYOUTS) + "}",
        help="a single process (default), or 8 ranks on this machine",
    )
    generate.add_argument(
        "--dp", type=positive, metavar="N", help="number of dp ranks; only the first one serves the prompt"
    )
    generate.add_argument(
        "--tp",
        type=positive,
        metavar="N",
        help="number of tp ranks in each dp rank; they split the heads and features of the layers",
    )
    generate.add_argument(
        "--ep",
        action=argparse.BooleanOptionalAction,
        help="distribute whole experts over all ranks (default: only if --dp is more than 1)",
    )
    generate.add_argument(
        "--checks", choices=CHECKS, help="how ranks compare their steps (default: agree); only with several ranks"
    )
    generate.add_argument(
        "--mode",
        choices=ENGINE_MODES,
        help="run steps eagerly (default), or replay captured graphs of a few sizes; only with several ranks",
    )
    generate.add_argument(
        "--allow-unsafe", action="store_true", help="start even if the ranks could hang in this layout"
    )

    check = commands.add_parser(
        "check", help="load a checkpoint folder, and compare its logits with those of transformers"
    )
    check.add_argument("--load-only", action="store_true", help="load the checkpoint and run it, but do not compare")

    bench = commands.add_parser("bench", help="speed and peak memory of prefill and decode")
    bench.add_argument("--prompt-tokens", type=positive, default=512, metavar="N")
    bench.add_argument("--new-tokens", type=positive, default=32, metavar="N")
    bench.add_argument("--batch", type=number(1, 65536), default=1, metavar="B")
    bench.add_argument("--threads", type=number(1, 1024), metavar="N", help="CPU threads (default: torch's)")

    for command in (generate, check, bench):
        what = "DIR" if command is check else "MODEL"
        command.add_argument(
            "model", metavar=what, help="checkpoint folder" + (", or preset" if what == "MODEL" else "")
        )
        command.add_argument(
            "--dtype", type=dtype_of(*DTYPES), metavar="DTYPE", help="default: the checkpoint's, or float32"
        )
        command.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
        command.add_argument(
            "--kernels",
            choices=KERNELS,
            help="implementation of the layers (default: auto); native is compiled on this machine first",
        )
        if command is not check:
            command.add_argument("--seed", type=int, default=0, help="seed of a preset's random weights (default: 0)")
    for command in (params, pages, check, bench):
        command.add_argument("--json", action="store_true", help="print JSON")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        status: int = importlib.import_module(f"hybrid_moe_ref.commands.{args.command}").run(args)
        return status
    except KeyboardInterrupt:
        return 130
    except (InputError, OSError, MemoryError) as error:
        return _fail(error, str(error) or type(error).__name__, 2)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in MODEL_PACKAGES:
            return _fail(
                error, f"{error.name} is not installed: pip install {' '.join(MODEL_PACKAGES)}", INTERNAL_ERROR
            )
        if text := _shortage(error):
            return _fail(error, text, 2)
        at = traceback.extract_tb(error.__traceback__)[-1]
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        text = (
            f"internal error at {'/'.join(Path(at.filename).parts[-2:])}:{at.lineno}: {what}; "
            "this is a fault of hybrid_moe_ref, not of your input; set HMR_DEBUG=1 for the traceback"
        )
        return _fail(error, text, INTERNAL_ERROR)


def _shortage(error: Exception) -> str:
    from hybrid_moe_ref.memory import shortage

    return shortage(error)


def _fail(error: BaseException, text: str, status: int) -> int:
    if os.environ.get("HMR_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    print(f"hybrid_moe_ref: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
