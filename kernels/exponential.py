"""Constants of the exponential, by accumulation type.

``exp(x) = 2**n exp(f)`` with ``n = round(x log2(e))`` and ``f = x - n log(2)`` in
[-log(2)/2, log(2)/2] (Muller, Elementary Functions, 3rd ed., section 11.1). For ``exp(f)``
a minimax polynomial for the relative error, found with Remez' exchange algorithm
(section 3.5 there) in 60 digits, then rounded. Its degree is the smallest whose error
disappears behind the rounding of the evaluation: 1.9e-9 at degree 6 for float32 (half a
unit in the last place is 6.0e-8), 3.1e-18 at degree 11 for float64 (1.1e-16).

Where a CPU finds an entry of a table that fills two registers in one instruction (32 of
float32, 16 of float64, with AVX-512), ``n`` counts such parts of a power of two, ``f`` is
as many times smaller, and a shorter polynomial serves: 5.3e-8 at degree 2, 7.1e-18 at
degree 6, of which ``exp(0) = 1`` is taken off (Tang 1989, "Table-driven implementation of
the exponential function in IEEE floating-point arithmetic", section 2).

``tests/test_numerics.py`` measures the result.
"""

from __future__ import annotations

from typing import NamedTuple


class Exponential(NamedTuple):
    """What one type's exponential is made of."""

    mantissa_bits: int
    exponent_bias: int
    # log(2) as a sum: the first is what the type holds, the second what that misses. The product of
    # n with the first is exact inside a fused multiply-add.
    log_2: tuple[float, ...]
    # The same for CPUs without it: the first is so short that its product with n is exact.
    log_2_short: tuple[float, ...]
    coefficients: tuple[float, ...]  # lowest power first
    table_coefficients: tuple[float, ...]  # of (exp(f) - 1) / f, with a table


def lowest_power(element: str) -> int:
    """Return the power of two below which the exponential is 0.

    So far above the smallest normal number that products with it are normal too: a CPU takes a
    hundred times as long for one that is not. Beside the largest weight of a softmax, which is 1,
    nothing is lost.
    """
    constants = EXPONENTIALS[element]
    return 2 + constants.mantissa_bits - constants.exponent_bias


EXPONENTIALS: dict[str, Exponential] = {
    "float32": Exponential(
        23,
        127,
        (0.6931471805599453, -1.904654323148236e-09),
        (0.693359375, -2.1219444005469058e-04),
        (
            1.0000000005541662993,
            1.0000000363231764798,
            0.49999992079828018839,
            0.16666420169946366933,
            0.041668225566922837587,
            0.0083748157983017933253,
            0.0013836846134577056382,
        ),
        (1.0000147422726261105, 0.50001105654408263084),
    ),
    "float64": Exponential(
        52,
        1023,
        (0.6931471805599453, 2.3190468138462996e-17),
        (0.6931471803691238, 1.9082149292705877e-10),
        (
            0.9999999999999999971,
            1.0000000000000000304,
            0.50000000000000176856,
            0.16666666666666168664,
            0.041666666666492767295,
            0.0083333333335592713357,
            0.0013888888951223988291,
            0.00019841269432679236866,
            0.000024801486521427463949,
            2.7557622530872254657e-6,
            2.7632293279459875375e-7,
            2.4994304884817207301e-8,
        ),
        (
            1.0000000000000022784,
            0.5000000000000019938602,
            0.1666666666280298923218,
            0.0416666666425154458176,
            0.008333497134613369403672,
            0.00138895032214389791428,
        ),
    ),
}
