"""Few queries against many keys: the decode kernel.

`fastattn.plan` chooses a kernel by shape. Here every case runs on the decode kernel, whatever
the plan would say, and what only it has is looked for at its edges: chunks, blocks, their merge.
"""

import itertools
from contextlib import contextmanager

import numpy as np
import pytest
from checks import FLOAT_DTYPES, assert_accurate, make_inputs
from fastattn.kernels.record import CHUNK

import fastattn
from fastattn import plan

# Around a block, a chunk, several chunks.
LENGTHS = [1, 17, 63, 64, 65, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 100]


@contextmanager
def most_rows(count):
    """Let the decode kernel run what has up to so many rows for each kv head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_MOST_ROWS", count)
        patch.setattr(plan, "_MOST_ROWS_OF_ONE_CHUNK", count)
        plan.plan.cache_clear()
        yield
    plan.plan.cache_clear()


@pytest.fixture(autouse=True)
def decode_whatever_the_shape():
    """Let the decode kernel run every case of this file."""
    with most_rows(64):
        yield


def bits(*results):
    """Return results as bytes: NaN equals itself, and 0 is not -0."""
    return [np.ascontiguousarray(x).tobytes() for x in results]


def keywords_for(rng, name, heads, seqlen_q, seqlen_kv, batch):
    """Return keywords that hide some keys and leave every query a key, by name."""
    visible = rng.random((seqlen_q, seqlen_kv)) < 0.7
    visible[:, 0] = True
    bias = rng.standard_normal((heads, seqlen_q, seqlen_kv)).astype(np.float32)
    return {
        "plain": {},
        "causal": {"causal": True},
        "top_left": {"causal": "top_left"},
        "offset": {"causal": True, "query_offset": rng.integers(0, seqlen_kv, batch)},
        "lengths": {"kv_lengths": rng.integers(1, seqlen_kv + 1, batch)},
        "mask": {"mask": visible},
        "bias": {"bias": bias},
        "scale": {"scale": -0.3},
        "all": {"mask": visible, "bias": bias, "causal": True, "kv_lengths": seqlen_kv},
    }[name]


KEYWORDS = ["plain", "causal", "top_left", "offset", "lengths", "mask", "bias", "scale", "all"]


class TestAgainstTheReference:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("seqlen_kv", LENGTHS)
    def test_length(self, dtype, seqlen_kv, rng):
        inputs = make_inputs(
            rng, heads=4, kv_heads=2, seqlen_q=1, seqlen_kv=seqlen_kv, head_dim=64, dtype=dtype
        )
        assert_accurate(fastattn.attention(*inputs, return_lse=True), *inputs)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("group_size", [*range(1, 9), 16, 24])
    def test_group_size(self, dtype, group_size, rng):
        inputs = make_inputs(
            rng,
            heads=2 * group_size,
            kv_heads=2,
            seqlen_q=1,
            seqlen_kv=CHUNK + 90,
            head_dim=32,
            dtype=dtype,
        )
        assert_accurate(fastattn.attention(*inputs, return_lse=True), *inputs)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("name", KEYWORDS)
    @pytest.mark.parametrize("rows", [0, 64], ids=["prefill", "decode"])
    def test_keyword(self, dtype, name, rows, rng):
        batch, heads, seqlen_q, seqlen_kv = 3, 4, 3, CHUNK + 200
        inputs = make_inputs(
            rng,
            batch=(batch,),
            heads=heads,
            kv_heads=2,
            seqlen_q=seqlen_q,
            seqlen_kv=seqlen_kv,
            head_dim=32,
            dtype=dtype,
        )
        keywords = keywords_for(rng, name, heads, seqlen_q, seqlen_kv, batch)
        with most_rows(rows):
            result = fastattn.attention(*inputs, return_lse=True, **keywords)
        assert_accurate(result, *inputs, **keywords)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("head_dim", "head_dim_v"),
        [(1, 1), (3, 8), (8, 3), (40, 80), (64, 16), (96, 128), (128, 40), (256, 256)],
    )
    def test_head_dim(self, dtype, head_dim, head_dim_v, rng):
        inputs = make_inputs(
            rng, seqlen_q=2, seqlen_kv=150, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype
        )
        assert_accurate(fastattn.attention(*inputs, return_lse=True), *inputs)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_large_scores_in_one_chunk(self, dtype, rng):
        # The other chunks' exponentials vanish beside them.
        query, key, value = make_inputs(
            rng, seqlen_q=1, seqlen_kv=3 * CHUNK, head_dim=32, dtype=dtype
        )
        key[..., CHUNK : CHUNK + 3, :] *= 20
        result = fastattn.attention(query, key, value, return_lse=True)
        assert_accurate(result, query, key, value)


class TestHidden:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("head_dim", [32, 20])
    def test_nothing_of_a_hidden_key_arrives(self, dtype, strange, head_dim, rng):
        query, key, value = make_inputs(
            rng, seqlen_q=3, seqlen_kv=CHUNK + 100, head_dim=head_dim, dtype=dtype
        )
        hidden = np.array([5, 70, CHUNK - 1, CHUNK, CHUNK + 99])
        mask = np.ones(CHUNK + 100, bool)
        mask[hidden] = False
        expected = fastattn.attention(query, key, value, mask=mask, return_lse=True)
        key[..., hidden, :] = value[..., hidden, :] = strange
        result = fastattn.attention(query, key, value, mask=mask, return_lse=True)
        assert bits(*result) == bits(*expected)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_each_row_has_its_own_hidden_keys(self, dtype, rng):
        query, key, value = make_inputs(rng, seqlen_q=2, seqlen_kv=100, head_dim=16, dtype=dtype)
        value[..., 40, 3] = np.nan
        mask = np.ones((2, 100), bool)
        mask[0, 40] = False
        result = fastattn.attention(query, key, value, mask=mask)
        strange = np.isnan(result.astype(np.float64))
        assert strange[..., 1, 3].all()
        assert strange.sum() == strange[..., 1, 3].size

    def test_visible_nan_in_a_chunk_whose_weight_vanishes(self, rng):
        query, key, value = make_inputs(rng, seqlen_q=1, seqlen_kv=2 * CHUNK, head_dim=16)
        key[..., :CHUNK, :], key[..., CHUNK:, :] = -100 * query, 100 * query
        value[..., 3, 0] = np.nan
        result = fastattn.attention(query, key, value)
        assert np.isnan(result[..., 0]).all()
        assert np.isfinite(result[..., 1:]).all()

    @pytest.mark.parametrize("seqlen_kv", [0, 1, CHUNK, 2 * CHUNK + 1])
    def test_rows_that_see_nothing(self, seqlen_kv, rng):
        inputs = make_inputs(rng, seqlen_q=2, seqlen_kv=seqlen_kv, head_dim=16)
        mask = np.zeros((2, seqlen_kv), bool)
        mask[1] = True
        output, lse = fastattn.attention(*inputs, mask=mask, return_lse=True)
        assert (output[..., 0, :] == 0).all()
        assert (lse[..., 0] == -np.inf).all()
        assert np.isfinite(output).all()
        assert np.isfinite(lse[..., 1]).all() or seqlen_kv == 0

    def test_visible_scores_of_minus_infinity(self, rng):
        inputs = make_inputs(rng, seqlen_q=1, seqlen_kv=2 * CHUNK, head_dim=16)
        inputs[1][:] = -np.inf * np.sign(inputs[0])
        assert np.isnan(fastattn.attention(*inputs)).all()

    def test_lengths_end_chunks(self, rng):
        lengths = np.array([0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
        query, key, value = make_inputs(
            rng, batch=(6,), seqlen_q=1, seqlen_kv=3 * CHUNK, head_dim=16
        )
        expected = fastattn.attention(query, key, value, kv_lengths=lengths, return_lse=True)
        for b, length in enumerate(lengths):
            key[b, :, length:] = value[b, :, length:] = np.nan
        result = fastattn.attention(query, key, value, kv_lengths=lengths, return_lse=True)
        assert bits(*result) == bits(*expected)
        assert_accurate(result, query, key, value, kv_lengths=lengths)


class TestBits:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_threads(self, dtype, rng):
        inputs = make_inputs(
            rng, heads=8, kv_heads=2, seqlen_q=1, seqlen_kv=5 * CHUNK + 3, head_dim=32, dtype=dtype
        )
        before = fastattn.get_num_threads()
        results = []
        try:
            for threads in range(1, before + 1):
                fastattn.set_num_threads(threads)
                results += [bits(*fastattn.attention(*inputs, return_lse=True)) for _ in range(3)]
        finally:
            fastattn.set_num_threads(before)
        assert all(each == results[0] for each in results)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_batch_composition(self, dtype, rng):
        query, key, value = make_inputs(
            rng,
            batch=(5,),
            heads=4,
            kv_heads=2,
            seqlen_q=2,
            seqlen_kv=2 * CHUNK + 77,
            head_dim=32,
            dtype=dtype,
        )
        lengths = np.array([3, CHUNK, 2 * CHUNK + 77, 700, CHUNK + 1])
        together = fastattn.attention(query, key, value, kv_lengths=lengths, return_lse=True)
        for b in range(5):
            alone = fastattn.attention(
                *(x[b : b + 1] for x in (query, key, value)),
                kv_lengths=lengths[b : b + 1],
                return_lse=True,
            )
            assert bits(*alone) == bits(*(x[b : b + 1] for x in together))

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("head_dim", [32, 24])
    def test_memory_layout(self, dtype, head_dim, rng):
        query, key, value = make_inputs(
            rng, seqlen_q=2, seqlen_kv=CHUNK + 30, head_dim=head_dim, dtype=dtype
        )
        expected = bits(*fastattn.attention(query, key, value, return_lse=True))
        layouts = [
            lambda x: x.swapaxes(1, 2).copy().swapaxes(1, 2),
            lambda x: np.repeat(x, 3, axis=-1)[..., ::3],
            lambda x: x[..., ::-1].copy()[..., ::-1],
            lambda x: x[..., ::-1, :].copy()[..., ::-1, :],
            lambda x: np.asfortranarray(x),
        ]
        for k_layout, v_layout in itertools.product(layouts, repeat=2):
            result = fastattn.attention(query, k_layout(key), v_layout(value), return_lse=True)
            assert bits(*result) == expected


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_queries_that_see_nothing_beside_those_that_do(dtype, rng):
    """The window of every second begins behind the last key, in the chunk of all others."""
    inputs = make_inputs(rng, batch=(40,), seqlen_q=1, seqlen_kv=64, head_dim=32, dtype=dtype)
    keywords = {"window": (2, 0), "query_offset": np.array([0, 100] * 20)}
    output, lse = fastattn.attention(*inputs, return_lse=True, **keywords)
    assert_accurate((output, lse), *inputs, **keywords)
    assert not output[1::2].any()
    assert (lse[1::2] == -np.inf).all()


def test_memory_does_not_hold_scores():
    # What grows with the keys is a row of V for every chunk, here 64 KB; scores would be 1 MB.
    from fastattn.problem import check
    from fastattn.run import _give_room

    keys = 1 << 18
    x = np.zeros((1, 1, keys, 16), np.float32)
    nothing = dict.fromkeys(("mask", "bias", "query_offset", "kv_lengths", "scale", "out"))
    problem = check(x[..., :1, :], x, x, causal=False, layout="bhld", return_lse=False, **nothing)
    room = _give_room(problem, problem.record.copy(), keys // CHUNK, heads=1, rows=1)
    assert sum(each.nbytes for each in room) <= keys // CHUNK * 18 * 4 + 8
