"""From a checked call to a way of running it: one table, each threshold with its reason."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fastattn.problem import Frame


class Plan(NamedTuple):
    """How a kernel is run. No number here changes a bit of the result."""

    tiles: int  # query tiles of one work item
    workers: int  # threads


# Multiply-adds below which one thread is faster: waking a team of threads takes a few
# microseconds, in which one core does some hundred thousand of them.
_SERIAL_WORK = 300_000

# Query tiles of one work item, at most. A block of keys and values is read from the second-level
# cache once for all of them, and converted once where it is stored in 16 bits; with more, their
# queries and sums no longer fit beside it.
_MOST_TILES = 8

# Queries of one tile, at least, on any instruction set: for counting items without asking Numba.
_TILE_QUERIES = 16

# Work items for each thread, at least: threads take items until none is left, so that the last
# to finish is late by one item.
_ITEMS_PER_WORKER = 8


@lru_cache(maxsize=1024)
def plan(frame: Frame, threads: int) -> Plan:
    """Choose the size of work items and the number of threads."""
    pairs = frame.batch * frame.num_heads * frame.seqlen_q * frame.seqlen_kv
    work = pairs * (frame.head_dim + frame.head_dim_v)
    if threads == 1 or work < _SERIAL_WORK:
        return Plan(_MOST_TILES, 1)
    tiles = -(-frame.batch * frame.num_heads * frame.seqlen_q // _TILE_QUERIES)
    per_item = tiles // (threads * _ITEMS_PER_WORKER)
    return Plan(max(1, min(_MOST_TILES, per_item)), min(threads, tiles))
