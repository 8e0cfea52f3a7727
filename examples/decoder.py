"""A decoder-only language model in NumPy, with the memory of its attention as a parameter.

The shape is that of today's families: RMSNorm before every part, rotary positions on the first
features of each head, query heads in groups that share keys and values, SwiGLU, no biases. Keys and
values of past tokens are kept by the memory, so that a new token costs one row of everything:

    memory = CachedAttention(model.shape, capacity=4096)
    logits = model.next_logits(prompt, memory)          # the whole prompt at once
    for _ in range(100):
        token = int(logits.argmax())
        logits = model.next_logits([token], memory)     # then token by token

`NaiveAttention` takes the place of `CachedAttention` for comparison.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import fastattn

NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    vocabulary: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotated: int  # features of each head that rotary positions turn
    hidden: int


@dataclass(frozen=True)
class Layer:
    """The weights of one layer, each (in features, out features)."""

    attention_norm: np.ndarray
    w_q: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray
    w_o: np.ndarray
    feed_forward_norm: np.ndarray
    w_gate: np.ndarray
    w_up: np.ndarray
    w_down: np.ndarray


class Memory(Protocol):
    """Attention that remembers the keys and values of every token it has seen."""

    @property
    def length(self) -> int:
        """Tokens seen, which is the position of the next one."""

    def __call__(
        self, layer: int, query: np.ndarray, key: np.ndarray, value: np.ndarray
    ) -> np.ndarray:
        """Keep key and value, (1, kv_heads, tokens, head_dim), and attend to all that is kept.

        query is (1, heads, tokens, head_dim), and so is the result. The tokens are the newest, and
        none sees those behind it.
        """


class CachedAttention:
    """`fastattn` with one `KVCache` for each layer."""

    def __init__(self, shape: Shape, capacity: int, dtype: Any = np.float32) -> None:
        self.caches = [
            fastattn.KVCache(1, shape.kv_heads, shape.head_dim, capacity, dtype=dtype)
            for _ in range(shape.layers)
        ]

    def __call__(
        self, layer: int, query: np.ndarray, key: np.ndarray, value: np.ndarray
    ) -> np.ndarray:
        """Attend to the new tokens alone where they are the first, else to the cache."""
        cache = self.caches[layer]
        is_first = cache.lengths[0] == 0
        cache.append(key, value)
        if is_first:
            # What the cache would give, without the rounding of a cache in fewer bits.
            return fastattn.attention(query, key, value, causal=True)
        return cache.attend(query, causal=True)

    @property
    def length(self) -> int:
        """Tokens in the caches; each layer appends to its own, so the last one's are complete."""
        return int(self.caches[-1].lengths[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache.nbytes for cache in self.caches)

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        for cache in self.caches:
            cache.truncate(length)


class NaiveAttention:
    """The textbook with a cache: arrays that are filled from the front, and matrix products."""

    def __init__(self, shape: Shape, capacity: int) -> None:
        size = (shape.layers, 1, shape.kv_heads, capacity, shape.head_dim)
        self.key, self.value = np.zeros(size, np.float32), np.zeros(size, np.float32)
        self.lengths = [0] * shape.layers

    def __call__(
        self, layer: int, query: np.ndarray, key: np.ndarray, value: np.ndarray
    ) -> np.ndarray:
        """Write the new rows behind the old ones and attend to all."""
        start = self.lengths[layer]
        end = self.lengths[layer] = start + key.shape[2]
        self.key[layer][:, :, start:end] = key
        self.value[layer][:, :, start:end] = value
        return naive_attention(query, self.key[layer][:, :, :end], self.value[layer][:, :, :end])

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.lengths[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.key.nbytes + self.value.nbytes


def naive_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Textbook causal attention; the last query sees every key. The whole score matrix in memory.

    The queries of a group are rows of one product with the keys that they share, and every step
    after it works in place: naive, but not wasteful.
    """
    batch, _, tokens, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    rows = query.reshape(batch, kv_heads, -1, head_dim)
    scores = rows @ key.swapaxes(-1, -2)
    scores /= math.sqrt(head_dim)
    if tokens > 1:
        is_future = np.arange(keys) > np.arange(keys - tokens, keys)[:, None]
        grouped = scores.reshape(batch, kv_heads, -1, tokens, keys)
        np.copyto(grouped, -np.inf, where=is_future)
    scores -= scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores, out=scores)
    context = weights @ value
    context /= weights.sum(axis=-1, keepdims=True)
    return context.reshape(query.shape)


@dataclass(frozen=True)
class Decoder:
    """Turns tokens into logits of the next one."""

    shape: Shape
    embedding: np.ndarray  # (vocabulary, dim)
    layers: Sequence[Layer]
    norm: np.ndarray
    output: np.ndarray  # (dim, vocabulary)

    def next_logits(self, tokens: Sequence[int], memory: Memory) -> np.ndarray:
        """Return the logits of what follows the tokens, (vocabulary,), and remember the tokens."""
        return self.logits(self.states(tokens, memory)[-1])

    def logits(self, states: np.ndarray) -> np.ndarray:
        """Return what follows each state, (..., vocabulary)."""
        return rms_norm(states, self.norm) @ self.output

    def states(self, tokens: Sequence[int], memory: Memory) -> np.ndarray:
        """Return the tokens as the last layer leaves them, (tokens, dim)."""
        cos, sin = fastattn.rotary_table(len(tokens), self.shape.rotated, offset=memory.length)
        x = self.embedding[np.asarray(tokens)]
        for index, layer in enumerate(self.layers):
            y = rms_norm(x, layer.attention_norm)
            query, key, value = (
                self._split_heads(y @ weight) for weight in (layer.w_q, layer.w_k, layer.w_v)
            )
            query = fastattn.apply_rotary(query, cos, sin)
            key = fastattn.apply_rotary(key, cos, sin)
            context = memory(index, query, key, value)
            x = x + self._join_heads(context) @ layer.w_o
            y = rms_norm(x, layer.feed_forward_norm)
            x = x + (silu(y @ layer.w_gate) * (y @ layer.w_up)) @ layer.w_down
        return x

    def _split_heads(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(1, len(x), -1, self.shape.head_dim).swapaxes(1, 2)

    def _join_heads(self, x: np.ndarray) -> np.ndarray:
        return x.swapaxes(1, 2).reshape(x.shape[2], -1)


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Divide rows by the root of their mean square (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    mean_square = np.square(x).mean(axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + NORM_EPSILON) * weight


def silu(x: np.ndarray) -> np.ndarray:
    """`x * sigmoid(x)`, the gate of SwiGLU (Shazeer 2020, arXiv:2002.05202)."""
    return x / (1.0 + np.exp(-x))
