"""What a right result is: the reference in float64, and a bound on what rounding may do to it.

A score that is off by e makes a weight off by a factor of exp(e), the sum that divides it by
another, and the output by at most both of the sum of ``weight * abs(value)``; a sum of n terms is
off by n units of their magnitudes (Higham 2002, "Accuracy and Stability of Numerical Algorithms",
section 3.1). So every row has a bound of its own, however large its scores are, and where that
says nothing more the output must still lie among the values. NaN and Inf must be where the
reference has them, but where arithmetic of the accumulation type leaves its range.
"""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fastattn import reference

Array = NDArray[Any]

# Weights that may be 0 instead, as `docs/numerics.md` says, and what the kernels' tanh adds.
SMALLEST_WEIGHT = {"float32": 2.0**-100, "float64": 2.0**-960}
ULPS_OF_TANH = 4

# Shares of a magnitude that a function of `draw` adds to a score, and rounds.
OF_SCORE_MOD = 16


class Wrong(AssertionError):
    """A result that the reference does not give."""


def expect(holds: Any, what: str) -> None:
    """Raise unless it holds."""
    if not holds:
        raise Wrong(what)


def attention(
    output: Any, lse: Any, query: Any, key: Any, value: Any, *, dtype: Any = None, **keywords: Any
) -> None:
    """Expect output and lse, if there is one, to be right for a call of `attention`.

    `dtype` is that of the result, where float64 key and value stand for what a cache keeps.
    """
    q, k, v = (np.asarray(x) for x in (query, key, value))
    is_stored = dtype is not None
    dtype = np.dtype(dtype) if is_stored else reference.result_dtype(q, k, v)
    wide = reference.accumulation_dtype(dtype)
    with np.errstate(all="ignore"):
        # What the contract converts is converted before anything is computed.
        q, k, v = (x if is_stored else x.astype(dtype) for x in (q, k, v))
        q, k, v = (x.astype(np.float64) for x in (q, k, v))
        keywords, layout = _converted(keywords, wide)
        truth, truth_lse = reference.attention(q, k, v, return_lse=True, layout=layout, **keywords)
        expect(isinstance(output, np.ndarray), f"result is a {type(output)}")
        _same(output, truth.shape, dtype, "output")
        if lse is not None:
            _same(lse, truth_lse.shape, wide, "lse")
        if truth_lse.size == 0:
            return
        if layout == "blhd":
            q, k, v, output, truth = (np.swapaxes(x, -3, -2) for x in (q, k, v, output, truth))
        elif q.ndim == k.ndim == v.ndim == 2:
            q, k, v, output, truth = (x[None] for x in (q, k, v, output, truth))
            truth_lse, lse = truth_lse[None], None if lse is None else lse[None]
        bounds = _Bounds(q, k, v, wide, keywords, largest_step=127 if is_stored else 1)
        _near(output, truth, *bounds.of_output(truth, dtype), "output")
        if lse is not None:
            _near(lse, truth_lse, bounds.of_lse(truth_lse), bounds.overflows, "lse")


def _converted(keywords: dict[str, Any], wide: Any) -> tuple[dict[str, Any], str]:
    """Return the keywords that are there, converted as the contract converts, and the layout."""
    kept = {name: x for name, x in keywords.items() if x is not None}
    for name in ("bias", "alibi_slopes", "sinks"):
        if name in kept:
            kept[name] = np.asarray(kept[name]).astype(wide).astype(np.float64)
    return kept, kept.pop("layout", "bhld")


class _Bounds:
    """What the rows of one call may be off by."""

    def __init__(
        self,
        q: Array,
        k: Array,
        v: Array,
        wide: Any,
        keywords: dict[str, Any],
        largest_step: int = 1,  # what int8 keys are multiplied with, before their scale
    ) -> None:
        limits = np.finfo(wide)
        self.unit, largest = float(limits.eps), float(limits.max)
        self.room = largest / 4  # sums that stay below it do not overflow on the way
        self.smallest = float(limits.smallest_subnormal)
        self.negligible = SMALLEST_WEIGHT[wide.name]
        self.count = k.shape[-2]
        q, k, v = (x if x.ndim > 2 else x[None] for x in (q, k, v))
        batch = np.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
        q, k, v = (np.broadcast_to(x, batch + x.shape[-3:]) for x in (q, k, v))
        self.value = np.repeat(v, q.shape[-3] // max(k.shape[-3], 1), axis=-3)

        zeros = np.zeros(q.shape), np.zeros(k.shape)
        self.visible = reference.attention_weights(*zeros, stage="biased", **keywords) != -np.inf
        self.weights = reference.attention_weights(q, k, **keywords)

        q, k = (np.where(np.isfinite(x), np.abs(x), 0) for x in (q, k))
        scale = abs(float(keywords.get("scale", q.shape[-1] ** -0.5)))
        softcap = keywords.get("softcap")
        dots = reference.attention_weights(q, k, scale=1.0, stage="scores")
        scores = dots * scale
        off = (q.shape[-1] + 8) * (self.unit * scores + scale * self.smallest)
        off += dots * self.smallest * max(float(softcap or 1), 1)
        if softcap:
            off = np.minimum(off, 2 * softcap) + 4 * ULPS_OF_TANH * self.unit * np.minimum(
                scores, softcap
            )
            scores = np.minimum(scores, softcap)
        added = np.zeros(())
        if "bias" in keywords:
            bias = keywords["bias"]
            added = added + np.where(np.isfinite(bias), np.abs(bias), 0)
        if "alibi_slopes" in keywords:
            slopes = np.abs(keywords["alibi_slopes"])
            names = ("causal", "window", "query_offset", "kv_lengths")
            stand = {name: keywords[name] for name in names if name in keywords}
            penalty = -reference.attention_weights(
                *zeros, stage="biased", alibi_slopes=slopes, **stand
            )
            added = added + np.where(np.isfinite(penalty), penalty, 0)
        off = off + 6 * self.unit * added
        if "score_mod" in keywords:
            off = off + 4 * self.unit * (scores + added + OF_SCORE_MOD)
        self.of_scores = np.broadcast_to(off, self.visible.shape)
        sink = np.abs(np.asarray(keywords.get("sinks", -np.inf)))[..., None]
        sink = np.where(np.isfinite(sink), sink, 0)

        # The row's largest errors, and whether anything in it is beyond the accumulation type.
        # Keys of int8 are multiplied as steps, the largest of each row 127, before their scale.
        steps = dots
        if largest_step > 1:
            highest = k.max(axis=-1, keepdims=True, initial=0)
            in_steps = largest_step * k / np.where(highest > 0, highest, 1)
            steps = np.maximum(
                dots, reference.attention_weights(q, in_steps, scale=1.0, stage="scores")
            )
        beyond = (steps > self.room) | (scores > self.room) | (scores + added > self.room)
        self.beyond = np.broadcast_to(beyond, self.visible.shape) | (scale > largest)
        self.overflows = (self.beyond & self.visible).any(axis=-1)
        seen = np.where(self.visible, self.of_scores, 0).max(axis=-1, initial=0)
        seen = seen + 4 * self.unit * sink
        self.off = 2 * seen + (self.count + 16) * self.unit

    def of_output(self, truth: Array, dtype: Any) -> tuple[Array, Array]:
        """Return how far each output may be from the truth, and where that cannot be said."""
        limits = ml_dtypes.finfo(dtype)
        value = np.where(np.isfinite(self.value), np.abs(self.value), 0)
        weights = np.where(np.isfinite(self.weights), self.weights, 0)
        highest = _highest(self.visible, value)
        bound = np.minimum(2 * _grown(self.off)[..., None] * (weights @ value), 2 * highest)
        bound = bound + self.count * (self.negligible * highest + 128 * self.smallest)
        bound += float(limits.eps) * np.abs(np.where(np.isfinite(truth), truth, 0))
        bound += float(limits.smallest_subnormal)
        unclear = self.overflows[..., None] | (self.count * highest > self.room)
        # An infinity of a weight that may be 0 as well gives NaN or Inf.
        nonfinite = (~np.isfinite(self.value)).astype(np.float64)
        doubtful = (
            self.weights * np.exp(-self.off)[..., None] < 2 * self.negligible
        ) & self.visible
        unclear = unclear | ((doubtful.astype(np.float64) @ nonfinite) > 0)
        return bound, unclear

    def of_lse(self, truth: Array) -> Array:
        """Return how far each lse may be from the truth."""
        return 2 * self.off + 8 * self.unit * (1 + np.abs(np.where(np.isfinite(truth), truth, 0)))


def _grown(off: Array) -> Array:
    """Return exp(off) - 1, what a weight is off by whose score is."""
    result: Array = np.expm1(np.minimum(off, 700.0))
    return result


def _highest(visible: Array, value: Array) -> Array:
    """Return the largest value that each query sees, feature by feature."""
    result = np.zeros((*visible.shape[:-1], value.shape[-1]))
    for j in range(value.shape[-2]):
        result = np.maximum(result, np.where(visible[..., j : j + 1], value[..., j : j + 1, :], 0))
    return result


def weights(result: Any, query: Any, key: Any, *, stage: str, rows: Any, **keywords: Any) -> None:
    """Expect what `attention_weights` gives to be right."""
    arrays = [np.asarray(x) for x in (query, key)]
    dtype = reference.result_dtype(*arrays)
    wide = reference.accumulation_dtype(dtype)
    limits = ml_dtypes.finfo(dtype)
    with np.errstate(all="ignore"):
        q, k = (x.astype(dtype).astype(np.float64) for x in arrays)
        keywords, layout = _converted(keywords, wide)
        truth = reference.attention_weights(q, k, stage=stage, rows=rows, layout=layout, **keywords)
        _same(result, truth.shape, dtype, "weights")
        if layout == "blhd":
            q, k = np.swapaxes(q, -3, -2), np.swapaxes(k, -3, -2)
        elif q.ndim == k.ndim == 2:
            q, k = q[None], k[None]
        if stage == "scores":
            keywords.pop("softcap", None)
        bounds = _Bounds(q, k, k, wide, keywords)
        chosen = slice(None) if rows is None else rows
        off = 4 * bounds.of_scores[..., chosen, :]
        if stage == "probabilities":
            off = 2 * _grown(bounds.off)[..., chosen][..., None] * truth + bounds.smallest
        beyond = bounds.beyond.any(axis=-1, keepdims=True) | (bounds.of_scores > 1e30)
        unclear = np.broadcast_to(beyond, bounds.visible.shape)[..., chosen, :]
        unclear = unclear | (np.abs(truth) > float(limits.max) / 2)
        # NumPy's float32 exp has no subnormal results.
        bound = off + float(limits.eps) * np.abs(truth) + 2 * float(np.finfo(wide).tiny)
        bound += float(limits.smallest_subnormal)
        _near(result, truth, bound.reshape(truth.shape), unclear.reshape(truth.shape), "weights")


def near(result: Any, truth: Any, dtype: Any, bound: Any, name: str) -> None:
    """Expect a result of a dtype within a bound, and NaN and Inf where the truth has them."""
    _same(result, np.shape(truth), np.dtype(dtype), name)
    _near(result, np.asarray(truth), np.asarray(bound), np.False_, name)


def _same(result: Any, shape: tuple[int, ...], dtype: Any, name: str) -> None:
    expect(result.shape == shape, f"{name} has shape {result.shape}, not {shape}")
    expect(result.dtype == dtype, f"{name} is {result.dtype}, not {dtype}")


def _near(result: Array, truth: Array, bound: Array, unclear: Array, name: str) -> None:
    result = result.astype(np.float64)
    finite = np.isfinite(truth)
    with np.errstate(all="ignore"):
        fits = np.abs(result - truth) <= bound
    fits = np.where(finite, fits, (result == truth) | (np.isnan(result) & np.isnan(truth)))
    wrong = ~(fits | unclear)
    if wrong.any():
        where = tuple(int(n[0]) for n in np.nonzero(wrong))
        allowed = np.broadcast_to(bound, truth.shape)[where]
        raise Wrong(
            f"{name}{list(where)} is {result[where]:.9g}, not {truth[where]:.9g} "
            f"within {allowed:.2g}; {np.count_nonzero(wrong)} of {wrong.size} are wrong"
        )


def unchanged(before: dict[str, bytes], arguments: dict[str, Any]) -> None:
    """Expect that no array was written to, out apart."""
    for name, content in contents(arguments).items():
        expect(content == before[name], f"{name} was written to")


def contents(arguments: dict[str, Any]) -> dict[str, bytes]:
    """Return what arrays hold."""
    return {
        name: x.tobytes()
        for name, x in arguments.items()
        if isinstance(x, np.ndarray) and name != "out" and x.dtype != object
    }
