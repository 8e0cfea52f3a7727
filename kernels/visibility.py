"""Which keys of a block the queries of a tile see: one 64-bit word for each query.

Bit n of a word stands for key + n. Causal, window and lengths, a mask, a block mask and a mask_mod
each clear bits; what is left decides for the whole tile: skip it, take it as it is, or hide
scores one by one. None of them has an array of the size of the scores.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from .compile import glue, routine
from .record import ABSENT, HIDDEN, PARTIAL, PROBLEM, TILE, VISIBLE
from .simd.arithmetic import bits_of
from .simd.pointers import address, call_kernel, on, pointer, prefetch, record_type

# What a tile of queries sees of a block of keys.
NOTHING, SOMETHING, EVERYTHING = range(3)

# The state of several blocks of a mask that differ.
MIXED = 3

WORD_BITS = 64

_BYTE = np.uint8(0)
_INTEGER = np.int64(0)
_int = types.intp
_words = types.CPointer(types.int64)

problem_at = record_type(PROBLEM)
tile_at = record_type(TILE)


# ---------------------------------------------------------------------------
# Where queries stand
# ---------------------------------------------------------------------------


class Places(NamedTuple):
    """Where the queries of a tile stand and what they see.

    One integer of each kind for every query, in one piece of memory that ``heads`` begins.
    """

    heads: Any  # query head
    rows: Any  # number in that head
    first: Any  # first and last visible key; behind each other where there is none
    last: Any
    visible: Any  # words for the block of keys that was looked at last
    extent: Any  # smallest and largest of first, smallest and largest of last
    entry: Any  # of their batch entry what ENTRY names


# The batch entry's number and its queries, the key at which query 0 stands, and addresses of the
# mask and bias.
ENTRY = ("batch", "seqlen_q", "position", "mask", "bias")
BATCH, SEQLEN_Q, POSITION, MASK, BIAS = range(len(ENTRY))


# Integers that places take beside five for each query.
BESIDE = 4 + len(ENTRY)


@glue
def places_in(integers, queries):
    """``Places`` in a piece of memory."""
    rows = on(integers, queries)
    first = on(rows, queries)
    last = on(first, queries)
    visible = on(last, queries)
    extent = on(visible, queries)
    return Places(integers, rows, first, last, visible, extent, on(extent, 4))


# ---------------------------------------------------------------------------
# What they see
# ---------------------------------------------------------------------------


@glue
def first_bits(count):
    """A word whose first ``count`` bits are set, 0 <= count <= 64."""
    # No CPU shifts a word by its own length.
    return np.int64(-1) if count >= WORD_BITS else (np.int64(1) << count) - 1


# Integers that ``ask`` needs to describe a tile.
ASKED = TILE.itemsize // 8


@glue
def ask(function, queries, key, keys, places, scores, words, asked):
    """Call a function of the caller's for a tile of scores, or of words."""
    tile = tile_at(address(asked))
    tile.scores = scores
    tile.visible = address(words)
    tile.queries = queries
    tile.keys = keys
    tile.batch = places.entry[BATCH]
    tile.key = key
    tile.heads = address(places.heads)
    tile.rows = address(places.rows)
    tile.frozen = function.frozen
    call_kernel(function.address, address(asked))


@glue
def block_state(mask, count, places, key, keys):
    """The state of all blocks of a mask that a tile of queries and keys touches, or MIXED."""
    states = pointer(mask.states + places.entry[BATCH] * mask.batch_step, _BYTE)
    heads, rows = places.heads, places.rows
    first_column, last_column = key // mask.keys, (key + keys - 1) // mask.keys
    state = np.int64(-1)
    x = np.int64(0)
    while x < count:
        row = rows[x] // mask.queries
        place = heads[x] * mask.head_step + row * mask.row_step
        for column in range(first_column, last_column + 1):
            found = np.int64(states[place + column])
            if state >= 0 and found != state:
                return MIXED
            state = found
        # On to the next row of blocks, or the next head.
        x += min((row + 1) * mask.queries, places.entry[SEQLEN_Q]) - rows[x]
    return state


class Visibility(NamedTuple):
    """The routines, for any type of scores."""

    find_places: Any
    look: Any


@cache
def visibility() -> Visibility:
    """Compile the routines."""

    @routine(types.void(types.int64, _words, _int, _int, _int, _int, _int))
    def find_places(problem_address, integers, queries, row, count, kv_head, seqlen_kv):
        """Where the queries stand, the first and last key that each sees, and their extremes.

        The rows of a kv head are the queries of its first query head, then of its second...
        Lanes behind ``count`` see nothing; they stand where the first does.
        """
        problem = problem_at(problem_address)
        places = places_in(integers, queries)
        extent, seqlen_q = places.extent, places.entry[SEQLEN_Q]
        extent[0], extent[1] = seqlen_kv, 0
        extent[2], extent[3] = seqlen_kv, -1
        first_head = kv_head * (problem.num_heads // problem.num_kv_heads)
        start = 0
        while start < count:
            # A stretch of one head: both ends rise with the query, and LLVM sees whole registers.
            head = first_head + (row + start) // seqlen_q
            query = (row + start) % seqlen_q
            stop = min(count, start + seqlen_q - query)
            position = query + places.entry[POSITION]
            for x in range(start, stop):
                places.heads[x] = head
                places.rows[x] = query + (x - start)
                places.first[x] = max(position + (x - start) - problem.left, 0)
                places.last[x] = min(position + (x - start) + problem.right, seqlen_kv - 1)
            extent[0] = min(extent[0], places.first[start])
            extent[1] = max(extent[1], places.first[stop - 1])
            extent[2] = min(extent[2], places.last[start])
            extent[3] = max(extent[3], places.last[stop - 1])
            start = stop
        for x in range(count, queries):
            places.heads[x] = places.heads[0]
            places.rows[x] = places.rows[0]
            places.first[x] = seqlen_kv
            places.last[x] = -1

    @routine(types.void(_int, _words, _words, _words, _int, _int))
    def between(queries, visible, first, last, key, keys):
        """Set the bits of the keys from ``first`` to ``last``, one of each for every query."""
        for x in range(queries):
            begin = min(max(first[x] - key, 0), WORD_BITS)
            end = min(max(last[x] + 1 - key, 0), keys)
            visible[x] = first_bits(end) & ~first_bits(begin)

    @routine(types.void(_int, _words, types.int64, _int, _int, _int, _words, _words, _int, _int))
    def unmasked(count, visible, base, head_step, row_step, step, heads, rows, key, keys):
        """Clear the bits of the keys where a mask of bytes is 0."""
        last_place = np.int64(-1)
        word = np.int64(0)
        for x in range(count):
            place = base + heads[x] * head_step + rows[x] * row_step + key * step
            # A mask of keys only is the same row over and over.
            if place != last_place:
                source = pointer(place, _BYTE)
                if step == 1 and keys == WORD_BITS:
                    word = bits_of(source)
                    prefetch(on(source, WORD_BITS))
                else:
                    word = np.int64(0)
                    for n in range(keys):
                        word |= np.int64(source[n * step] != 0) << n
                last_place = place
            visible[x] &= word

    @routine(
        types.void(
            *(_int, _words, _words, types.int64, _int, _int, _int, _int),
            *(_words, _words, _int, _int),
        )
    )
    def blocks(
        count,
        visible,
        partial,
        states,
        head_step,
        row_step,
        block_queries,
        block_keys,
        heads,
        rows,
        key,
        keys,
    ):
        """Clear the bits of hidden blocks of a mask; set in ``partial`` those of partial ones."""
        last_place = np.int64(-1)
        hidden = asked = np.int64(0)
        for x in range(count):
            place = states + heads[x] * head_step + rows[x] // block_queries * row_step
            if place != last_place:
                hidden = asked = np.int64(0)
                row = pointer(place, _BYTE)
                for column in range(key // block_keys, (key + keys - 1) // block_keys + 1):
                    begin = max(column * block_keys - key, 0)
                    end = min((column + 1) * block_keys - key, keys)
                    bits = first_bits(end) & ~first_bits(begin)
                    if row[column] == HIDDEN:
                        hidden |= bits
                    elif row[column] != VISIBLE:
                        asked |= bits
                last_place = place
            visible[x] &= ~hidden
            partial[x] = asked

    @routine(_int(_int, _words, _int))
    def summary(count, visible, keys):
        """Whether the queries see nothing, something or everything of the block."""
        every_key = first_bits(keys)
        union = np.int64(0)
        common = every_key
        for x in range(count):
            union |= visible[x]
            common &= visible[x]
        if union == 0:
            return NOTHING
        return EVERYTHING if common == every_key else SOMETHING

    @routine(_int(types.int64, _words, _int, _int, _int, _int, _words, _words))
    def look(problem_address, integers, queries, count, key, keys, words, asked):
        """What the queries see of a block of keys; where that is SOMETHING, their words say it.

        What hides most at the least cost comes first. ``words`` has room for two of each query.
        """
        problem = problem_at(problem_address)
        places = places_in(integers, queries)
        extent, visible = places.extent, places.visible
        blocks_of_mask, mask, mask_mod = problem.blocks, problem.mask, problem.mask_mod
        if keys <= 0 or extent[0] >= key + keys:
            return NOTHING
        state = np.int64(VISIBLE)
        if blocks_of_mask.states != 0:
            state = block_state(blocks_of_mask, count, places, key, keys)
        if state == HIDDEN:
            return NOTHING
        if (
            extent[1] <= key
            and extent[2] >= key + keys - 1
            and state == VISIBLE
            and mask.storage == ABSENT
            and mask_mod.address == 0
        ):
            return EVERYTHING
        between(queries, visible, places.first, places.last, key, keys)
        rows = (places.heads, places.rows)
        if mask.storage != ABSENT:
            steps = (mask.head_step, mask.row_step, mask.step)
            unmasked(count, visible, places.entry[MASK], *steps, *rows, key, keys)
            if summary(count, visible, keys) == NOTHING:
                return NOTHING
        if state == PARTIAL:
            ask(blocks_of_mask.mask_mod, queries, key, keys, places, 0, visible, asked)
        elif state != VISIBLE:
            # Blocks end inside the tile: each decides by its own state.
            partial, answers = words, on(words, queries)
            states = blocks_of_mask.states + places.entry[BATCH] * blocks_of_mask.batch_step
            shape = (blocks_of_mask.head_step, blocks_of_mask.row_step)
            size = (blocks_of_mask.queries, blocks_of_mask.keys)
            blocks(count, visible, partial, states, *shape, *size, *rows, key, keys)
            for x in range(queries):
                answers[x] = visible[x]
            ask(blocks_of_mask.mask_mod, queries, key, keys, places, 0, answers, asked)
            for x in range(count):
                visible[x] &= answers[x] | ~partial[x]
        if mask_mod.address != 0:
            ask(mask_mod, queries, key, keys, places, 0, visible, asked)
        return summary(count, visible, keys)

    return Visibility(find_places, look)
