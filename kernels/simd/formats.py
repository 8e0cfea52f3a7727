"""Elements in the formats that callers store, of which Numba knows only some."""

from __future__ import annotations

import itertools
from typing import Any

from llvmlite import ir
from numba import types

from ..host import HOST
from .tile import Emit, emit_fma, i8, i16, i32, i64, intrinsic, pack, unpack

# ---------------------------------------------------------------------------
# Single elements
# ---------------------------------------------------------------------------


def _place(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value, element: ir.Type) -> ir.Value:
    at = builder.gep(builder.bitcast(base, i8.as_pointer()), [offset])
    return builder.bitcast(at, element.as_pointer())


def _reader(result: types.Type, element: ir.Type, widen: Emit) -> Any:
    """An intrinsic ``read(base, offset)`` of the element ``offset`` bytes after a pointer."""

    @intrinsic
    def read(typingctx, base, offset):
        def codegen(context, builder, sig, args):
            return widen(builder, builder.load(_place(builder, args[0], args[1], element), align=1))

        return result(base, types.intp), codegen

    return read


def _writer(result: types.Type, element: ir.Type, narrow: Emit) -> Any:
    """An intrinsic ``write(base, offset, value)``, the counterpart of ``_reader``."""

    @intrinsic
    def write(typingctx, base, offset, value):
        def codegen(context, builder, sig, args):
            at = _place(builder, args[0], args[1], element)
            builder.store(narrow(builder, args[2]), at, align=1)
            return context.get_dummy_value()

        return types.void(base, types.intp, result), codegen

    return write


def _same(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return value


def _widen_half(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    if HOST.converts_half:
        return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
    # Without the instruction LLVM would call a function that Numba's linker does not find. Shifted
    # into place, exponent and mantissa are the number divided by 2**112, subnormal ones too.
    bits = builder.zext(value, i32)
    shifted = builder.shl(builder.and_(bits, i32(0x7FFF)), i32(13))
    single = ir.FloatType()
    scaled = builder.fmul(builder.bitcast(shifted, single), single(2.0**112))
    special = builder.icmp_unsigned(">=", shifted, i32(0x7C00 << 13))
    magnitude = builder.select(
        special, builder.or_(shifted, i32(0x7F800000)), builder.bitcast(scaled, i32)
    )
    sign = builder.shl(builder.and_(bits, i32(0x8000)), i32(16))
    return builder.bitcast(builder.or_(magnitude, sign), single)


def _narrow_half(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    if HOST.converts_half:
        return builder.bitcast(builder.fptrunc(value, ir.HalfType()), i16)
    single = ir.FloatType()
    bits = builder.bitcast(value, i32)
    magnitude = builder.and_(bits, i32(0x7FFFFFFF))
    sign = builder.lshr(builder.and_(bits, i32(0x80000000)), i32(16))
    # Normal numbers: another bias, and half a unit more, less what makes ties even.
    odd = builder.and_(builder.lshr(magnitude, i32(13)), i32(1))
    rebiased = builder.add(magnitude, builder.add(odd, i32(0xFFF - ((127 - 15) << 23))))
    normal = builder.lshr(rebiased, i32(13))
    # Subnormal ones: the sum with 0.5 rounds at the right place.
    sum_bits = builder.bitcast(builder.fadd(builder.bitcast(magnitude, single), single(0.5)), i32)
    subnormal = builder.sub(sum_bits, i32(0x3F000000))
    nan = builder.icmp_unsigned(">", magnitude, i32(0x7F800000))
    special = builder.select(nan, i32(0x7E00), i32(0x7C00))
    is_small = builder.icmp_unsigned("<", magnitude, i32((127 - 14) << 23))
    is_large = builder.icmp_unsigned(">=", magnitude, i32((127 + 16) << 23))
    result = builder.select(is_large, special, builder.select(is_small, subnormal, normal))
    return builder.trunc(builder.or_(result, sign), i16)


def _widen_bfloat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    # A bfloat16 is the upper half of a float32.
    return builder.bitcast(builder.shl(builder.zext(value, i32), i32(16)), ir.FloatType())


def _narrow_bfloat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    # To nearest even; the addition would carry a NaN's payload into an Inf.
    bits = builder.bitcast(value, i32)
    odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
    rounded = builder.add(bits, builder.add(odd, i32(0x7FFF)))
    nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(nan, builder.or_(bits, i32(0x400000)), rounded)
    return builder.trunc(builder.lshr(chosen, i32(16)), i16)


def _widen_int8(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return builder.sitofp(value, ir.FloatType())


def _widen_bool(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    # What a mask adds to a score.
    single = ir.FloatType()
    false = builder.icmp_unsigned("==", value, i8(0))
    return builder.select(false, single(float("-inf")), single(0.0))


read_float32 = _reader(types.float32, ir.FloatType(), _same)
read_float64 = _reader(types.float64, ir.DoubleType(), _same)
read_half = _reader(types.float32, i16, _widen_half)
read_bfloat = _reader(types.float32, i16, _widen_bfloat)
read_int8 = _reader(types.float32, i8, _widen_int8)
read_bool = _reader(types.float32, i8, _widen_bool)
write_float32 = _writer(types.float32, ir.FloatType(), _same)
write_float64 = _writer(types.float64, ir.DoubleType(), _same)
write_half = _writer(types.float32, i16, _narrow_half)
write_bfloat = _writer(types.float32, i16, _narrow_bfloat)


# ---------------------------------------------------------------------------
# Whole registers
# ---------------------------------------------------------------------------


def _bytes_of(element: ir.Type) -> int:
    if isinstance(element, ir.IntType):
        return int(element.width) // 8
    return 4 if element == ir.FloatType() else 8


def _dots(element: ir.Type, widen: Emit) -> Any:
    """An intrinsic for a step of many dot products with rows of stored elements."""

    @intrinsic
    def add_dots(typingctx, acc, base, row_step, b):
        """``acc[m * n + r] + sum(a[r] * b[m])``, lane by lane.

        ``a`` are ``n`` stored rows, ``row_step`` bytes apart, as long as those of the tile ``b``.
        """
        stored = ir.VectorType(element, acc.lanes)
        size = _bytes_of(element)
        count = acc.rows // b.rows

        def codegen(context, builder, sig, args):
            sums, at, step, b_rows = args
            sums, b_rows = unpack(builder, sums), unpack(builder, b_rows)
            # Each register is used where it is loaded: LLVM keeps the order, and registers are few.
            for row, col in itertools.product(range(count), range(b.cols)):
                start = builder.add(builder.mul(step, i64(row)), i64(col * acc.lanes * size))
                place = _place(builder, at, start, stored)
                vector = widen(builder, builder.load(place, align=1))
                for m in range(b.rows):
                    n = m * count + row
                    sums[n] = emit_fma(builder, vector, b_rows[m * b.cols + col], sums[n])
            return pack(builder, acc, sums)

        return acc(acc, base, types.intp, b), codegen

    return add_dots


def _loader(element: ir.Type, widen: Emit) -> Any:
    """An intrinsic that loads a tile from rows of stored elements, ``row_step`` bytes apart."""

    @intrinsic
    def load_stored(typingctx, like, base, row_step):
        stored = ir.VectorType(element, like.lanes)
        size = _bytes_of(element)

        def codegen(context, builder, sig, args):
            vectors = []
            for row in range(like.rows):
                for col in range(like.cols):
                    start = builder.mul(args[2], i64(row))
                    offset = builder.add(start, i64(col * like.lanes * size))
                    at = _place(builder, args[1], offset, stored)
                    vectors.append(widen(builder, builder.load(at, align=1)))
            return pack(builder, like, vectors)

        return like(like, base, types.intp), codegen

    return load_stored


def _widen_halves(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    count = vector.type.count
    halves = builder.bitcast(vector, ir.VectorType(ir.HalfType(), count))
    return builder.fpext(halves, ir.VectorType(ir.FloatType(), count))


def _widen_bfloats(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    count = vector.type.count
    wide = ir.VectorType(i32, count)
    shifted = builder.shl(builder.zext(vector, wide), ir.Constant(wide, [16] * count))
    return builder.bitcast(shifted, ir.VectorType(ir.FloatType(), count))


def _widen_int8s(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    return builder.sitofp(vector, ir.VectorType(ir.FloatType(), vector.type.count))


load_float32 = _loader(ir.FloatType(), _same)
load_float64 = _loader(ir.DoubleType(), _same)
load_half = _loader(i16, _widen_halves)
load_bfloat = _loader(i16, _widen_bfloats)
load_int8 = _loader(i8, _widen_int8s)
add_dots_float32 = _dots(ir.FloatType(), _same)
add_dots_float64 = _dots(ir.DoubleType(), _same)
add_dots_half = _dots(i16, _widen_halves)
add_dots_bfloat = _dots(i16, _widen_bfloats)
add_dots_int8 = _dots(i8, _widen_int8s)
