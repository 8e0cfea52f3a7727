"""The README's figure and table, made from a saved run.

`python -m bench.figure [RUN.json [FIGURE.png]]` draws the latest run into docs/speed.png, unless
told otherwise, and prints the table in Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from fastattn.bench.providers import FASTATTN, NAIVE
from fastattn.bench.saved import Row, Run, history
from fastattn.bench.table import disturbed, markdown

from . import HISTORY, LATEST

_ROOT = Path(__file__).parents[1]

FIGURE = _ROOT / "docs" / "speed.png"

# fastattn stands out by size as well, for those who see no colours; so do the others by shape.
MARKS = {
    FASTATTN.name: ("o", "#c8324a", 130),
    "NumPy": ("X", "#8a8f99", 55),
    "PyTorch": ("s", "#e39b1d", 48),
    "OpenVINO": ("D", "#4f9d69", 44),
    "onnxruntime": ("^", "#2f7ba8", 60),
    "JAX": ("v", "#8d78b5", 60),
}


class Theme(NamedTuple):
    """The colours around the marks, for light and for dark surroundings."""

    name: str
    paper: str
    ink: str
    quiet: str
    rule: str


LIGHT = Theme("light", "#ffffff", "#22252b", "#6a6f7a", "#e4e6ea")
DARK = Theme("dark", "#16181d", "#e8eaed", "#a2a8b3", "#343943")


# What a visitor sees first: each type, causal or not, decoding, small calls. Variants and narrower
# storage are in the table, and on the page of `report.py`.
FIRST = ("T1", "T2", "T3", "T4", "T5", "T8", "T10")


def chosen(run: Run) -> list[Row]:
    """Return the rows of the README's figure: of those cases that had the cores alone, if any."""
    noisy = disturbed(run.speeds.values())
    quiet = [row for name, row in run.speeds.items() if name not in noisy]
    return [row for row in quiet if row["target"] in FIRST] or list(run.speeds.values())


def draw(run: Run, theme: Theme = LIGHT, rows: list[Row] | None = None) -> Figure:
    """Draw who reaches which share of what limits them, and below it what small calls take.

    `rows` are those of the run to draw, by default all but the many of T14, which are for breadth.
    """
    if rows is None:
        every_row = list(run.speeds.values())
        rows = [row for row in every_row if row["target"] != "T14"] or every_row
    small = [row for row in rows if row["is_small"]]
    reading = [row for row in rows if row.get("reading_share")]
    large = [row for row in rows if row["peak_share"] and row not in reading]
    panels = [each for each in (large, reading, small) if each]
    heights = [len(each) for each in panels]
    figure = Figure(
        figsize=(11, 1.6 + 0.36 * sum(heights) + 0.5 * len(panels)),
        facecolor=theme.paper,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    every = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, panel in zip(every, panels, strict=True):
        if panel is large:
            shares = [row["peak_share"] for row in panel]
            _rows(axes, panel, shares, theme)
            _of_limit(axes, shares, "multiply-add peak", theme)
        elif panel is reading:
            shares = [_reading_shares(row) for row in panel]
            _rows(axes, panel, shares, theme)
            _of_limit(axes, shares, "rate of reading memory, for one query on many keys", theme)
        else:
            _rows(axes, panel, [_microseconds(row) for row in panel], theme)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("small calls: microseconds for one, further left is better")

    above = every[0]
    handles, labels = above.get_legend_handles_labels()
    legend = figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=len(labels),
        frameon=False,
        labelcolor=theme.ink,
        title=f"Attention on {run.machine['cpu']}, {run.machine['threads']} threads",
        title_fontproperties={"size": 13, "weight": "bold"},
        alignment="left",
    )
    legend.get_title().set_color(theme.ink)
    _beside(above, "fastattn's speed over", -0.9, theme)
    return figure


def _of_limit(axes: Axes, shares: list[dict[str, float]], limit: str, theme: Theme) -> None:
    # Keys that lie in the last-level cache are read faster than memory.
    largest = max(share for each in shares for share in each.values())
    axes.set_xlim(0, max(1.02, 1.03 * largest))
    axes.axvline(1, color=theme.ink, linewidth=1.2)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"share of the machine's {limit}, measured in the same run")


def _reading_shares(row: Row) -> dict[str, float]:
    share = row["reading_share"]
    return {FASTATTN.name: share} | {
        name: share / times for name, times in row["speed_over"].items()
    }


def _microseconds(row: Row) -> dict[str, float]:
    return {name: row["seconds"][name] * 1e6 for name in MARKS if name in row["seconds"]}


def _rows(axes: Axes, rows: list[Row], values: list[dict[str, float]], theme: Theme) -> None:
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
                edgecolors=theme.paper,
                linewidths=0.8,
                label=name,
                zorder=3 if name == FASTATTN.name else 2,
            )
    for y, row in enumerate(rows):
        axes.axhline(y, color=theme.rule, linewidth=1, zorder=0)
        best = row["best_peer"]
        ratios = f"{row['speed_over'][best]:.1f}x {best}"
        if best != NAIVE.name:
            ratios += f", {row['speed_over'][NAIVE.name]:.1f}x {NAIVE.name}"
        _beside(axes, ratios, y, theme)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.set_facecolor(theme.paper)
    axes.tick_params(axis="both", length=0, labelcolor=theme.ink)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=theme.rule)
    axes.xaxis.label.set(color=theme.quiet)


def _beside(axes: Axes, text: str, y: float, theme: Theme) -> None:
    place: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"),
        "annotation_clip": False,
        "va": "center",
    }
    axes.annotate(text, (1.01, y), color=theme.quiet, fontsize=9, **place)


def asked_for(
    arguments: Sequence[str] | None, description: str, target: tuple[str, Path]
) -> tuple[Run, list[Run], Path]:
    """Return the run that a command is to show, those that are kept, and where to write.

    `target` is what the command writes, and where by default. What is no run ends the program.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "run",
        nargs="?",
        type=Path,
        metavar="RUN.json",
        help=f"default: {_short(LATEST)}, or else the newest in {_short(HISTORY)}",
    )
    what, default = target
    parser.add_argument(
        "target",
        nargs="?",
        type=Path,
        default=default,
        metavar=what,
        help=f"default: {_short(default)}",
    )
    options = parser.parse_args(arguments)
    try:
        kept = history(HISTORY)
        source = options.run or (LATEST if LATEST.exists() else None)
        run = kept[-1] if source is None else Run.load(source)
        if not run.speeds:
            raise ValueError(f"{source}: must hold the speed of a case at least: got none")
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return run, kept, options.target


def _short(path: Path) -> Path:
    return path.relative_to(_ROOT)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the figure, print the table."""
    run, _, target = asked_for(arguments, "Draw the README's figure.", ("FIGURE.png", FIGURE))
    draw(run, rows=chosen(run)).savefig(target, dpi=150, bbox_inches="tight")
    print(markdown(run.results))


if __name__ == "__main__":
    main()
