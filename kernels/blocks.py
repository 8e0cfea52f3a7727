"""Which blocks of a mask are hidden, visible or partial, as its mask_mod says of every score.

A block is gone through by small tiles, and left as soon as it is known to be partial. No array
has the size of the scores.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .compile import glue, kernel
from .record import BLOCKS, HIDDEN, PARTIAL, TILE, VISIBLE
from .simd.pointers import address, call_kernel, data, keep, pointer, record_type, take_ticket
from .visibility import first_bits

blocks_at = record_type(BLOCKS)
tile_at = record_type(TILE)

# Queries of one tile: whole registers on any instruction set. Keys are as many as a word has bits.
_QUERIES = 32
_KEYS = 64

_BYTE = np.uint8(0)
_INTEGER = np.int64(0)


@glue
def _block_state(asked, tile, rows, visible, first, last, first_key, last_key):
    """The state of the block of queries first <= i < last and keys first_key <= j < last_key."""
    any_visible = any_hidden = False
    for i in range(first, last, _QUERIES):
        for x in range(_QUERIES):
            rows[x] = min(i + x, last - 1)
        for j in range(first_key, last_key, _KEYS):
            tile.key = j
            tile.keys = min(_KEYS, last_key - j)
            every_key = first_bits(tile.keys)
            for x in range(_QUERIES):
                visible[x] = every_key
            call_kernel(asked.mask.mask_mod.address, address(tile))
            for x in range(_QUERIES):
                any_visible |= visible[x] != 0
                any_hidden |= visible[x] != every_key
            if any_visible and any_hidden:
                return PARTIAL
    return VISIBLE if any_visible else HIDDEN


@cache
def block_states() -> int:
    """Address of the kernel; compiled at the first call."""

    @kernel()
    def block_states(problem_address):
        """Take rows of blocks from the problem's counter until none is left."""
        asked = blocks_at(problem_address)
        states = pointer(asked.mask.states, _BYTE)
        tiles = np.empty(1, TILE)
        lanes = np.empty((3, _QUERIES), np.int64)
        tile = tiles[0]
        heads, rows, visible = lanes[0], lanes[1], lanes[2]
        tile.visible = address(data(visible))
        tile.heads = address(data(heads))
        tile.rows = address(data(rows))
        tile.queries = _QUERIES
        tile.frozen = asked.mask.mask_mod.frozen
        queries, keys = asked.mask.queries, asked.mask.keys
        height = (asked.seqlen_q + queries - 1) // queries
        width = (asked.seqlen_kv + keys - 1) // keys
        counter = pointer(problem_address, _INTEGER)
        number = take_ticket(counter)
        while number < asked.batches * asked.heads * height:
            row = number % height
            heads[:] = number // height % asked.heads
            tile.batch = number // height // asked.heads
            first = row * queries
            last = min(first + queries, asked.seqlen_q)
            for column in range(width):
                first_key = column * keys
                last_key = min(first_key + keys, asked.seqlen_kv)
                states[number * width + column] = _block_state(
                    asked, tile, rows, visible, first, last, first_key, last_key
                )
            number = take_ticket(counter)
        keep(tiles)
        keep(lanes)

    return block_states
