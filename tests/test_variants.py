"""Window, softcap, ALiBi, sinks, score_mod, mask_mod, block masks and packed sequences.

Against the reference in float64, with the bound of `checks.assert_accurate`: the naive code does
the same steps in the dtype of the inputs. Where two ways say the same, bits are compared.
"""

import functools
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checks import (
    FLOAT_DTYPES,
    assert_accurate,
    assert_same_bits,
    assert_within,
    make_inputs,
    rounding,
    rounding_bound,
    score_bound,
    to_float64,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from numpy.testing import assert_array_equal

import fastattn
from fastattn import create_block_mask, masks, reference

NAN, INF = np.nan, np.inf

# Fewer than a tile, several with a rest, few queries that take the other kernel.
LENGTHS = [(5, 7), (70, 130), (33, 64), (1, 700), (3, 65)]

dtypes = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
lengths = pytest.mark.parametrize("lengths", LENGTHS, ids=str)


def inputs_of(rng, lengths, dtype=np.float32, *, heads=4, kv_heads=2, batch=(2,)):
    """Return inputs of four query heads on two kv heads, with enough rows for a statistic."""
    seqlen_q, seqlen_kv = lengths
    batch = (*batch[:-1], max(batch[-1], 32 // seqlen_q))
    return make_inputs(
        rng,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        dtype=dtype,
    )


def check(*inputs, **keywords):
    """Assert that attention's output and lse are accurate, and return them."""
    result = fastattn.attention(*inputs, return_lse=True, **keywords)
    assert_accurate(result, *inputs, **keywords)
    return result


def assert_same(ours, theirs):
    """Assert that outputs, or outputs and their lses, are the same bits."""
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    for pair in pairs:
        assert_same_bits(*pair)


@njit
def shifted(score, b, h, i, j):
    return 0.7 * score + 0.01 * (i - j) - 0.3 * h + 0.1 * b


def hides_by_score(score, b, h, i, j):
    return -np.inf if (i + 2 * j + h) % 3 == 0 else score


@njit
def scattered(b, h, i, j):
    return (3 * i + 7 * j + h + 2 * b) % 5 > 1


def holding(shift, table, b, h, i, j):
    return j <= i + shift and table[(b + h) % len(table)] > 0


class TestMaskShapes:
    """Wide tiles: a mask read by registers, a bias transposed in them."""

    @pytest.mark.parametrize("kind", ["bool", "float32", "float16", "float64"])
    @pytest.mark.parametrize(
        "shape", [*itertools.product((2, 1), (4, 1), (70, 1), (130, 1))], ids=str
    )
    def test_every_broadcast(self, shape, kind, rng):
        inputs = inputs_of(rng, (70, 130))
        visible = rng.random(shape) < 0.6
        if kind == "bool":
            check(*inputs, mask=visible)
        else:
            bias = np.where(visible, rng.standard_normal(shape), -INF).astype(kind)
            check(*inputs, bias=bias)

    @dtypes
    @lengths
    def test_together(self, lengths, dtype, rng):
        inputs = inputs_of(rng, lengths, dtype)
        bias = rng.standard_normal((4, 1, lengths[1])).astype(dtype)
        check(*inputs, mask=rng.random(lengths) < 0.7, bias=bias, causal=True)

    def test_any_byte_but_zero_is_true(self, rng):
        inputs = inputs_of(rng, (70, 130))
        mask = rng.integers(0, 3, (70, 130), np.uint8)
        odd = mask.view(np.bool_)
        assert_same_bits(
            fastattn.attention(*inputs, mask=odd), fastattn.attention(*inputs, mask=mask > 0)
        )


class TestWindow:
    @pytest.mark.parametrize(
        "window", [(0, 0), (5, 0), (0, 9), (3, 70), (None, 2), (64, None), (None, None), (500, 500)]
    )
    @pytest.mark.parametrize("causal", [False, True, "top_left"])
    @lengths
    def test_against_the_reference(self, lengths, causal, window, rng):
        check(*inputs_of(rng, lengths), window=window, causal=causal)

    @dtypes
    def test_dtypes(self, dtype, rng):
        check(*inputs_of(rng, (70, 130), dtype), window=(20, 3))

    def test_offsets_and_lengths(self, rng):
        inputs = inputs_of(rng, (70, 130))
        check(*inputs, window=(20, 3), query_offset=[-10, 90])
        check(*inputs, window=(20, 3), kv_lengths=[0, 100])
        check(*inputs, window=(20, 3), kv_lengths=[30, 130], causal=True, query_offset=5)

    def test_it_is_a_mask(self, rng):
        inputs = inputs_of(rng, (70, 130))
        i, j = np.arange(70)[:, None] + 60, np.arange(130)
        mask = (i - 20 <= j) & (j <= i + 3)
        assert_same_bits(
            fastattn.attention(*inputs, window=(20, 3)), fastattn.attention(*inputs, mask=mask)
        )

    @pytest.mark.parametrize("window", [[2, 1], np.array([2, 1]), (2.0, np.int8(1)), (2**70, 1)])
    def test_kinds_of_bounds(self, window, rng):
        inputs = inputs_of(rng, (5, 7))
        same = fastattn.attention(*inputs, window=(min(int(window[0]), 100), 1))
        assert_same_bits(fastattn.attention(*inputs, window=window), same)


class TestSoftcap:
    @dtypes
    @lengths
    @pytest.mark.parametrize("softcap", [0.3, 5, 30.0])
    def test_against_the_reference(self, softcap, lengths, dtype, rng):
        check(*inputs_of(rng, lengths, dtype), softcap=softcap)

    @dtypes
    def test_a_wide_cap_changes_nothing(self, dtype, rng):
        """Up to 1e-8 of the cap a score is its own tangent."""
        inputs = inputs_of(rng, (70, 130), dtype)
        result = fastattn.attention(*inputs, softcap=1e9, return_lse=True)
        assert_accurate(result, *inputs)

    @dtypes
    @pytest.mark.parametrize("bad", [INF, -INF])
    def test_infinite_scores_end_at_the_cap(self, bad, dtype, rng):
        query, key, value = inputs_of(rng, (33, 70), dtype)
        query[:] = abs(query)
        key[..., 5, :] = bad
        check(query, key, value, softcap=2.0)


class TestAlibi:
    @dtypes
    @lengths
    @pytest.mark.parametrize("causal", [False, True, "top_left"])
    def test_against_the_reference(self, causal, lengths, dtype, rng):
        check(*inputs_of(rng, lengths, dtype), alibi_slopes=[0.5, 0.1, 0.0, -0.01], causal=causal)

    @pytest.mark.parametrize("batch", [(2,), (3, 2), (1, 2)], ids=str)
    def test_slopes_of_batch_entries(self, batch, rng):
        inputs = inputs_of(rng, (33, 70), batch=batch)
        slopes = rng.random((*batch, 4))
        check(*inputs, alibi_slopes=slopes)
        check(*inputs, alibi_slopes=slopes[..., :1, :], kv_lengths=50)
        check(*inputs, alibi_slopes=np.arange(4), query_offset=-3)

    def test_far_from_the_keys(self, rng):
        """Distances that float32 still counts one by one."""
        inputs = inputs_of(rng, (33, 70))
        check(*inputs, alibi_slopes=np.full(4, 1e-6), query_offset=10**7)


class TestSinks:
    @dtypes
    @lengths
    @pytest.mark.parametrize("sinks", [[0.0, 1.0, -2.0, 3.0], [-INF, 40.0, -40.0, -INF]], ids=str)
    def test_against_the_reference(self, sinks, lengths, dtype, rng):
        check(*inputs_of(rng, lengths, dtype), sinks=sinks)
        check(*inputs_of(rng, lengths, dtype), sinks=sinks, causal=True)

    @dtypes
    @lengths
    def test_row_that_sees_nothing(self, lengths, dtype, rng):
        inputs = inputs_of(rng, lengths, dtype)
        sinks = np.array([0.0, 1.0, -2.0, -INF])
        for keywords in (
            {"kv_lengths": 0},
            {"mask": np.zeros(lengths, bool)},
            {"bias": np.full(lengths, -INF)},
            {"mask_mod": lambda b, h, i, j: False},
            {"score_mod": lambda score, b, h, i, j: -np.inf},
        ):
            output, lse = fastattn.attention(*inputs, sinks=sinks, return_lse=True, **keywords)
            assert_array_equal(output, np.zeros_like(output))
            assert_array_equal(lse, np.broadcast_to(sinks[:, None], lse.shape))

    def test_none_is_minus_infinity(self, rng):
        for lengths in LENGTHS:
            inputs = inputs_of(rng, lengths)
            ours = fastattn.attention(*inputs, sinks=np.full(4, -INF), return_lse=True)
            assert_same(ours, fastattn.attention(*inputs, return_lse=True))


class TestScoreMod:
    @dtypes
    @lengths
    @pytest.mark.parametrize("score_mod", [shifted, hides_by_score], ids=["shifted", "hides"])
    def test_against_the_reference(self, score_mod, lengths, dtype, rng):
        check(*inputs_of(rng, lengths, dtype), score_mod=score_mod)
        check(*inputs_of(rng, lengths, dtype), score_mod=score_mod, causal=True)

    @lengths
    def test_identity_changes_no_bit(self, lengths, rng):
        inputs = inputs_of(rng, lengths)
        ours = fastattn.attention(*inputs, score_mod=lambda score, b, h, i, j: score)
        assert_same_bits(ours, fastattn.attention(*inputs))

    @lengths
    def test_it_is_a_bias(self, lengths, rng):
        inputs = inputs_of(rng, lengths)
        b, h, i, j = np.indices((len(inputs[0]), 4, *lengths))
        bias = (h - 2 * b + (i - j) % 4).astype(np.float32)
        ours = fastattn.attention(
            *inputs, score_mod=lambda score, b, h, i, j: score + (h - 2 * b + (i - j) % 4)
        )
        assert_same_bits(ours, fastattn.attention(*inputs, bias=bias))

    @lengths
    def test_it_cannot_show_what_a_bias_hides(self, lengths, rng):
        inputs = inputs_of(rng, lengths)
        bias = np.where(rng.random(lengths) < 0.5, -INF, 0.0)
        keywords = {"score_mod": lambda score, b, h, i, j: 0.1 * (i + j)}
        ours = fastattn.attention(*inputs, bias=bias, **keywords)
        assert_same_bits(ours, fastattn.attention(*inputs, mask=bias == 0, **keywords))

    def test_what_it_calls_and_holds(self, rng):
        inputs = inputs_of(rng, (33, 70))
        table = rng.standard_normal((4, 2)).astype(np.float32)

        def score_mod(table, factor, score, b, h, i, j):
            return helper(score, factor) + table[h, b % 2]

        def helper(score, factor):
            return score * factor

        held = functools.partial(score_mod, table, 2)
        expected = fastattn.attention(*inputs, scale=2 * 20**-0.5, bias=bias_of(table, inputs))
        assert_same_bits(fastattn.attention(*inputs, score_mod=held), expected)

    def test_division_by_zero_is_numpys(self, rng):
        """A positive score over 0 is inf, and inf - inf is NaN; a negative one hides the key."""
        query, key, value = inputs_of(rng, (5, 7))
        output = fastattn.attention(
            query, key, value, score_mod=lambda score, b, h, i, j: score / j
        )
        first = query @ np.repeat(key, 2, axis=1)[..., 0, :, None]
        assert_array_equal(np.isnan(output), np.broadcast_to(first > 0, output.shape))


def bias_of(table, inputs):
    """Return a table of heads and batch entries as a bias."""
    b = np.arange(len(inputs[0])) % 2
    return np.ascontiguousarray(table.T[b][..., None, None])


class TestMaskMod:
    @dtypes
    @lengths
    def test_against_the_reference(self, lengths, dtype, rng):
        check(*inputs_of(rng, lengths, dtype), mask_mod=scattered)
        check(*inputs_of(rng, lengths, dtype), mask_mod=scattered, causal=True, window=(40, 0))

    @lengths
    def test_it_is_a_mask(self, lengths, rng):
        inputs = inputs_of(rng, lengths)
        b, h, i, j = np.indices((len(inputs[0]), 4, *lengths))
        mask = scattered.py_func(b, h, i, j)
        ours = fastattn.attention(*inputs, mask_mod=scattered, return_lse=True)
        assert_same(ours, fastattn.attention(*inputs, mask=mask, return_lse=True))

    def test_batch_axes_count_as_one(self, rng):
        inputs = inputs_of(rng, (33, 70), batch=(3, 2))
        flat = [x.reshape(-1, *x.shape[2:]) for x in inputs]
        ours = fastattn.attention(*inputs, mask_mod=scattered, score_mod=shifted)
        theirs = fastattn.attention(*flat, mask_mod=scattered, score_mod=shifted)
        assert_same_bits(ours, theirs.reshape(ours.shape))

    def test_held_arguments(self, rng):
        """Numbers and arrays that functools.partial holds are read when it is called."""
        inputs = inputs_of(rng, (33, 70))
        for shift, table in ((30, [1, 1, 1]), (40, [1, 0]), (-5, [1])):
            check(*inputs, mask_mod=functools.partial(holding, shift, np.array(table)))


@pytest.mark.parametrize("offset", [2**48, -(2**48)])
@pytest.mark.parametrize("seqlen_q", [3, 40])
def test_farthest_positions(seqlen_q, offset, rng):
    """Without causal and window every query sees every key, wherever it stands."""
    query, key, value = make_inputs(rng, seqlen_q=seqlen_q, seqlen_kv=70)
    far = fastattn.attention(query, key, value, query_offset=offset)
    assert_same_bits(far, fastattn.attention(query, key, value))


class TestBlockMask:
    @pytest.mark.parametrize(
        "block_size", [(32, 64), (128, 128), (64, 192), (13, 50), (1, 1), (5, 200)]
    )
    @pytest.mark.parametrize("mask_mod", [scattered, masks.causal(60), masks.window(30, 0, 60)])
    def test_it_is_a_mask(self, mask_mod, block_size, rng):
        for lengths in LENGTHS:
            inputs = inputs_of(rng, lengths)
            shape = (len(inputs[0]), 4, *lengths)
            block_mask = create_block_mask(mask_mod, *shape, block_size=block_size)
            ours = fastattn.attention(*inputs, block_mask=block_mask, return_lse=True)
            assert_same(ours, fastattn.attention(*inputs, mask_mod=mask_mod, return_lse=True))
            mask = np.frompyfunc(getattr(mask_mod, "py_func", mask_mod), 4, 1)(*np.indices(shape))
            mask = mask.astype(bool)
            assert_same(ours, fastattn.attention(*inputs, mask=mask, return_lse=True))

    @dtypes
    def test_against_the_reference(self, dtype, rng):
        inputs = inputs_of(rng, (70, 130), dtype)
        block_mask = create_block_mask(scattered, 2, 4, 70, 130, block_size=(32, 64))
        check(*inputs, block_mask=block_mask)
        check(*inputs, block_mask=block_mask, causal=True, kv_lengths=[3, 100], mask_mod=shown)

    @pytest.mark.parametrize("batch", [1, 6])
    @pytest.mark.parametrize("heads", [1, 4])
    def test_axes_of_one_serve_all(self, batch, heads, rng):
        inputs = inputs_of(rng, (33, 70), batch=(3, 2))
        segments = rng.integers(0, 3, (batch, 33)), rng.integers(0, 3, (batch, 70))
        documents = masks.document(*segments)
        block_mask = create_block_mask(documents, batch, heads, 33, 70, block_size=16)
        mask = segments[0][:, :, None] == segments[1][:, None]
        mask = mask.reshape(*((3, 2) if batch == 6 else (1, 1)), 1, 33, 70)
        assert_same_bits(
            fastattn.attention(*inputs, block_mask=block_mask),
            fastattn.attention(*inputs, mask=mask),
        )

    def test_states_decide(self, rng):
        """A partial block is asked, no other: the reference says so, and states may be anyone's."""
        inputs = inputs_of(rng, (70, 130))
        for block_size in ((32, 64), (7, 9)):
            shape = [-(-n // size) for n, size in zip((70, 130), block_size, strict=True)]
            states = rng.integers(0, 3, (2, 4, *shape))
            check(
                *inputs,
                block_mask=fastattn.BlockMask(states, block_size, (2, 4, 70, 130), scattered),
            )

    def test_hidden_blocks_are_not_read(self, rng):
        """NaN in them would show, in keys and in values."""
        query, key, value = inputs_of(rng, (128, 256))
        block_mask = create_block_mask(masks.window(63, 0), 1, 1, 128, 256, block_size=64)
        expected = fastattn.attention(query, key, value, block_mask=block_mask)
        key[..., 128:, :] = value[..., 128:, :] = NAN
        assert_same_bits(fastattn.attention(query, key, value, block_mask=block_mask), expected)


@njit
def shown(b, h, i, j):
    return j % 9 != 4


KEYWORDS = {
    "mask": lambda rng, b, q, k: rng.random((b, 1, q, k)) < 0.8,
    "bias": lambda rng, b, q, k: np.where(rng.random((q, k)) < 0.1, -INF, rng.random((4, q, k))),
    "causal": lambda rng, b, q, k: [True, "top_left"][rng.integers(2)],
    "window": lambda rng, b, q, k: (int(rng.integers(0, 99)), [None, 3][rng.integers(2)]),
    "query_offset": lambda rng, b, q, k: rng.integers(-9, k, b),
    "kv_lengths": lambda rng, b, q, k: rng.integers(0, k + 1, b),
    "softcap": lambda rng, b, q, k: 4.0,
    "alibi_slopes": lambda rng, b, q, k: rng.random((b, 4)),
    "sinks": lambda rng, b, q, k: rng.standard_normal(4),
    "scale": lambda rng, b, q, k: -0.4,
    "score_mod": lambda rng, b, q, k: [shifted, hides_by_score][rng.integers(2)],
    "mask_mod": lambda rng, b, q, k: scattered,
    "block_mask": lambda rng, b, q, k: create_block_mask(
        masks.or_masks(masks.window(40, 9, k - q), shown), 1, 4, q, k, block_size=(32, 24)
    ),
    "precision": lambda rng, b, q, k: "highest",
}  # fmt: skip


class TestTogether:
    @settings(max_examples=120)
    @given(
        chosen=st.sets(st.sampled_from(sorted(KEYWORDS)), min_size=2),
        lengths=st.sampled_from([*LENGTHS, (40, 40), (9, 300)]),
        dtype=st.sampled_from(FLOAT_DTYPES),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_any_keywords(self, chosen, lengths, dtype, seed):
        rng = np.random.default_rng(seed)
        inputs = inputs_of(rng, lengths, dtype)
        batch = len(inputs[0])
        check(*inputs, **{name: KEYWORDS[name](rng, batch, *lengths) for name in sorted(chosen)})

    @dtypes
    @lengths
    def test_all_at_once(self, lengths, dtype, rng):
        inputs = inputs_of(rng, lengths, dtype)
        batch = len(inputs[0])
        keywords = {name: make(rng, batch, *lengths) for name, make in KEYWORDS.items()}
        output, lse = check(*inputs, **keywords)
        swapped = [np.ascontiguousarray(np.swapaxes(x, 1, 2)) for x in inputs]
        ours, our_lse = fastattn.attention(*swapped, layout="blhd", return_lse=True, **keywords)
        assert_same_bits(ours, np.ascontiguousarray(np.swapaxes(output, 1, 2)))
        assert_same_bits(our_lse, lse)

    @dtypes
    @lengths
    def test_threads_and_batch_change_no_bit(self, lengths, dtype, rng):
        inputs = inputs_of(rng, lengths, dtype)
        batch = len(inputs[0])
        keywords = {name: make(rng, batch, *lengths) for name, make in KEYWORDS.items()}
        keywords |= {
            "causal": True,
            "score_mod": lambda score, b, h, i, j: score + 0.1 * h,
            "mask_mod": shown,
        }
        before = fastattn.get_num_threads()
        results = []
        try:
            for n in (1, before):
                fastattn.set_num_threads(n)
                results.append(fastattn.attention(*inputs, return_lse=True, **keywords))
        finally:
            fastattn.set_num_threads(before)
        assert_same(*results)
        last = [x[-1:] for x in inputs]
        for name in ("mask", "query_offset", "kv_lengths", "alibi_slopes"):
            keywords[name] = keywords[name][-1:]
        alone = fastattn.attention(*last, return_lse=True, **keywords)
        assert_same(alone, tuple(x[-1:].copy() for x in results[0]))


class TestHidden:
    @dtypes
    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    @pytest.mark.parametrize("hide", ["window", "mask_mod", "block_mask", "score_mod", "softcap"])
    def test_rubbish_changes_no_bit(self, hide, bad, dtype, rng):
        """Keys 3, 60 and 100 on are hidden from everyone."""
        clean = make_inputs(rng, heads=2, seqlen_q=40, seqlen_kv=130, head_dim=24, dtype=dtype)
        hidden = np.isin(np.arange(130), [3, 60, *range(100, 130)])
        if hide == "window":
            hidden = np.arange(130) >= 100
            keywords = {"window": (200, 0), "query_offset": 60}
        else:
            keywords = {
                "mask_mod": {"mask_mod": seen},
                "block_mask": {"block_mask": create_block_mask(seen, 1, 1, 40, 130, (32, 64))},
                "score_mod": {
                    "score_mod": lambda score, b, h, i, j: score if seen(b, h, i, j) else -np.inf
                },
                "softcap": {"softcap": 3.0, "alibi_slopes": [0.1, 0.2], "mask": ~hidden},
            }[hide]
        rubbish = [x.copy() for x in clean]
        for x in rubbish[1:]:
            x[..., hidden, :] = bad
        for x in clean[1:]:
            x[..., hidden, :] = 0
        expected = fastattn.attention(*clean, return_lse=True, **keywords)
        assert np.isfinite(to_float64(expected[0])).all()
        assert_same(fastattn.attention(*rubbish, return_lse=True, **keywords), expected)

    @dtypes
    @lengths
    @pytest.mark.parametrize("hide", ["window", "mask_mod", "block_mask", "score_mod"])
    def test_rows_that_see_nothing(self, hide, lengths, dtype, rng):
        inputs = inputs_of(rng, lengths, dtype)
        keywords = {
            "window": {"window": (2, 0), "query_offset": -2},
            "mask_mod": {"mask_mod": lambda b, h, i, j: i > 1},
            "block_mask": {
                "block_mask": create_block_mask(lambda b, h, i, j: i > 1, 1, 1, *lengths, 2)
            },
            "score_mod": {"score_mod": lambda score, b, h, i, j: score if i > 1 else -np.inf},
        }[hide]
        output, lse = check(*inputs, **keywords)
        assert_array_equal(output[..., :2, :], np.zeros_like(output[..., :2, :]))
        assert_array_equal(lse[..., :2], np.full_like(lse[..., :2], -INF))
        assert np.isfinite(lse[..., 2:]).all()


@njit
def seen(b, h, i, j):
    return j != 3 and j != 60 and j < 100


class TestVarlen:
    LENGTHS_Q, LENGTHS_KV = [5, 0, 70, 1, 33, 200, 2], [9, 4, 0, 130, 33, 150, 64]

    def make(self, rng, dtype=np.float32, heads=(4, 2)):
        starts_q, starts_kv = (np.cumsum([0, *n]) for n in (self.LENGTHS_Q, self.LENGTHS_KV))
        query = rng.standard_normal((starts_q[-1], heads[0], 20)).astype(dtype)
        key = rng.standard_normal((starts_kv[-1], heads[1], 20)).astype(dtype)
        value = rng.standard_normal((starts_kv[-1], heads[1], 12)).astype(dtype)
        return query, key, value, starts_q, starts_kv

    def sequences(self, query, key, value, starts_q, starts_kv):
        for b in range(len(starts_q) - 1):
            rows, keys = (slice(*starts[b : b + 2]) for starts in (starts_q, starts_kv))
            yield b, rows, [x.swapaxes(0, 1) for x in (query[rows], key[keys], value[keys])]

    @dtypes
    @pytest.mark.parametrize("heads", [(4, 2), (3, 3), (8, 1)], ids=str)
    @pytest.mark.parametrize(
        "keywords",
        [{}, {"causal": True}, {"causal": "top_left", "window": (9, 0)}, {"window": (20, 4)}],
        ids=str,
    )
    def test_sequences_by_themselves(self, keywords, heads, dtype, rng):
        packed = self.make(rng, dtype, heads)
        output, lse = fastattn.varlen_attention(*packed, return_lse=True, **keywords)
        for _, rows, inputs in self.sequences(*packed):
            expected = reference.attention(*map(to_float64, inputs), return_lse=True, **keywords)
            bound = of_lse = 0.0
            if all(x.size for x in inputs):
                bound = rounding_bound(*inputs)
                of_lse = score_bound(*inputs[:2]) + inputs[1].shape[1] * rounding(lse.dtype)
            assert_within(output[rows].swapaxes(0, 1), expected[0], dtype, bound)
            assert_within(lse[:, rows], expected[1], lse.dtype, of_lse)

    @dtypes
    def test_few_queries_beside_fewer(self, dtype, rng):
        """All are decoded: where 12 take two registers, those beside them may take one.

        Met with AVX2 and SSE, and in float64 with AVX-512: rows were written anywhere.
        """
        queries, keys = np.array([2, 12, 1, 5]), np.array([9, 600, 700, 30])
        starts, key_starts = (np.cumsum([0, *n]) for n in (queries, keys))
        query = rng.standard_normal((starts[-1], 1, 8)).astype(dtype)
        key, value = rng.standard_normal((2, key_starts[-1], 1, 8)).astype(dtype)
        packed = query, key, value, starts, key_starts
        output = fastattn.varlen_attention(*packed, causal=True)
        for _, rows, inputs in self.sequences(*packed):
            assert_same_bits(output[rows].swapaxes(0, 1), fastattn.attention(*inputs, causal=True))

    def test_some_without_queries_beside_many(self, rng):
        query, key, value = rng.standard_normal((3, 40, 2, 8), dtype=np.float32)
        starts = [0, 0, 40, 40]
        output = fastattn.varlen_attention(query, key, value, starts, starts)
        alone = fastattn.attention(*(x.swapaxes(0, 1) for x in (query, key, value)))
        assert_same_bits(output.swapaxes(0, 1), alone)

    @dtypes
    @pytest.mark.parametrize("heads", [(4, 2), (3, 3), (8, 1)], ids=str)
    def test_every_keyword(self, heads, dtype, rng):
        """Against one call for each sequence, of the same kernel where it is long enough."""
        packed = self.make(rng, dtype, heads)
        slopes, offsets = rng.random((7, heads[0])), rng.integers(-5, 20, 7)
        keywords = {"causal": True, "window": (50, 0), "softcap": 3.0, "scale": 0.3}
        keywords["sinks"] = rng.standard_normal(heads[0])
        output, lse = fastattn.varlen_attention(
            *packed,
            **keywords,
            alibi_slopes=slopes,
            query_offset=offsets,
            score_mod=lambda score, b, h, i, j: score + 0.1 * (h - b),
            mask_mod=lambda b, h, i, j: (i + j + b) % 5 != 0,
            return_lse=True,
        )
        for b, rows, inputs in self.sequences(*packed):
            if rows.stop - rows.start >= 32:
                one = fastattn.attention(
                    *inputs,
                    **keywords,
                    alibi_slopes=slopes[b],
                    query_offset=int(offsets[b]),
                    score_mod=functools.partial(tilted, b),
                    mask_mod=functools.partial(striped, b),
                    return_lse=True,
                )
                assert_same(one, (output[rows].swapaxes(0, 1).copy(), lse[:, rows].copy()))

    def test_bits_do_not_depend_on_threads_or_neighbours(self, rng):
        query, key, value, starts_q, starts_kv = self.make(rng)
        before = fastattn.get_num_threads()
        results = []
        try:
            for n in (1, before):
                fastattn.set_num_threads(n)
                results.append(
                    fastattn.varlen_attention(query, key, value, starts_q, starts_kv, causal=True)
                )
        finally:
            fastattn.set_num_threads(before)
        assert_same(*results)
        last = query[starts_q[4] :], key[starts_kv[4] :], value[starts_kv[4] :]
        rest = starts_q[4:] - starts_q[4], starts_kv[4:] - starts_kv[4]
        ours = fastattn.varlen_attention(*last, *rest, causal=True)
        assert_same_bits(ours, results[0][starts_q[4] :])

    def test_strides_and_out(self, rng):
        packed = self.make(rng)
        expected = fastattn.varlen_attention(*packed)
        apart = [np.repeat(x, 2, axis=0)[::2] for x in packed[:3]]
        out = np.full((*expected.shape[:2], 24), 7, np.float32)
        given_out = out[..., ::2]
        assert fastattn.varlen_attention(*apart, *packed[3:], out=given_out) is given_out
        assert_same_bits(given_out.copy(), expected)
        assert (out[..., 1::2] == 7).all()

    @pytest.mark.parametrize("starts", [[0], [0, 0], [0, 0, 0]], ids=str)
    def test_nothing(self, starts):
        query, value = np.zeros((0, 2, 4)), np.zeros((0, 2, 3))
        output, lse = fastattn.varlen_attention(query, query, value, starts, return_lse=True)
        assert (output.shape, lse.shape) == ((0, 2, 3), (2, 0))

    def test_queries_without_keys(self):
        query, key = np.zeros((3, 2, 4)), np.zeros((0, 2, 4))
        output, lse = fastattn.varlen_attention(
            query, key, key, [0, 1, 3], [0, 0, 0], return_lse=True
        )
        assert_array_equal(output, 0)
        assert_array_equal(lse, -INF)

    @settings(max_examples=200)
    @given(
        starts_q=st.lists(st.integers(-9, 25), max_size=5),
        starts_kv=st.none() | st.lists(st.integers(-9, 25), max_size=5),
        ends=st.booleans(),
        offset=st.none()
        | st.integers(-(2**48), 2**48)
        | st.lists(st.integers(-30, 30), max_size=4),
    )
    def test_any_integers(self, starts_q, starts_kv, ends, offset):
        """They are refused, or the result is right: nothing else is ever read or written."""
        rng = np.random.default_rng(0)
        if ends:
            starts_q = [0, *sorted(abs(n) for n in starts_q), 25]
            starts_kv = starts_kv and [0, *sorted(abs(n) for n in starts_kv), 25]
        x = rng.standard_normal((25, 2, 4))
        arguments = (x, x, x, starts_q, starts_kv)
        keywords = {"query_offset": offset, "causal": True, "window": (7, 1)}
        try:
            output = fastattn.varlen_attention(*arguments, **keywords)
        except (TypeError, ValueError):
            return
        expected = reference.varlen_attention(*arguments, **keywords)
        np.testing.assert_allclose(output, expected, rtol=1e-12, atol=1e-12)


def tilted(b, score, _, h, i, j):
    return score + 0.1 * (h - b)


def striped(b, _, h, i, j):
    return (i + j + b) % 5 != 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_flat():
    """4096 x 4096 scores would take 64 MiB, or 16 as bytes."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    growths = dict(line.split() for line in run.stdout.splitlines())
    assert len(growths) == 9
    assert all(int(kibibytes) < 8 << 10 for kibibytes in growths.values()), growths


PROGRAM = """
from pathlib import Path
import numpy as np
import fastattn
from fastattn import masks

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])

n = 4096
x = np.ones((1, 1, n, 16), np.float32)
out = np.ones_like(x)
starts = np.arange(0, n + 1, 512)
block_mask = fastattn.create_block_mask(masks.causal(), 1, 1, n, n)
variants = {
    "window": dict(window=(255, 0)),
    "softcap": dict(softcap=3.0),
    "alibi": dict(alibi_slopes=[0.1]),
    "sinks": dict(sinks=[0.1]),
    "score_mod": dict(score_mod=lambda s, b, h, i, j: s + 1),
    "mask_mod": dict(mask_mod=lambda b, h, i, j: i != j),
    "block_mask": dict(block_mask=block_mask),
    "padding": dict(mask=np.arange(n) < n - 9),
}
calls = {
    name: lambda keywords=keywords: fastattn.attention(x, x, x, out=out, **keywords)
    for name, keywords in variants.items()
}
packed, packed_out = x[0, 0, :, None], out[0, 0, :, None]
calls["varlen"] = lambda: fastattn.varlen_attention(packed, packed, packed, starts, out=packed_out)
for name, call in calls.items():
    call()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call()
    print(name, status("VmHWM") - before)
"""
