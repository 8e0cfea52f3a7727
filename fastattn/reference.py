"""Attention as its definition reads, in NumPy: the specification of this library.

The functions have the signatures of the fused ones and say what those must return, step by step and
with every score in memory. There are no kernels here and no checks of the arguments beyond the rule
of dtypes: checks are those of `problem.py`, and what is wrong here fails as NumPy lets it fail.

The order of operations on one score, everywhere:

    s = scale * q.k -> softcap -> ALiBi -> bias -> score_mod
      -> mask, mask_mod, block_mask, causal, window, kv_lengths (to -inf)
      -> sinks join the denominator -> softmax -> weighted sum

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
.. [6] Press et al. 2021, "Train Short, Test Long" (ALiBi), section 3, arXiv:2108.12409
.. [7] Beltagy et al. 2020, "Longformer", section 3.1 (sliding window), arXiv:2004.05150
.. [8] Gemma Team 2024, "Gemma 2", section 2 (logit soft-capping), arXiv:2408.00118
.. [9] Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", section 3.3,
   arXiv:2309.17453
.. [10] Dong et al. 2024, "Flex Attention" (score_mod, mask_mod, block masks), section 3,
   arXiv:2412.05496
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "attention",
    "attention_weights",
    "merge_states",
    "scaled_dot_product_attention",
    "varlen_attention",
]

Array = NDArray[Any]
Window = tuple[int | None, int | None]

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
    window: Window | None = None,
    query_offset: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    scale: float | None = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    layout: str = "bhld",
    precision: str = "highest",  # noqa: ARG001  # for kernels: nothing is rounded here
    return_lse: bool = False,
    out: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Return softmax(scores) @ value over the visible keys [1]_.

    Scores are scale * query @ key.T and what the keywords make of them, in the order above.

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
    window : (left, right)
        Query i sees keys from i + offset - left to i + offset + right [7]_; None is unbounded.
        Without causal and query_offset the offset is that of "bottom_right":

            (1, 0)            (0, 1)            (1, None)
            0 0 1 1 0         0 0 0 1 1         0 0 1 1 1
            0 0 0 1 1         0 0 0 0 1         0 0 0 1 1

    query_offset : int or ints of shape (batch,)
        The offset itself, in place of the one that `causal` names.
    kv_lengths : int or ints of shape (batch,)
        Keys from this one on do not exist.
    softcap : float
        The score becomes softcap * tanh(score / softcap) [8]_.
    alibi_slopes : (num_heads,) or (batch, num_heads)
        -slope * |i + offset - j| is added to the score [6]_, with the offset of the window. What it
        is for a slope of 1:

            -3 -2 -1  0 -1
            -4 -3 -2 -1  0

    sinks : (num_heads,)
        Scores of one more key for each head, which has weight but no value [9]_.
    scale : float
        None is 1 / sqrt(head_dim).
    score_mod : f(score, b, h, i, j) -> score
        Called for every score [10]_; -inf hides the key. b counts batch entries, h query heads, i
        and j rows of query and key.
    mask_mod : f(b, h, i, j) -> bool
        True is visible.
    block_mask : BlockMask
        The same by blocks: its states say which of them are hidden (0), visible (2), or to be asked
        of its mask_mod (1). A batch or head axis of 1 serves all.
    layout : "bhld" or "blhd"
        "blhd": query, key, value and out are (batch, length, heads, features). The shapes of mask,
        bias and lse do not change.
    return_lse : bool
        Also return lse, the log of the softmax's denominator sum(exp(score)) [4]_, sinks included.
    out : array
        Written and returned.

    Returns
    -------
    output : (batch, num_heads, seqlen_q, head_dim_v), in `result_dtype` of query, key and value
    lse : (batch, num_heads, seqlen_q), in the accumulation type

    Notes
    -----
    A query with no visible key has output 0 and lse -inf, or the sink where there is one. What a
    hidden key, value or bias holds reaches no output, be it NaN; at visible keys, NaN and Inf give
    what IEEE arithmetic gives.
    """
    (q, k, v), dtype = _operands(query, key, value, layout=layout)
    steps = _steps(
        q,
        k,
        rows=np.arange(q.shape[-2]),
        mask=mask,
        bias=bias,
        causal=causal,
        window=window,
        query_offset=query_offset,
        kv_lengths=kv_lengths,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        scale=scale,
        score_mod=score_mod,
        mask_mod=mask_mod,
        block_mask=block_mask,
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
    window: Window | None = None,
    query_offset: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    scale: float | None = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    layout: str = "bhld",
    precision: str = "highest",  # noqa: ARG001  # for kernels: nothing is rounded here
) -> Array:
    """Return the scores of every query with every key as they stand after one of the steps.

    Parameters
    ----------
    stage : "scores", "softcapped", "biased" or "probabilities"
        scale * query @ key.T, and the same after softcap, both raw at hidden keys; after ALiBi,
        bias and score_mod with -inf at hidden keys; their softmax, 0 at hidden keys.
    rows : int, slice or ints
        The queries to return, as an index of the axis seqlen_q: an int removes the axis. Only their
        scores are computed.

    The other parameters are those of `attention`.

    Returns
    -------
    (batch, num_heads, seqlen_q, seqlen_kv), in `result_dtype` of query and key
    """
    (q, k), dtype = _operands(query, key, layout=layout)
    chosen = np.arange(q.shape[-2])
    if rows is not None:  # a tuple is as many rows, and not an index for as many axes
        chosen = chosen[rows if isinstance(rows, slice) else np.asarray(rows)]
    steps = _steps(
        q,
        k,
        rows=np.ravel(chosen),
        mask=mask,
        bias=bias,
        causal=causal,
        window=window,
        query_offset=query_offset,
        kv_lengths=kv_lengths,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        scale=scale,
        score_mod=score_mod,
        mask_mod=mask_mod,
        block_mask=block_mask,
    )
    weights: Array = {
        "scores": steps.scores,
        "softcapped": steps.softcapped,
        "biased": steps.biased,
        "probabilities": steps.probabilities,
    }[stage].astype(dtype)
    if _is_one_head(query, key):
        weights = weights[0]
    return weights.reshape(*weights.shape[:-2], *np.shape(chosen), weights.shape[-1])


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


@ieee
def varlen_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike | None = None,
    *,
    causal: bool | str = False,
    window: Window | None = None,
    query_offset: ArrayLike | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    scale: float | None = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Return `attention` of every sequence by itself, of sequences that lie end to end.

    Parameters
    ----------
    query, key, value : (total_q, num_heads, head_dim), (total_kv, num_kv_heads, head_dim),
            (total_kv, num_kv_heads, head_dim_v)
    cu_seqlens_q, cu_seqlens_kv : ints of shape (sequences + 1,)
        Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]. Those of query serve key, if not
        given.

    The other parameters are those of `attention`. A sequence is a batch entry: b and the batch axis
    of query_offset and alibi_slopes count sequences, i and j count from the start of theirs.

    Returns
    -------
    output : (total_q, num_heads, head_dim_v), in `result_dtype` of query, key and value
    lse : (num_heads, total_q), in the accumulation type
    """
    q, k, v = (np.asarray(x) for x in (query, key, value))
    dtype = result_dtype(q, k, v)
    output = np.empty((*q.shape[:-1], v.shape[-1]), dtype) if out is None else out
    lse = np.empty(q.shape[1::-1], accumulation_dtype(dtype))
    score_mod, mask_mod = _in_python(score_mod), _in_python(mask_mod)
    starts_q = np.asarray(cu_seqlens_q)
    starts_kv = starts_q if cu_seqlens_kv is None else np.asarray(cu_seqlens_kv)

    for b in range(len(starts_q) - 1):
        rows, keys = (slice(starts[b], starts[b + 1]) for starts in (starts_q, starts_kv))
        output[rows], lse[:, rows] = attention(
            q[rows],
            k[keys],
            v[keys],
            causal=causal,
            window=window,
            query_offset=_entry(query_offset, b, len(starts_q) - 1, axes=1),
            softcap=softcap,
            alibi_slopes=_entry(alibi_slopes, b, len(starts_q) - 1, axes=2),
            sinks=sinks,
            scale=scale,
            score_mod=score_mod and (lambda s, _, *hij, b=b: score_mod(s, b, *hij)),
            mask_mod=mask_mod and (lambda _, *hij, b=b: mask_mod(b, *hij)),
            layout="blhd",
            return_lse=True,
        )
    return (output, lse) if return_lse else output


def _entry(numbers: Any, b: int, sequences: int, *, axes: int) -> Any:
    """Return what one sequence has of numbers that may have a batch axis."""
    if np.ndim(numbers) < axes:
        return numbers
    return np.broadcast_to(numbers, (sequences, *np.shape(numbers)[1:]))[b]


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


class _Scores(NamedTuple):
    """Where the scores stand that are computed: those of some rows of `shape`."""

    shape: tuple[int, ...]  # (batch, num_heads, seqlen_q, seqlen_kv)
    i: Array  # (rows,) of the queries

    @property
    def indices(self) -> tuple[Array, Array, Array, Array]:
        """Batch entry, head, query and key of every score, as arrays that broadcast to all."""
        *batch, num_heads, _, seqlen_kv = self.shape
        b = np.arange(int(np.prod(batch))).reshape(*batch, 1, 1, 1)
        h, j = np.arange(num_heads)[:, None, None], np.arange(seqlen_kv)
        return b, h, self.i[:, None], j

    def of(self, term: ArrayLike) -> Array:
        """Return what a term that broadcasts to `shape` holds for these scores."""
        return np.broadcast_to(np.asarray(term), self.shape)[..., self.i, :]


class _Steps(NamedTuple):
    """What every step makes of the scores, each (batch, num_heads, rows, seqlen_kv) but lse."""

    scores: Array
    softcapped: Array
    biased: Array
    visible: Array
    probabilities: Array
    lse: Array  # (batch, num_heads, rows)


def _steps(
    query: Array,
    key: Array,
    *,
    rows: Array,
    mask: ArrayLike | None,
    bias: ArrayLike | None,
    causal: bool | str,
    window: Window | None,
    query_offset: ArrayLike | None,
    kv_lengths: ArrayLike | None,
    softcap: float | None,
    alibi_slopes: ArrayLike | None,
    sinks: ArrayLike | None,
    scale: float | None,
    score_mod: Callable[..., Any] | None,
    mask_mod: Callable[..., Any] | None,
    block_mask: Any,
) -> _Steps:
    """Take the scores of some rows through the order of operations: one line, one step."""
    where = _Scores((*query.shape[:-1], key.shape[-2]), rows)
    lengths = _per_batch(key.shape[-2] if kv_lengths is None else kv_lengths)
    distance = _distance(where, causal, query_offset, lengths)

    scores = _scaled_scores(query[..., rows, :], _per_query_head(key, query), scale)
    softcapped = _softcapped(scores, softcap)
    added = _added(bias, where, scores.dtype)
    summed = softcapped - _penalty(alibi_slopes, distance, scores.dtype) + added
    modified = _modified(summed, score_mod, where)
    visible = (
        (added != -np.inf)  # asked of the bias, since a score of NaN would not become -inf
        & ((modified != -np.inf) | (score_mod is None))
        & _unmasked(mask, where)
        & _allowed(mask_mod, where)
        & _in_blocks(block_mask, where)
        & (where.indices[-1] < lengths)
        & _in_window(distance, (None, 0) if causal else (None, None))
        & _in_window(distance, window or (None, None))
    )
    biased = np.where(visible, modified, -np.inf)
    probabilities, lse = _softmax(
        biased, visible, _per_head(-np.inf if sinks is None else sinks, scores.dtype)
    )
    return _Steps(scores, softcapped, biased, visible, probabilities, lse)


def _scaled_scores(query: Array, key: Array, scale: float | None) -> Array:
    """Return scale * q.k, scaled after the dot: its type is wide enough for any 16-bit input."""
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    scores: Array = query @ np.swapaxes(key, -1, -2) * factor
    return scores


def _softcapped(scores: Array, softcap: float | None) -> Array:
    """Return the scores bent towards softcap, which none exceeds."""
    return scores if softcap is None else softcap * np.tanh(scores / softcap)


def _penalty(slopes: ArrayLike | None, distance: Array, dtype: np.dtype[Any]) -> Array:
    """Return what ALiBi takes off: slope * |i + offset - j|."""
    per_key = _per_head(0 if slopes is None else slopes, dtype)
    penalty: Array = per_key * np.abs(distance).astype(dtype)
    return penalty


def _added(bias: ArrayLike | None, where: _Scores, dtype: np.dtype[Any]) -> Array:
    """Return the bias in the type of the scores, which it never widens."""
    added = np.asarray(0 if bias is None else bias)
    if added.dtype.kind not in "iu" and added.dtype.name not in FLOATS:
        raise TypeError(f"bias must be numbers, and a bool array is a mask: got {added.dtype}")
    return where.of(added).astype(dtype)


def _modified(scores: Array, score_mod: Callable[..., Any] | None, where: _Scores) -> Array:
    """Return what the caller's function makes of every score, one by one."""
    if score_mod is None:
        return scores
    modified = np.frompyfunc(_in_python(score_mod), 5, 1)(scores, *where.indices)
    return np.asarray(modified).astype(scores.dtype)


def _unmasked(mask: ArrayLike | None, where: _Scores) -> Array:
    """Return the mask, which must be bool: in a mask of numbers, 0 often means "add nothing"."""
    visible = np.asarray(True if mask is None else mask)
    if visible.dtype != bool:
        raise TypeError(f"mask must be bool: got {visible.dtype}")
    return where.of(visible)


def _allowed(mask_mod: Callable[..., Any] | None, where: _Scores) -> Array:
    """Return what the caller's function says of every score, one by one."""
    if mask_mod is None:
        return where.of(True)
    return np.asarray(np.frompyfunc(_in_python(mask_mod), 4, 1)(*where.indices)).astype(bool)


def _in_python(function: Any) -> Any:
    """Return the Python function that a jitted one was made of: it takes numbers of any type."""
    return getattr(function, "py_func", function)


def _in_blocks(block_mask: Any, where: _Scores) -> Array:
    """Return where the block of a score is visible, or its mask_mod says so of the score."""
    if block_mask is None:
        return where.of(True)
    b, h, i, j = where.indices
    rows, columns = block_mask.block_size
    batches, heads, *_ = block_mask.states.shape
    states = block_mask.states[b % batches, h % heads, i // rows, j // columns]
    visible: Array = (states == 2) | (states == 1) & _allowed(block_mask.mask_mod, where)
    return visible


def _distance(
    where: _Scores, causal: bool | str, query_offset: ArrayLike | None, lengths: Array
) -> Array:
    """Return i + offset - j, how far every query stands behind every key."""
    *_, i, j = where.indices
    if query_offset is not None:
        offset = _per_batch(query_offset)
    elif causal == "top_left":
        offset = _per_batch(0)
    else:
        offset = lengths - where.shape[-2]
    return i + offset - j


def _in_window(distance: Array, window: Window) -> Array:
    """Return where a key stands at most `left` before the query and `right` behind it."""
    left, right = window
    visible = np.full(distance.shape, True)
    if left is not None:
        visible &= distance <= left
    if right is not None:
        visible &= -distance <= right
    return visible


def _per_batch(numbers: ArrayLike) -> Array:
    """Return (batch, 1, 1, 1) numbers; signed, since lengths are subtracted from each other."""
    return np.asarray(numbers).astype(np.int64)[..., None, None, None]


def _per_head(numbers: ArrayLike, dtype: np.dtype[Any]) -> Array:
    """Return (batch, num_heads, 1, 1) numbers in the type of the scores."""
    return np.asarray(numbers).astype(dtype)[..., None, None]


def _softmax(scores: Array, visible: Array, sinks: Array | float = -np.inf) -> tuple[Array, Array]:
    """Return exp(score) / sum(exp(score)) over the visible keys, and the log of that sum.

    Hidden keys come with a score of -inf. The largest score is taken off first, so that no
    exponential overflows [2]_. The sum has one more term for the sink.
    """
    nothing = ~visible.any(axis=-1, keepdims=True) & np.isneginf(sinks)
    highest = np.maximum(scores.max(axis=-1, keepdims=True, initial=-np.inf), sinks)
    highest = np.where(nothing, 0.0, highest)
    exponentials = np.where(visible, np.exp(scores - highest), 0.0)
    denominator = exponentials.sum(axis=-1, keepdims=True) + np.exp(sinks - highest)
    lse = highest + np.log(denominator)
    return exponentials / np.where(nothing, 1, denominator), lse[..., 0]


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
