"""Narrower instruction sets than the host's: the same kernels, other tiles, the same bound.

Numba compiles for the CPU that NUMBA_CPU_NAME names when NUMBA_CPU_FEATURES is set as well. Each
one needs a process of its own, which runs this file with the instruction set that it must find.
Kept code is kept for a CPU, so that all of them share one directory. For AArch64 the kernels are
compiled by `cross.py`, and their assembly is read.
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
from checks import assert_accurate, make_inputs
from fastattn.kernels import host

import fastattn
from fastattn.bench import limits

# What a CPU must have to run the code, by the instruction set and a CPU that has just that.
CPUS = [
    ("nehalem", "SSE", ("sse4.2", "popcnt")),
    ("haswell", "AVX2", ("avx2", "fma", "bmi2")),
    ("skylake-avx512", "AVX-512", ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")),
]

DTYPES = [np.dtype(name) for name in ("float32", "float64", "float16")]
LENGTHS = [(1, 130), (7, 65), (33, 7), (65, 33), (130, 130)]
HEAD_DIMS = [(3, 40), (40, 3), (64, 64)]


def halved(score, b, h, i, j):
    return 0.5 * score + 0.01 * (i - j)


def shown(b, h, i, j):
    return (i + 2 * j + h) % 5 != 0


def variants(rng, lengths):
    """Return keywords of attention for every kind of tile."""
    mask = rng.random(lengths) < 0.7
    bias = rng.standard_normal(lengths).astype(np.float32)
    numbers = {"softcap": 3.0, "alibi_slopes": [0.1, 0.2], "sinks": [0.5, -1.0]}
    blocks = fastattn.create_block_mask(shown, 1, 1, *lengths, block_size=(32, 64))
    return (
        {"causal": True},
        {"mask": mask, "bias": bias},
        {"window": (20, 3)} | numbers,
        {"score_mod": halved, "mask_mod": shown},
        {"block_mask": blocks, "bias": bias, "score_mod": halved} | numbers,
    )


def battery():
    """Check attention against the reference in float64, for every type and kind of tile.

    Any two of lengths, features and variants meet. All three do in the rest of the suite.
    """
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        head_dims = itertools.cycle(HEAD_DIMS)  # each of three meets each of five, and of five
        for lengths in LENGTHS:
            for keywords in variants(rng, lengths):
                head_dim, head_dim_v = next(head_dims)
                inputs = make_inputs(
                    rng,
                    batch=(max(1, 64 // min(lengths)),),  # few rows would be a matter of luck
                    heads=2,
                    kv_heads=1,
                    seqlen_q=lengths[0],
                    seqlen_kv=lengths[1],
                    head_dim=head_dim,
                    head_dim_v=head_dim_v,
                    dtype=dtype,
                )
                result = fastattn.attention(*inputs, return_lse=True, **keywords)
                assert_accurate(result, *inputs, **keywords)


def assert_peak_is_its_own():
    """The bench divides by what these registers can do, each of them full, without memory."""
    registers = {64: "zmm", 32: "ymm", 16: "xmm"}[host.HOST.vector_bytes]
    for dtype in ("float32", "float64"):
        lines = limits.multiply_add_loop(dtype)
        multiplies = [line for line in lines if re.match(limits.MULTIPLIES, line)]
        assert len(multiplies) == limits.chains()
        assert all(registers in line for line in multiplies)
        assert not any("(" in line for line in lines)


@pytest.mark.long
@pytest.mark.parametrize(("cpu", "instruction_set", "needed"), CPUS, ids=[each[0] for each in CPUS])
def test_instruction_set(cpu, instruction_set, needed):
    if instruction_set == host.HOST.instruction_set:
        pytest.skip("the whole suite runs on this instruction set here")
    features = llvm.get_host_cpu_features()
    missing = [name for name in needed if not features.get(name)]
    if missing:
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    run = subprocess.run(
        [sys.executable, __file__, instruction_set],
        env=os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""},
        capture_output=True,
        text=True,
        check=False,  # the error of the battery is in stderr
    )
    assert run.returncode == 0, run.stderr


# ---------------------------------------------------------------------------
# AArch64, of which only the assembly is to be had here
# ---------------------------------------------------------------------------

# What kernels call beside each other: Numba's run-time, Python to report an error, and the C
# library. A function that LLVM would have to make up, such as a conversion, is not among them.
CALLS = r"(cfunc\.)?_ZN|fastattn_|NRT_|numba_|Py|(mem(set|cpy)|logf?|expf?)$"


def host_on(triple, monkeypatch):
    """Return what the package says of a CPU with NEON."""
    monkeypatch.setattr(host, "_probe_assembly", lambda: (triple, "generic", "fmla v0.4s, v1.4s"))
    return host.detect()


@pytest.mark.parametrize("triple", ["aarch64-unknown-linux-gnu", "arm64-apple-darwin23.6.0"])
def test_choice_for_arm(triple, monkeypatch):
    found = host_on(triple, monkeypatch)
    assert (found.instruction_set, found.vector_bytes, found.fused) == ("NEON", 16, True)
    for rows, cols in (found.wide, found.narrow):
        assert rows * cols + cols + 1 <= 32, "as many registers as there are"


@pytest.fixture(scope="module")
def arm():
    """Return the instructions of every block of the kernels, by function, as a list of lists."""
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("cross.py"), "aarch64-linux-gnu", "neoverse-n1"],
        capture_output=True,
        text=True,
        check=False,  # the reason is in stderr
    )
    assert run.returncode == 0, run.stderr
    functions = {}
    for line in run.stdout.splitlines():
        if label := re.match(r"([\w.$]+):", line):
            if not label[1].startswith("."):
                blocks = functions.setdefault(label[1], [])
            blocks.append([])
        elif instruction := re.match(r"\t(\w[^.].*)", line):
            blocks[-1].append(instruction[1])
    return functions


def busiest(functions, name):
    """Return the block of a routine with the most multiply-adds."""
    (blocks,) = (
        functions[each] for each in functions if name in each and not each.startswith("cfunc")
    )
    return max(blocks, key=lambda block: sum(line.startswith("fmla") for line in block))


def test_products_for_arm(arm, monkeypatch):
    """Four steps, every sum in its register, and few instructions beside the multiply-adds."""
    rows, cols = host_on("aarch64-linux-gnu", monkeypatch).wide
    for product in ("scores", "values"):
        loop = busiest(arm, f"fastattn_{product}_float32_{cols}B")
        multiply_adds = [line for line in loop if line.startswith("fmla") and ".4s" in line]
        assert len(multiply_adds) == 4 * rows * cols
        assert len(loop) <= 1.5 * len(multiply_adds), loop
        assert not any("[sp" in line for line in loop), "what is kept in memory"


def test_arithmetic_for_arm(arm):
    """Loops over registers stay such: no lane is taken out, every sum and product is of four."""
    names = ["update_float32", "row_softmax_float32", "cap_float32"]
    names += [f"row_{product}_float32_2_4" for product in ("scores", "values")]
    for name in names:
        loop = busiest(arm, f"fastattn_{name}B")
        assert any(line.startswith("fmla") for line in loop), name
        for line in loop:
            assert not re.match(r"(umov|smov|ins|fmadd|fcvt)\t", line), line
            if re.match(r"f(add|sub|mul|mla|div|cvtl)", line):
                assert ".4s" in line, line


def test_calls_for_arm(arm):
    lines = [line for blocks in arm.values() for block in blocks for line in block]
    called = {line.split()[1] for line in lines if re.match(r"bl\t", line)}
    assert "fastattn_scores_float32_1" in called
    assert not [name for name in called if not re.match(CALLS, name)]


if __name__ == "__main__":
    assert host.HOST.instruction_set == sys.argv[1], host.HOST
    assert_peak_is_its_own()
    battery()
