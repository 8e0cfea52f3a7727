"""From a checked call to a way of running it: one table, each threshold with its reason."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fastattn.formats import Array
from fastattn.kernels.record import CHUNK
from fastattn.problem import Packed, Pages
from fastattn.shapes import Frame


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


class Chunks(NamedTuple):
    """How the decode kernel takes packed sequences."""

    queries: Array  # of each sequence; 0 where it is not taken
    rows: int  # that share a kv head in one sequence, at most
    work: Array  # (items, 3): chunk of keys, first member, last member and one
    members: Array  # (members, 2): sequence, chunks of those before it
    states: int  # to be kept of each kv head, until all chunks of a sequence are done


class Division(NamedTuple):
    """Which kernel runs for which of packed sequences."""

    chunks: Chunks | None  # what the decode kernel does, where it runs for any
    many: Array | None  # for which sequences the prefill kernel runs, if any


def divide(frame: Frame, packed: Packed, threads: int) -> Division:
    """Divide packed sequences between the kernels, each by what is its own alone."""
    pages = packed.pages
    # Lengths in units that end with every chunk and page: token by token, all stays the same.
    unit = int(CHUNK) if pages is None else math.gcd(CHUNK, pages.size)
    units = (packed.lengths + (unit - 1)) // unit
    return _divide(frame, packed.queries.tobytes(), units.tobytes(), unit, pages, threads)


@lru_cache(maxsize=256)
def _divide(
    frame: Frame, queries: bytes, units: bytes, unit: int, pages: Pages | None, threads: int
) -> Division:
    """Do what `divide` says, from all that it depends on."""
    counts, lengths = np.frombuffer(queries, np.int64), np.frombuffer(units, np.int64) * unit
    group_size = frame.num_heads // frame.num_kv_heads
    most = np.where(lengths <= CHUNK, _MOST_ROWS_OF_ONE_CHUNK, _MOST_ROWS)
    # Neither runs for those without queries.
    few = (counts > 0) & (group_size * counts <= most)
    many = (counts > 0) & ~few
    chunks = None
    if few.any():
        enough = -(-threads * _ITEMS_PER_WORKER // frame.num_kv_heads)
        work, members = _chunk_items(few, lengths, pages, enough)
        counts = counts * few
        chunks = Chunks(
            counts,
            group_size * int(counts.max()),
            work,
            members,
            len(members) if lengths[few].max() > CHUNK else 0,
        )
    return Division(chunks, many if many.any() else None)


def _chunk_items(
    chosen: Array, lengths: Array, pages: Pages | None, enough: int
) -> tuple[Array, Array]:
    """Return the work of the decode kernel for some of packed sequences, and its members.

    An item is a chunk of the keys of one kv head, for every sequence that has it in the same pages:
    its keys come from memory once. Sequences go together that have more than half of a chunk in the
    same pages, unless that leaves less than `enough` items.
    """
    counts = np.maximum(-(-lengths // CHUNK), 1) * chosen
    before = np.cumsum(counts) - counts
    sequence = np.repeat(np.arange(len(counts)), counts)
    chunk = np.arange(len(sequence)) - before[sequence]
    begins = np.ones(len(sequence), bool)
    if pages is not None:
        middle = np.minimum(chunk * CHUNK + CHUNK // 2, lengths[sequence] - 1)
        page = pages.numbers[sequence, np.maximum(middle, 0) // pages.size]
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


def plan_chunks(frame: Frame, packed: Packed, chunks: Chunks, threads: int) -> Plan:
    """Return the plan of the decode kernel for some of packed sequences."""
    pairs = int(chunks.queries @ packed.lengths) * frame.num_heads
    multiply_adds = pairs * (frame.head_dim + frame.head_dim_v)
    serial = threads == 1 or multiply_adds < SERIAL_WORK
    workers = 1 if serial else min(threads, len(chunks.work) * frame.num_kv_heads)
    return Plan(True, 1, workers, is_long(multiply_adds, workers))


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
