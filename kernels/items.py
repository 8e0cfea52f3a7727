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

from .compile import glue, inline
from .modifiers import modifiers
from .record import ABSENT, BLOCK_KV, FLOAT32, FLOAT64, HIDDEN, PARTIAL, PROBLEM, TILE, VISIBLE
from .simd import address, call_kernel, itemsize, on, pointer, record_type
from .staging import staging
from .visibility import (
    EVERYTHING,
    NOTHING,
    SOMETHING,
    block_state,
    first_bits,
    visibility,
)

# Words that ``ask`` needs in scratch to describe a tile to a function of the caller's.
ASKED = TILE.itemsize // 8

_BYTE = np.uint8(0)
_INTEGER = np.int64(0)
_SINGLE = np.float32(0)

problem_at = record_type(PROBLEM)
tile_at = record_type(TILE)


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


class Places(NamedTuple):
    """Where the queries of a tile stand and what they see, one number of each for every query."""

    heads: Any  # query head
    rows: Any  # number in that head
    first: Any  # first and last visible key; behind each other where there is none
    last: Any
    visible: Any  # the words of ``visibility``, for the block of keys that was looked at last
    extent: Any  # smallest and largest of first, smallest and largest of last


# Integers of ``Places``, beside five for each query.
EXTENT = 4


@glue
def places_in(integers, queries):
    """``Places`` in memory for 5 * queries + EXTENT integers."""
    rows = on(integers, queries)
    first = on(rows, queries)
    last = on(first, queries)
    visible = on(last, queries)
    return Places(integers, rows, first, last, visible, on(visible, queries))


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
        """Where the queries stand, the first and last key that each sees, and their extremes.

        The rows of a kv head are the queries of its first query head, then of its second...
        Lanes behind ``count`` see nothing; they stand where the first does.
        """
        extent = places.extent
        extent[0], extent[1] = item.seqlen_kv, 0
        extent[2], extent[3] = item.seqlen_kv, -1
        first_head = item.kv_head * (problem.num_heads // problem.num_kv_heads)
        start = 0
        while start < count:
            # A stretch of one head: both ends rise with the query, and LLVM sees whole registers.
            head = first_head + (row + start) // item.seqlen_q
            query = (row + start) % item.seqlen_q
            stop = min(count, start + item.seqlen_q - query)
            position = query + item.position
            for x in range(start, stop):
                places.heads[x] = head
                places.rows[x] = query + (x - start)
                places.first[x] = max(position + (x - start) - problem.left, 0)
                places.last[x] = min(position + (x - start) + problem.right, item.seqlen_kv - 1)
            extent[0] = min(extent[0], places.first[start])
            extent[1] = max(extent[1], places.first[stop - 1])
            extent[2] = min(extent[2], places.last[start])
            extent[3] = max(extent[3], places.last[stop - 1])
            start = stop
        for x in range(count, queries):
            places.heads[x] = places.heads[0]
            places.rows[x] = places.rows[0]
            places.first[x] = item.seqlen_kv
            places.last[x] = -1

    # -----------------------------------------------------------------------
    # What queries see
    # -----------------------------------------------------------------------

    @glue
    def ask(function, item, queries, key, keys, places, words, scratch):
        """Call a function of the caller's for a tile of scores, or of words."""
        asked = tile_at(address(scratch.asked))
        asked.scores = address(scratch.s)
        asked.visible = address(words)
        asked.queries = queries
        asked.keys = keys
        asked.batch = item.batch
        asked.key = key
        asked.heads = address(places.heads)
        asked.rows = address(places.rows)
        asked.frozen = function.frozen
        call_kernel(function.address, address(scratch.asked))

    @glue
    def look(problem, item, queries, count, key, keys, places, scratch):
        """What the queries see of a block of keys; where that is SOMETHING, their words say it.

        What hides most at the least cost comes first.
        """
        extent, blocks, mask = places.extent, problem.blocks, problem.mask
        if keys <= 0 or extent[0] >= key + keys:
            return NOTHING
        state = np.int64(VISIBLE)
        if blocks.states != 0:
            state = block_state(blocks, item.batch, item.seqlen_q, count, places, key, keys)
        if state == HIDDEN:
            return NOTHING
        if (
            extent[1] <= key
            and extent[2] >= key + keys - 1
            and state == VISIBLE
            and mask.storage == ABSENT
            and problem.mask_mod.address == 0
        ):
            return EVERYTHING
        see.between(queries, places.visible, places.first, places.last, key, keys)
        if mask.storage != ABSENT:
            steps = (mask.head_step, mask.row_step, mask.step)
            rows = (places.heads, places.rows)
            see.unmasked(count, places.visible, item.mask, *steps, *rows, key, keys)
            if see.summary(count, places.visible, keys) == NOTHING:
                return NOTHING
        if state == PARTIAL:
            ask(blocks.mask_mod, item, queries, key, keys, places, places.visible, scratch)
        elif state != VISIBLE:
            look_at_blocks(problem, item, queries, count, key, keys, places, scratch)
        if problem.mask_mod.address != 0:
            ask(problem.mask_mod, item, queries, key, keys, places, places.visible, scratch)
        return see.summary(count, places.visible, keys)

    @glue
    def look_at_blocks(problem, item, queries, count, key, keys, places, scratch):
        """Where blocks of a mask end inside the tile, each decides by its own state."""
        blocks = problem.blocks
        partial, answers = scratch.words, on(scratch.words, queries)
        states = blocks.states + item.batch * blocks.batch_step
        steps = (blocks.head_step, blocks.row_step, blocks.queries, blocks.keys)
        rows = (places.heads, places.rows)
        see.blocks(count, places.visible, partial, states, *steps, *rows, key, keys)
        for x in range(queries):
            answers[x] = places.visible[x]
        ask(blocks.mask_mod, item, queries, key, keys, places, answers, scratch)
        for x in range(count):
            places.visible[x] &= answers[x] | ~partial[x]

    # -----------------------------------------------------------------------
    # What happens to scores
    # -----------------------------------------------------------------------

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

    @glue
    def modify(problem, item, queries, count, key, keys, sees, places, scratch):
        """All that happens to the scores of a block, in the order of the contract."""
        if problem.softcap != 0:
            change.cap(queries, scratch.s, keys, problem.softcap)
        if problem.slopes != 0:
            penalise(problem, item, queries, key, keys, places, scratch)
        has_bias = problem.bias.storage != ABSENT
        if has_bias:
            add_bias(problem, item, queries, count, key, keys, places, scratch)
        if problem.score_mod.address != 0:
            ask(problem.score_mod, item, queries, key, keys, places, places.visible, scratch)
            if has_bias:
                change.hide_low(queries, scratch.s, keys, scratch.term)
        if sees == SOMETHING:
            change.hide(queries, scratch.s, keys, places.visible)

    @glue
    def penalise(problem, item, queries, key, keys, places, scratch):
        """ALiBi: subtract a slope times the distance."""
        distances, factors = scratch.lanes, on(scratch.lanes, queries)
        slopes = on(pointer(problem.slopes, zero), item.batch * problem.slopes_step)
        for x in range(queries):
            distances[x] = places.rows[x] + item.position - key
            factors[x] = slopes[places.heads[x]]
        change.penalise(queries, scratch.s, keys, distances, factors)

    @glue
    def add_bias(problem, item, queries, count, key, keys, places, scratch):
        """Add a bias, read through the caller's strides, to a score tile."""
        bias = problem.bias
        # A score_mod may undo what a bias hides: then the bias is needed once more.
        if problem.score_mod.address == 0 and is_whole(bias, keys, queries, count, places):
            first = row_at(bias, item.bias, places.heads[0], places.rows[0])
            source = pointer(address(first) + key * bias.step, zero)
            change.add_rows(queries, scratch.s, keys, source, bias.row_step)
            return
        for x in range(count):
            first = row_at(bias, item.bias, places.heads[x], places.rows[x])
            target = on(scratch.rows, x * BLOCK_KV)
            stage.read_row(target, on(first, key * bias.step), bias.step, keys, bias.storage)
        stage.transpose_rows(scratch.term, queries, scratch.rows, BLOCK_KV, queries, keys)
        change.add(queries, scratch.s, keys, scratch.term)

    @glue
    def sees_a_key(problem, item, queries, count, x, places, scratch):
        """Whether query ``x`` sees any key: asked only if all its scores are -inf."""
        if problem.score_mod.address != 0:
            return False  # that is what hides them
        bias = problem.bias
        begin = places.first[x] // BLOCK_KV * BLOCK_KV
        for key in range(begin, places.last[x] + 1, BLOCK_KV):
            keys = min(BLOCK_KV, places.extent[3] + 1 - key)
            sees = look(problem, item, queries, count, key, keys, places, scratch)
            word = np.int64(0)
            if sees == EVERYTHING:
                word = first_bits(keys)
            elif sees == SOMETHING:
                word = places.visible[x]
            if word != 0 and bias.storage != ABSENT:
                first = row_at(bias, item.bias, places.heads[x], places.rows[x])
                source = on(first, key * bias.step)
                stage.read_row(scratch.rows, source, bias.step, keys, bias.storage)
                for n in range(keys):
                    if scratch.rows[n] == -np.inf:
                        word &= ~(np.int64(1) << n)
            if word != 0:
                return True
        return False

    return Between(
        read_keys, block, is_whole, find_places, look, changes_scores, modify, hides, sees_a_key
    )
