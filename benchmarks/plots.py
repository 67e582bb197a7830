"""Draw what the benchmarks measured: `python benchmarks/plots.py FILE.json [...]` writes SVG files beside each.

    kernels*.json       NAME_ratio.svg     times faster than torch, and than the best peer, over size, op by op
                        NAME_roofline.svg  operations a second over operations a byte, below the machine's two limits
    kernels_gpu*.json   NAME_copy.svg      share of the bandwidth of a copy, over size
    model*.json         NAME.svg           transformers' best time over ours, with the marks to pass

A file without measured rows is named and left out. Needs matplotlib (the extra `bench`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from bench_model import MARKS

try:
    import matplotlib
except ModuleNotFoundError:
    print("plots: not drawn: matplotlib is not installed (pip install matplotlib)")
    sys.exit(0)
from matplotlib import pyplot

matplotlib.use("svg")
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "plots",  # the same numbers draw the same file
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
    }
)
COLOURS = {"f32": "#1f77b4", "bf16": "#d95f02"}
OURS, OUR_TORCH = "#1f77b4", "#9ecae1"
Document = dict[str, Any]


def caption(document: Document) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if name != "python")
    isa = f", {document['instruction_set']}" if document.get("instruction_set") else ""
    return f"{document['hardware']}{isa}; {versions}; commit {document['commit'][:9]}"


def save(figure: Any, path: Path, document: Document) -> None:
    figure.text(0.01, 0.005, caption(document), fontsize=6.5, color="#555555")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    print(path)


def ratios(document: Document, path: Path) -> None:
    """Draw a panel for each op. A ratio above 1 means that ours is faster."""
    rows = [row for row in document["rows"] if "native_us" in row and row["series"] == "race"]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    columns = 4
    lines = -(-len(ops) // columns)
    figure, panels = pyplot.subplots(lines, columns, figsize=(11, 2.3 * lines + 0.9), squeeze=False)
    for panel in panels.flat[len(ops) :]:
        panel.axis("off")
    for panel, op in zip(panels.flat, ops, strict=False):
        for dtype, colour in COLOURS.items():
            for key, style in (("torch_ratio", "-o"), ("ratio", "--s")):
                points = [
                    (row["size"], row[key]) for row in rows if (row["op"], row["dtype"]) == (op, dtype) and key in row
                ]
                if points:
                    panel.plot(*zip(*points, strict=True), style, color=colour, markersize=3, linewidth=1.1)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(xscale="log", yscale="log", title=op)
        panel.set_xscale("log", base=2)
        low, high = panel.get_ylim()
        panel.set_ylim(min(low, 0.8), max(high, 4))
        if high / low < 50:
            panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}x"))
        panel.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        panel.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    handles = [matplotlib.lines.Line2D([], [], color=colour, label=dtype) for dtype, colour in COLOURS.items()]
    handles += [
        matplotlib.lines.Line2D([], [], color="gray", linestyle=style, marker=marker, markersize=3, label=text)
        for style, marker, text in (("-", "o", "torch reference / native"), ("--", "s", "best peer / native"))
    ]
    figure.legend(handles=handles, loc="upper center", ncols=4)
    figure.supxlabel("tokens or sequences of a call", y=0.03, fontsize=9)
    figure.tight_layout(rect=(0, 0.03, 1, 0.95))
    save(figure, path.with_name(f"{path.stem}_ratio.svg"), document)


def roofline(document: Document, path: Path) -> None:
    """Draw every row below this machine's limits of memory and products. Small inputs stay in caches, above the
    slope."""
    rows = [row for row in document["rows"] if "native_us" in row]
    figure, panel = pyplot.subplots(figsize=(7.5, 5.2))
    ops = list(dict.fromkeys(row["op"] for row in rows))
    markers = dict(zip(ops, [*"osD^v<>pP*Xh", "$L$"], strict=False))
    for row in rows:
        panel.plot(
            row["work"] / row["bytes"],
            row["work"] / row["native_us"] / 1e3,
            marker=markers[row["op"]],
            color=COLOURS[row["dtype"]],
            markersize=5,
            alpha=0.75,
            markeredgewidth=0,
        )
    bandwidth, rate = document["copy_bytes_per_s"], document["product_per_s"]
    low, high = (f(row["work"] / row["bytes"] for row in rows) for f in (min, max))
    xs = [low / 1.5, rate / bandwidth, max(high, rate / bandwidth) * 1.5]
    panel.plot(xs, [min(x * bandwidth, rate) / 1e9 for x in xs], color="black", linewidth=1)
    panel.annotate(
        f"products in float32, {rate / 1e9:.0f} GFLOP/s", (xs[2], rate / 1e9), ha="right", va="bottom", fontsize=8
    )
    at = (xs[0], xs[0] * bandwidth / 1e9)
    panel.annotate(f"copy, {bandwidth / 1e9:.1f} GB/s", at, (0, 14), textcoords="offset points", fontsize=8)
    panel.set(xscale="log", yscale="log", xlabel="operations a byte touched", ylabel="GFLOP/s")
    line = matplotlib.lines.Line2D
    handles = [line([], [], color=colour, marker="o", linestyle="", label=dtype) for dtype, colour in COLOURS.items()]
    handles += [line([], [], color="gray", marker=markers[op], linestyle="", label=op, markersize=5) for op in ops]
    panel.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    save(figure, path.with_name(f"{path.stem}_roofline.svg"), document)


def of_copy(document: Document, path: Path) -> None:
    """Draw the share of a copy's bandwidth that each op reaches on a GPU, for our kernel and the peer."""
    rows = [
        row for row in document["rows"] if "of_copy" in row and not ("tokens" in row and row.get("sequences", 1) > 1)
    ]
    ops = [op for op, count in Counter(row["op"] for row in rows).items() if count > 1]  # a single point makes no curve
    figure, panels = pyplot.subplots(-(-len(ops) // 3), 3, figsize=(10, 2.4 * -(-len(ops) // 3) + 0.6), squeeze=False)
    for panel in panels.flat[len(ops) :]:
        panel.axis("off")
    for panel, op in zip(panels.flat, ops, strict=False):
        key = next(key for key in ("tokens", "rows", "sequences") if all(key in row for row in rows if row["op"] == op))
        mine = sorted((row for row in rows if row["op"] == op), key=lambda row: row[key])
        sizes = [row[key] for row in mine]
        panel.plot(sizes, [100 * row["of_copy"] for row in mine], "-o", color=OURS, markersize=3, label="triton")
        peers = [100 * row["of_copy"] / row["ratio"] if "ratio" in row else float("nan") for row in mine]
        panel.plot(sizes, peers, "--s", color="gray", markersize=3, label=mine[0]["peer"])
        panel.set(title=op, xlabel=key, ylabel="% of copy", ylim=(0, 115))
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
        panel.legend(fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    save(figure, path.with_name(f"{path.stem}_copy.svg"), document)


def model(document: Document, path: Path) -> None:
    """Draw bars of the ratios, with a tick at each mark."""
    bars = [
        (row["dtype"], row["batch"], phase, kernels)
        for row in document["rows"]
        for phase in ("prefill", "decode")
        for kernels in ("torch", "native")
        if f"{kernels}_{phase}_ratio" in row
    ]
    values = {(row["dtype"], row["batch"]): row for row in document["rows"]}
    groups = list(dict.fromkeys(bar[:3] for bar in bars))
    figure, panel = pyplot.subplots(figsize=(8.5, 3.8))
    for place, (dtype, batch, phase) in enumerate(groups):
        for shift, kernels, colour in ((-0.2, "torch", OUR_TORCH), (0.2, "native", OURS)):
            if (dtype, batch, phase, kernels) not in bars:
                continue
            ratio = values[dtype, batch][f"{kernels}_{phase}_ratio"]
            panel.bar(place + shift, ratio, 0.38, color=colour)
            at, colour = (place + shift, 0), "white" if kernels == "native" else "black"
            panel.annotate(
                f"{ratio:.1f}", at, (0, 3), textcoords="offset points", ha="center", fontsize=8, color=colour
            )
            wanted = MARKS.get((dtype, kernels, batch), {}).get(f"{phase}_ratio")
            if wanted:
                panel.plot([place + shift - 0.19, place + shift + 0.19], [wanted, wanted], color="#d62728", linewidth=2)
    panel.axhline(1, color="black", linewidth=0.8)
    labels = [f"{phase}\nbatch {batch}\n{dtype}" for dtype, batch, phase in groups]
    panel.set_xticks(range(len(groups)), labels, fontsize=8)
    panel.grid(axis="x", visible=False)
    panel.set_ylabel("best of transformers / ours")
    patch, line = matplotlib.patches.Patch, matplotlib.lines.Line2D
    panel.legend(
        handles=[
            patch(color=OUR_TORCH, label="ours, torch"),
            patch(color=OURS, label="ours, native"),
            line([], [], color="#d62728", linewidth=2, label="mark to pass"),
        ],
        loc="upper left",
        bbox_to_anchor=(0, 1.12),
        ncols=3,
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    save(figure, path.with_suffix(".svg"), document)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    for path in parser.parse_args().files:
        document = json.loads(path.read_text())
        rows = document.get("rows", [])
        if any("native_us" in row for row in rows):
            ratios(document, path)
            roofline(document, path)
        elif any("of_copy" in row for row in rows):
            of_copy(document, path)
        elif any("times" in row for row in rows):
            model(document, path)
        else:
            print(f"plots: {path}: nothing measured that is drawn")
    return 0


if __name__ == "__main__":
    sys.exit(main())
