"""The record that a kernel is called with: every array as addresses and byte strides.

A record instead of arguments, so that a kernel is compiled once, whatever the arrays'
types and whoever calls it: the serial and the parallel launch run the same machine code.
"""

from __future__ import annotations

import numpy as np

from .simd import record_type

# One array of the caller. A stride is 0 along an axis that is broadcast.
OPERAND = np.dtype(
    [
        ("base", np.int64),  # address of the first element
        ("batch_step", np.int64),  # bytes to the next batch entry,
        ("head_step", np.int64),  # head,
        ("row_step", np.int64),  # query or key,
        ("step", np.int64),  # and element
        ("storage", np.int64),  # a format of ``staging``, or ABSENT
    ]
)
OPERANDS = ("q", "k", "v", "out", "mask", "bias")

PROBLEM = np.dtype(
    [(name, OPERAND) for name in OPERANDS]
    + [
        (name, np.int64)
        for name in (
            "batches",
            "num_heads",
            "num_kv_heads",
            "seqlen_q",
            "seqlen_kv",
            "head_dim",
            "head_dim_v",
            "lse",  # address of (batch, head, query) in the accumulation type, or 0
            "offsets",  # address of (operand, batch) bytes from ``base`` for batch axes that no
            # single stride describes, or 0
            "lengths",  # address of the visible keys of each batch entry, or 0
            "lengths_step",  # 0 where one length serves all
            "positions",  # address of the key at which query 0 of each batch entry stands
            "positions_step",
            "left",  # query at position p sees keys p - left
            "right",  # to p + right
            "tiles",  # query tiles of one work item
            "counter",  # address of the number of the next work item
        )
    ]
    + [("scale", np.float64)]
)

problem_at = record_type(PROBLEM)
