"""For the tests of code that is to stay fast."""

from __future__ import annotations

import random
from collections.abc import Callable

from fastattn.arguments import check_int, check_number


def assert_speedup(
    fast: Callable[[], object],
    slow: Callable[[], object],
    at_least: float = 1.0,
    *,
    rounds: int = 9,
    attempts: int = 3,
) -> float:
    """Assert that one function is so many times as fast as another, whatever else the machine does.

    Both take turns in this process, some 20 ms at a time, and their ratio is taken within each
    round: what slows the machine down meets both. Where the median of the rounds is too low, they
    are measured again before it is said.

    Parameters
    ----------
    fast, slow : callable
        Without arguments. Each is called some times beforehand, which leaves compiling and loading
        out.
    at_least : float
        How many times as fast as `slow` `fast` has to be; below 1 it may be slower.
    rounds : int
        In each attempt.
    attempts : int
        How often it is measured, at most.

    Returns
    -------
    float
        How many times as fast it was.

    Raises
    ------
    AssertionError
        If it was not as fast in any attempt; the message has what was reached.
    TypeError, ValueError
        For numbers of another kind, or below 1 (`at_least`: not above 0).

    Examples
    --------
    In a test of your own:

    >>> import numpy as np
    >>> import fastattn
    >>> from fastattn.testing import assert_speedup
    >>> x = np.ones((1, 4, 128, 64), np.float32)
    >>> speedup = assert_speedup(
    ...     fast=lambda: fastattn.attention(x, x, x),
    ...     slow=lambda: fastattn.reference.attention(x, x, x),
    ...     at_least=1.5,
    ... )
    """
    from fastattn.bench.timing import Contender, Prepared, ratio, take_round

    at_least = check_number("at_least", at_least, above=0)
    rounds, attempts = check_int("rounds", rounds, 1), check_int("attempts", attempts, 1)
    reached = []
    for attempt in range(attempts):
        own, other = contenders = [Contender("", Prepared(each)) for each in (fast, slow)]
        for contender in contenders:
            contender.prepared.run()
            contender.calibrate()
        order = random.Random(attempt)
        for _ in range(rounds):
            take_round(contenders, order)
        reached.append(ratio(other.seconds, own.seconds))
        if reached[-1] >= at_least:
            return reached[-1]
    found = ", ".join(f"{each:.3g}" for each in reached)
    raise AssertionError(f"fast must be {at_least:g} times as fast as slow: measured {found}")
