"""What pytest does with the results: keeps them in the saved run, and prints them at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from . import report
from .limits import vector_bytes
from .machine import THREADS
from .providers import FASTATTN, NAIVE, PEERS

RESULTS = pytest.StashKey[list[report.Row]]()


@pytest.fixture
def keep(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> Callable[[report.Row], None]:
    """Return a function that keeps the result of a test."""

    def keep_row(row: report.Row) -> None:
        benchmark.extra_info.update(row)
        pytestconfig.stash.setdefault(RESULTS, []).append(row)

    return keep_row


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Say on what, and against what, a saved run was measured."""
    machine_info["threads"] = THREADS
    machine_info["vector_bytes"] = vector_bytes()
    machine_info["versions"] = {
        each.name: each.version for each in (FASTATTN, NAIVE, *PEERS) if each.version
    }


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the tables."""
    rows = config.stash.get(RESULTS, [])
    if rows:
        terminalreporter.section("fastattn")
        terminalreporter.write_line(report.text(rows))
