"""Scalar code that others wrote, over the lanes of a register."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ..host import HOST
from .tile import i32, i64, intrinsic


class _LoopHints(ir.MDValue):
    """Metadata of a loop, which names itself first so that no two loops share it."""

    def descr(self, buf: Any) -> None:
        operands = ", ".join(each.get_reference() for each in (self, *self.operands))
        buf += (f"distinct !{{ {operands} }}", "\n")


def _vectorisable(module: ir.Module) -> ir.MDValue:
    """Hints for a loop over lanes: unrolled, it would be no loop when the vectoriser comes."""

    def hint(name: str, *operands: ir.Value) -> ir.MDValue:
        return module.add_metadata([ir.MetaDataString(module, name), *operands])

    vectorised = hint("llvm.loop.isvectorized", i32(1))
    hints = (
        hint("llvm.loop.unroll.disable"),
        hint("llvm.loop.interleave.count", i32(1)),
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
        x = builder.phi(i64)
        given = [builder.load(builder.gep(each, [x])) for each in staged]
        returned = context.get_function(function, inner)(builder, [*given, *values])
        builder.store(returned, builder.gep(result, [x]))
        following = builder.add(x, i64(1), flags=["nuw", "nsw"])
        x.add_incoming(i64(0), before)
        x.add_incoming(following, builder.block)
        end = builder.cbranch(builder.icmp_unsigned("<", following, i64(count)), loop, after)
        end.set_metadata("llvm.loop", _vectorisable(builder.module))
        builder.position_at_end(after)
        copy(result, target_at, target.dtype)
        return context.get_dummy_value()

    return types.void(like, function, target, sources, shared), codegen
