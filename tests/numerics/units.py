"""exp and tanh of the kernels by themselves, in units in the last place of the result.

They are measured against more digits than the result has: float64 for float32, the platform's
longdouble for float64.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from fastattn.kernels.exponential import lowest_power
from fastattn.kernels.simd.functions import exp, tanh
from fastattn.kernels.simd.pointers import data, on
from fastattn.kernels.simd.registers import load, splat, store, width
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]

TRUTHS: dict[Any, Callable[..., Array]] = {exp: np.exp, tanh: np.tanh}


def smallest(dtype: Any) -> Any:
    """Return the smallest result of exp but 0."""
    return dtype(2.0 ** lowest_power(np.dtype(dtype).name))


@cache
def _over(function: Any, dtype: Any) -> Any:
    zero = dtype(0)

    @njit
    def over(x, result):
        like = splat(zero, 1)
        for n in range(0, x.size, width(like)):
            store(on(data(result), n), 0, function(load(like, on(data(x), n), 0)))

    return over


def fused(function: Any, x: Array) -> Array:
    """Return what the kernels make of exp(x) or tanh(x), one register after the other."""
    whole = np.resize(x, -(-x.size // 64) * 64)
    result = np.empty_like(whole)
    _over(function, x.dtype.type)(whole, result)
    return result[: x.size]


def ulps(function: Any, x: Array) -> Array:
    """Return how far the kernels' exp(x) or tanh(x) is from the truth; NaN where it is NaN."""
    truth = TRUTHS[function](x.astype(np.float64 if x.dtype == np.float32 else np.longdouble))
    result: Array = np.abs(fused(function, x) - truth) / np.spacing(np.abs(truth).astype(x.dtype))
    return result
