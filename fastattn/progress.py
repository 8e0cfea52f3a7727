"""A progress bar for those who wait at a terminal."""

from __future__ import annotations

import sys

_WIDTH = 30


def draw_progress(what: str, done: int, total: int, now: str = "") -> None:
    """Draw a bar on standard error in place of the one before; the last one ends its line.

    Behind it stands what is being done now.
    """
    filled = _WIDTH * done // max(total, 1)
    bar = "#" * filled + "." * (_WIDTH - filled)
    end = "\n" if done == total else ""
    # What the line before had more is wiped out.
    sys.stderr.write(f"\rfastattn: {what} [{bar}] {done}/{total}{now and f' {now:40}'}{end}")
    sys.stderr.flush()
