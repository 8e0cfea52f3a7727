"""Attention for torch tensors on the CPU: an operator, and a stand-in for torch's own function.

    from fastattn.integrations.torch import scaled_dot_product_attention, use_fastattn

    output = scaled_dot_product_attention(query, key, value, is_causal=True)

    with use_fastattn(), torch.inference_mode():
        model(x)                              # whatever calls torch.nn.functional's

Tensors are read where they lie, in any strides, and the result's memory is the kernel's output: no
copy is made either way. NumPy has no bfloat16 of its own, so such tensors pass as the integers that
they are stored in, with the package ml_dtypes, which the extra ``fastattn[torch]`` installs too.

Everything runs as the operator ``torch.ops.fastattn.attention``, which tracing and
``torch.compile(fullgraph=True)`` keep as one node.

Import torch, or this module, before the first call of fastattn that uses threads. Numba's OpenMP
layer switches nested parallelism on in the system's runtime. A torch that is loaded later shares
that runtime instead of loading its own, starts threads within threads, and its own attention
becomes up to a hundred times as slow. A warning says so where it is too late.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import fastattn
from fastattn import runtime
from fastattn.attention import Causal, Window
from fastattn.integrations import needs

if "torch" not in sys.modules and runtime.threading_layer() == "omp":
    warnings.warn(
        "torch is imported after fastattn has started its threads, and its own attention will be "
        "slow: import torch or fastattn.integrations.torch first",
        RuntimeWarning,
        stacklevel=2,
    )

with needs("torch"):
    import torch

__all__ = ["attention", "scaled_dot_product_attention", "use_fastattn"]

# What torch had when this module was imported: where `use_fastattn` stands in, this still computes.
_TORCH = torch.nn.functional.scaled_dot_product_attention

try:
    import ml_dtypes

    _BFLOAT16: np.dtype[Any] | None = np.dtype(ml_dtypes.bfloat16)
except ModuleNotFoundError:
    _BFLOAT16 = None

_DTYPES = {torch.float16, torch.float32, torch.float64}
if _BFLOAT16 is not None:
    _DTYPES.add(torch.bfloat16)


# ---------------------------------------------------------------------------
# The operator
# ---------------------------------------------------------------------------

_library = torch.library.Library("fastattn", "DEF")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, *, Tensor? mask=None, Tensor? bias=None, "
    "str? causal=None, SymInt? left=None, SymInt? right=None, Tensor? query_offset=None, "
    "Tensor? kv_lengths=None, float? softcap=None, Tensor? alibi_slopes=None, Tensor? sinks=None, "
    "float? scale=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _to_numpy(x: torch.Tensor) -> np.ndarray:
    """Return a view of a tensor's memory."""
    array: np.ndarray
    if x.dtype is torch.bfloat16:
        array = x.view(torch.int16).numpy(force=True).view(_BFLOAT16)
    else:
        array = x.numpy(force=True)
    return array


def _to_torch(x: np.ndarray) -> torch.Tensor:
    """Return a tensor that owns an array's memory."""
    if _BFLOAT16 is not None and x.dtype == _BFLOAT16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


# Results have the rows of all heads side by side in memory, as torch's own function leaves them on
# the CPU: what layers do next, transpose and reshape, are views then.


def _on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: str | None = None,
    left: int | None = None,
    right: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    **tensors: torch.Tensor | None,
) -> torch.Tensor:
    """Compute the operator."""
    keywords: dict[str, Any] = {name: _to_numpy(x) for name, x in tensors.items() if x is not None}
    if left is not None or right is not None:
        keywords["window"] = (left, right)
    if softcap is not None:
        keywords["softcap"] = softcap
    keywords["causal"], keywords["scale"] = causal or False, scale
    q, k, v = _to_numpy(query), _to_numpy(key), _to_numpy(value)
    if q.ndim == 2 or k.ndim == 2 or v.ndim == 2:
        return _to_torch(fastattn.attention(q, k, v, **keywords))
    q, k, v = q.swapaxes(-3, -2), k.swapaxes(-3, -2), v.swapaxes(-3, -2)
    output = fastattn.attention(q, k, v, layout="blhd", **keywords)
    return _to_torch(output.swapaxes(-3, -2))


def _shape_only(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any
) -> torch.Tensor:
    """Return what the operator returns, without its numbers, for tracing."""
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    if query.ndim == key.ndim == value.ndim == 2:
        return query.new_empty((query.shape[0], value.shape[-1]), dtype=dtype)
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    heads = query.shape[-3] if query.ndim > 2 else 1
    rows, features = query.shape[-2], value.shape[-1]
    if query.ndim == 2 or key.ndim == 2 or value.ndim == 2:
        return query.new_empty((*batch, heads, rows, features), dtype=dtype)
    return query.new_empty((*batch, rows, heads, features), dtype=dtype).transpose(-3, -2)


_library.impl("attention", _on_cpu, "CPU")
torch.library.register_fake("fastattn::attention", _shape_only, lib=_library)
_operator = torch.ops.fastattn.attention.default


# ---------------------------------------------------------------------------
# What callers see
# ---------------------------------------------------------------------------


def _obstacle(*tensors: torch.Tensor | None) -> str | None:
    """Return what this library does not take about tensors, for a sentence; None for nothing."""
    gradients = torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if not x.is_cpu:
            return f"tensors on {x.device}"
        if gradients and x.requires_grad:
            return "tensors that want gradients (torch.inference_mode() turns them off)"
        if x.layout is not torch.strided or x.is_nested:
            return "sparse or nested tensors"
        if x.dtype not in _DTYPES:
            missing = " without ml_dtypes (pip install 'fastattn[torch]')"
            return f"tensors of {x.dtype}{missing if x.dtype is torch.bfloat16 else ''}"
    return None


_TENSORS = ("query", "key", "value", "mask", "bias", "alibi_slopes", "sinks")


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    causal: Causal = False,
    window: Window | None = None,
    query_offset: int | torch.Tensor | None = None,
    kv_lengths: int | torch.Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Return `fastattn.attention` of tensors on the CPU, as a tensor.

    Parameters
    ----------
    query : Tensor, (..., num_heads, seqlen_q, head_dim)
        float16, bfloat16, float32 or float64, in any strides.
    key : Tensor, (..., num_kv_heads, seqlen_kv, head_dim)
    value : Tensor, (..., num_kv_heads, seqlen_kv, head_dim_v)
    mask, bias, causal, window, query_offset, kv_lengths, softcap, alibi_slopes, sinks, scale
        As in `fastattn.attention`, with tensors for arrays.

    Returns
    -------
    Tensor, (..., num_heads, seqlen_q, head_dim_v)
        In the promoted dtype of query, key and value. From three dimensions on,
        ``output.transpose(-3, -2)`` is contiguous, as layers want it.

    Raises
    ------
    TypeError, ValueError
        As `fastattn.attention`; ValueError also for tensors on another device, sparse, or wanting
        gradients, which this library does not compute.

    See Also
    --------
    scaled_dot_product_attention : torch's signature, and torch itself for what is an error here.

    Examples
    --------
    >>> import torch
    >>> from fastattn.integrations.torch import attention
    >>> query = torch.ones(1, 4, 3, 8)  # 4 query heads read 2 kv heads
    >>> key, value = torch.ones(2, 1, 2, 5, 8)
    >>> attention(query, key, value, causal=True, window=(1, 0)).shape
    torch.Size([1, 4, 3, 8])
    """
    given = (query, key, value, mask, bias, alibi_slopes, sinks)
    for name, x in zip(_TENSORS, given, strict=True):
        if x is not None and not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor: got {type(x).__name__}")
    obstacle = _obstacle(query, key, value)
    if obstacle is not None:
        raise ValueError(
            f"query, key and value must be dense tensors of floats on the CPU: got {obstacle}"
        )
    left, right = (None, None) if window is None else window
    return _operator(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        causal=causal if isinstance(causal, str) else "bottom_right" if causal else None,
        left=left,
        right=right,
        query_offset=_as_tensor(query_offset),
        kv_lengths=_as_tensor(kv_lengths),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        scale=scale,
    )


def _as_tensor(numbers: int | torch.Tensor | None) -> torch.Tensor | None:
    return torch.tensor(numbers) if isinstance(numbers, int) else numbers


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return what torch.nn.functional.scaled_dot_product_attention returns.

    Parameters
    ----------
    query : Tensor, (..., num_heads, seqlen_q, head_dim)
        float16, bfloat16, float32 or float64 on the CPU, in any strides.
    key : Tensor, (..., num_kv_heads, seqlen_kv, head_dim)
    value : Tensor, (..., num_kv_heads, seqlen_kv, head_dim_v)
        Axes before the last two broadcast.
    attn_mask : Tensor, optional
        Broadcastable to (..., num_heads, seqlen_q, seqlen_kv): bool (True = attend) or float (added
        to the score). Composes with `is_causal`, which torch refuses.
    dropout_p : float
        Above 0, torch computes the call.
    is_causal : bool
        Aligned at the top left: query i sees the keys up to i.
    scale : float, optional
        None is ``1 / sqrt(head_dim)``.
    enable_gqa : bool
        Allow fewer kv heads than query heads.

    Returns
    -------
    Tensor, (..., num_heads, seqlen_q, head_dim_v)
        Rows that see no key are 0. From three dimensions on, ``output.transpose(-3, -2)`` is
        contiguous.

    Raises
    ------
    ValueError, RuntimeError
        For shapes that do not fit.

    Warns
    -----
    RuntimeWarning
        Once for each reason, where torch computes a call that is not for this library: tensors on
        another device, sparse, of other dtypes or wanting gradients; dropout.

    See Also
    --------
    attention : this library's own keywords.
    use_fastattn : this function in the place of torch's.

    Examples
    --------
    >>> import torch
    >>> from fastattn.integrations.torch import scaled_dot_product_attention
    >>> query, key, value = torch.randn(3, 2, 8, 100, 64, generator=torch.manual_seed(0))
    >>> output = scaled_dot_product_attention(query, key, value, is_causal=True)
    >>> output.shape
    torch.Size([2, 8, 100, 64])
    >>> expected = torch.nn.functional.scaled_dot_product_attention(
    ...     query, key, value, is_causal=True
    ... )
    >>> torch.allclose(output, expected, atol=1e-6)
    True
    """
    is_bias = attn_mask is not None and attn_mask.dtype is not torch.bool
    bias = attn_mask if is_bias else None
    obstacle = "dropout" if dropout_p > 0 else _obstacle(query, key, value, bias)
    if obstacle is not None:
        _warn_once(f"fastattn does not take {obstacle}: torch's own attention does")
        return _TORCH(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if not (enable_gqa or query.shape[:-2] == key.shape[:-2] == value.shape[:-2]):
        # torch then knows no head axis, and broadcasts all that stand before the last two.
        shapes = [tuple(x.shape[:-2]) for x in (query, key, value)]
        try:
            batch = torch.broadcast_shapes(*shapes)
        except RuntimeError as error:
            raise RuntimeError(
                "the axes of query, key and value before the last two must broadcast, or have "
                f"fewer kv heads with enable_gqa=True: got {', '.join(map(str, shapes))}"
            ) from error
        query, key, value = (x.expand(*batch, *x.shape[-2:]) for x in (query, key, value))
    # Only what differs from the operator's defaults: each argument takes half a microsecond.
    keywords: dict[str, Any] = {}
    if attn_mask is not None:
        keywords["bias" if is_bias else "mask"] = attn_mask
    if is_causal:
        keywords["causal"] = "top_left"
    if scale is not None:
        keywords["scale"] = scale
    return _operator(query, key, value, **keywords)


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned and not torch.compiler.is_compiling():
        _warned.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)


_standing_in = threading.Lock()
_replaced: list[Any] = []  # what torch had, once for each `use_fastattn` that is open


@contextmanager
def use_fastattn() -> Iterator[None]:
    """Send torch.nn.functional.scaled_dot_product_attention through this library for a while.

    Also a decorator. When the last of several is left, in whatever order and with or without an
    error, torch has its own function back.

    Notes
    -----
    *What is reached* is what looks the function up in ``torch.nn.functional`` when it is called:
    torch's own layers, transformers' ``sdpa``. A name that was imported from there earlier keeps
    torch's function, and so does what never calls it: ``torch.nn.MultiheadAttention`` has a way of
    its own in inference, which ``torch.backends.mha.set_fastpath_enabled(False)`` turns off.

    *Threads.* The function is replaced in the process, not in the thread: others are sent through
    this library too while any thread is inside.

    *torch.compile* notices: what was compiled outside is compiled again inside, with the operator.

    Examples
    --------
    >>> import torch
    >>> from fastattn.integrations.torch import use_fastattn
    >>> x = torch.ones(1, 2, 3, 4)
    >>> with use_fastattn():
    ...     torch.nn.functional.scaled_dot_product_attention(x, x, x).shape
    torch.Size([1, 2, 3, 4])
    """
    functional = torch.nn.functional
    with _standing_in:
        _replaced.append(functional.scaled_dot_product_attention)
        functional.scaled_dot_product_attention = scaled_dot_product_attention
    try:
        yield
    finally:
        with _standing_in:
            before = _replaced.pop()
            if not _replaced:
                functional.scaled_dot_product_attention = before
