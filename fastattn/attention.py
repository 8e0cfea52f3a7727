"""The public functions: signature, meaning, then check -> plan -> run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn import reference
from fastattn.formats import as_array, is_float
from fastattn.masks import BlockMask, MaskMod
from fastattn.problem import STAGES, check, check_arrays, check_packed, check_states, check_weights
from fastattn.run import run, run_packed

Array = NDArray[Any]
Causal = bool | Literal["bottom_right", "top_left"]
Window = tuple[int | None, int | None]
ScoreMod = Callable[..., Any]
Layout = Literal["bhld", "blhd"]
Precision = Literal["highest", "bf16"]
Stage = Literal["scores", "softcapped", "biased", "probabilities"]


@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mask: ArrayLike | None = ...,
    bias: ArrayLike | None = ...,
    causal: Causal = ...,
    window: Window | None = ...,
    query_offset: ArrayLike | None = ...,
    kv_lengths: ArrayLike | None = ...,
    softcap: float | None = ...,
    alibi_slopes: ArrayLike | None = ...,
    sinks: ArrayLike | None = ...,
    scale: float | None = ...,
    score_mod: ScoreMod | None = ...,
    mask_mod: MaskMod | None = ...,
    block_mask: BlockMask | None = ...,
    layout: Layout = ...,
    precision: Precision = ...,
    return_lse: Literal[False] = ...,
    out: Array | None = ...,
) -> Array: ...


@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mask: ArrayLike | None = ...,
    bias: ArrayLike | None = ...,
    causal: Causal = ...,
    window: Window | None = ...,
    query_offset: ArrayLike | None = ...,
    kv_lengths: ArrayLike | None = ...,
    softcap: float | None = ...,
    alibi_slopes: ArrayLike | None = ...,
    sinks: ArrayLike | None = ...,
    scale: float | None = ...,
    score_mod: ScoreMod | None = ...,
    mask_mod: MaskMod | None = ...,
    block_mask: BlockMask | None = ...,
    layout: Layout = ...,
    precision: Precision = ...,
    return_lse: Literal[True],
    out: Array | None = ...,
) -> tuple[Array, Array]: ...


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    causal: Causal = False,
    window: Window | None = None,
    query_offset: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: BlockMask | None = None,
    layout: Layout = "bhld",
    precision: Precision = "highest",
    return_lse: bool = False,
    out: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Return softmax(scale * query @ key.T + bias) @ value over the visible keys, fused.

    The order on every score: ``scale * q.k`` -> softcap -> ALiBi -> bias -> score_mod -> hiding by
    mask, mask_mod, block_mask, causal, window and kv_lengths -> sinks -> softmax -> weighted sum.

    Parameters
    ----------
    query : array_like, (..., num_heads, seqlen_q, head_dim)
        float16, float32, float64, ``ml_dtypes.bfloat16``, or integers. Two dimensions are one head;
        from three the head axis is third from the right. Any strides.
    key : array_like, (..., num_kv_heads, seqlen_kv, head_dim)
        num_kv_heads must divide num_heads: query head h reads kv head ``h // group_size`` with
        ``group_size = num_heads // num_kv_heads``. Keys are never repeated in memory.
    value : array_like, (..., num_kv_heads, seqlen_kv, head_dim_v)
        head_dim_v may differ from head_dim.
    mask : array_like of bool, optional
        Broadcastable to (..., num_heads, seqlen_q, seqlen_kv); True = attend.
    bias : array_like, optional
        Broadcastable likewise; added to the scaled score, -inf hides the key. Never widens the
        result.
    causal : bool, "bottom_right" or "top_left"
        Query i sees the keys up to ``i + offset``, with an offset of ``seqlen_kv - seqlen_q`` for
        "bottom_right", which True means, and 0 for "top_left". For two queries and five keys::

            "bottom_right"    "top_left"
            1 1 1 1 0         1 0 0 0 0
            1 1 1 1 1         1 1 0 0 0

        FlashAttention from 2.1 and MLX align as "bottom_right", torch as "top_left".
    window : (left, right), optional
        Query i sees the keys from ``i + offset - left`` to ``i + offset + right``, both included;
        None is no bound on that side. Composes with `causal`, and stands at "bottom_right" without
        it. For three queries and five keys::

            (1, 0)       (1, 1)       (None, 0)
            0 1 1 0 0    0 1 1 1 0    1 1 1 0 0
            0 0 1 1 0    0 0 1 1 1    1 1 1 1 0
            0 0 0 1 1    0 0 0 1 1    1 1 1 1 1

    query_offset : int or integers of shape (...), optional
        The position of query 0 among the keys, in place of the offset that `causal` names.
    kv_lengths : int or integers of shape (...), optional
        Keys at ``j >= kv_lengths[b]`` do not exist; "bottom_right" counts from this length.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``; greater than 0.
    alibi_slopes : array_like, (num_heads,) or (..., num_heads), optional
        ``-slope * abs(i + offset - j)`` is added to the score; stands as `window` does. See
        `fastattn.alibi_slopes`.
    sinks : array_like, (num_heads,), optional
        Scores that join the denominator of every row and have no value.
    scale : float, optional
        Any finite number; None is ``1 / sqrt(head_dim)``.
    score_mod : callable, optional
        ``f(score, b, h, i, j) -> score``, jitted by Numba or for you; b counts batch entries, h
        query heads, i and j rows of query and key. -inf hides the key. It is compiled at its first
        use, for about a second.
    mask_mod : callable, optional
        ``f(b, h, i, j) -> bool``, likewise; True = attend.
    block_mask : BlockMask, optional
        From `create_block_mask`: a mask_mod whose empty tiles are skipped.
    layout : "bhld" or "blhd"
        "blhd": query, key, value and out are (..., length, heads, features), as in flash-attn, JAX
        and Keras. mask, bias and lse keep their shape.
    precision : "highest" or "bf16"
        "bf16" permits that float32 inputs, and the weights, are rounded to bfloat16 for the
        products. Many queries are, on CPUs that are faster at those; elsewhere no bit changes.
    return_lse : bool
        Also return the logarithm of the softmax's denominator.
    out : ndarray, optional
        Written and returned: the result's shape and dtype, any strides, no element shared with an
        input.

    Returns
    -------
    output : ndarray, (..., num_heads, seqlen_q, head_dim_v)
        In ``np.result_type`` of query, key and value; float64 where that is an integer or bool.
    lse : ndarray, (..., num_heads, seqlen_q), only with `return_lse`
        float32, float64 for float64: ``log(sum(exp(score)))`` over the visible keys.

    Raises
    ------
    TypeError
        For a dtype without meaning here (complex, object, longdouble, float16 with bfloat16), a
        mask that is not bool, a bool bias, `causal` that is neither bool nor a word, an `out` of
        another dtype, a score_mod or mask_mod that Numba cannot compile.
    ValueError
        For shapes or head counts that do not fit, lengths beyond the keys, a window bound below 0,
        a scale that is NaN or infinite, an unknown word, an `out` that overlaps an input.
        Everything is checked before anything is written.

    Notes
    -----
    *Grouped queries.* With 8 query heads and 2 kv heads, query heads 0 to 3 read kv head 0 and 4 to
    7 read kv head 1.

    *Rows that see nothing* have output 0 and lse -inf. What a hidden key, value or bias holds never
    reaches an output, be it NaN; NaN at a visible key does.

    *Precision.* Sums are float32 for 16- and 32-bit inputs, float64 for float64.

    *Memory* is that of a few tiles for each thread: the scores are never stored. Integers, mixed
    dtypes and foreign byte order are converted first, which copies that array.

    *Threads and bits.* `set_num_threads` limits the threads; results are equal, bit by bit, for any
    number of them and whatever else is in the batch.

    *First call.* Numba compiles at the first call of a dtype, for some seconds, and keeps the code
    on disk: see `warmup`.

    References
    ----------
    .. [1] Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1, arXiv:1706.03762
    .. [2] Dao 2023, "FlashAttention-2", section 3.1, arXiv:2307.08691
    .. [3] Ainslie et al. 2023, "GQA", section 2.2, arXiv:2305.13245

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query = rng.standard_normal((1, 8, 5, 16), dtype=np.float32)
    >>> key, value = rng.standard_normal((2, 1, 2, 7, 16), dtype=np.float32)
    >>> output, lse = fastattn.attention(query, key, value, causal=True, return_lse=True)
    >>> output.shape, lse.shape
    ((1, 8, 5, 16), (1, 8, 5))
    >>> expected = fastattn.reference.attention(query, key, value, causal=True)
    >>> bool(np.allclose(output, expected, atol=1e-6))
    True
    """
    if (
        mask is None
        and bias is None
        and window is None
        and query_offset is None
        and kv_lengths is None
        and softcap is None
        and alibi_slopes is None
        and sinks is None
        and score_mod is None
        and mask_mod is None
        and block_mask is None
        and out is None
        and return_lse is False
        and precision == "highest"
    ):
        problem = check_arrays(query, key, value, causal, scale, layout)
    else:
        problem = check(
            query,
            key,
            value,
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
            layout=layout,
            precision=precision,
            return_lse=return_lse,
            out=out,
        )
    run(problem)
    if problem.result_lse is not None:
        return problem.result, problem.result_lse
    return problem.result


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

    Parameters
    ----------
    query : array_like, (..., num_heads, seqlen_q, head_dim)
    key : array_like, (..., num_kv_heads, seqlen_kv, head_dim)
    value : array_like, (..., num_kv_heads, seqlen_kv, head_dim_v)
        Axes before the last two broadcast, a head axis of 1 among them.
    attn_mask : array_like, optional
        Broadcastable to (..., num_heads, seqlen_q, seqlen_kv): bool (True = attend) or float (added
        to the score). Composes with `is_causal`.
    dropout_p : float
        Must be 0: this library is for inference.
    is_causal : bool
        Aligned "top_left", as in torch: query i sees the keys up to i.
    scale : float, optional
        None is ``1 / sqrt(head_dim)``.
    enable_gqa : bool
        Allow fewer kv heads than query heads.

    Returns
    -------
    ndarray, (..., num_heads, seqlen_q, head_dim_v)
        Rows that see no key are 0.

    Raises
    ------
    TypeError
        If `attn_mask` is neither bool nor float; otherwise as `attention`.
    ValueError
        If `dropout_p` is not 0, or head counts differ without `enable_gqa`; otherwise as
        `attention`.

    See Also
    --------
    attention : the same with keywords of its own, lse, lengths and layouts.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import scaled_dot_product_attention
    >>> x = np.eye(3, dtype=np.float32)[None]
    >>> scaled_dot_product_attention(x, x, x, is_causal=True).round(2)
    array([[[1.  , 0.  , 0.  ],
            [0.36, 0.64, 0.  ],
            [0.26, 0.26, 0.47]]], dtype=float32)
    """
    if not isinstance(dropout_p, int | float | np.number):
        raise TypeError(f"dropout_p must be a number: got {dropout_p!r}")
    if not isinstance(is_causal, bool | np.bool_):
        raise TypeError(f"is_causal must be a bool: got {is_causal!r}")
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p must be 0, this library is for inference: got {dropout_p}")
    q, k, v = (as_array(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    if not enable_gqa:
        q, k, v = _broadcast_heads(q, k, v)
    mask = bias = None
    if attn_mask is not None:
        term = as_array("attn_mask", attn_mask)
        if term.dtype == np.bool_:
            mask = term
        elif is_float(term.dtype):
            bias = term
        else:
            raise TypeError(f"attn_mask must be bool or float: got {term.dtype}")
    problem = check(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        causal="top_left" if is_causal else False,
        scale=scale,
        mask_name="attn_mask",
        bias_name="attn_mask",
    )
    run(problem)
    return problem.result


def _broadcast_heads(*arrays: Array) -> list[Array]:
    """Broadcast the head axes: without grouped queries torch takes them for batch axes."""
    if all(x.ndim < 3 for x in arrays):
        return list(arrays)
    arrays = tuple(x[None] if x.ndim == 2 else x for x in arrays)
    counts = {x.shape[-3] for x in arrays if x.ndim >= 3}
    if len(counts) <= 1:
        return list(arrays)
    if len(counts - {1}) > 1:
        raise ValueError(
            "query, key and value must have equal numbers of heads, or 1, without enable_gqa: got "
            + ", ".join(str(x.shape[-3]) for x in arrays)
        )
    count = max(counts - {1})
    return [np.broadcast_to(x, (*x.shape[:-3], count, *x.shape[-2:])) for x in arrays]


@overload
def varlen_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike | None = ...,
    *,
    causal: Causal = ...,
    window: Window | None = ...,
    query_offset: ArrayLike | None = ...,
    softcap: float | None = ...,
    alibi_slopes: ArrayLike | None = ...,
    sinks: ArrayLike | None = ...,
    scale: float | None = ...,
    score_mod: ScoreMod | None = ...,
    mask_mod: MaskMod | None = ...,
    return_lse: Literal[False] = ...,
    out: Array | None = ...,
) -> Array: ...


@overload
def varlen_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike | None = ...,
    *,
    causal: Causal = ...,
    window: Window | None = ...,
    query_offset: ArrayLike | None = ...,
    softcap: float | None = ...,
    alibi_slopes: ArrayLike | None = ...,
    sinks: ArrayLike | None = ...,
    scale: float | None = ...,
    score_mod: ScoreMod | None = ...,
    mask_mod: MaskMod | None = ...,
    return_lse: Literal[True],
    out: Array | None = ...,
) -> tuple[Array, Array]: ...


def varlen_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike | None = None,
    *,
    causal: Causal = False,
    window: Window | None = None,
    query_offset: ArrayLike | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Return `attention` of each of several sequences by itself, which lie end to end in memory.

    Parameters
    ----------
    query : array_like, (total_q, num_heads, head_dim)
        The rows of all sequences, without padding between them.
    key : array_like, (total_kv, num_kv_heads, head_dim)
    value : array_like, (total_kv, num_kv_heads, head_dim_v)
    cu_seqlens_q : ints of shape (sequences + 1,)
        Sequence b is the rows from ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``: starts at 0,
        never falls, ends at total_q. A sequence may be empty.
    cu_seqlens_kv : ints of shape (sequences + 1,), optional
        The same for key and value; that of the queries, if not given.
    causal, window, query_offset, softcap, alibi_slopes, sinks, scale, score_mod, mask_mod
        As in `attention`, where each sequence is a batch entry: `query_offset` is an int or of
        shape (sequences,), `alibi_slopes` (num_heads,) or (sequences, num_heads). b of `score_mod`
        and `mask_mod` is the sequence, i and j count from its start.
    return_lse : bool
        Also return the logarithm of the softmax's denominator.
    out : ndarray, optional
        Written and returned.

    Returns
    -------
    output : ndarray, (total_q, num_heads, head_dim_v)
        In ``np.result_type`` of query, key and value; float64 where that is an integer or bool.
    lse : ndarray, (num_heads, total_q), only with `return_lse`
        float32, float64 for float64.

    Raises
    ------
    TypeError, ValueError
        As `attention`; TypeError also for sequences that do not start at integers, ValueError where
        those do not start at 0, fall, or end elsewhere than the rows.

    Notes
    -----
    Work is shared between the threads by what each sequence sees, the most first, so that a long
    one leaves no core idle. Bits do not depend on the sequences around.

    See Also
    --------
    attention : the equation, and what each keyword means.

    References
    ----------
    .. [1] Dao 2023, "FlashAttention-2", arXiv:2307.08691, whose flash_attn_varlen_func packs like
       this

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 7, 2, 16), dtype=np.float32)
    >>> output = fastattn.varlen_attention(query, key, value, [0, 4, 4, 7], causal=True)
    >>> output.shape
    (7, 2, 16)
    >>> expected = fastattn.reference.varlen_attention(query, key, value, [0, 4, 4, 7], causal=True)
    >>> bool(np.allclose(output, expected, atol=1e-6))
    True
    """
    problem = check_packed(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_kv,
        causal=causal,
        window=window,
        query_offset=query_offset,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        scale=scale,
        score_mod=score_mod,
        mask_mod=mask_mod,
        return_lse=return_lse,
        out=out,
    )
    run_packed(problem)
    if problem.result_lse is not None:
        return problem.result, problem.result_lse
    return problem.result


def attention_weights(
    query: ArrayLike,
    key: ArrayLike,
    *,
    stage: Stage = "probabilities",
    rows: int | slice | ArrayLike | None = None,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    causal: Causal = False,
    window: Window | None = None,
    query_offset: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: BlockMask | None = None,
    layout: Layout = "bhld",
    precision: Precision = "highest",
) -> Array:
    """Return the attention of every query to every key: the heat map, on purpose.

    Parameters
    ----------
    query : array_like, (..., num_heads, seqlen_q, head_dim)
    key : array_like, (..., num_kv_heads, seqlen_kv, head_dim)
    stage : "scores", "softcapped", "biased" or "probabilities"
        "scores" are scaled and raw, also at hidden keys; "softcapped" are those after the softcap;
        "biased" come after ALiBi, bias and score_mod and are -inf at hidden keys; "probabilities"
        are the softmax, 0 at hidden keys.
    rows : int, slice or integers, optional
        The queries to return, ``0 <= row < seqlen_q``; only theirs are computed, so that one row of
        a long context is cheap. An int removes the axis.
    mask, bias, causal, window, query_offset, kv_lengths, softcap, alibi_slopes, sinks
        As in `attention`.
    scale, score_mod, mask_mod, block_mask, layout, precision
        As in `attention`.

    Returns
    -------
    ndarray, (..., num_heads, seqlen_q, seqlen_kv)
        In ``np.result_type`` of query and key; float64 where that is an integer or bool.

    Raises
    ------
    TypeError, ValueError
        As `attention`; ValueError also for an unknown stage or a row out of range, TypeError for
        rows that are not integers.

    Notes
    -----
    This allocates what `attention` avoids: seqlen_q * seqlen_kv numbers for each head.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> fastattn.attention_weights(x, x, scale=1.0, rows=2).round(2)
    array([0.21, 0.21, 0.58])
    >>> fastattn.attention_weights(x, x, scale=1.0, causal=True).shape
    (3, 3)
    """
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}: got {stage!r}")
    query, key = as_array("query", query), as_array("key", key)
    check_weights(
        query,
        key,
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
        layout=layout,
        precision=precision,
        rows=rows,
    )
    return reference.attention_weights(
        query,
        key,
        stage=stage,
        rows=rows,  # type: ignore[arg-type]
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
        layout=layout,
        precision=precision,
    )


def merge_states(
    outputs: Sequence[ArrayLike] | Array, lses: Sequence[ArrayLike] | Array
) -> tuple[Array, Array]:
    """Return (output, lse) of attention over all keys from those over disjoint sets of them.

    ``lse = log(sum(exp(lse_n)))`` and ``output = sum(exp(lse_n - lse) * output_n)``

    Parameters
    ----------
    outputs : sequence of array_like, (..., seqlen_q, head_dim_v) each, or stacked on axis 0
        Outputs of `attention` for the same queries.
    lses : sequence of array_like, (..., seqlen_q) each, or stacked on axis 0
        What ``return_lse=True`` gave with them.

    Returns
    -------
    output : ndarray, (..., seqlen_q, head_dim_v)
        In ``np.result_type`` of outputs.
    lse : ndarray, (..., seqlen_q)
        float32, float64 for float64.

    Raises
    ------
    TypeError
        For a dtype without meaning here.
    ValueError
        If there is no part, the numbers of outputs and lses differ, or shapes do not fit.

    Notes
    -----
    A part whose lse is -inf saw no key and changes nothing, exactly.

    References
    ----------
    .. [1] Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", section 3.1,
       arXiv:1805.02867

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> x = np.random.default_rng(0).standard_normal((2, 6, 4))
    >>> parts = [fastattn.attention(x, x[:, s], x[:, s], return_lse=True)
    ...          for s in (slice(0, 4), slice(4, 6))]
    >>> output, lse = fastattn.merge_states(*zip(*parts))
    >>> output.shape, bool(np.allclose(output, fastattn.attention(x, x, x)))
    ((2, 6, 4), True)
    """
    return reference.merge_states(*check_states(outputs, lses))
