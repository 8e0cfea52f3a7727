"""What pytest does with the results: saves them as a run, and prints them at the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastattn.bench import table
from fastattn.bench.saved import Row, Run

from . import HISTORY, LATEST

RESULTS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option to keep a run."""
    parser.addoption(
        "--keep", action="store_true", help="keep the run in bench/history, to compare with"
    )


@pytest.fixture
def keep(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> Callable[[Row], None]:
    """Return a function that keeps the result of a test."""

    def keep_row(row: Row) -> None:
        benchmark.extra_info.update(row)
        pytestconfig.stash.setdefault(RESULTS, []).append(row)

    return keep_row


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Save the run and print the tables."""
    rows = config.stash.get(RESULTS, [])
    if not rows:
        return
    run = Run.of(rows)
    paths = [LATEST]
    if config.option.keep:
        paths.append(HISTORY / run.file_name)
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        run.save(path)
    terminalreporter.section("fastattn")
    terminalreporter.write_line(table.text(rows))
    terminalreporter.write_line(f"\nsaved in {' and '.join(map(str, paths))}")
