"""The online softmax: what is known of every row after some of its keys.

The state of a row is ``(m, l, acc)``: the largest score so far, the sum of
``exp(s - m)``, and the sum of ``exp(s - m) V``. See Milakov &
Gimelshein, Online normalizer calculation for softmax (2018), section 3, and
Rabe & Staats (2021), section 2.

Edge cases:

* No visible key yet: ``m`` is -inf. ``s - m`` would be NaN, so 0 stands in for m; every
  score is -inf too and becomes exactly 0, the factor for what came before likewise.
* NaN: it may be lost in ``m``, but not in ``l`` and ``acc``: the row becomes NaN.
* +inf: ``inf - inf`` is NaN for that key, as in the textbook form.

Long rows are summed in spans, whose sums are added to those set aside: the error of a sum grows
with the number of its terms, and 100,000 keys are 1,600 blocks. What is set aside is ``(since, l,
acc)``; ``since`` is the product of the factors since then.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from .compile import routine
from .simd.arithmetic import add_rows, fma, maximum, maximum_rows, where_less
from .simd.functions import exp
from .simd.pointers import on
from .simd.registers import (
    hidden,
    lanes,
    load,
    lowest,
    ones,
    repeated,
    rows,
    splat,
    stack,
    store,
    zeros,
)


class Softmax(NamedTuple):
    """The routines for one accumulation type."""

    start: Any
    update: Any
    keep_pace: Any
    set_aside: Any
    finish: Any


@cache
def online_softmax(element: types.Float) -> Softmax:
    """Compile the state's steps.

    They serve tiles of any number of ``queries`` that is whole registers: each goes through one
    register of queries after the other, so that the constants of exp stay in the remaining ones.
    """
    zero = np.dtype(str(element)).type(0)
    pointer = types.CPointer(element)
    integer = types.intp

    @routine(types.void(integer, pointer, pointer, integer, pointer), element)
    def start(queries, row_max, row_sum, head_dim_v, o):
        """The state before any key."""
        one = splat(zero, 1)
        for x in range(0, queries, lanes(one)):
            store(on(row_max, x), 0, hidden(one))
            store(on(row_sum, x), 0, zeros(one))
            for f in range(head_dim_v):
                store(on(o, f * queries + x), 0, zeros(one))

    @routine(types.void(integer, pointer, integer, pointer, pointer, pointer), element)
    def update(queries, s, keys, row_max, row_sum, rescale):
        """Take ``keys`` rows of S^T into the state; P^T takes their place.

        ``rescale`` receives the factor for what was summed before.
        """
        one = splat(zero, 1)
        many = stack(one)
        height = rows(many)
        whole = keys - keys % height
        for x in range(0, queries, lanes(one)):
            s_x = on(s, x)
            old = load(one, on(row_max, x), 0)
            # One maximum for each row of a step: a single one would wait for itself at every key.
            highest = repeated(many, old)
            for j in range(0, whole, height):
                highest = maximum(highest, load(many, on(s_x, j * queries), queries))
            new = maximum_rows(old, highest)
            for j in range(whole, keys):
                new = maximum(new, load(one, on(s_x, j * queries), 0))
            store(on(row_max, x), 0, new)

            new = where_less(new, lowest(one), zeros(one), new)
            factor = exp(old - new)
            store(on(rescale, x), 0, factor)
            new_many = repeated(many, new)
            total = zeros(one)
            for j in range(0, whole, height):
                at = on(s_x, j * queries)
                p = exp(load(many, at, queries) - new_many)
                total = add_rows(total, p)
                store(at, queries, p)
            for j in range(whole, keys):
                at = on(s_x, j * queries)
                p_rest = exp(load(one, at, 0) - new)
                total = total + p_rest
                store(at, 0, p_rest)
            store(on(row_sum, x), 0, fma(load(one, on(row_sum, x), 0), factor, total))

    @routine(types.void(integer, pointer, pointer), element)
    def keep_pace(queries, rescale, aside):
        """What is set aside loses by the same factor, later and at once."""
        one = splat(zero, 1)
        for x in range(0, queries, lanes(one)):
            at = on(aside, x)
            store(at, 0, load(one, at, 0) * load(one, on(rescale, x), 0))

    @routine(types.void(integer, pointer, integer, pointer, pointer), element)
    def set_aside(queries, row_sum, head_dim_v, o, aside):
        """Add the sums to those set aside, and begin anew."""
        one = splat(zero, 1)
        for x in range(0, queries, lanes(one)):
            since = load(one, on(aside, x), 0)
            store(on(aside, x), 0, ones(one))
            total = on(aside, queries + x)
            store(total, 0, fma(load(one, total, 0), since, load(one, on(row_sum, x), 0)))
            store(on(row_sum, x), 0, zeros(one))
            for f in range(head_dim_v):
                at, sums = on(o, f * queries + x), on(aside, (2 + f) * queries + x)
                store(sums, 0, fma(load(one, sums, 0), since, load(one, at, 0)))
                store(at, 0, zeros(one))

    @routine(types.void(integer, pointer, integer, pointer), element)
    def finish(queries, row_sum, head_dim_v, o):
        """Divide by the sums: O^T is the result. 0 / 1 for a row that saw nothing."""
        one = splat(zero, 1)
        for x in range(0, queries, lanes(one)):
            total = load(one, on(row_sum, x), 0)
            divisor = where_less(zeros(one), total, total, ones(one))
            # One division, and a product for each feature, which is corrected by what it misses.
            inverse = ones(one) / divisor
            infinity = zeros(one) - hidden(one)
            for f in range(head_dim_v):
                at = on(o, f * queries + x)
                sums = load(one, at, 0)
                quotient = sums * inverse
                missing = fma(zeros(one) - quotient, divisor, sums)
                corrected = fma(missing, inverse, quotient)
                # Of Inf and NaN nothing is missing.
                store(at, 0, where_less(missing, infinity, corrected, quotient))

    return Softmax(start, update, keep_pace, set_aside, finish)
