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

from .compile import glue, inline, kernel
from .host import HOST
from .modifiers import modifiers
from .record import ABSENT, COUNTER_OFFSET, FLOAT32, FLOAT64, PROBLEM
from .simd import (
    address,
    bytes_on,
    data,
    itemsize,
    keep,
    lanes_of,
    on,
    pointer,
    prefetch_to_write,
    record_type,
    take_ticket,
)
from .softmax import online_softmax
from .staging import staging
from .tiles import RUN_NARROW, RUN_WIDE, careful_tiles, tiles

# Keys of one block: K and V of 64 keys with a head_dim of 64 fill the first-level cache together
# with the scores. A multiple of every number of lanes.
BLOCK_KV = 64

LINE = 64  # bytes of a cache line, at least

_COLS = HOST.wide[1]
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
    lse: int
    seqlen_kv: int
    position: int  # key at which query 0 stands


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
def _item(problem, kv_head, batch, size):
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
        lse,
        length,
        position,
    )


@glue
def _head_and_query(problem, item, row):
    """The rows of a kv head are the queries of its first query head, then of its second..."""
    group_size = problem.num_heads // problem.num_kv_heads
    return item.kv_head * group_size + row // problem.seqlen_q, row % problem.seqlen_q


@glue
def _row(problem, item, operand, base, row):
    """A row of q, out, mask or bias."""
    head, query = _head_and_query(problem, item, row)
    return pointer(base + head * operand.head_step + query * operand.row_step, _BYTE)


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
    softmax = online_softmax(element)
    modify = modifiers(element)
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
            source = pointer(address(_row(problem, item, problem.q, item.q, row)), zero)
            stage.pack(tile.q, queries, source, problem.q.row_step, problem.head_dim)
        else:
            for x in range(queries):
                packed = on(scratch.rows, x * scratch.q_length)
                if x < count:
                    source = _row(problem, item, problem.q, item.q, row + x)
                    stage.read_row(
                        packed, source, problem.q.step, problem.head_dim, problem.q.storage
                    )
                else:
                    for d in range(problem.head_dim):
                        packed[d] = 0
            stage.transpose_rows(
                tile.q, queries, scratch.rows, scratch.q_length, queries, scratch.q_length
            )
        find_visible(problem, item, queries, row, count, tile)
        softmax.start(queries, tile.row_max, tile.row_sum, problem.head_dim_v, tile.o)

    @glue
    def find_visible(problem, item, queries, row, count, tile):
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
    def add_term(problem, item, operand, base, queries, row, count, key, keys, scratch):
        """Add a mask or bias, read through the caller's strides, to a score tile."""
        for x in range(count):
            source = on(_row(problem, item, operand, base, row + x), key * operand.step)
            stage.read_row(
                on(scratch.rows, x * BLOCK_KV), source, operand.step, keys, operand.storage
            )
        stage.transpose_rows(scratch.term, queries, scratch.rows, BLOCK_KV, queries, keys)
        modify.add_bias(queries, scratch.s, keys, scratch.term)

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
        some_hidden = False
        bias = problem.bias
        if bias.storage != ABSENT:
            add_term(problem, item, bias, item.bias, queries, row, count, key, keys, scratch)
            some_hidden = True
        mask = problem.mask
        if mask.storage != ABSENT:
            add_term(problem, item, mask, item.mask, queries, row, count, key, keys, scratch)
            some_hidden = True
        if tile.extent[1] > key or tile.extent[2] < key + keys - 1:
            for x in range(queries):
                scratch.begin[x] = max(tile.first[x] - key, 0)
                scratch.end[x] = min(max(tile.last[x] - key, -1), BLOCK_KV)
            modify.hide_outside(queries, scratch.s, keys, scratch.begin, scratch.end)
            some_hidden = True
        if some_hidden and careful.count_nonfinite(v, v_step, keys, problem.head_dim_v) > 0:
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
    def sees_a_key(problem, item, row, first, last, term):
        """Whether any key is visible to a row: asked only of rows whose scores are all -inf."""
        for key in range(first, last + 1):
            visible = True
            mask = problem.mask
            if mask.storage != ABSENT:
                source = on(_row(problem, item, mask, item.mask, row), key * mask.step)
                stage.read_row(term, source, mask.step, 1, mask.storage)
                visible = term[0] != -np.inf
            bias = problem.bias
            if bias.storage != ABSENT:
                source = on(_row(problem, item, bias, item.bias, row), key * bias.step)
                stage.read_row(term, source, bias.step, 1, bias.storage)
                visible = visible and term[0] != -np.inf
            if visible:
                return True
        return False

    @glue
    def finish(problem, item, queries, row, count, tile, scratch):
        """Divide by the sums, transpose, write the rows and their lse."""
        for x in range(count):
            if tile.row_max[x] == -np.inf and sees_a_key(
                problem, item, row + x, tile.first[x], tile.last[x], scratch.term
            ):
                # Every visible score is -inf: as in the textbook form, -inf - -inf is NaN.
                tile.row_sum[x] = np.nan
                for f in range(problem.head_dim_v):
                    tile.o[f * queries + x] = np.nan
        softmax.finish(queries, tile.row_sum, problem.head_dim_v, tile.o)
        out = problem.out
        if is_whole(problem, row, count, queries, out, problem.head_dim_v):
            target = pointer(address(_row(problem, item, out, item.out, row)), zero)
            stage.unpack(target, out.row_step, tile.o, queries, problem.head_dim_v)
        else:
            stage.transpose_rows(
                scratch.rows, scratch.v_length, tile.o, queries, scratch.v_length, queries
            )
            for x in range(count):
                target = _row(problem, item, out, item.out, row + x)
                source = on(scratch.rows, x * scratch.v_length)
                stage.write_row(target, out.step, source, problem.head_dim_v, out.storage)
        if item.lse != 0:
            lse = pointer(item.lse, tile.row_max)
            for x in range(count):
                head, query = _head_and_query(problem, item, row + x)
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
    def block(operand, base, kv_head, length, key, keys, staged):
        """A block of K or V and the bytes between its rows: in place, or converted to scratch."""
        start = base + kv_head * operand.head_step + key * operand.row_step
        if operand.storage == native and (operand.step == itemsize(staged) or length == 1):
            return pointer(start, staged), operand.row_step
        for j in range(keys):
            source = pointer(start + j * operand.row_step, _BYTE)
            stage.read_row(on(staged, j * length), source, operand.step, length, operand.storage)
        return staged, length * itemsize(staged)

    @glue
    def tile_shape(index, rows):
        """Lanes and queries of a tile: what fits into one register of queries is narrow."""
        rest = rows - index * most_queries
        if rest <= register:
            return register, rest
        return most_queries, min(most_queries, rest)

    @glue
    def ask_for_output(problem, item, row, count, step, steps):
        """Ask for this step's share of the rows that a tile writes when all steps are done.

        Waiting for them then would take 3% of the time, and all at once would hold up the keys.
        """
        out = problem.out
        for x in range(count * step // steps, count * (step + 1) // steps):
            target = _row(problem, item, out, item.out, row + x)
            for line in range(0, problem.head_dim_v * out.step, LINE):
                prefetch_to_write(bytes_on(target, line))

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

        first_block, end_block = first_key // BLOCK_KV, last_key // BLOCK_KV + 1
        for index in range(first_block, end_block):
            key = index * BLOCK_KV
            keys = min(BLOCK_KV, last_key + 1 - key)
            head = item.kv_head
            k, k_step = block(problem.k, item.k, head, problem.head_dim, key, keys, scratch.k)
            v, v_step = block(problem.v, item.v, head, problem.head_dim_v, key, keys, scratch.v)
            for t in range(count):
                tile = query_tile(scratch, t)
                queries, n = tile_shape(t, rows)
                at = row + t * most_queries
                step, steps = index - first_block, end_block - first_block
                ask_for_output(problem, item, at, n, step, steps)
                # Keys behind the last that any query of the tile sees are not looked at.
                seen = min(keys, tile.extent[3] + 1 - key)
                if seen > 0 and tile.extent[0] < key + seen:
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
            item = _item(problem, kv_head, batch, itemsize(scratch.s))
            row = head % segments * segment + chunk * height
            attend_rows(problem, item, row, min(height, segment - chunk * height), scratch)
            number = take_ticket(counter)
        keep(memory)
        keep(bounds)

    return prefill
