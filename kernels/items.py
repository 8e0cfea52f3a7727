"""What every kernel does with the problem's record: work items, rows, and the switches of a tile.

The part of a kernel that does not depend on how its products are made: where the rows of a
work item lie, which keys they see, and what happens to their scores before the softmax.
Every variant is a switch for a whole tile, and stands in ``look`` or ``modify`` alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from .compile import glue, inline, routine
from .modifiers import modifiers
from .record import ABSENT, BLOCK_KV, FLOAT32, FLOAT64, PROBLEM
from .simd.pointers import address, itemsize, on, pointer, record_type
from .staging import staging
from .visibility import (
    BATCH,
    BIAS,
    EVERYTHING,
    MASK,
    POSITION,
    SEQLEN_Q,
    SOMETHING,
    ask,
    first_bits,
    places_in,
    visibility,
)

_BYTE = np.uint8(0)
_INTEGER = np.int64(0)
_SINGLE = np.float32(0)

problem_at = record_type(PROBLEM)


class Item(NamedTuple):
    """What a work item is about: one kv head of one batch entry."""

    batch: int
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
    seqlen_q: int
    pages: int  # address of the numbers of its pages, or 0
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
    lse, seqlen_q = problem.lse, problem.seqlen_q
    if problem.starts != 0:
        starts = pointer(problem.starts, _INTEGER)
        seqlen_q = starts[batch + 1] - starts[batch]
        lse += starts[batch] * size if lse != 0 else 0
    elif lse != 0:
        lse += batch * problem.num_heads * seqlen_q * size
    k_base = _entry(problem, k.base, k.batch_step, 1, batch)
    v_base = _entry(problem, v.base, v.batch_step, 2, batch)
    k_scale = problem.k_scale.base + batch * problem.k_scale.batch_step
    v_scale = problem.v_scale.base + batch * problem.v_scale.batch_step
    pages = problem.pages
    if pages != 0:
        # Shared by all: a table says which pages are whose.
        pages += batch * problem.pages_step * 8
        k_base, v_base = k.base, v.base
        k_scale, v_scale = problem.k_scale.base, problem.v_scale.base
    return Item(
        batch,
        kv_head,
        _entry(problem, q.base, q.batch_step, 0, batch),
        k_base,
        v_base,
        _entry(problem, out.base, out.batch_step, 3, batch),
        _entry(problem, mask.base, mask.batch_step, 4, batch),
        _entry(problem, bias.base, bias.batch_step, 5, batch),
        k_scale,
        v_scale,
        lse,
        seqlen_q,
        pages,
        length,
        position,
    )


@glue
def row_at(operand, base, head, query):
    """A row of q, out, mask or bias."""
    return pointer(base + head * operand.head_step + query * operand.row_step, _BYTE)


@glue
def key_address(problem, item, operand, base, key):
    """Address of what belongs to a key: a row of k or v, or its scale."""
    start = base + item.kv_head * operand.head_step
    if item.pages != 0:
        page = pointer(item.pages, _INTEGER)[key // problem.page_size]
        return start + page * operand.batch_step + key % problem.page_size * operand.row_step
    return start + key * operand.row_step


@glue
def scale_of(problem, item, operand, base, key):
    """The scale of an 8-bit row of k or v."""
    return pointer(key_address(problem, item, operand, base, key), _SINGLE)[0]


@glue
def lie_together(problem):
    """Whether the keys of a block lie in one piece of memory."""
    return problem.pages == 0 or problem.page_size % BLOCK_KV == 0


# ---------------------------------------------------------------------------
# Between the products
# ---------------------------------------------------------------------------


class Between(NamedTuple):
    """The glue for one accumulation type.

    A ``scratch`` is anything with S^T ``s``, and beside it ``term``, ``rows``, ``lanes`` (two
    elements for each query), ``words`` (two for each query) and ``asked`` (``ASKED`` words).
    """

    read_keys: Any
    block: Any
    is_whole: Any
    find_places: Any
    look: Any
    changes_scores: Any
    modify: Any
    hides: Any
    sees_a_key: Any


@cache
def between(element: types.Float) -> Between:
    """Make the glue."""
    zero = np.dtype(str(element)).type(0)
    size = element.bitwidth // 8
    native = FLOAT32 if element == types.float32 else FLOAT64
    change = modifiers(element)
    stage = staging(element)
    see = visibility()

    @glue
    def read_keys(problem, item, operand, base, length, padded, key, keys, staged):
        """Convert rows of K or V to scratch, and pad them with zeros."""
        for j in range(keys):
            row = on(staged, j * padded)
            source = pointer(key_address(problem, item, operand, base, key + j), _BYTE)
            stage.read_row(row, source, operand.step, length, operand.storage)
            for d in range(length, padded):
                row[d] = 0

    @glue
    def block(problem, item, operand, base, scale, scale_base, length, key, keys, staged):
        """A block of K or V and the bytes between its rows: in place, or converted to scratch."""
        if (
            operand.storage == native
            and (operand.step == itemsize(staged) or length == 1)
            and lie_together(problem)
        ):
            start = key_address(problem, item, operand, base, key)
            return pointer(start, staged), operand.row_step
        read_keys(problem, item, operand, base, length, length, key, keys, staged)
        if scale.storage != ABSENT:
            for j in range(keys):
                factor = scale_of(problem, item, scale, scale_base, key + j)
                for d in range(j * length, (j + 1) * length):
                    staged[d] *= factor
        return staged, length * itemsize(staged)

    @glue
    def is_whole(operand, length, queries, count, places):
        """Whether the rows of a full tile are of one head and can be read or written in place."""
        return (
            count == queries
            and places.heads[0] == places.heads[queries - 1]
            and operand.storage == native
            and (operand.step == size or length == 1)
        )

    @glue
    def find_places(problem, item, queries, row, count, places):
        """Where the queries stand, and which keys each may see."""
        entry = places.entry
        entry[BATCH], entry[SEQLEN_Q], entry[POSITION] = item.batch, item.seqlen_q, item.position
        entry[MASK], entry[BIAS] = item.mask, item.bias
        integers = places.heads
        see.find_places(
            address(problem), integers, queries, row, count, item.kv_head, item.seqlen_kv
        )

    @glue
    def look(problem, queries, count, key, keys, places, scratch):
        """What the queries see of a block of keys; where that is SOMETHING, their words say it."""
        block = (queries, count, key, keys)
        return see.look(address(problem), places.heads, *block, scratch.words, scratch.asked)

    # -----------------------------------------------------------------------
    # What happens to scores
    # -----------------------------------------------------------------------

    @glue
    def read_bias(problem, x, key, keys, places, row):
        """Read the bias of a query through the caller's strides."""
        bias = problem.bias
        first = row_at(bias, places.entry[BIAS], places.heads[x], places.rows[x])
        stage.read_row(row, on(first, key * bias.step), bias.step, keys, bias.storage)

    @glue
    def changes_scores(problem):
        """Whether anything happens to visible scores."""
        return (
            problem.softcap != 0
            or problem.slopes != 0
            or problem.bias.storage != ABSENT
            or problem.score_mod.address != 0
        )

    @glue
    def hides(problem, sees):
        """Whether scores of a block that is seen so may be hidden after ``modify``."""
        return sees == SOMETHING or problem.bias.storage != ABSENT or problem.score_mod.address != 0

    floats, words = types.CPointer(element), types.CPointer(types.int64)

    @routine(
        types.void(*(types.int64, words, *[types.intp] * 5, floats, floats, floats, floats, words)),
        element,
    )
    def modify_tile(
        problem_address, integers, queries, count, key, keys, sees, s, term, rows, lanes, asked
    ):
        """All that happens to the scores of a block, in the order of the contract."""
        problem = problem_at(problem_address)
        places = places_in(integers, queries)
        bias, score_mod = problem.bias, problem.score_mod
        if problem.softcap != 0:
            change.cap(queries, s, keys, problem.softcap)
        if problem.slopes != 0:
            distances, factors = lanes, on(lanes, queries)
            slopes = on(pointer(problem.slopes, zero), places.entry[BATCH] * problem.slopes_step)
            for x in range(queries):
                distances[x] = places.rows[x] + places.entry[POSITION] - key
                factors[x] = slopes[places.heads[x]]
            change.penalise(queries, s, keys, distances, factors)
        if bias.storage != ABSENT:
            # A score_mod may undo what a bias hides: then the bias is needed once more.
            if score_mod.address == 0 and is_whole(bias, keys, queries, count, places):
                first = row_at(bias, places.entry[BIAS], places.heads[0], places.rows[0])
                source = pointer(address(first) + key * bias.step, zero)
                change.add_rows(queries, s, keys, source, bias.row_step)
            else:
                for x in range(count):
                    read_bias(problem, x, key, keys, places, on(rows, x * BLOCK_KV))
                stage.transpose_rows(term, queries, rows, BLOCK_KV, queries, keys)
                change.add(queries, s, keys, term)
        if score_mod.address != 0:
            ask(score_mod, queries, key, keys, places, address(s), places.visible, asked)
            if bias.storage != ABSENT:
                change.hide_low(queries, s, keys, term)
        if sees == SOMETHING:
            change.hide(queries, s, keys, places.visible)

    @glue
    def modify(problem, queries, count, key, keys, sees, places, scratch):
        """All that happens to the scores of a block."""
        tile = (queries, count, key, keys, sees, scratch.s, scratch.term, scratch.rows)
        modify_tile(address(problem), places.heads, *tile, scratch.lanes, scratch.asked)

    @routine(types.intp(types.int64, words, *[types.intp] * 3, floats, words, words), element)
    def find_seen(problem_address, integers, queries, count, x, row, room, asked):
        """1 if query ``x`` sees a key, or 0."""
        problem = problem_at(problem_address)
        places = places_in(integers, queries)
        begin = places.first[x] // BLOCK_KV * BLOCK_KV
        for key in range(begin, places.last[x] + 1, BLOCK_KV):
            keys = min(BLOCK_KV, places.extent[3] + 1 - key)
            sees = see.look(problem_address, integers, queries, count, key, keys, room, asked)
            word = np.int64(0)
            if sees == EVERYTHING:
                word = first_bits(keys)
            elif sees == SOMETHING:
                word = places.visible[x]
            if word != 0 and problem.bias.storage != ABSENT:
                read_bias(problem, x, key, keys, places, row)
                for n in range(keys):
                    if row[n] == -np.inf:
                        word &= ~(np.int64(1) << n)
            if word != 0:
                return 1
        return 0

    @glue
    def sees_a_key(problem, queries, count, x, places, scratch):
        """Whether query ``x`` sees any key: asked only if all its scores are -inf."""
        if problem.score_mod.address != 0:
            return False  # that is what hides them
        tile = (places.heads, queries, count, x, scratch.rows, scratch.words, scratch.asked)
        return find_seen(address(problem), *tile) != 0

    return Between(
        read_keys, block, is_whole, find_places, look, changes_scores, modify, hides, sees_a_key
    )
