"""What is measured, as data: shapes, variants, and the goal of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import ml_dtypes
import numpy as np

Variant = Literal["mask", "key_padding", "bias"]


@dataclass(frozen=True)
class Goal:
    """What a case is to reach: speeds at least, times at most; None where it has no goal."""

    peer: float | None = None  # speed over that of the fastest peer
    torch: float | None = None  # speed over that of PyTorch
    peak: float | None = None  # share of the multiply-add peak
    plain: float | None = None  # time as a multiple of the plain case's
    reading: float | None = None  # share of the rate at which memory is read


@dataclass(frozen=True)
class Case:
    """One call of attention.

    `shape` is the query's: (batch, num_heads, seqlen_q, head_dim), or (seqlen_q, head_dim) for
    a single head. Keys and values have the same shape unless told otherwise.
    """

    target: str
    shape: tuple[int, ...]
    goal: Goal = Goal()
    dtype: str = "float32"
    causal: bool = False
    variant: Variant | None = None
    num_kv_heads: int | None = None
    seqlen_kv: int | None = None
    is_small: bool = False  # a call whose time goes into getting there, not into arithmetic

    @property
    def key_shape(self) -> tuple[int, ...]:
        """The shape of key and value."""
        *lead, seqlen_q, head_dim = self.shape
        if self.num_kv_heads is not None:
            lead[-1] = self.num_kv_heads
        return (*lead, self.seqlen_kv or seqlen_q, head_dim)

    @property
    def has_groups(self) -> bool:
        """Whether several query heads read one key/value head."""
        return self.shape[:-2] != self.key_shape[:-2]

    @property
    def numpy_dtype(self) -> np.dtype:
        """The element type for NumPy, to which bfloat16 is an extension.

        Nobody computes in int8: it is what a cache keeps of float32.
        """
        if self.dtype == "int8":
            return np.dtype(np.float32)
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    @property
    def plain(self) -> Case | None:
        """The case without what makes this one special, whose time it is compared with."""
        if self.variant is not None:
            return replace(self, variant=None)
        if self.causal:
            return replace(self, causal=False)
        if self.dtype in ("float16", "bfloat16", "int8"):
            return replace(self, dtype="float32")
        return None

    @property
    def name(self) -> str:
        """A short name that says everything, such as ``float32 1x8x1024x64 causal``."""
        parts = [self.dtype, "x".join(map(str, self.shape))]
        if self.seqlen_kv is not None:
            parts.append(f"on {self.seqlen_kv} keys")
        if self.num_kv_heads is not None:
            parts.append(f"on {self.num_kv_heads} heads")
        if self.causal:
            parts.append("causal")
        if self.variant is not None:
            parts.append(self.variant.replace("_", " "))
        return " ".join(parts)


@dataclass(frozen=True)
class Inputs:
    """The arrays of a case."""

    case: Case
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    mask: np.ndarray | None
    bias: np.ndarray | None

    @property
    def flops(self) -> float:
        """2 (head_dim + head_dim_v) for each visible pair: hidden keys earn nothing."""
        seqlen_q, seqlen_kv = self.query.shape[-2], self.key.shape[-2]
        visible = np.ones((seqlen_q, seqlen_kv), bool)
        if self.case.causal:
            visible = np.tri(seqlen_q, seqlen_kv, seqlen_kv - seqlen_q, dtype=bool)
        if self.mask is not None:
            visible = visible & self.mask
        pairs = visible.mean() * seqlen_q * seqlen_kv * math.prod(self.query.shape[:-2])
        return float(2 * pairs * (self.query.shape[-1] + self.value.shape[-1]))

    @property
    def bytes_read(self) -> float:
        """The bytes of keys and values: each has to be read once; for int8 with their scales."""
        if self.case.dtype == "int8":
            return float(sum(each.size + each.size // each.shape[-1] * 4 for each in self._stored))
        return float(sum(each.nbytes for each in self._stored))

    @property
    def _stored(self) -> tuple[np.ndarray, np.ndarray]:
        return self.key, self.value


def make_inputs(case: Case) -> Inputs:
    """Draw the arrays of a case; a case and its plain one get equal queries, keys and values."""
    rng = np.random.default_rng(20)
    query, key, value = (
        rng.standard_normal(shape, dtype=np.float32).astype(case.numpy_dtype)
        for shape in (case.shape, case.key_shape, case.key_shape)
    )
    *lead, seqlen_q, seqlen_kv = *case.shape[:-1], case.key_shape[-2]
    mask = bias = None
    if case.variant == "mask":
        # Arbitrary and shared by all heads. The first key stays, so that no row is empty: what
        # an empty row gives is a question on which the peers disagree.
        mask = rng.random((seqlen_q, seqlen_kv)) < 0.9
        mask[:, 0] = True
        mask = mask.reshape(*[1] * len(lead), seqlen_q, seqlen_kv)
    elif case.variant == "key_padding":
        mask = np.arange(seqlen_kv) < seqlen_kv * 9 // 10
        mask = mask.reshape(*[1] * len(lead), 1, seqlen_kv)
    elif case.variant == "bias":
        # One for each head, as relative positions have: nothing of it can be read twice.
        shape = (1, *lead[1:], seqlen_q, seqlen_kv)
        bias = rng.standard_normal(shape, dtype=np.float32).astype(case.numpy_dtype)
    return Inputs(case, query, key, value, mask, bias)


_HALF = Goal(peer=1.15, plain=1 / 0.9)


def _decode(batch: int) -> tuple[Case, ...]:
    """One query for each head against a long cache, in every format that it can be kept in."""
    cases = []
    for num_kv_heads, seqlen_kv, peer in ((32, 4096, 1.15), (8, 8192, 2.5)):
        shared = None if num_kv_heads == 32 else num_kv_heads
        for dtype, target, goal in (
            ("float32", "T8", Goal(peer=peer, reading=0.85)),
            ("float16", "T9", Goal(plain=0.55)),
            ("bfloat16", "T9", Goal(plain=0.55)),
            ("int8", "T9", Goal(plain=0.33)),
        ):
            shape = (batch, 32, 1, 128)
            case = Case(target, shape, goal, dtype, num_kv_heads=shared, seqlen_kv=seqlen_kv)
            cases.append(case)
    return tuple(cases)


CASES: tuple[Case, ...] = (
    # Many queries, every key visible.
    Case("T1", (1, 12, 512, 64), Goal(peer=1.15)),
    Case("T1", (1, 8, 1024, 64), Goal(peer=1.15, peak=0.86)),
    Case("T1", (8, 12, 128, 64), Goal(peer=1.15)),
    Case("T1", (1, 8, 2048, 128), Goal(peer=1.15, peak=0.90)),
    # Causal: half of the work, and the time is to follow.
    Case("T2", (1, 8, 1024, 64), Goal(peer=1.7), causal=True),
    Case("T2", (1, 8, 2048, 128), Goal(peer=1.7, plain=0.56), causal=True),
    Case("T2", (1, 8, 4096, 64), Goal(peer=1.7, plain=0.56), causal=True),
    Case("T3", (1, 8, 1024, 64), Goal(torch=1.8, peak=0.85), dtype="float64"),
    Case("T3", (1, 8, 1024, 128), Goal(torch=1.8, peak=0.85), dtype="float64"),
    # Stored in 16 bits.
    Case("T5", (1, 8, 1024, 64), _HALF, dtype="float16"),
    Case("T5", (1, 8, 1024, 128), _HALF, dtype="float16"),
    Case("T6", (1, 12, 1024, 64), Goal(plain=1.15), variant="mask"),
    Case("T6", (1, 12, 1024, 64), Goal(plain=1.15), variant="key_padding"),
    Case("T6", (1, 12, 1024, 64), Goal(plain=1.15), variant="bias"),
    *_decode(batch=1),
    *_decode(batch=8),
    Case("T10", (1, 1, 4, 4), is_small=True),
    Case("T10", (1, 4, 16, 32), is_small=True),
    Case("T10", (6, 3), is_small=True),
    # What people also call, and where nobody is to wish they had not: between small and large,
    # odd sizes, cross-attention, grouped heads, a sentence encoder's batch.
    Case("T14", (1, 8, 64, 64)),
    Case("T14", (1, 8, 256, 64), causal=True),
    Case("T14", (32, 12, 48, 32)),
    Case("T14", (1, 4, 333, 80)),
    Case("T14", (2, 8, 77, 64), seqlen_kv=1000),
    Case("T14", (1, 32, 512, 128), num_kv_heads=8, causal=True),
    Case("T14", (1, 2, 1024, 256)),
    Case("T14", (1, 8, 1024, 64), dtype="bfloat16"),
)
