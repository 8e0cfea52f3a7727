"""Checks of single arguments, for whatever is not a call of `attention`: counts, numbers, dtypes.

TypeError for a wrong kind, ValueError for a wrong value, in the words of `keywords.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fastattn.formats import is_float
from fastattn.keywords import UNBOUNDED
from fastattn.reference import FLOATS


def check_int(name: str, n: Any, low: int | None = None) -> int:
    """Return an integer of at least `low`, and far from where 64 bits end."""
    if isinstance(n, bool) or not isinstance(n, int | np.integer):
        raise TypeError(f"{name} must be an int: got {n!r} of type {type(n).__name__}")
    if low is not None and n < low:
        raise ValueError(f"{name} must be at least {low}: got {n}")
    if abs(int(n)) > UNBOUNDED:
        raise ValueError(f"{name} must lie between {-UNBOUNDED} and {UNBOUNDED}: got {n}")
    return int(n)


def check_number(name: str, x: Any, above: float | None = None) -> float:
    """Return a finite number that is greater than `above`."""
    if isinstance(x, bool | np.bool_) or not isinstance(x, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a real number: got {x!r} of type {type(x).__name__}")
    try:
        number = float(x)
    except OverflowError:  # of an int with more digits than a float has room for
        x = number = math.inf
    if not math.isfinite(number) or (above is not None and number <= above):
        bound = "" if above is None else f" and greater than {above:g}"
        raise ValueError(f"{name} must be finite{bound}: got {x}")
    return number


def check_float_dtype(name: str, dtype: DTypeLike) -> np.dtype[Any]:
    """Return a dtype of the floats that are computed in, in native byte order."""
    try:
        checked: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        checked = np.dtype(object)
    if not is_float(checked):
        raise TypeError(f"{name} must be one of {', '.join(FLOATS)}: got {dtype!r}")
    return checked.newbyteorder("=")
