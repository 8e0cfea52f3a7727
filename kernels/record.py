"""The record that a kernel is called with: every array as addresses and byte strides.

A record instead of arguments, so that a kernel is compiled once, whatever the arrays'
types and whoever calls it: the serial and the parallel launch run the same machine code.
Python fills it; ``launch`` adds what only arrays know. In a field that a call has no use for
stands 0, and ABSENT in the storage of an operand.
"""

from __future__ import annotations

import numpy as np

# Storage formats. A bool is read as what a mask adds to a score: 0 where True, -inf where False.
FLOAT32, FLOAT64, HALF, BFLOAT, BOOL, INT8 = range(6)
ABSENT = -1

# One array of the caller. A stride is 0 along an axis that is broadcast.
OPERAND = np.dtype(
    [
        ("base", np.int64),  # address of the first element
        ("batch_step", np.int64),  # bytes to the next batch entry,
        ("head_step", np.int64),  # head,
        ("row_step", np.int64),  # query or key,
        ("step", np.int64),  # and element
        ("storage", np.int64),  # one of the formats above, or ABSENT
    ]
)
OPERANDS = ("q", "k", "v", "out", "mask", "bias", "k_scale", "v_scale")

# A function of the caller's, as ``custom`` compiles it.
CUSTOM = np.dtype(
    [
        ("address", np.int64),  # of a C function of one TILE
        ("frozen", np.int64),  # address of the arguments that functools.partial holds
    ]
)

# What is known of a mask by blocks. A step is 0 along an axis that is broadcast.
BLOCK_MASK = np.dtype(
    [
        ("states", np.int64),  # address of (batch, head, row, column) bytes
        ("batch_step", np.int64),
        ("head_step", np.int64),
        ("row_step", np.int64),
        ("queries", np.int64),  # of one block
        ("keys", np.int64),
        ("mask_mod", CUSTOM),
    ]
)

# Every record that a kernel is called with begins with the number of the next work item.
COUNTER = 0
# What it is set to for work to stop: beyond all items, however many tickets are still taken.
STOPPED = 1 << 62

PROBLEM = np.dtype(
    [("counter", np.int64)]
    + [(name, OPERAND) for name in OPERANDS]
    + [
        (name, np.int64)
        for name in (
            "lse",  # address of (batch, head, query) in the accumulation type
            "tiles",  # query tiles of one work item
            "batches",
            "num_heads",
            "num_kv_heads",
            "seqlen_q",
            "seqlen_kv",
            "head_dim",
            "head_dim_v",
            "offsets",  # address of (operand, batch) bytes from ``base`` for batch axes that no
            # single stride describes
            "length",  # keys that exist,
            "lengths",  # or the address of so many of each batch entry
            "position",  # key at which query 0 stands,
            "positions",  # or the address of that of each batch entry
            "left",  # query at position p sees keys p - left
            "right",  # to p + right
            "pages",  # address of the numbers of the pages of each batch entry, where k and v are
            "pages_step",  # (page, head, row, feature); how many each entry has,
            "page_size",  # and keys of one page
            "states",  # decode: address of what is known after each chunk of keys, if there are
            "finished",  # several; and of how many are done, for each kv head of each batch entry
            "rows",  # decode: queries that share a kv head in one batch entry, at most
            "slopes",  # address of (batch, head) in the accumulation type,
            "slopes_step",  # and elements from one batch entry to the next
            "sinks",  # address of (head) in the accumulation type
            # Packed sequences: address of where each starts among the queries, and where the last
            # one ends; then ``seqlen_q`` is that of all,
            "starts",
            "work",  # address of (batch entry, first row, rows) of each work item of a kv head; for
            # decode of (chunk of keys, first member, last one and one)
            "work_items",
            "members",  # decode: address of (batch entry, chunks of those before it)
        )
    ]
    + [
        ("scale", np.float64),  # divided by the softcap
        ("softcap", np.float64),
        ("score_mod", CUSTOM),
        ("mask_mod", CUSTOM),
        ("blocks", BLOCK_MASK),
    ]
)

# What a function of the caller's is asked about: one tile of queries and one block of keys.
TILE = np.dtype(
    [
        (name, np.int64)
        for name in (
            "scores",  # address of S^T (keys, queries) in the accumulation type
            "visible",  # address of one word for each query, bit n of which stands for key + n
            "queries",  # whole registers
            "keys",
            "batch",
            "key",  # the first of the block
            "heads",  # address of the head of each query,
            "rows",  # and of its number in that head
            "frozen",  # address of the arguments that functools.partial holds
        )
    ]
)

# What a block of a mask is known as, and the record of finding it out.
HIDDEN, PARTIAL, VISIBLE = range(3)
BLOCKS = np.dtype(
    [
        (name, np.int64)
        for name in (
            "counter",  # as in PROBLEM, of rows of blocks
            "batches",
            "heads",
            "seqlen_q",
            "seqlen_kv",
        )
    ]
    + [("mask", BLOCK_MASK)]
)

# Keys of one block: K and V of 64 keys with a head_dim of 64 fill the first-level cache together
# with the scores. A multiple of every number of lanes, and as many as a word has bits.
BLOCK_KV = 64

# Keys of one chunk of decode. Small enough to share one long sequence between many cores, large
# enough for what is kept of each to be little: two rows of V, in the size of 2 CHUNK rows read.
CHUNK = 512


def field(name: str) -> int:
    """Return where a field stands in a record of integers."""
    offset: int = PROBLEM.fields[name][1]  # type: ignore[index]
    return offset // 8
