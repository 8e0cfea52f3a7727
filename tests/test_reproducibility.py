"""The same bits: over runs, threads, batches, memory layouts, `out` given or not.

`outputs` computes every entry point on numbers that never change, and what must not matter is
changed around it. What may change bits is named at the end, and held to the bound of rounding.
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checks import (
    BFLOAT16,
    FLOAT_DTYPES,
    assert_accurate,
    assert_same_bits,
    layouts,
    make_inputs,
    rounding_bound,
    to_float64,
)

import fastattn
from fastattn import masks

# Rows of a kv head for one register, for decode in one chunk and in three, for prefill.
LENGTHS = [(1, 100), (3, 1100), (5, 60), (70, 130)]
GROUP = 2


def variants(rng, seqlen_q, seqlen_kv, heads=4):
    """Return keywords of every kind, together and alone, for one batch entry."""
    everything = {
        "mask": rng.random((heads, seqlen_q, seqlen_kv)) < 0.8,
        "bias": rng.standard_normal((seqlen_q, seqlen_kv), dtype=np.float32),
        "window": (seqlen_kv // 2, 3),
        "softcap": 5.0,
        "alibi_slopes": rng.random(heads),
        "sinks": rng.standard_normal(heads),
        "block_mask": fastattn.create_block_mask(
            masks.causal(seqlen_kv - seqlen_q), 1, 1, seqlen_q, seqlen_kv, block_size=(16, 50)
        ),
    }
    return [{}, {"causal": True}, everything]


def outputs():
    """Return (name, arrays) of every entry point."""
    rng = np.random.default_rng(0)
    for dtype in FLOAT_DTYPES:
        for lengths in LENGTHS:
            sizes = {"heads": 4, "kv_heads": 2, "head_dim": 40, "dtype": dtype}
            inputs = make_inputs(rng, seqlen_q=lengths[0], seqlen_kv=lengths[1], **sizes)
            for n, keywords in enumerate(variants(rng, *lengths)):
                result = fastattn.attention(*inputs, return_lse=True, **keywords)
                yield f"attention {dtype} {lengths} {n}", result
    query, key, value = (
        x.swapaxes(0, 1) for x in make_inputs(rng, batch=(), seqlen_q=200, seqlen_kv=200)
    )
    starts = [0, 130, 130, 131, 200]
    packed = fastattn.varlen_attention(query, key, value, starts, causal=True, return_lse=True)
    yield "varlen_attention", packed
    for dtype in (np.dtype(np.float32), BFLOAT16, np.dtype(np.int8)):
        query, key, value = make_inputs(
            rng, heads=4, kv_heads=2, seqlen_q=1, seqlen_kv=700, head_dim=64
        )
        cache = fastattn.KVCache(2, 2, 64, 800, dtype=dtype)
        cache.append(key, value, lengths=[700, 300])
        yield f"KVCache {dtype}", (cache.attend(query),)
        pages = fastattn.PagedKVCache(30, 64, 2, 64, dtype=dtype)
        ids = [pages.add(), pages.add()]
        packed = (
            np.concatenate([x[0], x[1, :, :300]], axis=1).swapaxes(0, 1) for x in (key, value)
        )
        pages.append(ids, *packed, [0, 700, 1000])
        yield f"PagedKVCache {dtype}", (pages.attend(query[:, :, 0], ids, causal=True),)


def hashes():
    """Return a hash of what every entry point gives."""
    return {
        name: hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()
        for name, arrays in outputs()
    }


def print_hashes(most_threads):
    """Print the hashes for every number of threads."""
    every = []
    for n in range(1, most_threads + 1):
        fastattn.set_num_threads(n)
        every.append(hashes())
    print(json.dumps(every))


def test_runs_and_threads():
    """In processes of their own: more threads than this one may have, and both threading layers."""
    expected = hashes()
    assert len(set(expected.values())) > 40  # one query sees the same causal or not
    for layer, threads in (("omp", 3), ("workqueue", 2)):
        settings = {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": str(threads)}
        code = f"import test_reproducibility as t; t.print_hashes({threads})"
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent,
            env=os.environ | settings | {"PYTHONHASHSEED": "7"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        for n, found in enumerate(json.loads(run.stdout), 1):
            assert found == expected, f"{n} threads of {layer}"


# ---------------------------------------------------------------------------
# What stands around a row
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_batch_composition(lengths, dtype, rng):
    """An entry of a batch is as it is alone, whatever the others are and in any order."""
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 40, "dtype": dtype}
    inputs = make_inputs(rng, batch=(5,), seqlen_q=lengths[0], seqlen_kv=lengths[1], **sizes)
    order = np.array([3, 0, 3, 2])
    for keywords in variants(rng, *lengths):
        whole = fastattn.attention(*inputs, **keywords)
        for b in range(5):
            alone = fastattn.attention(*(x[b] for x in inputs), **keywords)
            assert_same_bits(alone, whole[b])
        others = fastattn.attention(*(x[order] for x in inputs), **keywords)
        assert_same_bits(others, whole[order])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_heads_are_alone(dtype, rng):
    """The heads that share a kv head are as they are without the other kv heads."""
    for lengths in LENGTHS:
        sizes = {"heads": 6, "kv_heads": 3, "head_dim": 40, "dtype": dtype}
        q, k, v = make_inputs(rng, seqlen_q=lengths[0], seqlen_kv=lengths[1], **sizes)
        whole = fastattn.attention(q, k, v)
        alone = fastattn.attention(q[:, 2:4], k[:, 1:2], v[:, 1:2])
        assert_same_bits(alone, whole[:, 2:4])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_padding_of_keys(dtype, rng):
    """A sequence is as it is alone, however far the keys of its batch are padded."""
    for seqlen_q in (1, 4, 40):
        q, k, v = make_inputs(
            rng, heads=4, kv_heads=2, seqlen_q=seqlen_q, seqlen_kv=1300, dtype=dtype
        )
        lengths = np.array([1300, 70])
        whole, whole_lse = fastattn.attention(q, k, v, kv_lengths=lengths, return_lse=True)
        for b, n in enumerate(lengths):
            one = q[b], k[b, :, :n], v[b, :, :n]
            alone, lse = fastattn.attention(*one, return_lse=True)
            assert_same_bits(alone, whole[b])
            assert_same_bits(lse, whole_lse[b])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_packed_sequences(dtype, rng):
    lengths = [130, 1, 17, 0, 64]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    inputs = [
        x.swapaxes(0, 1)
        for x in make_inputs(
            rng, batch=(), heads=4, kv_heads=2, seqlen_q=212, seqlen_kv=212, dtype=dtype
        )
    ]
    whole = fastattn.varlen_attention(*inputs, starts, causal=True)
    for begin, end in itertools.pairwise(starts):
        own = [x[begin:end] for x in inputs]
        alone = fastattn.varlen_attention(*own, [0, end - begin], causal=True)
        assert_same_bits(alone, whole[begin:end])


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.int8], ids=lambda x: np.dtype(x).name)
def test_sequences_of_a_cache(dtype, rng):
    """Of a `KVCache`, whatever the other sequences are; of pages, see `test_cache.py`."""
    q, k, v = make_inputs(
        rng, batch=(3,), heads=4, kv_heads=2, seqlen_q=1, seqlen_kv=900, head_dim=64
    )
    lengths = [900, 40, 513]
    whole = fastattn.KVCache(3, 2, 64, 1000, dtype=dtype)
    whole.append(k, v, lengths=lengths)
    together = whole.attend(q)
    for b, n in enumerate(lengths):
        one = fastattn.KVCache(1, 2, 64, 1000, dtype=dtype)
        one.append(k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        assert_same_bits(one.attend(q[b : b + 1]), together[b : b + 1])


# ---------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", layouts)
@pytest.mark.parametrize("lengths", [(3, 600), (33, 70)], ids=str)
def test_memory_layout(lengths, layout, rng):
    """All arrays at once in one memory layout, beside contiguous copies of what they hold then."""
    for dtype in FLOAT_DTYPES:
        sizes = {"heads": 4, "kv_heads": 2, "head_dim": 40, "dtype": dtype}
        inputs = make_inputs(rng, seqlen_q=lengths[0], seqlen_kv=lengths[1], **sizes)
        change = layouts[layout]
        turned = [change(x) for x in inputs]
        mask = change(rng.random((2, 4, *lengths)) < 0.8)
        bias = change(rng.standard_normal((2, 4, *lengths)).astype(dtype))
        plain = [np.ascontiguousarray(x, x.dtype.newbyteorder("=")) for x in turned]
        own = {"mask": mask, "bias": bias}
        copied = {
            name: np.ascontiguousarray(x, x.dtype.newbyteorder("=")) for name, x in own.items()
        }
        expected = fastattn.attention(*plain, causal=True, **copied)
        assert_same_bits(fastattn.attention(*turned, causal=True, **own), expected)


@pytest.mark.parametrize("layout", ["contiguous", "fortran", "every_second", "negative_everywhere"])
@pytest.mark.parametrize("lengths", [(3, 600), (33, 70)], ids=str)
def test_out(lengths, layout, rng):
    for dtype in FLOAT_DTYPES:
        sizes = {"heads": 4, "kv_heads": 2, "head_dim": 40, "head_dim_v": 24, "dtype": dtype}
        inputs = make_inputs(rng, seqlen_q=lengths[0], seqlen_kv=lengths[1], **sizes)
        expected = fastattn.attention(*inputs)
        out = layouts[layout](np.full(expected.shape, 7, dtype))
        assert fastattn.attention(*inputs, out=out) is out
        assert_same_bits(out, expected)
        packed = [x[0].swapaxes(0, 1) for x in inputs]
        ends = [[0, len(packed[n])] for n in (0, 1)]
        expected = fastattn.varlen_attention(*packed, *ends)
        out = layouts[layout](np.full(expected.shape, 7, dtype))
        assert fastattn.varlen_attention(*packed, *ends, out=out) is out
        assert_same_bits(out, expected)


# ---------------------------------------------------------------------------
# The exceptions, of which the documentation tells: other bits, within rounding
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_other_numbers_of_queries(dtype, rng):
    """One query of many, by itself: another kernel, whose sums have another order."""
    q, k, v = make_inputs(rng, seqlen_q=70, seqlen_kv=300, dtype=dtype)
    whole = fastattn.attention(q, k, v)
    one = fastattn.attention(q[:, :, 33:34], k, v)
    apart = np.abs(to_float64(one) - to_float64(whole[:, :, 33:34])).max()
    assert apart <= rounding_bound(q, k, v)
    assert_accurate(one, q[:, :, 33:34], k, v)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_padding_chooses_the_kernel(dtype, rng):
    """For 9 to 16 rows of a kv head: alone, a sequence of one chunk goes through another kernel."""
    q, k, v = make_inputs(rng, heads=4, kv_heads=2, seqlen_q=6, seqlen_kv=1300, dtype=dtype)
    whole = fastattn.attention(q, k, v, kv_lengths=[1300, 70])
    one = q[1], k[1, :, :70], v[1, :, :70]
    alone = fastattn.attention(*one)
    apart = np.abs(to_float64(alone) - to_float64(whole[1])).max()
    assert apart <= rounding_bound(*one)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_merged_parts(dtype, rng):
    q, k, v = make_inputs(rng, seqlen_q=70, seqlen_kv=300, dtype=dtype)
    whole = fastattn.attention(q, k, v)
    cuts = [slice(0, 100), slice(100, 299), slice(299, 300)]
    parts = [fastattn.attention(q, k[..., s, :], v[..., s, :], return_lse=True) for s in cuts]
    merged, _ = fastattn.merge_states(*zip(*parts, strict=True))
    apart = np.abs(to_float64(merged) - to_float64(whole)).max()
    assert apart <= 2 * rounding_bound(q, k, v)  # each part is rounded once more


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_packed_beside_padded(dtype, rng):
    """`varlen_attention` has no kernel for few queries."""
    q, k, v = make_inputs(rng, batch=(), heads=2, seqlen_q=3, seqlen_kv=300, dtype=dtype)
    padded = fastattn.attention(q, k, v)
    packed = fastattn.varlen_attention(*(x.swapaxes(0, 1) for x in (q, k, v)), [0, 3], [0, 300])
    apart = np.abs(to_float64(packed.swapaxes(0, 1)) - to_float64(padded)).max()
    assert apart <= rounding_bound(q, k, v)
