"""Between the caller's memory and scratch: the only place that knows storage formats.

Scratch rows hold the accumulation type and are a whole number of registers long, so
that the products and the softmax have neither formats nor tails to care about.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from .compile import inline, routine
from .record import BFLOAT, FLOAT32, FLOAT64, HALF, INT8
from .simd.formats import (
    read_bfloat,
    read_bool,
    read_float32,
    read_float64,
    read_half,
    read_int8,
    write_bfloat,
    write_float32,
    write_float64,
    write_half,
)
from .simd.pointers import bytes_on, on
from .simd.products import load_transposed, transpose
from .simd.registers import lanes, load, splat, square, store, store_apart

_bytes = types.CPointer(types.uint8)
_int = types.intp


def _row_reader(read: Any, itemsize: int) -> Any:
    @inline
    def read_elements(target, source, step, count):
        # With a step known when compiling, LLVM reads and converts whole registers.
        if step == itemsize:
            for n in range(count):
                target[n] = read(source, n * itemsize)
        else:
            for n in range(count):
                target[n] = read(source, n * step)

    return read_elements


def _row_writer(write: Any, itemsize: int) -> Any:
    @inline
    def write_elements(target, step, source, count):
        if step == itemsize:
            for n in range(count):
                write(target, n * itemsize, source[n])
        else:
            for n in range(count):
                write(target, n * step, source[n])

    return write_elements


_read_float32 = _row_reader(read_float32, 4)
_read_float64 = _row_reader(read_float64, 8)
_read_half = _row_reader(read_half, 2)
_read_bfloat = _row_reader(read_bfloat, 2)
_read_bool = _row_reader(read_bool, 1)
_read_int8 = _row_reader(read_int8, 1)
_write_float32 = _row_writer(write_float32, 4)
_write_float64 = _row_writer(write_float64, 8)
_write_half = _row_writer(write_half, 2)
_write_bfloat = _row_writer(write_bfloat, 2)


class Staging(NamedTuple):
    """The routines for one accumulation type."""

    read_row: Any
    write_row: Any
    transpose_rows: Any
    pack: Any
    unpack: Any


@cache
def staging(element: types.Float) -> Staging:
    """Compile the ways in and out of scratch."""
    zero = np.dtype(str(element)).type(0)
    pointer = types.CPointer(element)

    @routine(types.void(pointer, _bytes, _int, _int, _int), element)
    def read_row(target, source, step, count, storage):
        """``target[n] = source[n]``, elements ``step`` bytes apart, converted from ``storage``."""
        if storage == FLOAT32:
            _read_float32(target, source, step, count)
        elif storage == FLOAT64:
            _read_float64(target, source, step, count)
        elif storage == HALF:
            _read_half(target, source, step, count)
        elif storage == BFLOAT:
            _read_bfloat(target, source, step, count)
        elif storage == INT8:
            _read_int8(target, source, step, count)
        else:
            _read_bool(target, source, step, count)

    @routine(types.void(_bytes, _int, pointer, _int, _int), element)
    def write_row(target, step, source, count, storage):
        """``target[n] = source[n]``, elements ``step`` bytes apart, rounded to ``storage``."""
        if storage == FLOAT32:
            _write_float32(target, step, source, count)
        elif storage == FLOAT64:
            _write_float64(target, step, source, count)
        elif storage == HALF:
            _write_half(target, step, source, count)
        else:
            _write_bfloat(target, step, source, count)

    @routine(types.void(pointer, _int, pointer, _int, _int, _int), element)
    def transpose_rows(target, target_step, source, source_step, count, length):
        """``target[n, m] = source[m, n]`` for ``m < count`` and ``n < length``, in scratch.

        Goes by squares of registers: both must be padded to whole registers.
        """
        block = square(splat(zero, 1))
        size = lanes(block)
        for m in range(0, count, size):
            for n in range(0, length, size):
                tile = load(block, on(source, m * source_step + n), source_step)
                store(on(target, n * target_step + m), target_step, transpose(tile))

    @routine(types.void(pointer, _int, pointer, _int, _int), element)
    def pack(target, queries, source, row_step, length):
        """``target[n, m] = source[m, n]``: whole tiles, from rows where the caller has them."""
        block = square(splat(zero, 1))
        size = lanes(block)
        whole = length - length % size
        for m in range(0, queries, size):
            rows = bytes_on(source, m * row_step)
            for n in range(0, whole, size):
                tile = load_transposed(block, on(rows, n), row_step)
                store(on(target, n * queries + m), queries, tile)
        for m in range(queries):
            row = bytes_on(source, m * row_step)
            for n in range(whole, length):
                target[n * queries + m] = row[n]

    @routine(types.void(pointer, _int, pointer, _int, _int), element)
    def unpack(target, row_step, source, queries, length):
        """``target[m, n] = source[n, m]``, the counterpart of ``pack``."""
        block = square(splat(zero, 1))
        size = lanes(block)
        whole = length - length % size
        for m in range(0, queries, size):
            rows = bytes_on(target, m * row_step)
            for n in range(0, whole, size):
                tile = load(block, on(source, n * queries + m), queries)
                store_apart(on(rows, n), row_step, transpose(tile))
        for m in range(queries):
            row = bytes_on(target, m * row_step)
            for n in range(whole, length):
                row[n] = source[n * queries + m]

    return Staging(read_row, write_row, transpose_rows, pack, unpack)
