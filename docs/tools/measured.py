"""What was measured: the runs that the repository keeps, as Markdown.

`python docs/tools/measured.py` prints it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(_ROOT))

from bench import report  # noqa: E402


def tables() -> str:
    """Return a table of every run."""
    return "\n".join(_of(path) for path in sorted((_ROOT / "bench" / "history").glob("*.json")))


def _of(path: Path) -> str:
    """Return where and with what a run was measured, and the cases that had the cores alone."""
    rows, machine = report.load(path)
    date = json.loads(path.read_text())["datetime"][:10]
    disturbed = [row["case"] for row in report.timed(rows) if row["cores"] < report.QUIET_CORES]
    lines = [
        f"## {machine['cpu']['brand_raw']}, {machine['threads']} threads",
        "",
        f"{date}, registers of {machine['vector_bytes']} bytes, "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "",
        report.markdown(row for row in rows if row.get("case") not in disturbed),
        "",
    ]
    if disturbed:
        lines += [f"Left out, because something else used the cores: {', '.join(disturbed)}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(tables())
