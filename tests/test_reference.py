"""The reference against numbers worked by hand and against torch, which wrote its own."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from checks import make_inputs
from numba import njit
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import reference
from fastattn.reference import (
    attention,
    attention_weights,
    merge_states,
    scaled_dot_product_attention,
    varlen_attention,
)

NAN, INF = np.nan, np.inf

# Scores in closed form: with a scale of 1 and one feature, score(i, j) = query[i] * key[j].
ONE_QUERY = np.array([[1.0]])


def visible(seqlen_q, seqlen_kv, **keywords):
    """Return as 0 and 1 which keys the queries see, from the weights of equal scores."""
    query, key = np.zeros((seqlen_q, 1)), np.zeros((seqlen_kv, 1))
    return (attention_weights(query, key, **keywords) > 0).astype(int).tolist()


class TestSoftmax:
    def test_two_keys(self):
        """Scores log 3 and 0 have weights 3/4 and 1/4, and lse log 4."""
        key, value = np.array([[np.log(3)], [0.0]]), np.array([[4.0, 8.0], [0.0, -8.0]])
        output, lse = attention(ONE_QUERY, key, value, scale=1, return_lse=True)
        assert_allclose(output, [[3.0, 4.0]], rtol=1e-15)
        assert_allclose(lse, [np.log(4)], rtol=1e-15)

    def test_weights_of_integer_ratio(self):
        key = np.log([[1.0], [2.0], [5.0]])
        assert_allclose(attention_weights(ONE_QUERY, key, scale=1), [[1 / 8, 2 / 8, 5 / 8]])

    def test_equal_scores_give_the_mean(self):
        value = np.array([[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]])
        output, lse = attention(np.ones((1, 4)), np.ones((3, 4)), value, return_lse=True)
        assert_allclose(output, [[3.0, 30.0]], rtol=1e-15)
        assert_allclose(lse, [2.0 + np.log(3)], rtol=1e-15)  # 4 ones / sqrt(4) is a score of 2

    def test_far_apart_scores_pick_one_value(self):
        """A softmax of scores 1000 apart is one-hot; without its shift it would overflow."""
        query = key = 1000 * np.eye(3)
        value = np.arange(6.0).reshape(3, 2)
        assert_array_equal(attention(query, key, value), value)

    def test_one_key(self):
        output, lse = attention([[3.0]], [[-5.0]], [[7.0]], scale=0.5, return_lse=True)
        assert (output.item(), lse.item()) == (7.0, -7.5)

    @pytest.mark.parametrize(
        ("scale", "weights"), [(0, [1 / 2, 1 / 2]), (1, [3 / 4, 1 / 4]), (-1, [1 / 4, 3 / 4])]
    )
    def test_scale(self, scale, weights):
        key = np.array([[np.log(3)], [0.0]])
        assert_allclose(attention_weights(ONE_QUERY, key, scale=scale), [weights], rtol=1e-15)

    def test_scale_is_one_over_root_of_head_dim(self):
        query, key = np.full((1, 16), 2.0), np.full((1, 16), 3.0)
        assert attention_weights(query, key, stage="scores").item() == 16 * 2 * 3 / 4


class TestOrderOfOperations:
    def test_stages(self):
        """Scores 2, 4, 6; bias 10 on the first, -inf on the last; the second masked."""
        key, bias = np.array([[1.0], [2.0], [3.0]]), np.array([[10.0, 1.0, -INF]])
        keywords = {"bias": bias, "mask": np.array([True, False, True]), "scale": 2}
        for stage, expected in {
            "scores": [2.0, 4.0, 6.0],
            "softcapped": [2.0, 4.0, 6.0],
            "biased": [12.0, -INF, -INF],
            "probabilities": [1.0, 0.0, 0.0],
        }.items():
            weights = attention_weights(ONE_QUERY, key, stage=stage, **keywords)
            assert_array_equal(weights, [expected], err_msg=stage)

    def test_stages_of_every_step(self):
        """Scores 2, -2, 4, 2; each step changes what the one before it left."""
        key = np.array([[1.0], [-1.0], [2.0], [1.0]])
        keywords = {
            "scale": 2,
            "softcap": 2.0,
            "alibi_slopes": [0.5],
            "query_offset": 1,
            "bias": np.array([[0.0, 1.0, 0.0, 0.0]]),
            "score_mod": lambda score, b, h, i, j: 10 * score,
            "mask_mod": lambda b, h, i, j: j != 2,
            "window": (None, 1),
        }
        one, two = 2 * np.tanh(1), 2 * np.tanh(2)
        for stage, expected in {
            "scores": [2.0, -2.0, 4.0, 2.0],
            "softcapped": [one, -one, two, one],
            "biased": [10 * (one - 0.5), 10 * (-one + 1), -INF, -INF],
        }.items():
            weights = attention_weights(ONE_QUERY, key, stage=stage, **keywords)
            assert_allclose(weights, [expected], rtol=1e-15, err_msg=stage)

    def test_bias_is_not_scaled(self):
        key, bias = np.zeros((2, 1)), np.log([[3.0, 1.0]])
        assert_allclose(attention_weights(ONE_QUERY, key, bias=bias, scale=9), [[0.75, 0.25]])

    @pytest.mark.parametrize("rows", [1, -1, slice(1, None, 2), [2, 0, 0], np.array([1])])
    def test_rows(self, rows, rng):
        query, key, _ = make_inputs(rng, seqlen_q=4, dtype=np.float64)
        keywords = {
            "causal": True,
            "mask": rng.random((4, 7)) < 0.7,
            "bias": rng.standard_normal((2, 1, 4, 7)),
            "alibi_slopes": [0.3, 0.2, 0.1],
            "mask_mod": lambda b, h, i, j: i + h != j,
            "score_mod": lambda score, b, h, i, j: score + b - i * j,
        }
        whole = attention_weights(query, key, **keywords)
        part = attention_weights(query, key, rows=rows, **keywords)
        assert part.shape == whole[..., rows, :].shape
        assert_allclose(part, whole[..., rows, :], rtol=1e-13)


class TestVisibility:
    def test_causal_drawings(self):
        bottom_right = [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
        assert visible(2, 5, causal=True) == bottom_right
        assert visible(2, 5, causal="bottom_right") == bottom_right
        assert visible(2, 5, causal="top_left") == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
        assert visible(2, 5, causal=False) == [[1] * 5] * 2

    def test_causal_drawings_with_more_queries_than_keys(self):
        assert visible(4, 2, causal=True) == [[0, 0], [0, 0], [1, 0], [1, 1]]
        assert visible(4, 2, causal="top_left") == [[1, 0], [1, 1], [1, 1], [1, 1]]

    @pytest.mark.parametrize(
        ("offset", "expected"),
        [
            (-1, [[0, 0, 0], [1, 0, 0]]),
            (0, [[1, 0, 0], [1, 1, 0]]),
            (1, [[1, 1, 0], [1, 1, 1]]),
            (-9, [[0, 0, 0], [0, 0, 0]]),
            (9, [[1, 1, 1], [1, 1, 1]]),
        ],
    )
    @pytest.mark.parametrize("causal", [True, "bottom_right", "top_left"])
    def test_query_offset_overrides_the_alignment(self, causal, offset, expected):
        assert visible(2, 3, causal=causal, query_offset=offset) == expected

    def test_query_offset_without_causal_hides_nothing(self):
        assert visible(2, 3, query_offset=-9) == [[1, 1, 1], [1, 1, 1]]

    def test_kv_lengths(self):
        assert visible(2, 3, kv_lengths=0) == [[0, 0, 0], [0, 0, 0]]
        assert visible(2, 3, kv_lengths=2) == [[1, 1, 0], [1, 1, 0]]

    def test_bottom_right_is_the_end_of_the_length(self):
        assert visible(2, 4, kv_lengths=3, causal=True) == [[1, 1, 0, 0], [1, 1, 1, 0]]
        assert visible(2, 4, kv_lengths=1, causal=True) == [[0, 0, 0, 0], [1, 0, 0, 0]]
        assert visible(2, 4, kv_lengths=1, causal="top_left") == [[1, 0, 0, 0], [1, 0, 0, 0]]

    def test_lengths_and_offsets_of_a_batch(self):
        query, key = np.zeros((2, 1, 2, 1)), np.zeros((2, 1, 4, 1))
        for lengths in (np.array([1, 3]), np.array([1, 3], np.uint8)):
            weights = attention_weights(query, key, kv_lengths=lengths, causal=True)
            assert (weights[0, 0] > 0).tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]
            assert (weights[1, 0] > 0).tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
        weights = attention_weights(query, key, query_offset=np.array([0, 2]), causal=True)
        assert (weights[0, 0] > 0).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
        assert (weights[1, 0] > 0).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]

    @pytest.mark.parametrize(
        ("window", "expected"),
        [
            ((1, 0), [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]),
            ((0, 1), [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]),
            ((1, None), [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]),
            ((None, 0), [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
            ((0, 0), [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]),
            ((None, None), [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
            ((9, 9), [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
        ],
        ids=str,
    )
    def test_window_drawings(self, window, expected):
        """Without causal the queries stand at the end of the keys, as with it."""
        assert visible(2, 5, window=window) == expected

    def test_window_and_alignment(self):
        assert visible(2, 5, window=(1, 1), causal="top_left") == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
        assert visible(2, 5, window=(1, 9), causal=True) == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
        assert visible(2, 5, window=(0, 0), query_offset=1) == [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
        assert visible(2, 5, window=(1, 0), kv_lengths=3) == [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
        assert visible(3, 1, window=(0, 1)) == [[0], [1], [1]]

    def test_mask_mod(self):
        assert visible(2, 3, mask_mod=lambda b, h, i, j: i != j) == [[0, 1, 1], [1, 0, 1]]

    def test_mask_mod_knows_batch_entry_and_query_head(self):
        query, key = np.zeros((3, 2, 4, 1, 1)), np.zeros((3, 2, 2, 24, 1))
        mask_mod = lambda b, h, i, j: j == 4 * b + h  # noqa: E731
        weights = attention_weights(query, key, mask_mod=mask_mod)
        assert_array_equal(weights.argmax(-1).ravel(), np.arange(24))
        assert_array_equal(weights.max(-1), 1)

    @pytest.mark.parametrize("heads", [1, 2])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_block_mask(self, batch, heads):
        """Blocks of 2 x 3 on 3 x 5 scores; a partial block asks, and only that."""
        states = np.array([[2, 0], [1, 2]], np.int8)
        blocks = Blocks(np.tile(states, (batch, heads, 1, 1)), (2, 3), lambda b, h, i, j: j == 1)
        expected = [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]]
        query, key = np.zeros((3, 2, 3, 1)), np.zeros((3, 1, 5, 1))
        weights = attention_weights(query, key, block_mask=blocks)
        assert_array_equal(weights > 0, np.broadcast_to(expected, weights.shape))
        weights = attention_weights(query, key, block_mask=blocks, rows=2)
        assert_array_equal(weights > 0, np.broadcast_to(expected[2], weights.shape))

    def test_block_mask_for_each_batch_entry_and_head(self):
        states = np.array([[[[2]], [[0]]], [[[0]], [[2]]]], np.int8)
        blocks = Blocks(states, (4, 4), lambda b, h, i, j: False)
        weights = attention_weights(
            np.zeros((1, 2, 2, 3, 1)), np.zeros((1, 2, 2, 4, 1)), block_mask=blocks
        )
        assert_array_equal(weights[0, :, :, 0, 0] > 0, [[True, False], [False, True]])

    def test_everything_composes(self):
        mask = np.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]], bool)
        bias = np.array([-INF, 0, 0, 0, 0])
        drawn = visible(2, 5, causal=True, kv_lengths=4, mask=mask, bias=bias)
        assert drawn == [[0, 1, 0, 0, 0], [0, 1, 1, 1, 0]]


class Blocks(NamedTuple):
    """What the reference reads of a BlockMask."""

    states: np.ndarray
    block_size: tuple[int, int]
    mask_mod: Callable[..., bool]


class TestSoftcap:
    def test_numbers(self):
        """tanh of an odd multiple of log(2) / 2 is rational: 3/5 of log(2), 15/17 of log(4)."""
        key = 10 * np.log([[2.0], [4.0], [0.5]])
        scores = attention_weights(ONE_QUERY, key, stage="softcapped", scale=1, softcap=10)
        assert_allclose(scores, [[6.0, 150 / 17, -6.0]], rtol=1e-15)

    def test_limits(self):
        key = np.array([[1e-3], [1e6], [-INF], [INF], [NAN]])
        scores = attention_weights(ONE_QUERY, key, stage="softcapped", scale=1, softcap=30)
        assert_allclose(scores, [[1e-3, 30, -30, 30, NAN]], rtol=1e-9)

    def test_it_comes_before_the_bias(self):
        bias = np.array([[100.0, 0.0]])
        scores = attention_weights(
            ONE_QUERY, np.zeros((2, 1)), stage="biased", bias=bias, softcap=1
        )
        assert_array_equal(scores, bias)


class TestAlibi:
    def test_drawing(self):
        weights = attention_weights(
            np.zeros((2, 1)), np.zeros((5, 1)), stage="biased", alibi_slopes=[1.0]
        )
        assert_array_equal(weights, [[-3, -2, -1, 0, -1], [-4, -3, -2, -1, 0]])

    def test_alignment(self):
        query, key = np.zeros((1, 1)), np.zeros((3, 1))
        for keywords, expected in (
            ({"causal": "top_left"}, [0, -INF, -INF]),
            ({"query_offset": 0}, [0, -0.5, -1]),
            ({"query_offset": -1}, [-0.5, -1, -1.5]),
            ({"kv_lengths": 2}, [-0.5, 0, -INF]),
        ):
            scores = attention_weights(query, key, stage="biased", alibi_slopes=[0.5], **keywords)
            assert_array_equal(scores, [expected], err_msg=str(keywords))

    def test_slopes_of_heads_and_batch_entries(self):
        query, key = np.zeros((2, 2, 1, 1)), np.zeros((2, 1, 2, 1))
        scores = attention_weights(query, key, stage="biased", alibi_slopes=[1, 2])
        assert_array_equal(scores[:, :, 0, 0], [[-1, -2], [-1, -2]])
        scores = attention_weights(query, key, stage="biased", alibi_slopes=[[1, 2], [3, 4]])
        assert_array_equal(scores[:, :, 0, 0], [[-1, -2], [-3, -4]])


class TestSinks:
    def test_two_keys(self):
        """Scores log 3 and 0 and a sink of log 4: weights 3/8 and 1/8, the rest is the sink's."""
        key, value = np.array([[np.log(3)], [0.0]]), np.array([[8.0], [16.0]])
        keywords = {"scale": 1, "sinks": np.log([4.0])}
        output, lse = attention(ONE_QUERY, key, value, return_lse=True, **keywords)
        assert_allclose(output, [[5.0]], rtol=1e-15)
        assert_allclose(lse, [np.log(8)], rtol=1e-15)
        assert_allclose(attention_weights(ONE_QUERY, key, **keywords), [[3 / 8, 1 / 8]])

    def test_a_sink_for_each_head(self):
        query, key = np.zeros((2, 1, 1)), np.zeros((1, 1, 1))
        output = attention(query, key, np.ones((1, 1, 1)), sinks=np.log([1.0, 3.0]))
        assert_allclose(output.ravel(), [1 / 2, 1 / 4], rtol=1e-15)

    def test_a_sink_alone(self):
        """A row that sees no key: output 0, lse the sink itself."""
        output, lse = attention(
            ONE_QUERY, [[1.0]], [[NAN]], sinks=[0.3], kv_lengths=0, return_lse=True
        )
        assert (output.item(), lse.item()) == (0.0, 0.3)

    @pytest.mark.parametrize("sink", [1000.0, -1000.0])
    def test_far_from_the_scores(self, sink):
        output, lse = attention(ONE_QUERY, [[1.0]], [[5.0]], sinks=[sink], return_lse=True)
        assert (output.item(), lse.item()) == ((0.0, 1000.0) if sink > 0 else (5.0, 1.0))

    def test_minus_inf_is_no_sink(self, rng):
        inputs = make_inputs(rng)
        lengths = {"kv_lengths": [0, 7], "return_lse": True}
        for ours, expected in zip(
            attention(*inputs, sinks=np.full(3, -INF), **lengths),
            attention(*inputs, **lengths),
            strict=True,
        ):
            assert_array_equal(ours, expected)


class TestScoreMod:
    def test_it_sees_the_score_and_where_it_stands(self):
        query, key = np.ones((2, 2, 3, 1)), np.arange(4.0).reshape(1, 1, 4, 1)

        def score_mod(score, b, h, i, j):
            return score + 10 * i + 100 * h + 1000 * b

        scores = attention_weights(query, key, stage="biased", score_mod=score_mod)
        b, h, i, j = np.indices((2, 2, 3, 4))
        assert_array_equal(scores, j + 10 * i + 100 * h + 1000 * b)

    def test_minus_inf_hides(self):
        def score_mod(score, b, h, i, j):
            return -INF if j == 1 else score

        value = np.array([[1.0], [NAN], [3.0]])
        assert attention(ONE_QUERY, np.zeros((3, 1)), value, score_mod=score_mod).item() == 2.0
        output, lse = attention(
            ONE_QUERY, np.zeros((3, 1)), value, return_lse=True, score_mod=lambda *_: -INF
        )
        assert (output.item(), lse.item()) == (0.0, -INF)

    def test_it_cannot_show_what_a_bias_hides(self):
        bias = np.array([0.0, -INF])
        scores = attention_weights(
            ONE_QUERY, np.zeros((2, 1)), stage="biased", bias=bias, score_mod=lambda *_: 7.0
        )
        assert_array_equal(scores, [[7.0, -INF]])

    def test_jitted(self):
        score_mod = njit(lambda score, b, h, i, j: 2 * score)
        scores = attention_weights(ONE_QUERY, [[3.0]], stage="biased", score_mod=score_mod)
        assert scores.item() == 6.0


class TestVarlen:
    @pytest.mark.parametrize("causal", [False, True, "top_left"])
    def test_sequences_by_themselves(self, causal, rng):
        """Lengths 2, 0, 3 and 1 of queries, 3, 2, 0 and 4 of keys."""
        starts_q, starts_kv = [0, 2, 2, 5, 6], [0, 3, 5, 5, 9]
        query = rng.standard_normal((6, 4, 5))
        key, value = rng.standard_normal((9, 2, 5)), rng.standard_normal((9, 2, 3))
        slopes, offsets = rng.random((4, 4)), np.array([1, 0, 2, 1])
        keywords = {"causal": causal, "window": (2, 1), "sinks": rng.random(4), "softcap": 2.0}
        output, lse = varlen_attention(
            query,
            key,
            value,
            starts_q,
            starts_kv,
            return_lse=True,
            **keywords,
            alibi_slopes=slopes,
            query_offset=offsets,
            score_mod=lambda score, b, h, i, j: score + b * h - i + j,
            mask_mod=lambda b, h, i, j: (i + j + b) % 3 > 0,
        )
        assert (output.shape, lse.shape) == ((6, 4, 3), (4, 6))
        for b in range(4):
            rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_kv[b : b + 2])
            i, j = np.ogrid[: rows.stop - rows.start, : keys.stop - keys.start]
            h = np.arange(4)[:, None, None]
            one, one_lse = attention(
                query[rows].swapaxes(0, 1),
                key[keys].swapaxes(0, 1),
                value[keys].swapaxes(0, 1),
                return_lse=True,
                **keywords,
                alibi_slopes=slopes[b],
                query_offset=offsets[b],
                bias=b * h - i + j,
                mask=(i + j + b) % 3 > 0,
            )
            assert_allclose(output[rows].swapaxes(0, 1), one, rtol=1e-12)
            assert_allclose(lse[:, rows], one_lse, rtol=1e-12)

    def test_keys_have_the_lengths_of_the_queries(self, rng):
        x = rng.standard_normal((5, 1, 3))
        out = np.empty((5, 1, 3))
        assert varlen_attention(x, x, x, [0, 2, 5], out=out) is out
        assert_array_equal(out, varlen_attention(x, x, x, [0, 2, 5], [0, 2, 5]))
        first = attention(x[:2, 0], x[:2, 0], x[:2, 0])
        assert_allclose(out[:2, 0], first, rtol=1e-14)


class TestNothingVisible:
    @pytest.mark.parametrize(
        "keywords",
        [
            {"mask": np.array([[True, True], [False, False]])},
            {"bias": np.array([[0.0, 0.0], [-INF, -INF]])},
            {"mask": np.array([True, False]), "bias": np.array([[0.0, 0.0], [-INF, 0.0]])},
        ],
    )
    def test_row_is_zero(self, keywords):
        query = np.array([[1.0], [NAN]])
        output, lse = attention(query, query[:1], [[5.0]], kv_lengths=0, return_lse=True)
        assert_array_equal(output, [[0.0], [0.0]])
        assert_array_equal(lse, [-INF, -INF])
        keys = np.ones((2, 1))
        output, lse = attention(query, keys, 5 * keys, return_lse=True, **keywords)
        assert_array_equal(output, [[5.0], [0.0]])
        assert (np.isfinite(lse[0]), lse[1]) == (True, -INF)
        assert_array_equal(attention_weights(query, keys, **keywords)[1], [0.0, 0.0])

    @pytest.mark.parametrize("shape", [(2, 3), (4, 2, 3), (5, 4, 2, 3)])
    def test_no_keys(self, shape):
        key = np.zeros((*shape[:-2], 0, 3))
        output, lse = attention(np.ones(shape), key, key[..., :2], return_lse=True, causal=True)
        assert_array_equal(output, np.zeros((*shape[:-1], 2)))
        assert_array_equal(lse, np.full(shape[:-1], -INF))

    def test_no_queries_and_no_batch(self, rng):
        for axis in (0, 2):
            query, key, value = make_inputs(rng)
            query = query[(slice(None),) * axis + (slice(0),)]
            if axis == 0:
                key, value = key[:0], value[:0]
            output, lse = attention(query, key, value, causal=True, return_lse=True)
            assert (output.shape, lse.shape) == (query.shape, query.shape[:-1])


class TestNanAndInf:
    """Four keys of which the causal mask shows the first query three, the second four."""

    query, key = np.ones((2, 1)), np.ones((4, 1))
    value = np.array([[3.0], [6.0], [9.0], [2.0]])

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_hidden_key_and_value(self, bad):
        key, value = self.key.copy(), self.value.copy()
        key[3] = value[3] = bad
        output, lse = attention(self.query, key, value, causal=True, return_lse=True)
        assert_allclose(output[0], [6.0], rtol=1e-15)
        assert_allclose(lse[0], 1 + np.log(3), rtol=1e-15)

    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_hidden_bias(self, bad):
        bias = np.array([0, 0, 0, bad])
        assert_allclose(attention(self.query, self.key, self.value, bias=bias, causal=True)[0], 6.0)

    def test_bias_of_minus_inf_hides_nan(self):
        key, value = self.key.copy(), self.value.copy()
        key[1] = value[1] = NAN
        bias = np.array([0, -INF, 0, -INF])
        assert_allclose(attention(self.query, key, value, bias=bias), [[6.0], [6.0]], rtol=1e-15)

    def test_visible_nan_is_seen(self):
        key, value = self.key.copy(), self.value.copy()
        key[3] = NAN
        assert_array_equal(
            np.isnan(attention(self.query, key, value, causal=True)), [[False], [True]]
        )
        value[3] = NAN
        output = attention(self.query, self.key, value, causal=True)
        assert_array_equal(np.isnan(output), [[False], [True]])

    def test_visible_inf_follows_ieee(self):
        value = np.array([[INF, 1.0], [1.0, -INF], [INF, 1.0], [1.0, 1.0]])
        output = attention(self.query, self.key, value, causal=True)
        assert_array_equal(output, [[INF, -INF], [INF, -INF]])
        value[1, 0] = -INF
        assert np.isnan(attention(self.query, self.key, value)[:, 0]).all()  # inf - inf

    def test_bias_of_the_least_finite_number_does_not_hide(self):
        bias = np.full(4, np.finfo(np.float64).min)
        assert_allclose(attention(self.query, self.key, self.value, bias=bias), [[5.0], [5.0]])

    def test_minus_inf_of_a_product_does_not_hide(self):
        """exp(-inf) is 0 beside other keys, but 0 * inf is what it is."""
        key, value = np.array([[1.0], [-INF]]), np.array([[3.0], [8.0]])
        assert attention(ONE_QUERY, key, value).item() == 3.0
        assert np.isnan(attention(ONE_QUERY, key, [[3.0], [INF]])).item()


class TestShapes:
    def test_query_heads_share_kv_heads_in_order(self):
        """Of four query heads on two kv heads, 0 and 1 read the first, 2 and 3 the second."""
        query, key = np.ones((4, 1, 1)), np.ones((2, 1, 1))
        output = attention(query, key, np.array([[[10.0]], [[20.0]]]))
        assert output.ravel().tolist() == [10.0, 10.0, 20.0, 20.0]

    def test_groups_equal_repeated_heads(self, rng):
        query, key, value = make_inputs(rng, heads=6, kv_heads=2)
        repeated = [np.repeat(x, 3, axis=-3) for x in (key, value)]
        assert_array_equal(attention(query, key, value), attention(query, *repeated))

    @pytest.mark.parametrize("batch", [(), (2,), (3, 2), (1, 3, 2)])
    def test_heads_and_batch_are_computed_alone(self, batch, rng):
        query, key, value = make_inputs(rng, batch=batch, head_dim_v=4)
        output, lse = attention(query, key, value, causal=True, return_lse=True)
        assert (output.shape, lse.shape) == ((*batch, 3, 5, 4), (*batch, 3, 5))
        for index in np.ndindex(*batch, 3):
            one, one_lse = attention(
                query[index], key[index], value[index], causal=True, return_lse=True
            )
            assert_allclose(output[index], one, rtol=1e-5)
            assert_allclose(lse[index], one_lse, rtol=1e-5)

    def test_batch_axes_broadcast(self, rng):
        query, key, value = make_inputs(rng, batch=(3, 2))
        query, key, value = query[:, :1], key[0, 0], value[:1]
        whole = [np.broadcast_to(x, (3, 2, *x.shape[-3:])) for x in (query, key, value)]
        output = attention(query, key, value)
        assert output.shape == (3, 2, 3, 5, 20)
        assert_array_equal(output, attention(*whole))

    def test_lengths_broadcast_to_the_batch_axes(self, rng):
        inputs = make_inputs(rng, batch=(3, 2))
        lengths = np.array([[3], [0], [7]])
        whole = np.broadcast_to(lengths, (3, 2))
        assert_array_equal(
            attention(*inputs, kv_lengths=lengths), attention(*inputs, kv_lengths=whole)
        )

    def test_blhd(self, rng):
        inputs = make_inputs(rng, heads=4, kv_heads=2, head_dim_v=3)
        mask = rng.random((2, 4, 5, 7)) < 0.7
        output, lse = attention(*inputs, mask=mask, return_lse=True)
        swapped = [np.swapaxes(x, 1, 2) for x in inputs]
        given = np.empty((2, 5, 4, 3), np.float32)
        ours, our_lse = attention(*swapped, mask=mask, layout="blhd", return_lse=True, out=given)
        assert ours is given
        assert_array_equal(ours, np.swapaxes(output, 1, 2))
        assert_array_equal(our_lse, lse)

    def test_out_is_written_and_returned(self, rng):
        inputs = make_inputs(rng)
        out = np.empty((2, 3, 5, 40), np.float32)[..., ::2]
        assert attention(*inputs, out=out) is out
        assert_array_equal(out, attention(*inputs))


class TestDtypes:
    @pytest.mark.parametrize(
        ("dtypes", "result", "lse"),
        [
            (("float32", "float32", "float32"), "float32", "float32"),
            (("float64", "float64", "float64"), "float64", "float64"),
            (("float16", "float16", "float16"), "float16", "float32"),
            (("bfloat16", "bfloat16", "bfloat16"), "bfloat16", "float32"),
            (("float16", "float32", "float32"), "float32", "float32"),
            (("bfloat16", "float32", "bfloat16"), "float32", "float32"),
            (("float32", "float16", "float64"), "float64", "float64"),
            (("int64", "int8", "bool"), "float64", "float64"),
            (("int8", "float16", "float16"), "float16", "float32"),
            (("int64", "float32", "float32"), "float64", "float64"),
            ((">f4", ">f4", ">f4"), "float32", "float32"),
        ],
    )
    def test_result(self, dtypes, result, lse):
        inputs = [np.ones((2, 2)).astype(dtype) for dtype in dtypes]
        output = attention(*inputs, bias=np.zeros(2, np.float64), return_lse=True)
        assert [x.dtype.name for x in output] == [result, lse]
        assert all(x.dtype.isnative for x in output)

    @pytest.mark.parametrize(
        "dtypes",
        [
            ("float16", "bfloat16", "bfloat16"),
            ("float16", "bfloat16", "float32"),
            ("longdouble", "float32", "float32"),
            ("complex64", "float32", "float32"),
            ("object", "float32", "float32"),
            ("float8_e4m3fn", "float32", "float32"),
            ([("x", "f4")], "float32", "float32"),
            ("datetime64[s]", "float32", "float32"),
        ],
        ids=str,
    )
    def test_refused(self, dtypes):
        inputs = [np.zeros((2, 2), dtype) for dtype in dtypes]
        with pytest.raises(TypeError):
            attention(*inputs)

    def test_nested_lists(self):
        output = attention([[1, 0]], [[1, 0], [0, 1]], [[2], [4]], scale=0)
        assert (output.dtype, output.tolist()) == (np.float64, [[3.0]])

    def test_weights_have_the_type_of_query_and_key(self):
        query, key = np.ones((2, 2), np.float16), np.ones((2, 2), np.float32)
        assert attention_weights(query, query).dtype == np.float16
        assert attention_weights(query, key, stage="scores").dtype == np.float32

    @pytest.mark.parametrize(
        "keywords",
        [
            {"bias": np.ones(2, bool)},
            {"bias": np.ones(2, complex)},
            {"mask": np.ones(2, int)},
            {"mask": np.ones(2, np.float32)},
        ],
        ids=str,
    )
    def test_mask_is_bool_and_bias_is_not(self, keywords):
        with pytest.raises(TypeError):
            attention(np.eye(2), np.eye(2), np.eye(2), **keywords)

    def test_sixteen_bit_scores_do_not_overflow(self):
        """200 * 200 * 64 is far beyond the largest float16, and so is 1 / 8 of it."""
        query = np.full((1, 64), 200, np.float16)
        output, lse = attention(query, query, query, return_lse=True)
        assert (output[0, 0], lse.item()) == (200.0, 200 * 200 * 64 / 8)


class TestMergeStates:
    def test_two_parts(self):
        """Denominators 3 and 1 weigh the outputs 3/4 and 1/4, and add up to 4."""
        output, lse = merge_states([[[4.0, 0.0]], [[0.0, 8.0]]], [np.log([3.0]), np.log([1.0])])
        assert_allclose(output, [[3.0, 2.0]], rtol=1e-15)
        assert_allclose(lse, np.log([4.0]), rtol=1e-15)

    @pytest.mark.parametrize("cuts", [[3], [0, 3], [1, 2, 6], [7]])
    def test_parts_make_the_whole(self, cuts, rng):
        query, key, value = make_inputs(rng, dtype=np.float64)
        parts = [
            attention(query, *kv, return_lse=True)
            for kv in zip(np.split(key, cuts, -2), np.split(value, cuts, -2), strict=True)
        ]
        outputs, lses = zip(*parts, strict=True)
        whole = attention(query, key, value, return_lse=True)
        for merged in (
            merge_states(outputs, lses),
            merge_states(np.array(outputs), np.array(lses)),
        ):
            for ours, expected in zip(merged, whole, strict=True):
                assert_allclose(ours, expected, rtol=1e-13, atol=1e-15)

    def test_minus_inf_is_the_exact_identity(self, rng):
        output, lse = rng.standard_normal((4, 3)), rng.standard_normal(4)
        for rubbish in (0.0, NAN):
            nothing = np.full((4, 3), rubbish), np.full(4, -INF)
            merged, merged_lse = merge_states([nothing[0], output], [nothing[1], lse])
            assert_array_equal(merged, output)
            assert_array_equal(merged_lse, lse)
            merged, merged_lse = merge_states([nothing[0]] * 2, [nothing[1]] * 2)
            assert_array_equal(merged, np.zeros((4, 3)))
            assert_array_equal(merged_lse, nothing[1])

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
    def test_dtype(self, dtype, rng):
        parts = rng.standard_normal((2, 4, 3)).astype(dtype)
        wide = np.float64 if dtype is np.float64 else np.float32
        output, lse = merge_states(parts, rng.standard_normal((2, 4)).astype(wide))
        assert (output.dtype, lse.dtype) == (dtype, wide)


def torch_sdpa(query, key, value, attn_mask=None, **keywords):
    """Return torch's answer, by its own path for any mask, shape and alignment."""
    tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in (query, key, value)]
    mask = None if attn_mask is None else torch.from_numpy(attn_mask)
    return torch.nn.functional.scaled_dot_product_attention(*tensors, mask, **keywords).numpy()


class TestAgainstTorch:
    """float64, so that agreement to 1e-13 leaves no room for another meaning."""

    @staticmethod
    def check(query, key, value, *arguments, **keywords):
        ours = scaled_dot_product_attention(query, key, value, *arguments, **keywords)
        theirs = torch_sdpa(query, key, value, *arguments, **keywords)
        assert_allclose(ours, theirs, rtol=1e-13, atol=1e-15)

    @pytest.mark.parametrize("shape", [(5, 5), (5, 8), (8, 5), (1, 4)])
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_causal_is_top_left(self, shape, is_causal, rng):
        inputs = make_inputs(
            rng, seqlen_q=shape[0], seqlen_kv=shape[1], head_dim_v=6, dtype=np.float64
        )
        self.check(*inputs, is_causal=is_causal)

    @pytest.mark.parametrize(
        "shape", [(5, 7), (1, 7), (5, 1), (3, 5, 7), (2, 1, 5, 7), (2, 3, 5, 7)]
    )
    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_masks(self, shape, kind, rng):
        mask = rng.random(shape) < 0.6 if kind == "bool" else rng.standard_normal(shape)
        self.check(*make_inputs(rng, dtype=np.float64), mask, scale=0.3)

    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_rows_that_see_nothing(self, kind, rng):
        mask = rng.random((2, 3, 5, 7)) < 0.6
        mask[:, 1, 2:4] = False
        self.check(
            *make_inputs(rng, dtype=np.float64),
            mask if kind == "bool" else np.where(mask, 0.5, -INF),
        )

    def test_mask_composes_with_causal(self, rng):
        """torch takes one of them at a time; their composition is the intersection."""
        inputs = make_inputs(rng, dtype=np.float64)
        mask, causal = rng.random((2, 1, 5, 7)) < 0.6, np.tri(5, 7, dtype=bool)
        ours = scaled_dot_product_attention(*inputs, mask, is_causal=True)
        assert_allclose(ours, torch_sdpa(*inputs, mask & causal), rtol=1e-13, atol=1e-15)

    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    def test_gqa(self, kv_heads, rng):
        inputs = make_inputs(rng, heads=4, kv_heads=kv_heads, dtype=np.float64)
        self.check(*inputs, enable_gqa=True)

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_axes_of_one_broadcast(self, axis, which, rng):
        inputs = list(make_inputs(rng, heads=4, dtype=np.float64))
        inputs[which] = np.take(inputs[which], [0], axis)
        self.check(*inputs)

    @pytest.mark.parametrize("ndim", [2, 3])
    def test_fewer_axes(self, ndim, rng):
        inputs = [x[0, 0] if ndim == 2 else x[0] for x in make_inputs(rng, dtype=np.float64)]
        self.check(*inputs, rng.random((5, 7)) < 0.6)

    def test_heads_that_differ_need_enable_gqa(self, rng):
        inputs = make_inputs(rng, heads=4, kv_heads=2)
        with pytest.raises(RuntimeError):
            torch_sdpa(*inputs)
        with pytest.raises(ValueError, match="shape"):
            scaled_dot_product_attention(*inputs)

    def test_no_dropout(self, rng):
        with pytest.raises(ValueError, match="dropout_p"):
            scaled_dot_product_attention(*make_inputs(rng), dropout_p=0.1)

    def test_a_mask_of_integers_is_refused(self, rng):
        with pytest.raises(TypeError, match="attn_mask"):
            scaled_dot_product_attention(*make_inputs(rng), np.ones((5, 7), int))


def test_float64_inputs_are_computed_in_float64(rng):
    """The way to check a narrower result: 1e-9 of a score is lost in float32, not in float64."""
    key = np.array([[1.0], [1.0 + 1e-9]])
    first, second = attention_weights(ONE_QUERY, key, scale=1).ravel()
    assert second / first - 1 == pytest.approx(1e-9, rel=1e-6)


def test_inputs_are_not_written(rng):
    inputs = make_inputs(rng)
    mask, bias = rng.random((5, 7)) < 0.5, rng.standard_normal((5, 7))
    given = (*inputs, mask, bias)
    before = [x.copy() for x in given]
    attention(*inputs, mask=mask, bias=bias, causal=True)
    for x, copy in zip(given, before, strict=True):
        assert_array_equal(x, copy)


def test_numpy_is_its_only_import():
    """ml_dtypes is the caller's choice: bfloat16 is known by its name."""
    lines = Path(reference.__file__).read_text(encoding="utf-8").splitlines()
    imported = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"collections.abc", "typing", "numpy", "numpy.typing"}
