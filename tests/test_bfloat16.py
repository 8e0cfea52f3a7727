"""bfloat16 on a dot-product unit: the same kernel, with operands in pairs, against the reference.

Where the CPU has the unit a process of its own runs this file with the unit switched on, whether or
not this CPU would be the faster for it.

The bound is derived, for every element by itself. Inputs are bfloat16, so that products are exact;
a weight is rounded, by 2**-8 of itself at most; the output is rounded once more; the sums in
between err as any in float32.
"""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from checks import (
    BFLOAT16,
    assert_same_bits,
    assert_same_kind,
    layouts,
    make_inputs,
    rounding,
    rounding_bound,
    score_bound,
    to_float64,
)
from fastattn.kernels import host

import fastattn
from fastattn import reference
from fastattn.bench import limits

# Queries, keys, head_dim, head_dim_v: odd ones end with half a pair.
SHAPES = [
    (33, 1, 5, 33),
    (33, 7, 3, 40),
    (20, 65, 40, 3),
    (65, 33, 63, 17),
    (40, 129, 1, 1),
    (130, 130, 64, 64),
    (67, 200, 130, 128),
]

NUMBERS = {"softcap": 3.0, "alibi_slopes": [0.1, 0.2, 0.3, 0.4], "sinks": [0.5, -1.0, 0.0, 2.0]}


def halved(score, b, h, i, j):
    return 0.5 * score + 0.01 * (i - j)


def shown(b, h, i, j):
    return (i + 2 * j + h) % 5 != 0


def rounded(x):
    """Return float32 numbers rounded to bfloat16."""
    return x.astype(BFLOAT16).astype(np.float32)


def inputs_of(rng, shape, dtype=BFLOAT16, **keywords):
    seqlen_q, seqlen_kv, head_dim, head_dim_v = shape
    sizes = {"seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv}
    sizes |= {"head_dim": head_dim, "head_dim_v": head_dim_v, "heads": 4, "kv_heads": 2}
    return make_inputs(rng, dtype=dtype, **sizes | keywords)


def assert_near(result, query, key, value, **keywords):
    """Assert that (output, lse) is as near the truth as the rounding of weights leaves it."""
    output, lse = result
    query, key, value = (to_float64(x) for x in (query, key, value))
    truth, lse_truth = reference.attention(query, key, value, return_lse=True, **keywords)
    assert_same_kind(output, truth, output.dtype)
    assert_same_kind(lse, lse_truth, np.float32)
    # Of |V| the weighted mean is what rounding all weights the same way would add to, or take off.
    value = np.where(np.isfinite(value), value, 0)
    mean = reference.attention(query, key, np.abs(value), **keywords)
    of_weights = rounding(BFLOAT16) * mean
    of_output = rounding(output.dtype) * (np.abs(truth) + of_weights)
    single = [x.astype(np.float32) for x in (query, key, value)]
    bias = keywords.get("bias", 0.0)
    of_sums = rounding_bound(*single, bias=bias)
    finite = np.isfinite(truth)
    bound = (of_weights + of_output + of_sums)[finite]
    assert (np.abs(to_float64(output) - truth)[finite] <= bound).all()
    seen = np.isfinite(lse_truth)
    of_lse = score_bound(*single[:2], bias=bias) + 8 * rounding(lse.dtype) * (
        np.abs(lse_truth[seen]) + key.shape[-2]
    )
    assert (np.abs(lse[seen] - lse_truth[seen]) <= of_lse).all()


# ---------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------

WITH_UNIT = "vfmadd213ps %zmm0, %zmm0, %zmm0\nvcvtneps2bf16\t%zmm0, %ymm0"
WITHOUT = "vfmadd213ps %zmm0, %zmm0, %zmm0\ncallq __truncsfbf2"


@pytest.mark.parametrize(
    ("cpu", "assembly", "switch", "chosen"),
    [
        ("znver4", WITH_UNIT, "", True),
        ("znver5", WITH_UNIT, "", True),
        ("znver4", WITH_UNIT, "0", False),
        ("emeraldrapids", WITH_UNIT, "", False),
        ("emeraldrapids", WITH_UNIT, "1", True),
        ("skylake-avx512", WITHOUT, "1", False),
    ],
)
def test_choice(cpu, assembly, switch, chosen, monkeypatch):
    monkeypatch.setenv(host.PAIRS_SWITCH, switch)
    monkeypatch.setattr(host, "_probe_assembly", lambda: ("x86_64-linux", cpu, assembly))
    assert host.detect().pairs_bfloat is chosen


@pytest.mark.parametrize("triple", ["x86_64-linux", "aarch64-linux"])
def test_choice_that_is_none(triple, monkeypatch):
    """Refused by every CPU, with a unit or without."""
    monkeypatch.setenv(host.PAIRS_SWITCH, "yes")
    monkeypatch.setattr(host, "_probe_assembly", lambda: (triple, "", "mulps %xmm0, %xmm0"))
    with pytest.raises(
        ValueError, match=r"FASTATTN_BFLOAT16_UNIT must be 0, 1 or empty: got 'yes'"
    ):
        host.detect()


# ---------------------------------------------------------------------------
# With the unit, in a process of its own
# ---------------------------------------------------------------------------


def test_with_the_unit():
    if not limits.unit().dots_pairs:
        pytest.skip("the CPU that Numba compiles for has no dot products of bfloat16")
    run = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {host.PAIRS_SWITCH: "1"},
        capture_output=True,
        text=True,
        check=False,  # the error is in stderr
    )
    assert run.returncode == 0, run.stderr


def check_shapes_and_variants(rng):
    for shape in SHAPES:
        inputs = inputs_of(rng, shape)
        seqlen_q, seqlen_kv = lengths = shape[:2]
        mask = rng.random((seqlen_q, seqlen_kv)) < 0.7
        bias = rng.standard_normal((seqlen_q, seqlen_kv)).astype(np.float32)
        blocks = fastattn.create_block_mask(shown, 1, 1, *lengths, block_size=(32, 64))
        for keywords in (
            {},
            {"causal": True},
            {"kv_lengths": [seqlen_kv // 2, seqlen_kv]},
            {"mask": mask, "bias": bias},
            {"window": (20, 3)} | NUMBERS,
            {"score_mod": halved, "mask_mod": shown},
            {"block_mask": blocks, "bias": bias, "score_mod": halved} | NUMBERS,
        ):
            result = fastattn.attention(*inputs, return_lse=True, **keywords)
            assert_near(result, *inputs, **keywords)


def check_layouts(rng):
    """Any strides, and features one by one: what cannot be read in pairs is copied in rows."""
    for shape in [(40, 70, 64, 32), (40, 70, 7, 9)]:
        inputs = inputs_of(rng, shape, heads=2, kv_heads=2)
        for name, layout in layouts.items():
            turned = [layout(x) for x in inputs]
            result = fastattn.attention(*turned, causal=True)
            plain = fastattn.attention(*(np.ascontiguousarray(x) for x in turned), causal=True)
            assert np.isfinite(to_float64(result)).all(), name
            assert_same_bits(result, plain)


def check_threads_and_batch(rng):
    query, key, value = inputs_of(rng, (300, 270, 64, 48))
    mask = rng.random((300, 270)) < 0.5
    before = fastattn.get_num_threads()
    for keywords in ({}, {"causal": True}, {"mask": mask}):
        whole = fastattn.attention(query, key, value, **keywords)
        fastattn.set_num_threads(1)
        assert_same_bits(fastattn.attention(query, key, value, **keywords), whole)
        alone = fastattn.attention(query[1:], key[1:], value[1:], **keywords)
        fastattn.set_num_threads(before)
        assert_same_bits(alone, whole[1:])


def check_hidden_numbers(rng):
    """Hidden NaN and Inf change no bit, where a pair has a visible key as well, or none."""
    query, key, value = inputs_of(rng, (70, 141, 64, 40))
    before = fastattn.get_num_threads()
    for keywords, hidden in (
        ({"mask": np.arange(141) % 3 != 0}, np.arange(141) % 3 == 0),
        ({"kv_lengths": 77}, np.arange(141) >= 77),
        ({"window": (200, 0), "query_offset": 7}, np.arange(141) > 76),
        ({"bias": np.where(np.arange(141) < 100, 0, -np.inf)}, np.arange(141) >= 100),
    ):
        clean = fastattn.attention(query, key, value, **keywords)
        assert np.isfinite(to_float64(clean)).all()
        for strange in (np.nan, np.inf, -np.inf):
            k, v = (np.where(hidden[:, None], x.dtype.type(strange), x) for x in (key, value))
            assert_same_bits(fastattn.attention(query, k, v, **keywords), clean)
            fastattn.set_num_threads(1)
            assert_same_bits(fastattn.attention(query, k, v, **keywords), clean)
            fastattn.set_num_threads(before)
    # Causal: what some queries see and others do not.
    value[:, :, 100, 3] = np.nan
    result = fastattn.attention(query, key, value, causal=True, return_lse=True)
    assert_near(result, query, key, value, causal=True)
    sees = np.arange(70) + 141 - 70 >= 100
    assert (np.isnan(to_float64(result[0][..., 3])) == sees).all()


def check_permitted_rounding(rng):
    """precision="bf16": float32 inputs are rounded, as if the caller had rounded them."""
    for shape in SHAPES:
        inputs = inputs_of(rng, shape, np.float32)
        for keywords in ({"causal": True}, {"bias": rng.standard_normal(shape[:2])}):
            call = partial(fastattn.attention, return_lse=True, **keywords)
            permitted = call(*inputs, precision="bf16")
            assert_near(permitted, *map(rounded, inputs), **keywords)
            exact = call(*map(rounded, inputs), precision="bf16")
            narrow = call(*(x.astype(BFLOAT16) for x in inputs))
            for ours, expected in zip(permitted, exact, strict=True):
                assert_same_bits(ours, expected)
            assert_same_bits(permitted[0].astype(BFLOAT16), narrow[0])
            assert_same_bits(permitted[1], narrow[1])
    query, key, value = inputs
    of_ones = fastattn.attention(query, key, np.ones_like(value), precision="bf16")
    assert np.abs(of_ones - 1).max() > 2**-14, "rounded weights, as only the unit has them"
    # What bfloat16 cannot hold is infinite, and hidden all the same.
    largest = np.where(np.arange(200)[:, None] >= 77, np.finfo(np.float32).max, value)
    keywords = {"kv_lengths": 77, "precision": "bf16"}
    clean = fastattn.attention(query, key, value, **keywords)
    assert_same_bits(fastattn.attention(query, key, largest, **keywords), clean)


def check_caches_and_packed_sequences(rng):
    """A bfloat16 cache, pages that do not hold a whole block, and sequences that lie end to end."""
    query, key, value = inputs_of(rng, (70, 70, 64, 40), batch=(1,))
    whole = fastattn.attention(query, key, value, causal=True)
    cache = fastattn.KVCache(1, 2, 64, 100, head_dim_v=40, dtype=BFLOAT16)
    cache.append(key, value)
    assert_same_bits(cache.attend(query, causal=True), whole)
    packed = [np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in (query, key, value)]
    result = fastattn.varlen_attention(*packed, [0, 70], causal=True)
    assert_same_bits(result.swapaxes(0, 1)[None], whole)
    pool = fastattn.PagedKVCache(8, 16, 2, 64, head_dim_v=40, dtype=BFLOAT16)
    sequence = pool.add()
    pool.append([sequence], packed[1], packed[2], [0, 70])
    result = pool.attend(packed[0], [sequence], [0, 70], causal=True)
    assert_same_bits(result.swapaxes(0, 1)[None], whole)


if __name__ == "__main__":
    assert host.HOST.pairs_bfloat, host.HOST
    for check in (
        check_shapes_and_variants,
        check_layouts,
        check_threads_and_batch,
        check_hidden_numbers,
        check_permitted_rounding,
        check_caches_and_packed_sequences,
    ):
        check(np.random.default_rng(0))
