"""Attention of many queries: work items of (batch, kv head, tiles of queries).

::

    for every (batch, kv head, group of query tiles)        shared between the threads
        pack the queries, transposed
        for every block of keys that any of them sees       one after the other
            for every tile that sees one of them
                scores -> bias, mask -> hide -> softmax -> add the weighted sum
        divide by the sums, transpose, write

A work item owns its rows of the output, so that threads do not race, and no sum crosses
items, so that bits depend neither on the threads nor on the batch. Items are taken from
a shared counter: a core that is held up takes fewer. Every thread has its own scratch;
nothing grows with the number of keys. See Dao (2023), FlashAttention-2, sections 3.1
and 3.2.

Every variant is a switch for a whole tile, so that one compiled kernel for each
accumulation type serves them all.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from .compile import glue, kernel
from .host import HOST
from .items import BLOCK_KV, between, head_and_query, item_of, problem_at, row_at
from .record import COUNTER_OFFSET, FLOAT32, FLOAT64
from .simd import (
    address,
    data,
    itemsize,
    keep,
    lanes_of,
    on,
    pointer,
    take_ticket,
)
from .softmax import online_softmax
from .staging import staging
from .tiles import RUN_NARROW, RUN_WIDE, careful_tiles, nonfinite_counter, tiles

_COLS = HOST.wide[1]
_INTEGER = np.int64(0)


class QueryTile(NamedTuple):
    """What is kept of one tile of queries from block to block."""

    q: Any  # Q^T (head_dim, queries)
    o: Any  # O^T, not yet divided by the sums (head_dim_v, queries)
    row_max: Any
    row_sum: Any
    first: Any  # first and last visible key of each query
    last: Any
    extent: Any  # smallest and largest of first, smallest and largest of last


class Scratch(NamedTuple):
    """One thread's memory. Rows on their way to or from a tile are padded to whole registers."""

    s: Any  # S^T, then P^T (BLOCK_KV, queries)
    kept: Any  # S^T where it is needed beside P^T
    term: Any  # a mask or bias, transposed like S^T
    rescale: Any
    begin: Any  # first and last visible key of each query, counted from the block
    end: Any
    rows: Any  # rows between the caller's memory and a transposed tile
    k: Any  # a block of K or V where the caller's memory cannot be read in place
    v: Any
    tiles: Any  # the query tiles, floating-point part
    bounds: Any  # and their integers
    q_length: int  # head_dim and head_dim_v, padded
    v_length: int
    tile_size: int  # elements of one query tile


# ---------------------------------------------------------------------------
# The kernel
# ---------------------------------------------------------------------------


@cache
def prefill(element: types.Float) -> int:
    """Address of the kernel that accumulates in ``element``; compiled at the first call."""
    zero = np.dtype(str(element)).type(0)
    native = FLOAT32 if element == types.float32 else FLOAT64
    size = element.bitwidth // 8
    register = lanes_of(element)
    most_queries = _COLS * register
    wide = tiles(element, _COLS)
    narrow = tiles(element, 1)
    careful = careful_tiles(element)
    count_nonfinite = nonfinite_counter(element)
    softmax = online_softmax(element)
    parts = between(element)
    stage = staging(element)

    @glue
    def is_whole(problem, row, count, queries, operand, length):
        """Whether the rows of a full tile are of one head and can be read or written in place."""
        return (
            count == queries
            and row % problem.seqlen_q + count <= problem.seqlen_q
            and operand.storage == native
            and (operand.step == size or length == 1)
        )

    @glue
    def begin(problem, item, queries, row, count, tile, scratch):
        """Pack the queries, find what they see, and set the state before any key.

        Lanes behind ``count`` hold zeros and see nothing.
        """
        if is_whole(problem, row, count, queries, problem.q, problem.head_dim):
            source = pointer(address(row_at(problem, item, problem.q, item.q, row)), zero)
            stage.pack(tile.q, queries, source, problem.q.row_step, problem.head_dim)
        else:
            for x in range(queries):
                packed = on(scratch.rows, x * scratch.q_length)
                if x < count:
                    source = row_at(problem, item, problem.q, item.q, row + x)
                    stage.read_row(
                        packed, source, problem.q.step, problem.head_dim, problem.q.storage
                    )
                else:
                    for d in range(problem.head_dim):
                        packed[d] = 0
            stage.transpose_rows(
                tile.q, queries, scratch.rows, scratch.q_length, queries, scratch.q_length
            )
        parts.find_bounds(problem, item, queries, row, count, tile)
        softmax.start(queries, tile.row_max, tile.row_sum, problem.head_dim_v, tile.o)

    @glue
    def attend_block(
        problem, item, queries, row, count, key, keys, k, k_step, v, v_step, tile, scratch
    ):
        """One tile of queries against one block of keys, some of which it sees."""
        is_wide = queries == most_queries
        if is_wide:
            wide.scores(k, k_step, keys, tile.q, problem.head_dim, problem.scale, scratch.s)
        else:
            narrow.scores(k, k_step, keys, tile.q, problem.head_dim, problem.scale, scratch.s)
        some_hidden = parts.modify(problem, item, queries, row, count, key, keys, tile, scratch)
        if some_hidden and count_nonfinite(v, v_step, keys, problem.head_dim_v) > 0:
            careful.copy(queries, scratch.s, keys, scratch.kept)
            softmax.update(queries, scratch.s, keys, tile.row_max, tile.row_sum, scratch.rescale)
            careful.values_seen(
                queries,
                v,
                v_step,
                keys,
                scratch.kept,
                scratch.s,
                scratch.rescale,
                problem.head_dim_v,
                tile.o,
                RUN_WIDE if is_wide else RUN_NARROW,
            )
            return
        softmax.update(queries, scratch.s, keys, tile.row_max, tile.row_sum, scratch.rescale)
        product = (v, v_step, keys, scratch.s, scratch.rescale, problem.head_dim_v, tile.o)
        if is_wide:
            wide.values(*product)
        else:
            narrow.values(*product)

    @glue
    def finish(problem, item, queries, row, count, tile, scratch):
        """Divide by the sums, transpose, write the rows and their lse."""
        for x in range(count):
            if tile.row_max[x] == -np.inf and parts.sees_a_key(
                problem, item, row + x, tile.first[x], tile.last[x], scratch.term
            ):
                # Every visible score is -inf: as in the textbook form, -inf - -inf is NaN.
                tile.row_sum[x] = np.nan
                for f in range(problem.head_dim_v):
                    tile.o[f * queries + x] = np.nan
        softmax.finish(queries, tile.row_sum, problem.head_dim_v, tile.o)
        out = problem.out
        if is_whole(problem, row, count, queries, out, problem.head_dim_v):
            target = pointer(address(row_at(problem, item, out, item.out, row)), zero)
            stage.unpack(target, out.row_step, tile.o, queries, problem.head_dim_v)
        else:
            stage.transpose_rows(
                scratch.rows, scratch.v_length, tile.o, queries, scratch.v_length, queries
            )
            for x in range(count):
                target = row_at(problem, item, out, item.out, row + x)
                source = on(scratch.rows, x * scratch.v_length)
                stage.write_row(target, out.step, source, problem.head_dim_v, out.storage)
        if item.lse != 0:
            lse = pointer(item.lse, tile.row_max)
            for x in range(count):
                head, query = head_and_query(problem, item, row + x)
                lse[head * problem.seqlen_q + query] = tile.row_max[x] + math.log(tile.row_sum[x])

    @glue
    def query_tile(scratch, index):
        q = on(scratch.tiles, index * scratch.tile_size)
        o = on(q, most_queries * scratch.q_length)
        row_max = on(o, most_queries * scratch.v_length)
        first = on(scratch.bounds, index * (2 * most_queries + 4))
        last = on(first, most_queries)
        extent = on(last, most_queries)
        return QueryTile(q, o, row_max, on(row_max, most_queries), first, last, extent)

    @glue
    def tile_shape(index, rows):
        """Lanes and queries of a tile: what fits into one register of queries is narrow."""
        rest = rows - index * most_queries
        if rest <= register:
            return register, rest
        return most_queries, min(most_queries, rest)

    @glue
    def attend_rows(problem, item, row, rows, scratch):
        """One work item: so many rows of one kv head against all keys that they see."""
        count = (rows + most_queries - 1) // most_queries
        first_key = item.seqlen_kv
        last_key = np.int64(-1)
        for t in range(count):
            tile = query_tile(scratch, t)
            queries, n = tile_shape(t, rows)
            begin(problem, item, queries, row + t * most_queries, n, tile, scratch)
            first_key = min(first_key, tile.extent[0])
            last_key = max(last_key, tile.extent[3])

        for key in range(first_key // BLOCK_KV * BLOCK_KV, last_key + 1, BLOCK_KV):
            keys = min(BLOCK_KV, last_key + 1 - key)
            head = item.kv_head
            k, k_step = parts.block(problem.k, item.k, head, problem.head_dim, key, keys, scratch.k)
            v, v_step = parts.block(
                problem.v, item.v, head, problem.head_dim_v, key, keys, scratch.v
            )
            for t in range(count):
                tile = query_tile(scratch, t)
                # Keys behind the last that any query of the tile sees are not looked at.
                seen = min(keys, tile.extent[3] + 1 - key)
                if seen > 0 and tile.extent[0] < key + seen:
                    queries, n = tile_shape(t, rows)
                    at = row + t * most_queries
                    attend_block(
                        problem,
                        item,
                        queries,
                        at,
                        n,
                        key,
                        seen,
                        k,
                        k_step,
                        v,
                        v_step,
                        tile,
                        scratch,
                    )

        for t in range(count):
            queries, n = tile_shape(t, rows)
            at = row + t * most_queries
            finish(problem, item, queries, at, n, query_tile(scratch, t), scratch)

    @glue
    def allocate(problem):
        """One thread's scratch, and the two arrays that own it."""
        q_length = (problem.head_dim + register - 1) // register * register
        v_length = (problem.head_dim_v + register - 1) // register * register
        tile_size = most_queries * (q_length + v_length + 2)
        block_size = most_queries * BLOCK_KV
        longest = max(q_length, v_length, BLOCK_KV)
        staged = BLOCK_KV * (problem.head_dim + problem.head_dim_v)
        total = 3 * block_size + (3 + longest) * most_queries + staged + problem.tiles * tile_size
        memory = np.empty(total + 64, np.dtype(type(zero)))
        bounds = np.empty(problem.tiles * (2 * most_queries + 4), np.int64)
        # Aligned, so that no register of scratch straddles two cache lines.
        s = pointer((address(data(memory)) + 63) // 64 * 64, zero)
        kept = on(s, block_size)
        term = on(kept, block_size)
        rescale = on(term, block_size)
        begin = on(rescale, most_queries)
        end = on(begin, most_queries)
        rows = on(end, most_queries)
        k = on(rows, longest * most_queries)
        v = on(k, BLOCK_KV * problem.head_dim)
        tiles_at = on(v, BLOCK_KV * problem.head_dim_v)
        scratch = Scratch(
            s,
            kept,
            term,
            rescale,
            begin,
            end,
            rows,
            k,
            v,
            tiles_at,
            data(bounds),
            q_length,
            v_length,
            tile_size,
        )
        return scratch, memory, bounds

    @kernel(element)
    def prefill(problem_address):
        """Take work items from the problem's counter until none is left."""
        problem = problem_at(problem_address)
        # Where one head's queries do not fill a tile, those of the whole group share it.
        rows = problem.num_heads // problem.num_kv_heads * problem.seqlen_q
        segment = problem.seqlen_q if problem.seqlen_q >= most_queries else rows
        segments = rows // segment
        height = problem.tiles * most_queries
        chunks = (segment + height - 1) // height
        items = problem.batches * problem.num_kv_heads * segments * chunks
        scratch, memory, bounds = allocate(problem)
        counter = pointer(problem_address + COUNTER_OFFSET, _INTEGER)
        number = take_ticket(counter)
        while number < items:
            # The last chunk first: under causal it sees the most keys.
            chunk = chunks - 1 - number % chunks
            head = number // chunks
            kv_head = head // segments % problem.num_kv_heads
            batch = head // segments // problem.num_kv_heads
            item = item_of(problem, kv_head, batch, itemsize(scratch.s))
            row = head % segments * segment + chunk * height
            attend_rows(problem, item, row, min(height, segment - chunk * height), scratch)
            number = take_ticket(counter)
        keep(memory)
        keep(bounds)

    return prefill
