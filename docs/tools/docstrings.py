"""From numpydoc, in which the docstrings are written, to the Markdown of the site.

A parser of numpydoc would take the shapes beside the types for Python. So the text stays as it is:
sections become bold words, their entries a list of definitions, and names of public functions links
to them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

_API = Path(__file__).parents[1] / "api"
_SPELLINGS = (
    (re.compile(r"::$", re.MULTILINE), ":"),  # what follows is indented, a block of code for both
    (re.compile(r"^\.\. \[(\d+)\]", re.MULTILINE), r"- \\[\1\\]"),
    (re.compile(r"\[(\d+)\]_"), r"\\[\1\\]"),
    (re.compile(r" *# doctest: .*"), ""),
)
_WORD = re.compile(r"(?<!`)`(\w+)`(?!`)")
_SECTION = re.compile(r"^([A-Z][\w ]+)\n-{3,}\n", re.MULTILINE)
_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
_LISTS = ("Parameters", "Attributes", "Returns", "Raises", "Warns", "See Also")

# Where the name of a function leads: to its entry on a page of the API.
_ENTRIES = {
    identifier.rpartition(".")[2]: identifier
    for page in sorted(_API.glob("*.md"))
    for identifier in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
}


class Numpydoc(griffe.Extension):
    """Turn every docstring into Markdown when it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Turn the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value, obj.name)


def to_markdown(text: str, name: str = "") -> str:
    """Return a docstring as Markdown; its own name is no link."""
    for pattern, markdown in _SPELLINGS:
        text = pattern.sub(markdown, text)
    text = _WORD.sub(lambda found: _linked(found[1], name), text)
    summary, *sections = _SECTION.split(text)
    parts = [summary]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        parts += [f"**{title}**\n", _definitions(body) if title in _LISTS else body]
    return _EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", "\n".join(parts))


def _linked(word: str, name: str) -> str:
    """Return a word in backquotes, and a link if it is the name of something public."""
    target = _ENTRIES.get(word)
    return f"`{word}`" if target is None or word == name else f"[`{word}`][{target}]"


def _definitions(body: str) -> str:
    """Return entries, which start at the margin, and what is said of each, which is indented."""
    lines = []
    for line in body.strip().splitlines():
        is_entry = line and not line.startswith(" ")
        if is_entry:
            names, colon, kind = line.partition(" : ")
            lines += ["", f"`{names}`" + (f" *{kind}*" if colon else ""), "", ":   "]
        elif lines[-1] == ":   ":
            lines[-1] += line.strip()
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"
