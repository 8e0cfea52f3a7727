"""Positions: against formulas worked term by term and transformers' figures.

ONNX's cases of rotary positions are in test_integrations_onnx.py.
"""

import math

import numpy as np
import pytest
from checks import BFLOAT16, FLOAT_DTYPES, assert_same_bits, rounding, to_float64
from numpy.testing import assert_allclose

from fastattn import alibi_slopes, apply_rotary, embed_tokens, rotary_table, sinusoidal_positions

ALL_POSITIONS = pytest.mark.parametrize("offset", [0, 1, 1000, -3])


# ---------------------------------------------------------------------------
# Sinusoidal
# ---------------------------------------------------------------------------


class TestSinusoidal:
    @ALL_POSITIONS
    @pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 64])
    def test_every_element_by_its_definition(self, dim, offset):
        ours = sinusoidal_positions(5, dim, offset=offset, base=100.0, dtype=np.float64)
        assert ours.shape == (5, dim)
        for p in range(5):
            for column in range(dim):
                angle = (p + offset) / 100.0 ** (2 * (column // 2) / dim)
                expected = math.cos(angle) if column % 2 else math.sin(angle)
                assert ours[p, column] == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_rounded_once(self, dtype):
        """Also far out, where an angle in float32 would be off by more than a wave."""
        exact = sinusoidal_positions(4, 6, offset=10**7, dtype=np.float64)
        assert_same_bits(sinusoidal_positions(4, 6, offset=10**7, dtype=dtype), exact.astype(dtype))

    def test_offset_continues(self):
        whole = sinusoidal_positions(10, 8)
        assert_same_bits(sinusoidal_positions(4, 8, offset=6), whole[6:])

    def test_empty(self):
        assert sinusoidal_positions(0, 8).shape == (0, 8)


class TestEmbedTokens:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_sum(self, dtype, rng):
        table = rng.standard_normal((9, 6)).astype(dtype)
        tokens = [[8, 0, 3], [3, 3, 1]]
        ours = embed_tokens(tokens, table, offset=2, base=100.0, scale=1.5)
        assert (ours.dtype, ours.shape) == (dtype, (2, 3, 6))
        waves = sinusoidal_positions(3, 6, offset=2, base=100.0, dtype=np.float64)
        expected = 1.5 * to_float64(table)[tokens] + waves
        # The lookup's product, the wave and the sum are rounded, the result once more.
        assert_allclose(
            to_float64(ours), expected, atol=4 * rounding(dtype) * np.abs(expected).max()
        )

    def test_integers_are_float64(self):
        ours = embed_tokens([0, 1], np.zeros((2, 4), int))
        assert_same_bits(ours, sinusoidal_positions(2, 4, dtype=np.float64))

    @pytest.mark.parametrize("tokens", [[], np.zeros((3, 0), np.int32)])
    def test_no_tokens(self, tokens):
        assert embed_tokens(tokens, np.zeros((2, 4))).shape == (*np.shape(tokens), 4)


# ---------------------------------------------------------------------------
# Rotary
# ---------------------------------------------------------------------------


def rotated_as_complex_numbers(x, angles, *, interleaved):
    """Return x with each pair of features as a complex number, times exp(i angle)."""
    half = angles.shape[-1]
    a, b = (
        (x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2])
        if interleaved
        else (x[..., :half], x[..., half : 2 * half])
    )
    turned = (a + 1j * b) * np.exp(1j * angles)
    result = x.copy()
    if interleaved:
        result[..., : 2 * half] = np.stack([turned.real, turned.imag], -1).reshape(
            *x.shape[:-1], 2 * half
        )
    else:
        result[..., : 2 * half] = np.concatenate([turned.real, turned.imag], -1)
    return result


class TestRotaryTable:
    @ALL_POSITIONS
    def test_every_element_by_its_definition(self, offset):
        cos, sin = rotary_table(5, 6, offset=offset, base=100.0, dtype=np.float64)
        for p in range(5):
            for i in range(3):
                angle = (p + offset) * 100.0 ** (-2 * i / 6)
                assert cos[p, i] == pytest.approx(math.cos(angle), abs=1e-12)
                assert sin[p, i] == pytest.approx(math.sin(angle), abs=1e-12)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_rounded_once(self, dtype):
        exact = rotary_table(4, 6, offset=10**7, dtype=np.float64)
        for ours, truth in zip(rotary_table(4, 6, offset=10**7, dtype=dtype), exact, strict=True):
            assert_same_bits(ours, truth.astype(dtype))


# The frequencies and the factor of cos and sin that transformers 5.24 computes, in float32, from
# `ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=length)` with head_dim 16.
SCALINGS = {
    "linear": (
        {"rope_type": "linear", "factor": 4.0}, 10000.0, 2,
        [0.25, 0.079056941, 0.0250000004, 0.00790569466,
         0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05], 1.0,
    ),
    "dynamic": (
        {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2048},
        10000.0, 6000,
        [1.0, 0.252299905, 0.0636552423, 0.0160602108,
         0.00405198941, 0.00102231663, 0.000257930369, 6.50758084e-05], 1.0,
    ),
    "dynamic within the original length": (
        {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2048},
        10000.0, 100,
        [1.0, 0.316227764, 0.100000001, 0.0316227786,
         0.00999999978, 0.00316227786, 0.00100000005, 0.000316227786], 1.0,
    ),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192}, 500000.0, 2,
        [1.0, 0.193922758, 0.0376060307, 0.00729266508,
         0.000524846022, 3.42810235e-05, 6.64786967e-06, 1.28917316e-06], 1.0,
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024,
         "attention_factor": None}, 10000.0, 2,
        [1.0, 0.316227764, 0.0812500045, 0.0197642371,
         0.00437500002, 0.000790569466, 0.000250000012, 7.90569466e-05], 1.138629436111989,
    ),
    "yarn without whole numbers": (
        {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0,
         "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096},
        10000.0, 2,
        [1.0, 0.225418001, 0.0508132726, 0.00679495931,
         0.000456483918, 1.8188337e-05, 4.09997847e-06, 9.24208962e-07], 1.3465735902799727,
    ),
    "yarn with mscale": (
        {"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7,
         "original_max_position_embeddings": 4096}, 10000.0, 2,
        [1.0, 0.316227764, 0.100000001, 0.0239147246,
         0.00512499968, 0.000849862176, 2.49999994e-05, 7.90569447e-06], 1.0879546075066122,
    ),
    "yarn with everything": (
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "beta_fast": 16,
         "beta_slow": 2, "original_max_position_embeddings": 1024}, 10000.0, 2,
        [1.0, 0.316227764, 0.100000001, 0.0197642371,
         0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05], 1.5,
    ),
}  # fmt: skip


class TestScaling:
    @pytest.mark.parametrize("name", SCALINGS)
    def test_against_transformers(self, name):
        """The first step is an angle of one frequency each, none above 1, and so tells it."""
        scaling, base, length, frequencies, factor = SCALINGS[name]
        cos, sin = rotary_table(length, 16, base=base, scaling=scaling, dtype=np.float64)
        # Theirs is a power in float32, whose exponent times log(base) is off by some rounding.
        room = 16 * rounding(np.dtype(np.float32))
        assert_allclose(np.arctan2(sin[1], cos[1]), frequencies, rtol=room)
        assert_allclose(np.hypot(sin[1], cos[1]), factor, rtol=1e-14)

    @pytest.mark.parametrize("dim", [2, 4, 64])
    def test_ntk(self, dim):
        """The highest frequency stays and the lowest is divided by the factor."""
        plain, scaled = (
            np.arctan2(sin[1], cos[1])
            for cos, sin in (
                rotary_table(2, dim, dtype=np.float64),
                rotary_table(2, dim, dtype=np.float64, scaling={"type": "ntk", "factor": 4.0}),
            )
        )
        assert scaled[0] == plain[0] == 1
        if dim > 2:
            assert scaled[-1] == pytest.approx(plain[-1] / 4, rel=1e-12)
            ratios = (scaled / plain)[1:] / (scaled / plain)[:-1]
            assert_allclose(ratios, ratios[0], rtol=1e-12)

    @pytest.mark.parametrize("scaling", [{}, {"rope_type": "default"}, {"type": None}])
    def test_none(self, scaling):
        for ours, plain in zip(
            rotary_table(9, 8, scaling=scaling), rotary_table(9, 8), strict=True
        ):
            assert_same_bits(ours, plain)

    def test_rope_theta_is_the_base(self):
        pair = rotary_table(9, 8, scaling={"rope_type": "default", "rope_theta": 500.0})
        for ours, expected in zip(pair, rotary_table(9, 8, base=500.0), strict=True):
            assert_same_bits(ours, expected)

    def test_dynamic_counts_from_the_beginning(self):
        """A step of decoding has the angles that the whole text would have."""
        scaling = {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
        whole, one = (
            rotary_table(n, 8, offset=40 - n, scaling=scaling, dtype=np.float64) for n in (40, 1)
        )
        for ours, expected in zip(one, whole, strict=True):
            assert_same_bits(ours, expected[-1:])


class TestApplyRotary:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize(("features", "rotated"), [(8, 8), (2, 2), (10, 6), (7, 4)])
    def test_every_dtype(self, features, rotated, interleaved, dtype, rng):
        x = rng.standard_normal((2, 3, 5, features)).astype(dtype)
        wide = np.float64 if dtype == np.float64 else np.float32
        cos, sin = rotary_table(5, rotated, dtype=wide)
        ours = apply_rotary(x, cos, sin, interleaved=interleaved)
        assert (ours.dtype, ours.shape) == (dtype, x.shape)
        angles = np.arange(5)[:, None] * 10000.0 ** (-np.arange(0, rotated, 2) / rotated)
        expected = rotated_as_complex_numbers(to_float64(x), angles, interleaved=interleaved)
        # Cosine, sine, two products and their difference are rounded, and the result once more.
        room = (6 * rounding(np.dtype(wide)) + rounding(dtype)) * np.abs(expected).max()
        assert_allclose(to_float64(ours), expected, rtol=0, atol=room)
        assert_same_bits(ours[..., rotated:], x[..., rotated:])

    @pytest.mark.parametrize("table", [np.float64, np.float16, BFLOAT16])
    def test_the_table_never_widens_the_result(self, table, rng):
        x = rng.standard_normal((5, 8), dtype=np.float32)
        cos, sin = rotary_table(5, 8, dtype=table)
        ours = apply_rotary(x, cos, sin)
        assert_same_bits(ours, apply_rotary(x, cos.astype(np.float32), sin.astype(np.float32)))

    def test_integers_are_float64(self):
        cos, sin = rotary_table(3, 4)
        assert apply_rotary(np.ones((3, 4), int), cos, sin).dtype == np.float64

    @pytest.mark.parametrize("interleaved", [False, True])
    def test_products_depend_on_distance_alone(self, interleaved, rng):
        query, key = rng.standard_normal((2, 1, 8))
        products = []
        for offset in (0, 100):
            cos, sin = rotary_table(8, 8, offset=offset, dtype=np.float64)
            left, right = (
                apply_rotary(x, cos, sin, positions=[p], interleaved=interleaved)
                for x, p in ((query, 7), (key, 4))
            )
            products.append((left @ right.T).item())
        assert products[0] == pytest.approx(products[1], rel=1e-12)

    def test_positions_of_each_layout(self, rng):
        """One series of positions for each of two texts, heads outside and inside."""
        x = rng.standard_normal((2, 3, 5, 8))
        cos, sin = rotary_table(40, 8)
        positions = rng.integers(0, 40, (2, 5))
        outside = apply_rotary(x, cos, sin, positions=positions[:, None, :])
        inside = apply_rotary(x.swapaxes(1, 2), cos, sin, positions=positions[:, :, None])
        assert_same_bits(np.ascontiguousarray(inside.swapaxes(1, 2)), outside)
        for b in range(2):
            rows = positions[b]
            assert_same_bits(outside[b], apply_rotary(x[b], cos[rows], sin[rows]))

    def test_without_positions_tables_broadcast(self, rng):
        x = rng.standard_normal((2, 3, 5, 8))
        cos, sin = (table.reshape(2, 1, 5, 4) for table in rotary_table(10, 8))
        ours = apply_rotary(x, cos, sin)
        for b in range(2):
            assert_same_bits(ours[b], apply_rotary(x[b], cos[b, 0], sin[b, 0]))

    @pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0, 3, 5, 8)])
    def test_empty(self, shape):
        cos, sin = rotary_table(shape[-2], 8)
        assert apply_rotary(np.zeros(shape), cos, sin).shape == shape

    def test_input_is_not_written(self, rng):
        x = rng.standard_normal((5, 8))
        x.flags.writeable = False
        assert not np.shares_memory(apply_rotary(x, *rotary_table(5, 4)), x)


# ---------------------------------------------------------------------------
# ALiBi
# ---------------------------------------------------------------------------


def slopes_of_the_authors(n):
    """The published recursion, at github.com/ofirpress/attention_with_linear_biases, reworded."""
    if n & (n - 1) == 0:
        return [2.0 ** (-8 * h / n) for h in range(1, n + 1)]
    below = 2 ** math.floor(math.log2(n))
    return slopes_of_the_authors(below) + slopes_of_the_authors(2 * below)[0::2][: n - below]


class TestAlibi:
    def test_figures_of_the_paper(self):
        """Section 3: for 8 heads 1/2, 1/4 ... 1/256; for 16 the square root of 1/2 comes first."""
        assert alibi_slopes(8).tolist() == [0.5**h for h in range(1, 9)]
        assert_allclose(alibi_slopes(16), [0.5 ** (h / 2) for h in range(1, 17)], rtol=1e-7)

    @pytest.mark.parametrize("num_heads", range(1, 70))
    def test_any_count(self, num_heads):
        ours = alibi_slopes(num_heads, dtype=np.float64)
        assert_allclose(ours, slopes_of_the_authors(num_heads), rtol=1e-14)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_dtype(self, dtype):
        assert_same_bits(alibi_slopes(12, dtype), alibi_slopes(12, np.float64).astype(dtype))


# ---------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------

COS = np.ones((5, 4), np.float32)
X = np.ones((2, 5, 8), np.float32)
TABLE = np.ones((3, 4))


def scaled(**scaling):
    """Return the arguments of a table with a scaling."""
    return {"length": 4, "dim": 8, "scaling": scaling}


LLAMA3 = {
    "type": "llama3",
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 64,
}

ERRORS = [
    *(
        (function, {"length": 4, "dim": 8, name: value}, error, message)
        for function in (sinusoidal_positions, rotary_table)
        for name, value, error, message in (
            ("length", 4.0, TypeError, r"^length must be an int: got 4\.0"),
            ("length", True, TypeError, r"^length must be an int: got True"),
            ("length", -1, ValueError, r"^length must be at least 0: got -1$"),
            ("dim", "8", TypeError, r"^dim must be an int: got '8'"),
            ("dim", 0, ValueError, r"^dim must be at least [12]: got 0$"),
            ("offset", 0.5, TypeError, r"^offset must be an int: got 0\.5"),
            ("base", "10", TypeError, r"^base must be a real number: got '10'"),
            ("base", 1, ValueError, r"^base must be finite and greater than 1: got 1$"),
            ("base", float("nan"), ValueError, r"^base must be finite and greater than 1: got nan"),
            ("base", float("inf"), ValueError, r"^base must be finite and greater than 1: got inf"),
            ("dtype", "int32", TypeError, r"^dtype must be one of float16, .*: got 'int32'$"),
            ("dtype", "complex64", TypeError, r"^dtype must be one of float16, .*: got"),
            ("dtype", "nonsense", TypeError, r"^dtype must be one of float16, .*: got 'nonsense'"),
            ("dtype", "longdouble", TypeError, r"^dtype must be one of float16, .*: got"),
        )
    ),
    (rotary_table, {"length": 4, "dim": 7}, ValueError, r"^dim must be even.*: got 7$"),
    (rotary_table, {"length": 4, "dim": 8, "scaling": "yarn"}, TypeError,
     r"^scaling must be a mapping: got 'yarn'$"),
    (rotary_table, scaled(type="longrope", factor=2), ValueError,
     r"^scaling\['rope_type'\] must be one of default, linear, ntk, .*: got {'type': 'longrope'"),
    (rotary_table, scaled(factor=2.0), ValueError, r"^scaling\['rope_type'\] must be one of"),
    (rotary_table, scaled(type="linear", rope_type="yarn", factor=2.0), ValueError,
     r"^scaling\['rope_type'\] must be one of"),
    (rotary_table, scaled(type="linear"), ValueError,
     r"^scaling of type 'linear': missing a required .*'factor'$"),
    (rotary_table, scaled(type="dynamic", factor=2), ValueError,
     r"^scaling of type 'dynamic': missing .*'original_max_position_embeddings'$"),
    (rotary_table, scaled(type="linear", factor=2, partial_rotary_factor=0.5), ValueError,
     r"^scaling of type 'linear': got an unexpected keyword argument 'partial_rotary_factor'$"),
    (rotary_table, scaled(type="linear", factor=0), ValueError,
     r"^scaling\['factor'\] must be finite and greater than 0: got 0$"),
    (rotary_table, scaled(type="linear", factor="2"), TypeError,
     r"^scaling\['factor'\] must be a real number: got '2'"),
    (rotary_table, scaled(type="default", rope_theta=1.0), ValueError,
     r"^scaling\['rope_theta'\] must be finite and greater than 1: got 1\.0$"),
    (rotary_table, scaled(**LLAMA3 | {"high_freq_factor": 1}), ValueError,
     r"^scaling\['high_freq_factor'\] must be greater than .*: got 1 and 1$"),
    (rotary_table, scaled(type="yarn", factor=2, original_max_position_embeddings=64, truncate=1),
     TypeError, r"^scaling\['truncate'\] must be a bool: got 1$"),
    (apply_rotary, {"x": np.ones(8)}, ValueError, r"^x must have at least 2 dim.*: got .*\(8,\)$"),
    (apply_rotary, {"x": X.astype(complex)}, TypeError, r"^x must be float16.*: got complex128$"),
    (apply_rotary, {"interleaved": 1}, TypeError, r"^interleaved must be a bool: got 1$"),
    (apply_rotary, {"cos": np.ones((5, 4), int)}, TypeError, r"^cos must be .*floats: got int64$"),
    (apply_rotary, {"sin": COS[:, :3]}, ValueError,
     r"^cos and sin must have one shape .*: got \(5, 4\) and \(5, 3\)$"),
    (apply_rotary, {"cos": COS[0], "sin": COS[0]}, ValueError, r"^cos and sin must have one shape"),
    (apply_rotary, {"x": X[..., :7]}, ValueError,
     r"^cos\.shape\[-1\] must be at most half of x\.shape\[-1\]: got 4 and 7$"),
    *(
        (apply_rotary, {"cos": table, "sin": table}, ValueError,
         r"^cos must have a row for each of the tokens of x, without positions: got shapes ")
        for table in (COS[:1], COS[:4], np.ones((6, 4)), np.ones((3, 5, 4)), np.ones((1, 2, 5, 4)))
    ),
    (apply_rotary, {"cos": COS[None], "sin": COS[None], "positions": [0] * 5}, ValueError,
     r"^cos must have 2 dimensions with positions: got shape \(1, 5, 4\)$"),
    (apply_rotary, {"positions": [0.0] * 5}, TypeError, r"^positions must be integers: got float"),
    (apply_rotary, {"positions": [0, 1]}, ValueError,
     r"^positions must broadcast to x\.shape\[:-1\] = \(2, 5\): got shape \(2,\)$"),
    *(
        (apply_rotary, {"positions": [p] * 5}, ValueError,
         r"^positions must lie between 0 and 4: got ")
        for p in (-1, 5)
    ),
    (embed_tokens, {"tokens": 1}, ValueError, r"^tokens must have at least 1 dimension: got"),
    (embed_tokens, {"tokens": [0.5]}, TypeError, r"^tokens must be integers: got float64$"),
    (embed_tokens, {"tokens": [True]}, TypeError, r"^tokens must be integers: got bool$"),
    *(
        (embed_tokens, {"tokens": [t]}, ValueError, r"^tokens must lie between 0 and 2: got ")
        for t in (-1, 3)
    ),
    *(
        (embed_tokens, {"table": np.ones(shape)}, ValueError,
         r"^table must have shape \(vocabulary, dim\): got ")
        for shape in ((3,), (3, 0), (1, 3, 4))
    ),
    (embed_tokens, {"table": TABLE.astype(object)}, TypeError, r"^table must be float16.*object$"),
    (embed_tokens, {"scale": "1"}, TypeError, r"^scale must be a real number: got '1'"),
    (alibi_slopes, {"num_heads": 0}, ValueError, r"^num_heads must be at least 1: got 0$"),
    (alibi_slopes, {"num_heads": 2.0}, TypeError, r"^num_heads must be an int: got 2\.0"),
    (alibi_slopes, {"num_heads": 2, "dtype": int}, TypeError, r"^dtype must be one of float16"),
]  # fmt: skip

VALID = {
    apply_rotary: {"x": X, "cos": COS, "sin": COS},
    embed_tokens: {"tokens": [0, 2], "table": TABLE},
}


@pytest.mark.parametrize(("function", "arguments", "error", "message"), ERRORS)
def test_error(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**VALID.get(function, {}) | arguments)


@pytest.mark.parametrize("function", VALID, ids=lambda function: function.__name__)
def test_arguments_that_the_table_starts_from_are_valid(function):
    function(**VALID[function])
    rotary_table(**scaled(**LLAMA3))
