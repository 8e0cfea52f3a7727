"""Shapes of a call: what fits, what broadcasts, where batch entries lie, what overlaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastattn.formats import NAMES, Array, Shape, as_array


@dataclass(frozen=True, eq=False)
class Frame:
    """What follows from the shapes of a call. The same shapes give the same object."""

    batch_shape: Shape
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_kv: int
    head_dim: int
    head_dim_v: int
    batch: int
    scores: Shape  # (batch..., num_heads, seqlen_q, seqlen_kv)
    result: Shape  # that of the result and its lse, as the caller wants them
    result_lse: Shape


@lru_cache(maxsize=1024)
def frame_of(q: Shape, k: Shape, v: Shape, layout: str, one_head: bool) -> Frame:
    """Check the shapes (batch..., heads, length, features) of a call."""
    batch_shape = check_shapes(q, k, v)
    rows = (*batch_shape, *q[-3:-1])
    result = (*rows, v[-1])
    if one_head:
        result, rows_lse = result[-2:], rows[-1:]
    else:
        rows_lse = rows
        if layout == "blhd":
            result = (*batch_shape, q[-2], q[-3], v[-1])
    return Frame(
        batch_shape=batch_shape,
        num_heads=q[-3],
        num_kv_heads=k[-3],
        seqlen_q=q[-2],
        seqlen_kv=k[-2],
        head_dim=q[-1],
        head_dim_v=v[-1],
        batch=math.prod(batch_shape),
        scores=(*rows, k[-2]),
        result=result,
        result_lse=rows_lse,
    )


@lru_cache(maxsize=1024)
def packed_frame(q: Shape, k: Shape, v: Shape, sequences: int) -> Frame:
    """Check the shapes (total, heads, features) of a call."""
    check_shapes(*((heads, total, features) for total, heads, features in (q, k, v)))
    total_q, num_heads, head_dim = q
    return Frame(
        batch_shape=(sequences,),
        num_heads=num_heads,
        num_kv_heads=k[1],
        seqlen_q=total_q,
        seqlen_kv=k[0],
        head_dim=head_dim,
        head_dim_v=v[2],
        batch=sequences,
        scores=(sequences, num_heads, total_q, k[0]),
        result=(total_q, num_heads, v[2]),
        result_lse=(num_heads, total_q),
    )


def check_shapes(q: Shape, k: Shape, v: Shape) -> Shape:
    """Check that shapes (batch..., heads, length, features) fit; return that of the batch axes."""
    *q_batch, num_heads, _, head_dim = q
    *k_batch, num_kv_heads, seqlen_kv, key_dim = k
    *v_batch, value_heads, value_rows, _ = v
    if head_dim != key_dim:
        raise ValueError(f"key.shape[-1] must equal query.shape[-1]: got {key_dim} and {head_dim}")
    if head_dim == 0:
        raise ValueError(f"query must have a head_dim of at least 1: got shape {q}")
    if seqlen_kv != value_rows:
        raise ValueError(
            "value must have as many rows as key: "
            f"got seqlen_kv {seqlen_kv} in key and {value_rows} in value"
        )
    if num_kv_heads != value_heads:
        raise ValueError(
            "value must have as many heads as key: "
            f"got num_kv_heads {num_kv_heads} in key and {value_heads} in value"
        )
    if num_heads != num_kv_heads and (num_kv_heads == 0 or num_heads % num_kv_heads):
        raise ValueError(
            "the number of heads of key must divide that of query: "
            f"got {num_kv_heads} and {num_heads}, "
            f"as (..., heads, length, features) are {(*k,)} and {(*q,)}"
        )
    if q_batch == k_batch == v_batch:
        return tuple(q_batch)
    try:
        return np.broadcast_shapes(tuple(q_batch), tuple(k_batch), tuple(v_batch))
    except ValueError:
        raise ValueError(
            "the batch axes of query, key and value must broadcast: "
            f"got {tuple(q_batch)}, {tuple(k_batch)} and {tuple(v_batch)}"
        ) from None


def as_heads(name: str, x: Array, layout: str) -> Array:
    """Return a view with axes (batch..., heads, length, features)."""
    if layout == "bhld":
        if x.ndim >= 3:
            return x
        if x.ndim == 2:
            return x[None]
        raise ValueError(f"{name} must have at least 2 dimensions: got shape {x.shape}")
    if layout != "blhd":
        raise ValueError(f'layout must be "bhld" or "blhd": got {layout!r}')
    if x.ndim < 3:
        raise ValueError(
            f'{name} must have at least 3 dimensions with layout="blhd": got shape {x.shape}'
        )
    return x.swapaxes(-3, -2)


def check_starts(name: str, starts: ArrayLike, total: int) -> Array:
    """Return where sequences start, and the last one ends, as int64."""
    x = as_array(name, starts)
    if x.dtype.kind not in "iu":
        raise TypeError(f"{name} must be ints: got {x.dtype}")
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{name} must have shape (sequences + 1,): got shape {x.shape}")
    # Compared before they are converted: a uint64 may not fit.
    if x[0] != 0 or x[-1] != total or (x[1:] < x[:-1]).any():
        raise ValueError(
            f"{name} must rise from 0 to the number of rows, {total}: got {x[0]} to {x[-1]}"
            + (", with a fall" if (x[1:] < x[:-1]).any() else "")
        )
    return np.array(x, np.int64)


def broadcast(name: str, x: Array, shape: tuple[int, ...]) -> Array:
    """Return a mask or bias as a view of the scores' shape."""
    try:
        return np.broadcast_to(x, shape)
    except ValueError:
        # Most often a mask of padding, or one for each text, without an axis for the heads.
        per_text = (
            len(shape) == 4 and x.ndim in (2, 3) and x.shape[:: len(x.shape) - 1] == shape[::3]
        )
        axes = ", None" * (4 - x.ndim)
        hint = f" (if its first axis is the batch, {name}[:{axes}] has room for heads)"
        raise ValueError(
            f"{name} must broadcast to (..., num_heads, seqlen_q, seqlen_kv) = {shape}: "
            f"got shape {x.shape}{hint if per_text else ''}"
        ) from None


@lru_cache(maxsize=256)
def places_of(strides: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Return where the elements of an array start, in bytes from the first, in C order."""
    places = np.zeros((), np.int64)
    for n, step in zip(shape, strides, strict=True):
        places = places[..., None] + np.arange(n) * step
    return places.reshape(-1)


def batch_offsets(operands: Sequence[Array | None], shape: tuple[int, ...]) -> Array:
    """Return (operand, batch) byte offsets of batch entries, for axes that no stride merges."""
    table = np.zeros((len(operands), math.prod(shape)), np.int64)
    for row, x in zip(table, operands, strict=True):
        if x is not None:
            own = x.shape[:-3]
            strides = [0 if n == 1 else s for n, s in zip(own, x.strides[: len(own)], strict=True)]
            row[:] = places_of((*(0,) * (len(shape) - len(own)), *strides), shape)
    return table


def check_out(out: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Check that the result can be written to `out`."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a NumPy array: got {type(out).__name__}")
    if out.dtype != dtype:
        raise TypeError(f"out must have the result's dtype {dtype}: got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"out must have the result's shape {shape}: got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out must be writeable: got a read-only array")
    if _overlaps_itself(out):
        raise ValueError(
            f"out must have room for every element: got strides {out.strides} for {out.shape}"
        )
    return out


def _overlaps_itself(x: Array) -> bool:
    """Return whether two elements of an array share memory."""
    reach = x.itemsize
    axes = sorted((abs(step), n) for step, n in zip(x.strides, x.shape, strict=True) if n > 1)
    for step, n in axes:
        if step < reach:
            break
        reach += step * (n - 1)
    else:
        return False
    # Axes that interleave may still miss each other: count the places.
    places = np.sort(places_of.__wrapped__(x.strides, x.shape))
    return bool((np.diff(places) < x.itemsize).any())


def check_overlap(out: Array, inputs: Sequence[Array | None]) -> None:
    """Check that `out` shares no element with what is read."""
    for name, x in zip((*NAMES, "mask", "bias"), inputs, strict=True):
        if x is not None and np.shares_memory(out, x):
            raise ValueError(f"out must not share memory with {name}")
