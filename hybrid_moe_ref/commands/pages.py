"""The command `pages`: print the page size that the KV entries and the recurrent states of a preset share."""

import argparse

from hybrid_moe_ref.cache.pages import page_layout
from hybrid_moe_ref.commands.output import show
from hybrid_moe_ref.config import preset

ITEMSIZES = {"float8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of one number of a KV cache, by dtype."""


def run(args: argparse.Namespace) -> int:
    """Print the page size that the KV entries and the recurrent states of a preset share."""
    layout = page_layout(preset(args.preset), kv_itemsize=ITEMSIZES[args.kv_dtype], tp_size=args.tp)
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
        show(answer, True)
    else:
        for name, value in answer.items():
            print(f"{name:20} {value}")
    return 0
