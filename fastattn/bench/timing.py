"""Times taken in turns, in one process: round by round, in an order shuffled for each round.

What the machine does besides (other tenants, frequency, temperature) meets everybody alike, so
every comparison is made within a round, and the median of the rounds is what counts.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np

from .machine import THREADS

# A sample is as many calls as fill this time: less would measure the clock and the scheduler.
SAMPLE_SECONDS = 0.02

# Workers of some libraries go on spinning after a call, up to a tenth of a second, on a core that
# somebody else wants by then: PyTorch is half as fast while NumPy's BLAS still waits for work.
# Nobody starts before all is quiet for one interval, longer than the ticks of CPU accounting.
QUIET_SECONDS = 0.012
MAX_WAIT_SECONDS = 0.5


@dataclass(frozen=True)
class Prepared:
    """A call that is ready to be timed, and how to see what it returned.

    `holds` keeps arrays alive whose memory the call reads without owning it.
    """

    run: Callable[[], Any]
    to_numpy: Callable[[Any], np.ndarray] = np.asarray
    holds: Sequence[Any] = ()

    def result(self) -> np.ndarray:
        """Run once and return the output in the shape of the query."""
        return self.to_numpy(self.run())


@dataclass
class Contender:
    """Something whose time is taken.

    For each round, `seconds` has what the work of the case took, and `cores` the share of all
    cores that this process had meanwhile. A call does the work `times` times: once, but for the
    limits of the machine, whose amount of work is their own.
    """

    name: str
    prepared: Prepared
    times: float = 1.0
    calls: int = 1
    seconds: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)

    def calibrate(self) -> float:
        """Find out how many calls fill a sample; return the seconds that they take."""
        self.calls = 1
        while (elapsed := self._elapsed()) < SAMPLE_SECONDS:
            self.calls = math.ceil(self.calls * min(10.0, 1.2 * SAMPLE_SECONDS / elapsed))
        return elapsed

    def sample(self) -> None:
        """Take a sample."""
        wait_for_quiet()
        if self.calls > 1:
            # Wakes this library's workers and brings its code and data back into the caches.
            self.prepared.run()
        used = time.process_time()
        elapsed = self._elapsed()
        self.cores.append((time.process_time() - used) / (elapsed * THREADS))
        self.seconds.append(elapsed / (self.calls * self.times))

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The distance between the quartiles as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.seconds, n=4)
        return (upper - lower) / self.median

    def _elapsed(self) -> float:
        run = self.prepared.run
        start = time.perf_counter()
        for _ in repeat(None, self.calls):
            run()
        return time.perf_counter() - start


def wait_for_quiet() -> None:
    """Wait until no worker spins, or the time is up."""
    deadline = time.perf_counter() + MAX_WAIT_SECONDS
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(QUIET_SECONDS)
        if time.process_time() - used < QUIET_SECONDS / 10:
            return


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def take_round(contenders: Iterable[Contender], order: random.Random) -> None:
    """Take one sample of everybody, in random order."""
    shuffled = list(contenders)
    order.shuffle(shuffled)
    with _without_garbage_collection():
        for contender in shuffled:
            contender.sample()


def ratio(over: Iterable[float], under: Iterable[float]) -> float:
    """Return the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
