"""The kernels, through the public functions, against the reference in float64.

`checks.assert_accurate` holds the bound, a multiple of the naive code's error plus one rounding.
Where the contract promises equal bits, bits are compared.
"""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from checks import (
    BFLOAT16,
    FLOAT_DTYPES,
    assert_accurate,
    assert_same_bits,
    assert_within,
    exact,
    layouts,
    make_inputs,
    naive,
    rounding,
    rounding_bound,
    score_bound,
    to_float64,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import fastattn
from fastattn import reference

NAN, INF = np.nan, np.inf

# Around 8, 16, 24 and 32 queries in a tile and 64 keys in a block, and what is left of them.
SIZES = [1, 2, 3, 5, 7, 8, 9, 23, 24, 25, 31, 33, 63, 64, 65, 97, 129]
HEAD_DIMS = [1, 3, 8, 40, 64, 80, 96, 128, 256]

# Every shape that broadcasts to the (2, 3, 5, 70) scores of `broadcast_inputs`.
SHAPES_OF_SCORES = [
    shape[missing:]
    for missing in range(5)
    for shape in itertools.product((2, 1), (3, 1), (5, 1), (70, 1))
    if all(n == 1 for n in shape[:missing])
]


def broadcast_inputs(rng, dtype=np.float32):
    """Return inputs whose four axes of scores differ, the last longer than a block of keys."""
    return make_inputs(rng, heads=3, seqlen_q=5, seqlen_kv=70, head_dim=8, dtype=dtype)


def check(*inputs, **keywords):
    """Assert that attention's output and lse are accurate, and return them."""
    result = fastattn.attention(*inputs, return_lse=True, **keywords)
    assert_accurate(result, *inputs, **keywords)
    return result


class TestSizes:
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("seqlen_q", SIZES)
    def test_lengths(self, seqlen_q, causal, rng):
        for seqlen_kv in SIZES:
            batch = (max(2, 64 // min(seqlen_q, seqlen_kv)),)  # few rows would be a matter of luck
            inputs = make_inputs(rng, batch=batch, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
            check(*inputs, causal=causal)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_head_dims(self, head_dim, dtype, rng):
        check(*make_inputs(rng, head_dim=head_dim, seqlen_q=33, seqlen_kv=65, dtype=dtype))

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("head_dims", [(1, 8), (8, 1), (3, 64), (64, 3), (40, 96), (256, 80)])
    def test_head_dims_that_differ(self, head_dims, dtype, rng):
        head_dim, head_dim_v = head_dims
        inputs = make_inputs(
            rng, head_dim=head_dim, head_dim_v=head_dim_v, seqlen_q=9, seqlen_kv=65, dtype=dtype
        )
        output, _ = check(*inputs, causal=True)
        assert output.shape[-1] == head_dim_v

    @pytest.mark.parametrize("order", ["rising", "falling"])
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_many_blocks(self, dtype, order, rng):
        """Scores that rise along the keys move the running maximum with every block."""
        query, key, value = make_inputs(rng, batch=(), seqlen_q=130, seqlen_kv=1000, dtype=dtype)
        ramp = np.linspace(0, 40, 1000, dtype=np.float32)
        bias = ramp if order == "rising" else ramp[::-1]
        check(query, key, value)
        check(query, key, value, bias=bias, causal=True)

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize(
        ("batch", "seqlen_q", "seqlen_kv"),
        [
            *[((2,), 5, 0), ((2,), 0, 7), ((0,), 5, 7), ((0,), 0, 0)],
            *[((2, 3), 5, 0), ((2, 3), 0, 7), ((2, 0), 5, 7)],
        ],
    )
    def test_empty(self, batch, seqlen_q, seqlen_kv, causal, rng):
        inputs = make_inputs(rng, batch=batch, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, head_dim_v=4)
        output, lse = fastattn.attention(*inputs, causal=causal, return_lse=True)
        assert (output.shape, output.dtype) == ((*batch, 3, seqlen_q, 4), np.float32)
        assert_array_equal(output, np.zeros_like(output))
        assert_array_equal(lse, np.full((*batch, 3, seqlen_q), -INF))


class TestAccuracy:
    """At most twice the naive code's largest error, measured on a thousand rows."""

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("head_dim", [20, 64, 128])
    def test_plain(self, head_dim, dtype, rng):
        self.check(*self.make(rng, head_dim, dtype))

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("keyword", ["causal", "mask", "bias", "scale"])
    def test_keywords(self, keyword, dtype, rng):
        keywords = {
            "causal": True,
            "mask": rng.random((64, 100)) < 0.7,
            "bias": rng.standard_normal((4, 64, 100)),
            "scale": 0.7,
        }
        self.check(*self.make(rng, 40, dtype), **{keyword: keywords[keyword]})

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_one_visible_key_gives_its_value(self, dtype, rng):
        """Its weight is exp(0) / exp(0), which is 1 and not nearly 1."""
        inputs = make_inputs(rng, seqlen_q=64, seqlen_kv=64, dtype=dtype)
        output = fastattn.attention(*inputs, mask=np.eye(64, dtype=bool))
        assert_array_equal(output, inputs[2])

    @staticmethod
    def make(rng, head_dim, dtype):
        return make_inputs(
            rng, batch=(4,), heads=4, seqlen_q=64, seqlen_kv=100, head_dim=head_dim, dtype=dtype
        )

    @staticmethod
    def check(*inputs, **keywords):
        result = fastattn.attention(*inputs, return_lse=True, **keywords)
        assert_accurate(result, *inputs, times=2, **keywords)


class TestDtypes:
    @pytest.mark.parametrize(
        "dtypes",
        [
            ("float16", "float32", "float32"),
            ("float32", "bfloat16", "bfloat16"),
            ("float32", "float16", "float64"),
            ("float64", "bfloat16", "float32"),
            ("int8", "float16", "float16"),
            ("float32", "int16", "uint8"),
            ("int64", "float32", "float32"),
            ("int64", "int64", "int64"),
            ("uint8", "int32", "bool"),
            ("bool", "bool", "bool"),
        ],
        ids="-".join,
    )
    def test_mixed(self, dtypes, rng):
        inputs = [(3 * x).astype(dtype) for x, dtype in zip(make_inputs(rng), dtypes, strict=True)]
        assert_accurate(fastattn.attention(*inputs, return_lse=True), *inputs)

    @pytest.mark.parametrize(
        "dtype",
        ["longdouble", "complex64", "object", "float8_e4m3fn", "datetime64[s]", [("x", "f4")]],
        ids=str,
    )
    @pytest.mark.parametrize("which", ["query", "key", "value"])
    def test_refused(self, which, dtype, rng):
        inputs = dict(zip(("query", "key", "value"), make_inputs(rng), strict=True))
        inputs[which] = np.zeros(inputs[which].shape, dtype)
        with pytest.raises(TypeError, match=which):
            fastattn.attention(**inputs)

    def test_float16_with_bfloat16_is_refused(self, rng):
        query, key, value = make_inputs(rng, dtype=np.float16)
        with pytest.raises(TypeError, match="float16"):
            fastattn.attention(query, key.astype(BFLOAT16), value)
        with pytest.raises(TypeError, match="float16"):
            fastattn.attention(query.astype(BFLOAT16), key, value.astype(np.float32))

    def test_nested_lists(self):
        output = fastattn.attention([[1, 0]], [[1, 0], [0, 1]], [[2], [4]], scale=0)
        assert (output.dtype, output.tolist()) == (np.float64, [[3.0]])

    def test_sixteen_bit_scores_do_not_overflow(self):
        """200 * 200 * 64 is far beyond the largest float16, and so is 1 / 8 of it."""
        query = np.full((1, 64), 200, np.float16)
        output, lse = fastattn.attention(query, query, query, return_lse=True)
        assert_array_equal(output, query)
        assert_allclose(lse, 200 * 200 * 64 / 8, rtol=0, atol=score_bound(query, query))

    @pytest.mark.parametrize("kind", ["__array__", "__dlpack__"])
    def test_foreign_arrays(self, kind, rng):
        class Foreign:
            """An array of another library, of which one protocol is all that is known."""

            def __init__(self, x):
                setattr(
                    type(self), kind, lambda self, *args, **kw: getattr(self.x, kind)(*args, **kw)
                )
                self.x = x

            def __dlpack_device__(self):
                return self.x.__dlpack_device__()

        inputs = make_inputs(rng)
        output = fastattn.attention(*(Foreign(x) for x in inputs))
        assert_same_bits(output, fastattn.attention(*inputs))

    def test_torch_tensors(self, rng):
        inputs = make_inputs(rng)
        output = fastattn.attention(*map(torch.from_numpy, inputs))
        assert_same_bits(output, fastattn.attention(*inputs))


class TestScale:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("scale", [0, 0.0, 1, 0.37, -0.5, np.float32(0.2), np.float64(0.2)])
    def test_values(self, scale, dtype, rng):
        check(*make_inputs(rng, seqlen_kv=65, dtype=dtype), scale=scale)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("scale", [1000.0, -1000.0])
    def test_far_apart_scores_pick_one_value(self, scale, dtype):
        """The weight of every other value is below the smallest number, and exactly one is left."""
        query = np.eye(40, dtype=dtype)[None]
        key = query * np.sign(scale)
        value = np.arange(40 * 3, dtype=dtype).reshape(1, 40, 3)
        output, lse = fastattn.attention(query, 10 * key, value, scale=scale, return_lse=True)
        assert_array_equal(output, value)
        assert_allclose(lse, np.full((1, 40), 10 * abs(scale)), rtol=2 * rounding(np.dtype(dtype)))


class TestCausal:
    @pytest.mark.parametrize("causal", [True, "bottom_right", "top_left", np.True_, np.False_])
    @pytest.mark.parametrize("lengths", [(5, 70), (33, 33), (70, 5), (100, 130), (1, 9)])
    def test_words(self, lengths, causal, rng):
        seqlen_q, seqlen_kv = lengths
        check(*make_inputs(rng, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv), causal=causal)

    @pytest.mark.parametrize("causal", [True, "top_left", False])
    @pytest.mark.parametrize("offset", [-70, -33, -1, 0, 1, 31, 64, 1000, np.int32(3)])
    def test_query_offset(self, offset, causal, rng):
        inputs = make_inputs(rng, seqlen_q=33, seqlen_kv=70)
        check(*inputs, causal=causal, query_offset=offset)

    @pytest.mark.parametrize("offset", [np.array([-5, 40]), np.array([0, 7], np.uint8)])
    def test_query_offsets_of_a_batch(self, offset, rng):
        check(*make_inputs(rng, seqlen_q=33, seqlen_kv=70), causal=True, query_offset=offset)

    @pytest.mark.parametrize("causal", [True, "top_left", False])
    @pytest.mark.parametrize(
        "lengths", [0, 1, 64, 70, np.array([3, 65]), np.array([0, 70], np.uint8), [64, 0]]
    )
    def test_kv_lengths(self, lengths, causal, rng):
        check(*make_inputs(rng, seqlen_q=33, seqlen_kv=70), causal=causal, kv_lengths=lengths)

    def test_lengths_and_offsets_broadcast_to_the_batch_axes(self, rng):
        inputs = make_inputs(rng, batch=(3, 2), seqlen_kv=70)
        lengths, offsets = np.array([[3], [0], [66]]), np.array([2, 60])
        check(*inputs, causal=True, kv_lengths=lengths)
        check(*inputs, causal=True, kv_lengths=lengths, query_offset=offsets)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_equals_the_explicit_mask(self, dtype, rng):
        inputs = make_inputs(rng, seqlen_q=50, seqlen_kv=70, dtype=dtype)
        mask = np.tri(50, 70, 20, dtype=bool)
        output = fastattn.attention(*inputs, causal=True)
        assert_accurate(output, *inputs, mask=mask)
        assert_accurate(fastattn.attention(*inputs, mask=mask), *inputs, causal=True)


class TestMaskAndBias:
    @pytest.mark.parametrize("shape", SHAPES_OF_SCORES, ids=str)
    def test_shapes(self, shape, rng):
        inputs = broadcast_inputs(rng)
        mask = np.asarray(rng.random(shape) < 0.6)
        bias = np.asarray(rng.standard_normal(shape), np.float32)
        check(*inputs, mask=mask)
        check(*inputs, bias=bias)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("bias_dtype", [*FLOAT_DTYPES, np.dtype(np.int64)], ids=str)
    def test_dtypes_of_bias(self, bias_dtype, dtype, rng):
        bias = (2 * rng.standard_normal((2, 3, 5, 70))).astype(bias_dtype)
        check(*broadcast_inputs(rng, dtype), bias=bias)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("kv_heads", [1, 4])
    @pytest.mark.parametrize("causal", [True, "top_left"])
    def test_everything_at_once(self, causal, kv_heads, dtype, rng):
        inputs = make_inputs(
            rng, heads=4, kv_heads=kv_heads, seqlen_q=50, seqlen_kv=100, head_dim_v=24, dtype=dtype
        )
        check(
            *inputs,
            mask=rng.random((2, 1, 50, 100)) < 0.7,
            bias=rng.standard_normal((4, 1, 100)),
            causal=causal,
            query_offset=np.array([40, -3]),
            kv_lengths=np.array([77, 100]),
            scale=0.3,
        )

    @pytest.mark.parametrize(
        "keywords",
        [{"mask": np.ones(70, int)}, {"mask": np.ones(70)}, {"bias": np.ones(70, bool)}],
        ids=["integer mask", "float mask", "bool bias"],
    )
    def test_wrong_kinds_are_refused(self, keywords, rng):
        with pytest.raises(TypeError, match=next(iter(keywords))):
            fastattn.attention(*broadcast_inputs(rng), **keywords)

    def test_bias_of_the_least_finite_number_does_not_hide(self, rng):
        """Some libraries pad with it: over all keys it is a constant and gives the mean."""
        inputs = broadcast_inputs(rng)
        bias = np.full(70, np.finfo(np.float32).min)
        output, lse = fastattn.attention(*inputs, bias=bias, return_lse=True)
        assert_allclose(
            output, np.broadcast_to(inputs[2].mean(-2, keepdims=True), output.shape), atol=1e-6
        )
        assert np.isfinite(lse).all()


class TestShapes:
    @pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 1), (6, 2), (5, 1)])
    @pytest.mark.parametrize("seqlen_q", [1, 7, 33])
    def test_groups_of_query_heads(self, seqlen_q, heads, rng):
        inputs = make_inputs(
            rng, heads=heads[0], kv_heads=heads[1], seqlen_q=seqlen_q, seqlen_kv=70
        )
        check(*inputs)
        check(*inputs, causal=True, bias=rng.standard_normal((heads[0], 1, 70)))

    @pytest.mark.parametrize("batch", [(), (2,), (2, 3), (2, 1, 3)])
    def test_batch_axes(self, batch, rng):
        check(*make_inputs(rng, batch=batch), causal=True)

    @pytest.mark.parametrize(
        "batches",
        [
            ((2,), (1,), (1,)),
            ((1,), (2,), ()),
            ((), (), (2,)),
            ((3, 1), (2,), (1, 2)),
            ((2, 1, 1), (3, 1), (4,)),
        ],
        ids=str,
    )
    def test_batch_axes_broadcast(self, batches, rng):
        inputs = [make_inputs(rng, batch=batch)[which] for which, batch in enumerate(batches)]
        check(*inputs)
        batch = np.broadcast_shapes(*batches)
        check(*inputs, causal=True, kv_lengths=rng.integers(0, 8, batch))

    def test_two_axes_are_one_head(self, rng):
        query, key, value = (x[0, 0] for x in make_inputs(rng, head_dim_v=4))
        output, lse = check(query, key, value, mask=rng.random((5, 7)) < 0.6)
        assert (output.shape, lse.shape) == ((5, 4), (5,))

    @pytest.mark.parametrize("ndim", [3, 4, 5])
    def test_blhd(self, ndim, rng):
        batch = (2, 3)[: ndim - 3]
        inputs = make_inputs(rng, batch=batch, heads=4, kv_heads=2, seqlen_kv=70, head_dim_v=5)
        mask, bias = rng.random((4, 5, 70)) < 0.7, rng.standard_normal((1, 70))
        swapped = [np.ascontiguousarray(np.swapaxes(x, -3, -2)) for x in inputs]
        output, lse = check(*swapped, mask=mask, bias=bias, causal=True, layout="blhd")
        expected = fastattn.attention(*inputs, mask=mask, bias=bias, causal=True, return_lse=True)
        assert_same_bits(np.swapaxes(output, -3, -2), expected[0])
        assert_same_bits(lse, expected[1])


class TestMemory:
    """Every layout gives the bits of a contiguous copy."""

    @pytest.mark.parametrize("name", layouts)
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_layouts_of_inputs(self, dtype, name, rng):
        inputs = make_inputs(rng, seqlen_q=27, seqlen_kv=70, head_dim=24, head_dim_v=9, dtype=dtype)
        laid = [layouts[name](x) for x in inputs]
        plain = [self.contiguous(x) for x in laid]
        for which in ([0], [1], [2], [0, 1, 2]):
            mixed = [laid[i] if i in which else plain[i] for i in range(3)]
            for ours, expected in zip(
                fastattn.attention(*mixed, causal=True, return_lse=True),
                fastattn.attention(*plain, causal=True, return_lse=True),
                strict=True,
            ):
                assert_same_bits(ours, expected)

    @pytest.mark.parametrize("name", layouts)
    @pytest.mark.parametrize("kind", ["mask", "bias", "bias of 16 bits"])
    def test_layouts_of_mask_and_bias(self, kind, name, rng):
        inputs = make_inputs(rng, seqlen_q=27, seqlen_kv=70)
        full = rng.standard_normal((2, 3, 27, 70))
        given = layouts[name](
            {"mask": full < 0.5, "bias": full, "bias of 16 bits": full.astype(np.float16)}[kind]
        )
        keyword = kind.split()[0]
        assert_same_bits(
            fastattn.attention(*inputs, **{keyword: given}),
            fastattn.attention(*inputs, **{keyword: self.contiguous(given)}),
        )

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize(
        "make",
        [
            np.empty,
            lambda shape, dtype: np.empty(shape, dtype, order="F"),
            lambda shape, dtype: np.empty([2 * n for n in shape], dtype)[::2, ::2, ::2, ::2],
            lambda shape, dtype: np.flip(np.empty(shape, dtype)),
            lambda shape, dtype: np.empty(shape[::-1], dtype).T,
            lambda shape, dtype: np.empty(shape, [("pad", "i1"), ("out", dtype)])["out"],
        ],
        ids=["contiguous", "fortran", "every_second", "negative", "transposed", "in_records"],
    )
    def test_layouts_of_out(self, make, dtype, rng):
        inputs = make_inputs(rng, seqlen_q=27, seqlen_kv=70, head_dim_v=9, dtype=dtype)
        out = make((2, 3, 27, 9), dtype)
        result, lse = fastattn.attention(*inputs, out=out, return_lse=True)
        assert result is out
        expected, expected_lse = fastattn.attention(*inputs, return_lse=True)
        assert_same_bits(out, expected)
        assert_same_bits(lse, expected_lse)

    def test_only_out_is_written(self, rng):
        """The elements between those of a strided out keep what they held."""
        inputs = make_inputs(rng, seqlen_q=27)
        around = np.full((2, 3, 54, 40), 7, np.float32)
        out = around[:, :, ::2, 1::2]
        assert_same_bits(fastattn.attention(*inputs, out=out), fastattn.attention(*inputs))
        out[...] = 7
        assert_array_equal(around, np.full_like(around, 7))

    def test_out_of_layout_blhd(self, rng):
        inputs = [np.swapaxes(x, 1, 2) for x in make_inputs(rng, seqlen_q=27)]
        out = np.empty((2, 27, 3, 20), np.float32)
        assert fastattn.attention(*inputs, layout="blhd", out=out) is out
        assert_same_bits(out, fastattn.attention(*inputs, layout="blhd"))

    def test_out_of_another_shape_or_dtype_is_refused(self, rng):
        inputs = make_inputs(rng)
        for shape in [(2, 3, 5, 19), (1, 3, 5, 20), (2, 5, 3, 20), (3, 5, 20)]:
            with pytest.raises(ValueError, match="out"):
                fastattn.attention(*inputs, out=np.empty(shape, np.float32))
        for dtype in (np.float64, np.float16, np.int32):
            with pytest.raises(TypeError, match="out"):
                fastattn.attention(*inputs, out=np.empty((2, 3, 5, 20), dtype))

    @pytest.mark.parametrize("which", ["query", "key", "value", "bias", "mask"])
    def test_out_that_shares_an_element_is_refused(self, which, rng):
        """The last element of `out` is the first of the input."""
        query, key, value = make_inputs(rng, seqlen_q=7)
        given = {
            "query": query,
            "key": key,
            "value": value,
            "bias": np.zeros((2, 3, 7, 7), np.float32),
            "mask": np.ones((2, 3, 7, 7), bool),
        }
        size, shape = query.nbytes, given[which].shape
        buffer = np.zeros(2 * size, np.uint8)
        out = buffer[:size].view(np.float32).reshape(query.shape)
        itemsize = given[which].itemsize
        shared = buffer[size - itemsize :][: given[which].nbytes].view(given[which].dtype)
        shared = shared.reshape(shape)
        shared[...] = given[which]
        given[which] = shared
        before = buffer.copy()
        with pytest.raises(ValueError, match="out"):
            fastattn.attention(**given, out=out)
        assert_array_equal(buffer, before)

    def test_out_may_lie_between_the_elements_of_an_input(self, rng):
        query, key, value = make_inputs(rng, seqlen_q=7)
        both = np.empty((2, 3, 7, 40), np.float32)
        out, interleaved = both[..., ::2], both[..., 1::2]
        interleaved[...] = query
        fastattn.attention(interleaved, key, value, out=out)
        assert_same_bits(out, fastattn.attention(query, key, value))
        assert_same_bits(interleaved, query)

    def test_inputs_are_not_written(self, rng):
        inputs = make_inputs(rng, seqlen_q=27, seqlen_kv=70)
        given = {
            **dict(zip(("query", "key", "value"), inputs, strict=True)),
            "mask": rng.random((27, 70)) < 0.6,
            "bias": rng.standard_normal((27, 70)),
            "kv_lengths": np.array([70, 3]),
            "query_offset": np.array([43, -3]),
        }
        before = {name: x.copy() for name, x in given.items()}
        fastattn.attention(**given, causal=True)
        for name, x in given.items():
            assert_same_bits(x, before[name])

    def contiguous(self, x):
        """Return a native, aligned, writable, contiguous copy."""
        return np.array(x, x.dtype if x.dtype == BFLOAT16 else x.dtype.newbyteorder("="), order="C")


class TestBits:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("lengths", [(1, 300), (7, 7), (65, 130)])
    def test_batch_composition(self, lengths, dtype, rng):
        """An entry's result does not depend on its company, nor on its place."""
        inputs = make_inputs(
            rng, batch=(5,), heads=4, kv_heads=2, seqlen_q=lengths[0], seqlen_kv=lengths[1],
            head_dim=24, dtype=dtype,
        )  # fmt: skip
        limits = np.array([lengths[1], 1, 5, 0, 7])
        whole = fastattn.attention(*inputs, kv_lengths=limits, causal=True)
        for b in range(5):
            alone = fastattn.attention(
                *(x[b : b + 1] for x in inputs), kv_lengths=limits[b : b + 1], causal=True
            )
            assert_same_bits(alone[0], whole[b])
            unbatched = fastattn.attention(
                *(x[b] for x in inputs), kv_lengths=int(limits[b]), causal=True
            )
            assert_same_bits(unbatched, whole[b])
        turned = fastattn.attention(
            *(x[::-1] for x in inputs), kv_lengths=limits[::-1], causal=True
        )
        assert_same_bits(turned[::-1].copy(), whole)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_every_run(self, dtype, rng):
        inputs = make_inputs(rng, seqlen_q=65, seqlen_kv=300, dtype=dtype)
        first = fastattn.attention(*inputs, causal=True)
        for _ in range(5):
            assert_same_bits(fastattn.attention(*inputs, causal=True), first)

    def test_broadcast_batch_equals_materialised(self, rng):
        query, key, value = make_inputs(rng, batch=(4,), seqlen_kv=70)
        key, value = key[:1], value[:1]
        whole = [np.ascontiguousarray(np.broadcast_to(x, (4, *x.shape[1:]))) for x in (key, value)]
        assert_same_bits(fastattn.attention(query, key, value), fastattn.attention(query, *whole))


class TestNothingVisible:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("hide", ["mask", "bias", "causal", "kv_lengths", "query_offset"])
    def test_row_is_zero(self, hide, dtype, rng):
        """Whatever hides the keys of rows 3 to 29, their NaN included."""
        query, key, value = make_inputs(rng, seqlen_q=40, seqlen_kv=70, dtype=dtype)
        hidden = np.zeros((2, 1, 40, 1), bool)
        hidden[:, :, 3:30] = True
        if hide == "mask":
            keywords = {"mask": ~hidden}
        elif hide == "bias":
            keywords = {"bias": np.where(hidden, -INF, 0.0)}
        elif hide == "kv_lengths":
            keywords, hidden[:] = {"kv_lengths": [0, 5]}, [[[[True]]], [[[False]]]]
        else:
            keywords, hidden[:] = {"causal": True, "query_offset": -7}, False
            hidden[:, :, :7] = True
            if hide == "causal":
                del keywords["query_offset"]
                key, value = key[..., :33, :].copy(), value[..., :33, :].copy()
        hidden = np.broadcast_to(hidden[..., 0], (2, 3, 40))
        query[hidden] = NAN
        output, lse = check(query, key, value, **keywords)
        assert_array_equal(output[hidden], np.zeros_like(output[hidden]))
        assert_array_equal(lse[hidden], np.full_like(lse[hidden], -INF))
        assert np.isfinite(lse[~hidden]).all()


class TestNanAndInf:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    @pytest.mark.parametrize("hide", ["mask", "bias", "causal", "kv_lengths"])
    def test_hidden_is_never_read(self, hide, bad, dtype, rng):
        """Rubbish in hidden keys and values gives the bits of zeros there."""
        clean = make_inputs(rng, seqlen_q=33, seqlen_kv=100, head_dim=24, dtype=dtype)
        shows = np.ones((2, 1, 1, 100), bool)
        shows[0, ..., 70:], shows[1, ..., 3:] = False, False
        if hide in ("mask", "bias"):
            shows[0, ..., [5, 64, 65]] = False
        keywords = {
            "mask": {"mask": shows},
            "bias": {"bias": np.where(shows, 0.5, -INF)},
            "kv_lengths": {"kv_lengths": [70, 3]},
            "causal": {"causal": True, "query_offset": [70 - 33, 3 - 33]},
        }[hide]
        hidden = np.broadcast_to(~shows[:, :, 0], (2, 3, 100))
        rubbish = [x.copy() for x in clean]
        rubbish[1][hidden] = rubbish[2][hidden] = bad
        clean[1][hidden] = clean[2][hidden] = 0
        expected = fastattn.attention(*clean, return_lse=True, **keywords)
        for ours, theirs in zip(
            fastattn.attention(*rubbish, return_lse=True, **keywords), expected, strict=True
        ):
            assert np.isfinite(to_float64(theirs)).any()
            assert_same_bits(ours, theirs)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_key_hidden_from_some_queries(self, bad, dtype, rng):
        """On the diagonal a key is hidden from one query of a tile and visible to its neighbour."""
        inputs = make_inputs(rng, seqlen_q=40, seqlen_kv=40, dtype=dtype)
        expected = fastattn.attention(*inputs, causal=True)
        inputs[1][..., 20, :] = inputs[2][..., 20, :] = bad
        output = fastattn.attention(*inputs, causal=True)
        assert_same_bits(output[:, :, :20].copy(), expected[:, :, :20].copy())
        if np.isnan(bad):
            assert np.isnan(to_float64(output[:, :, 20:])).all()

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("where", ["query", "key", "value", "bias"])
    def test_visible_nan_is_seen(self, where, dtype, rng):
        """By exactly the outputs that it reaches."""
        query, key, value = make_inputs(rng, seqlen_q=30, seqlen_kv=70, dtype=dtype)
        bias = np.zeros((2, 3, 30, 70), np.float32)
        spoilt = np.zeros(query.shape, bool)
        if where == "query":
            query[0, 1, 4, 0], spoilt[0, 1, 4] = NAN, True
        elif where == "key":
            key[0, 1, 66, 0], spoilt[0, 1] = NAN, True
        elif where == "value":
            value[0, 1, 66, 5], spoilt[0, 1, :, 5] = NAN, True
        else:
            bias[0, 1, 4, 66], spoilt[0, 1, 4] = NAN, True
        output, lse = fastattn.attention(query, key, value, bias=bias, return_lse=True)
        assert_array_equal(np.isnan(to_float64(output)), spoilt)
        expected = spoilt[..., 0] if where != "value" else np.zeros_like(spoilt[..., 0])
        assert_array_equal(np.isnan(lse), expected)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_visible_inf_follows_ieee(self, dtype, rng):
        query, key, value = make_inputs(rng, seqlen_q=30, seqlen_kv=70, dtype=dtype)
        value[0, 0, 3, 0], value[0, 0, 66, 1] = INF, -INF
        value[0, 0, 3, 2], value[0, 0, 66, 2] = INF, -INF
        output = fastattn.attention(query, key, value)
        assert_accurate(output, query, key, value)
        assert (output[0, 0, :, 0] == INF).all()
        assert (output[0, 0, :, 1] == -INF).all()
        assert np.isnan(to_float64(output[0, 0, :, 2])).all()

    def test_score_of_plus_inf(self, rng):
        """inf - inf is NaN, in every row that sees it and in no other."""
        query, key, value = make_inputs(rng, seqlen_q=40, seqlen_kv=40)
        bias = np.zeros((40, 40), np.float32)
        bias[:, 20] = INF
        output = fastattn.attention(query, key, value, bias=bias, causal=True)
        assert_accurate(output, query, key, value, bias=bias, causal=True)

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_hidden_bias(self, bad, rng):
        inputs = make_inputs(rng, seqlen_q=40, seqlen_kv=70)
        mask = rng.random((2, 1, 40, 70)) < 0.6
        bias = rng.standard_normal((2, 3, 40, 70)).astype(np.float32)
        expected = fastattn.attention(*inputs, mask=mask, bias=bias)
        bias[np.broadcast_to(~mask, bias.shape)] = bad
        assert_same_bits(fastattn.attention(*inputs, mask=mask, bias=bias), expected)


@st.composite
def systems(draw, **keywords):
    """Draw a generator and a query, key and value of two heads, of any lengths and features."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inputs = make_inputs(
        rng,
        batch=(),
        heads=2,
        seqlen_q=draw(st.integers(1, 100)),
        seqlen_kv=draw(st.integers(1, 200)),
        head_dim=draw(st.integers(1, 70)),
        dtype=draw(st.sampled_from([np.float32, np.float64])),
        **keywords,
    )
    return rng, *inputs


class TestIdentities:
    """What holds for any numbers, up to the `rounding_bound` of two orders of summation."""

    @given(systems())
    def test_values_of_one_give_one(self, system):
        _, query, key, value = system
        output = fastattn.attention(query, key, np.ones_like(value), causal="top_left")
        bound = (2 * key.shape[-2] + 8) * rounding(value.dtype)
        assert_allclose(output, np.ones_like(output), rtol=bound)

    @given(systems())
    def test_output_lies_within_the_values(self, system):
        _, query, key, value = system
        output = fastattn.attention(query, key, value, scale=3)
        room = (2 * key.shape[-2] + 8) * rounding(value.dtype) * np.abs(value).max()
        assert (output >= value.min(axis=-2, keepdims=True) - room).all()
        assert (output <= value.max(axis=-2, keepdims=True) + room).all()

    @given(systems())
    def test_order_of_keys_does_not_matter(self, system):
        rng, query, key, value = system
        order = rng.permutation(key.shape[-2])
        assert_allclose(
            fastattn.attention(query, key[:, order], value[:, order]),
            fastattn.attention(query, key, value),
            rtol=0,
            atol=rounding_bound(query, key, value),
        )

    @given(systems())
    def test_a_constant_moves_lse_by_itself(self, system):
        rng, query, key, value = system
        shift = 20 * rng.standard_normal((2, query.shape[-2], 1)).astype(value.dtype)
        output, lse = fastattn.attention(query, key, value, return_lse=True)
        moved, moved_lse = fastattn.attention(query, key, value, bias=shift, return_lse=True)
        bound = rounding_bound(query, key, value, bias=shift)
        assert_allclose(moved, output, rtol=0, atol=bound)
        # lse is off by no more than what one score is: by the bound of values of one.
        bound = rounding_bound(query, key, np.ones_like(value), bias=shift)
        assert_allclose(moved_lse, lse + shift[..., 0], rtol=0, atol=bound)

    @given(systems())
    def test_parts_make_the_whole(self, system):
        rng, query, key, value = system
        cuts = np.sort(rng.integers(0, key.shape[-2] + 1, 2))
        parts = [
            fastattn.attention(query, *kv, return_lse=True)
            for kv in zip(np.split(key, cuts, -2), np.split(value, cuts, -2), strict=True)
        ]
        output, lse = fastattn.merge_states(*zip(*parts, strict=True))
        whole, whole_lse = fastattn.attention(query, key, value, return_lse=True)
        assert_allclose(output, whole, rtol=0, atol=rounding_bound(query, key, value))
        bound = rounding_bound(query, key, np.ones_like(value))
        assert_allclose(lse, whole_lse, rtol=0, atol=bound)

    @given(systems(kv_heads=1))
    def test_groups_equal_repeated_heads(self, system):
        _, query, key, value = system
        repeated = [np.repeat(x, 2, axis=-3) for x in (key, value)]
        assert_allclose(
            fastattn.attention(query, key, value, causal=True),
            fastattn.attention(query, *repeated, causal=True),
            rtol=0,
            atol=rounding_bound(query, key, value),
        )

    @given(systems())
    def test_causal_is_the_lower_triangle(self, system):
        _, query, key, value = system
        seqlen_q, seqlen_kv = query.shape[-2], key.shape[-2]
        mask = np.tri(seqlen_q, seqlen_kv, seqlen_kv - seqlen_q, dtype=bool)
        assert_allclose(
            fastattn.attention(query, key, value, causal=True),
            fastattn.attention(query, key, value, mask=mask),
            rtol=0,
            atol=rounding_bound(query, key, value),
        )

    @given(systems(head_dim_v=7), st.sets(st.sampled_from(["mask", "bias", "causal", "scale"])))
    def test_any_keywords(self, system, chosen):
        """Whatever is asked for at once, the result is the reference's."""
        rng, query, key, value = system
        seqlen_q, seqlen_kv = query.shape[-2], key.shape[-2]
        keywords = {
            "mask": rng.random((2, seqlen_q, seqlen_kv)) < rng.random(),
            "bias": rng.standard_normal((1, seqlen_q, seqlen_kv)),
            "causal": rng.choice(["bottom_right", "top_left"]).item(),
            "scale": float(rng.standard_normal()),
        }
        keywords = {name: keywords[name] for name in chosen}
        keywords["kv_lengths"] = int(rng.integers(0, seqlen_kv + 1))
        if rng.random() < 0.5:
            keywords["query_offset"] = int(rng.integers(-seqlen_q, seqlen_kv + 1))
        ours = fastattn.attention(query, key, value, **keywords)
        truth = exact(reference.attention, query, key, value, **keywords)
        numbers = {name: keywords[name] for name in chosen & {"bias", "scale"}}
        assert np.isfinite(ours).all()
        assert_allclose(ours, truth, rtol=0, atol=rounding_bound(query, key, value, **numbers))


class TestAttentionWeights:
    stages = ("scores", "softcapped", "biased", "probabilities")

    def check(self, query, key, **keywords):
        """Assert that every stage is the reference's, up to what rounding may do to it."""
        dtype = reference.result_dtype(query, key)
        numbers = {name: keywords[name] for name in keywords.keys() & {"bias", "scale"}}
        for stage in self.stages:
            keywords["stage"] = stage
            truth = exact(reference.attention_weights, query, key, **keywords)
            if stage == "probabilities":
                bound = rounding_bound(query, key, 1.0, **numbers)
            else:
                bound = score_bound(query, key, **numbers)
                bound += rounding(dtype) * np.abs(truth[np.isfinite(truth)]).max()
            ours = fastattn.attention_weights(query, key, **keywords)
            assert_within(ours, truth, dtype, bound)

    @pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, np.dtype(np.int64)], ids=str)
    def test_stages(self, dtype, rng):
        query, key, _ = make_inputs(rng, heads=4, kv_heads=2, seqlen_kv=70)
        query, key = ((2 * x).astype(dtype) for x in (query, key))
        mask = rng.random((5, 70)) < 0.6
        mask[2] = False
        self.check(query, key)
        self.check(
            query,
            key,
            mask=mask,
            bias=rng.standard_normal((4, 1, 70)),
            causal="top_left",
            query_offset=np.array([60, 9]),
            kv_lengths=np.array([65, 70]),
            scale=-0.4,
        )

    def test_shapes(self, rng):
        query, key, _ = make_inputs(rng, batch=(2, 3))
        self.check(query, key, causal=True)
        self.check(query[:, :1], key[0], causal=True)
        self.check(query[0, 0, 0], key[0, 0, 0], causal=True)
        swapped = [np.swapaxes(x, -3, -2) for x in (query, key)]
        self.check(*swapped, causal=True, layout="blhd")

    @pytest.mark.parametrize("stage", stages)
    @pytest.mark.parametrize(
        "rows",
        [
            0,
            4,
            np.int64(2),
            slice(None),
            slice(1, 4, 2),
            slice(4, 4),
            [3, 0, 0],
            (3, 0),
            np.array([1]),
        ],
    )
    def test_rows(self, rows, stage, rng):
        query, key, _ = make_inputs(rng, seqlen_kv=9)
        keywords = {
            "stage": stage,
            "mask": rng.random((2, 1, 5, 9)) < 0.6,
            "bias": rng.standard_normal((5, 1)),
            "causal": True,
        }
        whole = fastattn.attention_weights(query, key, **keywords)
        ours = fastattn.attention_weights(query, key, rows=rows, **keywords)
        assert ours.shape == whole[..., rows, :].shape
        assert_allclose(ours, whole[..., rows, :], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("rows", [-1, 5, [0, 5], np.array([-1, 0])])
    def test_rows_outside_are_refused(self, rows, rng):
        query, key, _ = make_inputs(rng)
        with pytest.raises(ValueError, match="rows"):
            fastattn.attention_weights(query, key, rows=rows)

    def test_an_unknown_stage_is_refused(self, rng):
        query, key, _ = make_inputs(rng)
        with pytest.raises(ValueError, match="stage"):
            fastattn.attention_weights(query, key, stage="logits")

    def test_hidden_rubbish(self, rng):
        """It stays in the raw scores and nowhere else."""
        query, key, _ = make_inputs(rng)
        key[..., 4:, :] = NAN
        scores, biased, weights = (
            fastattn.attention_weights(query, key, stage=stage, kv_lengths=4)
            for stage in ("scores", "biased", "probabilities")
        )
        assert np.isnan(scores[..., 4:]).all()
        assert (biased[..., 4:] == -INF).all()
        assert (weights[..., 4:] == 0).all()
        assert np.isfinite(weights).all()

    def test_they_are_the_weights_of_attention(self, rng):
        query, key, value = make_inputs(rng, dtype=np.float64)
        weights = fastattn.attention_weights(query, key, causal=True)
        output = fastattn.attention(query, key, value, causal=True)
        assert_allclose(weights @ value, output, rtol=0, atol=rounding_bound(query, key, value))


class TestMergeStates:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(4, 3), (2, 3, 33, 16)])
    def test_against_the_reference(self, shape, dtype, rng):
        outputs = rng.standard_normal((3, *shape)).astype(dtype)
        lses = (5 * rng.standard_normal((3, *shape[:-1]))).astype(
            reference.accumulation_dtype(dtype)
        )
        lses[0, ..., 0] = lses[:, ..., 1] = -INF
        truth, truth_lse = exact(reference.merge_states, outputs, lses)
        # Three weights, each off by what the difference of two lses is, and their sum.
        off = rounding(lses.dtype) * (4 * np.abs(lses[np.isfinite(lses)]).max() + 14)
        bound = (off + rounding(outputs.dtype)) * np.abs(to_float64(outputs)).max()
        for given_as in (lambda x: x, list, tuple):
            merged, lse = fastattn.merge_states(given_as(outputs), given_as(lses))
            assert_within(merged, truth, dtype, bound)
            assert_within(lse, truth_lse, lses.dtype, off)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_minus_inf_is_the_exact_identity(self, dtype, rng):
        output = rng.standard_normal((2, 40, 9)).astype(dtype)
        lse = rng.standard_normal((2, 40)).astype(reference.accumulation_dtype(dtype))
        for rubbish in (0, NAN):
            nothing = np.full_like(output, rubbish), np.full_like(lse, -INF)
            for parts in ([(output, lse)], [nothing, (output, lse)], [(output, lse), nothing]):
                merged, merged_lse = fastattn.merge_states(*zip(*parts, strict=True))
                assert_array_equal(merged, output)
                assert_array_equal(merged_lse, lse)
            merged, merged_lse = fastattn.merge_states(*zip(nothing, nothing, strict=True))
            assert_array_equal(merged, np.zeros_like(output))
            assert_array_equal(merged_lse, nothing[1])


class TestScaledDotProductAttention:
    """torch's signature; `test_reference.py` holds the reference to torch itself."""

    @staticmethod
    def check(query, key, value, attn_mask=None, **keywords):
        """Assert that the result is the reference's, up to what rounding may do to it."""
        function, keywords["attn_mask"] = reference.scaled_dot_product_attention, attn_mask
        ours = fastattn.scaled_dot_product_attention(query, key, value, **keywords)
        truth = exact(function, query, key, value, **keywords)
        numbers = {"scale": keywords.get("scale")}
        if attn_mask is not None and attn_mask.dtype != bool:
            numbers["bias"] = attn_mask
        bound = rounding_bound(query, key, value, **numbers)
        assert_within(ours, truth, query.dtype, bound)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize("lengths", [(33, 33), (33, 70), (70, 33)])
    def test_causal_is_top_left(self, lengths, is_causal, dtype, rng):
        inputs = make_inputs(rng, seqlen_q=lengths[0], seqlen_kv=lengths[1], dtype=dtype)
        self.check(*inputs, is_causal=is_causal)

    @pytest.mark.parametrize("shape", [(5, 70), (1, 70), (3, 5, 70), (2, 1, 5, 70), (2, 3, 5, 70)])
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_masks(self, shape, is_causal, rng):
        inputs = broadcast_inputs(rng)
        mask = rng.random(shape) < 0.6
        self.check(*inputs, mask, is_causal=is_causal)
        bias = rng.standard_normal(shape).astype(np.float32)
        self.check(*inputs, bias, is_causal=is_causal, scale=-0.7)

    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    def test_gqa(self, kv_heads, rng):
        mask = rng.random((4, 1, 7)) < 0.6
        self.check(*make_inputs(rng, heads=4, kv_heads=kv_heads), mask, enable_gqa=True)

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_axes_of_one_broadcast(self, which, axis, rng):
        inputs = list(make_inputs(rng, heads=4))
        inputs[which] = np.take(inputs[which], [0], axis)
        self.check(*inputs, is_causal=True)
        self.check(*inputs, rng.random((2, 4, 5, 7)) < 0.6)

    @pytest.mark.parametrize("ndim", [2, 3, 5])
    def test_other_numbers_of_axes(self, ndim, rng):
        inputs = make_inputs(rng, batch=(2, 3))
        inputs = [x[(0,) * (5 - ndim)] for x in inputs]
        self.check(*inputs, rng.random((5, 7)) < 0.6)

    def test_against_torch(self, rng):
        inputs = make_inputs(rng, seqlen_q=33, seqlen_kv=70)
        theirs = torch.nn.functional.scaled_dot_product_attention(*map(torch.from_numpy, inputs))
        ours = fastattn.scaled_dot_product_attention(*inputs)
        assert_allclose(ours, theirs.numpy(), rtol=0, atol=rounding_bound(*inputs))

    def test_refusals(self, rng):
        inputs = make_inputs(rng, heads=4, kv_heads=2)
        with pytest.raises(ValueError, match="enable_gqa"):
            fastattn.scaled_dot_product_attention(*inputs)
        with pytest.raises(ValueError, match="dropout_p"):
            fastattn.scaled_dot_product_attention(*inputs, dropout_p=0.1, enable_gqa=True)
        with pytest.raises(TypeError, match="attn_mask"):
            fastattn.scaled_dot_product_attention(
                *inputs, attn_mask=np.ones((5, 7), int), enable_gqa=True
            )


def test_naive_is_what_the_bound_is_made_of(rng):
    """The naive code and the reference agree, or a bound derived from it would mean nothing."""
    inputs = make_inputs(rng, heads=4, kv_heads=2, dtype=np.float64)
    for ours, expected in zip(
        naive(*inputs), reference.attention(*inputs, return_lse=True), strict=True
    ):
        assert_allclose(ours, expected, rtol=1e-13)


def test_bfloat16_is_that_of_ml_dtypes(rng):
    inputs = make_inputs(rng, dtype=ml_dtypes.bfloat16)
    assert fastattn.attention(*inputs).dtype == ml_dtypes.bfloat16
