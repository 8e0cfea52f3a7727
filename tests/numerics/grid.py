"""Calls of attention whose error is measured beside that of the textbook in the same type."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from checks import (
    FLOAT_DTYPES,
    exact,
    largest_error,
    make_inputs,
    naive,
    naive_in_any_order,
    rounding,
    to_float64,
)

import fastattn
from fastattn import reference

# Queries, keys and features: few, odd, a block and one more, several blocks; 125 shapes for each
# type and variant.
LENGTHS_Q = [1, 3, 17, 64, 150]
LENGTHS_KV = [1, 20, 65, 150, 600]
HEAD_DIMS = [1, 8, 33, 64, 128]
VARIANTS = ["plain", "everything"]
OUTPUTS = 4_000  # so many at least: the largest error of a few is a matter of luck


class Error(NamedTuple):
    """The largest errors of one case, in units of what may be: see `share`."""

    name: str
    dtype: Any
    own: float
    textbook: float
    one_rounding: float

    @property
    def ratio(self) -> float:
        """Our error over the textbook's; both have a rounding of the result in them."""
        return _over(self.own, max(self.textbook, self.one_rounding / 2))

    @property
    def share(self) -> float:
        """How much of what it may be the error is: twice the textbook's and one rounding."""
        return _over(self.own, 2 * self.textbook + self.one_rounding)


def _over(error: float, other: float) -> float:
    """Return a quotient; two errors of 0 are none."""
    return error / other if other else float(np.inf if error else 0)


def cases() -> Iterator[tuple[str, tuple[Any, Any, Any], dict[str, Any]]]:
    """Yield (name, inputs, keywords) of the whole grid: 4 types, 125 shapes, 2 variants."""
    grid = itertools.product(FLOAT_DTYPES, LENGTHS_Q, LENGTHS_KV, HEAD_DIMS, VARIANTS)
    for n, (dtype, seqlen_q, seqlen_kv, head_dim, variant) in enumerate(grid):
        rng = np.random.default_rng(n)
        inputs = make_inputs(
            rng,
            batch=(-(-OUTPUTS // (4 * seqlen_q * head_dim)),),
            heads=4,
            kv_heads=2,
            seqlen_q=seqlen_q,
            seqlen_kv=seqlen_kv,
            head_dim=head_dim,
            dtype=dtype,
        )
        keywords: dict[str, Any] = {}
        if variant == "everything":
            keywords = {
                "causal": True,
                "mask": rng.random((seqlen_q, seqlen_kv)) < 0.8,
                "bias": rng.standard_normal((4, seqlen_q, seqlen_kv)),
                "softcap": 4.0,
                "alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0625]),
                "sinks": rng.standard_normal(4),
            }
        yield f"{variant} {seqlen_q}x{seqlen_kv}x{head_dim}", inputs, keywords


def measure(name: str, inputs: tuple[Any, Any, Any], **keywords: Any) -> Error:
    """Return the errors of a case; ours is infinite where a result that should be finite is not."""
    output = fastattn.attention(*inputs, **keywords)
    truth = exact(reference.attention, *inputs, **keywords)
    textbook = max(largest_error(each, truth) for each in _textbooks(*inputs, **keywords))
    own = largest_error(output, truth) if np.isfinite(to_float64(output)).all() else np.inf
    one_rounding = rounding(output.dtype) * float(np.abs(truth).max(initial=0))
    return Error(name, output.dtype, own, textbook, one_rounding)


def _textbooks(query: Any, key: Any, value: Any, **keywords: Any) -> list[Any]:
    """Return what the textbook gives with its sums in the order of BLAS, and in two others."""
    if key.shape[-2] > LENGTHS_KV[-1]:  # where others, term by term, would take minutes
        return [naive(query, key, value, **keywords)[0]]
    return [x for x, _ in naive_in_any_order(query, key, value, orders=2, **keywords)]


def extremes(dtype: Any) -> Iterator[tuple[str, tuple[Any, Any, Any], dict[str, Any]]]:
    """Yield cases beside the usual: scores and values that leave the arithmetic few digits."""
    rng = np.random.default_rng(0)

    q, k, v = make_inputs(rng, batch=(4,), seqlen_q=33, seqlen_kv=300, dtype=dtype)
    largest = float(np.abs(to_float64(q) @ np.swapaxes(to_float64(k), -1, -2)).max())
    yield "scores up to 10^4", (q, k, v), {"scale": 1e4 / largest}
    yield "scores of 10^-6", (q, k, v), {"scale": 1e-6}
    yield "all scores equal", (q, k, v), {"scale": 0.0}
    chosen = np.where(np.arange(300) == rng.integers(0, 300, (33, 1)), 0.0, -1e4)
    yield "one key has all the weight", (q, k, v), {"bias": chosen}
    yield "a bias of 10^4 at every key", (q, k, v), {"bias": np.full((33, 300), 1e4)}
    signs = np.where(np.arange(300) % 2, 1, -1)[:, None]
    cancelling = (signs * 1000 + to_float64(v)).astype(dtype)
    yield "values that cancel", (q, k, cancelling), {"scale": 1e-3}
    for seqlen_kv in (1_000, 10_000, 100_000):
        for seqlen_q in (2, 20):  # for each kernel
            long = make_inputs(
                rng,
                batch=(),
                heads=1,
                seqlen_q=seqlen_q,
                seqlen_kv=seqlen_kv,
                head_dim_v=40,
                dtype=dtype,
            )
            yield f"{seqlen_q} queries, {seqlen_kv:,} keys", long, {}
