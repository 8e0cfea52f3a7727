"""How good the numbers are: exp and tanh by themselves, the bound on random shapes, extreme scores.

These are samples. `python -m numerics` in this folder measures every float32 and a thousand shapes.
"""

from itertools import islice

import numpy as np
import pytest
from checks import FLOAT_DTYPES, assert_accurate, assert_same_bits, make_inputs, to_float64
from fastattn.kernels.simd.functions import exp, tanh
from numerics.grid import cases, extremes, measure
from numerics.units import fused, smallest, ulps
from numpy.testing import assert_array_equal

import fastattn

# Units in the last place that exp(x) may be off, down to where it is 0. With AVX-512
# 1.75 and 1.04 were measured, without its tables less.
ULPS_OF_EXP = 2

# The same for tanh(x) of any x: 3.0 and 2.8 were measured. An error in each of the last four steps,
# and that of the polynomial.
ULPS_OF_TANH = 4


def skip_without_more_digits(dtype):
    """Skip where nothing has more digits than a result."""
    if dtype == np.float64 and np.finfo(np.longdouble).eps == np.finfo(dtype).eps:
        pytest.skip("longdouble is float64 here: nothing to measure float64 with")


def arguments_of_exp(dtype):
    """Return numbers from -0 down to where the result is the smallest that is not 0."""
    lowest = np.log(smallest(dtype))
    if dtype == np.float32:
        first, last = (np.array(x, dtype).view(np.uint32) for x in (-0.0, lowest))
        return np.arange(first, last, 97, np.uint32).view(np.float32)
    rng = np.random.default_rng(0)
    x = rng.uniform(lowest, 0, 1_000_000)
    return np.concatenate([x, -(2.0 ** rng.uniform(-60, 9, 100_000))])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_in_units_in_the_last_place(dtype):
    skip_without_more_digits(dtype)
    assert ulps(exp, arguments_of_exp(dtype)).max() <= ULPS_OF_EXP  # a NaN is not


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_at_the_ends(dtype):
    tiny = smallest(dtype)
    x = np.array([0.0, -0.0, -np.inf, np.nan, -1e4, np.finfo(dtype).min], dtype)
    assert_array_equal(fused(exp, x), np.array([1, 1, 0, np.nan, 0, 0], dtype))
    below = np.linspace(np.log(tiny) - 2, np.log(tiny), 10_001).astype(dtype)
    result = fused(exp, below)
    assert result[0] == 0
    assert (np.diff(result) >= 0).all(), "from 0 up, without a leap"
    assert result[-1] <= tiny * (1 + 1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tanh_in_units_in_the_last_place(dtype):
    """Small arguments as well as large ones: where |x| is small, tanh(x) is x."""
    skip_without_more_digits(dtype)
    rng = np.random.default_rng(0)
    lowest = np.log2(np.finfo(dtype).tiny)
    sizes = [rng.uniform(0, 20, 1_000_000), 2.0 ** rng.uniform(lowest, 5, 1_000_000)]
    x = (np.concatenate(sizes) * rng.choice([-1, 1], 2_000_000)).astype(dtype)
    assert ulps(tanh, x).max() <= ULPS_OF_TANH  # a NaN is not


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tanh_at_the_ends(dtype):
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e4, -1e-30], dtype)
    expected = np.array([0.0, -0.0, 1, -1, np.nan, 1, -1e-30], dtype)
    result = fused(tanh, x)
    assert_array_equal(result, expected)
    assert_array_equal(np.signbit(result), np.signbit(expected))


@pytest.mark.parametrize("seed", range(60))
def test_random_shapes(seed):
    """The bound of the naive code's own error, wherever the dice fall."""
    rng = np.random.default_rng(seed)
    seqlen_q, seqlen_kv = rng.integers(1, 100, 2)
    head_dim, head_dim_v = rng.integers(1, 80, 2)
    kv_heads = int(rng.integers(1, 4))
    inputs = make_inputs(
        rng,
        batch=(max(1, 128 // min(seqlen_q, seqlen_kv)),),  # few rows would be a matter of luck
        heads=kv_heads * int(rng.integers(1, 4)),
        kv_heads=kv_heads,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=FLOAT_DTYPES[seed % 4],
    )
    keywords = {
        "causal": bool(rng.integers(2)),
        "mask": rng.random((seqlen_q, seqlen_kv)) < 0.8 if rng.integers(2) else None,
        "bias": rng.standard_normal((seqlen_q, seqlen_kv)) if rng.integers(2) else None,
        "scale": rng.uniform(-1, 1) if rng.integers(2) else None,
    }
    keywords = {name: each for name, each in keywords.items() if each is not None}
    assert_accurate(fastattn.attention(*inputs, return_lse=True, **keywords), *inputs, **keywords)


# Every 29th of the thousand: all types, lengths, features and both variants.
GRID = [
    pytest.param(*case, id=f"{case[1][0].dtype} {case[0]}") for case in islice(cases(), 3, None, 29)
]


@pytest.mark.parametrize(("name", "inputs", "keywords"), GRID)
def test_grid(name, inputs, keywords):
    """Never more than twice the textbook's error and one rounding: enough outputs for a maximum."""
    assert measure(name, inputs, **keywords).share <= 1


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_extremes(dtype):
    """Large, tiny and equal scores, values that cancel, 100,000 keys."""
    for name, inputs, keywords in extremes(dtype):
        assert measure(name, inputs, **keywords).share <= 1, name


class TestExtremeScores:
    """Scores between which the exponential leaves nothing, or from which it may not subtract."""

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("magnitude", [1e4, -1e4])
    def test_large(self, magnitude, dtype, rng):
        """Nearly one-hot: the error is that of the few rows where two scores are close."""
        inputs = make_inputs(rng, batch=(16,), seqlen_q=33, seqlen_kv=130, dtype=dtype)
        largest = (to_float64(inputs[0]) @ np.swapaxes(to_float64(inputs[1]), -1, -2)).max()
        keywords = {"scale": magnitude / largest}
        result = fastattn.attention(*inputs, return_lse=True, **keywords)
        assert_accurate(result, *inputs, **keywords)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_large_constant(self, dtype, rng):
        """A bias of 1e4 at every key leaves as many digits of the scores as the naive code has."""
        inputs = make_inputs(rng, seqlen_q=33, seqlen_kv=130, dtype=dtype)
        bias = np.full((33, 130), 1e4)
        result = fastattn.attention(*inputs, return_lse=True, bias=bias)
        assert_accurate(result, *inputs, bias=bias)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_lowest_bias_everywhere(self, dtype, rng):
        """It swallows every score and is finite: all keys are visible and weigh the same."""
        inputs = make_inputs(rng, seqlen_q=33, seqlen_kv=130, dtype=dtype)
        bias = np.full((33, 130), np.finfo(dtype).min)
        output, lse = fastattn.attention(*inputs, bias=bias, return_lse=True)
        mean = inputs[2].mean(axis=-2, keepdims=True, dtype=np.float64)
        np.testing.assert_allclose(output, np.broadcast_to(mean, output.shape), atol=1e-6)
        assert_array_equal(lse, np.full_like(lse, np.finfo(dtype).min))

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_lowest_bias_at_some_keys(self, dtype, rng):
        """As padding is often hidden: no weight beside keys without it, as with a mask."""
        inputs = make_inputs(rng, seqlen_q=33, seqlen_kv=130, dtype=dtype)
        padded = rng.random(130) < 0.5
        bias = np.where(padded, np.finfo(np.float32).min, 0)
        result = fastattn.attention(*inputs, bias=bias, return_lse=True)
        assert_accurate(result, *inputs, mask=~padded)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("seqlen_q", [1, 40])
    def test_tiny_softcap(self, seqlen_q, dtype, rng):
        """Scores over it leave the range of the type, but for one of 0: all weights are equal."""
        query, key, value = make_inputs(rng, seqlen_q=seqlen_q, seqlen_kv=70, dtype=dtype)
        query[:, :, 0] = 0
        softcap = float(np.finfo(dtype).smallest_subnormal) * 8
        output, lse = fastattn.attention(query, key, value, softcap=softcap, return_lse=True)
        mean = value.mean(axis=-2, keepdims=True, dtype=np.float64)
        np.testing.assert_allclose(output, np.broadcast_to(mean, output.shape), atol=1e-6)
        np.testing.assert_allclose(lse, np.log(70), rtol=1e-6)

    @pytest.mark.parametrize("scale", [1e39, -1e39])
    def test_scale_beyond_the_type(self, scale, rng):
        """A score of 0 is 0, however large the scale is."""
        query, key, value = make_inputs(rng, seqlen_q=3, seqlen_kv=70)
        output = fastattn.attention(0 * query, key, value, scale=scale)
        mean = value.mean(axis=-2, keepdims=True, dtype=np.float64)
        np.testing.assert_allclose(output, np.broadcast_to(mean, output.shape), atol=1e-6)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_one_hot(self, dtype, rng):
        query, key, value = make_inputs(rng, seqlen_q=130, seqlen_kv=130, dtype=dtype)
        chosen = rng.permutation(130)
        bias = np.where(np.arange(130) == chosen[:, None], 0.0, -1e4)
        assert_same_bits(fastattn.attention(query, key, value, bias=bias), value[:, :, chosen])
