"""Arithmetic, lane by lane, and over all registers or lanes of a tile."""

from __future__ import annotations

import math
import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from .tile import (
    Bfloat,
    Emit,
    Tile,
    call_vector,
    constant,
    emit_dot_pairs,
    emit_fma,
    emit_splat,
    i8,
    i16,
    i32,
    i64,
    integer_vector,
    intrinsic,
    lanewise,
    pack,
    unpack,
)


def _overload_operator(function: Any, emit: Emit) -> None:
    @infer_global(function)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Tile) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    @lower_builtin(function, Tile, Tile)
    def _lower(context, builder, sig, args):
        return lanewise(builder, sig.return_type, emit, *args)


_overload_operator(operator.add, lambda builder, a, b: builder.fadd(a, b))
_overload_operator(operator.sub, lambda builder, a, b: builder.fsub(a, b))
_overload_operator(operator.mul, lambda builder, a, b: builder.fmul(a, b))
_overload_operator(operator.truediv, lambda builder, a, b: builder.fdiv(a, b))


def _ternary(emit: Emit, doc: str) -> Any:
    @intrinsic
    def combine(typingctx, a, b, c):
        def codegen(context, builder, sig, args):
            return lanewise(builder, a, emit, *args)

        return a(a, b, c), codegen

    combine.__doc__ = doc
    return combine


fma = _ternary(emit_fma, "``a * b + c``, rounded once where the CPU can.")
dot_pairs = _ternary(
    emit_dot_pairs, "``a[0] * b[0] + a[1] * b[1] + c``, with lanes that are pairs."
)


def _emit_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fadd(a, b)


def emit_maximum(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """The larger of ``a`` and ``b``; ``b`` where either is NaN."""
    # Exactly one MAXPS: its second operand is the result where either is NaN.
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def maximum(typingctx, a, b):
    """The larger of ``a`` and ``b``; ``b`` where either is NaN."""

    def codegen(context, builder, sig, args):
        return lanewise(builder, a, emit_maximum, *args)

    return a(a, b), codegen


@intrinsic
def where_less(typingctx, a, b, yes, no):
    """``yes`` in the lanes where ``a < b``, else ``no``; ``no`` where ``a`` or ``b`` is NaN."""

    def emit(builder, a, b, yes, no):
        return builder.select(builder.fcmp_ordered("<", a, b), yes, no)

    def codegen(context, builder, sig, args):
        return lanewise(builder, a, emit, *args)

    return a(a, b, yes, no), codegen


def _both_halves(builder: ir.IRBuilder, low: ir.Value, high: ir.Value, vector: ir.Type) -> ir.Value:
    """Registers of 16-bit integers, as the lower and upper halves of the lanes of ``vector``."""
    wide = ir.VectorType(i32, vector.count)
    raised = builder.shl(builder.zext(high, wide), ir.Constant(wide, [16] * vector.count))
    return builder.bitcast(builder.or_(builder.zext(low, wide), raised), vector)


@intrinsic
def paired(typingctx, first, second):
    """Pairs of bfloat16, to which two tiles are rounded lane by lane; only on CPUs with the unit.

    The instruction takes subnormal numbers as zeros.
    """

    def emit(builder, *pair):
        vector = first.vector
        bits = ir.VectorType(i16, vector.count)
        narrow = ir.VectorType(Bfloat(), vector.count)
        low, high = (builder.bitcast(builder.fptrunc(x, narrow), bits) for x in pair)
        return _both_halves(builder, low, high, vector)

    def codegen(context, builder, sig, args):
        return lanewise(builder, first, emit, *args)

    return first(first, second), codegen


@intrinsic
def seen_pairs(typingctx, first, second, pairs):
    """``pairs`` with 0 where the score of its first or second half, -inf, hides it."""

    def emit(builder, a, b, pair):
        bits = ir.VectorType(i16, pairs.lanes)
        hides = constant(pairs.vector, -math.inf)
        low, high = (
            builder.sext(builder.fcmp_unordered("!=", score, hides), bits) for score in (a, b)
        )
        kept = builder.bitcast(
            _both_halves(builder, low, high, pairs.vector), integer_vector(pair.type)
        )
        taken = builder.and_(builder.bitcast(pair, kept.type), kept)
        return builder.bitcast(taken, pair.type)

    def codegen(context, builder, sig, args):
        return lanewise(builder, pairs, emit, *args)

    return pairs(first, second, pairs), codegen


@intrinsic
def magnitude(typingctx, x):
    """``|x|``, lane by lane."""

    def codegen(context, builder, sig, args):
        return lanewise(builder, x, lambda builder, a: call_vector(builder, "fabs", a), args[0])

    return x(x), codegen


# ---------------------------------------------------------------------------
# Over rows and lanes
# ---------------------------------------------------------------------------


def _reduction(emit: Emit, doc: str) -> Any:
    @intrinsic
    def reduce(typingctx, start, tile):
        def codegen(context, builder, sig, args):
            (result,) = unpack(builder, args[0])
            for vector in unpack(builder, args[1]):
                result = emit(builder, result, vector)
            return pack(builder, start, [result])

        return start(start, tile), codegen

    reduce.__doc__ = doc
    return reduce


# In order, one register after the other: the result does not depend on how rows are grouped.
add_rows = _reduction(_emit_add, "``start`` plus every row of a tile of one column.")
maximum_rows = _reduction(emit_maximum, "The maximum of ``start`` and every row.")


def _across(emit: Emit, doc: str) -> Any:
    @intrinsic
    def across(typingctx, tile):
        def codegen(context, builder, sig, args):
            vectors = unpack(builder, args[0])
            result = vectors[0]
            for vector in vectors[1:]:
                result = emit(builder, result, vector)
            step = tile.lanes
            while step > 1:
                step //= 2
                order = [(lane + step) % tile.lanes for lane in range(tile.lanes)]
                indices = ir.Constant(ir.VectorType(i32, tile.lanes), order)
                result = emit(builder, result, builder.shuffle_vector(result, result, indices))
            return builder.extract_element(result, i32(0))

        return tile.element(tile), codegen

    across.__doc__ = doc
    return across


sum_across = _across(_emit_add, "The sum of all elements of a tile: registers, then halves.")
maximum_across = _across(emit_maximum, "The largest element of a tile; anything where one is NaN.")


@intrinsic
def any_nan(typingctx, row):
    """Whether any lane of one register is NaN, as 0 or 1."""

    def codegen(context, builder, sig, args):
        (x,) = unpack(builder, args[0])
        found = builder.bitcast(builder.fcmp_unordered("uno", x, x), ir.IntType(row.lanes))
        return builder.zext(builder.icmp_unsigned("!=", found, found.type(0)), i64)

    return types.intp(row), codegen


# ---------------------------------------------------------------------------
# Bits of words: what queries see
# ---------------------------------------------------------------------------


@intrinsic
def bits_of(typingctx, source):
    """A word of which bit n is set where byte n of 64 is not zero."""

    def codegen(context, builder, sig, args):
        row = ir.VectorType(i8, 64)
        found = builder.load(builder.bitcast(args[0], row.as_pointer()), align=1)
        return builder.bitcast(builder.icmp_unsigned("!=", found, ir.Constant(row, None)), i64)

    return types.int64(source), codegen


@intrinsic
def where_bit(typingctx, words, n, yes, no):
    """``yes`` in the lanes where bit ``n + row`` of the lane's word is set, else ``no``.

    The tiles have one column; ``words`` points to as many words as they have lanes.
    """

    def codegen(context, builder, sig, args):
        at, first, chosen, others = args
        row = ir.VectorType(i64, yes.lanes)
        found = builder.load(builder.bitcast(at, row.as_pointer()), align=8)
        nothing = ir.Constant(row, None)
        results = []
        pairs = zip(unpack(builder, chosen), unpack(builder, others), strict=True)
        for index, each in enumerate(pairs):
            bit = builder.shl(i64(1), builder.add(first, i64(index)))
            tested = builder.and_(found, emit_splat(builder, bit, row))
            results.append(builder.select(builder.icmp_unsigned("!=", tested, nothing), *each))
        return pack(builder, yes, results)

    return yes(words, types.intp, yes, no), codegen
