"""A page about speed and memory: one HTML file that needs no other, and its pictures as PNGs.

`python -m bench.report [RUN.json [FOLDER]]` writes about the latest run, and about those in
bench/history, into bench/results/report unless told otherwise. Each picture exists twice, for light
and for dark surroundings; the page shows what the reader's system asks for.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from string import Template
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from fastattn.bench import table
from fastattn.bench.cases import CASES
from fastattn.bench.providers import FASTATTN, NAIVE
from fastattn.bench.run import quick
from fastattn.bench.saved import Row, Run, described

from . import LATEST
from .figure import DARK, LIGHT, MARKS, Theme, asked_for
from .figure import draw as draw_peers

FOLDER = LATEST.parent / "report"

DTYPES = {
    "float32": ("o", "#d0455c"),
    "float64": ("s", "#3b8bc4"),
    "float16": ("^", "#4f9d69"),
    "bfloat16": ("D", "#e39b1d"),
    "int8": ("v", "#8d78b5"),
}

# What is drawn by length: the shape, but for the length.
BATCH, HEADS, HEAD_DIM = 1, 8, 64

WIDTH = 7.6  # inches; 100 dots each on a screen, two for each of its pixels


# Of a line in the history: share, number of the run, name and colour.
_End = tuple[float, int, str, str]


class Picture(NamedTuple):
    """A figure that can be drawn in either theme, and what the page says about it."""

    name: str
    title: str
    text: str
    draw: Callable[[Theme], Figure]


def pictures(run: Run, past: Sequence[Run]) -> list[Picture]:
    """Return the pictures for which a run, and those before it, have the figures."""
    found = []
    if any(len(lengths) > 1 for lengths in by_length(run).values()):
        found.append(
            Picture(
                "speedup",
                "Speed over NumPy, by length",
                f"How many times as fast as the textbook in NumPy, for {HEADS} heads of "
                f"{HEAD_DIM} features and every key visible. The textbook writes and reads a "
                "matrix of scores, which leaves the caches when texts get longer.",
                lambda theme: draw_speedup(run, theme),
            )
        )
    if rates(run) and limits(run):
        found.append(
            Picture(
                "roofline",
                "Achieved, and what the machine allows",
                "Each mark is a case. Arithmetic cannot be faster than the multiply-add peak, "
                "reading not faster than memory: the lines are both, measured in the same run. To "
                "the left, where one query reads many keys, memory decides; cases whose keys fit "
                "the caches may lie above its line.",
                lambda theme: draw_roofline(run, theme),
            )
        )
    found.append(
        Picture(
            "peers",
            "Against the others",
            "All in one process, in turns, with the same threads, each checked first.",
            lambda theme: draw_peers(run, theme),
        )
    )
    if past:
        found.append(
            Picture(
                "history",
                "From commit to commit",
                "The share of the limit that the first case of each group reaches: shares compare "
                "between hours, times do not.",
                lambda theme: draw_history([*past, run], theme),
            )
        )
    if growth(run) is not None:
        found.append(
            Picture(
                "memory",
                "Memory does not grow with the square of the length",
                "What one call of one head takes beyond its inputs and its output.",
                lambda theme: draw_memory(run, theme),
            )
        )
    return found


# ---------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------


def by_length(run: Run) -> dict[str, dict[int, float]]:
    """Return the speed over NumPy for each dtype and length."""
    found: dict[str, dict[int, float]] = {}
    for case in CASES:
        row = run.speeds.get(case.name)
        batch, heads, *_, head_dim = (*case.shape, 0) if len(case.shape) < 4 else case.shape
        is_plain = case.plain is None or case.plain.dtype != case.dtype
        if row is None or not is_plain or case.shape != case.key_shape:
            continue
        if (batch, heads, head_dim) == (BATCH, HEADS, HEAD_DIM):
            lengths = found.setdefault(case.dtype, {})
            lengths[case.shape[-2]] = row["speed_over"][NAIVE.name]
    return {dtype: dict(sorted(lengths.items())) for dtype, lengths in found.items()}


def draw_speedup(run: Run, theme: Theme) -> Figure:
    """Draw a line for each dtype."""
    figure, axes = _figure(theme, 4.2)
    lines = by_length(run)
    for dtype, lengths in lines.items():
        marker, colour = DTYPES[dtype]
        axes.plot(
            list(lengths), list(lengths.values()), marker=marker, color=colour, label=dtype, lw=2
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sorted({length for lengths in lines.values() for length in lengths}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.axhline(1, color=theme.ink, lw=1.2)
    axes.annotate(
        "NumPy",
        (1, 1),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color=theme.ink,
    )
    axes.set_xlabel("queries and keys")
    axes.set_ylabel("speed over NumPy")
    _legend(axes, theme)
    return figure


def rates(run: Run) -> list[tuple[str, float, float]]:
    """Return (dtype, flops for each byte, flops in a second) of all cases of more than a few."""
    return [
        (row["dtype"], row["flops"] / row["bytes"], row["flops"] / row["seconds"][FASTATTN.name])
        for row in run.speeds.values()
        if "bytes" in row and not row["is_small"]
    ]


def draw_roofline(run: Run, theme: Theme) -> Figure:
    """Draw the limits as lines, and every case as a mark below them."""
    figure, axes = _figure(theme, 4.8)
    points = rates(run)
    for dtype, (marker, colour) in DTYPES.items():
        mine = [(x, rate / 1e9) for each, x, rate in points if each == dtype]
        if mine:
            intensities, gigaflops = zip(*mine, strict=True)
            axes.scatter(
                intensities,
                gigaflops,
                marker=marker,
                color=colour,
                edgecolors=theme.paper,
                s=52,
                label=dtype,
                zorder=3,
            )
    most = limits(run)
    bandwidth = most["read_bandwidth"]
    ridge = most["fma_peak float32"] / bandwidth
    # Both limits are to be seen, whichever cases there are.
    shown = [ridge, *(intensity for _, intensity, _ in points)]
    low, high = min(shown) / 4, max(shown) * 20  # to the right there is room for the numbers
    for dtype, style in (("float32", "-"), ("float64", "--")):
        peak = most[f"fma_peak {dtype}"]
        axes.plot(
            [low, peak / bandwidth, high],
            [bandwidth * low, peak, peak],
            style,
            color=theme.ink,
            lw=1.4,
            zorder=2,
        )
        axes.annotate(
            f"{peak:.0f} GFLOP/s, {dtype}",
            (high, peak),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=theme.ink,
            fontsize=9,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    at = math.sqrt(low * ridge)
    axes.annotate(
        f"{bandwidth:.0f} GB/s read",
        (at, bandwidth * at),
        xytext=(-8, 8),
        textcoords="offset points",
        ha="right",
        color=theme.ink,
        fontsize=9,
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("arithmetic intensity: flops for each byte of inputs and output")
    axes.set_ylabel("GFLOP/s")
    _legend(axes, theme, loc="lower right")
    return figure


def limits(run: Run) -> dict[str, float]:
    """Return the measured limits by name, in GFLOP/s or GB/s; none where they were left out."""
    figures = [each for row in run.results for each in row.get("figures", ()) if not row["target"]]
    return {name: float(rate) for name, rate, *_ in figures}


def draw_history(runs: Sequence[Run], theme: Theme) -> Figure:
    """Draw the shares of their limits that cases reached, run by run, for each machine."""
    machines: dict[str, list[Run]] = {}
    for run in runs:
        machines.setdefault(described(run.machine), []).append(run)
    shown = [case.name for case in quick(CASES) if case.target != "T14" and not case.is_small]
    figure = _canvas(theme, 3.4 * len(machines))
    panels = figure.subplots(len(machines), 1, squeeze=False)[:, 0]
    for axes, (machine, its) in zip(panels, machines.items(), strict=True):
        _dress(axes, theme)
        ends = []
        for number, case in enumerate(shown):
            shares = {
                n: _share(run.speeds[case]) for n, run in enumerate(its) if case in run.speeds
            }
            if shares:
                colour = f"C{number % 10}"
                axes.plot(list(shares), list(shares.values()), "o-", lw=2, color=colour)
                last = max(shares)
                ends.append((shares[last], last, case, colour))
        for (share, last, case, colour), y in _apart(ends, 0.075):
            axes.annotate(
                f"{share:.0%} {case}",
                (last, share),
                xytext=(len(its) - 0.8, y),
                va="center",
                fontsize=8.5,
                color=theme.ink,
                # From the left end of the name: lines to its middle would cross other names.
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "relpos": (0, 0.5)},
            )
        axes.set_ylim(0, 1.05)  # what is read from a cache may be above 1
        # Half of the width is for the names.
        axes.set_xlim(-0.2, 2 * len(its) - 0.6)
        axes.yaxis.set_major_formatter("{x:.0%}")
        names = [f"{(run.commit or 'unknown')[:7]}\n{run.date[:10]}" for run in its]
        axes.set_xticks(range(len(its)), names)
        axes.set_title(machine, loc="left", fontsize=10, color=theme.ink)
        axes.set_ylabel("share of the limit")
    return figure


def _share(row: Row) -> float:
    """Return the share of what limits a case: reading, or else multiply-adds."""
    return float(row.get("reading_share") or row["peak_share"][FASTATTN.name])


def _apart(ends: Iterable[_End], gap: float) -> list[tuple[_End, float]]:
    """Return each end with a height for its label: near its own, apart from others, below 1."""
    ordered = sorted(ends)
    heights: list[float] = []
    for share, *_ in ordered:
        heights.append(max(share, heights[-1] + gap if heights else 0.0))
    above = 1.0 + gap / 2
    for n in reversed(range(len(heights))):
        heights[n] = above = min(heights[n], above - gap)
    return list(zip(ordered, heights, strict=True))


def growth(run: Run) -> Row | None:
    """Return the result that has memory by length, None where it was not measured."""
    return next((row for row in run.results if "growth" in row), None)


def draw_memory(run: Run, theme: Theme) -> Figure:
    """Draw the growth by length, of fastattn and of the textbook."""
    figure, axes = _figure(theme, 4.0)
    row = growth(run)
    assert row is not None
    for name, sizes in row["growth"].items():
        marker, colour, _ = MARKS[name]
        axes.plot(row["lengths"], sizes, marker=marker, color=colour, label=name, lw=2)
        axes.annotate(
            _size(sizes[-1]),
            (row["lengths"][-1], sizes[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=theme.ink,
            annotation_clip=False,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=16)  # 64 KiB, 1 MiB, 16 MiB, ...
    axes.set_xticks(row["lengths"])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(lambda y, _: _size(y))
    axes.set_xlabel("queries and keys")
    _legend(axes, theme)
    return figure


def _size(count: float) -> str:
    """Write a number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def _canvas(theme: Theme, height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), facecolor=theme.paper, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure(theme: Theme, height: float) -> tuple[Figure, Axes]:
    figure = _canvas(theme, height)
    axes = figure.subplots()
    _dress(axes, theme)
    return figure, axes


def _dress(axes: Axes, theme: Theme) -> None:
    """Give axes the colours of a theme, and nothing that carries no meaning."""
    axes.set_facecolor(theme.paper)
    axes.tick_params(which="both", length=0, labelcolor=theme.quiet)
    axes.grid(color=theme.rule, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.xaxis.label.set_color(theme.quiet)
    axes.yaxis.label.set_color(theme.quiet)


def _legend(axes: Axes, theme: Theme, loc: str = "upper left") -> None:
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(loc=loc, frameon=False, labelcolor=theme.ink)


# ---------------------------------------------------------------------------
# Page
# ---------------------------------------------------------------------------

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>fastattn: speed and memory</title>
<style>
:root { --paper: $light_paper; --ink: $light_ink; --quiet: $light_quiet; --rule: $light_rule }
@media (prefers-color-scheme: dark) {
  :root { --paper: $dark_paper; --ink: $dark_ink; --quiet: $dark_quiet; --rule: $dark_rule }
}
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; margin: 0 }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.2rem }
p { max-width: 44rem; margin: 0.3rem 0 0.8rem }
.quiet { color: var(--quiet) }
/* What is too wide for a narrow screen moves under the finger; the page does not. */
.wide { overflow-x: auto }
.wide img { display: block; width: 100%; min-width: 34rem; max-width: $width }
.wide img.large { min-width: 52rem; max-width: none }
table { border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.3rem 0.5rem; border-bottom: 1px solid var(--rule); text-align: right;
  white-space: nowrap }
th:first-child, td:first-child { text-align: left }
th { color: var(--quiet); font-weight: 600 }
</style>
</head>
<body>
<h1>fastattn: speed and memory</h1>
<p class="quiet">$about</p>
$pictures
<h2>Every case</h2>
<p>The median time of a call, the share of the multiply-add peak, and how many times as fast as
the others fastattn was in the same rounds. Pale: not to be quoted, because something else was using
the cores.</p>
<div class="wide"><table>$rows</table></div>
</body>
</html>
""")


def page(run: Run, drawn: Iterable[tuple[Picture, dict[str, bytes]]]) -> str:
    """Return the page, with every picture inside."""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    about = (
        f"{described(run.machine)}, {run.date[:10]}, commit {run.commit or 'unknown'}. {versions}."
    )
    colours = {
        f"{theme.name}_{part}": getattr(theme, part)
        for theme in (LIGHT, DARK)
        for part in ("paper", "ink", "quiet", "rule")
    }
    return _PAGE.substitute(
        colours,
        width=f"{WIDTH * 100:g}px",
        about=html.escape(about),
        pictures="\n".join(_section(picture, images) for picture, images in drawn),
        rows="\n".join(_table_rows(run)),
    )


def _section(picture: Picture, images: dict[str, bytes]) -> str:
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(images[theme.name]).decode()}"
        for theme in (LIGHT, DARK)
    )
    size = ' class="large"' if picture.name == "peers" else ""
    return f"""\
<h2>{html.escape(picture.title)}</h2>
<p>{html.escape(picture.text)}</p>
<div class="wide"><picture>
<source media="(prefers-color-scheme: dark)" srcset="{dark}">
<img{size} alt="{html.escape(picture.title)}" src="{light}">
</picture></div>"""


def _table_rows(run: Run) -> Iterator[str]:
    disturbed = table.disturbed(run.speeds.values())
    for number, line in enumerate(table.cells(run.results)):
        tag = "td" if number else "th"
        start = '<tr class="quiet">' if line[0] in disturbed else "<tr>"
        yield start + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"


def write(run: Run, past: Sequence[Run], folder: Path) -> Path:
    """Write the page and its pictures; return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for picture in pictures(run, past):
        images = {}
        for theme in (LIGHT, DARK):
            memory = BytesIO()
            picture.draw(theme).savefig(memory, format="png", dpi=200, bbox_inches="tight")
            images[theme.name] = memory.getvalue()
            suffix = "" if theme is LIGHT else f"-{theme.name}"
            (folder / f"{picture.name}{suffix}.png").write_bytes(images[theme.name])
        drawn.append((picture, images))
    path = folder / "index.html"
    path.write_text(page(run, drawn), "utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page about a run."""
    about = "Write a page about a run: index.html, which needs no other file, and its pictures."
    run, kept, folder = asked_for(arguments, about, ("FOLDER", FOLDER))
    print(write(run, [each for each in kept if each.date < run.date], folder))


if __name__ == "__main__":
    main()
