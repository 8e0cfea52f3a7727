"""Programs for what stands around attention: the layer, and positions."""

from random import Random
from typing import Any

import ml_dtypes
import numpy as np

import fastattn
from fastattn import reference

from . import judge
from .calling import REFUSED, RIGHT, call, spoil
from .draw import FLOATS, chance, elements, generator, numbers
from .judge import expect

NAN, INF = float("nan"), float("inf")
COUNTS: list[Any] = [-1, 1.5, "x", None, True, [3], NAN]
NO_FLOATS: list[Any] = ["x", np.int16, complex, object, 5, "longdouble"]
NO_NUMBERS: list[Any] = [np.zeros((2, 2, 2), complex), "x", object(), [[1.0], [2.0, 3.0]]]


def eps(dtype: Any) -> float:
    """Return the distance from 1 to the next number."""
    return float(ml_dtypes.finfo(dtype).eps)


def exact(x: Any) -> Any:
    """Return an array in float64."""
    return np.asarray(x).astype(np.float64)


# ---------------------------------------------------------------------------
# MultiHeadAttention
# ---------------------------------------------------------------------------


def multi_head_attention(dice: Random) -> str:
    """Make a `MultiHeadAttention` and call it."""
    heads = dice.choice([1, 2, 4])
    arguments: dict[str, Any] = {
        "embed_dim": heads * dice.choice([1, 5, 16]),
        "num_heads": heads,
        "num_kv_heads": dice.choice([None, 1, heads]),
        "kdim": dice.choice([None, None, 7]),
        "vdim": dice.choice([None, None, 9]),
        "bias": chance(dice, 0.5),
        "dtype": dice.choice(FLOATS),
        "rng": dice.getrandbits(32),
    }
    faults: dict[str, list[Any]] = {
        "embed_dim": [0, *COUNTS],
        "num_heads": [0, 977, *COUNTS],
        "num_kv_heads": [0, 977, -1, 1.5, "x"],
        "kdim": [0, -1, 1.5, "x"],
        "vdim": [0, -1, 1.5, "x"],
        "dtype": NO_FLOATS,
    }
    arguments, must = spoil(dice, arguments, faults) if chance(dice, 0.2) else (arguments, RIGHT)
    layer = call(fastattn.MultiHeadAttention, arguments, must)
    if layer is REFUSED or must != RIGHT:
        return REFUSED
    if layer.b_q is not None:
        for name in ("b_q", "b_k", "b_v", "b_o"):
            shape, dtype = getattr(layer, name).shape, arguments["dtype"]
            setattr(layer, name, elements(dice, shape, dtype, tame=True))
    return _call_layer(dice, layer)


def _call_layer(dice: Random, layer: Any) -> str:
    batch = dice.choice([(), (1,), (2,), (2, 2)])
    seqlen_q, seqlen_kv = dice.choice([0, 1, 5, 17]), dice.choice([0, 1, 7, 65])
    dtype = dice.choice([layer.w_q.dtype, np.float32, np.float64])
    own = layer.kdim == layer.vdim == layer.embed_dim and chance(dice, 0.4)
    seqlen_kv = seqlen_q if own else seqlen_kv
    query = numbers(dice, (*batch, seqlen_q, layer.embed_dim), dtype, tame=True)
    arguments: dict[str, Any] = {"query": query}
    if not own:
        arguments["key"] = numbers(dice, (*batch, seqlen_kv, layer.kdim), dtype, tame=True)
        arguments["value"] = numbers(dice, (*batch, seqlen_kv, layer.vdim), dtype, tame=True)
    if chance(dice, 0.4):
        arguments["key_mask"] = generator(dice).random((*batch, seqlen_kv)) < 0.7
    if chance(dice, 0.4):
        arguments["causal"] = dice.choice([True, "top_left"])
    faults: dict[str, list[Any]] = {
        "query": [None, *NO_NUMBERS, np.ones(3), np.ones((2, 977))],
        "key": [*NO_NUMBERS, np.ones(3), np.ones((2, 977))],
        "value": [*NO_NUMBERS, np.ones(3), np.ones((2, 977))],
        "key_mask": [5, "x", np.ones((1, 977), bool), np.ones((1, 1))],
        "causal": ["x", 5, 1.0],
    }
    arguments, must = spoil(dice, arguments, faults)
    need_weights = chance(dice, 0.4)
    result = call(layer, {**arguments, "need_weights": need_weights}, must)
    if result is REFUSED:
        return REFUSED
    output, weights = result if need_weights else (result, None)
    _judge_layer(layer, output, weights, **arguments)
    return RIGHT


def _judge_layer(
    layer: Any,
    output: Any,
    weights: Any,
    query: Any,
    key: Any = None,
    value: Any = None,
    key_mask: Any = None,
    causal: Any = False,
) -> None:
    """Expect what the textbook gives with the layer's weights."""
    key = query if key is None else key
    value = key if value is None else value
    dtype = reference.result_dtype(*map(np.asarray, (query, key, value, layer.w_q)))

    def projected(x: Any, name: str, heads: int) -> Any:
        bias = getattr(layer, f"b_{name}")
        rows = exact(x) @ exact(getattr(layer, f"w_{name}")) + (0 if bias is None else exact(bias))
        rows = exact(rows.astype(dtype))  # rounded once, as the layer does
        return np.swapaxes(rows.reshape(*rows.shape[:-1], heads, layer.head_dim), -3, -2)

    one = np.ndim(query) == 2
    q, k, v = (exact(x)[None] if one else exact(x) for x in (query, key, value))
    heads = layer.num_kv_heads
    q, k, v = projected(q, "q", layer.num_heads), projected(k, "k", heads), projected(v, "v", heads)
    mask = None if key_mask is None else np.asarray(key_mask)[..., None, None, :]
    named = {"mask": mask, "causal": causal}
    context = np.swapaxes(reference.attention(q, k, v, **named), -3, -2)
    context = context.reshape(*context.shape[:-2], layer.embed_dim)
    truth = context @ exact(layer.w_o) + (0 if layer.b_o is None else exact(layer.b_o))
    truth = truth[0] if one else truth
    # The sums of four products, of numbers that are near 1, each a few dozen terms long.
    scale = 1 + max(np.abs(x).max(initial=0) for x in (q, k, v, truth))
    bound = 8 * eps(dtype) * scale**2 * (layer.embed_dim + 16) ** 0.5
    judge.near(output, truth, dtype, bound, "output")
    if weights is not None:
        truth = reference.attention_weights(q, k, **named)
        type_of_weights = reference.result_dtype(*map(np.asarray, (query, key, layer.w_q)))
        truth = truth[0] if one else truth
        expect(weights.shape == truth.shape, f"weights have shape {weights.shape}")
        loosest = max(eps(dtype), eps(type_of_weights))
        judge.near(weights, truth, weights.dtype, 8 * loosest * scale**2 * 8, "weights")


# ---------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------


def sinusoidal_positions(dice: Random) -> str:
    """Run `sinusoidal_positions`."""
    arguments = _table(dice) | {"dim": dice.choice([1, 2, 7, 64])}
    faults = _table_faults() | {"dim": [0, *COUNTS]}
    arguments, must = spoil(dice, arguments, faults)
    table = call(fastattn.sinusoidal_positions, arguments, must)
    if table is REFUSED:
        return REFUSED
    positions = np.arange(arguments["length"]) + int(arguments["offset"])
    columns = np.arange(arguments["dim"])
    angles = positions[:, None] / float(arguments["base"]) ** (
        (columns - columns % 2) / arguments["dim"]
    )
    truth = np.where(columns % 2, np.cos(angles), np.sin(angles))
    _judge_waves(table, truth, arguments["dtype"], angles)
    return RIGHT


def _table(dice: Random) -> dict[str, Any]:
    return {
        "length": dice.choice([0, 1, 5, 100]),
        "offset": dice.choice([0, 3, -5, 10**6, 10**12, np.int16(7)]),
        "base": dice.choice([10000.0, 1.5, 500000, 1e30, np.float32(10)]),
        "dtype": dice.choice(FLOATS),
    }


def _table_faults() -> dict[str, list[Any]]:
    return {
        "length": [-1, *COUNTS],
        "offset": [1.5, "x", None, True, [3], NAN],
        "base": [1, 0.5, -1, NAN, INF, "x", None, 1j],
        "dtype": NO_FLOATS,
    }


def _judge_waves(table: Any, truth: Any, dtype: Any, angles: Any) -> None:
    bound = eps(dtype) * (1 + np.abs(truth)) + 8 * np.abs(angles) * eps(np.float64)
    judge.near(table, truth, dtype, bound, "table")


def rotary_table(dice: Random) -> str:
    """Run `rotary_table`."""
    arguments = _table(dice) | {"dim": dice.choice([2, 8, 64]), "scaling": None}
    scalings: list[Any] = [
        {"rope_type": "default"},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 50},
        {"rope_type": "ntk", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 128},
    ]  # fmt: skip
    if chance(dice, 0.4):
        arguments["scaling"] = dice.choice(scalings)
    faults = _table_faults() | {
        "dim": [0, 3, *COUNTS],
        "scaling": ["x", {"rope_type": "x"}, {"rope_type": "linear"}, {"factor": 2.0}, [("a", 1)],
                    {"rope_type": "linear", "factor": NAN}, {"rope_type": "linear", "factor": "x"},
                    {"rope_type": [], "factor": 2.0}, {"rope_type": "ntk", "factor": 0}],
    }  # fmt: skip
    arguments, must = spoil(dice, arguments, faults)
    tables = call(fastattn.rotary_table, arguments, must)
    if tables is REFUSED:
        return REFUSED
    positions = np.arange(arguments["length"]) + int(arguments["offset"])
    powers = np.arange(0, arguments["dim"], 2) / arguments["dim"]
    angles = positions[:, None] * float(arguments["base"]) ** -powers
    for table, wave in zip(tables, (np.cos, np.sin), strict=True):
        if arguments["scaling"] is None:
            _judge_waves(table, wave(angles), arguments["dtype"], angles)
        judge.near(np.zeros_like(table), np.zeros(angles.shape), arguments["dtype"], 0, "table")
        expect((np.abs(exact(table)) < 4).all(), "a wave is too high, or no number")
    return RIGHT


def apply_rotary(dice: Random) -> str:
    """Run `apply_rotary`."""
    rows, pairs = dice.choice([1, 7, 33]), dice.choice([1, 4, 16])
    batch, length = dice.choice([(), (2,), (2, 3)]), dice.choice([0, 1, rows])
    dtype, kind = dice.choice([*FLOATS, np.int8]), dice.choice(FLOATS)
    features = 2 * pairs + dice.choice([0, 0, 5])
    given = chance(dice, 0.5) or length != rows
    arguments: dict[str, Any] = {
        "x": numbers(dice, (*batch, length, features), dtype, tame=True),
        "cos": numbers(dice, (rows, pairs), kind, tame=True),
        "sin": numbers(dice, (rows, pairs), kind, tame=True),
        "positions": generator(dice).integers(0, rows, length) if given else None,
        "interleaved": chance(dice, 0.5),
    }
    faults: dict[str, list[Any]] = {
        "x": [None, *NO_NUMBERS, np.ones(3), 5],
        "cos": [None, *NO_NUMBERS, np.ones(3), np.ones((977, 1)), np.ones((rows, 977))],
        "sin": [None, *NO_NUMBERS, np.ones(3), np.ones((977, 1))],
        "positions": [-1, 977, 1.5, "x", np.ones((9, 9, 9, 9, 9), int), 2**70, [[-1]]],
        "interleaved": [None, 5, "x"],
    }
    if length == 0:
        del faults["positions"]
    arguments, must = spoil(dice, arguments, faults)
    result = call(fastattn.apply_rotary, arguments, must)
    if result is REFUSED:
        return REFUSED
    x = np.asarray(arguments["x"])
    c, s = exact(arguments["cos"]), exact(arguments["sin"])
    if arguments["positions"] is not None:
        at = np.asarray(arguments["positions"]).astype(int)
        c, s = c[at], s[at]
    n = c.shape[-1]
    order = (
        np.arange(2 * n).reshape(n, 2).T
        if arguments["interleaved"]
        else np.arange(2 * n).reshape(2, n)
    )
    a, b = exact(x)[..., order[0]], exact(x)[..., order[1]]
    truth, size = exact(x).copy(), np.zeros(x.shape)
    truth[..., order[0]], truth[..., order[1]] = a * c - b * s, b * c + a * s
    size[..., order[0]] = size[..., order[1]] = (
        np.abs(a * c) + np.abs(b * s) + np.abs(b * c) + np.abs(a * s)
    )
    dtype = reference.result_dtype(x)
    judge.near(result, truth, dtype, 2 * eps(dtype) * size, "rotated")
    return RIGHT


def alibi_slopes(dice: Random) -> str:
    """Run `alibi_slopes`."""
    arguments = {"num_heads": dice.choice([1, 2, 3, 8, 12, 100]), "dtype": dice.choice(FLOATS)}
    faults = {"num_heads": [0, *COUNTS], "dtype": NO_FLOATS}
    arguments, must = spoil(dice, arguments, faults)
    slopes = call(fastattn.alibi_slopes, arguments, must)
    if slopes is REFUSED:
        return REFUSED
    n = int(arguments["num_heads"])
    power = 2 ** int(np.log2(n))
    truth = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    truth += [2 ** (-4 * h / power) for h in range(1, 2 * power, 2)][: n - power]
    judge.near(slopes, np.array(truth), arguments["dtype"], eps(arguments["dtype"]), "slopes")
    return RIGHT


def embed_tokens(dice: Random) -> str:
    """Run `embed_tokens`."""
    vocabulary, dim = dice.choice([1, 7, 100]), dice.choice([1, 2, 9, 64])
    shape = dice.choice([(0,), (1,), (5,), (2, 3)])
    arguments: dict[str, Any] = {
        "tokens": generator(dice).integers(0, vocabulary, shape),
        "table": numbers(dice, (vocabulary, dim), dice.choice(FLOATS), tame=True),
        "scale": dice.choice([1.0, dim**0.5, -2]),
    }
    faults: dict[str, list[Any]] = {
        "tokens": [None, 5, 1.5, "x", [977], [-1], [0.5], [2**70], [True]],
        "table": [None, *NO_NUMBERS, np.ones(3), np.ones((3, 0))],
        "scale": [NAN, INF, "x", None, 1j],
    }
    arguments, must = spoil(dice, arguments, faults)
    with np.errstate(over="ignore"):  # float16 times 2**70
        result = call(fastattn.embed_tokens, arguments, must)
    if result is REFUSED:
        return REFUSED
    tokens, table = np.asarray(arguments["tokens"]).astype(int), np.asarray(arguments["table"])
    dtype = reference.result_dtype(table)
    waves = exact(fastattn.sinusoidal_positions(tokens.shape[-1], table.shape[1], dtype=np.float64))
    truth = float(arguments["scale"]) * exact(table)[tokens] + waves
    bound = 2 * eps(dtype) * (np.abs(truth - waves) + 1)
    beyond = np.abs(truth) > float(ml_dtypes.finfo(dtype).max)
    truth = np.where(beyond, np.copysign(np.inf, truth), truth)
    judge.near(result, truth, dtype, bound, "embedded")
    return RIGHT
