"""The code on the pages: found, and run as a reader would, from the top of a page to its end."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

_BLOCK = re.compile(
    r"^```python\n(.*?)^```$"  # what runs
    r"(?:\n+```text\n(.*?)^```$)?",  # what it prints, right behind it
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """Python in a page, and what the page says that it prints: a block of text right behind it."""

    line: int
    code: str
    printed: str | None


def blocks(page: Path) -> list[Block]:
    """Return the blocks of Python in a page."""
    text = page.read_text()
    return [
        Block(text.count("\n", 0, found.start(1)), found[1], found[2])
        for found in _BLOCK.finditer(text)
    ]


def needs(page: Path) -> list[str]:
    """Return the packages without which a page cannot run: what it says before its title."""
    found = re.match(r"---\nneeds: \[(.*)\]\n---\n", page.read_text())
    return found[1].split(", ") if found else []


def run(page: Path) -> None:
    """Run the blocks of a page in one namespace; AssertionError if one prints something else."""
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        # Behind empty lines, so that tracebacks and warnings name the line of the page.
        code = compile("\n" * block.line + block.code, str(page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)  # noqa: S102, our own pages
        if block.printed is not None:
            assert printed.getvalue() == block.printed, (
                f"{page}, line {block.line}: printed\n{printed.getvalue()}not\n{block.printed}"
            )
