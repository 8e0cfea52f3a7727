"""What was measured: of every machine the run that says most, as Markdown.

`python docs/tools/measured.py` prints it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastattn.bench import table
from fastattn.bench.saved import Run, described, history

_HISTORY = Path(__file__).parents[2] / "bench" / "history"


def complete() -> Path:
    """Return the file of the newest run of everything, which memory by length is the end of."""
    runs = [run for run in history(_HISTORY) if any("growth" in row for row in run.results)]
    return _HISTORY / runs[-1].file_name


def tables() -> str:
    """Return a table for each machine: of the run with most cases that had the cores alone."""
    machines: dict[str, list[Run]] = {}
    for run in reversed(history(_HISTORY)):  # of equals, the newest
        machines.setdefault(described(run.machine), []).append(run)
    return "\n".join(_of(max(runs, key=_quiet), machine) for machine, runs in machines.items())


def _quiet(run: Run) -> int:
    return len(run.speeds) - len(table.disturbed(run.speeds.values()))


def _of(run: Run, machine: str) -> str:
    """Return when and with what a run was measured, and the cases that had the cores alone."""
    disturbed = table.disturbed(run.speeds.values())
    lines = [
        f"## {machine}",
        "",
        f"{run.date[:10]}: " + ", ".join(" ".join(each) for each in run.versions.items()),
        "",
        table.markdown(row for case, row in run.speeds.items() if case not in disturbed),
        "",
    ]
    if disturbed:
        lines += [f"Left out, because something else used the cores: {', '.join(disturbed)}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(tables())
