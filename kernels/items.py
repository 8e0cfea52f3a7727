"""What every kernel does with the problem's record: work items, rows, and the switches of a tile.

The part of a kernel that does not depend on how its products are made: where the rows of a
work item lie, which keys they see, and what happens to their scores before the softmax.
Every variant is a switch for a whole tile, and stands in ``modify`` alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from .compile import glue, inline
from .modifiers import modifiers
from .record import ABSENT, FLOAT32, FLOAT64, PROBLEM
from .simd import itemsize, on, pointer, record_type
from .staging import staging

# Keys of one block: K and V of 64 keys with a head_dim of 64 fill the first-level cache together
# with the scores. A multiple of every number of lanes.
BLOCK_KV = 64

_BYTE = np.uint8(0)
_INTEGER = np.int64(0)

problem_at = record_type(PROBLEM)


class Item(NamedTuple):
    """What a work item is about: one kv head of one batch entry."""

    kv_head: int
    q: int  # addresses of the batch entry in every array
    k: int
    v: int
    out: int
    mask: int
    bias: int
    k_scale: int
    v_scale: int
    lse: int
    seqlen_kv: int
    position: int  # key at which query 0 stands


# ---------------------------------------------------------------------------
# Addresses
# ---------------------------------------------------------------------------


@glue
def _entry(problem, base, batch_step, index, batch):
    """Address of one batch entry of an array."""
    if problem.offsets != 0:
        offsets = pointer(problem.offsets, _INTEGER)
        return base + offsets[index * problem.batches + batch]
    return base + batch * batch_step


@inline
def item_of(problem, kv_head, batch, size):
    """The work item of a kv head of a batch entry; ``size`` is that of an element of lse."""
    q, k, v, out = problem.q, problem.k, problem.v, problem.out
    mask, bias = problem.mask, problem.bias
    length, position = problem.length, problem.position
    if problem.lengths != 0:
        length = pointer(problem.lengths, _INTEGER)[batch]
    if problem.positions != 0:
        position = pointer(problem.positions, _INTEGER)[batch]
    lse = problem.lse
    if lse != 0:
        lse += batch * problem.num_heads * problem.seqlen_q * size
    return Item(
        kv_head,
        _entry(problem, q.base, q.batch_step, 0, batch),
        _entry(problem, k.base, k.batch_step, 1, batch),
        _entry(problem, v.base, v.batch_step, 2, batch),
        _entry(problem, out.base, out.batch_step, 3, batch),
        _entry(problem, mask.base, mask.batch_step, 4, batch),
        _entry(problem, bias.base, bias.batch_step, 5, batch),
        problem.k_scale.base + batch * problem.k_scale.batch_step,
        problem.v_scale.base + batch * problem.v_scale.batch_step,
        lse,
        length,
        position,
    )


@glue
def head_and_query(problem, item, row):
    """The rows of a kv head are the queries of its first query head, then of its second..."""
    group_size = problem.num_heads // problem.num_kv_heads
    return item.kv_head * group_size + row // problem.seqlen_q, row % problem.seqlen_q


@glue
def row_at(problem, item, operand, base, row):
    """A row of q, out, mask or bias."""
    head, query = head_and_query(problem, item, row)
    return pointer(base + head * operand.head_step + query * operand.row_step, _BYTE)


@glue
def row_address(operand, base, kv_head, key):
    """Address of a row of k or v."""
    return base + kv_head * operand.head_step + key * operand.row_step


# ---------------------------------------------------------------------------
# Between the products
# ---------------------------------------------------------------------------


class Between(NamedTuple):
    """The glue for one accumulation type.

    A ``tile`` is anything with the ``first`` and ``last`` visible key of each query, and the
    ``extent`` of both; a ``scratch`` anything with S^T ``s``, ``term``, ``rows``, ``begin`` and
    ``end``.
    """

    block: Any
    find_bounds: Any
    is_touched: Any
    modify: Any
    sees_a_key: Any


@cache
def between(element: types.Float) -> Between:
    """Make the glue."""
    native = FLOAT32 if element == types.float32 else FLOAT64
    modify_scores = modifiers(element)
    stage = staging(element)

    @glue
    def block(operand, base, kv_head, length, key, keys, staged):
        """A block of K or V and the bytes between its rows: in place, or converted to scratch."""
        start = row_address(operand, base, kv_head, key)
        if operand.storage == native and (operand.step == itemsize(staged) or length == 1):
            return pointer(start, staged), operand.row_step
        for j in range(keys):
            source = pointer(start + j * operand.row_step, _BYTE)
            stage.read_row(on(staged, j * length), source, operand.step, length, operand.storage)
        return staged, length * itemsize(staged)

    @glue
    def find_bounds(problem, item, queries, row, count, tile):
        """The first and the last key that each query sees, and their extremes in the tile.

        Where the first is behind the last, a query sees nothing, as lanes behind ``count`` do.
        """
        extent = tile.extent
        extent[0], extent[1] = item.seqlen_kv, 0
        extent[2], extent[3] = item.seqlen_kv, -1
        start = 0
        while start < count:
            # A stretch of one head: both ends rise with the query, and LLVM sees whole registers.
            query = (row + start) % problem.seqlen_q
            stop = min(count, start + problem.seqlen_q - query)
            position = query + item.position
            for x in range(start, stop):
                tile.first[x] = max(position + (x - start) - problem.left, 0)
                tile.last[x] = min(position + (x - start) + problem.right, item.seqlen_kv - 1)
            extent[0] = min(extent[0], tile.first[start])
            extent[1] = max(extent[1], tile.first[stop - 1])
            extent[2] = min(extent[2], tile.last[start])
            extent[3] = max(extent[3], tile.last[stop - 1])
            start = stop
        for x in range(count, queries):
            tile.first[x] = item.seqlen_kv
            tile.last[x] = -1

    @glue
    def is_partial(tile, key, keys):
        return tile.extent[1] > key or tile.extent[2] < key + keys - 1

    @glue
    def is_touched(problem, tile, key, keys):
        """Whether ``modify`` has anything to do for a block of keys."""
        return (
            problem.bias.storage != ABSENT
            or problem.mask.storage != ABSENT
            or is_partial(tile, key, keys)
        )

    @glue
    def add_term(problem, item, operand, base, queries, row, count, key, keys, scratch):
        """Add a mask or bias, read through the caller's strides, to a score tile."""
        for x in range(count):
            source = on(row_at(problem, item, operand, base, row + x), key * operand.step)
            stage.read_row(
                on(scratch.rows, x * BLOCK_KV), source, operand.step, keys, operand.storage
            )
        stage.transpose_rows(scratch.term, queries, scratch.rows, BLOCK_KV, queries, keys)
        modify_scores.add_bias(queries, scratch.s, keys, scratch.term)

    @glue
    def modify(problem, item, queries, row, count, key, keys, tile, scratch):
        """All that happens to the scores of a block; returns whether it may have hidden some."""
        some_hidden = False
        bias = problem.bias
        if bias.storage != ABSENT:
            add_term(problem, item, bias, item.bias, queries, row, count, key, keys, scratch)
            some_hidden = True
        mask = problem.mask
        if mask.storage != ABSENT:
            add_term(problem, item, mask, item.mask, queries, row, count, key, keys, scratch)
            some_hidden = True
        if is_partial(tile, key, keys):
            for x in range(queries):
                scratch.begin[x] = max(tile.first[x] - key, 0)
                scratch.end[x] = min(max(tile.last[x] - key, -1), BLOCK_KV)
            modify_scores.hide_outside(queries, scratch.s, keys, scratch.begin, scratch.end)
            some_hidden = True
        return some_hidden

    @glue
    def sees_a_key(problem, item, row, first, last, term):
        """Whether any key is visible to a row: asked only of rows whose scores are all -inf."""
        for key in range(first, last + 1):
            visible = True
            mask = problem.mask
            if mask.storage != ABSENT:
                source = on(row_at(problem, item, mask, item.mask, row), key * mask.step)
                stage.read_row(term, source, mask.step, 1, mask.storage)
                visible = term[0] != -np.inf
            bias = problem.bias
            if bias.storage != ABSENT:
                source = on(row_at(problem, item, bias, item.bias, row), key * bias.step)
                stage.read_row(term, source, bias.step, 1, bias.storage)
                visible = visible and term[0] != -np.inf
            if visible:
                return True
        return False

    return Between(block, find_bounds, is_touched, modify, sees_a_key)
