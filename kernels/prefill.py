"""Attention of many queries: work items of (batch, kv head, tiles of queries).

::

    for every (batch, kv head, group of query tiles)        shared between the threads
        pack the queries, transposed
        for every block of keys that any of them sees       one after the other
            for every tile that sees some of it
                scores -> what variants make of them -> hide -> softmax -> add the weighted sum
        divide by the sums, transpose, write

A work item owns its rows of the output, so that threads do not race, and no sum crosses
items, so that bits depend neither on the threads nor on the batch. Items are taken from
a shared counter: a core that is held up takes fewer. Every thread has its own scratch;
nothing grows with the number of keys. See Dao (2023), FlashAttention-2, sections 3.1
and 3.2.

Every variant is a switch for a whole tile, so that one compiled kernel for each
accumulation type serves them all, and one more for a dot-product unit, where there is one.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from .compile import glue, kernel
from .host import HOST
from .items import between, item_of, problem_at, row_at
from .operands import elements, pairs
from .record import ABSENT, BLOCK_KV, FLOAT32, FLOAT64, STOPPED
from .simd.pointers import (
    address,
    bytes_on,
    data,
    itemsize,
    keep,
    last_ticket,
    on,
    pointer,
    prefetch_to_write,
    take_ticket,
)
from .simd.tile import lanes_of
from .softmax import online_softmax
from .staging import staging
from .tiles import RUN_NARROW, RUN_WIDE, careful_tiles, nonfinite_finder, tiles
from .visibility import ASKED, BESIDE, NOTHING, Places, places_in

# Query tiles of one work item, at most, where a bias is read beside keys that are read in place:
# CPUs foresee what comes next in as many rows as two tiles have, not in those of eight.
_TILES_WITH_BIAS = 2

# Keys that are summed before their sums are set aside. With 4096, rows of 100,000 keys have the
# error of a sum of a hundred terms; it takes some thousandth of the time.
_SPAN = 4096

# Bytes of a line of the caches.
_LINE = 64

_COLS = HOST.wide[1]
_INTEGER = np.int64(0)


class QueryTile(NamedTuple):
    """What is kept of one tile of queries from block to block."""

    q: Any  # Q^T (head_dim, queries)
    o: Any  # O^T, not yet divided by the sums (head_dim_v, queries)
    row_max: Any
    row_sum: Any
    aside: Any  # of spans that have ended: since, row_sum and O^T
    places: Places
    sees: Any  # what the tile sees of the current block


class Scratch(NamedTuple):
    """One thread's memory. Rows on their way to or from a tile are padded to whole registers."""

    s: Any  # S^T, then P^T (BLOCK_KV, queries)
    kept: Any  # S^T where it is needed beside P^T
    term: Any  # a bias, transposed like S^T
    rescale: Any
    lanes: Any  # two numbers for each query
    rows: Any  # rows between the caller's memory and a transposed tile
    k: Any  # a block of K or V where the caller's memory cannot be read in place, or rounded Q
    v: Any
    tiles: Any  # the query tiles, floating-point part
    integers: Any  # and their integers
    words: Any  # two words for each query
    asked: Any  # a tile, described to a function of the caller's
    q_length: int  # the steps of head_dim, and head_dim_v, padded
    v_length: int
    longest: int  # elements of the longest row
    tile_size: int  # elements of one query tile


# ---------------------------------------------------------------------------
# The kernel
# ---------------------------------------------------------------------------


def most_queries(element: types.Float) -> int:
    """Queries of one tile."""
    return _COLS * lanes_of(element)


@cache
def prefill(element: types.Float, in_pairs: bool) -> int:
    """Address of the kernel that accumulates in ``element``; compiled at the first call.

    ``in_pairs``: with the unit for dots of bfloat16 pairs; Q, K and V of other formats are rounded.
    """
    zero = np.dtype(str(element)).type(0)
    native = FLOAT32 if element == types.float32 else FLOAT64
    register = lanes_of(element)
    most = most_queries(element)
    tile_integers = 5 * most + BESIDE + 1
    wide = tiles(element, _COLS, in_pairs)
    narrow = tiles(element, 1, in_pairs)
    careful = careful_tiles(element, in_pairs)
    any_nonfinite = nonfinite_finder(element, in_pairs)
    operands = pairs(element) if in_pairs else elements(element)
    per_step = operands.per_step
    softmax = online_softmax(element)
    parts = between(element)
    stage = staging(element)

    @glue
    def steps(count):
        """How many steps add so many products."""
        return (count + per_step - 1) // per_step

    @glue
    def has_spans(item):
        """Whether its rows are long enough for sums to be set aside."""
        return item.seqlen_kv > _SPAN

    @glue
    def begin(problem, item, queries, row, count, tile, scratch):
        """Find where the queries stand, pack them, and set the state before any key."""
        places = tile.places
        parts.find_places(problem, item, queries, row, count, places)
        operands.pack_queries(problem, item, queries, count, tile, scratch)
        softmax.start(queries, tile.row_max, tile.row_sum, problem.head_dim_v, tile.o)
        if has_spans(item):
            for n in range(queries):
                tile.aside[n] = 1
            for n in range(queries, (2 + problem.head_dim_v) * queries):
                tile.aside[n] = 0
        if problem.sinks != 0:
            # As if a key had been seen, with a value of zeros.
            sinks = pointer(problem.sinks, zero)
            for x in range(queries):
                tile.row_max[x] = sinks[places.heads[x]]
                tile.row_sum[x] = 1

    @glue
    def attend_block(
        problem, item, queries, count, key, keys, k, k_step, v, v_step, strange, tile, scratch
    ):
        """One tile of queries against one block of keys, some of which it sees."""
        is_wide = queries == most
        product = (k, k_step, keys, tile.q, steps(problem.head_dim), problem.scale, scratch.s)
        if is_wide:
            wide.scores(*product)
        else:
            narrow.scores(*product)
        parts.modify(problem, queries, count, key, keys, tile.sees[0], tile.places, scratch)
        if strange:
            careful.copy(queries, scratch.s, keys, scratch.kept)
        softmax.update(queries, scratch.s, keys, tile.row_max, tile.row_sum, scratch.rescale)
        if has_spans(item):
            softmax.keep_pace(queries, scratch.rescale, tile.aside)
        operands.weights(queries, keys, scratch.s)
        if strange:
            careful.values_seen(
                queries,
                v,
                v_step,
                steps(keys),
                scratch.kept,
                scratch.s,
                scratch.rescale,
                problem.head_dim_v,
                tile.o,
                RUN_WIDE if is_wide else RUN_NARROW,
            )
            return
        weighted = (scratch.s, scratch.rescale, problem.head_dim_v, tile.o)
        if is_wide:
            wide.values(v, v_step, steps(keys), *weighted)
        else:
            narrow.values(v, v_step, steps(keys), *weighted)

    @glue
    def finish(problem, item, queries, count, tile, scratch):
        """Divide by the sums, transpose, write the rows and their lse."""
        places, out = tile.places, problem.out
        o, row_sum = tile.o, tile.row_sum
        if has_spans(item):
            row_sum = on(tile.aside, queries)
            o = on(row_sum, queries)
        for x in range(count):
            if tile.row_max[x] == -np.inf and parts.sees_a_key(
                problem, queries, count, x, places, scratch
            ):
                # Every visible score is -inf: as in the textbook form, -inf - -inf is NaN.
                row_sum[x] = np.nan
                for f in range(problem.head_dim_v):
                    o[f * queries + x] = np.nan
        softmax.finish(queries, row_sum, problem.head_dim_v, o)
        if parts.is_whole(out, problem.head_dim_v, queries, count, places):
            first = row_at(out, item.out, places.heads[0], places.rows[0])
            target = pointer(address(first), zero)
            stage.unpack(target, out.row_step, o, queries, problem.head_dim_v)
        else:
            stage.transpose_rows(
                scratch.rows, scratch.v_length, o, queries, scratch.v_length, queries
            )
            for x in range(count):
                target = row_at(out, item.out, places.heads[x], places.rows[x])
                source = on(scratch.rows, x * scratch.v_length)
                stage.write_row(target, out.step, source, problem.head_dim_v, out.storage)
        if item.lse != 0:
            lse = pointer(item.lse, tile.row_max)
            for x in range(count):
                n = places.heads[x] * problem.seqlen_q + places.rows[x]
                lse[n] = tile.row_max[x] + math.log(row_sum[x])

    @glue
    def query_tile(scratch, index, queries):
        q = on(scratch.tiles, index * scratch.tile_size)
        o = on(q, most * scratch.q_length)
        row_max = on(o, most * scratch.v_length)
        row_sum = on(row_max, most)
        aside = on(row_sum, most)
        integers = on(scratch.integers, index * tile_integers)
        places = places_in(integers, queries)
        return QueryTile(q, o, row_max, row_sum, aside, places, on(integers, tile_integers - 1))

    @glue
    def tile_shape(index, rows):
        """Lanes and queries of a tile: what fits into one register of queries is narrow."""
        rest = rows - index * most
        if rest <= register:
            return register, rest
        return most, min(most, rest)

    @glue
    def fetch_output(problem, item, count, key, last_key, places):
        """As many of a tile's rows of the output as is this block's share of the keys.

        Waiting for them at the end would take 3% of the time at 1024 keys.
        """
        out = problem.out
        end = min(key + BLOCK_KV, last_key + 1)
        for x in range(count * key // (last_key + 1), count * end // (last_key + 1)):
            row = row_at(out, item.out, places.heads[x], places.rows[x])
            for n in range(0, problem.head_dim_v * out.step, _LINE):
                prefetch_to_write(on(row, n))

    @glue
    def part_of_block(key, keys, extent):
        """How many keys of a block lie before all that a tile sees, and how many may be seen.

        A multiple of what is summed one after the other, so that what is skipped changes no bit;
        whole steps, so that a key that shares one with a visible key counts as hidden.
        """
        skip = max(extent[0] - key, 0) // RUN_NARROW * RUN_NARROW
        return skip, min(keys, steps(extent[3] + 1 - key) * per_step) - skip

    @glue
    def set_aside(problem, count, rows, scratch):
        """End a span for all tiles of a work item."""
        for t in range(count):
            queries, _ = tile_shape(t, rows)
            tile = query_tile(scratch, t, queries)
            softmax.set_aside(queries, tile.row_sum, problem.head_dim_v, tile.o, tile.aside)

    @glue
    def attend_rows(problem, item, row, rows, scratch, counter):
        """One work item: so many rows of one kv head against all keys that they see.

        Their output is left as it is where the work is stopped meanwhile.
        """
        count = (rows + most - 1) // most
        first_key = item.seqlen_kv
        last_key = np.int64(-1)
        for t in range(count):
            queries, n = tile_shape(t, rows)
            tile = query_tile(scratch, t, queries)
            begin(problem, item, queries, row + t * most, n, tile, scratch)
            first_key = min(first_key, tile.places.extent[0])
            last_key = max(last_key, tile.places.extent[3])

        for key in range(first_key // BLOCK_KV * BLOCK_KV, last_key + 1, BLOCK_KV):
            if last_ticket(counter) >= STOPPED:
                return
            # Where a span ends depends on the number of the key alone, so that no bit moves.
            if key % _SPAN == 0 and key > first_key:
                set_aside(problem, count, rows, scratch)
            keys = min(BLOCK_KV, last_key + 1 - key)
            most_seen = np.int64(NOTHING)
            some_hidden = False
            for t in range(count):
                queries, n = tile_shape(t, rows)
                tile = query_tile(scratch, t, queries)
                skip, seen = part_of_block(key, keys, tile.places.extent)
                at = key + skip
                sees = parts.look(problem, queries, n, at, seen, tile.places, scratch)
                tile.sees[0] = sees
                most_seen = max(most_seen, sees)
                some_hidden = some_hidden or parts.hides(problem, sees)
            if most_seen == NOTHING:
                continue
            k, k_step = operands.keys(problem, item, key, keys, scratch)
            v, v_step = operands.values(problem, item, key, keys, scratch)
            # Of a hidden NaN or Inf, 0 times the value would be left.
            rows_of_v = (v, v_step, steps(keys), problem.head_dim_v)
            strange = some_hidden and any_nonfinite(*rows_of_v) != 0
            for t in range(count):
                queries, n = tile_shape(t, rows)
                tile = query_tile(scratch, t, queries)
                if tile.sees[0] != NOTHING:
                    fetch_output(problem, item, n, key, last_key, tile.places)
                    skip, seen = part_of_block(key, keys, tile.places.extent)
                    k_rows, v_rows = bytes_on(k, skip * k_step), bytes_on(v, steps(skip) * v_step)
                    block = (key + skip, seen, k_rows, k_step, v_rows, v_step, strange)
                    attend_block(problem, item, queries, n, *block, tile, scratch)

        if has_spans(item):
            set_aside(problem, count, rows, scratch)
        for t in range(count):
            queries, n = tile_shape(t, rows)
            finish(problem, item, queries, n, query_tile(scratch, t, queries), scratch)

    @glue
    def padded(length):
        """A length in whole registers."""
        return (length + register - 1) // register * register

    @glue
    def allocate(problem):
        """One thread's scratch, and the two arrays that own it."""
        q_length = padded(steps(problem.head_dim))
        v_length = padded(problem.head_dim_v)
        tile_size = most * (q_length + 2 * v_length + 4)
        block_size = most * BLOCK_KV
        longest = max(padded(problem.head_dim), v_length, BLOCK_KV)
        staged = BLOCK_KV * (q_length + v_length)
        total = 3 * block_size + (3 + longest) * most + staged + problem.tiles * tile_size
        memory = np.empty(total + 64, np.dtype(type(zero)))
        integers = np.empty(problem.tiles * tile_integers + 2 * most + ASKED, np.int64)
        # Aligned, so that no register of scratch straddles two cache lines.
        s = pointer((address(data(memory)) + 63) // 64 * 64, zero)
        kept = on(s, block_size)
        term = on(kept, block_size)
        rescale = on(term, block_size)
        lanes = on(rescale, most)
        rows = on(lanes, 2 * most)
        k = on(rows, longest * most)
        v = on(k, BLOCK_KV * q_length)
        tiles_at = on(v, BLOCK_KV * v_length)
        words = on(data(integers), problem.tiles * tile_integers)
        scratch = Scratch(
            s,
            kept,
            term,
            rescale,
            lanes,
            rows,
            k,
            v,
            tiles_at,
            data(integers),
            words,
            on(words, 2 * most),
            q_length,
            v_length,
            longest,
            tile_size,
        )
        return scratch, memory, integers

    @kernel(element, *(["pairs"] if in_pairs else []))
    def prefill(problem_address):
        """Take work items from the problem's counter until none is left."""
        problem = problem_at(problem_address)
        scratch, memory, integers = allocate(problem)
        height = problem.tiles * most
        if problem.bias.storage != ABSENT and problem.k.storage == native and per_step == 1:
            height = min(height, _TILES_WITH_BIAS * most)
        # Where one head's queries do not fill a tile, those of the whole group share it.
        group_rows = problem.num_heads // problem.num_kv_heads * problem.seqlen_q
        segment = problem.seqlen_q if problem.seqlen_q >= most else group_rows
        segments = group_rows // segment
        chunks = (segment + height - 1) // height
        items = problem.batches * problem.num_kv_heads * segments * chunks
        if problem.work != 0:
            items = problem.work_items * problem.num_kv_heads
        counter = pointer(problem_address, _INTEGER)
        number = take_ticket(counter)
        while number < items:
            if problem.work != 0:
                entry = on(pointer(problem.work, _INTEGER), number // problem.num_kv_heads * 3)
                batch, row, rows = entry[0], entry[1], entry[2]
                kv_head = number % problem.num_kv_heads
            else:
                # The last chunk first: under causal it sees the most keys.
                chunk = chunks - 1 - number % chunks
                head = number // chunks
                kv_head = head // segments % problem.num_kv_heads
                batch = head // segments // problem.num_kv_heads
                row = head % segments * segment + chunk * height
                rows = min(height, segment - chunk * height)
            item = item_of(problem, kv_head, batch, itemsize(scratch.s))
            attend_rows(problem, item, row, rows, scratch, counter)
            number = take_ticket(counter)
        keep(memory)
        keep(integers)

    return prefill
