"""Every error of the contract: its type, its message, and that it leaves nothing behind.

A message names the argument, what was expected and what came. After an error all arrays hold what
they held, `out` too, and a valid call gives what it gave before.
"""

import pickle
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from checks import assert_same_bits
from numba import njit

import fastattn
from fastattn import (
    BlockMask,
    attention,
    attention_weights,
    create_block_mask,
    masks,
    merge_states,
    scaled_dot_product_attention,
    set_num_threads,
    varlen_attention,
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


def causal(b, h, i, j):
    return j <= i


def valid_arguments(function):
    """Return arguments that a row of the table replaces some of."""
    if function is attention:
        return inputs("query", "key", "value") | {"out": np.full((2, 4, 5, 6), 7, np.float32)}
    if function is scaled_dot_product_attention:
        return inputs("query", "key", "value") | {"enable_gqa": True}
    if function is attention_weights:
        return inputs("query", "key")
    if function is varlen_attention:
        arrays = {"query": ones(9, 4, 8), "key": ones(7, 2, 8), "value": ones(7, 2, 6)}
        return arrays | {"cu_seqlens_q": [0, 4, 9], "cu_seqlens_kv": [0, 7, 7]}
    if function is create_block_mask:
        return {"mask_mod": causal, "B": 1, "Hq": 1, "Lq": 5, "Lk": 7}
    if function is BlockMask:
        states = np.zeros((1, 2, 3, 2), int)
        sizes = {"block_size": (16, 64), "shape": (1, 2, 40, 100)}
        return {"states": states, "mask_mod": causal, **sizes}
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
    (attention, {"query": ones(2, 4, 5, 8, dtype=BFLOAT16), "key": ones(2, 2, 7, 8, dtype=int)},
     TypeError, r"^query, key, value must have a common dtype: got bfloat16, int64, float32$"),
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
     r"^key\.shape\[-1\] must equal query\.shape\[-1\]: got 8 and 9$"),
    (attention, {"query": ones(2, 4, 5, 0), "key": ones(2, 2, 7, 0)}, ValueError,
     r"^query must have a head_dim of at least 1: got shape \(2, 4, 5, 0\)$"),
    *(
        (attention, {"key": ones(2, heads, 7, 8), "value": ones(2, heads, 7, 6)}, ValueError,
         rf"^the number of heads of key must .* {heads} and 4, as .* \(2, {heads}, 7, 8\) and ")
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
    (attention, {"mask": ones(2, 7) > 0}, ValueError,
     r"got shape \(2, 7\) \(if its first axis is the batch, mask\[:, None, None\] has room for "),
    (attention, {"mask": ones(2, 5, 7) > 0}, ValueError, r"the batch, mask\[:, None\] has room"),
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

VARIANTS = [
    *(
        (attention, {"window": window}, TypeError, r"^window must be a pair \(left, right\): got ")
        for window in (3, 1.5, "12", {1, 2}, object())
    ),
    *(
        (attention, {"window": window}, ValueError, r"^window must be a pair \(left, right\): got ")
        for window in ((), (1,), (1, 2, 3), [[1, 2]], np.zeros((3, 2)))
    ),
    *(
        (attention, {"window": window}, ValueError,
         r"^window must be whole numbers from 0, or None where it has no bound: got ")
        for window in ((-1, 0), (0, -1), (0.5, 1), (1, 2.5), (NAN, 1), (1, INF), np.array([3, -1]))
    ),
    *(
        (attention, {"window": window}, TypeError,
         r"^window must be ints, or None where it has no bound: got ")
        for window in (("1", 2), (True, 1), (1, 1j), ([1], 2))
    ),
    *(
        (attention, {"softcap": cap}, ValueError,
         r"^softcap must be above 0 and finite in float32: got ")
        for cap in (0, -1, 0.0, -INF, INF, NAN, 1e300, 1e-60)
    ),
    (attention, {"softcap": 10**400}, ValueError, r"^softcap must be finite: got "),
    *(
        (attention, {"softcap": cap}, TypeError, r"^softcap must be a real number: got ")
        for cap in ("3", 1j, [1.0, 2.0], object())
    ),
    *(
        (attention, {"alibi_slopes": np.ones(shape)}, ValueError,
         r"^alibi_slopes must have shape \(4,\) or \(2, 4\): got shape ")
        for shape in ((), (1,), (2,), (3, 4), (2, 1), (2, 4, 1), (1, 2, 4), (0,))
    ),
    *(
        (attention, {"alibi_slopes": [1, number, 2, 3]}, ValueError,
         r"^alibi_slopes must be finite: got ")
        for number in (NAN, INF, -INF, 1e300)
    ),
    *(
        (attention, {"sinks": np.ones(shape)}, ValueError,
         r"^sinks must have shape \(4,\): got shape ")
        for shape in ((), (1,), (2, 4), (5,), (0,))
    ),
    *(
        (attention, {"sinks": [1, number, 2, 3]}, ValueError,
         r"^sinks must be finite or -inf: got ")
        for number in (NAN, INF, 1e300)
    ),
    *(
        (attention, {name: np.ones(4, dtype)}, TypeError,
         rf"^{name} must be float16.*: got {dtype}")
        for name in ("alibi_slopes", "sinks") for dtype in ("bool", "complex64", "object")
    ),
    *(
        (attention, {"precision": word}, ValueError,
         r'^precision must be "highest" or "bf16": got ')
        for word in ("", "low", "BF16", None, 16)
    ),
    *(
        (attention, {"block_mask": mask}, TypeError,
         r"^block_mask must be a BlockMask from create_block_mask: got ")
        for mask in (np.ones((5, 7), bool), causal, 3)
    ),
    *(
        (attention, {"block_mask": create_block_mask(causal, *shape)}, ValueError,
         r"^block_mask must have shape \(2 or 1, 4 or 1, 5, 7\): got ")
        for shape in ((2, 4, 5, 8), (2, 4, 6, 7), (3, 4, 5, 7), (2, 2, 5, 7), (0, 4, 5, 7))
    ),
]  # fmt: skip

# Functions of the caller's, in a place that messages name.
NOT_FUNCTIONS = [3, "f", None, np.ones((5, 7), bool)]
WRONG_FUNCTIONS = [max, np.add, type("F", (), {"__call__": lambda self, *_: 0})(), int]

MODS = [
    *(
        (attention, {"score_mod": value}, TypeError,
         r"^score_mod must be a function of \(score, b, h, i, j\): got ")
        for value in NOT_FUNCTIONS if value is not None
    ),
    *(
        (attention, {"mask_mod": value}, TypeError,
         r"^mask_mod must be a function of \(b, h, i, j\): got ")
        for value in NOT_FUNCTIONS if value is not None
    ),
    *(
        (function, {"mask_mod": value}, TypeError, r"^mask_mod must be a Python function, or one ")
        for function in (attention, create_block_mask)
        for value in (*WRONG_FUNCTIONS, partial(causal, j=3))
    ),
    (create_block_mask, {"mask_mod": None}, TypeError,
     r"^mask_mod must be a function of \(b, h, i, j\): got None$"),
    *(
        (attention, {"score_mod": value}, TypeError,
         r"^score_mod must take the arguments \(score, b, h, i, j\): got .*_errors.py, line \d+, ")
        for value in (causal, lambda: 0, lambda s, b, h, i, j, k: s, partial(lambda a, s, b: s, 1),
                      njit(lambda score: score), lambda s, *, b, h, i, j: s)
    ),
    *(
        (attention, {"mask_mod": value}, TypeError,
         r"^mask_mod must take the arguments \(b, h, i, j\): got .*test_errors.py, line \d+, ")
        for value in (lambda s, b, h, i, j: True, lambda i, j: True, partial(causal, 1))
    ),
    *(
        (attention, {"score_mod": value}, TypeError,
         r"(?s)^score_mod must compile with Numba: got .*test_errors.py, line \d+: .*" + reason)
        for value, reason in (
            (lambda s, b, h, i, j: s + nowhere, "nowhere"),  # noqa: F821
            (lambda s, b, h, i, j: [x for x in s], r'test_errors.py", line \d+'),  # noqa: C416
            (lambda s, b, h, i, j: s.wrong, "wrong"),
            (lambda s, b, h, i, j: "text", "it returns Literal"),
            (lambda s, b, h, i, j: None, "it returns none"),
            (lambda s, b, h, i, j: (s, s), "it returns UniTuple"),
            (lambda s, b, h, i, j: 1j * s, "it returns complex"),
            (partial(lambda held, s, b, h, i, j: s, object()), "functools.partial must hold"),
        )
    ),
    *(
        (function, {"mask_mod": value}, TypeError,
         r"(?s)^mask_mod must compile with Numba: got .*test_errors.py, line \d+: .*" + reason)
        for function in (attention, create_block_mask)
        for value, reason in (
            (lambda b, h, i, j: i - j, "it returns int64"),
            (lambda b, h, i, j: 0.5, "it returns float64"),
            (lambda b, h, i, j: None, "it returns none"),
            (lambda b, h, i, j: open("x") is None, "open"),  # noqa: SIM115, PTH123
        )
    ),
    *(
        (create_block_mask, {name: value}, TypeError, rf"^{name} must be an int: got ")
        for name in ("B", "Hq", "Lq", "Lk", "block_size") for value in (1.0, "1", True)
    ),
    *(
        (create_block_mask, {name: -1}, ValueError, rf"^{name} must be at least 0: got -1$")
        for name in ("B", "Hq", "Lq", "Lk")
    ),
    *(
        (create_block_mask, {"block_size": value}, ValueError,
         r"^block_size must be at least 1: got ")
        for value in (0, -1, (0, 8), (8, -3))
    ),
    *(
        (create_block_mask, {"block_size": value}, ValueError,
         r"^block_size must be an int or a pair of ints: got ")
        for value in ((), (1,), [1, 2, 3])
    ),
    *(
        (create_block_mask, {name: 2**70}, ValueError,
         rf"^{name} must lie between -281474976710656 and 281474976710656: got 11805916")
        for name in ("B", "Hq", "Lq", "Lk", "block_size")
    ),
    *(
        (BlockMask, {name: value}, error, message)
        for name, value, error, message in (
            ("states", np.full((1, 2, 3, 2), 3), ValueError, r"^states must lie between 0 and 2"),
            ("states", np.full((1, 2, 3, 2), -1), ValueError, r"^states must lie between 0 and 2"),
            ("states", np.full((1, 2, 3, 2), 258), ValueError, r"^states must lie between 0 and 2"),
            ("states", np.ones((1, 2, 3, 2)), TypeError, r"^states must be integers: got float64$"),
            ("block_size", (0, 64), ValueError, r"^block_size must be at least 1: got 0$"),
            ("block_size", (1.5, 64), TypeError, r"^block_size must be an int: got 1.5 "),
            ("shape", (1, 2, 40), ValueError, r"^shape must be \(B, H, seqlen_q, seqlen_kv\): "),
            ("shape", (1, 2, -4, 5), ValueError, r"^shape must be at least 0: got -4$"),
            ("mask_mod", None, TypeError, r"^mask_mod must be a function of \(b, h, i, j\): got "),
        )
    ),
    *(
        (masks.document, {"segments": value}, error, message)
        for value, error, message in (
            ([0.0, 1.0], TypeError, r"^segments must be ints: got float64$"),
            (3, ValueError, r"^segments must have 1 or 2 dimensions: got shape \(\)$"),
            (np.zeros((2, 2, 2), int), ValueError, r"^segments must have 1 or 2 dimensions: got "),
        )
    ),
    (masks.window, {"left": -1, "right": 0}, ValueError, r"^window must be whole numbers from 0"),
    (masks.window, {"left": 1, "right": 0, "offset": 0.5}, TypeError, r"^offset must be an int"),
    (masks.prefix_lm, {"prefix": 1.5}, TypeError, r"^prefix must be ints: got float64$"),
]  # fmt: skip

VARLEN = [
    *(
        (varlen_attention, {name: ones(2, *shape)}, ValueError,
         rf"^{name} must have shape \(total, heads, features\): got \(2, ")
        for name, shape in (("query", (9, 4, 8)), ("key", (7, 2, 8)), ("value", (7, 2, 6)))
    ),
    *(
        (varlen_attention, {name: value}, TypeError, rf"^{name} must be ints: got ")
        for name in ("cu_seqlens_q", "cu_seqlens_kv")
        for value in ([0.0, 9.0], [True, False], ["0", "9"], [])
    ),
    *(
        (varlen_attention, {name: value}, ValueError,
         rf"^{name} must have shape \(sequences \+ 1,\): got shape ")
        for name in ("cu_seqlens_q", "cu_seqlens_kv")
        for value in (9, [[0, 9]], np.zeros(0, int))
    ),
    *(
        (varlen_attention, {"cu_seqlens_q": value}, ValueError,
         r"^cu_seqlens_q must rise from 0 to the number of rows, 9: got ")
        for value in ([1, 9], [0, 8], [0, 10], [9], [0, 5, 4, 9], [0, -1, 9], [0, 99, 9],
                      np.array([0, 2**64 - 1, 9], np.uint64), np.array([0, 2**63], np.uint64))
    ),
    (varlen_attention, {"cu_seqlens_kv": [0, 6, 3, 7]}, ValueError,
     r"^cu_seqlens_kv must rise from 0 to the number of rows, 7: got 0 to 7, with a fall$"),
    (varlen_attention, {"cu_seqlens_kv": [0, 7]}, ValueError,
     r"^cu_seqlens_kv must be as long as cu_seqlens_q: got 2 and 3$"),
    (varlen_attention, {"cu_seqlens_kv": None}, ValueError,
     r"^key must have as many rows as query where cu_seqlens_kv is not given: got 7 and 9$"),
    (varlen_attention, {"query_offset": [1, 2, 3]}, ValueError,
     r"^query_offset must be one number or broadcast to the batch axes \(2,\): got shape \(3,\)$"),
    (varlen_attention, {"alibi_slopes": np.ones((3, 4))}, ValueError,
     r"^alibi_slopes must have shape \(4,\) or \(2, 4\): got shape \(3, 4\)$"),
    (varlen_attention, {"sinks": np.ones(3)}, ValueError, r"^sinks must have shape \(4,\)"),
    (varlen_attention, {"softcap": -1}, ValueError, r"^softcap must be above 0"),
    (varlen_attention, {"window": (1, -1)}, ValueError, r"^window must be whole numbers from 0"),
    (varlen_attention, {"scale": NAN}, ValueError, r"^scale must be finite"),
    (varlen_attention, {"causal": 1}, TypeError, r"^causal must be a bool"),
    (varlen_attention, {"score_mod": causal}, TypeError, r"^score_mod must take the arguments"),
    (varlen_attention, {"mask_mod": 3}, TypeError, r"^mask_mod must be a function"),
    (varlen_attention, {"out": ones(9, 4, 5)}, ValueError, r"^out must have the result's shape"),
    (varlen_attention, {"key": ones(7, 3, 8), "value": ones(7, 3, 6)}, ValueError,
     r"^the number of heads of key must divide that of query: got 3 and 4, as "),
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
     r"^the number of heads of key must divide that of query: got 3 and 4, as "),
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
     r"^key\.shape\[-1\] must equal query\.shape\[-1\]: got 9 and 8$"),
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

TABLE = [
    *DTYPES,
    *SHAPES,
    *KEYWORDS,
    *VARIANTS,
    *MODS,
    *VARLEN,
    *OUTS,
    *TORCH,
    *WEIGHTS,
    *STATES,
    *RUNTIME,
]


def data_of(arguments):
    """Return what could be written to: functions cannot, nor be pickled."""
    return {name: each for name, each in arguments.items() if not name.endswith("_mod")}


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
    before = pickle.dumps(data_of(arguments))
    threads = fastattn.get_num_threads()
    with pytest.raises(error, match=message):
        function(**arguments)
    assert pickle.dumps(data_of(arguments)) == before, "an array was written to"
    assert fastattn.get_num_threads() == threads
    assert_same_bits(attention(**inputs("query", "key", "value")), expected)


@pytest.mark.parametrize(
    "function",
    [
        attention,
        scaled_dot_product_attention,
        attention_weights,
        varlen_attention,
        create_block_mask,
        merge_states,
    ],
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
