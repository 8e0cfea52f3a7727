"""Runs the measures under pytest-benchmark, which keeps them: one test for each case.

    make bench                                    # everything; saves bench/results/latest.json
    pytest bench -k T1-                           # some cases
    pytest bench --benchmark-autosave             # keep a run ...
    pytest bench --benchmark-compare              # ... and compare fastattn with the last one

What a test asserts is that fastattn's results are right. Goals of speed are reported and not
asserted: a busy machine must not turn a run red.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastattn.bench.cases import CASES, Case
from fastattn.bench.limits import MULTIPLIES, chains, measure_limits, multiply_add_loop, unit
from fastattn.bench.measure import Measurement
from fastattn.bench.saved import Row

from . import memory, startup
from .accuracy import DTYPES, measure_accuracy

Keep = Callable[[Row], None]


class Stopwatch:
    """A clock that shows how long fastattn has been running, per call and nothing else.

    pytest-benchmark reads its clock before and after a round. In a round everybody has a
    turn, and each turn is of many calls; only fastattn's own time is to be kept.
    """

    __name__ = "fastattn_stopwatch"

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        """Return the time that has been added so far."""
        return self.seconds


STOPWATCH = Stopwatch()


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.target}-{case.name.replace(' ', '-')}"
)
@pytest.mark.benchmark(timer=STOPWATCH)
def test_speed(case: Case, benchmark: BenchmarkFixture, keep: Keep) -> None:
    """Everybody's time, in turns."""
    measurement = Measurement(case)

    def take_round() -> None:
        STOPWATCH.seconds += measurement.take_round()

    benchmark.group = case.target
    benchmark.pedantic(take_round, rounds=measurement.rounds)
    keep(measurement.summary())


def test_limits(benchmark: BenchmarkFixture, keep: Keep) -> None:
    """What the machine can do at most."""
    measured = benchmark.pedantic(measure_limits)
    keep({"target": "", "figures": [(each.name, each.rate, each.unit, None) for each in measured]})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fma_peak_is_the_real_one(dtype: str) -> None:
    """Nothing is in the loop but multiply-adds in registers, and the counter."""
    lines = multiply_add_loop(dtype)
    multiplies = [line for line in lines if re.match(MULTIPLIES, line)]
    assert len(multiplies) == chains()
    assert len(lines) - len(multiplies) * (1 if unit().fused else 2) <= 3
    assert not any("(" in line or "[" in line for line in lines)


def test_startup(benchmark: BenchmarkFixture, keep: Keep) -> None:
    """What a program waits for before its first result."""
    measured = benchmark.pedantic(startup.measure_startup)
    figures = [
        (name.replace("_", " "), seconds, "s", startup.GOALS.get(name))
        for name, seconds in measured._asdict().items()
    ]
    keep({"target": "T11", "figures": figures})


@pytest.mark.skipif(not memory.can_measure(), reason="needs Linux")
@pytest.mark.parametrize("variant", memory.VARIANTS)
def test_memory(variant: str, benchmark: BenchmarkFixture, keep: Keep) -> None:
    """A long context takes tiles, not a matrix."""
    growth = benchmark.pedantic(memory.measure_growth, args=(variant,))
    figure = (f"growth, {variant}", growth / 2**20, "MiB", memory.GOAL_BYTES / 2**20)
    keep({"target": "T12", "figures": [figure]})


@pytest.mark.skipif(not memory.can_measure(), reason="needs Linux")
def test_memory_by_length(benchmark: BenchmarkFixture, keep: Keep) -> None:
    """Flat, where the textbook's grows with the square."""
    growth = benchmark.pedantic(memory.measure_by_length)
    keep({"target": "T12", "lengths": memory.LENGTHS, "growth": growth})


def test_accuracy(benchmark: BenchmarkFixture, keep: Keep) -> None:
    """No further from float64 than the textbook; never more than twice as far."""
    measured = benchmark.pedantic(measure_accuracy)
    figures = []
    for dtype in DTYPES:
        worst = max(each.own / each.naive for each in measured if each.case.startswith(dtype))
        figures.append((f"error over the textbook's, {dtype}", worst, "x", 1.0))
    keep({"target": "T13", "figures": figures, "accuracy": [each._asdict() for each in measured]})
    assert not [each for each in measured if each.own > each.allowed]
