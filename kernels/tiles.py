"""The two products of attention on one tile: scores and weighted sum.

SIMD lanes are queries. With K and V as the caller has them, one element of K or V at
a time is broadcast and multiplied with one row of queries::

    Q^T, packed once            K, in place                 S^T
    d=0 | q0 q1 ... |           key 0 | k0 k1 k2 ... |      key 0 | s s s ... |
    d=1 | q0 q1 ... |     x     key 1 | k0 k1 k2 ... |  =   key 1 | s s s ... |
    ...                         ...                         ...     lanes = queries

    P^T                         V, in place                 O^T
    key 0 | p p p ... |         key 0 | v0 v1 v2 ... |      f=0 | o o o ... |
    key 1 | p p p ... |   x     key 1 | v0 v1 v2 ... |  =   f=1 | o o o ... |
    ...                         ...                         ...     lanes = queries

Both are the same step, ``add_outer``, in another order: rows of the accumulators are
keys in the first and features in the second product. Where the CPU has a unit for it, an
element is a pair of bfloat16 and the step a dot of two of them (``operands.py``).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import literal_unroll, types

from .compile import glue, inline, routine
from .simd.arithmetic import add_rows, any_nan, dot_pairs, fma, seen_pairs, where_less
from .simd.pointers import bytes_on, itemsize, on
from .simd.products import accumulate, add_outer, add_outer_pairs
from .simd.registers import (
    accumulators,
    filled,
    lanes,
    load,
    load_apart,
    lowest,
    ones,
    rows,
    splat,
    stack,
    store,
    width,
    zeros,
)

_int = types.intp

# How many steps are summed one after the other before they are added to the rest. The error of a
# sum grows with the length of its longest run. A matrix product of many queries sums runs of some
# hundred, one of few queries short ones: neither is to be more accurate than this.
RUN_WIDE = 64
RUN_NARROW = 8


@glue
def even_run(count, longest):
    """The length of runs of nearly equal length, none above ``longest``."""
    runs = max((count + longest - 1) // longest, 1)
    return (count + runs - 1) // runs


class Tiles(NamedTuple):
    """The routines for one shape of tile."""

    scores: Any
    values: Any


def _variant(element: types.Float, in_pairs: bool) -> tuple[Any, ...]:
    return (element, "pairs") if in_pairs else (element,)


@cache
def tiles(element: types.Float, cols: int, in_pairs: bool) -> Tiles:
    """Compile the products for tiles of ``cols`` registers of queries.

    With ``in_pairs`` an element of K, V, Q^T and P^T is a pair: for ``head_dim``, and ``keys`` of
    ``values``, stands half of them.
    """
    variant = *_variant(element, in_pairs), cols
    add = add_outer_pairs if in_pairs else add_outer
    zero = np.dtype(str(element)).type(0)
    pointer = types.CPointer(element)
    longest = RUN_NARROW if cols == 1 else RUN_WIDE

    @routine(types.void(pointer, _int, _int, pointer, _int, element, pointer), *variant)
    def scores(k, k_step, keys, q, head_dim, factor, s):
        """``S^T[j, :] = factor * sum_d K[j, d] Q^T[d, :]``, rows of K ``k_step`` bytes apart.

        Scaled after the sum: one rounding, where scaled queries would be one for every product.
        """
        like = splat(zero, cols)
        queries = width(like)
        nothing = accumulators(like)
        height = rows(nothing)
        whole = keys - keys % height
        run = even_run(head_dim, longest)
        for j in range(0, whole, height):
            s_rows = on(s, j * queries)
            k_rows = bytes_on(k, j * k_step)
            for start in range(0, head_dim, run):
                acc = nothing
                stop = min(start + run, head_dim)
                quads = stop - (stop - start) % 4
                for d in range(start, quads, 4):
                    for n in literal_unroll((0, 1, 2, 3)):
                        acc = add(acc, on(k_rows, d + n), k_step, on(q, (d + n) * queries))
                for d in range(quads, stop):
                    acc = add(acc, on(k_rows, d), k_step, on(q, d * queries))
                if start > 0:
                    acc = acc + load(acc, s_rows, queries)
                if start + run < head_dim:
                    store(s_rows, queries, acc)
                else:
                    store(s_rows, queries, acc * filled(acc, factor))
        for j in range(whole, keys):
            s_row = on(s, j * queries)
            k_row = bytes_on(k, j * k_step)
            rest_total = zeros(like)
            for start in range(0, head_dim, run):
                rest = zeros(like)
                for d in range(start, min(start + run, head_dim)):
                    rest = add(rest, on(k_row, d), k_step, on(q, d * queries))
                rest_total = rest + rest_total if start > 0 else rest
            store(s_row, queries, rest_total * filled(like, factor))

    @routine(types.void(pointer, _int, _int, pointer, pointer, _int, pointer), *variant)
    def values(v, v_step, keys, p, rescale, head_dim_v, o):
        """``O^T[f, :] = O^T[f, :] * rescale + sum_j V[j, f] P^T[j, :]``.

        Runs are summed from zero: the error grows with their number, not with that of the keys.
        """
        like = splat(zero, cols)
        queries = width(like)
        nothing = accumulators(like)
        height = rows(nothing)
        whole = head_dim_v - head_dim_v % height
        run = even_run(keys, longest)
        for start in range(0, keys, run):
            stop = min(start + run, keys)
            factor = load(like, rescale, 0) if start == 0 else ones(like)
            for f in range(0, whole, height):
                acc = nothing
                quads = stop - (stop - start) % 4
                for j in range(start, quads, 4):
                    for n in literal_unroll((0, 1, 2, 3)):
                        v_row = bytes_on(on(v, f), (j + n) * v_step)
                        acc = add(acc, v_row, itemsize(v), on(p, (j + n) * queries))
                for j in range(quads, stop):
                    v_row = bytes_on(on(v, f), j * v_step)
                    acc = add(acc, v_row, itemsize(v), on(p, j * queries))
                accumulate(acc, factor, on(o, f * queries), queries)
            for f in range(whole, head_dim_v):
                rest = zeros(like)
                for j in range(start, stop):
                    v_row = bytes_on(on(v, f), j * v_step)
                    rest = add(rest, v_row, itemsize(v), on(p, j * queries))
                accumulate(rest, factor, on(o, f * queries), queries)

    return Tiles(scores, values)


@cache
def nonfinite_finder(element: types.Float, in_pairs: bool = False) -> Any:
    """Compile the question whether V needs care: a hidden NaN or Inf must not reach an output.

    With ``in_pairs``, rows are padded with zeros to whole registers.
    """
    multiply_add = dot_pairs if in_pairs else fma
    zero = np.dtype(str(element)).type(0)
    pointer = types.CPointer(element)

    @routine(_int(pointer, _int, _int, _int), *_variant(element, in_pairs))
    def any_nonfinite(v, v_step, keys, head_dim_v):
        """Whether any of ``keys`` rows of V holds a NaN or Inf: 0 times those is NaN."""
        one = splat(zero, 1)
        many = stack(one)
        height, step = rows(many), lanes(one)
        whole = keys - keys % height
        full = (head_dim_v + step - 1 if in_pairs else head_dim_v) // step * step
        sums, rest, last = zeros(many), zeros(one), zero
        for f in range(0, full, step):
            column = on(v, f)
            for j in range(0, whole, height):
                block = load_apart(many, bytes_on(column, j * v_step), v_step)
                sums = multiply_add(block, zeros(many), sums)
            for j in range(whole, keys):
                row = load_apart(one, bytes_on(column, j * v_step), 0)
                rest = multiply_add(row, zeros(one), rest)
        for j in range(keys):
            row = bytes_on(v, j * v_step)
            for f in range(full, head_dim_v):
                last += row[f] * zero
        return any_nan(add_rows(rest + splat(last, 1), sums))

    return any_nonfinite


class CarefulTiles(NamedTuple):
    """The routines for values that some queries must not see."""

    copy: Any
    values_seen: Any


@cache
def careful_tiles(element: types.Float, in_pairs: bool) -> CarefulTiles:
    """Compile what keeps a hidden NaN or Inf in V from an output: there 0 * V is not 0.

    For tiles of any number of ``queries`` that is whole registers.
    """
    zero = np.dtype(str(element)).type(0)
    pointer = types.CPointer(element)
    multiply_add = dot_pairs if in_pairs else fma

    @inline
    def seen_element(one, s, queries, j, value):
        return where_less(load(one, on(s, j * queries), 0), lowest(one), zeros(one), value)

    @inline
    def seen_pair(one, s, queries, j, value):
        first = on(s, 2 * j * queries)
        return seen_pairs(load(one, first, 0), load(one, on(first, queries), 0), value)

    seen = seen_pair if in_pairs else seen_element

    @routine(types.void(_int, pointer, _int, pointer), element)
    def copy(queries, s, keys, target):
        """A second copy of S^T."""
        for n in range(keys * queries):
            target[n] = s[n]

    @routine(
        types.void(_int, pointer, _int, _int, pointer, pointer, pointer, _int, pointer, _int),
        *_variant(element, in_pairs),
    )
    def values_seen(queries, v, v_step, keys, s, p, rescale, head_dim_v, o, longest):
        """``values``, in the same order, with 0 for V where the score ``s`` hides the key."""
        one = splat(zero, 1)
        run = even_run(keys, longest)
        for x in range(0, queries, lanes(one)):
            for start in range(0, keys, run):
                stop = min(start + run, keys)
                factor = load(one, on(rescale, x), 0) if start == 0 else ones(one)
                for f in range(head_dim_v):
                    acc = zeros(one)
                    for j in range(start, stop):
                        value = filled(one, bytes_on(v, j * v_step)[f])
                        value = seen(one, on(s, x), queries, j, value)
                        acc = multiply_add(value, load(one, on(p, j * queries + x), 0), acc)
                    accumulate(acc, factor, on(o, f * queries + x), 0)

    return CarefulTiles(copy, values_seen)
