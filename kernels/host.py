"""What the host's instruction set offers, asked of LLVM once.

Numba decides for which CPU it compiles (the host, or ``NUMBA_CPU_NAME`` with
``NUMBA_CPU_FEATURES``). Instead of keeping a table of CPU names, one line of
LLVM IR is compiled for the same target and its assembly is read: the registers
that appear are the registers that the kernels will get.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import llvmlite.binding as llvm
from numba.core.registry import cpu_target


class Host(NamedTuple):
    """Vector width, and the accumulator tiles that fit the register file.

    ``wide`` and ``narrow`` are ``(rows, cols)``: rows are keys (or value
    features), cols are vectors of queries. A step of the inner loop loads
    ``rows + cols`` registers for ``rows * cols`` multiply-adds, and needs
    ``rows * cols + cols + 1`` registers. ``exp_rows`` registers go through one exp2
    together, to hide its latency without spilling. ``sums`` is how many dot products of
    rows are summed at a time, lane by lane: half of the registers, a multiple of the lanes.
    """

    cpu: str
    instruction_set: str
    vector_bytes: int
    fused: bool
    converts_half: bool
    wide: tuple[int, int]
    narrow: tuple[int, int]
    exp_rows: int
    sums: int
    looks_up: bool  # whether a table of two registers can be looked up in one instruction
    pairs_bfloat: bool = False  # whether products of bfloat16 go to the unit for dots of pairs


# CPUs, as LLVM names them, whose unit for dots of bfloat16 pairs does twice as many operations in a
# cycle as their multiply-add units do in float32. Where it does half as many (Sapphire Rapids and
# its successors: 86 and 176 GFLOP/s a core, measured), widening bfloat16 to float32 is faster.
FAST_PAIRS = ("znver4", "znver5")

# "1" takes the unit wherever the CPU has it, "0" nowhere: for tests and for measuring.
PAIRS_SWITCH = "FASTATTN_BFLOAT16_UNIT"


# One multiply-add on 64 bytes, at least as wide as any register known here, one conversion from 16
# bits, and one to bfloat16.
_PROBE = """
declare <16 x float> @llvm.fmuladd.v16f32(<16 x float>, <16 x float>, <16 x float>)
define void @probe(ptr %p) {
  %x = load <16 x float>, ptr %p, align 4
  %y = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %x, <16 x float> %x, <16 x float> %x)
  store <16 x float> %y, ptr %p, align 4
  %b = fptrunc <16 x float> %y to <16 x bfloat>
  store <16 x bfloat> %b, ptr %p, align 2
  %h = load half, ptr %p, align 2
  %f = fpext half %h to float
  store float %f, ptr %p, align 4
  ret void
}
"""


def _probe_assembly() -> tuple[str, str, str]:
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=2
    )
    return triple, cpu, machine.emit_assembly(llvm.parse_assembly(_PROBE))


def _pairs_bfloat(cpu: str, assembly: str) -> bool:
    """Whether to use the dot-product unit, of which the conversion to bfloat16 is a part."""
    chosen = os.environ.get(PAIRS_SWITCH, "")
    if chosen not in ("", "0", "1"):
        raise ValueError(f"{PAIRS_SWITCH} must be 0, 1 or empty: got {chosen!r}")
    is_there = re.search(r"vcvtneps2bf16\s.*%ymm", assembly) is not None
    return is_there and (chosen == "1" or (chosen == "" and cpu in FAST_PAIRS))


def detect() -> Host:
    """Describe the target that Numba compiles for."""
    triple, cpu, assembly = _probe_assembly()
    pairs = _pairs_bfloat(cpu, assembly)
    if triple.startswith(("aarch64", "arm64")):
        # 32 registers of 16 bytes. 4 x 5 keeps four units with a latency of four busy; with 24
        # accumulators LLVM spills some in every step, whether 8 x 3 or 4 x 6.
        return Host(cpu, "NEON", 16, True, True, (4, 5), (8, 1), 4, 16, False)
    fused = re.search(r"\bvfmadd", assembly) is not None
    # The second is AVX512-FP16's name for it.
    half = "vcvtph2ps" in assembly or "vcvtsh2ss" in assembly
    if "%zmm" in assembly:
        # 32 registers of 64 bytes. 8 x 2 keeps two units with a latency of four busy, and leaves
        # room: taller tiles spill.
        return Host(cpu, "AVX-512", 64, fused, half, (8, 2), (8, 1), 8, 16, True, pairs)
    if "%ymm" in assembly:
        # 16 registers: 4 x 3 takes all of them (12 + 3 + 1) and has the fewest
        # loads for each multiply-add of all shapes that fit.
        return Host(cpu, "AVX2" if fused else "AVX", 32, fused, half, (4, 3), (8, 1), 3, 8, False)
    if "%xmm" in assembly:
        # No fused multiply-add: each product takes one more register, so the
        # tile is one column smaller than under AVX2.
        return Host(cpu, "SSE", 16, fused, half, (4, 2), (8, 1), 3, 8, False)
    return Host(cpu, "generic", 16, fused, half, (4, 2), (4, 1), 3, 8, False)


HOST = detect()
