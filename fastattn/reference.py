"""Attention as its definition reads, in NumPy: the specification of this library.

The functions have the signatures of the fused ones and say what those must return, step by step and
with every score in memory. There are no kernels here and no checks of the arguments beyond the rule
of dtypes: checks live in `problem.py`, and what is wrong here fails as NumPy lets it fail.

The order of operations on one score, everywhere:

    s = scale * q.k -> bias -> mask, causal, kv_lengths (to -inf) -> softmax -> weighted sum

Everything is computed in the accumulation type: float64 where the result is float64, else float32.
To check against more digits than the result has, pass inputs cast to float64.

Axes: batch stands for any number of axes, G = num_heads // num_kv_heads.

Examples
--------
>>> import numpy as np
>>> query, key, value = np.eye(2), np.eye(2), np.array([[1.0, 0.0], [0.0, 1.0]])
>>> attention(query, key, value, scale=np.log(3)).round(2)
array([[0.75, 0.25],
       [0.25, 0.75]])

References
----------
.. [1] Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1, arXiv:1706.03762
.. [2] Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", section 3,
   arXiv:1805.02867
.. [3] Dao et al. 2022, "FlashAttention", section 3.1, arXiv:2205.14135
.. [4] Dao 2023, "FlashAttention-2", section 3.1, arXiv:2307.08691
.. [5] Ainslie et al. 2023, "GQA", section 2.2, arXiv:2305.13245
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["attention", "attention_weights", "merge_states", "scaled_dot_product_attention"]

Array = NDArray[Any]

FLOATS = ("float16", "float32", "float64", "bfloat16")  # by name: ml_dtypes need not be installed

# What IEEE arithmetic makes of NaN, Inf, overflow and log(0) is the meaning here, not an accident.
ieee = np.errstate(divide="ignore", invalid="ignore", over="ignore")


@ieee
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    causal: bool | str = False,
    query_offset: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    scale: float | None = None,
    layout: str = "bhld",
    return_lse: bool = False,
    out: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Return softmax(scale * query @ key.T + bias) @ value over the visible keys [1]_.

    Parameters
    ----------
    query, key, value : (batch, num_heads, seqlen_q, head_dim),
            (batch, num_kv_heads, seqlen_kv, head_dim), (batch, num_kv_heads, seqlen_kv, head_dim_v)
        Batch axes broadcast. Query head h reads kv head h // G [5]_. Two axes are one head.
    mask : bool, broadcastable to (batch, num_heads, seqlen_q, seqlen_kv)
        True is visible.
    bias : numbers, broadcastable likewise
        Added to the scaled score; -inf hides the key.
    causal : False, True, "bottom_right" or "top_left"
        Query i sees keys up to i + offset: seqlen_kv - seqlen_q for "bottom_right", which True
        means (the lengths of the batch entry, where kv_lengths gives one), 0 for "top_left". For
        two queries and five keys, 1 being visible:

            "bottom_right"    "top_left"
            1 1 1 1 0         1 0 0 0 0
            1 1 1 1 1         1 1 0 0 0

        With more queries than keys the offset of "bottom_right" is negative, and the first queries
        see nothing.
    query_offset : int or ints of shape (batch,)
        The offset itself, in place of the one that `causal` names.
    kv_lengths : int or ints of shape (batch,)
        Keys from this one on do not exist.
    scale : float
        None is 1 / sqrt(head_dim).
    layout : "bhld" or "blhd"
        "blhd": query, key, value and out are (batch, length, heads, features). The shapes of mask,
        bias and lse do not change.
    return_lse : bool
        Also return lse, the log of the softmax's denominator sum(exp(score)) [4]_.
    out : array
        Written and returned.

    Returns
    -------
    output : (batch, num_heads, seqlen_q, head_dim_v), in `result_dtype` of query, key and value
    lse : (batch, num_heads, seqlen_q), in the accumulation type

    Notes
    -----
    A query with no visible key has output 0 and lse -inf. What a hidden key, value or bias holds
    reaches no output, be it NaN; at visible keys, NaN and Inf give what IEEE arithmetic gives.
    """
    (q, k, v), dtype = _operands(query, key, value, layout=layout)
    steps = _steps(
        q,
        k,
        mask=mask,
        bias=bias,
        causal=causal,
        query_offset=query_offset,
        kv_lengths=kv_lengths,
        scale=scale,
    )
    output = _weighted_sum(steps.probabilities, _per_query_head(v, q), steps.visible).astype(dtype)
    lse = steps.lse

    if layout == "blhd":
        output = np.swapaxes(output, -3, -2)
    if _is_one_head(query, key, value):
        output, lse = output[0], lse[0]
    if out is not None:
        out[...] = output
        output = out
    return (output, lse) if return_lse else output


def scaled_dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_mask: ArrayLike | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """Return what torch.nn.functional.scaled_dot_product_attention returns, for NumPy arrays.

    attn_mask is bool (True is visible) or float (added), and composes with is_causal, whose
    alignment is "top_left". Without enable_gqa torch knows no head axis: every axis before
    (length, features) broadcasts, and head counts that do not are an error. dropout_p is for
    training, so only 0 is taken.
    """
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p must be 0, this library is for inference: got {dropout_p}")
    mask = bias = None
    if attn_mask is not None:
        attn_mask = np.asarray(attn_mask)
        if attn_mask.dtype == bool:
            mask = attn_mask
        elif attn_mask.dtype.name in FLOATS:
            bias = attn_mask
        else:
            raise TypeError(f"attn_mask must be bool or float: got {attn_mask.dtype}")

    # A head axis of 1, put below every leading axis, makes batch axes of them: those broadcast.
    def below(x: ArrayLike | None) -> Any:
        return x if x is None or enable_gqa else np.atleast_2d(x)[..., None, :, :]

    output, _ = attention(
        below(query),
        below(key),
        below(value),
        mask=below(mask),
        bias=below(bias),
        causal="top_left" if is_causal else False,
        scale=scale,
        return_lse=True,
    )
    return output if enable_gqa else output[..., 0, :, :]


@ieee
def attention_weights(
    query: ArrayLike,
    key: ArrayLike,
    *,
    stage: str = "probabilities",
    rows: int | slice | Sequence[int] | Array | None = None,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    causal: bool | str = False,
    query_offset: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    scale: float | None = None,
    layout: str = "bhld",
) -> Array:
    """Return the scores of every query with every key as they stand after one of the steps.

    Parameters
    ----------
    stage : "scores", "softcapped", "biased" or "probabilities"
        scale * query @ key.T, raw at hidden keys; the same while there is no softcap; with bias
        added and -inf at hidden keys; their softmax, 0 at hidden keys.
    rows : int, slice or ints
        The queries to return, as an index of the axis seqlen_q: an int removes the axis.

    The other parameters are those of `attention`.

    Returns
    -------
    (batch, num_heads, seqlen_q, seqlen_kv), in `result_dtype` of query and key
    """
    (q, k), dtype = _operands(query, key, layout=layout)
    steps = _steps(
        q,
        k,
        mask=mask,
        bias=bias,
        causal=causal,
        query_offset=query_offset,
        kv_lengths=kv_lengths,
        scale=scale,
    )
    weights: Array = {
        "scores": steps.scores,
        "softcapped": steps.softcapped,
        "biased": steps.biased,
        "probabilities": steps.probabilities,
    }[stage].astype(dtype)
    if _is_one_head(query, key):
        weights = weights[0]
    return weights if rows is None else weights[..., rows, :]


@ieee
def merge_states(
    outputs: Sequence[Array] | Array, lses: Sequence[Array] | Array
) -> tuple[Array, Array]:
    """Return (output, lse) of attention over all keys from those over disjoint sets of them.

        lse = log(sum(exp(lse_n)))        output = sum(exp(lse_n - lse) * output_n)

    This is attention over the parts: each is one key whose score is its lse and whose value is its
    output [2]_ [3]_. A part with lse -inf saw no key and changes nothing, exactly.

    Parameters
    ----------
    outputs : parts of (..., seqlen_q, head_dim_v), a list or stacked on axis 0
    lses : as many of (..., seqlen_q)

    Returns
    -------
    output : (..., seqlen_q, head_dim_v), in `result_dtype` of outputs
    lse : (..., seqlen_q), in the accumulation type
    """
    parts = [np.asarray(part) for part in outputs]
    dtype = result_dtype(*parts)
    accumulation = accumulation_dtype(dtype)
    values = np.stack(parts, axis=-2).astype(accumulation)
    scores = np.stack([np.asarray(lse) for lse in lses], axis=-1).astype(accumulation)

    reached = scores != -np.inf
    weights, lse = _softmax(scores, reached)
    output = _weighted_sum(weights[..., None, :], values, reached[..., None, :])[..., 0, :]
    return output.astype(dtype), lse


def result_dtype(*arrays: Array) -> np.dtype[Any]:
    """Return the dtype of a result: that of NumPy's promotion, float64 for integers and bool.

    TypeError for what is neither a float of `FLOATS` nor an integer nor bool, and for float16 with
    bfloat16, which have no common type of 16 bits.
    """
    names = {x.dtype.name for x in arrays}
    for x in arrays:
        if x.dtype.kind not in "biu" and x.dtype.name not in FLOATS:
            raise TypeError(f"dtype must be one of {', '.join(FLOATS)} or integer: got {x.dtype}")
    if {"float16", "bfloat16"} <= names:
        raise TypeError("float16 and bfloat16 have no common type: convert one of them")
    dtype = np.result_type(*arrays)
    return np.dtype(np.float64) if dtype.kind in "biu" else dtype


def accumulation_dtype(result: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that everything is computed in, and that lse has."""
    return np.dtype(np.float64 if result == np.float64 else np.float32)


class _Steps(NamedTuple):
    """What every step makes of the scores, each (batch, num_heads, seqlen_q, seqlen_kv) but lse."""

    scores: Array
    softcapped: Array
    biased: Array
    visible: Array
    probabilities: Array
    lse: Array  # (batch, num_heads, seqlen_q)


def _steps(
    query: Array,
    key: Array,
    *,
    mask: ArrayLike | None,
    bias: ArrayLike | None,
    causal: bool | str,
    query_offset: ArrayLike | None,
    kv_lengths: ArrayLike | None,
    scale: float | None,
) -> _Steps:
    """Take the scores through the order of operations: one line, one step."""
    scores = _scaled_scores(query, _per_query_head(key, query), scale)
    softcapped = scores
    added = _added(bias, scores)
    modified = softcapped + added
    visible = (
        (added != -np.inf)  # asked of the bias, since a score of NaN would not become -inf
        & _unmasked(mask, scores.shape)
        & _existing(kv_lengths, scores.shape)
        & _not_in_future(causal, query_offset, kv_lengths, scores.shape)
    )
    biased = np.where(visible, modified, -np.inf)
    probabilities, lse = _softmax(biased, visible)
    return _Steps(scores, softcapped, biased, visible, probabilities, lse)


def _scaled_scores(query: Array, key: Array, scale: float | None) -> Array:
    """Return scale * q.k, scaled after the dot: its type is wide enough for any 16-bit input."""
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    scores: Array = query @ np.swapaxes(key, -1, -2) * factor
    return scores


def _added(bias: ArrayLike | None, scores: Array) -> Array:
    """Return the bias in the type of the scores, which it never widens."""
    added = np.asarray(0 if bias is None else bias)
    if added.dtype.kind not in "iu" and added.dtype.name not in FLOATS:
        raise TypeError(f"bias must be numbers, and a bool array is a mask: got {added.dtype}")
    return np.broadcast_to(added.astype(scores.dtype), scores.shape)


def _unmasked(mask: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    """Return the mask, which must be bool: in a mask of numbers, 0 often means "add nothing"."""
    visible = np.asarray(True if mask is None else mask)
    if visible.dtype != bool:
        raise TypeError(f"mask must be bool: got {visible.dtype}")
    return np.broadcast_to(visible, shape)


def _existing(kv_lengths: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    """Return where key j exists: j < kv_lengths[b]."""
    j = np.arange(shape[-1])
    return np.broadcast_to(j < _lengths(kv_lengths, shape), shape)


def _not_in_future(
    causal: bool | str,
    query_offset: ArrayLike | None,
    kv_lengths: ArrayLike | None,
    shape: tuple[int, ...],
) -> Array:
    """Return where key j stands no later than query i: j <= i + offset."""
    if not causal:
        return np.broadcast_to(True, shape)
    i, j = np.arange(shape[-2])[:, None], np.arange(shape[-1])
    return np.broadcast_to(j <= i + _offsets(causal, query_offset, kv_lengths, shape), shape)


def _offsets(
    causal: bool | str,
    query_offset: ArrayLike | None,
    kv_lengths: ArrayLike | None,
    shape: tuple[int, ...],
) -> Array:
    """Return the position of query 0 among the keys, for every batch entry."""
    if query_offset is not None:
        return _per_batch(query_offset)
    if causal == "top_left":
        return _per_batch(0)
    return _lengths(kv_lengths, shape) - shape[-2]


def _lengths(kv_lengths: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    """Return how many keys exist, for every batch entry."""
    return _per_batch(shape[-1] if kv_lengths is None else kv_lengths)


def _per_batch(numbers: ArrayLike) -> Array:
    """Return (batch, 1, 1, 1) numbers; signed, since lengths are subtracted from each other."""
    return np.asarray(numbers).astype(np.int64)[..., None, None, None]


def _softmax(scores: Array, visible: Array) -> tuple[Array, Array]:
    """Return exp(score) / sum(exp(score)) over the visible keys, and the log of that sum.

    Hidden keys come with a score of -inf. The largest score is taken off first, so that no
    exponential overflows [2]_.
    """
    empty = ~visible.any(axis=-1, keepdims=True)
    highest = np.where(empty, 0.0, scores.max(axis=-1, keepdims=True, initial=-np.inf))
    exponentials = np.where(visible, np.exp(scores - highest), 0.0)
    denominator = exponentials.sum(axis=-1, keepdims=True)
    lse = highest + np.log(denominator)
    return exponentials / np.where(empty, 1, denominator), lse[..., 0]


def _weighted_sum(weights: Array, value: Array, visible: Array) -> Array:
    """Return weights @ value without the hidden values, of which 0 * NaN would remain.

    Keys whose values are all finite go through one product; each of the others is added by itself,
    to the queries that see it.
    """
    finite: Array = np.all(np.isfinite(value), axis=-1, keepdims=True)
    total: Array = weights @ np.where(finite, value, 0)
    for j in np.flatnonzero(~np.all(finite, axis=tuple(range(finite.ndim - 2)))):
        one = slice(j, j + 1)
        seen = visible[..., one] & ~finite[..., one, :]
        total = total + np.where(seen, weights[..., one] * value[..., one, :], 0)
    return total


def _operands(*inputs: ArrayLike, layout: str) -> tuple[list[Array], np.dtype[Any]]:
    """Return the inputs as (batch, heads, length, features), and the dtype of the result.

    They come in the accumulation type, with their batch axes broadcast against each other.
    """
    arrays = [np.asarray(x) for x in inputs]
    dtype = result_dtype(*arrays)
    arrays = [x.astype(accumulation_dtype(dtype)) for x in arrays]
    if layout == "blhd":
        arrays = [np.swapaxes(x, -3, -2) for x in arrays]
    arrays = [x[None] if x.ndim == 2 else x for x in arrays]
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in arrays))
    return [np.broadcast_to(x, batch + x.shape[-3:]) for x in arrays], dtype


def _is_one_head(*inputs: ArrayLike) -> bool:
    """Return whether the caller gave (length, features), and wants no head axis in the result."""
    return all(np.ndim(x) == 2 for x in inputs)


def _per_query_head(x: Array, query: Array) -> Array:
    """Return x with each kv head standing once for every query head that reads it."""
    return np.repeat(x, query.shape[-3] // x.shape[-3], axis=-3)
