"""Between lanes and rows: outer products, sums of lanes, transposition."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from .tile import (
    Emit,
    Tile,
    _ir_float,
    emit_bytes_on,
    emit_dot_pairs,
    emit_fma,
    emit_splat,
    i32,
    i64,
    intrinsic,
    literal,
    pack,
    unpack,
    vector_at,
)


def _add_outer(
    builder: ir.IRBuilder,
    multiply_add: Emit,
    acc: Tile,
    sums: list[ir.Value],
    a_base: ir.Value,
    a_step: ir.Value,
    b_row: list[ir.Value],
) -> ir.Value:
    for row in range(acc.rows):
        at = emit_bytes_on(builder, a_base, builder.mul(a_step, i64(row)))
        # The caller's memory may have any alignment.
        element = emit_splat(builder, builder.load(at, align=1), acc.vector)
        for col in range(acc.cols):
            n = row * acc.cols + col
            sums[n] = multiply_add(builder, element, b_row[col], sums[n])
    return pack(builder, acc, sums)


def _outer(multiply_add: Emit, doc: str) -> Any:
    @intrinsic
    def add(typingctx, acc, a, a_step, b):
        def codegen(context, builder, sig, args):
            sums, a_base, step, b_base = args
            b_row = [
                builder.load(
                    vector_at(builder, b_base, i64(col * acc.lanes), acc), align=acc.itemsize
                )
                for col in range(acc.cols)
            ]
            sums = unpack(builder, sums)
            return _add_outer(builder, multiply_add, acc, sums, a_base, step, b_row)

        return acc(acc, a, types.intp, b), codegen

    add.__doc__ = doc
    return add


add_outer = _outer(
    emit_fma,
    """``acc[r, :] + a[r] * b[:]`` for every row ``r``.

    ``a[r]`` is one element, ``a_step`` bytes apart and broadcast to all lanes;
    ``b`` points to one row. The step of which both products of attention are made.
    """,
)
add_outer_pairs = _outer(emit_dot_pairs, "The same where elements are pairs of bfloat16.")


@intrinsic
def add_row(typingctx, acc, a, a_step, row):
    """``acc[r, :] + a[r] * row[:]``: ``add_outer`` with a row that is in registers."""

    def codegen(context, builder, sig, args):
        sums, a_base, step, row = args
        sums, row = unpack(builder, sums), unpack(builder, row)
        return _add_outer(builder, emit_fma, acc, sums, a_base, step, row)

    return acc(acc, a, types.intp, row), codegen


@intrinsic
def sum_lanes(typingctx, acc):
    """The sum of every row's lanes: register ``n``, lane ``r`` holds that of row ``n * lanes + r``.

    Every row is summed in the same order: both halves, then both halves of what is left.
    """
    count = acc.lanes
    result = Tile(acc.element, acc.rows // count, 1)

    def codegen(context, builder, sig, args):
        def halves(first, second, step):
            # Each group of 2 * step lanes becomes step lanes of ``first``, then step of ``second``.
            low = [
                lane // (2 * step) * 2 * step + lane % step + (count if lane & step else 0)
                for lane in range(count)
            ]
            orders = (low, [lane + step for lane in low])
            return builder.fadd(
                *(
                    builder.shuffle_vector(
                        first, second, ir.Constant(ir.VectorType(i32, count), order)
                    )
                    for order in orders
                )
            )

        vectors = unpack(builder, args[0])
        sums = []
        for start in range(0, acc.rows, count):
            level = vectors[start : start + count]
            while len(level) > 1:
                step = len(level) // 2
                level = [halves(level[n], level[n + step], step) for n in range(step)]
            sums += level
        return pack(builder, result, sums)

    return result(acc), codegen


@intrinsic
def store_parts(typingctx, pointer, step, tile, parts):
    """Write the elements of a tile as so many equal parts, ``step`` elements apart."""
    length = len(tile) * tile.lanes // literal(parts)
    piece = min(length, tile.lanes)

    def codegen(context, builder, sig, args):
        base, step, value, _ = args
        part = ir.VectorType(_ir_float(tile.element), piece)
        for n in range(0, len(tile) * tile.lanes, piece):
            vector = unpack(builder, value)[n // tile.lanes]
            order = [n % tile.lanes + lane for lane in range(piece)]
            indices = ir.Constant(ir.VectorType(i32, piece), order)
            chosen = builder.shuffle_vector(vector, vector, indices)
            index = builder.add(builder.mul(step, i64(n // length)), i64(n % length))
            at = builder.bitcast(builder.gep(base, [index]), part.as_pointer())
            builder.store(chosen, at, align=tile.itemsize)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, tile, parts), codegen


@intrinsic
def accumulate(typingctx, acc, rescale, pointer, row_step):
    """Rows at ``pointer`` become ``row * rescale + acc``, with one row of factors for all."""

    def codegen(context, builder, sig, args):
        sums, factors, base, step = args
        factors = unpack(builder, factors)
        for n, vector in enumerate(unpack(builder, sums)):
            row, col = divmod(n, acc.cols)
            index = builder.add(builder.mul(step, i64(row)), i64(col * acc.lanes))
            at = vector_at(builder, base, index, acc)
            old = builder.load(at, align=acc.itemsize)
            builder.store(emit_fma(builder, old, factors[col], vector), at, align=acc.itemsize)
        return context.get_dummy_value()

    return types.void(acc, rescale, pointer, types.intp), codegen


def _swap_blocks(builder: ir.IRBuilder, vectors: list[ir.Value], size: int) -> list[ir.Value]:
    """Transpose every ``size x size`` block of a square of registers in its place."""
    count = len(vectors)
    order_type = ir.VectorType(i32, count)
    # Swap the off-diagonal blocks of size 2**k, from half of a block down to single elements.
    step = size // 2
    while step:
        for row in range(count):
            if row & step:
                continue
            upper, lower = vectors[row], vectors[row + step]
            left = [j - step + count if j & step else j for j in range(count)]
            right = [j + count if j & step else j + step for j in range(count)]
            vectors[row], vectors[row + step] = (
                builder.shuffle_vector(upper, lower, ir.Constant(order_type, order))
                for order in (left, right)
            )
        step //= 2
    return vectors


@intrinsic
def transpose(typingctx, tile):
    """Rows become lanes; the tile has one column and as many rows as lanes."""

    def codegen(context, builder, sig, args):
        vectors = unpack(builder, args[0])
        return pack(builder, tile, _swap_blocks(builder, vectors, tile.lanes))

    return tile(tile), codegen


@intrinsic
def load_transposed(typingctx, like, pointer, row_step):
    """The transpose of what ``load_apart`` loads, in half of the steps between registers.

    Rows are loaded in parts of 16 bytes, each to where it is to be transposed.
    """
    size = 16 // like.itemsize
    parts = like.lanes // size

    def codegen(context, builder, sig, args):
        _, base, step = args
        part = ir.VectorType(like.vector.element, size)

        def load_part(row, index):
            at = emit_bytes_on(builder, base, builder.mul(step, i64(row)))
            at = builder.gep(at, [i64(index * size)])
            return builder.load(builder.bitcast(at, part.as_pointer()), align=1)

        # Block m of register m * size + r is part m of row r, of row r + size, and so on.
        vectors = [
            _joined(builder, [load_part(r + p * size, m) for p in range(parts)])
            for m in range(parts)
            for r in range(size)
        ]
        return pack(builder, like, _swap_blocks(builder, vectors, size))

    return like(like, pointer, types.intp), codegen


def _joined(builder: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """One register of as many parts as it has room for."""
    while len(parts) > 1:
        count = 2 * parts[0].type.count
        order = ir.Constant(ir.VectorType(i32, count), list(range(count)))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [builder.shuffle_vector(*pair, order) for pair in pairs]
    return parts[0]
