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
from .record import HIDDEN, VISIBLE
from .simd import bits_of, on, pointer, prefetch

# What a tile of queries sees of a block of keys.
NOTHING, SOMETHING, EVERYTHING = range(3)

# The state of several blocks of a mask that differ.
MIXED = 3

WORD_BITS = 64

_BYTE = np.uint8(0)
_int = types.intp
_words = types.CPointer(types.int64)


@glue
def first_bits(count):
    """A word whose first ``count`` bits are set, 0 <= count <= 64."""
    # No CPU shifts a word by its own length.
    return np.int64(-1) if count >= WORD_BITS else (np.int64(1) << count) - 1


@glue
def block_state(mask, batch, seqlen_q, count, places, key, keys):
    """The state of all blocks of a mask that a tile of queries and keys touches, or MIXED."""
    states = pointer(mask.states, _BYTE)
    heads, rows = places.heads, places.rows
    first_column, last_column = key // mask.keys, (key + keys - 1) // mask.keys
    state = np.int64(-1)
    x = np.int64(0)
    while x < count:
        row = rows[x] // mask.queries
        place = batch * mask.batch_step + heads[x] * mask.head_step + row * mask.row_step
        for column in range(first_column, last_column + 1):
            found = np.int64(states[place + column])
            if state >= 0 and found != state:
                return MIXED
            state = found
        # On to the next row of blocks, or the next head.
        x += min((row + 1) * mask.queries, seqlen_q) - rows[x]
    return state


class Visibility(NamedTuple):
    """The routines, for any type of scores."""

    between: Any
    unmasked: Any
    blocks: Any
    summary: Any


@cache
def visibility() -> Visibility:
    """Compile the routines."""

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

    return Visibility(between, unmasked, blocks, summary)
