"""`python -m numerics`: every float32 through exp, 1,000 cases of attention, and extreme ones.

    cd tests; python -m numerics > ../docs/tools/numerics.md

`python -m numerics exp float32` measures parts of it.
"""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from checks import FLOAT_DTYPES
from fastattn.kernels.host import HOST
from fastattn.kernels.simd.functions import exp, tanh

from numerics.grid import cases, extremes, measure
from numerics.units import smallest, ulps

AT_ONCE = 1 << 22


def bits(first: float, last: float, step: int = 1) -> Iterator[np.ndarray]:
    """Yield every so manyth float32 of one sign from `first` to the larger `last`."""
    begin, end = (int(np.array(x, np.float32).view(np.uint32)) for x in (first, last))
    for start in range(begin, end + 1, AT_ONCE * step):
        stop = min(start + AT_ONCE * step, end + 1)
        yield np.arange(start, stop, step, np.uint32).view(np.float32)


def largest(function: Any, x: np.ndarray) -> tuple[float, float, float, int]:
    """Return the largest error in ulp, infinity for NaN; where it is; the sum of all; how many."""
    off = np.nan_to_num(ulps(function, x), nan=np.inf)
    n = int(np.argmax(off))
    return float(off[n]), float(x[n]), float(off.sum()), x.size


def measure_exp() -> None:
    """Print the errors of exp."""
    lowest = float(np.log(smallest(np.float32)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(partial(largest, exp), bits(-0.0, lowest)))
    worst, at, *_ = max(found)
    total, count = (sum(each[n] for each in found) for n in (2, 3))
    print(
        f"| exp, float32: every number from -0 to {lowest:.1f} | {count:,} "
        f"| {worst:.3f} ulp at {at:.6g}, {total / count:.3f} on average |"
    )
    rng = np.random.default_rng(0)
    lowest = float(np.log(smallest(np.float64)))
    x = np.concatenate(
        [rng.uniform(lowest, 0, 5_000_000), -(2.0 ** rng.uniform(-60, 9, 1_000_000))]
    )
    off = ulps(exp, x)
    print(
        f"| exp, float64: at random from -0 to {lowest:.1f} | {x.size:,} "
        f"| {off.max():.3f} ulp, {off.mean():.3f} on average |"
    )


def measure_tanh() -> None:
    """Print the errors of tanh; it is odd, so that numbers of one sign will do."""
    worst, count = 0.0, 0
    for x in bits(1e-37, 20.0, step=7):
        off = float(ulps(tanh, x).max())
        worst, count = (max(worst, off)), count + x.size
    print(f"| tanh, float32: every seventh from 10^-37 to 20 | {count:,} | {worst:.3f} ulp |")
    x = 2.0 ** np.random.default_rng(0).uniform(-1020, 5, 3_000_000)
    print(f"| tanh, float64: at random | {x.size:,} | {ulps(tanh, x).max():.3f} ulp |")


def measure_grid(dtype: str) -> None:
    """Print how the errors of attention compare with the textbook's, for a type."""
    chosen = (case for case in cases() if case[1][0].dtype == dtype)
    errors = [measure(name, inputs, **keywords) for name, inputs, keywords in chosen]
    ratios = np.array([each.ratio for each in errors])
    worst = max(errors, key=lambda each: each.share)
    print(
        f"| attention, {dtype}: grid of shapes, plain and with everything | {len(errors)} "
        f"| {np.median(ratios):.2f} of the textbook's error; not above it in "
        f"{np.mean(ratios <= 1):.1%}, at most {ratios.max():.2f} of it; "
        f"at most {worst.share:.2f} of the bound ({worst.name}) |"
    )


def measure_extremes() -> None:
    """Print the same for extreme scores and values, and for lengths to 100,000: a second table."""
    print(f"\n| error over the textbook's | {' | '.join(str(each) for each in FLOAT_DTYPES)} |")
    print("|---" * (1 + len(FLOAT_DTYPES)) + "|")
    for name, *_ in extremes(np.dtype(np.float32)):
        found = []
        for dtype in FLOAT_DTYPES:
            inputs, keywords = next((x, y) for n, x, y in extremes(dtype) if n == name)
            error = measure(name, inputs, **keywords)
            found.append(f"{error.ratio:.2f}")
        print(f"| {name} | {' | '.join(found)} |")


PARTS = {
    "exp": measure_exp,
    "tanh": measure_tanh,
    **{str(dtype): partial(measure_grid, str(dtype)) for dtype in FLOAT_DTYPES},
    "extremes": measure_extremes,
}


def main() -> None:
    """Print the table, or the parts of it that the command line names."""
    print(f"| {HOST.cpu}, {HOST.instruction_set} | cases | error |")
    print("|---|---|---|")
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
