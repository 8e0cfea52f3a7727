"""Every error of the contract: its type, its message, and that it leaves nothing behind.

A message names the argument, what was expected and what came. After an error all arrays hold what
they held, `out` too, and a valid call gives what it gave before.
"""

import pickle

import ml_dtypes
import numpy as np
import pytest
from checks import assert_same_bits

import fastattn
from fastattn import (
    attention,
    attention_weights,
    merge_states,
    scaled_dot_product_attention,
    set_num_threads,
    warmup,
)

NAN, INF = float("nan"), float("inf")
BFLOAT16 = ml_dtypes.bfloat16
WRONG_DTYPES = ["complex64", "complex128", "object", "longdouble", "f4,i4", "M8[s]", "U3"]


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def inputs(*names):
    """Return valid arguments: 4 query heads read 2 kv heads, and every length differs."""
    shapes = {"query": (2, 4, 5, 8), "key": (2, 2, 7, 8), "value": (2, 2, 7, 6)}
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {name: arrays[name] for name in names}


def valid_arguments(function):
    """Return arguments that a row of the table replaces some of."""
    if function is attention:
        return inputs("query", "key", "value") | {"out": np.full((2, 4, 5, 6), 7, np.float32)}
    if function is scaled_dot_product_attention:
        return inputs("query", "key", "value") | {"enable_gqa": True}
    if function is attention_weights:
        return inputs("query", "key")
    if function is merge_states:
        return {"outputs": [ones(5, 6), ones(5, 6)], "lses": [ones(5), ones(5)]}
    return {}


DTYPES = [
    *(
        (attention, {name: np.zeros((2, heads, rows, size), dtype)}, TypeError,
         rf"^{name} must be float16, float32, float64 or bfloat16, or integer or bool: got ")
        for name, heads, rows, size in (("query", 4, 5, 8), ("key", 2, 7, 8), ("value", 2, 7, 6))
        for dtype in WRONG_DTYPES
    ),
    *(
        (attention, {"bias": np.zeros((5, 7), dtype)}, TypeError, r"^bias must be float16.*: got ")
        for dtype in [*WRONG_DTYPES, "bool"]
    ),
    *(
        (attention, {"mask": np.zeros((5, 7), dtype)}, TypeError, r"^mask must be bool.*: got ")
        for dtype in [*WRONG_DTYPES, "int64", "uint8", "float32"]
    ),
    (attention, {"query": ones(2, 4, 5, 8, dtype=np.float16),
                 "key": ones(2, 2, 7, 8, dtype=BFLOAT16)}, TypeError,
     r"^query, key, value must have a common dtype.*: got float16, bfloat16, float32$"),
    (attention, {"key": ones(2, 2, 7, 8, dtype=BFLOAT16),
                 "value": ones(2, 2, 7, 6, dtype=np.float16)}, TypeError,
     r"^query, key, value must have a common dtype.*: got float32, bfloat16, float16$"),
    (attention, {"key": None}, TypeError, r"^key must be float16.*: got object$"),
    (attention, {"key": [[1.0, 2.0], [3.0]]}, ValueError, r"^key must be an array or nested lists"),
]  # fmt: skip

SHAPES = [
    *(
        (attention, {name: ones(*shape)}, ValueError,
         rf"^{name} must have at least 2 dimensions: got shape ")
        for name in ("query", "key", "value") for shape in ((), (8,))
    ),
    *(
        (attention, {name: ones(5, 8), "layout": "blhd"}, ValueError,
         rf'^{name} must have at least 3 dimensions with layout="blhd": got shape \(5, 8\)$')
        for name in ("query", "key", "value")
    ),
    (attention, {"query": ones(2, 4, 5, 9)}, ValueError,
     r"^key\.shape\[-1\] must equal query\.shape\[-1\]: got 9 and 8$"),
    (attention, {"query": ones(2, 4, 5, 0), "key": ones(2, 2, 7, 0)}, ValueError,
     r"^query must have a head_dim of at least 1: got shape \(2, 4, 5, 0\)$"),
    *(
        (attention, {"key": ones(2, heads, 7, 8), "value": ones(2, heads, 7, 6)}, ValueError,
         rf"^the number of heads of key must divide that of query: got {heads} and 4$")
        for heads in (0, 3, 8)
    ),
    (attention, {"value": ones(2, 4, 7, 6)}, ValueError,
     r"^value must have as many heads as key: got num_kv_heads 2 in key and 4 in value$"),
    (attention, {"value": ones(2, 2, 8, 6)}, ValueError,
     r"^value must have as many rows as key: got seqlen_kv 7 in key and 8 in value$"),
    (attention, {"query": ones(3, 4, 5, 8)}, ValueError,
     r"^the batch axes of query, key and value must broadcast: got \(3,\), \(2,\) and \(2,\)$"),
    *(
        (attention, {name: np.zeros(shape, dtype)}, ValueError,
         rf"^{name} must broadcast to .* = \(2, 4, 5, 7\): got shape ")
        for name, dtype in (("mask", bool), ("bias", np.float32))
        for shape in ((6,), (5, 6), (2, 5, 7), (3, 1, 1, 7), (1, 2, 4, 5, 7), (0,))
    ),
    (attention, {"query": ones(2, 5, 4, 8), "key": ones(2, 7, 2, 8), "value": ones(2, 7, 2, 6),
                 "layout": "blhd", "mask": ones(2, 5, 4, 7, dtype=bool)}, ValueError,
     r"^mask must broadcast to .* = \(2, 4, 5, 7\): got shape \(2, 5, 4, 7\)$"),
]  # fmt: skip

KEYWORDS = [
    *(
        (attention, {"causal": causal}, TypeError,
         r'^causal must be a bool, "bottom_right" or "top_left": got .* of type ')
        for causal in (1, 0, None, 1.0, np.array([True]), b"top_left")
    ),
    *(
        (attention, {"causal": word}, ValueError,
         rf'^causal must be a bool, "bottom_right" or "top_left": got \'{word}\'$')
        for word in ("", "True", "bottom-right", "TOP_LEFT")
    ),
    *(
        (attention, {"layout": word}, ValueError,
         rf'^layout must be "bhld" or "blhd": got \'{word}\'$')
        for word in ("", "BHLD", "bhdl")
    ),
    *(
        (attention, {name: numbers}, TypeError, rf"^{name} must be an int or integers: got ")
        for name in ("kv_lengths", "query_offset")
        for numbers in (3.0, [1.0, 2.0], True, [True, False], "3", 1j, np.array([1, 2], object))
    ),
    *(
        (attention, {name: numbers}, ValueError,
         rf"^{name} must be one number or broadcast to the batch axes \(2,\): got shape ")
        for name in ("kv_lengths", "query_offset")
        for numbers in ([1, 2, 3], [[1], [2]], [[1, 2]])
    ),
    *(
        (attention, {"kv_lengths": numbers}, ValueError,
         r"^kv_lengths must lie between 0 and 7: got ")
        for numbers in (-1, 8, [-1, 3], [7, 8], np.array([0, 200], np.uint8))
    ),
    *(
        (attention, {name: number}, ValueError, rf"^{name} must .*: got ")
        for name in ("kv_lengths", "query_offset")
        for number in (2**62, -(2**62), np.uint64(2**63), 2**70)
    ),
    *(
        (attention, {"scale": scale}, ValueError, r"^scale must be finite: got ")
        for scale in (NAN, INF, -INF, np.float32(NAN), 10**400)
    ),
    *(
        (attention, {"scale": scale}, TypeError, r"^scale must be a real number or None: got ")
        for scale in (1j, "0.5", [1.0], np.ones(2), object())
    ),
    (attention, {"is_causal": True}, TypeError, "unexpected keyword argument 'is_causal'"),
]  # fmt: skip

OUTS = [
    *(
        (attention, {"out": ones(*shape)}, ValueError,
         r"^out must have the result's shape \(2, 4, 5, 6\): got ")
        for shape in ((2, 4, 5, 8), (4, 5, 6), (1, 4, 5, 6), (2, 5, 4, 6))
    ),
    *(
        (attention, {"out": ones(2, 4, 5, 6, dtype=dtype)}, TypeError,
         r"^out must have the result's dtype float32: got ")
        for dtype in ("float64", "float16", ">f4", "int32")
    ),
    (attention, {"out": ones(2, 4, 5, 6).tolist()}, TypeError,
     r"^out must be a NumPy array: got list$"),
    (attention, {"out": np.frombuffer(bytes(960), np.float32).reshape(2, 4, 5, 6)}, ValueError,
     r"^out must be writeable: got a read-only array$"),
    (attention, {"out": np.lib.stride_tricks.as_strided(ones(6), (2, 4, 5, 6), (0, 0, 0, 4))},
     ValueError, r"^out must have room for every element: got strides "),
    (attention, {"out": np.lib.stride_tricks.as_strided(ones(300), (2, 4, 5, 6), (480, 120, 4, 4))},
     ValueError, r"^out must have room for every element: got strides "),
]  # fmt: skip

TORCH = [
    *(
        (scaled_dot_product_attention, {"dropout_p": p}, ValueError,
         r"^dropout_p must be 0.*: got ")
        for p in (0.1, -1, NAN)
    ),
    *(
        (scaled_dot_product_attention, {"dropout_p": p}, TypeError, r"^dropout_p must .*: got ")
        for p in ("0", None)
    ),
    *(
        (scaled_dot_product_attention, {"attn_mask": np.zeros((5, 7), dtype)}, TypeError,
         r"^attn_mask must be bool or float: got ")
        for dtype in ("int64", "uint8", "complex64", "object", "longdouble")
    ),
    *(
        (scaled_dot_product_attention, {"attn_mask": np.zeros((5, 6), dtype)}, ValueError,
         r"^attn_mask must broadcast to .*: got shape \(5, 6\)$")
        for dtype in ("bool", "float32")
    ),
    *(
        (scaled_dot_product_attention, {"is_causal": word}, TypeError,
         r"^is_causal must be a bool: got ")
        for word in (1, "top_left", None)
    ),
    (scaled_dot_product_attention, {"enable_gqa": False}, ValueError,
     r"^query, key and value must have equal numbers of heads.* without enable_gqa: got 4, 2, 2$"),
    (scaled_dot_product_attention, {"key": ones(2, 3, 7, 8), "value": ones(2, 3, 7, 6)}, ValueError,
     r"^the number of heads of key must divide that of query: got 3 and 4$"),
    (scaled_dot_product_attention, {"query": ones(8)}, ValueError,
     r"^query must have at least 2 dimensions: got shape \(8,\)$"),
    (scaled_dot_product_attention, {"scale": NAN}, ValueError, r"^scale must be finite: got nan$"),
]  # fmt: skip

WEIGHTS = [
    (attention_weights, {"stage": "softmax"}, ValueError,
     r"^stage must be one of .*: got 'softmax'$"),
    *(
        (attention_weights, {"rows": rows}, ValueError, r"^rows must lie between 0 and 4: got ")
        for rows in (5, -1, [0, 5], np.array([-1]))
    ),
    *(
        (attention_weights, {"rows": rows}, TypeError,
         r"^rows must be an int, a slice or integers: got ")
        for rows in (1.0, "1", True, [True] * 5, slice(0.5, None))
    ),
    (attention_weights, {"key": ones(2, 2, 7, 9)}, ValueError,
     r"^key\.shape\[-1\] must equal query\.shape\[-1\]: got 8 and 9$"),
    (attention_weights, {"query": ones(8)}, ValueError, r"^query must have at least 2 dimensions"),
    (attention_weights, {"query": ones(2, 4, 5, 8, dtype=complex)}, TypeError,
     r"^query must be float16.*: got complex128$"),
    (attention_weights, {"query": ones(2, 4, 5, 8, dtype=np.float16),
                         "key": ones(2, 2, 7, 8, dtype=BFLOAT16)}, TypeError,
     r"^query, key must have a common dtype.*: got float16, bfloat16$"),
    (attention_weights, {"mask": ones(5, 7, dtype=int)}, TypeError, r"^mask must be bool"),
    (attention_weights, {"bias": ones(5, 6)}, ValueError, r"^bias must broadcast to"),
    (attention_weights, {"causal": 1}, TypeError, r"^causal must be a bool"),
    (attention_weights, {"query_offset": 0.5}, TypeError, r"^query_offset must be an int"),
    (attention_weights, {"kv_lengths": 8}, ValueError, r"^kv_lengths must lie between 0 and 7"),
    (attention_weights, {"scale": INF}, ValueError, r"^scale must be finite"),
    (attention_weights, {"layout": "lhd"}, ValueError, r"^layout must be"),
]  # fmt: skip

STATES = [
    (merge_states, {"outputs": [], "lses": []}, ValueError,
     r"^outputs and lses must be as many, and at least one: got 0 and 0$"),
    (merge_states, {"lses": [ones(5)]}, ValueError,
     r"^outputs and lses must be as many, and at least one: got 2 and 1$"),
    (merge_states, {"outputs": [ones(5, 6), ones(4, 6)]}, ValueError,
     r"^outputs\[1\] must have the shape of outputs\[0\] \(5, 6\): got \(4, 6\)$"),
    (merge_states, {"lses": [ones(5), ones(5, 1)]}, ValueError,
     r"^lses\[1\] must have the shape of its output without the last axis \(5,\): got \(5, 1\)$"),
    (merge_states, {"outputs": [ones(), ones()]}, ValueError,
     r"^outputs\[0\] must have at least 1 dimension: got shape \(\)$"),
    (merge_states, {"outputs": 3}, TypeError, r"^outputs must be .*: got "),
    (merge_states, {"lses": None}, TypeError, r"^lses must be .*: got "),
    (merge_states, {"outputs": [ones(5, 6), ones(5, 6, dtype=complex)]}, TypeError,
     r"^outputs\[1\] must be float16.*: got complex128$"),
    (merge_states, {"lses": [ones(5, dtype=object), ones(5)]}, TypeError,
     r"^lses\[0\] must be float16.*: got object$"),
    (merge_states, {"outputs": [ones(5, 6, dtype=np.float16), ones(5, 6, dtype=BFLOAT16)]},
     TypeError, r"^outputs\[0\], outputs\[1\] must have a common dtype.*: got float16, bfloat16$"),
]  # fmt: skip

RUNTIME = [
    *(
        (set_num_threads, {"n": n}, ValueError, r"^n must lie between 1 and \d+: got ")
        for n in (0, -1, 10**6)
    ),
    *(
        (set_num_threads, {"n": n}, TypeError, r"^n must be an int: got .* of type ")
        for n in (1.0, True, "1", None)
    ),
    *(
        (warmup, {"dtypes": dtypes}, TypeError, r"^dtypes must .*: got ")
        for dtypes in (["complex64"], [np.longdouble], ["nonsense"], "float32", 3)
    ),
]  # fmt: skip

TABLE = [*DTYPES, *SHAPES, *KEYWORDS, *OUTS, *TORCH, *WEIGHTS, *STATES, *RUNTIME]


@pytest.fixture(scope="module")
def expected():
    return attention(**inputs("query", "key", "value"))


@pytest.mark.parametrize(
    ("function", "wrong", "error", "message"),
    TABLE,
    ids=["-".join([function.__name__, *wrong]) for function, wrong, _, _ in TABLE],
)
def test_error(function, wrong, error, message, expected):
    arguments = valid_arguments(function) | wrong
    before = pickle.dumps(arguments)
    threads = fastattn.get_num_threads()
    with pytest.raises(error, match=message):
        function(**arguments)
    assert pickle.dumps(arguments) == before, "an array was written to"
    assert fastattn.get_num_threads() == threads
    assert_same_bits(attention(**inputs("query", "key", "value")), expected)


@pytest.mark.parametrize(
    "function", [attention, scaled_dot_product_attention, attention_weights, merge_states]
)
def test_arguments_that_the_table_starts_from_are_valid(function):
    function(**valid_arguments(function))


class TestOverlap:
    """`out` against inputs of as many elements, in one buffer."""

    SIZE = 2 * 4 * 8 * 8

    def call(self, name, shared, out):
        arguments = {each: np.zeros((2, 4, 8, 8), np.float32) for each in ("query", "key", "value")}
        return attention(**arguments | {name: shared}, out=out)

    def window(self, buffer, start):
        return buffer[start : start + self.SIZE].reshape(2, 4, 8, 8)

    @pytest.mark.parametrize("name", ["query", "key", "value", "bias"])
    @pytest.mark.parametrize("start", [0, 1, SIZE - 1])
    def test_sharing_an_element(self, start, name):
        buffer = np.arange(2 * self.SIZE, dtype=np.float32)
        before = buffer.copy()
        out = self.window(buffer, 0)
        with pytest.raises(ValueError, match=rf"^out must not share memory with {name}"):
            self.call(name, self.window(buffer, start), out)
        assert_same_bits(buffer, before)

    @pytest.mark.parametrize("byte", [0, 3])
    def test_sharing_a_byte_with_a_mask(self, byte):
        out = np.zeros((2, 4, 8, 8), np.float32)
        mask = out.view(np.bool_)[..., byte::4]
        with pytest.raises(ValueError, match=r"^out must not share memory with mask"):
            self.call("mask", mask, out)

    @pytest.mark.parametrize("name", ["query", "key", "value", "bias"])
    def test_foreign_array_of_the_same_memory(self, name):
        out = np.zeros((2, 4, 8, 8), np.float32)
        with pytest.raises(ValueError, match=rf"^out must not share memory with {name}"):
            self.call(name, memoryview(out), out)

    @pytest.mark.parametrize("name", ["query", "key", "value", "bias"])
    @pytest.mark.parametrize("axis", [0, 1, 2, 3])
    def test_neighbours_and_interleaved_views_are_fine(self, axis, name):
        """Every second entry along an axis is read, the others are written."""
        shape = [2, 4, 8, 8]
        shape[axis] *= 2
        buffer = np.zeros(shape, np.float32)
        before = (slice(None),) * axis
        out = buffer[(*before, slice(1, None, 2))]
        assert self.call(name, buffer[(*before, slice(0, None, 2))], out) is out
