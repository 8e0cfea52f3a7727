"""How the operands of the two products lie in memory: one by one, or in pairs of bfloat16.

A dot-product unit multiplies two pairs and adds both products to a sum, in one instruction.
The pictures of ``tiles.py`` are then made of pairs, along the axis that is summed over::

    Q^T, packed once        K, in place              P^T, rounded            V, interleaved
    d=0,1 | qq qq ... |     key 0 | kk kk ... |      key 0,1 | pp pp ... |   key 0,1 | vv vv ... |
    d=2,3 | qq qq ... |     key 1 | kk kk ... |      key 2,3 | pp pp ... |   key 2,3 | vv vv ... |
    ...                     ...                      ...                     ...

A pair is as wide as a float32 and moved about as one: what loads, transposes and broadcasts
does not look at it. An odd axis ends with a zero. Sums stay in float32, and so do the scores
and all that happens to them.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from .compile import glue, routine
from .items import between, key_address, lie_together, row_at
from .record import BFLOAT
from .simd.arithmetic import paired
from .simd.pointers import address, itemsize, on, pointer
from .simd.registers import lanes, load, splat, store, zeros
from .staging import staging

_BYTE = np.uint8(0)
_BITS = np.uint16(0)
_PAIR = np.uint32(0)
_int = types.intp


class Operands(NamedTuple):
    """The ways from the caller's memory, and from the softmax, into the products."""

    per_step: int  # products that one step adds to a sum
    pack_queries: Any
    keys: Any
    values: Any
    weights: Any


@cache
def elements(element: types.Float) -> Operands:
    """Make the glue for one element at a time."""
    zero = np.dtype(str(element)).type(0)
    parts = between(element)
    stage = staging(element)

    @glue
    def pack_queries(problem, item, queries, count, tile, scratch):
        """Q^T of a tile; lanes behind ``count`` hold zeros."""
        places, q = tile.places, problem.q
        if parts.is_whole(q, problem.head_dim, queries, count, places):
            first = row_at(q, item.q, places.heads[0], places.rows[0])
            source = pointer(address(first), zero)
            stage.pack(tile.q, queries, source, q.row_step, problem.head_dim)
            return
        for x in range(queries):
            packed = on(scratch.rows, x * scratch.q_length)
            if x < count:
                source = row_at(q, item.q, places.heads[x], places.rows[x])
                stage.read_row(packed, source, q.step, problem.head_dim, q.storage)
            else:
                for d in range(problem.head_dim):
                    packed[d] = 0
        stage.transpose_rows(
            tile.q, queries, scratch.rows, scratch.q_length, queries, scratch.q_length
        )

    @glue
    def keys(problem, item, key, keys, scratch):
        """A block of K, and the bytes between its rows."""
        operand = (problem.k, item.k, problem.k_scale, item.k_scale, problem.head_dim)
        return parts.block(problem, item, *operand, key, keys, scratch.k)

    @glue
    def values(problem, item, key, keys, scratch):
        """A block of V, and the bytes between its rows."""
        operand = (problem.v, item.v, problem.v_scale, item.v_scale, problem.head_dim_v)
        return parts.block(problem, item, *operand, key, keys, scratch.v)

    @glue
    def weights(queries, keys, p):
        """P^T is what the product wants already."""

    return Operands(1, pack_queries, keys, values, weights)


@cache
def pairs(element: types.Float) -> Operands:
    """Compile what makes pairs of bfloat16; ``element`` is float32, to which a pair passes for."""
    zero = np.dtype(str(element)).type(0)
    parts = between(element)
    stage = staging(element)
    pointers = types.CPointer(element)
    bits, pair_bits = types.CPointer(types.uint16), types.CPointer(types.uint32)

    @glue
    def is_in_pairs(operand, length):
        """Whether rows are in pairs where the caller has them."""
        return operand.storage == BFLOAT and operand.step == 2 and length % 2 == 0

    @glue
    def round_row(row, length, target):
        """A row of floats, rounded to pairs."""
        target[(length - 1) // 2] = 0  # its second half, where ``length`` is odd
        stage.write_row(pointer(address(target), _BYTE), 2, row, length, BFLOAT)

    @glue
    def round_key(problem, item, operand, base, scale, scale_base, length, key, target, room):
        """A row of K or V, rounded to pairs; from float32 as it is, from other formats by it."""
        source = (operand, base, scale, scale_base, length)
        row, _ = parts.block(problem, item, *source, key, 1, room)
        round_row(row, length, target)

    @glue
    def pack_queries(problem, item, queries, count, tile, scratch):
        """Q^T of a tile in pairs; lanes behind ``count`` hold zeros."""
        places, q = tile.places, problem.q
        is_of_one_head = count == queries and places.heads[0] == places.heads[queries - 1]
        if is_of_one_head and is_in_pairs(q, problem.head_dim):
            first = row_at(q, item.q, places.heads[0], places.rows[0])
            source = pointer(address(first), zero)
            stage.pack(tile.q, queries, source, q.row_step, problem.head_dim // 2)
            return
        for x in range(queries):
            packed = on(scratch.k, x * scratch.q_length)
            for d in range(scratch.q_length):
                packed[d] = 0
            if x < count:
                source = row_at(q, item.q, places.heads[x], places.rows[x])
                stage.read_row(scratch.rows, source, q.step, problem.head_dim, q.storage)
                round_row(scratch.rows, problem.head_dim, packed)
        stage.transpose_rows(
            tile.q, queries, scratch.k, scratch.q_length, queries, scratch.q_length
        )

    @glue
    def keys(problem, item, key, keys, scratch):
        """A block of K, and the bytes between its rows: in place, or rounded."""
        k, length = problem.k, problem.head_dim
        if is_in_pairs(k, length) and lie_together(problem):
            return pointer(key_address(problem, item, k, item.k, key), zero), k.row_step
        operand = (k, item.k, problem.k_scale, item.k_scale, length)
        for j in range(keys):
            target = on(scratch.k, j * scratch.q_length)
            round_key(problem, item, *operand, key + j, target, scratch.rows)
        return scratch.k, scratch.q_length * itemsize(scratch.k)

    @glue
    def value_row(problem, item, key, target, room):
        """A row of V in bfloat16: in place, or rounded."""
        v, length = problem.v, problem.head_dim_v
        if v.storage == BFLOAT and (v.step == 2 or length == 1):
            return pointer(key_address(problem, item, v, item.v, key), _BITS)
        operand = (v, item.v, problem.v_scale, item.v_scale, length)
        round_key(problem, item, *operand, key, target, room)
        return pointer(address(target), _BITS)

    @routine(types.void(pair_bits, _int, bits, bits, _int, _int), element)
    def interleave(target, padded, first, second, count, length):
        """Pairs of two rows; of ``count`` 1, with zeros. Zeros up to ``padded`` too."""
        if count == 2:
            for n in range(length):
                target[n] = np.uint32(first[n]) | np.uint32(second[n]) << np.uint32(16)
        else:
            for n in range(length):
                target[n] = np.uint32(first[n])
        for n in range(length, padded):
            target[n] = 0

    @glue
    def values(problem, item, key, keys, scratch):
        """A block of V in pairs of keys, and the bytes between its rows."""
        room = scratch.rows
        first, second = on(room, scratch.longest), on(room, 2 * scratch.longest)
        padded = scratch.v_length
        for j in range(0, keys, 2):
            count = min(2, keys - j)
            a = value_row(problem, item, key + j, first, room)
            b = value_row(problem, item, key + j + 1, second, room) if count == 2 else a
            target = pointer(address(on(scratch.v, j // 2 * padded)), _PAIR)
            interleave(target, padded, a, b, count, problem.head_dim_v)
        return scratch.v, padded * itemsize(scratch.v)

    @routine(types.void(_int, _int, pointers), element)
    def weights(queries, keys, p):
        """P^T in pairs of keys: each takes the place of two rows."""
        one = splat(zero, 1)
        for j in range(0, keys, 2):
            for x in range(0, queries, lanes(one)):
                first = on(p, j * queries + x)
                second = zeros(one) if j + 1 == keys else load(one, on(first, queries), 0)
                store(on(p, j // 2 * queries + x), 0, paired(load(one, first, 0), second))

    return Operands(2, pack_queries, keys, values, weights)
