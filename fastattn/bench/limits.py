"""What this machine can do at most: the measures that every result is divided by.

Two limits, both in Numba and independent of the package, so that a mistake in the
package's view of the machine cannot lower the bar it is held to:

- `multiply_adds`: on every core a loop of independent multiply-add chains that live in
  registers, more of them than latency x units, without a load or a store. For bfloat16, dots of
  pairs where the CPU has a unit for them that is faster.
- `reading`: one pass over an array four times the size of the last-level cache, every core
  on its own part of it.

Run it with `python -m bench.limits`.
"""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from fastattn.kernels.simd.tile import emit_dot_pairs

from .machine import THREADS, cpus

# Rounds of multiply-adds in a run: some 10 ms, for the cost of waking the threads not to count.
# A constant, because nothing can be calibrated on a machine that is busy at that moment.
STEPS = 5_000_000

# Where the operating system does not say how large its last-level cache is: more than most are.
FALLBACK_CACHE_BYTES = 64 << 20

# The instructions of a step in assembly; without a unit that does both, the product stands for it.
MULTIPLIES = r"^\s*(vfmadd|fmla|v?mulp)"

_i32 = ir.IntType(32)


@dataclass(frozen=True)
class Limit:
    """Work that only one unit of the machine limits: call `run`, divide `amount` by the time."""

    run: Callable[[], object]
    amount: float


class Unit(NamedTuple):
    """What multiplies and adds: how wide its registers are, whether one instruction does both."""

    vector_bytes: int
    fused: bool
    dots_pairs: bool  # of bfloat16


# As wide as any register: LLVM takes as many as are needed of those that there are. The conversion
# to bfloat16 is a part of the unit for dots of pairs. Not taken from `kernels.host`: a yardstick
# that believed what it measures would hide its mistakes, and a test holds one against the other.
_PROBE = """
declare <16 x float> @llvm.fmuladd.v16f32(<16 x float>, <16 x float>, <16 x float>)
define <16 x bfloat> @probe(<16 x float> %x) {
  %y = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %x, <16 x float> %x, <16 x float> %x)
  %z = fptrunc <16 x float> %y to <16 x bfloat>
  ret <16 x bfloat> %z
}
"""


@cache
def unit() -> Unit:
    """Return the unit of the CPU that Numba compiles for: NUMBA_CPU_NAME, or the host."""
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    assembly = machine.emit_assembly(llvm.parse_assembly(_PROBE))
    widths = {"%zmm": 64, "%ymm": 32}
    vector_bytes = next((widths[name] for name in widths if name in assembly), 16)
    fused = re.search(r"\b(vfmadd|fmla)", assembly) is not None
    return Unit(vector_bytes, fused, "vcvtneps2bf16" in assembly)


def chains() -> int:
    """Return how many independent chains keep the multiply-add units busy.

    15 fit the 16 registers of AVX2 and SSE beside their constant operand, and exceed the largest
    latency x units of x86 (5 x 2, Haswell). A product and a sum in two instructions need all of
    them: 12 reach nine tenths where three units have a latency of four (Golden Cove). AVX-512 and
    NEON have 32 registers, and some NEON cores four units with a latency of four.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return 15 if is_x86 and unit().vector_bytes < 64 else 24


# ---------------------------------------------------------------------------
# Multiply-adds
# ---------------------------------------------------------------------------


def _fma(builder: ir.IRBuilder, x: ir.Value, factor: ir.Value) -> ir.Value:
    """Emit ``x * factor + factor``: tends to factor / (1 - factor)."""
    if not unit().fused:
        return builder.fadd(builder.fmul(x, factor), factor)
    lanes, bits = x.type.count, 8 * unit().vector_bytes // x.type.count
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(x.type, [x.type] * 3), f"llvm.fma.v{lanes}f{bits}"
    )
    return builder.call(function, [x, factor, factor])


def _dot(builder: ir.IRBuilder, x: ir.Value, factor: ir.Value) -> ir.Value:
    """Emit ``x + factor . factor``, of pairs: grows by a quarter where factor is 0.5."""
    return emit_dot_pairs(builder, factor, factor, x)


def _chains(step: Callable[..., ir.Value]) -> Any:
    @intrinsic
    def run_chains(typingctx: Any, start: Any, factor: Any, steps: Any) -> Any:
        """Take a step on every chain ``steps`` times; return their sum."""
        lanes = unit().vector_bytes * 8 // start.bitwidth
        return start(start, start, types.intp), _emit_chains(step, lanes)

    return run_chains


def _emit_chains(step: Callable[..., ir.Value], lanes: int) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        scalar = args[0].type
        vector = ir.VectorType(scalar, lanes)

        def splat(value: ir.Value) -> ir.Value:
            undefined = ir.Constant(vector, ir.Undefined)
            first = builder.insert_element(undefined, value, _i32(0))
            order = ir.Constant(ir.VectorType(_i32, lanes), [0] * lanes)
            return builder.shuffle_vector(first, undefined, order)

        factors = splat(args[1])
        # Chains that began equal would stay equal, and LLVM would keep only one of them.
        starts = [
            splat(builder.fadd(args[0], ir.Constant(scalar, float(n)))) for n in range(chains())
        ]
        before = builder.block
        loop = builder.append_basic_block("chains")
        after = builder.append_basic_block("done")
        builder.branch(loop)

        builder.position_at_end(loop)
        left = builder.phi(args[2].type)
        left.add_incoming(args[2], before)
        values = [builder.phi(vector) for _ in starts]
        results = [step(builder, value, factors) for value in values]
        for value, first, result in zip(values, starts, results, strict=True):
            value.add_incoming(first, before)
            value.add_incoming(result, loop)
        fewer = builder.sub(left, ir.Constant(left.type, 1))
        left.add_incoming(fewer, loop)
        builder.cbranch(builder.icmp_signed(">", fewer, ir.Constant(left.type, 0)), loop, after)

        builder.position_at_end(after)
        total = results[0]
        for result in results[1:]:
            total = builder.fadd(total, result)
        lane_sum = builder.extract_element(total, _i32(0))
        for lane in range(1, lanes):
            lane_sum = builder.fadd(lane_sum, builder.extract_element(total, _i32(lane)))
        return lane_sum

    return codegen


_run_chains, _run_dots = _chains(_fma), _chains(_dot)


@njit(parallel=True)
def _multiply_adds(factor: Any, steps: Any, results: Any) -> None:
    for thread in prange(results.size):
        # Neither overflow nor denormals on the way.
        results[thread] = _run_chains(factor, factor, steps)


@njit(parallel=True)
def _dots(factor: Any, steps: Any, results: Any) -> None:
    for thread in prange(results.size):
        results[thread] = _run_dots(factor, factor, steps)


@cache
def multiply_adds(dtype: str) -> Limit:
    """Return work that only the units for products and sums of a dtype limit, counted in flops.

    16-bit types are multiplied in float32, or bfloat16 in pairs, whichever is faster here.
    """
    if dtype == "float64":
        return _limit(_multiply_adds, np.zeros(THREADS, np.float64), 2)
    results = np.zeros(THREADS, np.float32)
    single = _limit(_multiply_adds, results, 2)
    if dtype != "bfloat16" or not unit().dots_pairs:
        return single
    in_pairs = _limit(_dots, results, 4)
    return max(single, in_pairs, key=lambda limit: limit.amount / _timed(limit.run))


def _limit(run: Any, results: Any, flops: int) -> Limit:
    """Return chains as a limit; each step does so many flops in every lane."""
    factor = results.dtype.type(0.5)
    run(factor, 1, results)
    lanes = unit().vector_bytes // results.itemsize
    amount = float(flops * lanes * chains() * STEPS * THREADS)
    return Limit(lambda: run(factor, STEPS, results), amount)


def multiply_add_loop(dtype: str) -> list[str]:
    """Return the instructions of the measuring loop, to see that nothing else is in it."""
    _multiply_adds(np.dtype(dtype).type(0.5), 1, np.zeros(THREADS, dtype))
    assembly = next(
        code for (first, *_), code in _multiply_adds.inspect_asm().items() if str(first) == dtype
    )
    # Labels begin the blocks; the loop is the one with the multiply-adds, up to its jump back.
    blocks = re.split(r"^(?=[.\w]+:)", assembly, flags=re.MULTILINE)
    block = max(blocks, key=lambda lines: len(re.findall(MULTIPLIES, lines, re.MULTILINE)))
    label, *lines = (line.strip() for line in block.splitlines() if line.strip())
    end = next(n for n, line in enumerate(lines) if line.endswith(label.removesuffix(":")))
    return lines[: end + 1]


# ---------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------


@njit(parallel=True)
def _reading(array: Any, results: Any) -> None:
    size = array.size // (4 * results.size)
    for thread in prange(results.size):
        # Four streams: the hardware's prefetchers follow each one, and are further ahead in all
        # (a sixth to a third faster than one stream on Zen 3).
        part = array[4 * thread * size : 4 * (thread + 1) * size].reshape(4, size)
        a, b, c, d = part[0], part[1], part[2], part[3]
        seen = 0
        for i in range(size):
            seen |= a[i] | b[i] | c[i] | d[i]
        results[thread] = seen


def last_level_cache_bytes() -> int:
    """Return the size of the last-level caches that the cores in use can fill, summed."""
    caches = {}
    for cpu in cpus():
        folders = Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")
        levels = {int((folder / "level").read_text()): folder for folder in folders}
        if levels:
            last = levels[max(levels)]
            size = (last / "size").read_text().strip()
            caches[(last / "shared_cpu_list").read_text()] = int(size.removesuffix("K")) << 10
    return sum(caches.values()) or FALLBACK_CACHE_BYTES


def reading() -> Limit:
    """Return work that only the memory limits; its amount is in bytes."""
    array = np.ones(4 * last_level_cache_bytes() // 8, np.int64)
    results = np.zeros(THREADS, np.int64)
    _reading(array, results)
    return Limit(run=lambda: _reading(array, results), amount=float(array.nbytes))


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Measured(NamedTuple):
    """A limit as this machine has it now, with the quartiles of what was measured."""

    name: str
    rate: float
    unit: str
    lower: float
    upper: float


def measure_limits() -> list[Measured]:
    """Measure every limit, in turns, and take the median."""
    limits = (
        ("fma_peak float32", multiply_adds("float32"), "GFLOP/s"),
        ("fma_peak float64", multiply_adds("float64"), "GFLOP/s"),
        ("read_bandwidth", reading(), "GB/s"),
    )
    rounds = [[limit.amount / _timed(limit.run) / 1e9 for _, limit, _ in limits] for _ in range(15)]
    measured = []
    for (name, _, unit), rates in zip(limits, zip(*rounds, strict=True), strict=True):
        lower, median, upper = statistics.quantiles(rates, n=4)
        measured.append(Measured(name, median, unit, lower, upper))
    return measured


def main() -> None:
    """Print the limits."""
    for each in measure_limits():
        print(
            f"{each.name:18}{each.rate:8.1f} {each.unit:8}"
            f" (quartiles {each.lower:.1f} and {each.upper:.1f}; {THREADS} threads)"
        )


if __name__ == "__main__":
    main()
