"""What may happen to a score tile between the product and the softmax, one function each.

Each goes over the rows of S^T once.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from .compile import routine
from .simd.arithmetic import fma, magnitude, where_bit, where_less
from .simd.functions import tanh
from .simd.pointers import bytes_on, on, prefetch
from .simd.products import load_transposed
from .simd.registers import (
    filled,
    hidden,
    lanes,
    load,
    lowest,
    ones,
    rows,
    splat,
    square,
    stack,
    store,
    zeros,
)


class Modifiers(NamedTuple):
    """The routines for one accumulation type."""

    cap: Any
    penalise: Any
    add: Any
    add_rows: Any
    hide_low: Any
    hide: Any


@cache
def modifiers(element: types.Float) -> Modifiers:
    """Compile the modifiers, for tiles of any number of ``queries`` that is whole registers."""
    zero = np.dtype(str(element)).type(0)
    pointer = types.CPointer(element)
    words = types.CPointer(types.int64)
    integer = types.intp

    @routine(types.void(integer, pointer, integer, element), element)
    def cap(queries, s, keys, softcap):
        """``softcap * tanh(s)``, of scores that are divided by the softcap already."""
        one = splat(zero, 1)
        many = stack(one)
        step = rows(many) * lanes(one)
        total = keys * queries
        whole = total - total % step
        for n in range(0, whole, step):
            bent = tanh(load(many, on(s, n), lanes(one)))
            store(on(s, n), lanes(one), bent * filled(many, softcap))
        for n in range(whole, total, lanes(one)):
            store(on(s, n), 0, tanh(load(one, on(s, n), 0)) * filled(one, softcap))

    @routine(types.void(integer, pointer, integer, pointer, pointer), element)
    def penalise(queries, s, keys, distance, slopes):
        """``s - slope |distance - j|``, with a slope and the distance to key 0 of every query."""
        one = splat(zero, 1)
        for x in range(0, queries, lanes(one)):
            factor = zeros(one) - load(one, on(slopes, x), 0)
            apart = load(one, on(distance, x), 0)
            for j in range(keys):
                at = on(s, j * queries + x)
                store(at, 0, fma(factor, magnitude(apart), load(one, at, 0)))
                apart = apart - ones(one)

    @routine(types.void(integer, pointer, integer, pointer), element)
    def add(queries, s, keys, bias):
        """``s + bias``, transposed like S^T; -inf hides the key, whatever its score is."""
        one = splat(zero, 1)
        for n in range(0, keys * queries, lanes(one)):
            term = load(one, on(bias, n), 0)
            score = load(one, on(s, n), 0) + term
            store(on(s, n), 0, where_less(term, lowest(one), hidden(one), score))

    @routine(types.void(integer, pointer, integer, pointer, integer), element)
    def add_rows(queries, s, keys, bias, row_step):
        """The same with the rows of a bias where the caller has them, ``row_step`` bytes apart.

        Meanwhile the next block of keys comes nearer.
        """
        one = splat(zero, 1)
        block = square(one)
        size = lanes(one)
        whole = keys - keys % size
        for x in range(0, queries, size):
            source = bytes_on(bias, x * row_step)
            for j in range(0, whole, size):
                term = load_transposed(block, on(source, j), row_step)
                for lane in range(size):
                    prefetch(bytes_on(on(source, keys + j), lane * row_step))
                at = on(s, j * queries + x)
                score = load(block, at, queries) + term
                store(at, queries, where_less(term, lowest(block), term, score))
            for j in range(whole, keys):
                for lane in range(size):
                    value = bytes_on(source, lane * row_step)[j]
                    n = j * queries + x + lane
                    s[n] = value if value == -np.inf else s[n] + value

    @routine(types.void(integer, pointer, integer, pointer), element)
    def hide_low(queries, s, keys, bias):
        """-inf where a bias, transposed like S^T, is -inf."""
        one = splat(zero, 1)
        for n in range(0, keys * queries, lanes(one)):
            term = load(one, on(bias, n), 0)
            store(on(s, n), 0, where_less(term, lowest(one), hidden(one), load(one, on(s, n), 0)))

    @routine(types.void(integer, pointer, integer, words), element)
    def hide(queries, s, keys, visible):
        """-inf for key j where bit j of the query's word is not set."""
        one = splat(zero, 1)
        many = stack(one)
        height = rows(many)
        whole = keys - keys % height
        for x in range(0, queries, lanes(one)):
            word = on(visible, x)
            for j in range(0, whole, height):
                at = on(s, j * queries + x)
                score = load(many, at, queries)
                store(at, queries, where_bit(word, j, score, hidden(many)))
            for j in range(whole, keys):
                at = on(s, j * queries + x)
                store(at, 0, where_bit(word, j, load(one, at, 0), hidden(one)))

    return Modifiers(cap, penalise, add, add_rows, hide_low, hide)
