"""Caches against recomputation: whatever happened to one, it attends to the tokens it keeps."""

import io
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from checks import (
    BFLOAT16,
    FLOAT_DTYPES,
    assert_accurate,
    assert_same_bits,
    assert_within,
    rounding_bound,
    to_float64,
)
from fastattn.kernels.record import CHUNK
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numba import njit

import fastattn
from fastattn import KVCache, PagedKVCache, create_block_mask, plan, runtime

INT8 = np.dtype(np.int8)
STORAGES = [*FLOAT_DTYPES, INT8]
HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM_V = 4, 2, 32, 16

# The largest error that a storage adds, as a share of the range of the output. Half a unit in the
# last place of each value is within it, and so is what moved scores do to the weights.
ROUNDING = {"float64": 1e-6, "float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2, "int8": 1e-2}


def tokens(rng, *shape, head_dim=HEAD_DIM, head_dim_v=HEAD_DIM_V):
    """Return normal keys and values, float32."""
    return tuple(rng.standard_normal((*shape, n), dtype=np.float32) for n in (head_dim, head_dim_v))


def assert_close(result, expected, dtype, times=1):
    """Assert that a result is within what a storage costs."""
    result, expected = to_float64(np.asarray(result)), to_float64(np.asarray(expected))
    assert result.shape == expected.shape
    assert np.isfinite(result).all()
    allowed = times * ROUNDING[np.dtype(dtype).name] * max(np.ptp(expected), 1e-3)
    assert np.abs(result - expected).max(initial=0) <= allowed


def unchanged(cache):
    """Return all that a cache holds, as bytes."""
    return [x.tobytes() for x in cache._storage.arrays], cache.lengths.tobytes()


@njit
def fading(score, b, h, i, j):
    return 0.7 * score + 0.01 * (i - j) - 0.3 * h + 0.1 * b


@njit
def scattered(b, h, i, j):
    return (3 * i + 7 * j + h + 2 * b) % 5 > 1


def keywords_for(rng, batch, seqlen_q, seqlen_kv):
    """Return keywords of attention by name: each alone, and all that go together."""
    visible = rng.random((seqlen_q, seqlen_kv)) < 0.7
    bias = rng.standard_normal((HEADS, seqlen_q, seqlen_kv)).astype(np.float32)
    each = {
        "mask": {"mask": visible},
        "bias": {"bias": np.where(visible, bias, -np.inf)},
        "causal": {"causal": True},
        "top_left": {"causal": "top_left"},
        "window": {"window": (20, 3)},
        "query_offset": {"causal": True, "query_offset": rng.integers(0, 9, batch)},
        "softcap": {"softcap": 1.5},
        "alibi_slopes": {"alibi_slopes": rng.random((batch, HEADS))},
        "sinks": {"sinks": rng.standard_normal(HEADS)},
        "scale": {"scale": -0.3},
        "score_mod": {"score_mod": fading},
        "mask_mod": {"mask_mod": scattered},
        "precision": {"precision": "bf16"},
    }
    everything = {name: x for part in each.values() for name, x in part.items()}
    return each | {"everything": everything | {"causal": "bottom_right"}}


KEYWORDS = list(keywords_for(np.random.default_rng(0), 1, 1, 1))


def dequantised(x, scale):
    """Return rows as a cache keeps them, as floats."""
    return x if scale is None else x * scale[..., None]


class TestKeywords:
    """Every keyword with every storage, against the reference over what the storage holds."""

    @pytest.mark.parametrize("dtype", STORAGES, ids=str)
    @pytest.mark.parametrize("lengths", [(1, CHUNK + 60), (3, 70), (20, 70)], ids=str)
    @pytest.mark.parametrize("name", [*KEYWORDS, "block_mask", "layout", "out"])
    def test_buffers(self, dtype, lengths, name, rng):
        seqlen_q, seqlen_kv = lengths
        cache = KVCache(2, KV_HEADS, HEAD_DIM, 700, head_dim_v=HEAD_DIM_V, dtype=dtype)
        cache.append(*tokens(rng, 2, KV_HEADS, seqlen_kv), lengths=[seqlen_kv, seqlen_kv - 30])
        query = rng.standard_normal((2, HEADS, seqlen_q, HEAD_DIM))
        query = query.astype(np.float32 if dtype == INT8 else dtype)
        storage = cache._storage
        key = dequantised(storage.key, storage.key_scale)[:, :, :seqlen_kv]
        value = dequantised(storage.value, storage.value_scale)[:, :, :seqlen_kv]
        if name == "block_mask":
            keywords = {name: create_block_mask(scattered, 2, HEADS, seqlen_q, seqlen_kv, 48)}
        elif name == "layout":
            keywords = {name: "blhd"}
            query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        elif name == "out":
            keywords = {}
            out = np.full((2, HEADS, seqlen_q, 2 * HEAD_DIM_V), 9, query.dtype)[..., ::2]
            assert cache.attend(query, out=out) is out
            assert_accurate(out, query, key, value, kv_lengths=cache.lengths)
        else:
            keywords = keywords_for(rng, 2, seqlen_q, seqlen_kv)[name]
        # The second call may go another way than the first.
        for _ in range(2):
            result = cache.attend(query, return_lse=True, **keywords)
            assert_accurate(result, query, key, value, kv_lengths=cache.lengths, **keywords)
        assert_same_bits(cache.attend(query, **keywords), result[0])

    @pytest.mark.parametrize("dtype", STORAGES, ids=str)
    @pytest.mark.parametrize("page_size", [64, 48])
    @pytest.mark.parametrize("name", KEYWORDS)
    def test_pages(self, dtype, page_size, name, rng):
        lengths, queries = [CHUNK + 60, 3, 70, 90, 0], [1, 3, 20, 0, 2]
        cache = PagedKVCache(20, page_size, KV_HEADS, HEAD_DIM, head_dim_v=HEAD_DIM_V, dtype=dtype)
        ids = [cache.add() for _ in lengths]
        cache.append(ids, *tokens(rng, sum(lengths), KV_HEADS), np.cumsum([0, *lengths]))
        # Of every second feature: nothing relies on how queries lie.
        query = rng.standard_normal((sum(queries), HEADS, 2 * HEAD_DIM)).astype(np.float32)
        query = query.astype(np.float32 if dtype == INT8 else dtype)[..., ::2]
        keywords = keywords_for(rng, len(ids), sum(queries), max(lengths))[name]
        starts = np.cumsum([0, *queries])
        output, lse = cache.attend(query, ids, starts, return_lse=True, **keywords)
        out = np.empty_like(output)
        assert cache.attend(query, ids, starts, out=out, **keywords) is out
        assert_same_bits(out, output)
        for n, each in enumerate(ids):
            mine = slice(*starts[n : n + 2])
            kept = self.kept(cache, each)
            own = self.keywords_of_one(keywords, n, mine, lengths[n])
            truth, truth_lse = fastattn.reference.attention(
                *map(to_float64, (query[mine].swapaxes(0, 1), *kept)), return_lse=True, **own
            )
            bound = (
                rounding_bound(
                    *(query[mine].swapaxes(0, 1), *kept),
                    bias=5.0,  # more than any of the keywords add to a score
                    scale=own.get("scale"),
                )
                if lengths[n] and queries[n]
                else 0.0
            )
            assert_within(output[mine].swapaxes(0, 1), truth, output.dtype, bound)
            assert_within(lse[:, mine], truth_lse, lse.dtype, 1e-5)

    def kept(self, cache, each):
        """Return key and value of a sequence, (heads, tokens, features)."""
        storage, length = cache._storage, cache._lengths[each]
        parts = (
            (storage.key, storage.key_scale),
            (storage.value, storage.value_scale),
        )
        return [
            np.concatenate(
                [np.zeros((KV_HEADS, 0, x.shape[-1]), x.dtype)]
                + [dequantised(x, scale)[page] for page in table],
                axis=1,
            )[:, :length]
            for (x, scale), table in ((part, cache._tables[each]) for part in parts)
        ]

    def keywords_of_one(self, keywords, n, rows, length):
        """Return the keywords for one sequence of a call."""
        own = dict(keywords)
        for name in ("mask", "bias"):
            if name in own:
                own[name] = own[name][..., rows, :length]
        for name in ("alibi_slopes", "query_offset"):
            if name in own:
                own[name] = own[name][n]
        if "score_mod" in own:
            own["score_mod"] = lambda score, b, h, i, j: fading.py_func(score, b + n, h, i, j)
        if "mask_mod" in own:
            own["mask_mod"] = lambda b, h, i, j: scattered.py_func(b + n, h, i, j)
        return own

    def test_a_window_is_narrowed(self, rng):
        cache = KVCache(1, KV_HEADS, HEAD_DIM, 40, head_dim_v=HEAD_DIM_V, window=20)
        key, value = tokens(rng, 1, KV_HEADS, 30)
        cache.append(key, value)
        query = rng.standard_normal((1, HEADS, 2, HEAD_DIM), dtype=np.float32)
        for given, left in ((None, 19), ((5, 7), 5), ((30, 0), 19), ((None, 2), 19)):
            expected = {"causal": True, "window": (left, 0)}
            assert_accurate(cache.attend(query, window=given), query, key, value, **expected)

    @pytest.mark.parametrize("keywords", [{"causal": "top_left"}, {"query_offset": 0}])
    def test_queries_of_a_window_are_the_last_tokens(self, keywords):
        cache = KVCache(1, 1, 8, 40, window=20)
        with pytest.raises(ValueError, match="whose queries are the last tokens"):
            cache.attend(np.zeros((1, 1, 1, 8), np.float32), **keywords)

    @pytest.mark.parametrize(
        ("keywords", "error", "message"),
        [
            ({"kv_lengths": 3}, TypeError, "unexpected keyword argument 'kv_lengths': the cache"),
            ({"mask_name": "m"}, TypeError, r"unexpected keyword argument 'mask_name'$"),
            ({"mask": np.ones((1, 6), bool)}, ValueError, "mask must broadcast"),
            ({"mask": np.ones((1, 5))}, TypeError, "mask must be bool"),
            ({"bias": np.ones((1, 5), bool)}, TypeError, "bias must be"),
            ({"window": (-1, 0)}, ValueError, "window must be whole"),
            ({"window": 3}, TypeError, "window must be a pair"),
            ({"window": ([], 0)}, TypeError, "window must be ints"),
            ({"softcap": 0}, ValueError, "softcap must be above 0"),
            ({"softcap": [1.0, 2.0]}, TypeError, "softcap must be a real"),
            ({"alibi_slopes": np.ones(3)}, ValueError, "alibi_slopes must have shape"),
            ({"sinks": np.ones(3)}, ValueError, "sinks must have shape"),
            ({"score_mod": lambda score: score}, TypeError, "score_mod must take"),
            ({"mask_mod": 3}, TypeError, "mask_mod must be a function"),
            ({"precision": "low"}, ValueError, "precision must be"),
            ({"out": np.ones((1, 1, 1, 9), np.float32)}, ValueError, "out must have the result"),
            ({"out": np.ones((1, 1, 1, 8))}, TypeError, "out must have the result's dtype"),
        ],
    )
    def test_what_has_no_meaning(self, keywords, error, message):
        cache = KVCache(1, 1, 8, 5)
        pages = PagedKVCache(3, 2, 1, 8)
        rows = np.ones((5, 1, 8), np.float32)
        cache.append(*[rows.swapaxes(0, 1)[None]] * 2)
        pages.append([pages.add()], rows, rows, [0, 5])
        with pytest.raises(error, match=message):
            cache.attend(np.zeros((1, 1, 1, 8), np.float32), **keywords)
        keywords = {name: x[0] if name == "out" else x for name, x in keywords.items()}
        with pytest.raises(error, match=message):
            pages.attend(np.zeros((1, 1, 8), np.float32), [0], **keywords)


class TestSharedPrefix:
    """Sequences that share pages: bits are those of sequences that do not."""

    @pytest.mark.parametrize("dtype", STORAGES, ids=str)
    @pytest.mark.parametrize("page_size", [64, 48, 1024])
    @pytest.mark.parametrize("name", ["plain", "everything"])
    def test_bits(self, dtype, page_size, name, rng):
        prefix, own, queries = 2 * CHUNK + 300, [1, 40, CHUNK, 7], [1, 3, 1, 20]
        shape = (page_size, KV_HEADS, HEAD_DIM)
        shared = PagedKVCache(12000 // page_size, *shape, head_dim_v=HEAD_DIM_V, dtype=dtype)
        copied = PagedKVCache(12000 // page_size, *shape, head_dim_v=HEAD_DIM_V, dtype=dtype)
        rows = tokens(rng, prefix, KV_HEADS)
        prompt = shared.add()
        shared.append([prompt], *rows, [0, prefix])
        ids = [shared.add(share=prompt) for _ in own]
        others = [copied.add() for _ in own]
        copied.append(others, *(np.tile(x, (4, 1, 1)) for x in rows), np.arange(5) * prefix)
        rows = tokens(rng, sum(own), KV_HEADS)
        for cache, names in ((shared, ids), (copied, others)):
            cache.append(names, *rows, np.cumsum([0, *own]))
        query = rng.standard_normal((sum(queries), HEADS, HEAD_DIM), dtype=np.float32)
        if dtype.itemsize == 2:
            query = query.astype(dtype)
        starts = np.cumsum([0, *queries])
        keywords = {}
        if name != "plain":
            keywords = keywords_for(rng, 4, sum(queries), prefix + CHUNK)[name]
        ours = shared.attend(query, ids, starts, return_lse=True, **keywords)
        expected = copied.attend(query, others, starts, return_lse=True, **keywords)
        for mine, theirs in zip(ours, expected, strict=True):
            assert_same_bits(mine, theirs)

    def test_work(self, rng):
        # Sixteen kv heads, so that no core is short of work.
        cache = PagedKVCache(80, 64, 16, 8)
        prompt = cache.add()
        cache.append([prompt], *tokens(rng, 700, 16, head_dim=8, head_dim_v=8), [0, 700])
        ids = [cache.add(share=prompt) for _ in range(3)] + [cache.add()]
        cache.append(ids, *tokens(rng, 4 * 400, 16, head_dim=8, head_dim_v=8), np.arange(5) * 400)
        divisions = []
        with pytest.MonkeyPatch.context() as patch:
            real = plan.divide
            patch.setattr(
                "fastattn.run.divide",
                lambda *arguments: divisions.append(real(*arguments)) or divisions[-1],
            )
            cache.attend(np.zeros((4, 16, 8), np.float32), ids)
        ((found, many),) = divisions
        assert many is None
        together = [
            (chunk, *found.members[first:last, 0].tolist())
            for chunk, first, last in found.work.tolist()
        ]
        # Of the 512 keys of chunk 1, 188 are the prompt's.
        own = [(chunk, sequence) for chunk in (1, 2) for sequence in range(3)]
        assert sorted(together) == [(0, 0, 1, 2), (0, 3), *own]


def unchanged_pages(cache):
    """Return all that a cache of pages holds, as bytes."""
    held = [x.tobytes() for x in cache._storage.arrays]
    return held, repr(cache._lengths), repr(cache._free), repr(cache._users)


class TestKVCache:
    @pytest.mark.parametrize("dtype", STORAGES, ids=str)
    @pytest.mark.parametrize("seqlen_q", [1, 2, 40])
    @pytest.mark.parametrize("head_dim", [32, 20])
    def test_attend(self, dtype, seqlen_q, head_dim, rng):
        cache = KVCache(2, KV_HEADS, head_dim, 700, head_dim_v=HEAD_DIM_V, dtype=dtype)
        key, value = tokens(rng, 2, KV_HEADS, 600, head_dim=head_dim)
        cache.append(key[:, :, :10], value[:, :, :10])
        cache.append(key[:, :, 10:], value[:, :, 10:], lengths=[590, 500])
        assert cache.lengths.tolist() == [600, 510]
        query = rng.standard_normal((2, HEADS, seqlen_q, head_dim), dtype=np.float32)
        mask = rng.random((seqlen_q, 600)) < 0.7
        for keywords in ({}, {"causal": True}, {"scale": 0.1}, {"mask": mask}, {"causal": True}):
            output, lse = cache.attend(query, return_lse=True, **keywords)
            expected, expected_lse = fastattn.attention(
                query, key, value, kv_lengths=[600, 510], return_lse=True, **keywords
            )
            assert_close(output, expected, dtype)
            assert_close(lse, expected_lse, dtype, times=10)

    @pytest.mark.parametrize("dtype", STORAGES, ids=str)
    @pytest.mark.parametrize("seqlen_q", [1, 20])
    def test_keywords_are_those_of_attention(self, dtype, seqlen_q, rng):
        """Met by drawing calls at random: `attend` knew half of them."""
        cache = KVCache(2, KV_HEADS, HEAD_DIM, 100, head_dim_v=HEAD_DIM_V, dtype=dtype)
        key, value = tokens(rng, 2, KV_HEADS, 90)
        cache.append(key, value, lengths=[90, 70])
        query = rng.standard_normal((2, HEADS, seqlen_q, HEAD_DIM), dtype=np.float32)
        mask_mod = fastattn.masks.window(60, 0, 70)
        keywords = {
            "window": (50, 5),
            "softcap": 3.0,
            "alibi_slopes": rng.random((2, HEADS)),
            "sinks": rng.standard_normal(HEADS),
            "mask_mod": mask_mod,
            "block_mask": fastattn.create_block_mask(mask_mod, 1, 1, seqlen_q, 90, block_size=16),
        }
        for chosen in (*({name: x} for name, x in keywords.items()), keywords):
            expected = fastattn.attention(query, key, value, kv_lengths=[90, 70], **chosen)
            assert_close(cache.attend(query, **chosen), expected, dtype)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_bits_are_those_of_attention(self, dtype, rng):
        cache = KVCache(1, KV_HEADS, HEAD_DIM, 1000, head_dim_v=HEAD_DIM_V, dtype=dtype)
        key, value = (x.astype(dtype) for x in tokens(rng, 1, KV_HEADS, 600))
        query = rng.standard_normal((1, HEADS, 1, HEAD_DIM)).astype(dtype)
        cache.append(key, value)
        for length in (600, 513, 512, 511, 1):
            cache.truncate(length)
            expected = fastattn.attention(query, key[:, :, :length], value[:, :, :length])
            assert cache.attend(query).tobytes() == expected.tobytes()

    @pytest.mark.parametrize("query_dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", STORAGES, ids=str)
    def test_dtype_of_the_result(self, query_dtype, dtype, rng):
        cache = KVCache(1, KV_HEADS, HEAD_DIM, 8, dtype=dtype)
        cache.append(*tokens(rng, 1, KV_HEADS, 3, head_dim_v=HEAD_DIM))
        query = rng.standard_normal((1, HEADS, 1, HEAD_DIM)).astype(query_dtype)
        if {query_dtype.name, dtype.name} == {"float16", "bfloat16"}:
            with pytest.raises(TypeError, match="common dtype"):
                cache.attend(query)
            return
        expected = query_dtype if dtype == INT8 else np.result_type(query_dtype, dtype)
        for _ in range(2):
            assert cache.attend(query).dtype == expected

    def test_empty(self, rng):
        cache = KVCache(2, KV_HEADS, HEAD_DIM, 8)
        query = rng.standard_normal((2, HEADS, 1, HEAD_DIM), dtype=np.float32)
        output, lse = cache.attend(query, return_lse=True)
        assert (output == 0).all()
        assert (lse == -np.inf).all()
        key, value = tokens(rng, 2, KV_HEADS, 1, head_dim_v=HEAD_DIM)
        cache.append(key, value, lengths=[0, 1])
        output = cache.attend(query)
        assert (output[0] == 0).all()
        assert_close(output[1], np.repeat(value[1], 2, axis=0), np.float32)

    def test_nothing_is_read_behind_the_lengths(self, rng):
        cache = KVCache(1, KV_HEADS, HEAD_DIM, 200)
        for x in cache._storage.arrays:
            x[...] = np.nan
        cache.append(*tokens(rng, 1, KV_HEADS, 130, head_dim_v=HEAD_DIM))
        query = rng.standard_normal((1, HEADS, 3, HEAD_DIM), dtype=np.float32)
        assert np.isfinite(cache.attend(query)).all()
        assert np.isfinite(cache.attend(query, causal=True)).all()

    def test_grow(self, rng):
        cache = KVCache(1, KV_HEADS, HEAD_DIM, 4, head_dim_v=HEAD_DIM_V, grow=True)
        key, value = tokens(rng, 1, KV_HEADS, 100)
        query = rng.standard_normal((1, HEADS, 1, HEAD_DIM), dtype=np.float32)
        capacities = set()
        for n in range(100):
            cache.append(key[:, :, n : n + 1], value[:, :, n : n + 1])
            cache.attend(query)
            capacities.add(cache.capacity)
        assert capacities == {4, 8, 16, 32, 64, 128}
        assert_close(cache.attend(query), fastattn.attention(query, key, value), np.float32)

    @pytest.mark.parametrize("capacity", [5, 8, 40])
    def test_window(self, capacity, rng):
        cache = KVCache(2, KV_HEADS, HEAD_DIM, capacity, head_dim_v=HEAD_DIM_V, window=5)
        key, value = tokens(rng, 2, KV_HEADS, 60)
        at = 0
        for count in [1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 3, 1, 1, 1, 1, 1, 1]:
            n = min(count, capacity - 4)
            query = rng.standard_normal((2, HEADS, n, HEAD_DIM), dtype=np.float32)
            cache.append(key[:, :, at : at + n], value[:, :, at : at + n])
            at += n
            assert cache.positions.tolist() == [at, at]
            assert cache.lengths.max() <= capacity
            i, j = np.arange(at - n, at)[:, None], np.arange(at)
            mask = (j <= i) & (j > i - 5)
            expected = fastattn.reference.attention(
                query, key[:, :, :at], value[:, :, :at], mask=mask
            )
            for keywords in ({}, {"causal": True}, {"layout": "bhld"}):
                assert_close(cache.attend(query, **keywords), expected, np.float32)

    def test_reorder(self, rng):
        cache = KVCache(3, KV_HEADS, HEAD_DIM, 9, head_dim_v=HEAD_DIM_V)
        key, value = tokens(rng, 3, KV_HEADS, 9)
        cache.append(key, value, lengths=[9, 4, 0])
        cache.reorder([1, 0, 1])
        query = rng.standard_normal((3, HEADS, 1, HEAD_DIM), dtype=np.float32)
        expected = fastattn.attention(query, key[[1, 0, 1]], value[[1, 0, 1]], kv_lengths=[4, 9, 4])
        assert_close(cache.attend(query), expected, np.float32)

    def test_append_touches_nothing_else(self, rng):
        cache = KVCache(1, KV_HEADS, HEAD_DIM, 64)
        arrays = cache._storage.arrays
        key, value = tokens(rng, 1, KV_HEADS, 64, head_dim_v=HEAD_DIM)
        for n in range(64):
            before = [x.copy() for x in arrays]
            cache.append(key[:, :, n : n + 1], value[:, :, n : n + 1])
            for old, new in zip(before, cache._storage.arrays, strict=True):
                assert np.array_equal(np.delete(old, n, axis=2), np.delete(new, n, axis=2))
        assert [id(x) for x in cache._storage.arrays] == [id(x) for x in arrays]

    def test_nbytes(self):
        sizes = {
            dtype.name: KVCache(2, 3, 64, 100, head_dim_v=32, dtype=dtype).nbytes
            for dtype in STORAGES
        }
        elements = 2 * 3 * 100 * (64 + 32)
        assert sizes["float32"] == 4 * elements
        assert sizes["float16"] == sizes["bfloat16"] == 2 * elements
        assert sizes["int8"] == elements + 2 * 4 * 2 * 3 * 100


class TestInt8:
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("seqlen_kv", [16, 300, 2000])
    def test_error_on_normal_data(self, head_dim, seqlen_kv, rng):
        cache = KVCache(1, 8, head_dim, seqlen_kv, dtype=np.int8)
        key, value = tokens(rng, 1, 8, seqlen_kv, head_dim=head_dim, head_dim_v=head_dim)
        query = rng.standard_normal((1, 32, 1, head_dim), dtype=np.float32)
        cache.append(key, value)
        expected = fastattn.attention(query, key, value)
        error = np.abs(cache.attend(query) - expected).max()
        assert error < 0.01 * np.ptp(expected)

    def test_rows_are_off_by_half_a_step(self, rng):
        cache = KVCache(1, 1, 64, 50, dtype=np.int8)
        key, value = tokens(rng, 1, 1, 50, head_dim=64, head_dim_v=64)
        key *= np.float32(10.0) ** rng.integers(-30, 30, (50, 1))
        cache.append(key, value)
        storage = cache._storage
        kept = storage.key * storage.key_scale[..., None].astype(np.float64)
        step = np.abs(key).max(axis=-1, keepdims=True) / 127
        assert (np.abs(kept - key) <= step * 0.5001).all()

    def test_outliers_take_the_precision_of_their_row_alone(self, rng):
        cache = KVCache(1, 1, 64, 50, dtype=np.int8)
        key, value = tokens(rng, 1, 1, 50, head_dim=64, head_dim_v=64)
        value[0, 0, 7, 3] = 1000.0
        cache.append(key, value)
        storage = cache._storage
        kept = storage.value[0, 0] * storage.value_scale[0, 0, :, None]
        error = np.abs(kept - value[0, 0]).max(axis=-1)
        assert error[7] <= 0.5001 * 1000 / 127
        assert (
            np.delete(error, 7) <= 0.5001 * np.abs(np.delete(value[0, 0], 7, 0)).max() / 127
        ).all()

    @pytest.mark.parametrize("number", [0.0, 1e-45, 1e-42, 3e38])
    def test_extreme_rows(self, number):
        cache = KVCache(1, 1, 16, 2, dtype=np.int8)
        row = np.full((1, 1, 1, 16), number, np.float32)
        cache.append(row, row)
        output = cache.attend(np.zeros((1, 1, 1, 16), np.float32))
        np.testing.assert_allclose(output, row, rtol=0.005, atol=1e-38)

    def test_too_large_for_a_scale(self):
        """Refused, without a warning about the overflow that shows it."""
        cache = KVCache(1, 1, 16, 2, dtype=np.int8)
        row = np.full((1, 1, 1, 16), 1e300)
        with pytest.raises(ValueError, match="key must be finite to be stored as int8"):
            cache.append(row, row)

    def test_padding_may_hold_anything(self, rng):
        cache = KVCache(1, KV_HEADS, HEAD_DIM, 8, dtype=np.int8)
        key, value = tokens(rng, 1, KV_HEADS, 3, head_dim_v=HEAD_DIM)
        key[:, :, 2] = value[:, :, 2] = np.nan
        cache.append(key, value, lengths=[2])
        query = rng.standard_normal((1, HEADS, 1, HEAD_DIM), dtype=np.float32)
        assert np.isfinite(cache.attend(query)).all()


class TestKVCacheErrors:
    @pytest.fixture
    def cache(self, rng):
        cache = KVCache(2, KV_HEADS, HEAD_DIM, 8, dtype=np.int8)
        cache.append(*tokens(rng, 2, KV_HEADS, 5, head_dim_v=HEAD_DIM))
        return cache

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda k, v: (k[:1], v), ValueError, "key must have shape"),
            (lambda k, v: (k[:, :1], v), ValueError, "key must have shape"),
            (lambda k, v: (k[..., :5], v), ValueError, "key must have shape"),
            (lambda k, v: (k, v[..., :5]), ValueError, "value must have shape"),
            (lambda k, v: (k, v[:, :, :1]), ValueError, "value must have shape"),
            (lambda k, v: (k[0], v[0]), ValueError, "key must have shape"),
            (lambda k, v: (k.astype(int), v), TypeError, "key must be float16"),
            (lambda k, v: (k, v * 1j), TypeError, "value must be float16"),
            (lambda k, v: (k * np.nan, v), ValueError, "key must be finite"),
            (lambda k, v: (k, v / 0), ValueError, "value must be finite"),
            (lambda k, v: (k, v, [1, 3]), ValueError, "lengths must lie between 0 and 2"),
            (lambda k, v: (k, v, [1]), None, ""),
            (lambda k, v: (k, v, [1, 1, 1]), ValueError, "lengths must have shape"),
            (lambda k, v: (k, v, [0.5, 1]), TypeError, "lengths must be an int"),
            (lambda k, v: (np.repeat(k, 2, 2), np.repeat(v, 2, 2)), ValueError, "capacity of 8"),
        ],
    )
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_append(self, cache, change, error, message, rng):
        key, value = tokens(rng, 2, KV_HEADS, 2, head_dim_v=HEAD_DIM)
        arguments = change(key, value)
        if error is None:
            cache.append(*arguments)
            assert cache.lengths.tolist() == [6, 6]
            return
        before = unchanged(cache)
        with pytest.raises(error, match=message):
            cache.append(*arguments)
        assert unchanged(cache) == before

    def test_others(self, cache, rng):
        before = unchanged(cache)
        query = rng.standard_normal((2, HEADS, 1, HEAD_DIM), dtype=np.float32)
        with pytest.raises(ValueError, match="lengths must lie between 0 and"):
            cache.truncate(6)
        with pytest.raises(ValueError, match="lengths must lie between 0 and"):
            cache.truncate([-1, 3])
        with pytest.raises(ValueError, match="indices must lie between 0 and 1"):
            cache.reorder([0, 2])
        with pytest.raises(ValueError, match="query must have four axes"):
            cache.attend(query[:1])
        with pytest.raises(ValueError, match="query must have four axes"):
            cache.attend(query[None])
        with pytest.raises(ValueError, match="must divide"):
            cache.attend(query[:, :3])
        with pytest.raises(ValueError, match=r"key.shape\[-1\] must equal"):
            cache.attend(query[..., :7])
        with pytest.raises(TypeError, match="unexpected keyword argument 'kv_lengths'"):
            cache.attend(query, kv_lengths=3)
        with pytest.raises(ValueError, match="scale must be finite"):
            cache.attend(query, scale=np.nan)
        with pytest.raises(TypeError, match="causal must be"):
            cache.attend(query, causal=2)
        assert unchanged(cache) == before

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"batch": 0}, ValueError, "batch must be at least 1"),
            ({"capacity": -1}, ValueError, "capacity must be at least 1"),
            ({"head_dim": 1.5}, TypeError, "head_dim must be an int"),
            ({"num_kv_heads": True}, TypeError, "num_kv_heads must be an int"),
            ({"head_dim_v": 0}, ValueError, "head_dim_v must be at least 1"),
            ({"dtype": np.int16}, TypeError, "dtype must be one of float16, .*, int8: got"),
            ({"dtype": "nonsense"}, TypeError, "dtype must be"),
            ({"window": 9}, ValueError, "window must not exceed"),
            ({"window": 0}, ValueError, "window must be at least 1"),
        ],
    )
    def test_construction(self, arguments, error, message):
        good = {"batch": 1, "num_kv_heads": 1, "head_dim": 4, "capacity": 8}
        with pytest.raises(error, match=message):
            KVCache(**good | arguments)


class TestFiles:
    @pytest.mark.parametrize("dtype", STORAGES, ids=str)
    def test_round_trip(self, dtype, tmp_path, rng):
        cache = KVCache(2, KV_HEADS, HEAD_DIM, 20, dtype=dtype, grow=True, window=6)
        cache.append(*tokens(rng, 2, KV_HEADS, 15, head_dim_v=HEAD_DIM), lengths=[15, 9])
        path = tmp_path / "cache.npz"
        cache.save(path)
        loaded = KVCache.load(path)
        assert [x.name for x in tmp_path.iterdir()] == ["cache.npz"]
        for name in ("dtype", "capacity", "grow", "window", "nbytes"):
            assert getattr(loaded, name) == getattr(cache, name)
        assert loaded.lengths.tolist() == [15, 9]
        query = rng.standard_normal((2, HEADS, 1, HEAD_DIM)).astype(np.float32)
        assert loaded.attend(query).tobytes() == cache.attend(query).tobytes()

    def test_torn_files(self, tmp_path, rng):
        cache = KVCache(1, 1, 8, 20)
        cache.append(*tokens(rng, 1, 1, 15, head_dim=8, head_dim_v=8))
        path = tmp_path / "cache.npz"
        cache.save(path)
        whole = path.read_bytes()
        for end in [*range(0, len(whole) - 1, 97), len(whole) - 1]:
            path.write_bytes(whole[:end])
            with pytest.raises(ValueError, match="path must be a file that KVCache"):
                KVCache.load(path)

    def test_foreign_files(self, tmp_path):
        path = tmp_path / "cache.npz"
        contents = [b"", b"hello", b"PK\x05\x06" + bytes(18)]
        for save in (
            lambda file: np.save(file, np.zeros(3)),
            lambda file: np.save(file, np.array([{}], object)),
            lambda file: np.savez(file, key=np.zeros(3)),
            lambda file: np.savez(file, format=np.array([{}], object)),
            lambda file: np.savez(file, format="fastattn.KVCache 1"),
        ):
            file = io.BytesIO()
            save(file)
            contents.append(file.getvalue())
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"a file that KVCache.save wrote: got {path}$"):
                KVCache.load(path)

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("key", lambda x: x[:, :, :3]),
            ("key", lambda x: x.astype(np.int16)),
            ("value", lambda x: x[:, :1]),
            ("value", lambda x: x[0]),
            ("key_scale", lambda x: x * np.nan),
            ("value_scale", lambda x: -x),
            ("lengths", lambda x: x + 100),
            ("lengths", lambda x: x[:1]),
            ("lengths", lambda x: x - 100),
            ("dropped", lambda x: x - 1),
            ("options", lambda x: x - 100),
            ("options", lambda x: x[:2]),
            ("dtype", lambda x: np.array("float32")),
            ("dtype", lambda x: np.array("no such thing")),
            ("format", lambda x: np.array("another")),
        ],
    )
    def test_changed_files(self, name, change, tmp_path, rng):
        cache = KVCache(2, 2, 8, 20, dtype=np.int8)
        cache.append(*tokens(rng, 2, 2, 15, head_dim=8, head_dim_v=8))
        path = tmp_path / "cache.npz"
        cache.save(path)
        content = dict(np.load(path))
        content[name] = change(content[name])
        np.savez(path, **content)
        if name == "lengths" and content[name].shape == (1,):
            assert KVCache.load(path).lengths.tolist() == [15, 15]
            return
        with pytest.raises(ValueError, match="path must be a file that KVCache"):
            KVCache.load(path)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            KVCache.load(tmp_path / "nothing.npz")


class TestPagedKVCache:
    @pytest.mark.parametrize("dtype", STORAGES, ids=str)
    @pytest.mark.parametrize("page_size", [1, 7, 64, 128])
    def test_ragged_batch(self, dtype, page_size, rng):
        lengths, queries = [600, 3, 64, 130, 0], [1, 3, 40, 1, 1]
        cache = PagedKVCache(
            -(-1000 // page_size) + 5, page_size, KV_HEADS, HEAD_DIM, head_dim_v=16, dtype=dtype
        )
        ids = [cache.add() for _ in lengths]
        key, value = tokens(rng, sum(lengths), KV_HEADS)
        starts, starts_q = np.cumsum([0, *lengths]), np.cumsum([0, *queries])
        cache.append(ids, key, value, starts)
        assert cache.lengths(ids).tolist() == lengths
        query = rng.standard_normal((sum(queries), HEADS, HEAD_DIM), dtype=np.float32)
        output, lse = cache.attend(query, ids, starts_q, causal=True, return_lse=True)
        for n, length in enumerate(lengths):
            mine, theirs = slice(*starts_q[n : n + 2]), slice(*starts[n : n + 2])
            if length == 0:
                assert (output[mine] == 0).all()
                assert (lse[:, mine] == -np.inf).all()
                continue
            expected, expected_lse = fastattn.attention(
                *(x.swapaxes(0, 1) for x in (query[mine], key[theirs], value[theirs])),
                causal=True,
                return_lse=True,
            )
            assert_close(output[mine].swapaxes(0, 1), expected, dtype, times=2)
            assert_close(lse[:, mine], expected_lse, dtype, times=10)

    def test_bits_do_not_depend_on_the_batch(self, rng):
        lengths, queries = [600, 3, 64, 130], [1, 3, 40, 1]
        cache = PagedKVCache(40, 64, KV_HEADS, HEAD_DIM, dtype=np.float16)
        ids = [cache.add() for _ in lengths]
        starts, starts_q = np.cumsum([0, *lengths]), np.cumsum([0, *queries])
        cache.append(ids, *tokens(rng, sum(lengths), KV_HEADS, head_dim_v=HEAD_DIM), starts)
        query = rng.standard_normal((sum(queries), HEADS, HEAD_DIM), dtype=np.float32)
        together = cache.attend(query, ids, starts_q)
        for n, each in enumerate(ids):
            mine = slice(*starts_q[n : n + 2])
            alone = cache.attend(query[mine], [each], [0, queries[n]])
            assert alone.tobytes() == together[mine].tobytes()

    @pytest.mark.parametrize("heads", [2, 40])
    def test_more_keys_than_are_summed_in_one_go(self, heads, rng):
        """By the kernel for many queries: of one head, or one for each of many."""
        length, queries = 9000, 40 if heads == 2 else 1
        key, value = rng.standard_normal((2, length, 2, 8), dtype=np.float32)
        query = rng.standard_normal((queries, heads, 8), dtype=np.float32)
        cache = fastattn.PagedKVCache(150, 64, 2, 8)
        sequence = cache.add()
        cache.append([sequence], key, value, [0, length])
        output = cache.attend(query, [sequence], [0, queries] if heads == 2 else None)
        expected = fastattn.attention(query, key, value, layout="blhd")
        assert_same_bits(output, expected)

    def test_sharing_and_copy_on_write(self, rng):
        cache = PagedKVCache(10, 4, KV_HEADS, HEAD_DIM, head_dim_v=HEAD_DIM_V)
        prompt = cache.add()
        key, value = tokens(rng, 6, KV_HEADS)
        cache.append([prompt], key, value, [0, 6])
        assert cache.pages_free == 8
        ids = [cache.add(share=prompt) for _ in range(3)]
        assert cache.pages_free == 8
        more = tokens(rng, 3, KV_HEADS)
        cache.append(ids, *more)
        # Three copies of the half page; the prompt keeps its own.
        assert cache.pages_free == 5
        cache.free(prompt)
        assert cache.pages_free == 6
        query = rng.standard_normal((3, HEADS, HEAD_DIM), dtype=np.float32)
        output = cache.attend(query, ids)
        for n in range(3):
            all_keys, all_values = (
                np.concatenate([old, new[n : n + 1]]).swapaxes(0, 1)
                for old, new in zip((key, value), more, strict=True)
            )
            expected = fastattn.attention(query[n][:, None], all_keys, all_values)
            assert_close(output[n], expected[:, 0], np.float32)
        for each in ids:
            cache.free(each)
        assert cache.pages_free == 10

    def test_calls_of_one_shape_follow_the_tables(self, rng):
        cache = PagedKVCache(8, 64, KV_HEADS, HEAD_DIM)
        query = rng.standard_normal((1, HEADS, HEAD_DIM), dtype=np.float32)
        kept = {}

        def append(each, count):
            rows = tokens(rng, count, KV_HEADS, head_dim_v=HEAD_DIM)
            cache.append([each], *rows, [0, count])
            kept[each] = [np.concatenate(both) for both in zip(kept[each], rows, strict=True)]

        def assert_attends():
            for each, (key, value) in kept.items():
                for keywords in ({}, {"causal": True}):
                    output = cache.attend(query, [each], **keywords)
                    expected = fastattn.attention(query, key, value, layout="blhd", **keywords)
                    assert_same_bits(output, expected)

        def add(share=None):
            new = cache.add(share=share)
            nothing = [np.zeros((0, KV_HEADS, HEAD_DIM), np.float32)] * 2
            kept[new] = nothing if share is None else kept[share]
            return new

        first = add()
        append(first, 30)
        assert_attends()
        second = add(share=first)
        assert_attends()
        append(first, 1)  # to a copy of the page, which is the second's alone now,
        assert_attends()
        append(second, 1)  # and written to where the first one had its token
        assert_attends()
        append(first, 40)
        assert_attends()
        # As many sequences as before, in the pages of those that were freed.
        cache.free(first)
        del kept[first]
        with pytest.raises(ValueError, match="was freed"):
            cache.attend(query, [first])
        append(add(), 71)
        assert_attends()

    def test_calls_of_one_shape_in_other_strides(self, rng):
        """Queries that are part of larger arrays, as projected together with keys and values."""
        cache = PagedKVCache(8, 64, KV_HEADS, HEAD_DIM)
        ids = [cache.add() for _ in range(3)]
        cache.append(ids, *tokens(rng, 60, KV_HEADS, head_dim_v=HEAD_DIM), [0, 10, 30, 60])
        query = rng.standard_normal((3, HEADS, HEAD_DIM), dtype=np.float32)
        expected = cache.attend(query, ids)
        for axis in range(3):
            wide = np.repeat(query, 2, axis)
            every_second = wide[tuple(slice(None, None, 1 + (n == axis)) for n in range(3))]
            backwards = np.flip(np.flip(query, axis).copy(), axis)
            for each in (every_second, backwards):
                assert_same_bits(cache.attend(each, ids), expected)

    @pytest.mark.parametrize("page_size", [7, 64, 1024])
    def test_token_by_token(self, page_size, rng):
        """What is known of a call holds until the keys begin a chunk, a page or a block."""
        length, last = CHUNK - 67, CHUNK + 3
        key, value = tokens(rng, last, 1, head_dim_v=HEAD_DIM)
        cache = PagedKVCache(-(-2 * last // page_size), page_size, 1, HEAD_DIM)
        ids = [cache.add(), cache.add()]
        cache.append(ids[:1], key[:length], value[:length], [0, length])
        query = rng.standard_normal((2, 2, HEAD_DIM), dtype=np.float32)
        for n in range(length, last):
            cache.append(ids, *(x[[n, n - length]] for x in (key, value)))
            output = cache.attend(query, ids, causal=True)
            for mine, q, end in zip(output, query, (n + 1, n + 1 - length), strict=True):
                rows = key[:end], value[:end]
                expected = fastattn.attention(q[None], *rows, causal=True, layout="blhd")
                assert_same_bits(mine, expected[0])

    def test_a_known_call_takes_as_many_threads_as_it_may(self, monkeypatch, rng):
        cache = PagedKVCache(40, 64, KV_HEADS, HEAD_DIM)
        ids = [cache.add(), cache.add()]
        key, value = tokens(rng, 2000, KV_HEADS, head_dim_v=HEAD_DIM)
        cache.append(ids, key, value, [0, 1000, 2000])
        query = rng.standard_normal((2, HEADS, HEAD_DIM), dtype=np.float32)
        launched = []
        launch = runtime.launch

        def count(kernel, placed, workers, **keywords):
            launched.append(workers)
            launch(kernel, placed, workers, **keywords)

        monkeypatch.setattr(runtime, "launch", count)
        monkeypatch.setattr(plan, "SERIAL_WORK", 1)
        results = []
        for threads in (2, 1, 2):
            monkeypatch.setattr(runtime, "_threads", threads)
            results.append(cache.attend(query, ids).tobytes())
        assert launched == [2, 2]
        assert len({*results}) == 1

    def test_the_last_user_of_a_page_writes_in_place(self, rng):
        cache = PagedKVCache(3, 4, KV_HEADS, HEAD_DIM, head_dim_v=HEAD_DIM_V)
        first = cache.add()
        cache.append([first], *tokens(rng, 2, KV_HEADS), [0, 2])
        second = cache.add(share=first)
        # One copy is enough for both.
        cache.append([first, second], *tokens(rng, 2, KV_HEADS))
        assert cache.pages_free == 1

    def test_running_out_of_pages(self, rng):
        cache = PagedKVCache(4, 4, KV_HEADS, HEAD_DIM, head_dim_v=HEAD_DIM_V)
        ids = [cache.add(), cache.add()]
        cache.append(ids, *tokens(rng, 8, KV_HEADS), [0, 6, 8])
        shared = cache.add(share=ids[0])
        query = rng.standard_normal((3, HEADS, HEAD_DIM), dtype=np.float32)
        before = cache.attend(query, [*ids, shared]).tobytes()
        for where, counts in (([ids[1]], [11]), ([*ids, shared], [1, 3, 1]), ([ids[0]], [7])):
            with pytest.raises(ValueError, match="must fit into the free pages"):
                cache.append(where, *tokens(rng, sum(counts), KV_HEADS), np.cumsum([0, *counts]))
            assert cache.pages_free == 1
            assert cache.lengths([*ids, shared]).tolist() == [6, 2, 6]
            assert cache.attend(query, [*ids, shared]).tobytes() == before

    def test_abuse(self, rng):
        cache = PagedKVCache(4, 4, KV_HEADS, HEAD_DIM)
        known, freed = cache.add(), cache.add()
        cache.free(freed)
        key, value = tokens(rng, 1, KV_HEADS, head_dim_v=HEAD_DIM)
        cache.append([known], key, value)
        query = rng.standard_normal((1, HEADS, HEAD_DIM), dtype=np.float32)
        for call in (
            lambda each: cache.append([each], key, value),
            lambda each: cache.attend(query, [each]),
            cache.free,
            lambda each: cache.add(share=each),
            lambda each: cache.lengths([each]),
        ):
            with pytest.raises(ValueError, match=f"got {freed}, which was freed"):
                call(freed)
            with pytest.raises(ValueError, match="got 99, which was never added"):
                call(99)
            with pytest.raises(ValueError, match="must lie between 0"):
                call(-1)
            with pytest.raises(TypeError, match="must be an int or ints"):
                call(0.5)
        with pytest.raises(ValueError, match=r"^id must be a sequence of this cache: got 99"):
            cache.free(99)
        with pytest.raises(ValueError, match="must name each sequence once"):
            cache.append([known, known], *(np.repeat(x, 2, 0) for x in (key, value)))
        for starts in ([0, 2], [1, 1], [0], [0, 1, 1], [[0, 1]]):
            with pytest.raises(ValueError, match="cu_seqlens"):
                cache.append([known], key, value, starts)
            with pytest.raises(ValueError, match="cu_seqlens_q"):
                cache.attend(query, [known], starts)
        with pytest.raises(ValueError, match="cu_seqlens must be given"):
            cache.append([known], *(np.repeat(x, 2, 0) for x in (key, value)))
        with pytest.raises(ValueError, match="query must have shape"):
            cache.attend(query[0], [known])
        for name in ("kv_lengths", "layout", "block_mask"):
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}': "):
                cache.attend(query, [known], **{name: "any"})
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'dropout'$"):
            cache.attend(query, [known], dropout=0)
        assert cache.lengths([known]).tolist() == [1]
        assert cache.pages_free == 3

    @pytest.mark.parametrize("page", [-1, 4, 1 << 40])
    def test_a_page_outside_the_pool_is_not_read(self, page, rng):
        cache = PagedKVCache(4, 4, KV_HEADS, HEAD_DIM)
        known = cache.add()
        cache.append([known], *tokens(rng, 1, KV_HEADS, head_dim_v=HEAD_DIM))
        cache._tables[known] = (page,)
        with pytest.raises(ValueError, match="pages must lie between 0 and 3"):
            cache.attend(np.zeros((1, HEADS, HEAD_DIM), np.float32), [known])


# Keywords that leave every query a key.
MANY_WAYS = ({}, {"causal": True}, {"softcap": 2.0, "causal": True}, {"window": (3, 0)})


class KVCacheMachine(RuleBasedStateMachine):
    """Any sequence of calls leaves what the plain lists beside it hold."""

    @initialize(
        dtype=st.sampled_from(STORAGES),
        window=st.sampled_from([None, 5]),
        seed=st.integers(0, 99),
    )
    def start(self, dtype, window, seed):
        self.rng = np.random.default_rng(seed)
        self.cache = KVCache(3, 1, 16, 8, dtype=dtype, grow=True, window=window)
        self.kept = [np.zeros((0, 16), np.float32)] * 3

    @rule(tokens=st.integers(0, 40), data=st.data())
    def append(self, tokens, data):
        lengths = [data.draw(st.integers(0, tokens)) for _ in range(3)]
        rows = self.rng.standard_normal((3, 1, tokens, 16), dtype=np.float32)
        self.cache.append(rows, rows, lengths)
        self.kept = [
            np.concatenate([old, new[0, :n]])
            for old, new, n in zip(self.kept, rows, lengths, strict=True)
        ]
        self.forget()

    def forget(self):
        """Drop what a cache with a window may drop: what no query will see."""
        lengths = self.cache.lengths.tolist()
        for rows, n in zip(self.kept, lengths, strict=True):
            assert n == len(rows) or n >= min(len(rows), self.cache.window)
        self.kept = [rows[len(rows) - n :] for rows, n in zip(self.kept, lengths, strict=True)]

    @rule(tokens=st.integers(1, 3))
    def append_all(self, tokens):
        rows = self.rng.standard_normal((3, 1, tokens, 16), dtype=np.float32)
        self.cache.append(rows, rows)
        self.kept = [np.concatenate([a, b[0]]) for a, b in zip(self.kept, rows, strict=True)]
        self.forget()

    @rule()
    def errors_change_nothing(self):
        before, positions = unchanged(self.cache), self.cache.positions.tolist()
        rows = np.zeros((3, 1, 2, 16), np.float32)
        for call in (
            lambda: self.cache.append(rows, rows[:, :, :1]),
            lambda: self.cache.append(rows, rows, [1, 3, 1]),
            lambda: self.cache.truncate(np.add(self.cache.lengths, [0, 1, 0])),
            lambda: self.cache.reorder([0, 1, 3]),
            lambda: self.cache.attend(rows, scale=np.nan),
        ):
            with pytest.raises(ValueError, match="must"):
                call()
        assert (unchanged(self.cache), self.cache.positions.tolist()) == (before, positions)

    @rule(data=st.data())
    def truncate(self, data):
        lengths = [data.draw(st.integers(0, len(x))) for x in self.kept]
        self.cache.truncate(lengths)
        self.kept = [x[:n] for x, n in zip(self.kept, lengths, strict=True)]

    @rule(indices=st.lists(st.integers(0, 2), min_size=3, max_size=3))
    def reorder(self, indices):
        self.cache.reorder(indices)
        self.kept = [self.kept[n] for n in indices]

    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(Path(folder) / "cache.npz")
            self.cache = KVCache.load(Path(folder) / "cache.npz")

    @invariant()
    def attends_to_what_it_keeps(self):
        if not hasattr(self, "cache"):
            return
        assert self.cache.lengths.tolist() == [len(x) for x in self.kept]
        query = self.rng.standard_normal((3, 2, 1, 16), dtype=np.float32)
        keywords = MANY_WAYS[self.rng.integers(len(MANY_WAYS))]
        output = self.cache.attend(query, **keywords)
        for mine, q, rows in zip(output, query, self.kept, strict=True):
            seen = rows if self.cache.window is None else rows[-self.cache.window :]
            expected = fastattn.reference.attention(q, seen[None], seen[None], **keywords)
            assert_close(mine, expected, self.cache.dtype, times=2)


class PagedKVCacheMachine(RuleBasedStateMachine):
    """Likewise, with sequences that come, share and go."""

    @initialize(
        dtype=st.sampled_from([np.dtype(np.float32), BFLOAT16, INT8]),
        page_size=st.sampled_from([1, 3, 64]),
        seed=st.integers(0, 99),
    )
    def start(self, dtype, page_size, seed):
        self.rng = np.random.default_rng(seed)
        self.cache = PagedKVCache(30, page_size, 1, 16, dtype=dtype)
        self.kept = {}

    @rule()
    def add(self):
        self.kept[self.cache.add()] = np.zeros((0, 16), np.float32)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def share(self, data):
        each = data.draw(st.sampled_from(sorted(self.kept)))
        self.kept[self.cache.add(share=each)] = self.kept[each]

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def free(self, data):
        each = data.draw(st.sampled_from(sorted(self.kept)))
        self.cache.free(each)
        del self.kept[each]

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def append(self, data):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.kept)), unique=True))
        counts = [data.draw(st.integers(0, 9) | st.just(CHUNK + 20)) for _ in ids]
        rows = self.rng.standard_normal((sum(counts), 1, 16), dtype=np.float32)
        starts = np.cumsum([0, *counts])
        if self.pages_needed(ids, counts) > self.cache.pages_free:
            with pytest.raises(ValueError, match="free pages"):
                self.cache.append(ids, rows, rows, starts)
            return
        self.cache.append(ids, rows, rows, starts)
        for n, each in enumerate(ids):
            new = rows[starts[n] : starts[n + 1], 0]
            self.kept[each] = np.concatenate([self.kept[each], new])

    @invariant()
    def attends_to_what_it_keeps(self):
        if not getattr(self, "kept", None):
            return
        ids = sorted(self.kept)
        assert self.cache.lengths(ids).tolist() == [len(self.kept[each]) for each in ids]
        query = self.rng.standard_normal((len(ids), 2, 16), dtype=np.float32)
        keywords = MANY_WAYS[self.rng.integers(len(MANY_WAYS))]
        output = self.cache.attend(query, ids, **keywords)
        for mine, q, each in zip(output, query, ids, strict=True):
            rows = self.kept[each][None]
            expected = fastattn.reference.attention(q[:, None], rows, rows, **keywords)[:, 0]
            assert_close(mine, expected, self.cache.dtype, times=2)

    def pages_needed(self, ids, counts):
        """Return how many pages an append takes: copies of shared last ones, and new ones."""
        size, needed = self.cache.page_size, 0
        users = Counter(page for table in self.cache._tables.values() for page in table)
        for each, count in zip(ids, counts, strict=True):
            length = len(self.kept[each])
            needed += -(-(length + count) // size) - -(-length // size)
            if count and length % size:
                last = self.cache._tables[each][-1]
                needed += users[last] > 1
                users[last] -= users[last] > 1
        return needed

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def errors_change_nothing(self, data):
        each = data.draw(st.sampled_from(sorted(self.kept)))
        before, tables = unchanged_pages(self.cache), repr(self.cache._tables)
        rows = np.zeros((40 * self.cache.page_size, 1, 16), np.float32)
        for call in (
            lambda: self.cache.append([each], rows, rows, [0, len(rows)]),
            lambda: self.cache.append([each, each], rows[:2], rows[:2]),
            lambda: self.cache.append([each], rows[:2], rows[:1], [0, 2]),
            lambda: self.cache.append([each], rows[:2], rows[:2], [0, 1]),
            lambda: self.cache.attend(rows[:1], [each], scale=np.inf),
            lambda: self.cache.free(each + 1000),
        ):
            with pytest.raises(ValueError, match="must"):
                call()
        assert (unchanged_pages(self.cache), repr(self.cache._tables)) == (before, tables)

    @invariant()
    def counts_its_pages(self):
        if not hasattr(self, "cache"):
            return
        users = Counter(page for table in self.cache._tables.values() for page in table)
        assert [users[page] for page in range(30)] == self.cache._users
        used = set(users)
        assert len(used) == 30 - self.cache.pages_free
        assert not used & set(self.cache._free)


TestKVCacheMachine = KVCacheMachine.TestCase
TestPagedKVCacheMachine = PagedKVCacheMachine.TestCase
