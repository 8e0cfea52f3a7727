"""What may happen to a score tile between the product and the softmax, one function each.

Each goes over the rows of S^T once.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from .compile import routine
from .simd import hidden, lanes, load, lowest, on, ones, splat, store, where_less, zeros


class Modifiers(NamedTuple):
    """The routines for one accumulation type."""

    add_bias: Any
    hide_outside: Any


@cache
def modifiers(element: types.Float) -> Modifiers:
    """Compile the modifiers, for tiles of any number of ``queries`` that is whole registers."""
    zero = np.dtype(str(element)).type(0)
    pointer = types.CPointer(element)
    integer = types.intp

    @routine(types.void(integer, pointer, integer, pointer), element)
    def add_bias(queries, s, keys, bias):
        """``s + bias``; -inf hides the key, whatever its score is.

        A mask comes as a bias of 0 and -inf.
        """
        one = splat(zero, 1)
        for n in range(0, keys * queries, lanes(one)):
            term = load(one, on(bias, n), 0)
            score = load(one, on(s, n), 0) + term
            store(on(s, n), 0, where_less(term, lowest(one), hidden(one), score))

    @routine(types.void(integer, pointer, integer, pointer, pointer), element)
    def hide_outside(queries, s, keys, first, last):
        """-inf for the keys before ``first`` or behind ``last``, one of each for every query.

        Causal, window and lengths all come as such an interval.
        """
        one = splat(zero, 1)
        for x in range(0, queries, lanes(one)):
            begin = load(one, on(first, x), 0)
            end = load(one, on(last, x), 0)
            key = zeros(one)
            for j in range(keys):
                at = on(s, j * queries + x)
                score = where_less(key, begin, hidden(one), load(one, at, 0))
                store(at, 0, where_less(end, key, hidden(one), score))
                key = key + ones(one)

    return Modifiers(add_bias, hide_outside)
