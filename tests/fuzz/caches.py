"""Programs for the caches: some steps each, beside a list of all tokens that were ever appended."""

import tempfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import fastattn

from . import judge
from .calling import REFUSED, RIGHT, call, spoil
from .draw import FEATURES, FLOATS, chance, elements, generator, numbers
from .judge import expect

STORAGES = [*FLOATS, np.int8]
SIZES: list[Any] = [0, -1, 1.5, "x", None, True, [3], float("nan"), 2**70]
HEADS = [(1, 1), (2, 1), (2, 2), (6, 2), (20, 1)]
# Tokens beyond a span of keys whose sums are set aside; seldom, with few heads.
FIRST_OF_SPANS = [4090, 4097, 4200]
CAPACITY_OF_SPANS = 4500


def kept(x: Any, dtype: Any) -> Any:
    """Return in float64 what a cache keeps of rows; None for what int8 cannot hold."""
    with np.errstate(all="ignore"):
        if dtype != np.int8:
            return x.astype(dtype).astype(np.float64)
        wide = x.astype(np.float32)
        scale = np.abs(wide).max(axis=-1, initial=0)[..., None] / np.float32(127)
        if not np.isfinite(scale).all():
            return None
        steps = np.rint(wide / np.where(scale > 0, scale, np.float32(1))).clip(-127, 127)
        return steps.astype(np.float64) * scale


def result_type(query: Any, dtype: Any) -> Any:
    """Return the dtype that `attend` gives."""
    if dtype == np.int8:
        return query.dtype.newbyteorder("=")
    return np.result_type(query.dtype, dtype)


def query_dtype(dice: Random, dtype: Any) -> Any:
    """Return a dtype of queries that goes with that of a cache."""
    return dice.choice([dtype if dtype != np.int8 else np.float32, np.float32, np.float64])


# ---------------------------------------------------------------------------
# KVCache
# ---------------------------------------------------------------------------


def kv_cache(dice: Random) -> str:
    """Run steps of a `KVCache`."""
    window = dice.choice([None, None, None, 1, 5])
    arguments = {
        "batch": dice.choice([1, 2, 3]),
        "num_kv_heads": 1,
        "head_dim": dice.choice(FEATURES),
        "capacity": dice.choice([5, 8, 70, 600]),
        "head_dim_v": dice.choice([None, 5, 16]),
        "dtype": dice.choice(STORAGES),
        "grow": chance(dice, 0.4),
        "window": window,
    }
    heads, arguments["num_kv_heads"] = dice.choice(HEADS)
    has_spans = chance(dice, 0.02)
    if has_spans:
        heads, arguments["num_kv_heads"] = 2, 1
        arguments |= {"batch": 1, "capacity": CAPACITY_OF_SPANS, "window": None}
    names = ("batch", "num_kv_heads", "head_dim", "capacity")
    faults: dict[str, list[Any]] = dict.fromkeys(names, SIZES)
    faults |= {"head_dim_v": [n for n in SIZES if n is not None]}
    faults |= {"window": [0, -1, 10**6, 1.5, "x", True]}
    faults |= {"dtype": ["x", np.int16, complex, object, 5, "longdouble"]}
    arguments, must = spoil(dice, arguments, faults) if chance(dice, 0.2) else (arguments, RIGHT)
    cache = call(fastattn.KVCache, arguments, must)
    if cache is REFUSED or must != RIGHT:
        return REFUSED
    model = _Sequences(cache, heads, arguments["batch"])
    if has_spans:
        model.append(dice, dice.choice(FIRST_OF_SPANS))
    for _ in range(dice.randint(2, 8)):
        step = dice.choice([model.append, model.append, model.attend, model.attend, model.change])
        step(dice)
    model.attend(dice)
    return RIGHT


class _Sequences:
    """A cache, and the tokens of each of its sequences."""

    def __init__(self, cache: Any, heads: int, batch: int) -> None:
        self.cache, self.heads, self.batch = cache, heads, batch
        self.kv_heads, self.head_dim = cache._storage.key.shape[1::2]
        self.head_dim_v = cache._storage.value.shape[-1]
        self.key = [np.zeros((self.kv_heads, 0, self.head_dim))] * batch
        self.value = [np.zeros((self.kv_heads, 0, self.head_dim_v))] * batch

    def append(self, dice: Random, tokens: int | None = None) -> None:
        """Append so many tokens, or some; they fit or do not."""
        tokens = dice.choice([0, 1, 1, 2, 7, 65, 200]) if tokens is None else tokens
        shape, dtype = (self.batch, self.kv_heads, tokens), dice.choice(FLOATS)
        arguments: dict[str, Any] = {
            "key": numbers(dice, (*shape, self.head_dim), dtype),
            "value": numbers(dice, (*shape, self.head_dim_v), dtype),
        }
        counts = np.full(self.batch, tokens)
        if chance(dice, 0.4):
            counts = generator(dice).integers(0, tokens + 1, self.batch)
            arguments["lengths"] = counts
        faults = {
            "key": [None, 5, "x", np.ones((9, 9)), np.ones((1, 1, 1, 977)), [[1.0], [1.0, 2.0]]],
            "value": [None, 5, "x", np.ones((9, 9)), np.ones((1, 1, 977, 1))],
            "lengths": [-1, 10**6, 1.5, "x", [0] * 7, 2**70],
        }
        arguments, must = (
            spoil(dice, arguments, faults) if chance(dice, 0.3) else (arguments, RIGHT)
        )
        if must != RIGHT:
            if call(self.cache.append, arguments, must) is not REFUSED:
                self.adopt(arguments)
            return
        new = self.counted(arguments, counts)
        old = self.cache.lengths
        full = old + counts > self.cache.capacity
        if self.cache.window is not None:
            old = np.where(full, np.minimum(old, self.cache.window - 1), old)
        fits = self.cache.grow or (old + counts).max() <= self.cache.capacity
        fits = fits and all(x is not None for pair in new for x in pair)
        if call(self.cache.append, arguments, RIGHT if fits else REFUSED) is not REFUSED:
            self.extend(new)

    def counted(self, arguments: dict[str, Any], counts: Any) -> list[tuple[Any, Any]]:
        """Return what is kept of the tokens that count, for each sequence."""
        key, value = (np.asarray(arguments[name]) for name in ("key", "value"))
        dtype = self.cache.dtype
        return [
            (kept(key[b][:, :n], dtype), kept(value[b][:, :n], dtype)) for b, n in enumerate(counts)
        ]

    def adopt(self, arguments: dict[str, Any]) -> None:
        """Take in what was accepted though it was odd."""
        tokens = np.shape(arguments["key"])[2]
        counts = arguments.get("lengths")
        counts = np.broadcast_to(tokens if counts is None else np.asarray(counts), self.batch)
        self.extend(self.counted(arguments, counts))

    def extend(self, new: list[tuple[Any, Any]]) -> None:
        """Keep new tokens, and see that the cache counts as many."""
        for b, (key, value) in enumerate(new):
            self.key[b] = np.concatenate([self.key[b], key], axis=1)
            self.value[b] = np.concatenate([self.value[b], value], axis=1)
        self.count()

    def count(self) -> None:
        """Expect the cache to hold what it must."""
        lengths = [x.shape[1] for x in self.key]
        expect(self.cache.positions.tolist() == lengths, f"{self.cache.positions} of {lengths}")
        if self.cache.window is None:
            expect(self.cache.lengths.tolist() == lengths, f"{self.cache.lengths} of {lengths}")

    def change(self, dice: Random) -> None:
        """Truncate, reorder, or save and load."""
        lengths = self.cache.lengths
        kind = dice.randrange(3)
        if kind == 0:
            rng = generator(dice)
            shorter = rng.integers(np.maximum(lengths - 3, 0), lengths + 1)
            faults = {"lengths": [-1, 10**6, 1.5, "x", None, [0] * 9, 2**70]}
            arguments, must = spoil(dice, {"lengths": shorter}, faults)
            if call(self.cache.truncate, arguments, must) is not REFUSED:
                shorter = np.broadcast_to(np.asarray(arguments["lengths"]), lengths.shape)
                for b, n in enumerate((lengths - shorter).tolist()):
                    end = self.key[b].shape[1] - n
                    self.key[b], self.value[b] = self.key[b][:, :end], self.value[b][:, :end]
        elif kind == 1:
            order = generator(dice).integers(0, self.batch, self.batch)
            faults = {"indices": [-1, 977, 1.5, "x", None, [0] * 9, 2**70]}
            arguments, must = spoil(dice, {"indices": order}, faults)
            if call(self.cache.reorder, arguments, must) is not REFUSED:
                order = np.broadcast_to(np.asarray(arguments["indices"]), lengths.shape).astype(int)
                self.key = [self.key[b] for b in order]
                self.value = [self.value[b] for b in order]
        else:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "cache"
                call(self.cache.save, {"path": path}, RIGHT)
                self.cache = call(fastattn.KVCache.load, {"path": path}, RIGHT)
        self.count()

    def attend(self, dice: Random) -> None:
        """Attend, and compare with the tokens that the cache still has."""
        seqlen_q, dtype = dice.choice([0, 1, 1, 1, 2, 5, 20]), self.cache.dtype
        shape = (self.batch, self.heads, seqlen_q, self.head_dim)
        query = numbers(dice, shape, query_dtype(dice, dtype))
        lengths = self.cache.lengths
        longest = int(lengths.max())
        rng = generator(dice)
        arguments: dict[str, Any] = {"query": query}
        if chance(dice, 0.5):
            arguments["causal"] = True if self.cache.window else dice.choice([True, "top_left"])
        if chance(dice):
            arguments["scale"] = dice.choice([0.3, -1.0, 0])
        if chance(dice, 0.15):
            arguments["mask"] = rng.random((seqlen_q, longest)) < 0.7
        if chance(dice, 0.15):
            arguments["bias"] = elements(dice, (self.batch, 1, 1, longest), np.float32)
        if chance(dice, 0.15):
            arguments["softcap"] = 3.0
        if chance(dice, 0.15):
            arguments["alibi_slopes"] = rng.random(self.heads)
        if chance(dice, 0.15):
            arguments["sinks"] = rng.standard_normal(self.heads)
        if chance(dice, 0.15) and self.cache.window is None:
            arguments["window"] = dice.choice([(3, 0), (None, 2), (40, 40)])
        faults: dict[str, list[Any]] = {
            "query": [
                None,
                5,
                "x",
                np.ones((9, 9)),
                np.ones((1, 1, 1, 977)),
                np.ones((0, 1, 1, 1)),
            ],
            "causal": ["x", 5, 1.0],
            "scale": [float("nan"), "x", 1j],
            "mask": [np.ones((1, 977), bool), 5, "x"],
            "bias": [np.ones((1, 977)), "x", 1j],
            "kv_lengths": [3],
            "nonsense": [3],
        }
        arguments, must = spoil(dice, arguments, faults)
        return_lse = chance(dice, 0.6)
        result = call(self.cache.attend, {**arguments, "return_lse": return_lse}, must)
        self.count()
        if result is REFUSED:
            return
        output, lse = result if return_lse else (result, None)
        padded = []
        for rows in (self.key, self.value):
            x = np.full((self.batch, self.kv_heads, longest, rows[0].shape[-1]), np.nan)
            for b, n in enumerate(lengths):
                x[b, :, :n] = rows[b][:, rows[b].shape[1] - n :]
            padded.append(x)
        keywords = {name: x for name, x in arguments.items() if x is not None}
        query = np.asarray(keywords.pop("query"))
        if self.cache.window is not None:
            keywords["causal"] = keywords.get("causal") or True
            keywords["window"] = (self.cache.window - 1, None)
        keywords["kv_lengths"] = lengths
        expected = result_type(query, dtype)
        judge.attention(output, lse, query, *padded, dtype=expected, **keywords)


# ---------------------------------------------------------------------------
# PagedKVCache
# ---------------------------------------------------------------------------


def paged_kv_cache(dice: Random) -> str:
    """Run steps of a `PagedKVCache`."""
    heads, kv_heads = dice.choice(HEADS)
    arguments = {
        "num_pages": dice.choice([1, 4, 20]),
        "page_size": dice.choice([1, 5, 16, 64, 128]),
        "num_kv_heads": kv_heads,
        "head_dim": dice.choice(FEATURES),
        "head_dim_v": dice.choice([None, 5, 16]),
        "dtype": dice.choice(STORAGES),
    }
    has_spans = chance(dice, 0.02)
    if has_spans:
        heads, arguments["num_kv_heads"] = 2, 1
        arguments |= {"page_size": 128, "num_pages": CAPACITY_OF_SPANS // 128}
    names = ("num_pages", "page_size", "num_kv_heads", "head_dim")
    faults: dict[str, list[Any]] = dict.fromkeys(names, SIZES)
    faults |= {"head_dim_v": [n for n in SIZES if n is not None]}
    faults |= {"dtype": ["x", np.int16, complex, object, 5, "longdouble"]}
    arguments, must = spoil(dice, arguments, faults) if chance(dice, 0.2) else (arguments, RIGHT)
    cache = call(fastattn.PagedKVCache, arguments, must)
    if cache is REFUSED or must != RIGHT:
        return REFUSED
    model = _Pages(cache, heads)
    model.add(dice)
    if has_spans and model.tokens:
        model.append(dice, dice.choice(FIRST_OF_SPANS))
    for _ in range(dice.randint(3, 12)):
        steps = [model.add, model.append, model.append, model.append, model.attend, model.free]
        dice.choice(steps)(dice)
    model.attend(dice)
    return RIGHT


class _Pages:
    """A cache of pages, and the tokens of each of its sequences, (tokens, heads, features)."""

    def __init__(self, cache: Any, heads: int) -> None:
        self.cache, self.heads = cache, heads
        self.pages = cache.pages_free
        self.kv_heads, self.head_dim = cache._storage.key.shape[1::2]
        self.head_dim_v = cache._storage.value.shape[-1]
        self.tokens: dict[int, tuple[Any, Any]] = {}

    def some(self, dice: Random) -> list[int]:
        """Return some ids."""
        known = [*self.tokens]
        return dice.sample(known, dice.choice([len(known), dice.randint(0, len(known))]))

    def add(self, dice: Random) -> None:
        """Add a sequence, that may share the tokens of another."""
        arguments = {"share": dice.choice([None, *self.tokens, *self.tokens])}
        arguments, must = spoil(dice, arguments, {"share": [-1, 977, 1.5, "x", [0], 2**70]})
        new = call(self.cache.add, arguments, must)
        if new is not REFUSED:
            empty = np.zeros((0, self.kv_heads, 1))
            share = arguments["share"]
            nothing = np.repeat(empty, self.head_dim, -1), np.repeat(empty, self.head_dim_v, -1)
            self.tokens[new] = nothing if share is None else self.tokens[int(share)]

    def free(self, dice: Random) -> None:
        """Forget a sequence."""
        if len(self.tokens) < 2 or chance(dice, 0.5):
            return
        arguments = {"id": dice.choice([*self.tokens])}
        arguments, must = spoil(dice, arguments, {"id": [-1, 977, 1.5, "x", None, [0], 2**70]})
        if call(self.cache.free, arguments, must) is not REFUSED:
            del self.tokens[int(arguments["id"])]
        used = self.pages - self.cache.pages_free
        most = sum(-(-len(key) // self.cache.page_size) for key, _ in self.tokens.values())
        expect(used <= most, f"{used} pages are used by what needs {most}")

    def append(self, dice: Random, tokens: int | None = None) -> None:
        """Append so many tokens to every sequence, or some to some."""
        ids = self.some(dice) if tokens is None else [*self.tokens]
        counts = generator(dice).choice([0, 1, 1, 3, 65] if tokens is None else [tokens], len(ids))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(int)
        dtype = dice.choice(FLOATS)
        arguments: dict[str, Any] = {
            "ids": ids,
            "key": numbers(dice, (int(starts[-1]), self.kv_heads, self.head_dim), dtype),
            "value": numbers(dice, (int(starts[-1]), self.kv_heads, self.head_dim_v), dtype),
            "cu_seqlens": starts,
        }
        faults = {
            "ids": [[977], [-1], None, 5, "x", [0.5], [[1]], [2**70]],
            "key": [None, 5, "x", np.ones((9, 9)), np.ones((1, 1, 977))],
            "value": [None, 5, "x", np.ones((9, 9)), np.ones((977, 1, 1))],
            "cu_seqlens": [
                5,
                "x",
                [[0, 1]],
                [0, 977],
                [1, 2],
                [0, -1, 3],
                2**70,
                [0.5] * (len(ids) + 1),
            ],
        }
        arguments, must = (
            spoil(dice, arguments, faults) if chance(dice, 0.3) else (arguments, RIGHT)
        )
        needed = sum(-(-n // self.cache.page_size) + 2 for n in counts.tolist())
        if must == RIGHT and needed > self.cache.pages_free:
            must = ""
        rows = [arguments[name] for name in ("key", "value")]
        if must == RIGHT and any(kept(np.asarray(x), self.cache.dtype) is None for x in rows):
            must = REFUSED
        if call(self.cache.append, arguments, must) is REFUSED:
            return
        key, value = (np.asarray(x) for x in rows)
        ids = np.asarray(arguments["ids"]).tolist()
        starts = (
            np.arange(len(ids) + 1) if arguments["cu_seqlens"] is None else arguments["cu_seqlens"]
        )
        for each, begin, end in zip(ids, starts[:-1], starts[1:], strict=True):
            new = (kept(x[begin:end], self.cache.dtype) for x in (key, value))
            pairs = zip(self.tokens[each], new, strict=True)
            self.tokens[each] = tuple(np.concatenate(pair) for pair in pairs)

    def attend(self, dice: Random) -> None:
        """Attend to some sequences."""
        ids, dtype = self.some(dice), self.cache.dtype
        lengths = [len(self.tokens[each][0]) for each in ids]
        expect(
            self.cache.lengths(ids).tolist() == lengths, f"{self.cache.lengths(ids)} of {lengths}"
        )
        counts = generator(dice).choice([0, 1, 1, 2, 20], len(ids))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(int)
        shape = (int(starts[-1]), self.heads, self.head_dim)
        arguments: dict[str, Any] = {
            "query": numbers(dice, shape, query_dtype(dice, dtype)),
            "ids": ids,
            "cu_seqlens_q": starts,
        }
        if chance(dice, 0.5):
            arguments["causal"] = True
        if chance(dice):
            arguments["scale"] = dice.choice([0.3, -1.0, 0])
        faults = {
            "query": [None, 5, "x", np.ones((9, 9)), np.ones((1, 1, 977))],
            "ids": [[977], [-1], None, 5, "x", [0.5], [[1]], [2**70]],
            "cu_seqlens_q": [5, "x", [[0, 1]], [0, 977], [1, 2], [0, -1, 3], 2**70],
            "causal": ["x", 5, 1.0],
            "scale": [float("nan"), "x", 1j],
            "nonsense": [3],
        }
        arguments, must = spoil(dice, arguments, faults)
        return_lse = chance(dice, 0.6)
        result = call(self.cache.attend, {**arguments, "return_lse": return_lse}, must)
        if result is REFUSED:
            return
        output, lse = result if return_lse else (result, None)
        ids = np.asarray(arguments["ids"]).tolist()
        starts = arguments["cu_seqlens_q"]
        starts = np.arange(len(ids) + 1) if starts is None else starts
        query = np.asarray(arguments["query"])
        keywords = {n: x for n in ("causal", "scale") if (x := arguments.get(n)) is not None}
        for each, begin, end in zip(ids, starts[:-1], starts[1:], strict=True):
            judge.attention(
                output[begin:end],
                None if lse is None else lse[:, begin:end],
                query[begin:end],
                *self.tokens[each],
                dtype=result_type(query, dtype),
                layout="blhd",
                **keywords,
            )
