"""Making, loading and storing tiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from ..host import HOST
from .tile import (
    Tile,
    constant,
    emit_bytes_on,
    emit_splat,
    i64,
    intrinsic,
    lanes_of,
    literal,
    pack,
    unpack,
    vector_at,
)


def _shaped(rows: int | None, cols: int | None) -> Callable[[Tile], Tile]:
    return lambda like: Tile(like.element, rows or like.rows, cols or like.cols)


def _accumulators(like: Tile) -> Tile:
    rows, cols = HOST.wide if like.cols == HOST.wide[1] else HOST.narrow
    return Tile(like.element, rows, cols)


def _constant_tile(shape: Callable[[Tile], Tile], value: Callable[[Tile], float], doc: str) -> Any:
    @intrinsic
    def make(typingctx, like):
        tile = shape(like)

        def codegen(context, builder, sig, args):
            return pack(builder, tile, [constant(tile.vector, value(tile))] * len(tile))

        return tile(like), codegen

    make.__doc__ = doc
    return make


def _lowest(tile: Tile) -> float:
    return float(np.finfo(str(tile.element)).min)


_same_shape = _shaped(None, None)
zeros = _constant_tile(_same_shape, lambda _: 0.0, "Zeros, shaped as ``like``.")
ones = _constant_tile(_same_shape, lambda _: 1.0, "Ones, shaped as ``like``.")
hidden = _constant_tile(_same_shape, lambda _: -math.inf, "-inf, the score of a hidden key.")
lowest = _constant_tile(_same_shape, _lowest, "The lowest finite number: only -inf is less.")
accumulators = _constant_tile(
    _accumulators, lambda _: 0.0, "Zeros as wide as ``like``, as many rows as registers hold."
)
stack = _constant_tile(
    _shaped(HOST.exp_rows, 1), lambda _: 0.0, "Zeros: as many registers as one exp mixes."
)
square = _constant_tile(
    lambda like: Tile(like.element, lanes_of(like.element), 1),
    lambda _: 0.0,
    "Zeros, one column and as many rows as lanes: what can be transposed.",
)


@intrinsic
def splat(typingctx, scalar, cols):
    """One row of ``cols`` registers, every lane ``scalar``."""
    tile = Tile(scalar, 1, literal(cols))

    def codegen(context, builder, sig, args):
        return pack(builder, tile, [emit_splat(builder, args[0], tile.vector)] * len(tile))

    return tile(scalar, cols), codegen


@intrinsic
def shaped(typingctx, like, rows, cols):
    """Zeros, ``rows x cols`` registers of the element of ``like``."""
    tile = Tile(like.element, literal(rows), literal(cols))

    def codegen(context, builder, sig, args):
        return pack(builder, tile, [constant(tile.vector, 0.0)] * len(tile))

    return tile(like, rows, cols), codegen


@intrinsic
def filled(typingctx, like, scalar):
    """A tile shaped as ``like``, every lane ``scalar``."""

    def codegen(context, builder, sig, args):
        return pack(builder, like, [emit_splat(builder, args[1], like.vector)] * len(like))

    return like(like, like.element), codegen


@intrinsic
def repeated(typingctx, like, row):
    """A tile shaped as ``like``, every row the same."""

    def codegen(context, builder, sig, args):
        return pack(builder, like, unpack(builder, args[1]) * like.rows)

    return like(like, row), codegen


@intrinsic
def rows(typingctx, tile):
    """The number of rows, a constant."""
    return types.intp(tile), lambda context, builder, sig, args: i64(tile.rows)


@intrinsic
def lanes(typingctx, tile):
    """The number of elements in one register, a constant."""
    return types.intp(tile), lambda context, builder, sig, args: i64(tile.lanes)


@intrinsic
def width(typingctx, tile):
    """The number of elements in one row, a constant."""
    return types.intp(tile), lambda context, builder, sig, args: i64(tile.cols * tile.lanes)


@intrinsic
def load(typingctx, like, pointer, row_step):
    """A tile shaped as ``like`` from rows that lie ``row_step`` elements apart."""

    def codegen(context, builder, sig, args):
        _, base, step = args
        vectors = []
        for row in range(like.rows):
            for col in range(like.cols):
                index = builder.add(builder.mul(step, i64(row)), i64(col * like.lanes))
                # Without align LLVM assumes the whole vector's, and faults on NumPy's memory.
                at = vector_at(builder, base, index, like)
                vectors.append(builder.load(at, align=like.itemsize))
        return pack(builder, like, vectors)

    return like(like, pointer, types.intp), codegen


@intrinsic
def load_apart(typingctx, like, pointer, row_step):
    """A tile shaped as ``like``, of one column, from rows ``row_step`` bytes apart."""

    def codegen(context, builder, sig, args):
        _, base, step = args
        vectors = []
        for row in range(like.rows):
            at = emit_bytes_on(builder, base, builder.mul(step, i64(row)))
            at = builder.bitcast(at, like.vector.as_pointer())
            # The caller's memory may have any alignment.
            vectors.append(builder.load(at, align=1))
        return pack(builder, like, vectors)

    return like(like, pointer, types.intp), codegen


@intrinsic
def store_apart(typingctx, pointer, row_step, tile):
    """Write a tile of one column to rows ``row_step`` bytes apart."""

    def codegen(context, builder, sig, args):
        base, step, value = args
        for row, vector in enumerate(unpack(builder, value)):
            at = emit_bytes_on(builder, base, builder.mul(step, i64(row)))
            builder.store(vector, builder.bitcast(at, tile.vector.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, tile), codegen


@intrinsic
def store(typingctx, pointer, row_step, tile):
    """Write a tile to rows that lie ``row_step`` elements apart."""

    def codegen(context, builder, sig, args):
        base, step, value = args
        for n, vector in enumerate(unpack(builder, value)):
            row, col = divmod(n, tile.cols)
            index = builder.add(builder.mul(step, i64(row)), i64(col * tile.lanes))
            builder.store(vector, vector_at(builder, base, index, tile), align=tile.itemsize)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, tile), codegen
