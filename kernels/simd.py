"""The vocabulary of the kernels: tiles of vector registers. The only file that speaks LLVM.

A ``Tile`` is a value of ``rows x cols`` vector registers, each ``lanes`` elements
wide, as an SSA value: a local variable that holds one costs no memory. Its shape
is part of its type, so a function that is given one tile knows the shape of the
others it needs (``like`` in the signatures below), and Numba compiles each
function once for each shape.

Pointers are Numba's ``CPointer(element)``. Steps between rows of the caller's
memory are in bytes, as NumPy counts them; steps in scratch memory in elements.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic as _intrinsic
from numba.extending import models, register_model
from numba.np.numpy_support import from_dtype

from .exponential import EXPONENTIALS, lowest_power
from .host import HOST

intrinsic = _intrinsic(prefer_literal=True)

_i8 = ir.IntType(8)
_i16 = ir.IntType(16)
_i32 = ir.IntType(32)
_i64 = ir.IntType(64)


class _Bfloat(ir.Type):
    """LLVM's bfloat16, which llvmlite does not know."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self))

    def __hash__(self) -> int:
        return hash(type(self))


# ---------------------------------------------------------------------------
# The type
# ---------------------------------------------------------------------------


class Tile(types.Type):
    """``rows x cols`` vector registers of ``element``."""

    def __init__(self, element: types.Float, rows: int, cols: int) -> None:
        self.element = element
        self.rows = rows
        self.cols = cols
        self.lanes = lanes_of(element)
        super().__init__(f"Tile({element}, {rows} x {cols} x {self.lanes})")

    @property
    def vector(self) -> ir.VectorType:
        """The type of one register."""
        return ir.VectorType(_ir_float(self.element), self.lanes)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.element.bitwidth // 8

    def __len__(self) -> int:
        return self.rows * self.cols


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, tile: Tile) -> None:
        super().__init__(manager, tile, ir.ArrayType(tile.vector, len(tile)))


def lanes_of(element: types.Float) -> int:
    """How many elements one vector register holds."""
    return HOST.vector_bytes * 8 // element.bitwidth


def _ir_float(element: types.Float) -> ir.Type:
    return ir.FloatType() if element == types.float32 else ir.DoubleType()


def _literal(value: Any) -> int:
    return int(value.literal_value)


# ---------------------------------------------------------------------------
# Small pieces of IR
# ---------------------------------------------------------------------------


def _unpack(builder: ir.IRBuilder, tile: ir.Value) -> list[ir.Value]:
    return [builder.extract_value(tile, n) for n in range(tile.type.count)]


def _pack(builder: ir.IRBuilder, tile: Tile, vectors: list[ir.Value]) -> ir.Value:
    packed = ir.Constant(ir.ArrayType(tile.vector, len(tile)), ir.Undefined)
    for n, vector in enumerate(vectors):
        packed = builder.insert_value(packed, vector, n)
    return packed


def _splat(builder: ir.IRBuilder, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, _i32(0))
    zeros = ir.Constant(ir.VectorType(_i32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, undefined, zeros)


def _constant(vector: ir.VectorType, value: float) -> ir.Value:
    return ir.Constant(vector, [value] * vector.count)


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    # llvmlite's builder.fma refuses vectors. Without the instruction llvm.fma would call libm for
    # every lane; fmuladd becomes a multiplication and an addition.
    return _call_vector(builder, "fma" if HOST.fused else "fmuladd", a, b, c)


def _call_vector(builder: ir.IRBuilder, name: str, *xs: ir.Value) -> ir.Value:
    """Call an intrinsic of LLVM that takes vectors and returns one like them."""
    vector = xs[0].type
    bits = 32 if vector.element == ir.FloatType() else 64
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(vector, [vector] * len(xs)),
        f"llvm.{name}.v{vector.count}f{bits}",
    )
    return builder.call(function, xs)


def emit_dot_pairs(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """``a[0] * b[0] + a[1] * b[1] + c``: lanes of ``a`` and ``b`` hold two bfloat16 each."""
    vector = c.type
    pairs = ir.VectorType(_Bfloat(), 2 * vector.count)
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(vector, [vector, pairs, pairs]),
        f"llvm.x86.avx512bf16.dpbf16ps.{32 * vector.count}",
    )
    return builder.call(function, [c, builder.bitcast(a, pairs), builder.bitcast(b, pairs)])


def _bytes_on(builder: ir.IRBuilder, pointer: ir.Value, count: ir.Value) -> ir.Value:
    return builder.bitcast(
        builder.gep(builder.bitcast(pointer, _i8.as_pointer()), [count]), pointer.type
    )


def _vector_at(builder: ir.IRBuilder, pointer: ir.Value, index: ir.Value, tile: Tile) -> ir.Value:
    return builder.bitcast(builder.gep(pointer, [index]), tile.vector.as_pointer())


# ---------------------------------------------------------------------------
# Pointers
# ---------------------------------------------------------------------------


@intrinsic
def data(typingctx, array):
    """Pointer to the first element of an array."""

    def codegen(context, builder, sig, args):
        return context.make_array(array)(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def keep(typingctx, array):
    """Keep an array until here: Numba frees it after its last use, addresses do not count."""
    return types.void(array), lambda context, builder, sig, args: context.get_dummy_value()


@intrinsic
def pointer(typingctx, address, like):
    """The integer ``address`` as a pointer to what ``like``, a scalar or another pointer, is of."""
    result = like if isinstance(like, types.CPointer) else types.CPointer(like)

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(types.intp, like), codegen


def record_type(dtype: np.dtype) -> Any:
    """An intrinsic that takes an integer address as a NumPy record of ``dtype``."""
    result = from_dtype(dtype)

    @intrinsic
    def record_at(typingctx, address):
        def codegen(context, builder, sig, args):
            return builder.inttoptr(args[0], context.get_value_type(result))

        return result(types.intp), codegen

    return record_at


@intrinsic
def call_kernel(typingctx, kernel, problem):
    """Call the C function at address ``kernel`` with one integer."""

    def codegen(context, builder, sig, args):
        function = ir.FunctionType(ir.VoidType(), [_i64])
        builder.call(builder.inttoptr(args[0], function.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def value_at(typingctx, address, like):
    """The value at an integer address, of the type that ``like``, a type or a value, has."""
    result = getattr(like, "instance_type", like)

    def codegen(context, builder, sig, args):
        at = builder.inttoptr(args[0], context.get_value_type(result).as_pointer())
        return builder.load(at, align=8)

    return result(types.int64, like), codegen


@intrinsic
def address(typingctx, pointer):
    """A pointer as an integer."""

    def codegen(context, builder, sig, args):
        return builder.ptrtoint(args[0], _i64)

    return types.intp(pointer), codegen


@intrinsic
def on(typingctx, pointer, count):
    """The pointer ``count`` elements further on."""

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), codegen


def _prefetch(builder: ir.IRBuilder, pointer: ir.Value, write: bool = False) -> None:
    """Ask for the cache line of an address, which need not exist, in every level."""
    byte = _i8.as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [byte, _i32, _i32, _i32]),
        "llvm.prefetch.p0",
    )
    all_levels, data = _i32(3), _i32(1)
    builder.call(function, [builder.bitcast(pointer, byte), _i32(int(write)), all_levels, data])


@intrinsic
def prefetch(typingctx, pointer):
    """Ask for the cache line of an address, which need not exist."""

    def codegen(context, builder, sig, args):
        _prefetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(pointer), codegen


@intrinsic
def prefetch_to_write(typingctx, pointer):
    """Ask for the cache line of an address that will be written."""

    def codegen(context, builder, sig, args):
        _prefetch(builder, args[0], write=True)
        return context.get_dummy_value()

    return types.void(pointer), codegen


@intrinsic
def prefetch_rows(typingctx, like, base, row_step):
    """Ask for the cache line at each row of ``like``, ``row_step`` bytes apart."""

    def codegen(context, builder, sig, args):
        for row in range(like.rows):
            _prefetch(builder, _bytes_on(builder, args[1], builder.mul(args[2], _i64(row))))
        return context.get_dummy_value()

    return types.void(like, base, types.intp), codegen


@intrinsic
def itemsize(typingctx, pointer):
    """Bytes of one element, a constant."""
    size = pointer.dtype.bitwidth // 8
    return types.intp(pointer), lambda context, builder, sig, args: _i64(size)


@intrinsic
def bytes_on(typingctx, pointer, count):
    """The pointer ``count`` bytes further on."""

    def codegen(context, builder, sig, args):
        return _bytes_on(builder, *args)

    return pointer(pointer, types.intp), codegen


# ---------------------------------------------------------------------------
# Making, loading and storing tiles
# ---------------------------------------------------------------------------


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
            return _pack(builder, tile, [_constant(tile.vector, value(tile))] * len(tile))

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
    tile = Tile(scalar, 1, _literal(cols))

    def codegen(context, builder, sig, args):
        return _pack(builder, tile, [_splat(builder, args[0], tile.vector)] * len(tile))

    return tile(scalar, cols), codegen


@intrinsic
def shaped(typingctx, like, rows, cols):
    """Zeros, ``rows x cols`` registers of the element of ``like``."""
    tile = Tile(like.element, _literal(rows), _literal(cols))

    def codegen(context, builder, sig, args):
        return _pack(builder, tile, [_constant(tile.vector, 0.0)] * len(tile))

    return tile(like, rows, cols), codegen


@intrinsic
def filled(typingctx, like, scalar):
    """A tile shaped as ``like``, every lane ``scalar``."""

    def codegen(context, builder, sig, args):
        return _pack(builder, like, [_splat(builder, args[1], like.vector)] * len(like))

    return like(like, like.element), codegen


@intrinsic
def repeated(typingctx, like, row):
    """A tile shaped as ``like``, every row the same."""

    def codegen(context, builder, sig, args):
        return _pack(builder, like, _unpack(builder, args[1]) * like.rows)

    return like(like, row), codegen


@intrinsic
def rows(typingctx, tile):
    """The number of rows, a constant."""
    return types.intp(tile), lambda context, builder, sig, args: _i64(tile.rows)


@intrinsic
def lanes(typingctx, tile):
    """The number of elements in one register, a constant."""
    return types.intp(tile), lambda context, builder, sig, args: _i64(tile.lanes)


@intrinsic
def width(typingctx, tile):
    """The number of elements in one row, a constant."""
    return types.intp(tile), lambda context, builder, sig, args: _i64(tile.cols * tile.lanes)


@intrinsic
def load(typingctx, like, pointer, row_step):
    """A tile shaped as ``like`` from rows that lie ``row_step`` elements apart."""

    def codegen(context, builder, sig, args):
        _, base, step = args
        vectors = []
        for row in range(like.rows):
            for col in range(like.cols):
                index = builder.add(builder.mul(step, _i64(row)), _i64(col * like.lanes))
                # Without align LLVM assumes the whole vector's, and faults on NumPy's memory.
                at = _vector_at(builder, base, index, like)
                vectors.append(builder.load(at, align=like.itemsize))
        return _pack(builder, like, vectors)

    return like(like, pointer, types.intp), codegen


@intrinsic
def load_apart(typingctx, like, pointer, row_step):
    """A tile shaped as ``like``, of one column, from rows ``row_step`` bytes apart."""

    def codegen(context, builder, sig, args):
        _, base, step = args
        vectors = []
        for row in range(like.rows):
            at = _bytes_on(builder, base, builder.mul(step, _i64(row)))
            at = builder.bitcast(at, like.vector.as_pointer())
            # The caller's memory may have any alignment.
            vectors.append(builder.load(at, align=1))
        return _pack(builder, like, vectors)

    return like(like, pointer, types.intp), codegen


@intrinsic
def store_apart(typingctx, pointer, row_step, tile):
    """Write a tile of one column to rows ``row_step`` bytes apart."""

    def codegen(context, builder, sig, args):
        base, step, value = args
        for row, vector in enumerate(_unpack(builder, value)):
            at = _bytes_on(builder, base, builder.mul(step, _i64(row)))
            builder.store(vector, builder.bitcast(at, tile.vector.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, tile), codegen


@intrinsic
def store(typingctx, pointer, row_step, tile):
    """Write a tile to rows that lie ``row_step`` elements apart."""

    def codegen(context, builder, sig, args):
        base, step, value = args
        for n, vector in enumerate(_unpack(builder, value)):
            row, col = divmod(n, tile.cols)
            index = builder.add(builder.mul(step, _i64(row)), _i64(col * tile.lanes))
            builder.store(vector, _vector_at(builder, base, index, tile), align=tile.itemsize)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, tile), codegen


# ---------------------------------------------------------------------------
# Arithmetic, lane by lane
# ---------------------------------------------------------------------------

_Emit = Callable[..., ir.Value]


def _lanewise(builder: ir.IRBuilder, tile: Tile, emit: _Emit, *tiles: ir.Value) -> ir.Value:
    vectors = zip(*(_unpack(builder, each) for each in tiles), strict=True)
    return _pack(builder, tile, [emit(builder, *each) for each in vectors])


def _overload_operator(function: Any, emit: _Emit) -> None:
    @infer_global(function)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Tile) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    @lower_builtin(function, Tile, Tile)
    def _lower(context, builder, sig, args):
        return _lanewise(builder, sig.return_type, emit, *args)


_overload_operator(operator.add, lambda builder, a, b: builder.fadd(a, b))
_overload_operator(operator.sub, lambda builder, a, b: builder.fsub(a, b))
_overload_operator(operator.mul, lambda builder, a, b: builder.fmul(a, b))
_overload_operator(operator.truediv, lambda builder, a, b: builder.fdiv(a, b))


def _ternary(emit: _Emit, doc: str) -> Any:
    @intrinsic
    def combine(typingctx, a, b, c):
        def codegen(context, builder, sig, args):
            return _lanewise(builder, a, emit, *args)

        return a(a, b, c), codegen

    combine.__doc__ = doc
    return combine


fma = _ternary(_fma, "``a * b + c``, rounded once where the CPU can.")
dot_pairs = _ternary(
    emit_dot_pairs, "``a[0] * b[0] + a[1] * b[1] + c``, with lanes that are pairs."
)


def _emit_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fadd(a, b)


def _emit_maximum(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    # Exactly one MAXPS: its second operand is the result where either is NaN.
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def maximum(typingctx, a, b):
    """The larger of ``a`` and ``b``; ``b`` where either is NaN."""

    def codegen(context, builder, sig, args):
        return _lanewise(builder, a, _emit_maximum, *args)

    return a(a, b), codegen


def _reduction(emit: _Emit, doc: str) -> Any:
    @intrinsic
    def reduce(typingctx, start, tile):
        def codegen(context, builder, sig, args):
            (result,) = _unpack(builder, args[0])
            for vector in _unpack(builder, args[1]):
                result = emit(builder, result, vector)
            return _pack(builder, start, [result])

        return start(start, tile), codegen

    reduce.__doc__ = doc
    return reduce


# In order, one register after the other: the result does not depend on how rows are grouped.
add_rows = _reduction(_emit_add, "``start`` plus every row of a tile of one column.")
maximum_rows = _reduction(_emit_maximum, "The maximum of ``start`` and every row.")


def _across(emit: _Emit, doc: str) -> Any:
    @intrinsic
    def across(typingctx, tile):
        def codegen(context, builder, sig, args):
            vectors = _unpack(builder, args[0])
            result = vectors[0]
            for vector in vectors[1:]:
                result = emit(builder, result, vector)
            step = tile.lanes
            while step > 1:
                step //= 2
                order = [(lane + step) % tile.lanes for lane in range(tile.lanes)]
                indices = ir.Constant(ir.VectorType(_i32, tile.lanes), order)
                result = emit(builder, result, builder.shuffle_vector(result, result, indices))
            return builder.extract_element(result, _i32(0))

        return tile.element(tile), codegen

    across.__doc__ = doc
    return across


sum_across = _across(_emit_add, "The sum of all elements of a tile: registers, then halves.")
maximum_across = _across(_emit_maximum, "The largest element of a tile; anything where one is NaN.")


@intrinsic
def where_less(typingctx, a, b, yes, no):
    """``yes`` in the lanes where ``a < b``, else ``no``; ``no`` where ``a`` or ``b`` is NaN."""

    def emit(builder, a, b, yes, no):
        return builder.select(builder.fcmp_ordered("<", a, b), yes, no)

    def codegen(context, builder, sig, args):
        return _lanewise(builder, a, emit, *args)

    return a(a, b, yes, no), codegen


def _both_halves(builder: ir.IRBuilder, low: ir.Value, high: ir.Value, vector: ir.Type) -> ir.Value:
    """Registers of 16-bit integers, as the lower and upper halves of the lanes of ``vector``."""
    wide = ir.VectorType(_i32, vector.count)
    raised = builder.shl(builder.zext(high, wide), ir.Constant(wide, [16] * vector.count))
    return builder.bitcast(builder.or_(builder.zext(low, wide), raised), vector)


@intrinsic
def paired(typingctx, first, second):
    """Pairs of bfloat16, to which two tiles are rounded lane by lane; only on CPUs with the unit.

    The instruction takes subnormal numbers as zeros.
    """

    def emit(builder, *pair):
        vector = first.vector
        bits = ir.VectorType(_i16, vector.count)
        narrow = ir.VectorType(_Bfloat(), vector.count)
        low, high = (builder.bitcast(builder.fptrunc(x, narrow), bits) for x in pair)
        return _both_halves(builder, low, high, vector)

    def codegen(context, builder, sig, args):
        return _lanewise(builder, first, emit, *args)

    return first(first, second), codegen


@intrinsic
def seen_pairs(typingctx, first, second, pairs):
    """``pairs`` with 0 where the score of its first or second half, -inf, hides it."""

    def emit(builder, a, b, pair):
        bits = ir.VectorType(_i16, pairs.lanes)
        hides = _constant(pairs.vector, -math.inf)
        low, high = (
            builder.sext(builder.fcmp_unordered("!=", score, hides), bits) for score in (a, b)
        )
        kept = builder.bitcast(_both_halves(builder, low, high, pairs.vector), _integers(pair.type))
        taken = builder.and_(builder.bitcast(pair, kept.type), kept)
        return builder.bitcast(taken, pair.type)

    def codegen(context, builder, sig, args):
        return _lanewise(builder, pairs, emit, *args)

    return pairs(first, second, pairs), codegen


@intrinsic
def any_nan(typingctx, row):
    """Whether any lane of one register is NaN, as 0 or 1."""

    def codegen(context, builder, sig, args):
        (x,) = _unpack(builder, args[0])
        found = builder.bitcast(builder.fcmp_unordered("uno", x, x), ir.IntType(row.lanes))
        return builder.zext(builder.icmp_unsigned("!=", found, found.type(0)), _i64)

    return types.intp(row), codegen


@intrinsic
def exp(typingctx, x):
    """``exp(x)`` for ``x <= 0``, 0 below ``2**lowest_power``; NaN stays NaN."""
    emit = _exp_by_table if HOST.looks_up else _exp_by_polynomial

    def codegen(context, builder, sig, args):
        # Each step is emitted for all registers before the next one: the registers are independent,
        # and only a mixture of them hides the latency of a step.
        return _pack(builder, x, emit(builder, x, _unpack(builder, args[0])))

    return x(x), codegen


def _multiply_add(
    builder: ir.IRBuilder, xs: list[ir.Value], factors: Any, terms: Any
) -> list[ir.Value]:
    """``x * factor + term`` for every register; a number stands for a register full of it."""
    vector = xs[0].type
    factors, terms = (
        [_constant(vector, each)] * len(xs) if isinstance(each, float) else each
        for each in (factors, terms)
    )
    return [_fma(builder, *each) for each in zip(xs, factors, terms, strict=True)]


def _polynomial(
    builder: ir.IRBuilder, xs: list[ir.Value], coefficients: tuple[float, ...]
) -> list[ir.Value]:
    """A polynomial by Horner's rule, coefficients from the lowest power up."""
    results = [_constant(xs[0].type, coefficients[-1])] * len(xs)
    for coefficient in coefficients[-2::-1]:
        results = _multiply_add(builder, results, xs, coefficient)
    return results


def _reduced(
    builder: ir.IRBuilder, tile: Tile, xs: list[ir.Value], steps: int, bias: float
) -> tuple[list[ir.Value], list[ir.Value]]:
    """``n + bias`` as integers, and ``x - n log(2) / steps`` for ``n = round(x steps / log(2))``.

    Adding 1.5 * 2**mantissa leaves the integer in the low bits of the sum.
    """
    constants = EXPONENTIALS[str(tile.element)]
    vector = xs[0].type
    magic = 1.5 * 2.0**constants.mantissa_bits + bias
    shifted = _multiply_add(builder, xs, steps * math.log2(math.e), magic)
    minus_n = [builder.fsub(_constant(vector, magic), each) for each in shifted]
    fractions = xs
    for part in constants.log_2 if HOST.fused else constants.log_2_short:
        fractions = _multiply_add(builder, minus_n, part / steps, fractions)
    return [builder.bitcast(each, _integers(vector)) for each in shifted], fractions


def _integers(vector: ir.VectorType) -> ir.VectorType:
    return ir.VectorType(_i32 if vector.element == ir.FloatType() else _i64, vector.count)


def _exp_by_polynomial(builder: ir.IRBuilder, tile: Tile, xs: list[ir.Value]) -> list[ir.Value]:
    constants = EXPONENTIALS[str(tile.element)]
    vector = tile.vector
    # Here the power of two below is +0: from there on everything underflows to zero, -inf too.
    bottom = _constant(vector, -constants.exponent_bias * math.log(2))
    floor = _constant(vector, lowest_power(str(tile.element)) * math.log(2))
    xs = [builder.select(builder.fcmp_ordered("<", each, floor), bottom, each) for each in xs]
    # With the exponent's bias added, the integers shifted up are 2**n itself.
    exponents, fractions = _reduced(builder, tile, xs, 1, constants.exponent_bias)
    shift = _constant(_integers(vector), constants.mantissa_bits)
    powers = [builder.bitcast(builder.shl(each, shift), vector) for each in exponents]
    results = _polynomial(builder, fractions, constants.coefficients)
    # A product, not an addition to the exponent: NaN times anything is NaN.
    return [builder.fmul(*each) for each in zip(results, powers, strict=True)]


def _exp_by_table(builder: ir.IRBuilder, tile: Tile, xs: list[ir.Value]) -> list[ir.Value]:
    """``exp(x) = 2**(n // steps) 2**(n % steps / steps) exp(f)``, the second from two registers."""
    constants = EXPONENTIALS[str(tile.element)]
    vector, integers = tile.vector, _integers(tile.vector)
    steps = 2 * tile.lanes
    shift = constants.mantissa_bits - (steps.bit_length() - 1)
    # Shifted up, n adds n // steps to the exponent, and n % steps to the bits below it: those are
    # taken off from the table.
    powers = (2.0 ** (np.arange(steps) / steps)).astype(str(tile.element))
    bits = powers.view(f"i{tile.itemsize}").astype(object) - (np.arange(steps) << shift)
    table = [ir.Constant(integers, list(half)) for half in np.split(bits, 2)]
    look_up = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(integers, [integers] * 3),
        f"llvm.x86.avx512.vpermi2var.{'d' if tile.itemsize == 4 else 'q'}.512",
    )

    numbers, fractions = _reduced(builder, tile, xs, steps, 0.0)
    found = [builder.call(look_up, [table[0], each, table[1]]) for each in numbers]
    raised = [builder.shl(each, _constant(integers, shift)) for each in numbers]
    scales = [
        builder.bitcast(builder.add(*each), vector) for each in zip(found, raised, strict=True)
    ]
    # exp(f) - 1 is so small that its own rounding is lost in that of the result.
    factors = _polynomial(builder, fractions, constants.table_coefficients)
    excess = [builder.fmul(*each) for each in zip(factors, fractions, strict=True)]
    results = _multiply_add(builder, scales, excess, scales)
    floor = _constant(vector, lowest_power(str(tile.element)) * math.log(2))
    nothing = _constant(vector, 0.0)
    return [
        # The comparison is true for NaN.
        builder.select(builder.fcmp_unordered(">=", x, floor), result, nothing)
        for x, result in zip(xs, results, strict=True)
    ]


@intrinsic
def tanh(typingctx, x):
    """``tanh(x)``, as near for small x as for large ones; NaN stays NaN."""
    vector = x.vector
    constants = EXPONENTIALS[str(x.element)]

    def codegen(context, builder, sig, args):
        # tanh |x| = -e / (2 + e) with e = exp(-2 |x|) - 1. Of exp(f) = 1 + f + ... the 1 is left
        # out: e is then 2**n (exp(f) - 1) + (2**n - 1), where nothing is lost for n = 0.
        xs = _unpack(builder, args[0])
        sizes = [_call_vector(builder, "fabs", each) for each in xs]
        floor = _constant(vector, -constants.exponent_bias * math.log(2))
        doubled = [
            _emit_maximum(builder, floor, builder.fmul(each, _constant(vector, -2.0)))
            for each in sizes
        ]
        exponents, fractions = _reduced(builder, x, doubled, 1, constants.exponent_bias)
        shift = _constant(_integers(vector), constants.mantissa_bits)
        powers = [builder.bitcast(builder.shl(each, shift), vector) for each in exponents]
        factors = _polynomial(builder, fractions, constants.coefficients[1:])
        excess = [builder.fmul(*each) for each in zip(factors, fractions, strict=True)]
        less_one = [builder.fsub(each, _constant(vector, 1.0)) for each in powers]
        e = _multiply_add(builder, powers, excess, less_one)
        quotients = [builder.fdiv(each, builder.fadd(each, _constant(vector, 2.0))) for each in e]
        # The quotient is -tanh |x|; copysign does not look at its sign.
        signed = [
            _call_vector(builder, "copysign", *each) for each in zip(quotients, xs, strict=True)
        ]
        return _pack(builder, x, signed)

    return x(x), codegen


@intrinsic
def magnitude(typingctx, x):
    """``|x|``, lane by lane."""

    def codegen(context, builder, sig, args):
        return _lanewise(builder, x, lambda builder, a: _call_vector(builder, "fabs", a), args[0])

    return x(x), codegen


# ---------------------------------------------------------------------------
# Bits of words: what queries see
# ---------------------------------------------------------------------------


@intrinsic
def bits_of(typingctx, source):
    """A word of which bit n is set where byte n of 64 is not zero."""

    def codegen(context, builder, sig, args):
        row = ir.VectorType(_i8, 64)
        found = builder.load(builder.bitcast(args[0], row.as_pointer()), align=1)
        return builder.bitcast(builder.icmp_unsigned("!=", found, ir.Constant(row, None)), _i64)

    return types.int64(source), codegen


@intrinsic
def where_bit(typingctx, words, n, yes, no):
    """``yes`` in the lanes where bit ``n + row`` of the lane's word is set, else ``no``.

    The tiles have one column; ``words`` points to as many words as they have lanes.
    """

    def codegen(context, builder, sig, args):
        at, first, chosen, others = args
        row = ir.VectorType(_i64, yes.lanes)
        found = builder.load(builder.bitcast(at, row.as_pointer()), align=8)
        nothing = ir.Constant(row, None)
        results = []
        pairs = zip(_unpack(builder, chosen), _unpack(builder, others), strict=True)
        for index, each in enumerate(pairs):
            bit = builder.shl(_i64(1), builder.add(first, _i64(index)))
            tested = builder.and_(found, _splat(builder, bit, row))
            results.append(builder.select(builder.icmp_unsigned("!=", tested, nothing), *each))
        return _pack(builder, yes, results)

    return yes(words, types.intp, yes, no), codegen


# ---------------------------------------------------------------------------
# Between lanes and rows
# ---------------------------------------------------------------------------


def _add_outer(
    builder: ir.IRBuilder,
    multiply_add: _Emit,
    acc: Tile,
    sums: list[ir.Value],
    a_base: ir.Value,
    a_step: ir.Value,
    b_row: list[ir.Value],
) -> ir.Value:
    for row in range(acc.rows):
        at = _bytes_on(builder, a_base, builder.mul(a_step, _i64(row)))
        # The caller's memory may have any alignment.
        element = _splat(builder, builder.load(at, align=1), acc.vector)
        for col in range(acc.cols):
            n = row * acc.cols + col
            sums[n] = multiply_add(builder, element, b_row[col], sums[n])
    return _pack(builder, acc, sums)


def _outer(multiply_add: _Emit, doc: str) -> Any:
    @intrinsic
    def add(typingctx, acc, a, a_step, b):
        def codegen(context, builder, sig, args):
            sums, a_base, step, b_base = args
            b_row = [
                builder.load(
                    _vector_at(builder, b_base, _i64(col * acc.lanes), acc), align=acc.itemsize
                )
                for col in range(acc.cols)
            ]
            sums = _unpack(builder, sums)
            return _add_outer(builder, multiply_add, acc, sums, a_base, step, b_row)

        return acc(acc, a, types.intp, b), codegen

    add.__doc__ = doc
    return add


add_outer = _outer(
    _fma,
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
        sums, row = _unpack(builder, sums), _unpack(builder, row)
        return _add_outer(builder, _fma, acc, sums, a_base, step, row)

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
                        first, second, ir.Constant(ir.VectorType(_i32, count), order)
                    )
                    for order in orders
                )
            )

        vectors = _unpack(builder, args[0])
        sums = []
        for start in range(0, acc.rows, count):
            level = vectors[start : start + count]
            while len(level) > 1:
                step = len(level) // 2
                level = [halves(level[n], level[n + step], step) for n in range(step)]
            sums += level
        return _pack(builder, result, sums)

    return result(acc), codegen


@intrinsic
def store_parts(typingctx, pointer, step, tile, parts):
    """Write the elements of a tile as so many equal parts, ``step`` elements apart."""
    length = len(tile) * tile.lanes // _literal(parts)
    piece = min(length, tile.lanes)

    def codegen(context, builder, sig, args):
        base, step, value, _ = args
        part = ir.VectorType(_ir_float(tile.element), piece)
        for n in range(0, len(tile) * tile.lanes, piece):
            vector = _unpack(builder, value)[n // tile.lanes]
            order = [n % tile.lanes + lane for lane in range(piece)]
            indices = ir.Constant(ir.VectorType(_i32, piece), order)
            chosen = builder.shuffle_vector(vector, vector, indices)
            index = builder.add(builder.mul(step, _i64(n // length)), _i64(n % length))
            at = builder.bitcast(builder.gep(base, [index]), part.as_pointer())
            builder.store(chosen, at, align=tile.itemsize)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, tile, parts), codegen


@intrinsic
def accumulate(typingctx, acc, rescale, pointer, row_step):
    """Rows at ``pointer`` become ``row * rescale + acc``, with one row of factors for all."""

    def codegen(context, builder, sig, args):
        sums, factors, base, step = args
        factors = _unpack(builder, factors)
        for n, vector in enumerate(_unpack(builder, sums)):
            row, col = divmod(n, acc.cols)
            index = builder.add(builder.mul(step, _i64(row)), _i64(col * acc.lanes))
            at = _vector_at(builder, base, index, acc)
            old = builder.load(at, align=acc.itemsize)
            builder.store(_fma(builder, old, factors[col], vector), at, align=acc.itemsize)
        return context.get_dummy_value()

    return types.void(acc, rescale, pointer, types.intp), codegen


def _swap_blocks(builder: ir.IRBuilder, vectors: list[ir.Value], size: int) -> list[ir.Value]:
    """Transpose every ``size x size`` block of a square of registers in its place."""
    count = len(vectors)
    order_type = ir.VectorType(_i32, count)
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
        vectors = _unpack(builder, args[0])
        return _pack(builder, tile, _swap_blocks(builder, vectors, tile.lanes))

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
            at = _bytes_on(builder, base, builder.mul(step, _i64(row)))
            at = builder.gep(at, [_i64(index * size)])
            return builder.load(builder.bitcast(at, part.as_pointer()), align=1)

        # Block m of register m * size + r is part m of row r, of row r + size, and so on.
        vectors = [
            _joined(builder, [load_part(r + p * size, m) for p in range(parts)])
            for m in range(parts)
            for r in range(size)
        ]
        return _pack(builder, like, _swap_blocks(builder, vectors, size))

    return like(like, pointer, types.intp), codegen


def _joined(builder: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """One register of as many parts as it has room for."""
    while len(parts) > 1:
        count = 2 * parts[0].type.count
        order = ir.Constant(ir.VectorType(_i32, count), list(range(count)))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [builder.shuffle_vector(*pair, order) for pair in pairs]
    return parts[0]


# ---------------------------------------------------------------------------
# Single elements in the formats that callers store, Numba's own or not
# ---------------------------------------------------------------------------


def _place(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value, element: ir.Type) -> ir.Value:
    at = builder.gep(builder.bitcast(base, _i8.as_pointer()), [offset])
    return builder.bitcast(at, element.as_pointer())


def _reader(result: types.Type, element: ir.Type, widen: _Emit) -> Any:
    """An intrinsic ``read(base, offset)`` of the element ``offset`` bytes after a pointer."""

    @intrinsic
    def read(typingctx, base, offset):
        def codegen(context, builder, sig, args):
            return widen(builder, builder.load(_place(builder, args[0], args[1], element), align=1))

        return result(base, types.intp), codegen

    return read


def _writer(result: types.Type, element: ir.Type, narrow: _Emit) -> Any:
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
    bits = builder.zext(value, _i32)
    shifted = builder.shl(builder.and_(bits, _i32(0x7FFF)), _i32(13))
    single = ir.FloatType()
    scaled = builder.fmul(builder.bitcast(shifted, single), single(2.0**112))
    special = builder.icmp_unsigned(">=", shifted, _i32(0x7C00 << 13))
    magnitude = builder.select(
        special, builder.or_(shifted, _i32(0x7F800000)), builder.bitcast(scaled, _i32)
    )
    sign = builder.shl(builder.and_(bits, _i32(0x8000)), _i32(16))
    return builder.bitcast(builder.or_(magnitude, sign), single)


def _narrow_half(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    if HOST.converts_half:
        return builder.bitcast(builder.fptrunc(value, ir.HalfType()), _i16)
    single = ir.FloatType()
    bits = builder.bitcast(value, _i32)
    magnitude = builder.and_(bits, _i32(0x7FFFFFFF))
    sign = builder.lshr(builder.and_(bits, _i32(0x80000000)), _i32(16))
    # Normal numbers: another bias, and half a unit more, less what makes ties even.
    odd = builder.and_(builder.lshr(magnitude, _i32(13)), _i32(1))
    rebiased = builder.add(magnitude, builder.add(odd, _i32(0xFFF - ((127 - 15) << 23))))
    normal = builder.lshr(rebiased, _i32(13))
    # Subnormal ones: the sum with 0.5 rounds at the right place.
    sum_bits = builder.bitcast(builder.fadd(builder.bitcast(magnitude, single), single(0.5)), _i32)
    subnormal = builder.sub(sum_bits, _i32(0x3F000000))
    nan = builder.icmp_unsigned(">", magnitude, _i32(0x7F800000))
    special = builder.select(nan, _i32(0x7E00), _i32(0x7C00))
    is_small = builder.icmp_unsigned("<", magnitude, _i32((127 - 14) << 23))
    is_large = builder.icmp_unsigned(">=", magnitude, _i32((127 + 16) << 23))
    result = builder.select(is_large, special, builder.select(is_small, subnormal, normal))
    return builder.trunc(builder.or_(result, sign), _i16)


def _widen_bfloat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    # A bfloat16 is the upper half of a float32.
    return builder.bitcast(builder.shl(builder.zext(value, _i32), _i32(16)), ir.FloatType())


def _narrow_bfloat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    # To nearest even; the addition would carry a NaN's payload into an Inf.
    bits = builder.bitcast(value, _i32)
    odd = builder.and_(builder.lshr(bits, _i32(16)), _i32(1))
    rounded = builder.add(bits, builder.add(odd, _i32(0x7FFF)))
    nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(nan, builder.or_(bits, _i32(0x400000)), rounded)
    return builder.trunc(builder.lshr(chosen, _i32(16)), _i16)


def _bytes_of(element: ir.Type) -> int:
    if isinstance(element, ir.IntType):
        return int(element.width) // 8
    return 4 if element == ir.FloatType() else 8


def _dots(element: ir.Type, widen: _Emit) -> Any:
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
            sums, b_rows = _unpack(builder, sums), _unpack(builder, b_rows)
            # Each register is used where it is loaded: LLVM keeps the order, and registers are few.
            for row, col in itertools.product(range(count), range(b.cols)):
                start = builder.add(builder.mul(step, _i64(row)), _i64(col * acc.lanes * size))
                place = _place(builder, at, start, stored)
                vector = widen(builder, builder.load(place, align=1))
                for m in range(b.rows):
                    n = m * count + row
                    sums[n] = _fma(builder, vector, b_rows[m * b.cols + col], sums[n])
            return _pack(builder, acc, sums)

        return acc(acc, base, types.intp, b), codegen

    return add_dots


def _loader(element: ir.Type, widen: _Emit) -> Any:
    """An intrinsic that loads a tile from rows of stored elements, ``row_step`` bytes apart."""

    @intrinsic
    def load_stored(typingctx, like, base, row_step):
        stored = ir.VectorType(element, like.lanes)
        size = _bytes_of(element)

        def codegen(context, builder, sig, args):
            vectors = []
            for row in range(like.rows):
                for col in range(like.cols):
                    start = builder.mul(args[2], _i64(row))
                    offset = builder.add(start, _i64(col * like.lanes * size))
                    at = _place(builder, args[1], offset, stored)
                    vectors.append(widen(builder, builder.load(at, align=1)))
            return _pack(builder, like, vectors)

        return like(like, base, types.intp), codegen

    return load_stored


def _widen_halves(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    count = vector.type.count
    halves = builder.bitcast(vector, ir.VectorType(ir.HalfType(), count))
    return builder.fpext(halves, ir.VectorType(ir.FloatType(), count))


def _widen_bfloats(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    count = vector.type.count
    wide = ir.VectorType(_i32, count)
    shifted = builder.shl(builder.zext(vector, wide), ir.Constant(wide, [16] * count))
    return builder.bitcast(shifted, ir.VectorType(ir.FloatType(), count))


def _widen_int8s(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    return builder.sitofp(vector, ir.VectorType(ir.FloatType(), vector.type.count))


load_float32 = _loader(ir.FloatType(), _same)
load_float64 = _loader(ir.DoubleType(), _same)
load_half = _loader(_i16, _widen_halves)
load_bfloat = _loader(_i16, _widen_bfloats)
load_int8 = _loader(_i8, _widen_int8s)
add_dots_float32 = _dots(ir.FloatType(), _same)
add_dots_float64 = _dots(ir.DoubleType(), _same)
add_dots_half = _dots(_i16, _widen_halves)
add_dots_bfloat = _dots(_i16, _widen_bfloats)
add_dots_int8 = _dots(_i8, _widen_int8s)


def _widen_int8(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return builder.sitofp(value, ir.FloatType())


def _widen_bool(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    # What a mask adds to a score.
    single = ir.FloatType()
    false = builder.icmp_unsigned("==", value, _i8(0))
    return builder.select(false, single(float("-inf")), single(0.0))


read_float32 = _reader(types.float32, ir.FloatType(), _same)
read_float64 = _reader(types.float64, ir.DoubleType(), _same)
read_half = _reader(types.float32, _i16, _widen_half)
read_bfloat = _reader(types.float32, _i16, _widen_bfloat)
read_int8 = _reader(types.float32, _i8, _widen_int8)
read_bool = _reader(types.float32, _i8, _widen_bool)
write_float32 = _writer(types.float32, ir.FloatType(), _same)
write_float64 = _writer(types.float64, ir.DoubleType(), _same)
write_half = _writer(types.float32, _i16, _narrow_half)
write_bfloat = _writer(types.float32, _i16, _narrow_bfloat)


# ---------------------------------------------------------------------------
# Sharing work between threads
# ---------------------------------------------------------------------------


@intrinsic
def take_ticket(typingctx, counter):
    """Add 1 to the counter in one indivisible step and return what it held before.

    What a thread wrote before its ticket is seen by those whose tickets come later.
    """

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", args[0], _i64(1), "acq_rel")

    return types.int64(counter), codegen


@intrinsic
def last_ticket(typingctx, counter):
    """What the counter holds now, whoever else writes it."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(args[0], "monotonic", 8)

    return types.int64(counter), codegen


# ---------------------------------------------------------------------------
# Scalar code over lanes
# ---------------------------------------------------------------------------


class _LoopHints(ir.MDValue):
    """Metadata of a loop, which names itself first so that no two loops share it."""

    def descr(self, buf: Any) -> None:
        operands = ", ".join(each.get_reference() for each in (self, *self.operands))
        buf += (f"distinct !{{ {operands} }}", "\n")


def _vectorisable(module: ir.Module) -> ir.MDValue:
    """Hints for a loop over lanes: unrolled, it would be no loop when the vectoriser comes."""

    def hint(name: str, *operands: ir.Value) -> ir.MDValue:
        return module.add_metadata([ir.MetaDataString(module, name), *operands])

    vectorised = hint("llvm.loop.isvectorized", _i32(1))
    hints = (
        hint("llvm.loop.unroll.disable"),
        hint("llvm.loop.interleave.count", _i32(1)),
        # What is left of the loop then may be unrolled.
        hint("llvm.loop.vectorize.followup_all", vectorised),
    )
    return _LoopHints(module, hints, str(len(module.metadata)))


@intrinsic
def map_lanes(typingctx, like, function, target, sources, shared):
    """``target[x] = function(*(source[x] for source in sources), *shared)`` for every lane x.

    For scalar code that others wrote: a loop over as many elements as one register of ``like`` has,
    which LLVM vectorises where it sees how.
    """
    elements = [source.dtype for source in sources]
    inner = typingctx.resolve_function_type(function, (*elements, *shared.types), {})
    if inner is None or inner.return_type != target.dtype:
        return None
    count = like.lanes

    def codegen(context, builder, sig, args):
        _, _, target_at, *tuples = args
        source_at, values = (
            cgutils.unpack_tuple(builder, each, len(kind))
            for each, kind in zip(tuples, (sources, shared), strict=True)
        )

        # LLVM would use half of such wide registers; llvmlite does not know this attribute.
        width = f'"prefer-vector-width"="{8 * HOST.vector_bytes}"'
        set.add(builder.function.attributes, width)

        # On the stack, where LLVM knows that the results overwrite no source.
        def row(kind):
            return ir.VectorType(context.get_value_type(kind), count)

        def copy(source, destination, kind):
            at = [builder.bitcast(each, row(kind).as_pointer()) for each in (source, destination)]
            builder.store(builder.load(at[0], align=kind.bitwidth // 8), at[1], align=8)

        def on_stack(kind):
            return cgutils.alloca_once(builder, context.get_value_type(kind), count)

        staged = [on_stack(kind) for kind in elements]
        for each in zip(source_at, staged, elements, strict=True):
            copy(*each)
        result = on_stack(target.dtype)

        before = builder.block
        loop, after = (builder.append_basic_block(name) for name in ("lanes", "lanes.after"))
        builder.branch(loop)
        builder.position_at_end(loop)
        x = builder.phi(_i64)
        given = [builder.load(builder.gep(each, [x])) for each in staged]
        returned = context.get_function(function, inner)(builder, [*given, *values])
        builder.store(returned, builder.gep(result, [x]))
        following = builder.add(x, _i64(1), flags=["nuw", "nsw"])
        x.add_incoming(_i64(0), before)
        x.add_incoming(following, builder.block)
        end = builder.cbranch(builder.icmp_unsigned("<", following, _i64(count)), loop, after)
        end.set_metadata("llvm.loop", _vectorisable(builder.module))
        builder.position_at_end(after)
        copy(result, target_at, target.dtype)
        return context.get_dummy_value()

    return types.void(like, function, target, sources, shared), codegen
