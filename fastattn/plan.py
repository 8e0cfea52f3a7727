"""From a checked call to a way of running it: one table, each threshold with its reason."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastattn.kernels.record import CHUNK
from fastattn.problem import Array, Frame, Packed


class Plan(NamedTuple):
    """Which kernel runs, and how. The threads decide about numbers that change no bit."""

    is_decode: bool  # few queries for each kv head: `kernels/decode.py`, else `kernels/prefill.py`
    tiles: int  # query tiles of one work item
    workers: int  # threads
    is_long: bool  # long enough for somebody to want to interrupt it


# Queries that share a kv head, at most, for which the decode kernel runs. For one query it is 2 to
# 9 times as fast as the prefill kernel, for 8 about 1.5 times; at 16 they are even, because there
# the lanes of the prefill kernel are full, and decode is ahead only where few heads leave cores
# without work. Where the keys are a single chunk they are even at 8. Measured with 64 and 128
# features and 16 to 8192 keys in float32, float64 and bfloat16.
_MOST_ROWS = 16
_MOST_ROWS_OF_ONE_CHUNK = 8

# Multiply-adds below which one thread is faster: waking a team of threads takes a few
# microseconds, in which one core does some hundred thousand of them.
SERIAL_WORK = 300_000

# Multiply-adds for each thread above which a call is one that may be interrupted: some 20 ms, and
# up to half a second on the slowest cores and with the slowest function of the caller's for a
# score. Listening takes some 30 microseconds, which nobody can measure in such a call.
LONG_WORK = 1_000_000_000

# Query tiles of one work item, at most. A block of keys and values is read from the second-level
# cache once for all of them, and converted once where it is stored in 16 bits; with more, their
# queries and sums no longer fit beside it.
_MOST_TILES = 8

# Queries of one tile, at least, on any instruction set: for counting items without asking Numba.
_TILE_QUERIES = 16

# Work items for each thread, at least: threads take items until none is left, so that the last
# to finish is late by one item.
_ITEMS_PER_WORKER = 8


def chunks(seqlen_kv: int) -> int:
    """Return in how many parts the decode kernel takes the keys."""
    return max(-(-seqlen_kv // int(CHUNK)), 1)


@lru_cache(maxsize=1024)
def plan(frame: Frame, threads: int) -> Plan:
    """Choose the size of work items and the number of threads."""
    pairs = frame.batch * frame.num_heads * frame.seqlen_q * frame.seqlen_kv
    work = pairs * (frame.head_dim + frame.head_dim_v)
    rows = frame.num_heads // max(frame.num_kv_heads, 1) * frame.seqlen_q
    one_chunk = frame.seqlen_kv <= CHUNK
    is_decode = rows <= (_MOST_ROWS_OF_ONE_CHUNK if one_chunk else _MOST_ROWS)
    if threads == 1 or work < SERIAL_WORK:
        return Plan(is_decode, _MOST_TILES, 1, is_long(work, 1))
    if is_decode:
        items = frame.batch * frame.num_kv_heads * chunks(frame.seqlen_kv)
        workers = min(threads, items)
        return Plan(True, 1, workers, is_long(work, workers))
    tiles = -(-frame.batch * frame.num_heads * frame.seqlen_q // _TILE_QUERIES)
    per_item = tiles // (threads * _ITEMS_PER_WORKER)
    workers = min(threads, tiles)
    return Plan(False, max(1, min(_MOST_TILES, per_item)), workers, is_long(work, workers))


def is_long(work: int, workers: int) -> bool:
    """Return whether so many multiply-adds on so many threads may take long."""
    return work > LONG_WORK * workers


def are_few(frame: Frame, packed: Packed) -> Array:
    """Return for which of packed sequences the decode kernel runs, by what is theirs alone.

    Not for those without queries, for which nothing does.
    """
    rows = frame.num_heads // frame.num_kv_heads * packed.queries
    most = np.where(packed.lengths <= CHUNK, _MOST_ROWS_OF_ONE_CHUNK, _MOST_ROWS)
    few: Array = (rows > 0) & (rows <= most)
    return few


class Chunks(NamedTuple):
    """How the decode kernel takes packed sequences."""

    plan: Plan
    work: Array  # (items, 3): chunk of keys, first member, last member and one
    members: Array  # (members, 2): sequence, chunks of those before it
    rows: int  # queries that share a kv head in one sequence, at most


def plan_chunks(frame: Frame, packed: Packed, chosen: Array, threads: int) -> Chunks:
    """Return the work of the decode kernel for some of packed sequences.

    An item is a chunk of the keys of one kv head, for every sequence that has it in the same pages:
    its keys come from memory once.
    """
    queries = packed.queries * chosen
    # Lengths in units that end with every chunk and page: token by token, the work stays the same.
    unit = math.gcd(CHUNK, packed.page_size)
    units = -(-packed.lengths // unit)
    tables = None if packed.pages is None else (packed.pages.tobytes(), packed.pages.shape)
    most_items = threads * _ITEMS_PER_WORKER
    work, members = _chunk_items(
        *((queries > 0).tobytes(), units.tobytes(), unit),
        *(tables, packed.page_size, -(-most_items // frame.num_kv_heads)),
    )
    group_size = frame.num_heads // frame.num_kv_heads
    pairs = int(queries @ packed.lengths) * frame.num_heads
    multiply_adds = pairs * (frame.head_dim + frame.head_dim_v)
    serial = threads == 1 or multiply_adds < SERIAL_WORK
    workers = 1 if serial else min(threads, len(work) * frame.num_kv_heads)
    rows = group_size * int(queries.max(initial=0))
    return Chunks(Plan(True, 1, workers, is_long(multiply_adds, workers)), work, members, rows)


@lru_cache(maxsize=256)
def _chunk_items(
    chosen: bytes, units: bytes, unit: int, tables: Any, page_size: int, enough: int
) -> tuple[Array, Array]:
    """Return work and members for `plan_chunks`, which has all that they depend on as bytes.

    Sequences go together that have more than half of a chunk in the same pages, unless that leaves
    less than `enough` items.
    """
    lengths = np.frombuffer(units, np.int64) * unit
    counts = np.maximum(-(-lengths // CHUNK), 1) * np.frombuffer(chosen, bool)
    before = np.cumsum(counts) - counts
    sequence = np.repeat(np.arange(len(counts)), counts)
    chunk = np.arange(len(sequence)) - before[sequence]
    begins = np.ones(len(sequence), bool)
    if tables is not None:
        pages = np.frombuffer(tables[0], np.int64).reshape(tables[1])
        middle = np.minimum(chunk * CHUNK + CHUNK // 2, lengths[sequence] - 1)
        page = pages[sequence, np.maximum(middle, 0) // page_size]
        # Whose middle lies in the same page has all before it in common, too.
        order = np.lexsort((page, chunk))
        sequence, chunk, page = sequence[order], chunk[order], page[order]
        begins[1:] = (np.diff(page) != 0) | (np.diff(chunk) != 0)
        number = np.arange(len(begins))
        number -= np.maximum.accumulate(np.where(begins, number, 0))
        begins |= number % max(len(begins) // enough, 1) == 0
    first = np.flatnonzero(begins)
    work = np.stack([chunk[first], first, np.append(first[1:], len(begins))], axis=-1)
    return work, np.stack([sequence, before[sequence]], axis=-1)


def plan_packed(
    frame: Frame, packed: Packed, chosen: Array, tile_queries: int, threads: int
) -> tuple[Plan, Array]:
    """Return the plan and its work: (item, 3) integers.

    That is (sequence, first row, rows) for one kv head, as the prefill kernel takes them. Rows of
    a sequence are the queries of its first query head, then of its second; where those of one head
    fill a tile, no tile has two heads. The items with the most work come first: whoever takes the
    last ones then is done soon, and no core is left with a long sequence alone.
    """
    group_size = frame.num_heads // frame.num_kv_heads
    queries = packed.queries * chosen
    total = int(queries.sum()) * frame.num_heads
    pairs = int(queries @ packed.lengths) * frame.num_heads
    multiply_adds = pairs * (frame.head_dim + frame.head_dim_v)
    serial = threads == 1 or multiply_adds < SERIAL_WORK
    per_item = -(-total // tile_queries) // (threads * _ITEMS_PER_WORKER)
    tiles = _MOST_TILES if serial else max(1, min(_MOST_TILES, per_item))

    height = tiles * tile_queries
    fills = queries >= tile_queries
    segment = np.where(fills, queries, group_size * queries)
    chunks = -(-segment // height)
    counts = np.where(fills, group_size, 1) * chunks
    sequence = np.repeat(np.arange(len(queries)), counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    part = number % chunks[sequence]
    first = number // chunks[sequence] * segment[sequence] + part * height
    rows = np.minimum(height, segment[sequence] - part * height)

    # What the row in the middle sees stands for all.
    position = np.broadcast_to(packed.position, queries.shape)[sequence]
    position = position + (first + rows // 2) % queries[sequence]
    last = np.minimum(position + packed.right, packed.lengths[sequence] - 1)
    seen = np.maximum(last - np.maximum(position - packed.left, 0) + 1, 0)
    order = np.argsort(-rows * seen, kind="stable")
    work = np.stack([sequence, first, rows], axis=-1)[order]
    workers = 1 if serial else min(threads, len(work) * frame.num_kv_heads)
    return Plan(False, tiles, workers, is_long(multiply_adds, workers)), work
