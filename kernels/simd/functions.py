"""exp and tanh, lane by lane."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from ..exponential import EXPONENTIALS, lowest_power
from ..host import HOST
from .arithmetic import emit_maximum
from .tile import Tile, call_vector, constant, emit_fma, integer_vector, intrinsic, pack, unpack


@intrinsic
def exp(typingctx, x):
    """``exp(x)`` for ``x <= 0``, 0 below ``2**lowest_power``; NaN stays NaN."""
    emit = _exp_by_table if HOST.looks_up else _exp_by_polynomial

    def codegen(context, builder, sig, args):
        # Each step is emitted for all registers before the next one: the registers are independent,
        # and only a mixture of them hides the latency of a step.
        return pack(builder, x, emit(builder, x, unpack(builder, args[0])))

    return x(x), codegen


def _multiply_add(
    builder: ir.IRBuilder, xs: list[ir.Value], factors: Any, terms: Any
) -> list[ir.Value]:
    """``x * factor + term`` for every register; a number stands for a register full of it."""
    vector = xs[0].type
    factors, terms = (
        [constant(vector, each)] * len(xs) if isinstance(each, float) else each
        for each in (factors, terms)
    )
    return [emit_fma(builder, *each) for each in zip(xs, factors, terms, strict=True)]


def _polynomial(
    builder: ir.IRBuilder, xs: list[ir.Value], coefficients: tuple[float, ...]
) -> list[ir.Value]:
    """A polynomial by Horner's rule, coefficients from the lowest power up."""
    results = [constant(xs[0].type, coefficients[-1])] * len(xs)
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
    minus_n = [builder.fsub(constant(vector, magic), each) for each in shifted]
    fractions = xs
    for part in constants.log_2 if HOST.fused else constants.log_2_short:
        fractions = _multiply_add(builder, minus_n, part / steps, fractions)
    return [builder.bitcast(each, integer_vector(vector)) for each in shifted], fractions


def _exp_by_polynomial(builder: ir.IRBuilder, tile: Tile, xs: list[ir.Value]) -> list[ir.Value]:
    constants = EXPONENTIALS[str(tile.element)]
    vector = tile.vector
    # Here the power of two below is +0: from there on everything underflows to zero, -inf too.
    bottom = constant(vector, -constants.exponent_bias * math.log(2))
    floor = constant(vector, lowest_power(str(tile.element)) * math.log(2))
    xs = [builder.select(builder.fcmp_ordered("<", each, floor), bottom, each) for each in xs]
    # With the exponent's bias added, the integers shifted up are 2**n itself.
    exponents, fractions = _reduced(builder, tile, xs, 1, constants.exponent_bias)
    shift = constant(integer_vector(vector), constants.mantissa_bits)
    powers = [builder.bitcast(builder.shl(each, shift), vector) for each in exponents]
    results = _polynomial(builder, fractions, constants.coefficients)
    # A product, not an addition to the exponent: NaN times anything is NaN.
    return [builder.fmul(*each) for each in zip(results, powers, strict=True)]


def _exp_by_table(builder: ir.IRBuilder, tile: Tile, xs: list[ir.Value]) -> list[ir.Value]:
    """``exp(x) = 2**(n // steps) 2**(n % steps / steps) exp(f)``, the second from two registers."""
    constants = EXPONENTIALS[str(tile.element)]
    vector, integers = tile.vector, integer_vector(tile.vector)
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
    raised = [builder.shl(each, constant(integers, shift)) for each in numbers]
    scales = [
        builder.bitcast(builder.add(*each), vector) for each in zip(found, raised, strict=True)
    ]
    # exp(f) - 1 is so small that its own rounding is lost in that of the result.
    factors = _polynomial(builder, fractions, constants.table_coefficients)
    excess = [builder.fmul(*each) for each in zip(factors, fractions, strict=True)]
    results = _multiply_add(builder, scales, excess, scales)
    floor = constant(vector, lowest_power(str(tile.element)) * math.log(2))
    nothing = constant(vector, 0.0)
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
        xs = unpack(builder, args[0])
        sizes = [call_vector(builder, "fabs", each) for each in xs]
        floor = constant(vector, -constants.exponent_bias * math.log(2))
        doubled = [
            emit_maximum(builder, floor, builder.fmul(each, constant(vector, -2.0)))
            for each in sizes
        ]
        exponents, fractions = _reduced(builder, x, doubled, 1, constants.exponent_bias)
        shift = constant(integer_vector(vector), constants.mantissa_bits)
        powers = [builder.bitcast(builder.shl(each, shift), vector) for each in exponents]
        factors = _polynomial(builder, fractions, constants.coefficients[1:])
        excess = [builder.fmul(*each) for each in zip(factors, fractions, strict=True)]
        less_one = [builder.fsub(each, constant(vector, 1.0)) for each in powers]
        e = _multiply_add(builder, powers, excess, less_one)
        quotients = [builder.fdiv(each, builder.fadd(each, constant(vector, 2.0))) for each in e]
        # The quotient is -tanh |x|; copysign does not look at its sign.
        signed = [
            call_vector(builder, "copysign", *each) for each in zip(quotients, xs, strict=True)
        ]
        return pack(builder, x, signed)

    return x(x), codegen
