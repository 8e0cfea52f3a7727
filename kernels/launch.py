"""From NumPy arrays and a filled record to a running kernel: alone, or on several threads."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange, types
from numba.np.numpy_support import from_dtype

from .compile import entry, glue
from .cores import core_in_use, leave, let_others_begin
from .record import COUNTER, PROBLEM
from .simd.pointers import address, call_kernel, data, record_type

problem_at = record_type(PROBLEM)

# A record travels as the integers that it is made of: Numba dispatches on those four times as fast.
_FIELDS = PROBLEM.itemsize // 8
_record = types.Array(types.int64, 1, "C", readonly=True)
_own_record = types.Array(types.int64, 1, "C")


@glue
def _place_operand(operand, array):
    operand.base = address(data(array))
    operand.batch_step = array.strides[0] if array.shape[0] > 1 else 0
    operand.head_step = array.strides[1]
    operand.row_step = array.strides[2]
    operand.step = array.strides[3]


@glue
def _place(q, k, v, out, lse, tiles, record, placed):
    """Copy a record and add the addresses and strides of the arrays."""
    for n in range(_FIELDS):
        placed[n] = record[n]
    problem = problem_at(address(data(placed)))
    _place_operand(problem.q, q)
    _place_operand(problem.k, k)
    _place_operand(problem.v, v)
    _place_operand(problem.out, out)
    problem.lse = address(data(lse)) if lse.size > 0 else 0
    problem.tiles = tiles


class Entries(NamedTuple):
    """The functions that Python calls, for arrays of one dtype."""

    run: Any
    place: Any


@cache
def entries(dtype: np.dtype, stored: np.dtype, accumulation: np.dtype) -> Entries:
    """Compile the ways in for queries and results of ``dtype``, keys and values of ``stored``.

    One signature takes any layout: strided, unaligned, and read-only but for the output.
    """
    read, read_stored = (
        types.Array(from_dtype(each), 4, "A", readonly=True, aligned=False)
        for each in (dtype, stored)
    )
    written = types.Array(from_dtype(dtype), 4, "A", aligned=False)
    lse = types.Array(from_dtype(accumulation), 3, "C")
    arguments = (read, read_stored, read_stored, written, lse, types.int64, _record)

    @entry(types.int64(*arguments, types.int64), dtype, stored)
    def run(q, k, v, out, lse, tiles, record, kernel):
        """Run a kernel on the calling thread; return its counter, as it is in the end."""
        placed = np.empty(_FIELDS, np.int64)
        _place(q, k, v, out, lse, tiles, record, placed)
        call_kernel(kernel, address(data(placed)))
        return placed[COUNTER]

    @entry(types.void(*arguments, _own_record), dtype, stored)
    def place(q, k, v, out, lse, tiles, record, placed):
        """Complete a record for ``launch``; it holds addresses: keep the arrays alive."""
        _place(q, k, v, out, lse, tiles, record, placed)

    return Entries(run, place)


@entry(types.void(types.int64, _own_record))
def call(kernel, placed):
    """Run a kernel on the calling thread, with a record that ``place`` completed."""
    call_kernel(kernel, address(data(placed)))


@cache
def launcher() -> Any:
    """Compile, or load, the launch on several threads, which starts Numba's threading layer."""

    @entry(types.void(types.int64, _own_record, types.int64), parallel=True)
    def launch(kernel, placed, workers):
        """Run a kernel on ``workers`` threads, each of which takes items until none is left."""
        core = core_in_use()
        for n in prange(workers):
            if n == 0:
                let_others_begin()
            else:
                leave(core)
            call_kernel(kernel, address(data(placed)))

    return launch
