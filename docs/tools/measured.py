"""What was measured: the newest run of every machine that the repository keeps, as Markdown.

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
    """Return a table for each machine."""
    newest = {described(run.machine): run for run in history(_HISTORY)}
    return "\n".join(_of(run, machine) for machine, run in newest.items())


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
