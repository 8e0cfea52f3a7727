"""The two products of attention for few queries, and the softmax between them.

With one to some sixteen queries most lanes of a tile of queries would be empty. Here lanes are
features, so that every register of K and V that is loaded is used whole, by all the queries that
share it::

    K, in place                   Q                          S
    key 0 | k0 k1 k2 ... |        q 0 | d0 d1 d2 ... |       q 0 | key 0, key 1, ... |
    key 1 | k0 k1 k2 ... |   x    q 1 | d0 d1 d2 ... |   =   q 1 | key 0, key 1, ... |
    ...    lanes = features             lanes = features           lanes = keys

    P                             V, in place                O
    q 0 | p0 p1 ... |             key 0 | v0 v1 v2 ... |     q 0 | f0 f1 f2 ... |
    q 1 | p0 p1 ... |        x    key 1 | v0 v1 v2 ... |  =  q 1 | f0 f1 f2 ... |
    ... one at a time, broadcast  ...    lanes = features          lanes = features

The lanes of a product's sums are added once for as many keys as registers hold sums. 16-bit and
8-bit rows are converted in registers, on the way to all queries of a step.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from .compile import glue, routine
from .host import HOST
from .record import BFLOAT, FLOAT32, FLOAT64, HALF, INT8
from .simd.arithmetic import fma, maximum, maximum_across, sum_across, where_less
from .simd.formats import (
    add_dots_bfloat,
    add_dots_float32,
    add_dots_float64,
    add_dots_half,
    add_dots_int8,
    load_bfloat,
    load_float32,
    load_float64,
    load_half,
    load_int8,
)
from .simd.functions import exp
from .simd.pointers import bytes_on, itemsize, on, prefetch_rows
from .simd.products import add_row, store_parts, sum_lanes
from .simd.registers import (
    filled,
    hidden,
    lanes,
    load,
    lowest,
    repeated,
    rows,
    shaped,
    splat,
    stack,
    store,
    width,
    zeros,
)
from .simd.tile import lanes_of
from .tiles import RUN_NARROW

# How many bytes ahead of their use rows are asked for. The prefetchers of the hardware stop at the
# end of every page; with a request for each line the products run at the speed of memory: in
# float32 from 0.87 to 1.00 of it for one query, from 0.62 to 0.90 for four. 2 to 16 KB are alike.
AHEAD = 4096

LINE = 64  # bytes of a cache line, at least

_int = types.intp
_bytes = types.CPointer(types.uint8)

# Rows of K and V that are read where they lie, and the bytes of an element.
_FORMATS = {
    FLOAT32: (4, load_float32, add_dots_float32),
    FLOAT64: (8, load_float64, add_dots_float64),
    HALF: (2, load_half, add_dots_half),
    BFLOAT: (2, load_bfloat, add_dots_bfloat),
    INT8: (1, load_int8, add_dots_int8),
}


class Rows(NamedTuple):
    """The products for one storage format, for any number of queries."""

    scores: Any
    values: Any


@cache
def rows_of(element: types.Float, storage: int) -> Rows:
    """Compile the products of rows of queries with rows of ``storage``."""
    one_scores, one_values = _products(element, storage, 1)
    two_scores, two_values = _products(element, storage, 2)
    four_scores, four_values = _products(element, storage, 4)

    @glue
    def scores(k, k_step, keys, q, q_step, count, head_dim, factor, s, s_step):
        """``S[x, j] = factor * sum_d Q[x, d] K[j, d]``, rows of K ``k_step`` bytes apart.

        Writes up to ``HOST.sums`` elements behind the last key.
        """
        x = 0
        while x + 4 <= count:
            q_x, s_x = on(q, x * q_step), on(s, x * s_step)
            four_scores(k, k_step, keys, q_x, q_step, head_dim, factor, s_x, s_step)
            x += 4
        if x + 2 <= count:
            q_x, s_x = on(q, x * q_step), on(s, x * s_step)
            two_scores(k, k_step, keys, q_x, q_step, head_dim, factor, s_x, s_step)
            x += 2
        if x < count:
            q_x, s_x = on(q, x * q_step), on(s, x * s_step)
            one_scores(k, k_step, keys, q_x, q_step, head_dim, factor, s_x, s_step)

    @glue
    def values(v, v_step, keys, p, p_step, count, head_dim_v, o, o_step):
        """``O[x, :] += sum_j P[x, j] V[j, :]``, in runs that are summed from zero."""
        x = 0
        while x + 4 <= count:
            p_x, o_x = on(p, x * p_step), on(o, x * o_step)
            four_values(v, v_step, keys, p_x, p_step, head_dim_v, o_x, o_step)
            x += 4
        if x + 2 <= count:
            p_x, o_x = on(p, x * p_step), on(o, x * o_step)
            two_values(v, v_step, keys, p_x, p_step, head_dim_v, o_x, o_step)
            x += 2
        if x < count:
            p_x, o_x = on(p, x * p_step), on(o, x * o_step)
            one_values(v, v_step, keys, p_x, p_step, head_dim_v, o_x, o_step)

    return Rows(scores, values)


def _products(element: types.Float, storage: int, count: int) -> tuple[Any, Any]:
    zero = np.dtype(str(element)).type(0)
    pointer = types.CPointer(element)
    size, load_stored, add_dots = _FORMATS[storage]
    line_cols = max(LINE // (size * lanes_of(element)), 1)
    at_once = HOST.sums
    height = at_once // count
    across = min(4, height)

    @routine(
        types.void(_bytes, _int, _int, pointer, _int, _int, element, pointer, _int),
        *(element, storage, count),
    )
    def row_scores(k, k_step, keys, q, q_step, head_dim, factor, s, s_step):
        one = splat(zero, 1)
        ahead = max(AHEAD // (head_dim * size), 1) * k_step
        nothing = shaped(one, at_once, 1)
        keys_at_once = shaped(one, height, 1)
        queries = shaped(one, count, 1)
        line = shaped(one, count, line_cols)
        whole = head_dim - head_dim % width(line)
        # Fewer keys than are summed at a time: each stands for all. Otherwise the last step goes
        # over some keys again, with the same result.
        step, stride = (k_step, height) if keys >= height else (0, 1)
        for start in range(0, keys, stride):
            j = min(start, keys - stride)
            k_rows = bytes_on(k, j * k_step)
            acc = nothing
            for d in range(0, whole, width(line)):
                k_d = bytes_on(k_rows, d * size)
                prefetch_rows(keys_at_once, bytes_on(k_d, ahead), step)
                acc = add_dots(acc, k_d, step, load(line, on(q, d), q_step))
            for d in range(whole, head_dim, lanes(one)):
                k_d = bytes_on(k_rows, d * size)
                acc = add_dots(acc, k_d, step, load(queries, on(q, d), q_step))
            sums = sum_lanes(acc)
            store_parts(on(s, j), s_step, sums * filled(sums, factor), count)

    @routine(
        types.void(_bytes, _int, _int, pointer, _int, _int, pointer, _int),
        *(element, storage, count),
    )
    def row_values(v, v_step, keys, p, p_step, head_dim_v, o, o_step):
        one = splat(zero, 1)
        ahead = max(AHEAD // (head_dim_v * size), 1) * v_step
        wide = shaped(one, count, across)
        narrow = shaped(one, count, 1)
        wide_row = shaped(one, 1, across)
        whole = head_dim_v - head_dim_v % width(wide)
        for start in range(0, keys, RUN_NARROW):
            stop = min(start + RUN_NARROW, keys)
            for f in range(0, whole, width(wide)):
                acc = wide
                for j in range(start, stop):
                    v_row = load_stored(wide_row, bytes_on(v, j * v_step + f * size), 0)
                    acc = add_row(acc, on(p, j), p_step * itemsize(p), v_row)
                    for z in range(0, lanes(one) * across * size, LINE):
                        prefetch_rows(one, bytes_on(v, ahead + j * v_step + f * size + z), 0)
                at = on(o, f)
                store(at, o_step, acc + load(wide, at, o_step))
            for f in range(whole, head_dim_v, width(narrow)):
                rest = narrow
                for j in range(start, stop):
                    v_part = load_stored(one, bytes_on(v, j * v_step + f * size), 0)
                    rest = add_row(rest, on(p, j), p_step * itemsize(p), v_part)
                at = on(o, f)
                store(at, o_step, rest + load(narrow, at, o_step))

    return row_scores, row_values


@cache
def row_softmax(element: types.Float) -> Any:
    """Compile the softmax of rows of scores."""
    zero = np.dtype(str(element)).type(0)
    pointer = types.CPointer(element)

    @routine(types.void(pointer, _int, _int, _int, pointer, pointer), element)
    def row_softmax(s, s_step, count, keys, row_max, row_sum):
        """``P = exp(S - max)`` in place of S, with every row's maximum and sum.

        Writes up to a stack of registers behind the last key. Edge cases as in ``softmax``.
        """
        one = splat(zero, 1)
        many = stack(one)
        step = rows(many) * lanes(one)
        for x in range(count):
            s_x = on(s, x * s_step)
            for j in range(keys, (keys + step - 1) // step * step):
                s_x[j] = -np.inf
            highest = repeated(many, hidden(one))
            for j in range(0, keys, step):
                highest = maximum(highest, load(many, on(s_x, j), lanes(one)))
            row_max[x] = maximum_across(highest)
            base = repeated(many, filled(one, row_max[x]))
            base = where_less(base, lowest(many), zeros(many), base)
            total = zeros(many)
            for j in range(0, keys, step):
                at = on(s_x, j)
                p = exp(load(many, at, lanes(one)) - base)
                store(at, lanes(one), p)
                total = total + p
            row_sum[x] = sum_across(total)

    return row_softmax


@cache
def key_scaler(element: types.Float) -> Any:
    """Compile the scaling of what belongs to keys of 8 bits."""
    pointer = types.CPointer(element)

    @routine(types.void(pointer, _int, _int, _int, types.CPointer(types.float32)), element)
    def scale_keys(p, p_step, count, keys, scales):
        """``P[x, j] * scale[j]``."""
        for x in range(count):
            for j in range(keys):
                p[x * p_step + j] *= scales[j]

    return scale_keys


@cache
def careful_rows(element: types.Float) -> Any:
    """Compile what keeps a hidden NaN or Inf in V from an output: there 0 * V is not 0."""
    zero = np.dtype(str(element)).type(0)
    pointer = types.CPointer(element)

    @routine(types.void(pointer, _int, _int, pointer, pointer, _int, _int, _int, pointer), element)
    def row_values_seen(v, v_step, keys, s, p, p_step, count, head_dim_v, o):
        """``values``, in the same order, without V where the score ``s`` hides the key."""
        one = splat(zero, 1)
        for x in range(count):
            for start in range(0, keys, RUN_NARROW):
                for f in range(0, head_dim_v, lanes(one)):
                    acc = zeros(one)
                    for j in range(start, min(start + RUN_NARROW, keys)):
                        at = x * p_step + j
                        if s[at] != -np.inf:
                            v_part = load(one, on(bytes_on(v, j * v_step), f), 0)
                            acc = fma(filled(one, p[at]), v_part, acc)
                    to = on(o, x * head_dim_v + f)
                    store(to, 0, acc + load(one, to, 0))

    return row_values_seen
