"""From NumPy arrays to a running kernel: fill the problem's record, then call or launch."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange, types
from numba.np.numpy_support import from_dtype

from .compile import entry, glue
from .record import PROBLEM
from .simd import address, call_kernel, data, keep


@glue
def _set_operand(operand, array, storage):
    operand.base = address(data(array))
    operand.batch_step = array.strides[0] if array.shape[0] > 1 else 0
    operand.head_step = array.strides[1]
    operand.row_step = array.strides[2]
    operand.step = array.strides[3]
    operand.storage = storage


@glue
def _set_term(operand, term):
    operand.base = term[0]
    operand.storage = term[1]
    operand.batch_step = term[2]
    operand.head_step = term[3]
    operand.row_step = term[4]
    operand.step = term[5]


@glue
def _fill(
    q,
    k,
    v,
    out,
    storage,
    lse,
    mask,
    bias,
    offsets,
    lengths,
    positions,
    left,
    right,
    scale,
    tiles,
    problems,
    counter,
):
    problem = problems[0]
    _set_operand(problem.q, q, storage)
    _set_operand(problem.k, k, storage)
    _set_operand(problem.v, v, storage)
    _set_operand(problem.out, out, storage)
    _set_term(problem.mask, mask)
    _set_term(problem.bias, bias)
    problem.batches = offsets.shape[1] if offsets.shape[1] > 0 else out.shape[0]
    problem.num_heads = q.shape[1]
    problem.num_kv_heads = v.shape[1]
    problem.seqlen_q = q.shape[2]
    problem.seqlen_kv = v.shape[2]
    problem.head_dim = q.shape[3]
    problem.head_dim_v = v.shape[3]
    problem.lse = address(data(lse)) if lse.size > 0 else 0
    problem.offsets = address(data(offsets)) if offsets.shape[1] > 0 else 0
    problem.lengths = address(data(lengths)) if lengths.size > 0 else 0
    problem.lengths_step = 1 if lengths.size > 1 else 0
    problem.positions = address(data(positions))
    problem.positions_step = 1 if positions.size > 1 else 0
    problem.left = left
    problem.right = right
    problem.tiles = tiles
    problem.scale = scale
    counter[0] = 0
    problem.counter = address(data(counter))


_records = types.Array(from_dtype(PROBLEM), 1, "C")


class Entries(NamedTuple):
    """The functions that Python calls, for arrays of one dtype."""

    run: Any
    describe: Any


@cache
def entries(dtype: np.dtype, accumulation: np.dtype) -> Entries:
    """Compile the ways in for arrays of ``dtype``.

    One signature takes any layout: strided, unaligned, and read-only but for the output.
    """
    element = from_dtype(dtype)
    read = types.Array(element, 4, "A", readonly=True, aligned=False)
    written = types.Array(element, 4, "A", aligned=False)
    lse = types.Array(from_dtype(accumulation), 3, "C")
    integer = types.int64
    numbers = types.Array(integer, 1, "A", readonly=True)
    table = types.Array(integer, 2, "C", readonly=True)
    arguments = (
        *(read, read, read, written, integer, lse, numbers, numbers, table, numbers, numbers),
        *(integer, integer, types.float64, integer),
    )
    counters = types.Array(integer, 1, "C")

    @entry(types.void(*arguments, integer), dtype)
    def run(
        q,
        k,
        v,
        out,
        storage,
        lse,
        mask,
        bias,
        offsets,
        lengths,
        positions,
        left,
        right,
        scale,
        tiles,
        kernel,
    ):
        """Run a kernel on the calling thread."""
        problems = np.empty(1, PROBLEM)
        counter = np.empty(1, np.int64)
        _fill(
            q,
            k,
            v,
            out,
            storage,
            lse,
            mask,
            bias,
            offsets,
            lengths,
            positions,
            left,
            right,
            scale,
            tiles,
            problems,
            counter,
        )
        call_kernel(kernel, address(data(problems)))
        keep(problems)
        keep(counter)

    @entry(types.void(*arguments, _records, counters), dtype)
    def describe(
        q,
        k,
        v,
        out,
        storage,
        lse,
        mask,
        bias,
        offsets,
        lengths,
        positions,
        left,
        right,
        scale,
        tiles,
        problems,
        counter,
    ):
        """Fill a record for ``launch``; it holds addresses: keep the arrays alive until then."""
        _fill(
            q,
            k,
            v,
            out,
            storage,
            lse,
            mask,
            bias,
            offsets,
            lengths,
            positions,
            left,
            right,
            scale,
            tiles,
            problems,
            counter,
        )

    return Entries(run, describe)


@entry(types.void(types.int64, _records))
def call(kernel, problems):
    """Run a kernel that ``describe`` prepared on the calling thread."""
    call_kernel(kernel, address(data(problems)))


@cache
def launcher() -> Any:
    """Compile, or load, the launch on several threads, which starts Numba's threading layer."""

    @entry(types.void(types.int64, _records, types.int64), parallel=True)
    def launch(kernel, problems, workers):
        """Run a kernel on ``workers`` threads, each of which takes items until none is left."""
        for _ in prange(workers):
            call_kernel(kernel, address(data(problems)))

    return launch
