"""What was measured: the runs that the repository keeps, as Markdown.

`python docs/tools/measured.py` prints it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastattn.bench.saved import Run
from fastattn.bench.table import QUIET_CORES, markdown

_ROOT = Path(__file__).parents[2]


def tables() -> str:
    """Return a table of every run."""
    return "\n".join(_of(path) for path in sorted((_ROOT / "bench" / "history").glob("*.json")))


def _of(path: Path) -> str:
    """Return where and with what a run was measured, and the cases that had the cores alone."""
    run = Run.load(path)
    machine, speeds = run.machine, run.speeds
    disturbed = [case for case, row in speeds.items() if row["cores"] < QUIET_CORES]
    lines = [
        f"## {machine['cpu']} ({machine['target']}), {machine['threads']} threads",
        "",
        f"{run.date[:10]}, {machine['instruction_set']}, "
        + ", ".join(f"{name} {version}" for name, version in run.versions.items()),
        "",
        markdown(row for case, row in speeds.items() if case not in disturbed),
        "",
    ]
    if disturbed:
        lines += [f"Left out, because something else used the cores: {', '.join(disturbed)}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(tables())
