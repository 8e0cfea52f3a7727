"""What every test of the suite shares: one seed, reproducible examples, readable assertions.

`make test` shares the tests out between two processes. Two marks say what that must not disturb:
`long` tests are begun first, so that neither process is left with one at the end, and nothing
else runs beside a test that is `alone`, because it measures time.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

try:
    import fcntl
except ImportError:  # Windows: what measures time may be disturbed there
    fcntl = None

# checks.py holds the assertions; without this they would fail without their values.
pytest.register_assert_rewrite("checks")

# A first call compiles, so no deadline; the same examples every time, so that a failure stays one.
settings.register_profile("fastattn", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fastattn")

# Both processes have threads for all cores: one that waits must sleep, or it keeps a core from one
# that works. NumPy's do not know how to; it is only what results are compared with. All of this is
# read where OpenMP and NumPy are loaded: in both processes, and in those that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a generator that gives every test the same numbers, whatever ran before."""
    return np.random.default_rng(20170612)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long tests first and those last that are to be alone."""
    for item in items:
        if "assert_speedup" in item.name:  # its example has no place for a mark
            item.add_marker("alone")
    items.sort(key=lambda item: is_marked(item, "alone") - is_marked(item, "long"))


def is_marked(item: pytest.Item, name: str) -> bool:
    return item.get_closest_marker(name) is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test beside others or alone, as it is marked."""
    with _beside_others(alone=is_marked(item, "alone")):
        return (yield)


@contextmanager
def _beside_others(*, alone: bool) -> Generator[None]:
    """Hold a lock that processes share, unless one of them wants to be alone."""
    if fcntl is None:
        yield
        return
    here = Path(__file__)
    # Any two files will do, those that are there leave nothing behind.
    with here.open() as door, here.with_name("checks.py").open() as room:
        # Who waits to be alone keeps the door shut: otherwise somebody would always be inside.
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # closing would not do: a forked child has it open too
