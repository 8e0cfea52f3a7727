"""The page about a run: what it shows, and that it needs nothing but itself."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from checks import printed

from fastattn.bench.saved import history

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

ROOT = Path(__file__).parents[1]
HISTORY = ROOT / "bench" / "history"
PICTURES = ["speedup", "roofline", "peers", "history", "memory"]


def report(*words, status=0):
    """Return what the command prints, in a process: the bench decides about threads of its own."""
    return printed("bench.report", *words, status=status, cwd=ROOT)


class Page(HTMLParser):
    """What is in a page: text, tables and where it refers to."""

    def __init__(self, path):
        super().__init__()
        self.text, self.refers, self.cells = "", [], []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.refers += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        self.text += data
        if self.cells:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def complete():
    """Return the newest run that is kept of everything, memory by length included."""
    runs = [run for run in history(HISTORY) if any("growth" in row for row in run.results)]
    return runs[-1]


@pytest.fixture(scope="module")
def folder(complete, tmp_path_factory):
    """Return a folder with the report about that run."""
    folder = tmp_path_factory.mktemp("report")
    assert report(HISTORY / complete.file_name, folder).strip() == str(folder / "index.html")
    return folder


def test_every_picture_in_both_themes(folder):
    expected = {f"{name}{theme}.png" for name in PICTURES for theme in ("", "-dark")}
    assert {path.name for path in folder.glob("*.png")} == expected


def test_the_page_holds_its_pictures(folder):
    """It refers to nothing but the pictures, which are within."""
    refers = Page(folder / "index.html").refers
    kept = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    inside = [base64.b64decode(each.removeprefix("data:image/png;base64,")) for each in refers]
    assert sorted(inside) == sorted(kept.values())
    assert all(each.startswith(b"\x89PNG") for each in inside)
    assert len(set(inside)) == len(inside)


def test_the_page_says_what_was_measured(folder, complete):
    page = Page(folder / "index.html")
    assert complete.machine["cpu"] in page.text
    assert complete.commit in page.text
    assert set(complete.speeds) < set(page.cells)


def test_a_run_of_a_few_cases_has_fewer_pictures(tmp_path):
    """The oldest has one length, neither limits nor memory, and nothing before it."""
    oldest = HISTORY / history(HISTORY)[0].file_name
    report(oldest, tmp_path)
    assert {path.stem for path in tmp_path.glob("*[!k].png")} == {"peers"}


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), ('{"format": 1', "torn"), ('{"format": 2}', "must be of format 1")],
)
def test_bad_input(content, says, tmp_path):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    assert re.fullmatch(f".*report.*: .*{says}.*\n", report(path, tmp_path, status=2))
