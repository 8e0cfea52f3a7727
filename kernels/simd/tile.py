"""The type of a tile, and the pieces of LLVM that every word here is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic
from numba.extending import models, register_model

from ..host import HOST

intrinsic = _intrinsic(prefer_literal=True)
i8 = ir.IntType(8)
i16 = ir.IntType(16)
i32 = ir.IntType(32)
i64 = ir.IntType(64)


class Bfloat(ir.Type):
    """LLVM's bfloat16, which llvmlite does not know."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self))

    def __hash__(self) -> int:
        return hash(type(self))


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


def literal(value: Any) -> int:
    """The integer that a literal type stands for."""
    return int(value.literal_value)


# ---------------------------------------------------------------------------
# Small pieces of IR
# ---------------------------------------------------------------------------

Emit = Callable[..., ir.Value]


def unpack(builder: ir.IRBuilder, tile: ir.Value) -> list[ir.Value]:
    """The registers of a tile."""
    return [builder.extract_value(tile, n) for n in range(tile.type.count)]


def pack(builder: ir.IRBuilder, tile: Tile, vectors: list[ir.Value]) -> ir.Value:
    """A tile of registers."""
    packed = ir.Constant(ir.ArrayType(tile.vector, len(tile)), ir.Undefined)
    for n, vector in enumerate(vectors):
        packed = builder.insert_value(packed, vector, n)
    return packed


def emit_splat(builder: ir.IRBuilder, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
    """A register full of a scalar."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, i32(0))
    zeros = ir.Constant(ir.VectorType(i32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, undefined, zeros)


def constant(vector: ir.VectorType, value: float) -> ir.Value:
    """A register full of a number."""
    return ir.Constant(vector, [value] * vector.count)


def emit_fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """``a * b + c``, rounded once where the CPU can."""
    # llvmlite's builder.fma refuses vectors. Without the instruction llvm.fma would call libm for
    # every lane; fmuladd becomes a multiplication and an addition.
    return call_vector(builder, "fma" if HOST.fused else "fmuladd", a, b, c)


def call_vector(builder: ir.IRBuilder, name: str, *xs: ir.Value) -> ir.Value:
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
    pairs = ir.VectorType(Bfloat(), 2 * vector.count)
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(vector, [vector, pairs, pairs]),
        f"llvm.x86.avx512bf16.dpbf16ps.{32 * vector.count}",
    )
    return builder.call(function, [c, builder.bitcast(a, pairs), builder.bitcast(b, pairs)])


def emit_bytes_on(builder: ir.IRBuilder, pointer: ir.Value, count: ir.Value) -> ir.Value:
    """The pointer ``count`` bytes further on."""
    return builder.bitcast(
        builder.gep(builder.bitcast(pointer, i8.as_pointer()), [count]), pointer.type
    )


def vector_at(builder: ir.IRBuilder, pointer: ir.Value, index: ir.Value, tile: Tile) -> ir.Value:
    """The pointer to a register, ``index`` elements behind another one."""
    return builder.bitcast(builder.gep(pointer, [index]), tile.vector.as_pointer())


def lanewise(builder: ir.IRBuilder, tile: Tile, emit: Emit, *tiles: ir.Value) -> ir.Value:
    """A tile of what ``emit`` makes of one register of each of ``tiles``."""
    vectors = zip(*(unpack(builder, each) for each in tiles), strict=True)
    return pack(builder, tile, [emit(builder, *each) for each in vectors])


def integer_vector(vector: ir.VectorType) -> ir.VectorType:
    """A register of integers as wide as the floats of another one."""
    return ir.VectorType(i32 if vector.element == ir.FloatType() else i64, vector.count)
