"""The README's figure and table, made from a saved run.

`python -m bench.figure [RUN.json [FIGURE.png]]` draws the latest run into docs/speed.png, unless
told otherwise, and prints the table in Markdown.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from fastattn.bench.providers import FASTATTN, NAIVE
from fastattn.bench.saved import Row, Run
from fastattn.bench.table import markdown

from . import LATEST

FIGURE = Path(__file__).parents[1] / "docs" / "speed.png"

# fastattn stands out by size as well, for those who see no colours; so do the others by shape.
MARKS = {
    FASTATTN.name: ("o", "#c8324a", 130),
    "NumPy": ("X", "#8a8f99", 55),
    "PyTorch": ("s", "#e39b1d", 48),
    "OpenVINO": ("D", "#4f9d69", 44),
    "onnxruntime": ("^", "#2f7ba8", 60),
    "JAX": ("v", "#8d78b5", 60),
}
INK, QUIET, RULE = "#22252b", "#6a6f7a", "#e4e6ea"


def draw(run: Run) -> Figure:
    """Draw who reaches which share of the peak, and below it what small calls take."""
    rows = list(run.speeds.values())
    # T14 is a check of breadth: in the table, but one figure cannot hold everything.
    large = [row for row in rows if row["peak_share"] and row["target"] != "T14"]
    small = [row for row in rows if row["is_small"]]
    heights = [max(len(large), 1), max(len(small), 1)]
    figure = Figure(
        figsize=(11, 2.6 + 0.36 * sum(heights)), facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=heights)

    _rows(above, large, [row["peak_share"] for row in large])
    above.set_xlim(0, 1.02)
    above.axvline(1, color=INK, linewidth=1.2)
    above.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    above.set_xlabel("share of the machine's multiply-add peak, measured in the same run")

    seconds = [{name: row["seconds"].get(name) for name in MARKS} for row in small]
    times = [{name: t * 1e6 for name, t in each.items() if t is not None} for each in seconds]
    _rows(below, small, times)
    below.set_xscale("log")
    below.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    below.xaxis.set_major_formatter("{x:g}")
    below.xaxis.set_minor_locator(NullLocator())
    below.set_xlabel("small calls: microseconds for one, further left is better")
    if not small:
        below.remove()

    handles, labels = above.get_legend_handles_labels()
    legend = figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=len(labels),
        frameon=False,
        labelcolor=INK,
        title=f"Attention on {run.machine['cpu']}, {run.machine['threads']} threads",
        title_fontproperties={"size": 13, "weight": "bold"},
        alignment="left",
    )
    legend.get_title().set_color(INK)
    _beside(above, "fastattn's speed over", -0.9)
    return figure


def _rows(axes: Axes, rows: list[Row], values: list[dict[str, float]]) -> None:
    """Draw a line for each case, a mark for everybody on it, and the ratios at its end."""
    for name, (marker, colour, size) in MARKS.items():
        points = [(each[name], y) for y, each in enumerate(values) if name in each]
        if points:
            xs, ys = zip(*points, strict=True)
            axes.scatter(
                xs,
                ys,
                s=size,
                marker=marker,
                color=colour,
                edgecolors="white",
                linewidths=0.8,
                label=name,
                zorder=3 if name == FASTATTN.name else 2,
            )
    for y, row in enumerate(rows):
        axes.axhline(y, color=RULE, linewidth=1, zorder=0)
        best = row["best_peer"]
        ratios = f"{row['speed_over'][best]:.1f}x {best}"
        if best != NAIVE.name:
            ratios += f", {row['speed_over'][NAIVE.name]:.1f}x {NAIVE.name}"
        _beside(axes, ratios, y)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.tick_params(axis="both", length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=RULE)
    axes.xaxis.label.set(color=QUIET)


def _beside(axes: Axes, text: str, y: float) -> None:
    place: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"),
        "annotation_clip": False,
        "va": "center",
    }
    axes.annotate(text, (1.01, y), color=QUIET, fontsize=9, **place)


def main() -> None:
    """Write the figure, print the table."""
    source, target = (*map(Path, sys.argv[1:]), *(LATEST, FIGURE)[len(sys.argv) - 1 :])
    run = Run.load(source)
    draw(run).savefig(target, dpi=150)
    print(markdown(run.results))


if __name__ == "__main__":
    main()
