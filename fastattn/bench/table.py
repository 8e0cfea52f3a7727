"""Results as text: tables for the terminal, and one in Markdown for the README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .providers import FASTATTN, NAIVE, PEERS
from .saved import Row, timed

RIVALS = (NAIVE.name, *(peer.name for peer in PEERS))

# A run is quotable where it had its cores to itself, but for what the system always does.
QUIET_CORES = 0.9


def duration(seconds: float) -> str:
    """Write a time with about three digits and its unit."""
    size, unit = (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "µs")
    value = seconds / size
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


# ---------------------------------------------------------------------------
# Terminal
# ---------------------------------------------------------------------------


def text(rows: Sequence[Row]) -> str:
    """Return all results, goals that were missed included."""
    speeds = timed(rows)
    blocks = [
        _speed_table(speeds) if speeds else [],
        _busy(speeds),
        _goals_missed(speeds),
        _left_out(speeds),
        _figures(rows),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _speed_table(rows: Iterable[Row]) -> list[str]:
    head = ["", "case", "time", "+-", "GFLOP/s", "of peak", "of reading", *RIVALS, "of plain"]
    lines = []
    for row in rows:
        own = row["seconds"][FASTATTN.name]
        star = dict.fromkeys([row["best_peer"]], "*")
        lines.append(
            [
                row["target"],
                row["case"],
                duration(own),
                _percent(row["spread"][FASTATTN.name]),
                "" if row["is_small"] else f"{row['flops'] / own / 1e9:.0f}",
                _percent(row["peak_share"].get(FASTATTN.name)),
                _percent(row.get("reading_share")),
                *(_ratio(row["speed_over"].get(each)) + star.get(each, " ") for each in RIVALS),
                _ratio(row["time_of_plain"]),
            ]
        )
    # Words to the left, numbers to the right.
    return [
        *aligned([head, *lines], f"<<{'>' * (len(head) - 2)}"),
        "Under a name: fastattn's speed as a multiple of theirs, * the fastest of them.",
    ]


def _busy(rows: Iterable[Row]) -> list[str]:
    busy = disturbed(rows)
    if not busy:
        return []
    return ["Measured while something else was using the cores, so not to be quoted", *busy]


def disturbed(rows: Iterable[Row]) -> list[str]:
    """Return the cases that were measured while something else was using the cores."""
    return [row["case"] for row in rows if row["cores"] < QUIET_CORES]


def _goals_missed(rows: Iterable[Row]) -> list[str]:
    missed = [
        [row["target"], row["case"], f"{goal['reached']:.2f} not {goal['goal']:.2f}", goal["what"]]
        for row in rows
        for goal in row["goals"]
        if not goal["met"]
    ]
    return ["Goals missed", *aligned(missed, "<<><")] if missed else []


def aligned(lines: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Return lines of cells as text, each column to its side: "<" left, ">" right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)
        ).rstrip()
        for line in lines
    ]


def _left_out(rows: Iterable[Row]) -> list[str]:
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["left_out"].items():
            cases.setdefault((name, reason), []).append(row["case"])
    lines = [(name, reason, ", ".join(where)) for (name, reason), where in cases.items()]
    return ["Not timed", *aligned(lines, "<<<")] if lines else []


def _figures(rows: Iterable[Row]) -> list[str]:
    lines = []
    for row in rows:
        for name, value, unit, goal in row.get("figures", ()):
            line = [row["target"], name, f"{value:.2f}", unit, "", ""]
            if goal is not None:
                line[4:] = [f"goal {goal:g}", "" if value <= goal else "missed"]
            lines.append(line)
    return aligned(lines, "<<><<<") if lines else []


# ---------------------------------------------------------------------------
# README
# ---------------------------------------------------------------------------


def markdown(rows: Iterable[Row]) -> str:
    """Return the README's table."""
    head, *lines = cells(rows)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])


def cells(rows: Iterable[Row]) -> list[list[str]]:
    """Return times, the shares of what limits them, and the speed over everybody, with a head."""
    speeds = timed(rows)
    reads = any(row.get("reading_share") for row in speeds)
    head = ["", "time", "of peak", *["of reading"] * reads, *(f"over {each}" for each in RIVALS)]
    return [head] + [
        [
            row["case"],
            duration(row["seconds"][FASTATTN.name]),
            _percent(row["peak_share"].get(FASTATTN.name)) or "-",
            *[_percent(row.get("reading_share")) or "-"] * reads,
            *(_ratio(row["speed_over"].get(each)) or "-" for each in RIVALS),
        ]
        for row in speeds
    ]
