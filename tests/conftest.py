"""What every test of the suite shares: one seed, reproducible examples, readable assertions."""

import numpy as np
import pytest
from hypothesis import settings

# checks.py holds the assertions; without this they would fail without their values.
pytest.register_assert_rewrite("checks")

# A first call compiles, so no deadline; the same examples every time, so that a failure stays one.
settings.register_profile("fastattn", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fastattn")


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a generator that gives every test the same numbers, whatever ran before."""
    return np.random.default_rng(20170612)
