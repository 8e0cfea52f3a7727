"""Attention for dask arrays: chunks in every axis and every keyword, against the reference.

Most tests compute with threads, in float64 and on small arrays in ragged chunks; the last ones on a
cluster of processes whose memory is smaller than the arrays, and one of which is killed.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import tracemalloc
from functools import partial
from io import StringIO
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
from checks import (
    BFLOAT16,
    assert_accurate,
    assert_same_bits,
    assert_within,
    largest_error,
    make_inputs,
    naive,
    rounding,
    rounding_bound,
    score_bound,
)
from dask.diagnostics import ProgressBar
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st

import fastattn
from fastattn import reference, runtime
from fastattn.integrations.dask import attention

B, HQ, HKV, LQ, LK, D = 2, 6, 3, 13, 29, 20
# No axis is cut evenly, and key, value and query heads are cut in different places.
CHUNKS = {
    "query": ((1, 1), (1, 5), (5, 1, 7), (D,)),
    "key": ((2,), (3,), (4, 9, 3, 13), (D,)),
    "value": ((1, 1), (2, 1), (10, 10, 9), (D,)),
}


def make(rng, **shape):
    """Return NumPy's query, key and value, and dask's in CHUNKS."""
    shape = {"heads": HQ, "kv_heads": HKV, "seqlen_q": LQ, "seqlen_kv": LK, "head_dim": D} | shape
    arrays = make_inputs(rng, batch=(B,), **{"dtype": np.float64} | shape)
    return arrays, [da.from_array(x, c) for x, c in zip(arrays, CHUNKS.values(), strict=True)]


def assert_like_reference(results, arrays, *, added=0.0, **keywords):
    """Assert (output, lse) of dask to be the reference's, but for the order of its sums.

    `added` is the largest magnitude that a keyword adds to a score. The bound is twice that of
    two orders of one sum: merging is another sum, over parts that each are off by as much.
    """
    for result in results:
        assert isinstance(result, da.Array)
    output, lse = dask.compute(*results)
    for result, computed in zip(results, (output, lse), strict=True):
        assert (result.dtype, result.shape) == (computed.dtype, computed.shape)
    expected, expected_lse = reference.attention(*arrays, return_lse=True, **keywords)
    query, key, value = arrays
    if keywords.get("layout") == "blhd":
        query, key, value = (np.swapaxes(x, -3, -2) for x in arrays)
    scale = keywords.get("scale")
    bound = rounding_bound(query, key, value, bias=added, scale=scale)
    assert_within(output, expected, expected.dtype, 2 * bound)
    largest = np.abs(expected_lse[np.isfinite(expected_lse)]).max(initial=1)
    bound = score_bound(query, key, bias=added, scale=scale)
    bound += (key.shape[-2] + 8) * rounding(lse.dtype) * largest
    assert_within(lse, expected_lse, expected_lse.dtype, 2 * bound)


def parts(*results):
    """Return how many pieces of keys are attended to in all."""
    keys = {key for result in results for key in result.dask}
    return sum(dask.utils.key_split(key) == "fastattn-part" for key in keys)


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


SLOPES = np.linspace(0.1, 1.5, HQ)
SINKS = np.array([-3.0, 0.0, 1.0, 2.0, 5.0, 40.0])
LENGTHS = np.array([8, 29])
MASK = drawn(1, B, HQ, LQ, LK) > -0.5
BIAS = drawn(2, B, HQ, LQ, LK)

KEYWORDS = [
    {},
    {"causal": True},
    {"causal": "bottom_right", "kv_lengths": LENGTHS},
    {"causal": "top_left"},
    {"causal": True, "query_offset": 7},
    {"causal": True, "query_offset": np.array([-4, 20])},
    {"window": (3, 2)},
    {"window": (None, 0)},
    {"window": (5, None), "causal": "top_left"},
    {"window": (0, 0), "query_offset": np.array([3, 12])},
    {"window": (2, 9), "kv_lengths": LENGTHS},
    {"kv_lengths": 11},
    {"kv_lengths": np.array([0, 14])},
    {"kv_lengths": np.array([4, 13], np.uint8)},
    {"softcap": 0.7},
    {"alibi_slopes": SLOPES},
    {"alibi_slopes": np.stack([SLOPES, -SLOPES]), "causal": "top_left"},
    {"alibi_slopes": SLOPES, "query_offset": np.array([100, -3])},
    {"sinks": SINKS},
    {"sinks": SINKS, "causal": True, "query_offset": -5},
    {"sinks": SINKS, "kv_lengths": 0},
    {"scale": 0.0},
    {"scale": -1.5},
    {"mask": MASK},
    {"mask": MASK[0, 0], "causal": True},
    {"mask": MASK[:, :1, :1]},
    {"mask": MASK[..., :1]},
    {"bias": BIAS},
    {"bias": BIAS[1, 2, 3]},
    {"bias": np.where(MASK, BIAS, -np.inf)[:, :, :1]},
    {"bias": np.arange(LK)},
    {
        "mask": MASK,
        "bias": BIAS,
        "causal": True,
        "window": (9, 4),
        "kv_lengths": np.array([27, 16]),
        "query_offset": np.array([12, 3]),
        "softcap": 3.0,
        "alibi_slopes": SLOPES,
        "sinks": SINKS,
        "scale": 0.5,
    },
]


def largest_added(keywords):
    """Return the largest magnitude that keywords add to a score."""
    bias = np.asarray(keywords.get("bias", 0.0))
    distance = LQ + LK + np.abs(keywords.get("query_offset", 0)).max()
    slope = np.abs(keywords.get("alibi_slopes", 0)).max()
    sink = np.abs(keywords.get("sinks", 0)).max()
    return np.abs(bias[np.isfinite(bias)]).max() + slope * distance + sink


def name_of(keywords):
    return "+".join(keywords) or "plain"


class TestKeywords:
    @pytest.mark.parametrize("keywords", KEYWORDS, ids=name_of)
    def test_like_the_reference(self, keywords, rng):
        arrays, chunked = make(rng)
        results = attention(*chunked, return_lse=True, **keywords)
        assert_like_reference(results, arrays, added=largest_added(keywords), **keywords)

    @pytest.mark.parametrize("chunks", [-1, 5, (2, 4, 3, 8)], ids=str)
    @pytest.mark.parametrize("name", ["mask", "bias"])
    def test_terms_in_chunks_of_their_own(self, name, chunks, rng):
        arrays, chunked = make(rng)
        term = {"mask": MASK, "bias": BIAS}[name]
        results = attention(*chunked, return_lse=True, **{name: da.from_array(term, chunks)})
        assert_like_reference(results, arrays, added=largest_added({name: term}), **{name: term})

    @pytest.mark.parametrize("causal", [False, True])
    def test_layout(self, causal, rng):
        arrays, chunked = make(rng)
        arrays = [np.swapaxes(x, -3, -2) for x in arrays]
        chunked = [x.swapaxes(-3, -2) for x in chunked]
        keywords = {"layout": "blhd", "causal": causal, "mask": MASK}
        output, lse = attention(*chunked, return_lse=True, **keywords)
        assert output.shape == (B, LQ, HQ, D)
        assert lse.shape == (B, HQ, LQ)
        assert_like_reference((output, lse), arrays, **keywords)

    def test_numbers_in_dask_arrays(self, rng):
        arrays, chunked = make(rng)
        results = attention(*chunked, kv_lengths=da.from_array(LENGTHS), return_lse=True)
        assert_like_reference(results, arrays, kv_lengths=LENGTHS)

    def test_output_alone(self, rng):
        _, chunked = make(rng)
        output = attention(*chunked)
        assert isinstance(output, da.Array)
        assert_same_bits(output.compute(), attention(*chunked, return_lse=True)[0].compute())


class TestChunks:
    @given(st.data())
    def test_any_chunks(self, data):
        """Any head counts, lengths and chunks, with the keywords that depend on positions."""

        def cut(length):
            points = data.draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=4))
            ends = [0, *sorted(n for n in points if n < length), length]
            return tuple(int(n) for n in np.diff(ends))

        batch, kv_heads, group_size = (data.draw(st.integers(1, 3)) for _ in range(3))
        seqlen_q, seqlen_kv = (data.draw(st.integers(1, 12)) for _ in range(2))
        arrays = make_inputs(
            np.random.default_rng(0),
            batch=(batch,),
            heads=kv_heads * group_size,
            kv_heads=kv_heads,
            seqlen_q=seqlen_q,
            seqlen_kv=seqlen_kv,
            head_dim=3,
            head_dim_v=5,
            dtype=np.float64,
        )
        chunked = [da.from_array(x, (*map(cut, x.shape[:-1]), x.shape[-1])) for x in arrays]
        keywords = {
            "causal": data.draw(st.sampled_from([False, True, "top_left"])),
            "window": data.draw(st.sampled_from([None, (2, 1), (None, 3), (4, None)])),
            "query_offset": data.draw(st.none() | st.integers(-15, 15)),
            "kv_lengths": data.draw(st.none() | st.integers(0, seqlen_kv)),
        }
        results = attention(*chunked, return_lse=True, **keywords)
        assert_like_reference(results, arrays, **keywords)

    @pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 6, 12])
    @pytest.mark.parametrize("heads", [(12,), (1,) * 12, (5, 7), (4, 1, 6, 1)], ids=str)
    def test_heads(self, kv_heads, heads, rng):
        query, key, value = arrays = make_inputs(
            rng, heads=12, kv_heads=kv_heads, dtype=np.float64, head_dim=3
        )
        cut = (kv_heads,) if kv_heads < 3 else (kv_heads - 2, 2)
        chunked = (
            da.from_array(query, (1, heads, 3, 3)),
            da.from_array(key, (2, cut, 4, 3)),
            da.from_array(value, (2, kv_heads, 3, 3)),
        )
        sinks = np.linspace(-1, 1, 12)
        results = attention(*chunked, sinks=sinks, return_lse=True)
        assert_like_reference(results, arrays, added=1, sinks=sinks)

    def test_of_the_result_are_those_of_the_query(self, rng):
        _, (query, key, value) = make(rng)
        output, lse = attention(query, key, value, return_lse=True)
        # Heads 2 and 4 are where value begins a chunk, or where query divides a group.
        assert output.chunks == ((1, 1), (1, 1, 2, 2), (5, 1, 7), (D,))
        assert lse.chunks == output.chunks[:-1]
        whole = attention(query.rechunk({1: 6}), key, value.rechunk({1: 3}))
        assert whole.chunks == ((1, 1), (6,), (5, 1, 7), (D,))

    def test_never_in_one_piece(self, rng, monkeypatch):
        """No task sees more than one chunk of anything, nor of the mask more than belongs there."""
        _, chunked = make(rng)
        seen = []

        def recorded(query, key, value, **keywords):
            seen.append((query.shape, key.shape, value.shape, keywords["mask"].shape))
            return reference.attention(query, key, value, **keywords)

        monkeypatch.setattr(fastattn, "attention", recorded)
        attention(*chunked, mask=da.from_array(MASK, -1)).compute()
        largest = [max(shape[n][axis] for shape in seen) for n in range(3) for axis in range(4)]
        chunks = [max(sizes) for name in CHUNKS for sizes in CHUNKS[name]]
        assert all(n <= chunk for n, chunk in zip(largest, chunks, strict=True))
        assert all(mask[-2:] == (q[-2], k[-2]) for q, k, _, mask in seen)
        assert max(mask[-2] * mask[-1] for *_, mask in seen) < LQ * LK / 2

    @pytest.mark.parametrize("cut", ["query", "key", "value", ""])
    def test_numpy_among_them(self, cut, rng):
        arrays, chunked = make(rng)
        mixed = [
            x if name == cut else array
            for name, x, array in zip(CHUNKS, chunked, arrays, strict=True)
        ]
        assert_like_reference(attention(*mixed, return_lse=True), arrays)

    @pytest.mark.parametrize(
        ("query_batch", "key_batch", "value_batch"),
        [((), (), ()), ((3, 2), (2,), (1, 1)), ((1, 2), (3, 1), ()), ((2, 1, 2), (2,), (3, 1))],
        ids=str,
    )
    def test_batch_axes_broadcast(self, query_batch, key_batch, value_batch, rng):
        arrays = [
            rng.standard_normal((*batch, *shape))
            for batch, shape in (
                (query_batch, (4, 5, 3)),
                (key_batch, (2, 7, 3)),
                (value_batch, (2, 7, 6)),
            )
        ]
        batch = np.broadcast_shapes(query_batch, key_batch, value_batch)
        keywords = {
            "kv_lengths": rng.integers(0, 8, batch),
            "alibi_slopes": rng.random((*batch, 4)),
            "mask": rng.random((*batch[-1:], 1, 5, 7)) > 0.3,
            "causal": True,
        }
        chunked = [da.from_array(x, (*(1,) * (x.ndim - 3), 2, 2, -1)) for x in arrays]
        results = attention(*chunked, return_lse=True, **keywords)
        assert_like_reference(results, arrays, added=12, **keywords)

    def test_one_head_without_an_axis(self, rng):
        arrays = [x[0, 0] for x in make_inputs(rng, dtype=np.float64)]
        chunked = [da.from_array(x, (2, -1)) for x in arrays]
        keywords = {"causal": True, "sinks": [0.5]}
        results = attention(*chunked, return_lse=True, **keywords)
        assert [x.shape for x in results] == [(5, 20), (5,)]
        assert_like_reference(results, arrays, added=1, **keywords)

    @pytest.mark.parametrize("empty", ["batch", "heads", "seqlen_q", "seqlen_kv"])
    def test_empty(self, empty, rng):
        size = {"batch": (0,)} if empty == "batch" else {empty: 0}
        arrays = make_inputs(rng, dtype=np.float16, **size)
        chunked = [da.from_array(x) for x in arrays]
        for sinks in (None, np.ones(arrays[0].shape[1])):
            results = dask.compute(*attention(*chunked, sinks=sinks, return_lse=True))
            expected = fastattn.attention(*arrays, sinks=sinks, return_lse=True)
            for ours, theirs in zip(results, expected, strict=True):
                assert_same_bits(ours, theirs)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=str)
    def test_as_accurate_as_in_one_piece(self, dtype, rng):
        """Outputs of 16 bits are rounded once in each part, and once when all are merged."""
        arrays, chunked = make(rng, dtype=dtype)
        keywords = {"mask": MASK, "causal": True}
        results = dask.compute(*attention(*chunked, return_lse=True, **keywords))
        assert_accurate(results, *arrays, **keywords)

    @pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=str)
    def test_merged_in_32_bits(self, dtype, rng, monkeypatch):
        merged = []

        def recorded(outputs, lses):
            merged.extend([*outputs, *lses])
            return reference.merge_states(outputs, lses)

        monkeypatch.setattr(fastattn, "merge_states", recorded)
        _, chunked = make(rng, dtype=dtype)
        assert attention(*chunked).compute().dtype == dtype
        assert {x.dtype for x in merged} == {np.dtype(np.float32)}

    @pytest.mark.parametrize(
        ("dtypes", "result"),
        [
            (("i4", "u1", "?"), np.float64),
            (("f4", "f2", "i1"), np.float32),
            ((">f4", "f4", ">f4"), np.float32),
            (("f4", "f8", "f4"), np.float64),
        ],
        ids=str,
    )
    def test_promotion(self, dtypes, result, rng):
        arrays, _ = make(rng)
        arrays = [(3 * x).astype(t) for x, t in zip(arrays, dtypes, strict=True)]
        chunked = [da.from_array(x, c) for x, c in zip(arrays, CHUNKS.values(), strict=True)]
        output = attention(*chunked, bias=np.arange(LK))
        assert output.dtype == output.compute().dtype == result
        arrays = [np.asarray(x, x.dtype.newbyteorder("=")) for x in arrays]
        assert_within(
            output.compute(),
            reference.attention(*(x.astype(np.float64) for x in arrays), bias=np.arange(LK)),
            result,
            2 * rounding_bound(*(x.astype(result) for x in arrays), bias=LK),
        )


def unreadable(x, block_info=None):
    raise AssertionError("this chunk must not be read")


def readable_until(x, stop):
    """Return x with chunks along axis -2 that begin at `stop` or later being unreadable."""
    return da.concatenate([x[:, :, :stop], x[:, :, stop:].map_blocks(unreadable, dtype=x.dtype)], 2)


class TestHidden:
    @pytest.mark.parametrize(
        ("keywords", "expected"),
        [
            ({}, 4 * 4),
            ({"causal": True}, 1 + 2 + 3 + 4),
            ({"causal": "top_left"}, 1 + 2 + 3 + 4),
            ({"causal": True, "query_offset": -5}, 1 + 1 + 2 + 3),
            ({"causal": True, "query_offset": -100}, 4),
            ({"causal": True, "query_offset": 100}, 4 * 4),
            ({"causal": True, "window": (0, None)}, 4),
            ({"causal": True, "window": (1, None)}, 1 + 2 + 2 + 2),
            ({"window": (1, 1)}, 2 + 3 + 3 + 2),
            ({"window": (4, 0)}, 1 + 2 + 2 + 2),
            ({"window": (5, 0)}, 1 + 2 + 3 + 3),
            ({"kv_lengths": 5}, 4 * 2),
            ({"kv_lengths": 4}, 4 * 1),
            ({"kv_lengths": 0}, 4),
            ({"kv_lengths": [0, 9]}, 4 * 3),
            ({"kv_lengths": [4, 16], "causal": "top_left"}, 1 + 2 + 3 + 4),
            ({"kv_lengths": [4, 16], "causal": True, "window": (0, 0)}, 1 + 1 + 1 + 2),
        ],
        ids=str,
    )
    def test_makes_no_task(self, keywords, expected, rng):
        """Four chunks of queries by four of keys; a chunk of queries that sees none has one."""
        arrays = make_inputs(rng, seqlen_q=16, seqlen_kv=16, dtype=np.float64)
        chunked = [da.from_array(x, (2, 3, 4, 20)) for x in arrays]
        results = attention(*chunked, return_lse=True, **keywords)
        assert parts(*results) == expected
        assert_like_reference(results, arrays, **keywords)

    @pytest.mark.parametrize(
        "keywords",
        [{"kv_lengths": 8}, {"causal": "top_left", "query_offset": -8}, {"window": (2, 0)}],
        ids=name_of,
    )
    def test_is_not_read(self, keywords, rng):
        arrays = make_inputs(rng, seqlen_q=16, seqlen_kv=16, dtype=np.float64)
        if "window" in keywords:
            keywords = keywords | {"query_offset": -8}
        query, key, value = (da.from_array(x, (2, 3, 4, 20)) for x in arrays)
        key, value = readable_until(key, 8), readable_until(value, 8)
        assert_like_reference(
            attention(query, key, value, return_lse=True, **keywords), arrays, **keywords
        )

    def test_is_not_read_for_the_rows_that_are_asked_for(self, rng):
        arrays = make_inputs(rng, seqlen_q=16, seqlen_kv=16, dtype=np.float64)
        query, key, value = (da.from_array(x, (2, 3, 4, 20)) for x in arrays)
        output = attention(query, readable_until(key, 4), readable_until(value, 4), causal=True)
        expected = reference.attention(*arrays, causal=True)[:, :, :4]
        bound = 2 * rounding_bound(*arrays)
        assert_within(output[:, :, :4].compute(), expected, np.float64, bound)
        with pytest.raises(AssertionError, match="must not be read"):
            output[:, :, :5].compute()

    @pytest.mark.parametrize("sinks", [None, SINKS], ids=["no sinks", "sinks"])
    def test_rows_that_see_nothing(self, sinks, rng):
        """A whole chunk of queries, and some rows of the next: exactly 0, and -inf or the sink."""
        _, chunked = make(rng)
        keywords = {"causal": True, "query_offset": -8, "sinks": sinks}
        output, lse = dask.compute(*attention(*chunked, return_lse=True, **keywords))
        assert not output[:, :, :8].any()
        nothing = np.full(HQ, -np.inf) if sinks is None else sinks
        np.testing.assert_array_equal(lse[:, :, :8], np.broadcast_to(nothing[:, None], (2, HQ, 8)))
        assert np.isfinite(output).all()
        assert np.isfinite(lse[:, :, 8:]).all()

    def test_nan_stays_hidden(self, rng):
        (query, key, value), _ = make(rng)
        key[:, :, 20:], value[:, :, 20:] = np.nan, np.inf
        key[0, :, 10:] = np.nan
        keywords = {"kv_lengths": [10, 20]}
        chunked = [
            da.from_array(x, c) for x, c in zip((query, key, value), CHUNKS.values(), strict=True)
        ]
        output, lse = dask.compute(*attention(*chunked, return_lse=True, **keywords))
        assert np.isfinite(output).all()
        assert np.isfinite(lse).all()
        assert np.isnan(attention(*chunked).compute()).any()


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"query": 1}, TypeError, "query must be float16, .*: got object"),
            ({"query": 2}, ValueError, r"features in one chunk.*rechunk.*got chunks of \(10, 10\)"),
            ({"value": 2}, ValueError, "value must have its features in one chunk"),
            ({"key": 3}, ValueError, "key must have chunks of known sizes.*compute_chunk_sizes"),
            ({"key": 4}, ValueError, r"key.shape\[-1\] must equal query.shape\[-1\]: got 7 and 20"),
            ({"mask": MASK.astype(int)}, TypeError, "mask must be bool"),
            ({"mask": da.ones((LQ, LK + 1), dtype=bool)}, ValueError, "mask must broadcast"),
            ({"bias": da.from_array(MASK)}, TypeError, "bool array is a mask"),
            ({"causal": "upper"}, ValueError, "causal must be"),
            ({"window": (-1, 0)}, ValueError, "window must be whole numbers from 0"),
            ({"query_offset": 0.5}, TypeError, "query_offset"),
            ({"kv_lengths": LK + 1}, ValueError, "kv_lengths must lie between 0 and 29"),
            ({"softcap": 0.0}, ValueError, "softcap must be above 0"),
            ({"alibi_slopes": np.ones(HQ + 1)}, ValueError, "alibi_slopes"),
            ({"sinks": np.ones(HQ + 1)}, ValueError, "sinks"),
            ({"scale": np.nan}, ValueError, "scale must be finite"),
            ({"layout": "lbhd"}, ValueError, "layout must be"),
            ({"score_mod": max}, TypeError, "score_mod cannot be used.*: give a bias"),
            ({"mask_mod": max}, TypeError, "mask_mod cannot be used.*: give a mask"),
            ({"block_mask": MASK}, TypeError, "block_mask cannot be used.*: give a mask"),
            ({"out": MASK}, TypeError, "out cannot be used.*dask.array.store"),
            ({"dropout": 0.1}, TypeError, "unexpected keyword argument 'dropout'"),
        ],
        ids=lambda change: name_of(change) if isinstance(change, dict) else "",
    )
    def test_before_anything_is_computed(self, change, error, message, rng):
        _, chunked = make(rng)
        call = {
            name: x.map_blocks(unreadable, dtype=x.dtype)
            for name, x in zip(CHUNKS, chunked, strict=True)
        }
        name, way = next(iter(change.items()))
        if name in call:
            x = call[name]
            changed = {
                1: lambda: x.astype(object),
                2: lambda: x.rechunk({-1: 10}),
                3: lambda: x[:, :, x[0, 0, :, 0] > 0],
                4: lambda: x[..., :7],
            }
            call[name] = changed[way]()
        else:
            call |= change
        with pytest.raises(error, match=message):
            attention(call.pop("query"), call.pop("key"), call.pop("value"), **call)

    def test_keywords_of_none_are_none(self, rng):
        _, chunked = make(rng)
        nothing = dict.fromkeys(["score_mod", "mask_mod", "block_mask", "out"])
        assert attention(*chunked, **nothing).name == attention(*chunked).name

    def test_without_dask(self):
        code = "import sys; sys.modules['dask'] = None; import fastattn.integrations.dask"
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert run.returncode == 1
        assert "pip install 'fastattn[dask]'" in run.stderr.splitlines()[-1]


class TestGraph:
    def test_of_arrays_beyond_memory(self):
        """Describing a call takes the memory of its graph: some kB for a terabyte."""
        length, chunk = 1 << 28, 1 << 26
        query, key, value = (
            da.zeros((1, 8, length, 64), dtype=dtype, chunks=(1, 8, chunk, 64))
            for dtype in (np.float32, np.int64, np.float16)
        )
        tracemalloc.start()
        bias = da.zeros(length, dtype=np.int8, chunks=chunk)
        output = attention(query, key, value, causal=True, bias=bias)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert output.dtype == np.float64
        assert output.nbytes == 8 * length * 64 * 8
        assert parts(output) == 1 + 2 + 3 + 4
        assert peak < 1_000_000

    def test_names_say_what_is_computed(self, rng):
        _, chunked = make(rng)
        assert attention(*chunked, sinks=SINKS).name == attention(*chunked, sinks=SINKS + 0).name
        names = {attention(*chunked, **keywords).name for keywords in KEYWORDS}
        assert len(names) == len(KEYWORDS)

    def test_bits_depend_on_the_chunks_alone(self, rng):
        _, chunked = make(rng, dtype=np.float32)
        output = attention(*chunked, causal=True)
        in_order = output.compute(scheduler="sync")
        for _ in range(3):
            assert_same_bits(output.compute(scheduler="threads"), in_order)

    def test_progress(self, rng):
        _, chunked = make(rng)
        shown = StringIO()
        with ProgressBar(out=shown, dt=0.01):
            attention(*chunked).compute()
        assert "100% Completed" in shown.getvalue()


class TestThreads:
    @pytest.fixture
    def threads(self, monkeypatch):
        """Return the numbers of threads that the library may use in each task."""
        used = []

        def recorded(query, key, value, **keywords):
            used.append(runtime.usable_threads())
            return reference.attention(query, key, value, **keywords)

        monkeypatch.setattr(fastattn, "attention", recorded)
        monkeypatch.setattr(runtime, "_most_threads", lambda: 8)
        monkeypatch.setattr(runtime, "_threads", None)
        return used

    def test_one_for_each_task(self, threads, rng):
        _, chunked = make(rng)
        attention(*chunked).compute()
        assert set(threads) == {1}
        assert runtime.usable_threads() == 8

    def test_as_many_as_are_set(self, threads, rng):
        _, chunked = make(rng)
        fastattn.set_num_threads(3)
        attention(*chunked).compute()
        assert set(threads) == {3}


# ---------------------------------------------------------------------------
# A cluster of processes
# ---------------------------------------------------------------------------

LIMIT = 384 << 20  # bytes of each of two workers, of which Python and Numba take half
LENGTH, CHUNK, FEATURES = 25 << 16, 1 << 16, 64  # 800 MiB of keys and values in float32


def draw(which, block_info=None):
    """Return a chunk of keys (0) or values (1), which exists nowhere else."""
    return draw_chunk(which, block_info[None]["chunk-location"][2])


def draw_chunk(which, n):
    rng = np.random.default_rng([which, n])
    return rng.random((1, 1, CHUNK, FEATURES), dtype=np.float32) - np.float32(0.5)


def drawn_context(function, **keywords):
    """Return keys and values of the whole context, as chunks that workers draw."""
    chunks = ((1,), (1,), (CHUNK,) * (LENGTH // CHUNK), (FEATURES,))
    return [
        da.map_blocks(function, which, chunks=chunks, dtype=np.float32, meta=EMPTY, **keywords)
        for which in range(2)
    ]


EMPTY = np.empty((0, 0, 0, 0), np.float32)


def draw_or_die(which, fatal, block_info=None):
    """Draw a chunk; the first process to draw the last but three dies of it."""
    if block_info[None]["chunk-location"][2] == LENGTH // CHUNK - 3:
        try:
            Path(fatal).touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return draw(which, block_info)


@pytest.fixture(scope="module")
def client():
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            memory_limit=LIMIT,
            dashboard_address=None,
            silence_logs=50,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def expected():
    """Return (query, the truth, the naive code's error), chunk by chunk as nothing else fits."""
    query = 8 * (np.random.default_rng(5).random((2, FEATURES), dtype=np.float32) - 0.5)
    # Without BLAS, whose threads wait for each other where other processes have the cores.
    dot = partial(np.einsum, "id,dj->ij")
    exact, rounded = [], []
    for n in range(LENGTH // CHUNK):
        arrays = [query, *(draw_chunk(which, n)[0, 0] for which in range(2))]
        rounded.append(naive(*arrays, dot=dot))
        exact.append(naive(*(x.astype(np.float64) for x in arrays), dot=dot))
    truth, theirs = (
        reference.merge_states(*zip(*states, strict=True))[0] for states in (exact, rounded)
    )
    return query[None, None], truth[None, None], largest_error(theirs, truth)


class TestCluster:
    def check(self, client, function, expected, **keywords):
        query, truth, error = expected
        key, value = drawn_context(function, **keywords)
        assert key.nbytes + value.nbytes > 2 * LIMIT
        output = attention(query, key, value)
        result = client.compute(output).result(timeout=50)
        assert_within(result, truth, np.float32, 4 * error + rounding(result.dtype))

    def test_memory_is_smaller_than_the_arrays(self, client, expected):
        pids = client.run(os.getpid)
        self.check(client, draw, expected)
        assert client.run(os.getpid) == pids, "a worker was restarted, for too much memory"

    def test_threads_of_every_task(self, client):
        client.run(fastattn.set_num_threads, 1)
        assert set(client.run(fastattn.get_num_threads).values()) == {1}

    def test_a_killed_worker_is_survived(self, client, expected, tmp_path):
        fatal = tmp_path / "fatal"
        pids = set(client.run(os.getpid).values())
        self.check(client, draw_or_die, expected, fatal=str(fatal))
        assert fatal.exists()
        client.wait_for_workers(2, timeout=20)
        assert set(client.run(os.getpid).values()) != pids


# ---------------------------------------------------------------------------
# The example
# ---------------------------------------------------------------------------

EXAMPLE = Path(__file__).parents[1] / "examples" / "million_tokens.py"


class TestExample:
    def test_as_a_program(self):
        shape = {"context": 5000, "chunk": 999, "queries": 16, "heads": 4, "head-dim": 8}
        options = [f"--{name}={n}" for name, n in shape.items()]
        run = subprocess.run(
            [sys.executable, EXAMPLE, "--check", *options],
            capture_output=True,
            text=True,
            check=True,
        )
        lines = run.stdout.splitlines()
        assert lines[0] == (
            "5,000 keys and values: 625.00 kiB in 6 chunks, for 2 workers of 384.00 MiB"
        )
        assert "100% Completed" in run.stdout
        (checked,) = (line for line in lines if line.startswith("last row"))
        assert float(checked.split()[2]) < 1e-7
        assert any(line.startswith("(1, 4, 16, 8) in ") for line in lines)
        assert "16 queries of 5,000 keys: 1.0e+07 flops" in lines
        assert "5,000 queries of 5,000 keys: 1.6e+09 flops" in lines
        assert len([line for line in lines if line.startswith("   64 x")]) == 2

    def test_counts(self):
        """The flops are those of the visible keys, the bytes those of the arrays."""
        spec = importlib.util.spec_from_file_location("million_tokens", EXAMPLE)
        example = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(example)
        context = example.Context(queries=5, length=9, heads=4, kv_heads=2, head_dim=8)
        visible = np.tri(5, 9, 4).sum()
        assert context.flops == 4 * visible * (2 * 8 + 2 * 8)
        key, value = (example.lazy(seed, context, 2) for seed in (1, 2))
        assert context.kv_bytes == key.nbytes + value.nbytes
        assert key.chunks == ((1,), (2,), (2, 2, 2, 2, 1), (8,))
        assert not np.array_equal(key.compute(), value.compute())
        assert len(np.unique(key.compute())) == key.size
