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

PROBLEM = np.dtype(
    [(name, OPERAND) for name in OPERANDS]
    + [
        (name, np.int64)
        for name in (
            "lse",  # address of (batch, head, query) in the accumulation type
            "counter",  # the number of the next work item
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
            "states",  # decode: address of what is known after each chunk of keys, if there are
            "finished",  # several; and of how many are done, for each kv head of each batch entry
        )
    ]
    + [("scale", np.float64)]
)

# Keys of one chunk of decode. Small enough to share one long sequence between many cores, large
# enough for what is kept of each to be little: two rows of V, in the size of 2 CHUNK rows read.
CHUNK = 512

# Where a kernel, and Python, find fields of a record of integers.
STATES, FINISHED = (PROBLEM.fields[name][1] // 8 for name in ("states", "finished"))  # type: ignore[index]
COUNTER_OFFSET = PROBLEM.fields["counter"][1]  # type: ignore[index]
