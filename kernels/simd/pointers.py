"""Pointers, records, kernels by their address, and what threads share."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np.numpy_support import from_dtype

from .tile import emit_bytes_on, i8, i32, i64, intrinsic


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
        function = ir.FunctionType(ir.VoidType(), [i64])
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
        return builder.ptrtoint(args[0], i64)

    return types.intp(pointer), codegen


@intrinsic
def on(typingctx, pointer, count):
    """The pointer ``count`` elements further on."""

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), codegen


@intrinsic
def itemsize(typingctx, pointer):
    """Bytes of one element, a constant."""
    size = pointer.dtype.bitwidth // 8
    return types.intp(pointer), lambda context, builder, sig, args: i64(size)


@intrinsic
def bytes_on(typingctx, pointer, count):
    """The pointer ``count`` bytes further on."""

    def codegen(context, builder, sig, args):
        return emit_bytes_on(builder, *args)

    return pointer(pointer, types.intp), codegen


# ---------------------------------------------------------------------------
# Before it is needed
# ---------------------------------------------------------------------------


def _prefetch(builder: ir.IRBuilder, pointer: ir.Value, write: bool = False) -> None:
    """Ask for the cache line of an address, which need not exist, in every level."""
    byte = i8.as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32]),
        "llvm.prefetch.p0",
    )
    all_levels, data = i32(3), i32(1)
    builder.call(function, [builder.bitcast(pointer, byte), i32(int(write)), all_levels, data])


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
            _prefetch(builder, emit_bytes_on(builder, args[1], builder.mul(args[2], i64(row))))
        return context.get_dummy_value()

    return types.void(like, base, types.intp), codegen


# ---------------------------------------------------------------------------
# Sharing work between threads
# ---------------------------------------------------------------------------


@intrinsic
def take_ticket(typingctx, counter):
    """Add 1 to the counter in one indivisible step and return what it held before.

    What a thread wrote before its ticket is seen by those whose tickets come later.
    """

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", args[0], i64(1), "acq_rel")

    return types.int64(counter), codegen


@intrinsic
def last_ticket(typingctx, counter):
    """What the counter holds now, whoever else writes it."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(args[0], "monotonic", 8)

    return types.int64(counter), codegen
