"""Programs for the functions of attention, and for block masks."""

from random import Random
from typing import Any

import numpy as np

import fastattn
from fastattn import reference

from . import draw, judge
from .calling import REFUSED, RIGHT, call, spoil
from .draw import FLOATS, chance, elements, generator, in_memory, numbers
from .judge import expect

# ---------------------------------------------------------------------------
# Functions of arrays
# ---------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")

# Wrong in any call. An array that fits nothing has five rows in a prime number of heads.
ODD = np.ones((7, 5, 3), np.float32)
OF_NO_NUMBERS = [
    np.zeros((1, 1, 1, 1), np.complex64),
    np.array([[None]]),
    np.array([["x"]]),
    np.zeros((2, 2), "M8[s]"),
    np.zeros((2, 2), "f4,i4"),
    object(),
    None,
]
FAULTS: dict[str, list[Any]] = {
    "query": [*OF_NO_NUMBERS, np.float32(1), np.ones(3), [[1.0], [2.0, 3.0]]],
    "key": [*OF_NO_NUMBERS, np.float32(1), np.ones(3), np.ones((1, 1, 3, 99))],
    "value": [*OF_NO_NUMBERS, np.float32(1), np.ones(3), np.ones((1, 1, 4321, 2))],
    "causal": ["", "Top_left", 1, 0, None, 1.0, np.array([True])],
    "window": [(-1, 0), (0, 1.5), (1,), (1, 2, 3), "12", 5, (NAN, 0), (True, 1), {1, 2}],
    "query_offset": [1.5, "1", True, [[[1]]] * 7, 2**49, -(2**70), NAN, [1.0]],
    "softcap": [0, -1.0, NAN, INF, "5", [1, 2], 1j],
    "alibi_slopes": [np.ones(977), [NAN], "x", [True], np.ones((3, 977)), 1j, INF],
    "sinks": [np.ones(977), np.ones((1, 1)), [True] * 3, "x", 1.0],
    "scale": [NAN, INF, -INF, "1", [1.0, 2.0], 1j, 10**400],
    "score_mod": [5, "f", draw.two_of_three, lambda s: s, print],
    "mask_mod": [5, "f", draw.halve, lambda: True, print],
    "out": [5, [0.0], np.zeros((3, 977), np.float32), np.zeros((), np.float64)],
}
NO_STARTS: list[Any] = [5, "x", [], [[0, 1]], [0.0, 1.0], [0, 977], [1, 2], [0, -1, 3], 10**30]
FAULTS_OF_ATTENTION: dict[str, list[Any]] = {
    **FAULTS,
    "mask": [np.ones((1, 1), int), np.ones((1, 977), bool), [0.0], "x", np.ones((1,) * 9, bool)],
    "bias": [np.ones((1, 1), bool), np.ones((1, 977)), "x", 1j, np.ones((1,) * 9)],
    "kv_lengths": [-1, 43210, 1.5, "1", True, [[[1]]] * 7, 2**70],
    "block_mask": [
        5,
        np.ones((1, 1), bool),
        "x",
        fastattn.create_block_mask(lambda b, h, i, j: True, 1, 1, 977, 3),
    ],
    "layout": ["", "BHLD", None, 5],
    "precision": ["", "high", None, 5],
}


def attention(dice: Random) -> str:
    """Run `attention`."""
    arguments = draw.attention(dice)
    return_lse = chance(dice, 0.6)
    if chance(dice, 0.2):
        arguments["out"] = _out(dice, fastattn.attention(**arguments))
    arguments, must = spoil(dice, arguments, FAULTS_OF_ATTENTION)
    result = call(fastattn.attention, {**arguments, "return_lse": return_lse}, must)
    if result is REFUSED:
        return REFUSED
    out = arguments.pop("out", None)
    output, lse = result if return_lse else (result, None)
    expect(out is None or output is out, "another array than out was returned")
    judge.attention(output, lse, **arguments)
    return RIGHT


def _out(dice: Random, result: Any) -> Any:
    """Return room for a result, in memory of some order."""
    while True:
        out = in_memory(dice, np.zeros_like(result))
        is_room = isinstance(out, np.ndarray) and out.flags.writeable and out.dtype.isnative
        if is_room and all(s or n < 2 for s, n in zip(out.strides, out.shape, strict=True)):
            return out


def scaled_dot_product_attention(dice: Random) -> str:
    """Run `scaled_dot_product_attention`."""
    drawn = draw.attention(dice)
    arrays = {name: drawn[name] for name in ("query", "key", "value")}
    if drawn.get("layout") == "blhd":
        arrays = {name: np.swapaxes(x, -3, -2) for name, x in arrays.items()}
    mask = drawn.get("mask", drawn.get("bias"))
    is_mask = mask is not None and np.asarray(mask).dtype.kind in "bf"
    arguments = {**arrays, "enable_gqa": True, "scale": drawn.get("scale")}
    arguments |= {"attn_mask": mask if is_mask else None, "is_causal": chance(dice, 0.4)}
    faults = {name: FAULTS[name] for name in ("query", "key", "value", "scale")}
    faults["attn_mask"] = [np.ones((1, 1), int), np.ones((1, 977), bool), "x", 1j]
    faults["dropout_p"] = [0.1, "x", 1.0, NAN]
    arguments, must = spoil(dice, arguments, faults)
    result = call(fastattn.scaled_dot_product_attention, arguments, must)
    if result is REFUSED:
        return REFUSED
    mask = arguments["attn_mask"]
    name = "mask" if np.asarray(mask).dtype == bool else "bias"
    inputs = [arguments[name] for name in ("query", "key", "value")]
    causal = "top_left" if arguments["is_causal"] else False
    judge.attention(result, None, *inputs, causal=causal, scale=arguments["scale"], **{name: mask})
    return RIGHT


def varlen_attention(dice: Random) -> str:
    """Run `varlen_attention`."""
    sequences = dice.choice([0, 1, 2, 3, 6])
    rng = generator(dice)
    lengths = rng.choice(dice.choice([[0, 1, 2], [1, 17, 33], [0, 5, 64, 130]]), (2, sequences))
    kv_heads = dice.choice([1, 2, 3])
    heads = kv_heads * dice.choice([1, 2, 4])
    if sequences and chance(dice, 0.03):
        kv_heads, heads = 1, 1
        lengths[:, 0] = dice.choice([2, 17, 33]), dice.choice(draw.LENGTHS_KV_OF_SPANS)
    arguments = {"cu_seqlens_q": np.concatenate([[0], np.cumsum(lengths[0])])}
    if chance(dice, 0.7) or lengths.max(initial=0) > draw.LENGTHS_KV[-1]:
        arguments["cu_seqlens_kv"] = np.concatenate([[0], np.cumsum(lengths[1])])
    ends = [x[-1] for x in arguments.values()]
    if chance(dice, 0.3):
        arguments = {name: x.tolist() for name, x in arguments.items()}
    dtype, head_dim = dice.choice(FLOATS), dice.choice(draw.FEATURES)
    arguments["query"] = numbers(dice, (int(ends[0]), heads, head_dim), dtype)
    arguments["key"] = numbers(dice, (int(ends[-1]), kv_heads, head_dim), dtype)
    features = dice.choice([head_dim, 5])
    arguments["value"] = numbers(dice, (int(ends[-1]), kv_heads, features), dtype)
    arguments |= draw.positions(dice, (sequences,), 64)
    arguments |= draw.terms(dice, (sequences,), heads)
    if chance(dice, 0.1) and sum(ends) < 100:
        arguments["score_mod"] = dice.choice(draw.SCORE_MODS)
    if chance(dice, 0.1) and sum(ends) < 100:
        arguments["mask_mod"] = draw.mask_mod(dice, 30, 40)
    faults = {**FAULTS, "cu_seqlens_q": [*NO_STARTS, None], "cu_seqlens_kv": [*NO_STARTS]}
    if sequences > 1:
        for name, end in (("cu_seqlens_q", ends[0]), ("cu_seqlens_kv", ends[-1])):
            falling = [0, *range(int(end) + 1, int(end) + sequences), int(end)]
            faults[name] += [falling, [0, -1, *[int(end)] * (sequences - 1)]]
    arguments, must = spoil(dice, arguments, faults)
    return_lse = chance(dice, 0.6)
    result = call(fastattn.varlen_attention, {**arguments, "return_lse": return_lse}, must)
    if result is REFUSED:
        return REFUSED
    output, lse = result if return_lse else (result, None)
    _judge_packed(output, lse, **arguments)
    return RIGHT


def _judge_packed(
    output: Any,
    lse: Any,
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any = None,
    **keywords: Any,
) -> None:
    """Expect every sequence to be as by itself."""
    keywords.pop("out", None)
    starts = np.asarray(cu_seqlens_q)
    starts_kv = starts if cu_seqlens_kv is None else np.asarray(cu_seqlens_kv)
    q, k, v = (np.asarray(x) for x in (query, key, value))
    mods = {name: keywords.pop(name, None) for name in ("score_mod", "mask_mod")}
    for b in range(len(starts) - 1):
        own = {
            name: np.asarray(x)[b] if np.ndim(x) == axes else x
            for name, axes in (("query_offset", 1), ("alibi_slopes", 2))
            if (x := keywords.get(name)) is not None
        }
        if (mod := reference._in_python(mods["score_mod"])) is not None:
            own["score_mod"] = lambda s, _, *hij, b=b, mod=mod: mod(s, b, *hij)
        if (ask := reference._in_python(mods["mask_mod"])) is not None:
            own["mask_mod"] = lambda _, *hij, b=b, ask=ask: ask(b, *hij)
        rows, keys = (slice(x[b], x[b + 1]) for x in (starts, starts_kv))
        judge.attention(
            output[rows],
            None if lse is None else lse[:, rows],
            q[rows],
            k[keys],
            v[keys],
            **{**keywords, **own, "layout": "blhd"},
        )


def attention_weights(dice: Random) -> str:
    """Run `attention_weights`."""
    arguments = draw.attention(dice, broadcasts=False)
    del arguments["value"]
    arguments["stage"] = dice.choice(["scores", "softcapped", "biased", "probabilities"])
    rows = np.shape(arguments["query"])[-3 if arguments.get("layout") == "blhd" else -2]
    if rows and chance(dice, 0.5):
        some = [
            dice.randrange(rows),
            [0, rows - 1],
            np.arange(rows)[::2],
            (0, rows - 1),
            slice(-3, 5),
            slice(None, None, -2),
        ]
        arguments["rows"] = dice.choice(some)
    faults = {n: x for n, x in FAULTS_OF_ATTENTION.items() if n not in ("value", "out")}
    faults |= {"stage": ["", None, 5], "rows": [-1, 4321, 1.5, "x", [0.5], slice(0.5, 1)]}
    arguments, must = spoil(dice, arguments, faults)
    result = call(fastattn.attention_weights, arguments, must)
    if result is REFUSED:
        return REFUSED
    judge.weights(result, **{"rows": None, **arguments})
    return RIGHT


def merge_states(dice: Random) -> str:
    """Run `merge_states`."""
    parts = dice.choice([1, 2, 3, 7])
    shape = tuple(dice.choice([0, 1, 2, 5]) for _ in range(dice.choice([0, 1, 3])))
    dtype = dice.choice(FLOATS)
    log = np.float64 if dtype == np.float64 else np.float32
    outputs = [numbers(dice, (*shape, 6), dtype, tame=True) for _ in range(parts)]
    lses = [numbers(dice, shape, log, tame=True) for _ in range(parts)]
    if chance(dice, 0.5):
        lses = [np.where(generator(dice).random(shape) < 0.3, -np.inf, x) * 3 for x in lses]
    arguments: dict[str, Any] = {"outputs": outputs, "lses": lses}
    if chance(dice, 0.3):
        arguments = {
            name: np.stack([np.asarray(each) for each in x]) for name, x in arguments.items()
        }
    faults = {
        "outputs": [None, [], 5, "x", [np.ones((977, 6))] * parts, [*outputs, outputs[0]], [1j]],
        "lses": [None, [], 5, "x", [np.ones(977)] * parts, [*lses, lses[0]], ["x"] * parts],
    }
    arguments, must = spoil(dice, arguments, faults)
    result = call(fastattn.merge_states, arguments, must)
    if result is REFUSED:
        return REFUSED
    outputs, lses = ([np.asarray(x) for x in arguments[name]] for name in ("outputs", "lses"))
    dtype = reference.result_dtype(*outputs)
    wide = reference.accumulation_dtype(dtype)
    exact = [
        [x.astype(np.float64) for x in each] for each in (outputs, [x.astype(wide) for x in lses])
    ]
    truth, truth_lse = reference.merge_states(*exact)
    largest = max(np.abs(np.where(np.isfinite(x), x, 0)).max(initial=0) for x in exact[0])
    logs = max(np.abs(np.where(np.isfinite(x), x, 0)).max(initial=0) for x in exact[1])
    off = float(np.finfo(wide).eps) * (4 * logs + 4 * parts + 16)
    eps = float(judge.ml_dtypes.finfo(dtype).eps)
    judge.near(result[0], truth, dtype, np.expm1(min(off, 9)) * largest + eps * largest, "output")
    judge.near(result[1], truth_lse, wide, off, "lse")
    return RIGHT


# ---------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------


def create_block_mask(dice: Random) -> str:
    """Run `create_block_mask` and `BlockMask`."""
    if chance(dice, 0.3):
        return _block_mask(dice)
    sizes = {"B": dice.choice([0, 1, 2]), "Hq": dice.choice([0, 1, 3])}
    sizes |= {"Lq": dice.choice([0, 1, 16, 70]), "Lk": dice.choice([0, 1, 65, 130])}
    size = dice.choice([1, 7, 64, 128, (3, 70), [64, 16], 10**12])
    if size == 1:
        sizes |= {"Lq": 5, "Lk": 9}
    mod = draw.mask_mod(dice, sizes["Lq"], sizes["Lk"])
    arguments = {"mask_mod": mod, **sizes, "block_size": size}
    faults = {name: [-1, 1.5, "x", None, True, [3], NAN] for name in sizes}
    faults["mask_mod"] = [None, 5, "x", draw.halve, print, lambda: True]
    faults["block_size"] = [0, -1, 1.5, "x", None, (1,), (1, 2, 3), (0, 5), True]
    arguments, must = spoil(dice, arguments, faults)
    result = call(fastattn.create_block_mask, arguments, must)
    if result is REFUSED:
        return REFUSED
    shape = tuple(arguments[name] for name in sizes)
    expect(result.shape == shape, f"shape {result.shape}, not {shape}")
    ask = np.frompyfunc(reference._in_python(arguments["mask_mod"]), 4, 1)
    seen = np.asarray(ask(*np.indices(shape))).astype(bool)
    rows, columns = result.block_size
    for b, h, i, j in np.ndindex(result.states.shape):
        block = seen[b, h, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        state = 2 if block.all() else int(block.any())
        expect(result.states[b, h, i, j] == state, f"block {b, h, i, j} is not {state}")
    expect(0 <= result.sparsity <= 1, "a share beyond 0 and 1")
    expect(str(result) and repr(result), "a block mask shows nothing")
    return RIGHT


def _block_mask(dice: Random) -> str:
    """Make a `BlockMask` by hand."""
    arguments: dict[str, Any] = {
        "states": generator(dice).integers(0, 3, (1, 2, 3, 2)),
        "block_size": (16, 64),
        "shape": (1, 2, 40, 100),
        "mask_mod": draw.every_fifth,
    }
    faults = {
        "states": [
            None,
            np.zeros((1, 2, 3)),
            np.full((1, 2, 3, 2), 3),
            np.full((1, 2, 3, 2), -1),
            np.full((1, 2, 3, 2), 0.5),
            "x",
            np.full((1, 2, 3, 2), 258),
        ],
        "block_size": [None, 10**40, (16,), (0, 64), (-16, 64), (16.5, 64), "xy", (16, 64, 1)],
        "shape": [None, 5, (1, 2, 40), (1, 2, -40, 100), (1.0, 2, 40, 100), "1234"],
        "mask_mod": [None, 5, "x"],
    }
    arguments, must = spoil(dice, arguments, faults)
    result = call(fastattn.BlockMask, arguments, must)
    if result is REFUSED:
        return REFUSED
    query = elements(dice, (1, 2, 40, 8), np.float32, tame=True)
    key, value = elements(dice, (2, 1, 2, 100, 8), np.float32, tame=True)
    inputs = {"query": query, "key": key, "value": value, "block_mask": result}
    output = call(fastattn.attention, inputs, must)
    if output is REFUSED:
        return REFUSED
    judge.attention(output, None, **inputs)
    return RIGHT
