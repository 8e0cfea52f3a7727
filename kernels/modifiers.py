"""What may happen to a score tile between the product and the softmax, one function each.

Each goes over the rows of S^T once.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from .compile import routine
from .simd import (
    hidden,
    load,
    lowest,
    on,
    ones,
    splat,
    store,
    where_less,
    width,
    zeros,
)


class Modifiers(NamedTuple):
    """The routines for one shape of tile."""

    add_bias: Any
    hide_outside: Any


@cache
def modifiers(element: types.Float, cols: int) -> Modifiers:
    """Compile the modifiers for tiles of ``cols`` registers of queries."""
    zero = np.dtype(str(element)).type(0)
    pointer = types.CPointer(element)

    @routine(types.void(pointer, types.intp, pointer), element, cols)
    def add_bias(s, keys, bias):
        """``s + bias``; -inf hides the key, whatever its score is.

        A mask comes as a bias of 0 and -inf.
        """
        like = splat(zero, cols)
        queries = width(like)
        for j in range(keys):
            at = on(s, j * queries)
            term = load(like, on(bias, j * queries), 0)
            score = load(like, at, 0) + term
            store(at, 0, where_less(term, lowest(like), hidden(like), score))

    @routine(types.void(pointer, types.intp, pointer, pointer), element, cols)
    def hide_outside(s, keys, first, last):
        """-inf for the keys before ``first`` or behind ``last``, one of each for every query.

        Causal, window and lengths all come as such an interval.
        """
        like = splat(zero, cols)
        queries = width(like)
        begin = load(like, first, 0)
        end = load(like, last, 0)
        key = zeros(like)
        for j in range(keys):
            at = on(s, j * queries)
            score = where_less(key, begin, hidden(like), load(like, at, 0))
            store(at, 0, where_less(end, key, hidden(like), score))
            key = key + ones(like)

    return Modifiers(add_bias, hide_outside)
