"""Arguments at random: shapes at the ends of tiles, memory in any order, numbers of every kind.

Everything is drawn from a `random.Random`. That of a seed gives the same call every time; that of
hypothesis gives calls that it can make smaller.
"""

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
from numba import njit

import fastattn
from fastattn import masks

FLOATS = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]

# One key to three chunks, beside the ends of blocks and registers.
LENGTHS_Q = [0, 1, 1, 1, 2, 3, 5, 15, 16, 17, 33, 64, 65, 130]
LENGTHS_KV = [0, 1, 2, 7, 31, 63, 64, 65, 127, 130, 511, 513, 600, 1030]
FEATURES = [1, 2, 3, 7, 8, 16, 17, 24, 32, 40, 64, 65]
MOST_SCORES = 20_000
# Beside the ends of spans of 4096 keys, whose sums are set aside; seldom, with few heads.
LENGTHS_KV_OF_SPANS = [4095, 4096, 4097, 4160, 5000, 8192, 8193, 9000]
MOST_SCORES_OF_SPANS = 200_000
MOST_SCORES_IN_PYTHON = 3_000  # where the reference calls a function for each


def chance(dice: Random, p: float = 0.25) -> bool:
    """Return True so often."""
    return dice.random() < p


def generator(dice: Random) -> np.random.Generator:
    """Return NumPy's generator from a seed of the dice: for the elements of arrays."""
    return np.random.default_rng(dice.getrandbits(32))


# ---------------------------------------------------------------------------
# Arrays
# ---------------------------------------------------------------------------


def numbers(dice: Random, shape: tuple[int, ...], dtype: Any, *, tame: bool = False) -> Any:
    """Return an array of some kind of numbers, in memory of some order."""
    return in_memory(dice, elements(dice, shape, dtype, tame=tame))


def elements(dice: Random, shape: tuple[int, ...], dtype: Any, *, tame: bool = False) -> Any:
    """Return normal numbers, or what floats can hold beside them."""
    rng = generator(dice)
    dtype = np.dtype(dtype)
    x = rng.standard_normal(shape)
    if dtype.kind in "iub":
        return (x * 3).astype(np.int8).astype(dtype)
    if not tame and chance(dice, 0.3):
        limits = ml_dtypes.finfo(dtype)
        largest, tiny = float(limits.max), float(limits.smallest_subnormal)
        kind = dice.choice(["special", "huge", "tiny", "constant", "large", "cancelling", "wide"])
        if kind == "special":
            specials = [np.nan, np.inf, -np.inf, 0.0, -0.0, largest, -largest, tiny, -tiny]
            chosen = rng.choice(specials, shape)
            x = np.where(rng.random(shape) < dice.choice([0.003, 0.1, 1.0]), chosen, x)
        elif kind == "huge":
            x = np.clip(x, -4, 4) * (largest / 4)
        elif kind == "tiny":
            x = x * tiny * 8
        elif kind == "constant":
            x = np.full(shape, dice.choice([0.0, 1.0, -1.0, 100.0]))
        elif kind == "large":
            x = x * 100
        elif kind == "cancelling":
            x = np.where(np.arange(x.size).reshape(shape) % 2, 1e3, -1e3) + x
        else:
            x = x * 2.0 ** rng.integers(-12, 13, shape)
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def in_memory(dice: Random, x: Any) -> Any:
    """Return the numbers of x in memory of some order, step, direction and alignment.

    One of stride zero holds other numbers: those of one entry along an axis.
    """
    if x.ndim == 0 or chance(dice, 0.5):
        return np.asarray(x)
    if chance(dice, 0.15) and x.dtype.name != "bfloat16":
        return x.astype(x.dtype.newbyteorder())
    # A list of int8 is an array of int64, which has no common type with bfloat16.
    if chance(dice, 0.05) and x.dtype.name not in ("bfloat16", "int8") and 0 < x.size < 500:
        return x.tolist()
    if chance(dice, 0.15) and x.ndim and x.size:
        axis = dice.randrange(x.ndim)
        return np.broadcast_to(np.take(x, [0], axis), x.shape)
    order = dice.sample(range(x.ndim), x.ndim)
    steps = [dice.choice([1, 1, 1, 2, 3]) for _ in order]
    first = [dice.choice([0, 0, 1, 5]) for _ in order]
    signs = [dice.choice([1, 1, 1, -1]) for _ in order]
    held = [
        x.shape[axis] * step + start for axis, step, start in zip(order, steps, first, strict=True)
    ]
    offset = dice.choice([0, 0, 0, 1, x.itemsize])
    memory = np.zeros(int(np.prod(held)) * x.itemsize + offset, np.uint8)
    view = memory[offset:].view(x.dtype).reshape(held)
    view = view[tuple(slice(start, None, step) for start, step in zip(first, steps, strict=True))]
    view = view[tuple(slice(None, None, sign) for sign in signs)]
    view = view.transpose(np.argsort(order)) if order else view
    view[...] = x
    if chance(dice, 0.2):
        view.flags.writeable = False
    return view


def broadcastable(dice: Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape that broadcasts to another: axes left out in front, axes of 1."""
    shape = tuple(1 if chance(dice, 0.4) else n for n in shape)
    return shape[dice.randrange(len(shape) + 1) :] if chance(dice) else shape


# ---------------------------------------------------------------------------
# Functions of scores. Few, because each is compiled.
# ---------------------------------------------------------------------------


@njit
def halve(score, b, h, i, j):
    return score * 0.5 + 0.01 * (i - j)


@njit
def hide_some(score, b, h, i, j):
    return -np.inf if (i + j + b) % 4 == 0 else score


@njit
def two_of_three(b, h, i, j):
    return (i + j + h) % 3 != 0


def every_fifth(b, h, i, j):
    return j % 5 == 0 or b + h > i


SCORE_MODS = [halve, hide_some]


def mask_mod(dice: Random, seqlen_q: int, seqlen_kv: int) -> Any:
    """Return a function of our own or one of `masks`."""
    rng = generator(dice)
    kind = dice.randrange(6)
    if kind == 0:
        return masks.causal(dice.randrange(-3, 9))
    if kind == 1:
        return masks.window(dice.choice([None, 0, 5]), dice.choice([None, 0, 9]))
    if kind == 2:  # shorter than the rows at times
        ids = (
            np.sort(rng.integers(0, 4, dice.choice([n, n // 2 + 1]))) for n in (seqlen_q, seqlen_kv)
        )
        return masks.document(*ids)
    if kind == 3:
        return masks.prefix_lm(rng.integers(0, seqlen_kv + 2, dice.choice([1, 2])))
    return dice.choice([two_of_three, every_fifth])


# ---------------------------------------------------------------------------
# Calls of attention
# ---------------------------------------------------------------------------


def attention(dice: Random, *, tame: bool = False, broadcasts: bool = True) -> dict[str, Any]:
    """Return the arguments of a valid call of `attention`, batch axes that broadcast among them."""
    batch = tuple(dice.choice([1, 1, 2, 3]) for _ in range(dice.choice([0, 1, 1, 1, 2])))
    if chance(dice, 0.03) and batch:
        batch = (*batch[1:], 0)
    kv_heads = dice.choice([1, 1, 2, 3])
    heads = kv_heads * dice.choice([1, 1, 2, 4, 5])
    seqlen_q, seqlen_kv = dice.choice(LENGTHS_Q), dice.choice(LENGTHS_KV)
    head_dim = dice.choice(FEATURES)
    head_dim_v = dice.choice([head_dim, head_dim, *FEATURES, 0])
    has_spans = chance(dice, 0.02)
    if has_spans:
        batch, kv_heads, seqlen_kv = (), 1, dice.choice(LENGTHS_KV_OF_SPANS)
        heads = dice.choice([1, 2])
    entries = heads * int(np.prod(batch))

    call: dict[str, Any] = {}
    if chance(dice, 0.15) and not has_spans:
        call["score_mod"] = dice.choice(SCORE_MODS)
    if chance(dice, 0.15) and not has_spans:
        call["mask_mod"] = mask_mod(dice, seqlen_q, seqlen_kv)
    has_blocks = chance(dice, 0.15) and not has_spans
    most = MOST_SCORES_IN_PYTHON if call or has_blocks else MOST_SCORES
    while has_spans and entries * seqlen_q * seqlen_kv > MOST_SCORES_OF_SPANS:
        seqlen_q = -(-seqlen_q // 2)
    while not has_spans and entries * seqlen_q * seqlen_kv > most:
        seqlen_q, seqlen_kv = -(-seqlen_q // 2), -(-seqlen_kv * 3 // 4)
    if has_blocks:
        mod = mask_mod(dice, seqlen_q, seqlen_kv)
        shape = (dice.choice([1, int(np.prod(batch))]), dice.choice([1, heads]))
        size = dice.choice([16, 64, 128, 10, (3, 70)])
        call["block_mask"] = fastattn.create_block_mask(mod, *shape, seqlen_q, seqlen_kv, size)

    dtypes = [dice.choice(FLOATS)] * 3
    if chance(dice, 0.15):
        dtypes[dice.randrange(3)] = dice.choice([*FLOATS[:3], np.int8, np.int64, bool])
    if "bfloat16" in (names := {np.dtype(each).name for each in dtypes}) and names & {
        "float16",
        "int64",
    }:
        dtypes = [dtypes[0]] * 3  # which have no common type
    one_head = not batch and heads == 1 and chance(dice, 0.5)
    shapes = [
        (() if one_head else (*own, n), rows, features)
        for own, n, rows, features in zip(
            (*(_part(dice, batch) if broadcasts else batch for _ in range(2)), batch),
            (heads, kv_heads, kv_heads),
            (seqlen_q, seqlen_kv, seqlen_kv),
            (head_dim, head_dim, head_dim_v),
            strict=True,
        )
    ]
    blhd = not one_head and chance(dice, 0.15)
    if blhd:
        call["layout"] = "blhd"
    for name, (front, *back), dtype in zip(("query", "key", "value"), shapes, dtypes, strict=True):
        shape = (*front[:-1], back[0], front[-1], back[1]) if blhd else (*front, *back)
        call[name] = numbers(dice, shape, dtype, tame=tame)

    scores = (*batch, heads, seqlen_q, seqlen_kv)
    if one_head and len(scores) == 3 and chance(dice, 0.5):
        scores = scores[1:]
    rng = generator(dice)
    if chance(dice):
        mask = rng.random(broadcastable(dice, scores)) < dice.choice([0.0, 0.2, 0.8, 1.0])
        call["mask"] = in_memory(dice, np.asarray(mask))
    if chance(dice):
        dtype = dice.choice([*FLOATS, np.int16])
        call["bias"] = numbers(dice, broadcastable(dice, scores), dtype, tame=tame)
    call |= positions(dice, batch, seqlen_kv)
    call |= terms(dice, batch, heads)
    if chance(dice, 0.1):
        call["kv_lengths"] = per_batch(dice, batch, 0, seqlen_kv)
    if chance(dice, 0.05):
        call["precision"] = "highest"
    return call


def _part(dice: Random, batch: tuple[int, ...]) -> tuple[int, ...]:
    """Return batch axes that broadcast to others."""
    return broadcastable(dice, batch) if batch and chance(dice, 0.2) else batch


def per_batch(dice: Random, batch: tuple[int, ...], low: int, high: int) -> Any:
    """Return one integer, or one for each batch entry, of some integer type."""
    if not batch or chance(dice, 0.5):
        return dice.choice([int, np.int16])(dice.randint(low, high))
    return generator(dice).integers(low, high + 1, batch).astype(dice.choice([np.int64, np.int16]))


def positions(dice: Random, batch: tuple[int, ...], seqlen_kv: int) -> dict[str, Any]:
    """Return keywords about where queries stand and how far they see."""
    call: dict[str, Any] = {}
    if chance(dice, 0.4):
        call["causal"] = dice.choice([True, "top_left", "bottom_right", np.bool_(True)])
    if chance(dice):
        left, right = (dice.choice([None, 0, 1, 7, 80, 10**18, 3.0]) for _ in range(2))
        call["window"] = dice.choice([(left, right), [left, right]])
    if chance(dice, 0.2):
        call["query_offset"] = per_batch(dice, batch, -20, seqlen_kv + 20)
        if chance(dice, 0.1):
            call["query_offset"] = dice.choice([-1, 1]) * 2 ** dice.randrange(49)
    return call


def terms(dice: Random, batch: tuple[int, ...], heads: int) -> dict[str, Any]:
    """Return keywords about scores that packed sequences know, too."""
    rng = generator(dice)
    call: dict[str, Any] = {}
    if chance(dice):
        call["softcap"] = dice.choice([0.5, 1, 30.0, np.float32(5), 1e-30, 1e30, 2.0**-140, 1e-6])
    if chance(dice):
        shape = dice.choice([(heads,), (*batch, heads)])
        slopes = rng.random(shape) * dice.choice([1, 1, 100, -1, 1e-30])
        call["alibi_slopes"] = slopes.astype(dice.choice([np.float32, np.float64]))
    if chance(dice):
        sinks = rng.standard_normal(heads) * dice.choice([1, 1, 50])
        call["sinks"] = np.where(rng.random(heads) < 0.2, -np.inf, sinks)
    if chance(dice):
        call["scale"] = dice.choice(
            [0, 0.0, -0.5, 1, 1e-30, 1e30, np.float32(0.3), dice.gauss(0, 1)]
        )
    return call


# ---------------------------------------------------------------------------
# What is wrong
# ---------------------------------------------------------------------------

# Anything at all, for any argument.
JUNK: list[Callable[[], Any]] = [
    lambda: None,
    lambda: True,
    lambda: 0,
    lambda: -1,
    lambda: 1.5,
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: 2**70,
    lambda: -(2**70),
    lambda: 10**400,
    lambda: "x",
    lambda: b"x",
    list,
    dict,
    set,
    object,
    lambda: [[1.0], [2.0, 3.0]],
    lambda: (1, 2),
    lambda: (1, 2, 3),
    lambda: slice(1),
    lambda: range(3),
    lambda: 1j,
    lambda: np.array([]),
    lambda: np.array("x"),
    lambda: np.array(3),
    lambda: np.uint64(2**64 - 1),
    lambda: np.zeros((2, 2)),
    lambda: np.zeros((1, 1, 1, 1), np.complex64),
    lambda: np.zeros((0, 3, 0), bool),
    lambda: np.zeros(3, "f4,i4"),
    lambda: np.datetime64("2026-01-01"),
    lambda: np.ones((3, 3), object),
    lambda: np.float16(3),
    lambda: np.ma.masked_array([1.0, 2.0], [True, False]),
    lambda: memoryview(bytes(8)),
    lambda: partial(max, 1),
    lambda: len,
    lambda: Random,
    lambda: every_fifth,
]


def junk(dice: Random) -> Any:
    """Return something."""
    return dice.choice(JUNK)()
