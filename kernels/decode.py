"""Attention of few queries against many keys: work items of (batch, kv head, chunk of keys).

::

    for every (batch, kv head, chunk of keys)           shared between the threads
        for every block of keys in the chunk
            scores -> bias, mask -> hide                all queries of the group at once
        softmax of the chunk
        for every block of values in the chunk
            add the weighted sum
        keep the chunk's state (max, sum, weighted sum)
        who finishes the last chunk of a head: merge the states, divide, write

Reading K and V is nearly all of the work; each is read once, for all queries that share the
kv head. Chunks begin at multiples of CHUNK and states merge in the order of the keys, so that
bits depend neither on the threads nor on the batch. The states are the only memory that grows
with the keys: a row of V for every CHUNK of them and every query.

See Dao, Haziza, Massa and Sizov (2023), Flash-Decoding for long-context inference, and for the
merge Milakov and Gimelshein (2018), section 3.1.

Where packed sequences have a chunk in the same pages, one work item goes over all of them: the
first reads the keys from memory, and the others from the cache of the core. No bit depends on it.
See Juravsky et al. (2024), Hydragen, section 3, for what a shared prefix is worth.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from .compile import glue, kernel
from .host import HOST
from .items import between, item_of, key_address, lie_together, problem_at, row_at, scale_of
from .record import ABSENT, BLOCK_KV, CHUNK, FLOAT32, FLOAT64, INT8
from .rows import careful_rows, key_scaler, row_softmax, rows_of
from .simd.pointers import address, data, itemsize, keep, on, pointer, take_ticket
from .simd.tile import lanes_of
from .staging import staging
from .tiles import nonfinite_finder
from .visibility import ASKED, BESIDE, NOTHING, SOMETHING, places_in

_BLOCKS = CHUNK // BLOCK_KV

_BYTE = np.uint8(0)
_INTEGER = np.int64(0)
_SINGLE = np.float32(0)


class State(NamedTuple):
    """What is known of every row after some of its keys: the state of ``softmax``."""

    o: Any  # (rows, head_dim_v)
    row_max: Any
    row_sum: Any


class Scratch(NamedTuple):
    """One thread's memory. Rows are padded to whole registers."""

    q: Any  # (rows, head_dim)
    p: Any  # scores of a chunk, then their exponentials (rows, CHUNK and a margin)
    kept: Any  # scores where they are needed beside the exponentials
    k: Any  # a block of K or V that cannot be read in place
    v: Any
    state: Any
    total: Any
    s: Any  # a block of scores, transposed for ``modify`` (BLOCK_KV, queries)
    term: Any
    rows: Any
    lanes: Any
    words: Any
    asked: Any
    integers: Any  # where queries stand: the places of a work item, which has so many queries
    sees: Any  # what the queries see of each block of the chunk
    q_length: int  # head_dim and head_dim_v, padded
    v_length: int


@cache
def decode(element: types.Float, storage: int) -> int:
    """Address of the kernel for keys and values of ``storage``; compiled at the first call.

    The one for the accumulation type itself takes every other format as well: it converts blocks
    to scratch. Those for other formats read K and V in place: rows must be whole registers, and
    pages whole blocks.
    """
    zero = np.dtype(str(element)).type(0)
    native = FLOAT32 if element == types.float32 else FLOAT64
    register = lanes_of(element)
    # Scores are written, and softmax reads, up to so many elements behind the last key.
    p_step = CHUNK + max(HOST.sums, HOST.exp_rows * register)
    p_step += -p_step % register
    products = rows_of(element, storage)
    softmax = row_softmax(element)
    values_seen = careful_rows(element)
    any_nonfinite = nonfinite_finder(element)
    scale_keys = key_scaler(element)
    parts = between(element)
    stage = staging(element)

    @glue
    def block(problem, item, operand, base, length, padded, key, keys, staged):
        """Rows of K or V and the bytes between them: in place, or converted to scratch."""
        is_native = operand.storage == native and operand.step == itemsize(staged)
        fits = is_native and length == padded and lie_together(problem)
        if storage != native or fits:
            return pointer(key_address(problem, item, operand, base, key), _BYTE), operand.row_step
        parts.read_keys(problem, item, operand, base, length, padded, key, keys, staged)
        return pointer(address(staged), _BYTE), padded * itemsize(staged)

    @glue
    def scale_columns(problem, item, operand, base, key, keys, rows, p, scratch):
        """Multiply the columns of P with the scale of each key: 8-bit rows are stored without."""
        scales = pointer(key_address(problem, item, operand, base, key), _SINGLE)
        if not lie_together(problem):
            scales = pointer(address(scratch.rows), _SINGLE)
            for j in range(keys):
                scales[j] = scale_of(problem, item, operand, base, key + j)
        scale_keys(p, p_step, rows, keys, scales)

    @glue
    def modify(problem, item, rows, queries, key, keys, sees, p, places, scratch):
        """Apply the modifiers, which take scores transposed."""
        stage.transpose_rows(scratch.s, queries, p, p_step, queries, BLOCK_KV)
        parts.modify(problem, queries, rows, key, keys, sees, places, scratch)
        stage.transpose_rows(p, p_step, scratch.s, queries, BLOCK_KV, queries)

    @glue
    def add_values(problem, item, key, keys, rows, p, kept, hides, state, scratch):
        """Add a block's weighted sum."""
        head_dim_v, v_length = problem.head_dim_v, scratch.v_length
        place = (problem.v, item.v, head_dim_v, v_length, key, keys, scratch.v)
        source, step = block(problem, item, *place)
        if hides and storage != INT8:
            v, v_step = pointer(address(source), zero), step
            if storage != native:
                parts.read_keys(problem, item, *place)
                v, v_step = scratch.v, v_length * itemsize(scratch.v)
            if any_nonfinite(v, v_step, keys, head_dim_v) != 0:
                values_seen(v, v_step, keys, kept, p, p_step, rows, v_length, state.o)
                return
        products.values(source, step, keys, p, p_step, rows, v_length, state.o, v_length)

    @glue
    def attend_chunk(problem, item, rows, queries, begin, end, state, places, scratch):
        """The state of the queries after the keys from ``begin`` to ``end`` alone."""
        q_length = scratch.q_length
        changes = parts.changes_scores(problem)
        hides_some = False
        for key in range(begin, end, BLOCK_KV):
            keys = min(BLOCK_KV, end - key)
            p = on(scratch.p, key - begin)
            sees = parts.look(problem, queries, rows, key, keys, places, scratch)
            scratch.sees[(key - begin) // BLOCK_KV] = sees
            hides_some = hides_some or parts.hides(problem, sees)
            if sees == NOTHING:
                for x in range(rows):
                    for j in range(keys):
                        p[x * p_step + j] = -np.inf
                continue
            place = (problem.k, item.k, problem.head_dim, q_length, key, keys, scratch.k)
            k, k_step = block(problem, item, *place)
            products.scores(
                k, k_step, keys, scratch.q, q_length, rows, q_length, problem.scale, p, p_step
            )
            if problem.k_scale.storage != ABSENT:
                scales = (problem.k_scale, item.k_scale)
                scale_columns(problem, item, *scales, key, keys, rows, p, scratch)
            if changes or sees == SOMETHING:
                modify(problem, item, rows, queries, key, keys, sees, p, places, scratch)

        if hides_some:
            for n in range(rows * p_step):
                scratch.kept[n] = scratch.p[n]
        softmax(scratch.p, p_step, rows, end - begin, state.row_max, state.row_sum)
        for n in range(rows * scratch.v_length):
            state.o[n] = 0
        for key in range(begin, end, BLOCK_KV):
            sees = scratch.sees[(key - begin) // BLOCK_KV]
            if sees == NOTHING:
                continue
            keys = min(BLOCK_KV, end - key)
            p, kept = on(scratch.p, key - begin), on(scratch.kept, key - begin)
            if problem.v_scale.storage != ABSENT:
                scales = (problem.v_scale, item.v_scale)
                scale_columns(problem, item, *scales, key, keys, rows, p, scratch)
            hides = parts.hides(problem, sees)
            add_values(problem, item, key, keys, rows, p, kept, hides, state, scratch)

    @glue
    def state_at(base, rows, v_length):
        o = pointer(base, zero)
        row_max = on(o, rows * v_length)
        return State(o, row_max, on(row_max, rows))

    @glue
    def merge(problem, states, size, first, last, rows, total, heads, v_length):
        """The state after the chunks from ``first`` to ``last``, if any, in this order."""
        for x in range(rows):
            # A sink is one more part, with a value of zeros.
            sink = -np.inf
            if problem.sinks != 0:
                sink = pointer(problem.sinks, zero)[heads[x]]
            highest = sink
            for n in range(first, last + 1):
                highest = max(highest, state_at(states + n * size, rows, v_length).row_max[x])
            base = 0.0 if highest == -np.inf else highest
            total.row_max[x] = highest
            total.row_sum[x] = math.exp(sink - base)
            o = on(total.o, x * v_length)
            for f in range(v_length):
                o[f] = 0
            for n in range(first, last + 1):
                part = state_at(states + n * size, rows, v_length)
                factor = math.exp(part.row_max[x] - base)
                total.row_sum[x] += part.row_sum[x] * factor
                o_part = on(part.o, x * v_length)
                for f in range(v_length):
                    o[f] += o_part[f] * factor

    @glue
    def finish(problem, item, rows, queries, total, places, scratch):
        """Divide by the sums and write the rows and their lse; 0 / 1 for a row that saw nothing."""
        out = problem.out
        for x in range(rows):
            if total.row_max[x] == -np.inf and parts.sees_a_key(
                problem, queries, rows, x, places, scratch
            ):
                # Every visible score is -inf: as in the textbook form, -inf - -inf is NaN.
                total.row_sum[x] = np.nan
                for f in range(scratch.v_length):
                    total.o[x * scratch.v_length + f] = np.nan
            divisor = total.row_sum[x] if total.row_sum[x] != 0 else zero + 1
            o = on(total.o, x * scratch.v_length)
            for f in range(problem.head_dim_v):
                o[f] = o[f] / divisor
            target = row_at(out, item.out, places.heads[x], places.rows[x])
            stage.write_row(target, out.step, o, problem.head_dim_v, out.storage)
            if item.lse != 0:
                n = places.heads[x] * problem.seqlen_q + places.rows[x]
                lse = pointer(item.lse, zero)
                lse[n] = total.row_max[x] + math.log(total.row_sum[x])

    @glue
    def pack(problem, item, rows, places, scratch):
        """Read the queries."""
        for x in range(rows):
            q = on(scratch.q, x * scratch.q_length)
            source = row_at(problem.q, item.q, places.heads[x], places.rows[x])
            stage.read_row(q, source, problem.q.step, problem.head_dim, problem.q.storage)
            for d in range(problem.head_dim, scratch.q_length):
                q[d] = 0

    @glue
    def allocate(problem, rows, queries):
        """One thread's scratch, and the arrays that own it."""
        q_length = (problem.head_dim + register - 1) // register * register
        v_length = (problem.head_dim_v + register - 1) // register * register
        state_size = rows * (v_length + 2)
        block_size = BLOCK_KV * queries
        total = rows * q_length + 2 * queries * p_step + BLOCK_KV * (q_length + v_length)
        total += 2 * state_size + 3 * block_size + 2 * queries
        memory = np.empty(total + 64, np.dtype(type(zero)))
        integers = np.empty(7 * queries + BESIDE + ASKED + _BLOCKS, np.int64)
        # Aligned, so that no register of scratch straddles two cache lines.
        p = pointer((address(data(memory)) + 63) // 64 * 64, zero)
        kept = on(p, queries * p_step)
        k = on(kept, queries * p_step)
        v = on(k, BLOCK_KV * q_length)
        q = on(v, BLOCK_KV * v_length)
        s = on(q, rows * q_length)
        term = on(s, block_size)
        staged = on(term, block_size)
        lanes = on(staged, block_size)
        state = on(lanes, 2 * queries)
        words = on(data(integers), 5 * queries + BESIDE)
        asked = on(words, 2 * queries)
        scratch = Scratch(
            q,
            p,
            kept,
            k,
            v,
            state,
            on(state, state_size),
            s,
            term,
            staged,
            lanes,
            words,
            asked,
            data(integers),
            on(asked, ASKED),
            q_length,
            v_length,
        )
        return scratch, memory, integers

    @glue
    def attend(problem, batch, kv_head, chunk, before, size, scratch):
        """One chunk of the keys of one kv head of a batch entry; ``before`` it lie so many."""
        item = item_of(problem, kv_head, batch, itemsize(scratch.p))
        chunks = max((item.seqlen_kv + CHUNK - 1) // CHUNK, 1)
        if chunk >= chunks:
            return
        rows = problem.num_heads // problem.num_kv_heads * item.seqlen_q
        queries = (rows + register - 1) // register * register
        places = places_in(scratch.integers, queries)
        v_length, extent = scratch.v_length, places.extent
        parts.find_places(problem, item, queries, 0, rows, places)
        # The states of the head's chunks: in scratch where there is only one.
        states = address(scratch.state)
        if chunks > 1:
            states = problem.states + (before * problem.num_kv_heads + kv_head * chunks) * size
        begin = max(extent[0] // BLOCK_KV * BLOCK_KV, chunk * CHUNK)
        end = min(extent[3] + 1, (chunk + 1) * CHUNK)
        if begin < end:
            pack(problem, item, rows, places, scratch)
            state = state_at(states + chunk * size, rows, v_length)
            attend_chunk(problem, item, rows, queries, begin, end, state, places, scratch)
        done = np.int64(1)
        if chunks > 1:
            head = batch * problem.num_kv_heads + kv_head
            done += take_ticket(on(pointer(problem.finished, _INTEGER), head))
        if done == chunks:
            first, last = extent[0] // CHUNK, extent[3] // CHUNK
            if extent[0] > extent[3]:
                last = first - 1  # nothing is seen: what lies there is another item's
            total = state_at(address(scratch.total), rows, v_length)
            merge(problem, states, size, first, last, rows, total, places.heads, v_length)
            finish(problem, item, rows, queries, total, places, scratch)

    @kernel(element, storage)
    def decode(problem_address):
        """Take work items from the problem's counter until none is left."""
        problem = problem_at(problem_address)
        queries = (problem.rows + register - 1) // register * register
        chunks = max((problem.seqlen_kv + CHUNK - 1) // CHUNK, 1)
        items = problem.batches * problem.num_kv_heads * chunks
        if problem.work != 0:
            items = problem.work_items * problem.num_kv_heads
        scratch, memory, integers = allocate(problem, problem.rows, queries)
        size = problem.rows * (scratch.v_length + 2) * itemsize(scratch.q)
        counter = pointer(problem_address, _INTEGER)
        number = take_ticket(counter)
        while number < items:
            chunk, head = number % chunks, number // chunks
            kv_head, first = head % problem.num_kv_heads, head // problem.num_kv_heads
            last = first + 1
            if problem.work != 0:
                entry = on(pointer(problem.work, _INTEGER), number // problem.num_kv_heads * 3)
                kv_head = number % problem.num_kv_heads
                chunk, first, last = entry[0], entry[1], entry[2]
            for n in range(first, last):
                batch, before = n, n * chunks
                if problem.work != 0:
                    member = on(pointer(problem.members, _INTEGER), n * 2)
                    batch, before = member[0], member[1]
                attend(problem, batch, kv_head, chunk, before, size, scratch)
            number = take_ticket(counter)
        keep(memory)
        keep(integers)

    return decode
