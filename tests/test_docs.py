"""The documentation: its code runs and prints what it says, and nothing is missing from it."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest

import fastattn

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def load(path):
    """Return a file of Python as a module: docs/ is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


blocks = load(DOCS / "tools" / "blocks.py")


def lacking(page):
    """Return why a page cannot run: it needs a package that is not installed."""
    for name in blocks.needs(page):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            return str(error)
    return None


def with_code():
    # Looked up now, while the tests are collected: torch must be imported before threads start.
    for page in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))):
        if blocks.blocks(page):
            reason = lacking(page)
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            if "assert_speedup" in page.read_text():
                marks.append(pytest.mark.alone)
            yield pytest.param(page, id=str(page.relative_to(ROOT)), marks=marks)


@pytest.mark.parametrize("page", list(with_code()))
def test_code(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = fastattn.get_num_threads()
    try:
        blocks.run(page)
    finally:
        fastattn.set_num_threads(threads)


def test_what_a_page_prints_is_compared(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\nprint(x)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match="line 3: printed\n1\nnot\n2\n"):
        blocks.run(page)


def test_errors_name_the_line_of_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nx\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as info:
        blocks.run(page)
    assert (str(info.traceback[-1].path), info.traceback[-1].lineno + 1) == (str(page), 7)


def test_commands_are_known():
    """What the guide types is what the command line takes."""
    from fastattn.cli import _parser

    text = (DOCS / "guides" / "tracking.md").read_text()
    lines = "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    commands = [shlex.split(line) for line in lines.splitlines()]
    assert {command[0] for command in commands} == {"fastattn"}
    for _, *arguments in commands:
        assert _parser().parse_args(arguments).command == arguments[0]


def test_what_was_measured_is_in_a_table():
    # In a process of its own: the bench decides about the threads of the process that it is in.
    script = DOCS / "tools" / "measured.py"
    printed = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True
    ).stdout
    assert printed.startswith("## ")
    assert re.search(r"^\| float32 1x8x1024x64 \| [\d.]+ ms \| \d+% \|", printed, re.MULTILINE)


def test_every_public_name_has_an_entry():
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    entries = re.findall(r"^::: fastattn\.([\w.]+)", pages, re.MULTILINE)
    assert {name.rpartition(".")[2] for name in entries} >= set(fastattn.__all__)
    for name in entries:
        if not name.startswith("integrations."):  # each wants a package of its own
            resolve_name(f"fastattn.{name}")
