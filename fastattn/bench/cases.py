"""What is measured, as data: shapes, variants, and the goal of each."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

import fastattn
from fastattn import masks

Variant = Literal[
    "mask",
    "key_padding",
    "bias",
    "softcap",
    "alibi",
    "score_mod",
    "window",
    "documents",
    "ragged",
]


@dataclass(frozen=True)
class Goal:
    """What a case is to reach: speeds at least, times at most; None where it has no goal."""

    peer: float | None = None  # speed over that of the fastest peer
    torch: float | None = None  # speed over that of PyTorch
    peak: float | None = None  # share of the multiply-add peak
    plain: float | None = None  # time as a multiple of the plain case's
    rate: float | None = None  # flops in a second as a share of the plain case's
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
    def is_decode(self) -> bool:
        """Whether reading keys and values is the work: one query for each of the heads."""
        return self.shape[-2] == 1 and not self.is_small

    @property
    def numpy_dtype(self) -> np.dtype:
        """The element type for NumPy, to which bfloat16 is an extension.

        Nobody computes in int8: it is what a cache keeps of float32.
        """
        if self.dtype == "int8":
            return np.dtype(np.float32)
        if self.dtype == "bfloat16":
            # Teaches NumPy the name.
            importlib.import_module("ml_dtypes")
        return np.dtype(self.dtype)

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
    mask: np.ndarray | None = None
    bias: np.ndarray | None = None
    softcap: float | None = None
    lengths: np.ndarray | None = None  # rows of each batch entry, the others being padding
    # What `fastattn.attention` is given in place of a mask or bias, which is what others need.
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """2 (head_dim + head_dim_v) for each visible pair: hidden keys earn nothing."""
        seqlen_q, seqlen_kv = self.query.shape[-2], self.key.shape[-2]
        visible = np.ones((seqlen_q, seqlen_kv), bool)
        if self.case.causal:
            visible = np.tri(seqlen_q, seqlen_kv, seqlen_kv - seqlen_q, dtype=bool)
        if self.mask is not None:
            visible = visible & self.mask
        if self.lengths is not None:
            visible = visible & (np.arange(seqlen_q)[:, None] < self.lengths[:, None, None, None])
        pairs = visible.mean() * seqlen_q * seqlen_kv * math.prod(self.query.shape[:-2])
        return float(2 * pairs * (self.query.shape[-1] + self.value.shape[-1]))

    def without_padding(self, out: np.ndarray) -> np.ndarray:
        """Return an output with zeros in the rows that are padding, which is anyone's."""
        if self.lengths is None:
            return out
        rows = np.arange(out.shape[-2])[:, None]
        return np.where(rows < self.lengths[:, None, None, None], out, 0)

    @property
    def bytes_read(self) -> float:
        """The bytes of keys and values: each has to be read once; for int8 with their scales."""
        if self.case.dtype == "int8":
            return float(sum(each.size + each.size // each.shape[-1] * 4 for each in self._stored))
        return float(sum(each.nbytes for each in self._stored))

    @property
    def bytes_moved(self) -> float:
        """The bytes that have to be read or written at least: those of inputs and output."""
        rows = self.query.nbytes // self.query.shape[-1]
        moved = self.bytes_read + rows * (self.query.shape[-1] + self.value.shape[-1])
        if not self.keywords:
            moved += sum(each.nbytes for each in (self.mask, self.bias) if each is not None)
        return moved

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
    inputs = Inputs(case, query, key, value, mask, bias)
    return _VARIANTS[case.variant](inputs) if case.variant in _VARIANTS else inputs


def _softcap(inputs: Inputs) -> Inputs:
    return replace(inputs, softcap=30.0, keywords={"softcap": 30.0})


def _alibi(inputs: Inputs) -> Inputs:
    slopes = fastattn.alibi_slopes(inputs.query.shape[1])
    bias = -slopes[:, None, None] * _distances(inputs)
    return replace(inputs, bias=bias[None], keywords={"alibi_slopes": slopes})


def _score_mod(inputs: Inputs) -> Inputs:
    """ALiBi by hand, with one slope."""
    bias = np.float32(-0.25) * _distances(inputs)
    return replace(inputs, bias=bias[None, None], keywords={"score_mod": _tilted})


def _tilted(score: float, _b: int, _h: int, i: int, j: int) -> float:
    return score - 0.25 * abs(i - j)


def _distances(inputs: Inputs) -> np.ndarray:
    i, j = np.ogrid[: inputs.query.shape[-2], : inputs.key.shape[-2]]
    return np.abs(i - j).astype(np.float32)


def _window(inputs: Inputs) -> Inputs:
    """A causal window of 256 keys."""
    i, j = np.ogrid[: inputs.query.shape[-2], : inputs.key.shape[-2]]
    mask = (j <= i) & (i - j < 256)
    keywords = {"causal": True, "window": (255, 0)}
    return replace(inputs, mask=mask[None, None], keywords=keywords)


def _documents(inputs: Inputs) -> Inputs:
    """Causal documents of 256 to 1792 tokens, end to end, as a block mask."""
    lengths = [256, 1792, 1024, 512, 1536, 768, 1280, 1024]
    segments = np.repeat(np.arange(len(lengths)), lengths)
    seqlen = len(segments)
    mod = masks.and_masks(masks.causal(), masks.document(segments))
    mask = np.tri(seqlen, dtype=bool) & (segments[:, None] == segments)
    keywords = {"block_mask": fastattn.create_block_mask(mod, 1, 1, seqlen, seqlen)}
    return replace(inputs, mask=mask[None, None], keywords=keywords)


def _ragged(inputs: Inputs) -> Inputs:
    """Sequences of very different lengths: packed, or padded and masked for the others."""
    batch, _, seqlen, _ = inputs.query.shape
    lengths = seqlen * np.arange(1, batch + 1) ** 2 // batch**2
    mask = np.arange(seqlen) < lengths[:, None, None, None]
    return replace(inputs, mask=mask, lengths=lengths)


_VARIANTS: dict[str | None, Callable[[Inputs], Inputs]] = {
    "softcap": _softcap,
    "alibi": _alibi,
    "score_mod": _score_mod,
    "window": _window,
    "documents": _documents,
    "ragged": _ragged,
}


_BFLOAT = Goal(torch=2.2, plain=1 / 0.9)
_HALF = Goal(peer=1.15, plain=1 / 0.9)


def _by_length() -> tuple[Case, ...]:
    """One shape but for its length, in every type; 1024 are among the others."""
    cases = [
        Case("T14", (1, 8, seqlen, 64), dtype=dtype)
        for dtype in ("float32", "float64", "float16", "bfloat16")
        for seqlen in (128, 256, 512, 2048)
    ]
    return (*cases, Case("T14", (1, 8, 4096, 64)))


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
    Case("T4", (1, 8, 1024, 64), _BFLOAT, dtype="bfloat16"),
    Case("T4", (1, 8, 2048, 128), _BFLOAT, dtype="bfloat16"),
    Case("T4", (1, 8, 2048, 128), Goal(torch=2.2), dtype="bfloat16", causal=True),
    Case("T5", (1, 8, 1024, 64), _HALF, dtype="float16"),
    Case("T5", (1, 8, 1024, 128), _HALF, dtype="float16"),
    Case("T6", (1, 12, 1024, 64), Goal(plain=1.15), variant="mask"),
    Case("T6", (1, 12, 1024, 64), Goal(plain=1.15), variant="key_padding"),
    Case("T6", (1, 12, 1024, 64), Goal(plain=1.15), variant="bias"),
    Case("T6", (1, 12, 1024, 64), Goal(plain=1.15), variant="alibi"),
    Case("T6", (1, 12, 1024, 64), Goal(plain=1.3), variant="softcap"),
    Case("T6", (1, 12, 1024, 64), Goal(plain=1.5), variant="score_mod"),
    # Hidden blocks: the time is to be that of the visible ones.
    Case("T7", (1, 2, 8192, 64), Goal(rate=0.75), variant="window"),
    Case("T7", (1, 2, 8192, 64), Goal(rate=0.75), variant="documents"),
    Case("T7", (8, 8, 1024, 64), Goal(rate=0.75), variant="ragged"),
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
    *_by_length(),
)
