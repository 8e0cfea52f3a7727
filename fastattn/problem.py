"""Every check of a call: what passes is a `Problem`, which kernels can trust.

TypeError for a wrong kind, ValueError for a wrong value; messages name the argument, what was
expected and what came. Nothing here is written to, and nothing is copied but what no kernel can
read in place: integers, mixed types and foreign byte order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import addressof, c_char
from dataclasses import dataclass
from functools import lru_cache, partial
from inspect import signature
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn.kernels.record import (
    ABSENT,
    BFLOAT,
    BOOL,
    FLOAT32,
    FLOAT64,
    HALF,
    INT8,
    OPERANDS,
    PROBLEM,
)
from fastattn.loading import loads

Array = NDArray[Any]
Shape = tuple[int, ...]

# The largest position and length, and how far a query sees that has no bound: beyond any position,
# and far from overflow when one is added to it.
UNBOUNDED = 1 << 48
EVERYWHERE = 1 << 50


class Format(NamedTuple):
    """How elements of one dtype are stored, computed and handed to a kernel."""

    storage: int  # a format of `kernels/record.py`
    accumulation: np.dtype[Any]
    view: np.dtype[Any]  # what Numba takes in its place


_SINGLE, _DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
_BITS = np.dtype(np.uint16)
_FLOATS = "float16, float32, float64 or bfloat16"
_NAMES = ("query", "key", "value")
PRECISIONS = ("highest", "bf16")


@lru_cache(maxsize=64)
def _format(dtype: np.dtype[Any]) -> Format | None:
    """Return the format of a dtype in native byte order; None for what is not a known float."""
    if dtype == _SINGLE:
        return Format(FLOAT32, _SINGLE, _SINGLE)
    if dtype == _DOUBLE and dtype.char == "d":
        return Format(FLOAT64, _DOUBLE, _DOUBLE)
    if dtype == np.float16:
        return Format(HALF, _SINGLE, _BITS)
    # By name: ml_dtypes need not be installed.
    if dtype.name == "bfloat16" and dtype.itemsize == 2:
        return Format(BFLOAT, _SINGLE, _BITS)
    return None


QUANTISED = Format(INT8, _SINGLE, np.dtype(np.int8))

_NATIVE: dict[np.dtype[Any], Format] = {
    each: known
    for each in (_SINGLE, _DOUBLE, np.dtype(np.float16))
    if (known := _format(each)) is not None
}


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


@dataclass(frozen=True, eq=False)
class Pages:
    """Where the keys of packed sequences lie in a pool. It never changes, and is equal to itself.

    So what is found out about it can be remembered under it.
    """

    numbers: Array  # (sequence, page)
    size: int  # keys of one page


class Packed(NamedTuple):
    """Sequences that lie end to end."""

    starts: Array  # where each starts among the queries, and the last one ends
    queries: Array  # how many it has,
    lengths: Array  # and of keys
    position: int | Array  # key at which its query 0 stands
    left: int  # how far left and right of its position a query sees
    right: int
    pages: Pages | None = None  # where keys lie in pages of a pool


class Problem(NamedTuple):
    """A checked call. Arrays are (batch or 1, heads, rows, elements), strides as they came."""

    query: Array
    key: Array
    value: Array
    out: Array
    lse: Array  # (batch, num_heads, seqlen_q), or empty where it is not wanted
    record: Array  # `kernels.record.PROBLEM` as integers; those arrays are still to be placed in it
    format: Format
    frame: Frame
    result: Array  # what the caller gets: out and lse in the caller's shape and layout
    result_lse: Array | None
    owners: tuple[Any, ...]  # arrays of which the record holds addresses
    stored: Format | None = None  # that of key and value, where a cache keeps them in another one
    packed: Packed | None = None
    permits_bfloat: bool = False  # products of float32 inputs may be rounded to bfloat16


_NO_LSE: dict[Any, Array] = {
    _SINGLE: np.empty((0, 0, 0), _SINGLE),
    _DOUBLE: np.empty((0, 0, 0), _DOUBLE),
}


def check(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    causal: bool | str = False,
    window: Any = None,
    query_offset: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    scale: float | None = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    block_mask: Any = None,
    layout: str = "bhld",
    precision: str = "highest",
    return_lse: bool = False,
    out: Array | None = None,
    mask_name: str = "mask",
    bias_name: str = "bias",
) -> Problem:
    """Check a call of `attention` against the contract and put it into a kernel's terms."""
    check_precision(precision)
    inputs = as_array("query", query), as_array("key", key), as_array("value", value)
    q, k, v, dtype, form = _as_one_type(inputs)
    one_head = q.ndim == k.ndim == v.ndim == 2
    q = as_heads("query", q, layout)
    k = as_heads("key", k, layout)
    v = as_heads("value", v, layout)
    frame = _frame(q.shape, k.shape, v.shape, layout, one_head)
    batch_shape = frame.batch_shape

    masks = None if mask is None else check_mask(mask_name, mask, frame.scores)
    biases = None if bias is None else check_bias(bias_name, bias, frame.scores)
    length: int | Array = frame.seqlen_kv
    if kv_lengths is not None:
        length = per_batch("kv_lengths", kv_lengths, batch_shape)
        check_range("kv_lengths", length, 0, frame.seqlen_kv)
    bounds = check_bounds(causal, window)
    stands = window is not None or alibi_slopes is not None
    position = check_position(
        causal, query_offset, length, frame.seqlen_q, batch_shape, stands=stands
    )
    cap = 0.0 if softcap is None else check_softcap(softcap, form.accumulation)
    scaling = check_scale(scale, frame.head_dim), cap
    terms = None
    if not (
        alibi_slopes is None
        and sinks is None
        and score_mod is None
        and mask_mod is None
        and block_mask is None
    ):
        terms = check_terms(
            frame,
            form,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            score_mod=score_mod,
            mask_mod=mask_mod,
            block_mask=block_mask,
        )

    if out is None:
        result = np.empty(frame.result, dtype)
    else:
        result = check_out(out, frame.result, dtype)
        check_overlap(result, (*inputs, masks, biases))
    o = as_heads("out", result, layout)
    result_lse = None
    lse = _NO_LSE[form.accumulation]
    if return_lse:
        lse = np.empty((frame.batch, frame.num_heads, frame.seqlen_q), form.accumulation)
        result_lse = lse.reshape(frame.result_lse)

    offsets = None
    if len(batch_shape) > 1:
        offsets = batch_offsets((q, k, v, o, masks, biases), batch_shape)
        if frame.batch:
            q, k, v, o = (x[(0,) * (x.ndim - 3)][None] for x in (q, k, v, o))
    elif not q.ndim == k.ndim == v.ndim == o.ndim == 4:
        q, k, v, o = (x if x.ndim == 4 else x[None] for x in (q, k, v, o))
    if form.view is _BITS:
        q, k, v, o = (x.view(_BITS) for x in (q, k, v, o))

    owners: tuple[Any, ...] = ()
    if (
        masks is None
        and biases is None
        and offsets is None
        and terms is None
        and isinstance(length, int)
        and isinstance(position, int)
    ):
        record = _plain_record(frame, form.storage, length, position, bounds, scaling)
    else:
        owners = (masks, biases, offsets, length, position, terms)
        record = _plain_record(frame, form.storage, 0, 0, bounds, scaling).copy()
        fields = record.view(PROBLEM)[0]
        _describe_scores(fields, masks, biases)
        _set_numbers(fields, "length", length)
        _set_numbers(fields, "position", position)
        if offsets is not None:
            fields["offsets"] = offsets.ctypes.data
        if terms is not None:
            terms.describe(fields)
    checked = (q, k, v, o, lse, record, form, frame, result, result_lse, owners)
    return Problem(*checked, permits_bfloat=precision == "bf16")


class _Seen(NamedTuple):
    """What calls with arrays of the same shapes and dtype share."""

    record: Array
    format: Format
    frame: Frame
    lse: Array
    axes: tuple[None, ...]  # that arrays lack to be four-dimensional


_seen: dict[Any, _Seen] = {}
_MOST_SEEN = 4096


def check_arrays(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    causal: bool | str,
    scale: float | None,
    layout: str,
) -> Problem:
    """Check a call of `attention` without other keywords, in no time if its like was seen before.

    Where the time goes into getting there, that is where it went.
    """
    if not (
        type(query) is np.ndarray
        and type(key) is np.ndarray
        and type(value) is np.ndarray
        and (causal is False or causal is True or type(causal) is str)
        and (scale is None or type(scale) is float)
        and type(layout) is str
    ):
        return check(query, key, value, causal=causal, scale=scale, layout=layout)
    dtype = query.dtype
    shapes = query.shape, key.shape, value.shape
    name = (shapes, dtype, key.dtype, value.dtype, causal, scale, layout)
    seen = _seen.get(name)
    if seen is None:
        problem = check(query, key, value, causal=causal, scale=scale, layout=layout)
        is_simple = dtype == key.dtype == value.dtype == problem.result.dtype and dtype.isnative
        if is_simple and not problem.owners and query.ndim == key.ndim == value.ndim:
            if len(_seen) >= _MOST_SEEN:
                _seen.clear()
            axes = (None,) * (4 - query.ndim)
            _seen[name] = _Seen(problem.record, problem.format, problem.frame, problem.lse, axes)
        return problem
    record, form, frame, lse, axes = seen
    q: Array
    k: Array
    v: Array
    q, k, v, result = query, key, value, np.empty(frame.result, dtype)
    o: Array = result
    if layout == "blhd":
        q, k, v, o = (x.swapaxes(-3, -2) for x in (q, k, v, o))
    if axes:
        q, k, v, o = q[axes], k[axes], v[axes], o[axes]
    if form.view is _BITS:
        q, k, v, o = (x.view(_BITS) for x in (q, k, v, o))
    return Problem(q, k, v, o, lse, record, form, frame, result, None, ())


def check_packed(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike | None = None,
    *,
    kv_lengths: Array | None = None,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    causal: bool | str = False,
    window: Any = None,
    query_offset: ArrayLike | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    scale: float | None = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    precision: str = "highest",
    return_lse: bool = False,
    out: Array | None = None,
) -> Problem:
    """Check a call of `varlen_attention`: sequences are batch entries that begin at offsets.

    With `kv_lengths` a cache knows where keys and values lie, and those given stand for them. Masks
    and biases have a row for each query of all sequences, and a column for each key of the longest.
    """
    check_precision(precision)
    inputs = as_array("query", query), as_array("key", key), as_array("value", value)
    q, k, v, dtype, form = _as_one_type(inputs)
    for name, x in zip(_NAMES, (q, k, v), strict=True):
        if x.ndim != 3:
            raise ValueError(f"{name} must have shape (total, heads, features): got {x.shape}")
    starts = starts_kv = check_starts("cu_seqlens_q", cu_seqlens_q, len(q))
    if kv_lengths is not None:
        starts_kv = np.zeros_like(starts)
    elif cu_seqlens_kv is not None:
        starts_kv = check_starts("cu_seqlens_kv", cu_seqlens_kv, len(k))
        if len(starts) != len(starts_kv):
            raise ValueError(
                "cu_seqlens_kv must be as long as cu_seqlens_q: "
                f"got {len(starts_kv)} and {len(starts)}"
            )
    elif len(k) != len(q):
        raise ValueError(
            "key must have as many rows as query where cu_seqlens_kv is not given: "
            f"got {len(k)} and {len(q)}"
        )
    frame = _packed_frame(q.shape, k.shape, v.shape, len(starts) - 1)

    queries = np.diff(starts)
    lengths = np.diff(starts_kv) if kv_lengths is None else kv_lengths
    scores = frame.num_heads, len(q), int(lengths.max(initial=0))
    masks = None if mask is None else check_mask("mask", mask, scores)
    biases = None if bias is None else check_bias("bias", bias, scores)
    bounds = check_bounds(causal, window)
    stands = window is not None or alibi_slopes is not None
    position = check_position(
        causal, query_offset, lengths, queries, frame.batch_shape, stands=stands
    )
    cap = 0.0 if softcap is None else check_softcap(softcap, form.accumulation)
    scaling = check_scale(scale, frame.head_dim), cap
    terms = check_terms(
        frame,
        form,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        score_mod=score_mod,
        mask_mod=mask_mod,
        block_mask=None,
    )

    if out is None:
        result = np.empty(frame.result, dtype)
    else:
        result = check_out(out, frame.result, dtype)
        check_overlap(result, (*inputs, masks, biases))
    lse, result_lse = _NO_LSE[form.accumulation], None
    if return_lse:
        result_lse = np.empty(frame.result_lse, form.accumulation)
        lse = result_lse[None]

    offsets = np.zeros((len(OPERANDS), frame.batch), np.int64)
    for row, begin, step in (
        (0, starts, q.strides[0]),
        (1, starts_kv, k.strides[0]),
        (2, starts_kv, v.strides[0]),
        (3, starts, result.strides[0]),
        (4, starts, 0 if masks is None else masks.strides[1]),
        (5, starts, 0 if biases is None else biases.strides[1]),
    ):
        np.multiply(begin[:-1], step, offsets[row])
    record = _plain_record(frame, form.storage, 0, 0, bounds, scaling).copy()
    fields = record.view(PROBLEM)[0]
    fields["offsets"], fields["starts"] = address(offsets), address(starts)
    _describe_scores(fields, masks, biases)
    _set_numbers(fields, "length", lengths)
    _set_numbers(fields, "position", position)
    terms.describe(fields)
    q, k, v, o = (x.swapaxes(0, 1)[None].view(form.view) for x in (q, k, v, result))
    owners = (masks, biases, offsets, starts, lengths, position, terms)
    packed = Packed(starts, queries, lengths, position, *bounds)
    return Problem(q, k, v, o, lse, record, form, frame, result, result_lse, owners, packed=packed)


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


@lru_cache(maxsize=1024)
def _packed_frame(q: Shape, k: Shape, v: Shape, sequences: int) -> Frame:
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


@lru_cache(maxsize=1024)
def _frame(q: Shape, k: Shape, v: Shape, layout: str, one_head: bool) -> Frame:
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
def _plain_record(
    frame: Frame,
    storage: int,
    length: int,
    position: int,
    bounds: tuple[int, int],
    scaling: tuple[float, float],
) -> Array:
    """Return the record of a call without arrays of its own, as integers and read-only."""
    record = np.zeros(1, PROBLEM)
    fields = record[0]
    for name in ("q", "k", "v", "out"):
        fields[name]["storage"] = storage
    for name in ("mask", "bias", "k_scale", "v_scale"):
        fields[name]["storage"] = ABSENT
    fields["batches"] = frame.batch
    for name in ("num_heads", "num_kv_heads", "seqlen_q", "seqlen_kv", "head_dim", "head_dim_v"):
        fields[name] = getattr(frame, name)
    fields["rows"] = frame.num_heads // max(frame.num_kv_heads, 1) * frame.seqlen_q
    fields["length"] = length
    fields["position"] = position
    fields["left"], fields["right"] = bounds
    scale, softcap = scaling
    # tanh takes the score over the softcap: one factor, one rounding. It stays finite in the type
    # of the sums, so that a score of 0 stays 0: where the bound changes others, tanh is 1 or the
    # softcap nearly 0.
    largest = float(np.finfo(np.float64 if storage == FLOAT64 else np.float32).max)
    factor = scale / softcap if softcap else scale
    fields["scale"] = min(max(factor, -largest), largest)
    fields["softcap"] = softcap
    record.flags.writeable = False
    return record.view(np.int64)


def _describe_scores(fields: Any, masks: Array | None, biases: Array | None) -> None:
    """Describe views of the scores' shape in a record."""
    if masks is not None:
        fields["mask"] = _operand(masks, BOOL)
    if biases is not None:
        fields["bias"] = _operand(biases, known_format(biases.dtype).storage)


def _operand(x: Array, storage: int) -> tuple[int, ...]:
    """Return the record of a view of the scores' shape."""
    batch_step = x.strides[-4] if x.ndim == 4 else 0
    return (x.ctypes.data, batch_step, *x.strides[-3:], storage)


def _set_numbers(fields: Any, name: str, numbers: int | Array) -> None:
    """Describe a number, or one for each batch entry, in its field of a record."""
    if isinstance(numbers, int):
        fields[name] = numbers
    else:
        fields[f"{name}s"] = numbers.ctypes.data


# ---------------------------------------------------------------------------
# Arrays and their dtypes
# ---------------------------------------------------------------------------


def _as_one_type(
    inputs: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array, np.dtype[Any], Format]:
    """Return query, key and value in their common dtype, that and its format."""
    q, k, v = inputs
    dtype = q.dtype
    form = _NATIVE.get(dtype)
    if form is None or k.dtype is not dtype or v.dtype is not dtype:
        dtype, form = common_format(_NAMES, inputs)
        q, k, v = (x if x.dtype == dtype else x.astype(dtype) for x in inputs)
    return q, k, v, dtype, form


def as_array(name: str, x: Any) -> Array:
    """Return x as an ndarray, without a copy where it is one or offers its memory."""
    if type(x) is np.ndarray:
        return x
    try:
        if hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
            return np.from_dlpack(x)
        return np.asarray(x)
    except ValueError as error:
        raise ValueError(
            f"{name} must be an array or nested lists of equal lengths: {error}"
        ) from None
    except (TypeError, RuntimeError, BufferError) as error:
        # What arrays of other libraries say that NumPy cannot read: on a device, wanting gradients.
        raise TypeError(
            f"{name} must be readable by NumPy: got {type(x).__name__}: {error} "
            "(fastattn.integrations has functions for torch and JAX)"
        ) from None


def address(x: Array) -> int:
    """Return the address of an array that may be written to; ``x.ctypes`` takes thrice as long."""
    return addressof(c_char.from_buffer(x.data)) if x.size else int(x.ctypes.data)


def known_format(dtype: np.dtype[Any]) -> Format:
    """Return the format of a dtype that has been checked."""
    form = _format(dtype)
    assert form is not None
    return form


def is_float(dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype is one of the floats that are computed in, in any byte order."""
    return _format(dtype.newbyteorder("=")) is not None


def common_format(names: Sequence[str], arrays: Sequence[Array]) -> tuple[np.dtype[Any], Format]:
    """Return the dtype of the result, and its format.

    NumPy's promotion; float64 for integers and bool. float16 and bfloat16 have no common type.
    """
    kinds = set()
    for name, x in zip(names, arrays, strict=True):
        native = x.dtype.newbyteorder("=")
        if x.dtype.kind not in "biu" and _format(native) is None:
            raise TypeError(f"{name} must be {_FLOATS}, or integer or bool: got {x.dtype}")
        kinds.add(x.dtype.name)
    if {"float16", "bfloat16"} <= kinds:
        raise TypeError(
            f"{', '.join(names)} must have a common dtype, float16 and bfloat16 have none: got "
            + ", ".join(str(x.dtype) for x in arrays)
        )
    try:
        dtype = np.result_type(*arrays).newbyteorder("=")
    except TypeError:
        raise TypeError(
            f"{', '.join(names)} must have a common dtype: got "
            + ", ".join(str(x.dtype) for x in arrays)
        ) from None
    if dtype.kind in "biu":
        dtype = _DOUBLE
    return dtype, known_format(dtype)


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


# ---------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------


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


def _broadcast(name: str, x: Array, shape: tuple[int, ...]) -> Array:
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


def check_mask(name: str, mask: ArrayLike, shape: Shape) -> Array:
    """Return the mask as a view of the scores' shape."""
    x = as_array(name, mask)
    if x.dtype != np.bool_:
        raise TypeError(f"{name} must be bool (True = attend), numbers are a bias: got {x.dtype}")
    return _broadcast(name, x, shape)


def check_bias(name: str, bias: ArrayLike, shape: Shape) -> Array:
    """Return the bias as a view of the scores' shape, copied only from what no kernel reads."""
    x = as_array(name, bias)
    if x.dtype.kind in "iu":
        x = x.astype(_DOUBLE)
    elif not x.dtype.isnative and x.dtype.kind == "f":
        x = x.astype(x.dtype.newbyteorder("="))
    if _format(x.dtype) is None:
        hint = ", a bool array is a mask" if x.dtype == np.bool_ else ""
        raise TypeError(f"{name} must be {_FLOATS} or integer{hint}: got {x.dtype}")
    return _broadcast(name, x, shape)


@lru_cache(maxsize=256)
def _places(strides: tuple[int, ...], shape: tuple[int, ...]) -> Array:
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
            row[:] = _places((*(0,) * (len(shape) - len(own)), *strides), shape)
    return table


# ---------------------------------------------------------------------------
# Positions and numbers
# ---------------------------------------------------------------------------


def per_batch(name: str, numbers: ArrayLike, batch_shape: Shape) -> int | Array:
    """Return one integer for all batch entries, or int64 of shape (batch,) with one for each."""
    if type(numbers) is int and abs(numbers) <= UNBOUNDED:
        return numbers
    x = as_array(name, numbers)
    if x.dtype == object and isinstance(numbers, int):
        raise ValueError(f"{name} must fit into 64 bits with a sign: got {numbers!r}")
    if x.dtype.kind not in "iu":
        raise TypeError(f"{name} must be an int or integers: got {x.dtype}")
    if x.dtype == np.uint64 and x.size and x.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must fit into 64 bits with a sign: got {x.max()}")
    x = x.astype(np.int64)
    if x.ndim > 0:
        try:
            x = np.ascontiguousarray(np.broadcast_to(x, batch_shape)).reshape(-1)
        except ValueError:
            raise ValueError(
                f"{name} must be one number or broadcast to the batch axes {batch_shape}: "
                f"got shape {x.shape}"
            ) from None
    return int(x.reshape(())) if x.size == 1 else x


def check_range(name: str, numbers: int | Array, low: int, high: int) -> None:
    """Check that all numbers lie between two bounds, both allowed."""
    if isinstance(numbers, int):
        least = most = numbers
    elif numbers.size:
        least, most = numbers.min(), numbers.max()
    else:
        return
    if least < low or most > high:
        came = least if least == most else f"{least} to {most}"
        raise ValueError(f"{name} must lie between {low} and {high}: got {came}")


def check_bounds(causal: bool | str, window: Any) -> tuple[int, int]:
    """Return how far left and right of its position a query sees."""
    if isinstance(causal, str):
        if causal not in ("bottom_right", "top_left"):
            raise ValueError(f'causal must be a bool, "bottom_right" or "top_left": got {causal!r}')
    elif not isinstance(causal, bool | np.bool_):
        raise TypeError(
            'causal must be a bool, "bottom_right" or "top_left": '
            f"got {causal!r} of type {type(causal).__name__}"
        )
    left, right = (EVERYWHERE, EVERYWHERE) if window is None else check_window(window)
    return left, 0 if causal else right


def check_window(window: Any) -> tuple[int, int]:
    """Return how far left and right of its position a query sees in a window."""
    if not isinstance(window, Sequence | np.ndarray) or isinstance(window, str | bytes):
        raise TypeError(f"window must be a pair (left, right): got {window!r}")
    if len(window) != 2:
        raise ValueError(f"window must be a pair (left, right): got {window!r}")
    left, right = (_window_bound(bound) for bound in window)
    return left, right


def _window_bound(bound: Any) -> int:
    if bound is None:
        return EVERYWHERE
    if isinstance(bound, bool | np.bool_) or not isinstance(
        bound, int | float | np.integer | np.floating
    ):
        raise TypeError(f"window must be ints, or None where it has no bound: got {bound!r}")
    if not bound >= 0 or bound % 1 != 0:
        raise ValueError(
            f"window must be whole numbers from 0, or None where it has no bound: got {bound}"
        )
    return min(int(bound), EVERYWHERE)


def check_position(
    causal: bool | str,
    query_offset: ArrayLike | None,
    length: int | Array,
    seqlen_q: int | Array,
    batch_shape: Shape,
    *,
    stands: bool,
) -> int | Array:
    """Return the position of query 0 in each batch entry; 0 where nothing `stands` anywhere."""
    if query_offset is not None:
        position = per_batch("query_offset", query_offset, batch_shape)
        check_range("query_offset", position, -UNBOUNDED, UNBOUNDED)
        return position
    if causal == "top_left" or not (causal or stands):
        return 0
    return length - seqlen_q


def check_precision(precision: Any) -> None:
    """Check the name of a precision."""
    if precision not in PRECISIONS:
        raise ValueError(f'precision must be "highest" or "bf16": got {precision!r}')


def check_scale(scale: Any, head_dim: int) -> float:
    """Return the scale as a float."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    number = _real("scale", scale, " or None")
    if not math.isfinite(number):
        raise ValueError(f"scale must be finite: got {number}")
    return number


def _real(name: str, value: Any, other: str = "") -> float:
    if isinstance(value, str | bytes):
        raise TypeError(f"{name} must be a real number{other}: got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite: got {value}") from None
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number{other}: got {value!r}") from None


def check_softcap(softcap: Any, accumulation: np.dtype[Any]) -> float:
    """Return the softcap as a float."""
    number = _real("softcap", softcap)
    with np.errstate(over="ignore", under="ignore"):
        rounded = accumulation.type(number)
    if not 0 < rounded < math.inf:
        raise ValueError(f"softcap must be above 0 and finite in {accumulation}: got {softcap}")
    return number


# ---------------------------------------------------------------------------
# What happens to scores
# ---------------------------------------------------------------------------


class Terms(NamedTuple):
    """What a call gives beside masks and biases, each None where it does not."""

    slopes: Array | None  # (batch or 1, num_heads) in the accumulation type
    sinks: Array | None  # (num_heads,)
    score_mod: Any  # `kernels.custom.Custom`
    mask_mod: Any
    block_mask: Any  # a BlockMask, and its mask_mod for kernels
    block_mod: Any

    def describe(self, fields: Any) -> None:
        """Fill a record: addresses of arrays that live as long as this does."""
        if self.slopes is not None:
            fields["slopes"] = self.slopes.ctypes.data
            fields["slopes_step"] = self.slopes.shape[1] if self.slopes.shape[0] > 1 else 0
        if self.sinks is not None:
            fields["sinks"] = self.sinks.ctypes.data
        if self.score_mod is not None:
            fields["score_mod"] = _custom(self.score_mod)
        if self.mask_mod is not None:
            fields["mask_mod"] = _custom(self.mask_mod)
        if self.block_mask is not None:
            states = self.block_mask.states
            steps = [0 if n == 1 else s for n, s in zip(states.shape, states.strides, strict=True)]
            size = self.block_mask.block_size
            row_step = states.strides[2]
            mod = _custom(self.block_mod)
            fields["blocks"] = (states.ctypes.data, *steps[:2], row_step, *size, mod)


def _custom(custom: Any) -> tuple[int, int]:
    return custom.address, custom.frozen.ctypes.data


def check_terms(
    frame: Frame,
    form: Format,
    *,
    alibi_slopes: ArrayLike | None,
    sinks: ArrayLike | None,
    score_mod: Any,
    mask_mod: Any,
    block_mask: Any,
) -> Terms:
    """Check everything that happens to scores but masks and biases."""
    accumulation = form.accumulation
    return Terms(
        None if alibi_slopes is None else check_slopes(alibi_slopes, frame, accumulation),
        None if sinks is None else check_sinks(sinks, frame, accumulation),
        None if score_mod is None else check_mod("score_mod", score_mod, accumulation),
        None if mask_mod is None else check_mod("mask_mod", mask_mod),
        None if block_mask is None else check_block_mask(block_mask, frame),
        None if block_mask is None else check_mod("block_mask.mask_mod", block_mask.mask_mod),
    )


def check_slopes(slopes: ArrayLike, frame: Frame, accumulation: np.dtype[Any]) -> Array:
    """Return the slopes of ALiBi as (batch or 1, num_heads)."""
    x = _per_head("alibi_slopes", slopes, accumulation)
    shape = (*frame.batch_shape, frame.num_heads)
    if x.shape[-1:] != shape[-1:]:
        raise ValueError(
            f"alibi_slopes must have shape ({frame.num_heads},) or {shape}: got shape {x.shape}"
        )
    if not np.isfinite(x).all():
        raise ValueError(f"alibi_slopes must be finite: got {x}")
    if x.ndim == 1:
        return x[None]
    try:
        x = np.broadcast_to(x, shape)
    except ValueError:
        raise ValueError(
            f"alibi_slopes must have shape ({frame.num_heads},) or {shape}: got shape {x.shape}"
        ) from None
    return np.ascontiguousarray(x.reshape(frame.batch, frame.num_heads))


def check_sinks(sinks: ArrayLike, frame: Frame, accumulation: np.dtype[Any]) -> Array:
    """Return the sinks as (num_heads,); -inf is none."""
    x = _per_head("sinks", sinks, accumulation)
    if x.shape != (frame.num_heads,):
        raise ValueError(f"sinks must have shape ({frame.num_heads},): got shape {x.shape}")
    if not (x < math.inf).all():
        raise ValueError(f"sinks must be finite or -inf: got {x}")
    return x


def _per_head(name: str, numbers: ArrayLike, accumulation: np.dtype[Any]) -> Array:
    """Return a copy in the accumulation type."""
    x = as_array(name, numbers)
    if x.dtype.kind not in "iu" and not is_float(x.dtype):
        raise TypeError(f"{name} must be {_FLOATS} or integer: got {x.dtype}")
    with np.errstate(over="ignore"):
        return np.array(x, accumulation, order="C")


def check_block_mask(block_mask: Any, frame: Frame) -> Any:
    """Return a BlockMask of the shape of the scores, or with 1 batch entry or head for all."""
    from fastattn.masks import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            "block_mask must be a BlockMask from create_block_mask: "
            f"got {type(block_mask).__name__}"
        )
    batch, heads, *lengths = block_mask.shape
    if (
        batch not in (1, frame.batch)
        or heads not in (1, frame.num_heads)
        or lengths != [frame.seqlen_q, frame.seqlen_kv]
    ):
        raise ValueError(
            f"block_mask must have shape ({frame.batch} or 1, {frame.num_heads} or 1, "
            f"{frame.seqlen_q}, {frame.seqlen_kv}): got {block_mask.shape}"
        )
    return block_mask


_ARGUMENTS = ("score", "b", "h", "i", "j")


def check_mod(name: str, function: Any, accumulation: np.dtype[Any] | None = None) -> Any:
    """Return a mask_mod, or a score_mod for scores of a type, compiled for kernels."""
    if not callable(function):
        expected = ", ".join(_ARGUMENTS[accumulation is None :])
        raise TypeError(f"{name} must be a function of ({expected}): got {function!r}")
    return _compiled_mod(name, function, accumulation)


@lru_cache(maxsize=256)
@loads
def _compiled_mod(name: str, function: Any, accumulation: np.dtype[Any] | None) -> Any:
    """Check and compile a function of the caller's, once."""
    expected = _ARGUMENTS[accumulation is None :]
    held = function if isinstance(function, partial) else partial(function)
    called = getattr(held.func, "py_func", held.func)
    if not isinstance(called, FunctionType) or held.keywords:
        raise TypeError(
            f"{name} must be a Python function, or one jitted by Numba, of which functools.partial "
            f"may hold the first arguments: got {function!r}"
        )
    code = called.__code__
    place = f"{called.__qualname__} in {code.co_filename}, line {code.co_firstlineno}"
    try:
        signature(called).bind(*held.args, *expected)
    except TypeError:
        raise TypeError(
            f"{name} must take the arguments ({', '.join(expected)}): "
            f"got {place}, which takes {signature(called)}"
        ) from None

    from fastattn.kernels import custom

    try:
        if accumulation is None:
            return custom.mask_mod(function)
        return custom.score_mod(function, accumulation)
    except Exception as error:
        raise TypeError(f"{name} must compile with Numba: got {place}: {error}") from error


# ---------------------------------------------------------------------------
# The other functions
# ---------------------------------------------------------------------------

STAGES = ("scores", "softcapped", "biased", "probabilities")


def check_weights(query: ArrayLike, key: ArrayLike, *, rows: Any, **keywords: Any) -> None:
    """Check a call of `attention_weights`: one of `attention` without values, and the rows."""
    q, k = as_array("query", query), as_array("key", key)
    common_format(("query", "key"), (q, k))
    problem = check(q, k, k, **keywords)
    if rows is None:
        return
    if isinstance(rows, slice):
        try:
            rows.indices(problem.frame.seqlen_q)
        except TypeError:
            raise TypeError(f"rows must be an int, a slice or integers: got {rows}") from None
        return
    numbers = as_array("rows", rows)
    if numbers.dtype.kind not in "iu":
        raise TypeError(f"rows must be an int, a slice or integers: got {numbers.dtype}")
    check_range("rows", numbers, 0, problem.frame.seqlen_q - 1)


def _iterable(name: str, arrays: Any) -> Any:
    try:
        return list(arrays)
    except TypeError:
        raise TypeError(
            f"{name} must be a sequence of arrays, or stacked on axis 0: got {arrays!r}"
        ) from None


def check_dtype(name: str, dtype: Any) -> np.dtype[Any]:
    """Return a dtype that `attention` computes in."""
    try:
        checked: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        checked = np.dtype(object)
    if checked.kind not in "biu" and _format(checked) is None:
        raise TypeError(f"{name} must be {_FLOATS}, or integer or bool: got {dtype!r}")
    return checked


def check_states(outputs: Any, lses: Any) -> tuple[list[Array], list[Array]]:
    """Check the parts of `merge_states` and return them as arrays."""
    parts, logs = (
        [as_array(f"{name}[{n}]", x) for n, x in enumerate(_iterable(name, arrays))]
        for name, arrays in (("outputs", outputs), ("lses", lses))
    )
    if not parts or len(parts) != len(logs):
        raise ValueError(
            f"outputs and lses must be as many, and at least one: got {len(parts)} and {len(logs)}"
        )
    common_format([f"outputs[{n}]" for n in range(len(parts))], parts)
    common_format([f"lses[{n}]" for n in range(len(logs))], logs)
    for n, (part, log) in enumerate(zip(parts, logs, strict=True)):
        if part.ndim == 0:
            raise ValueError(f"outputs[{n}] must have at least 1 dimension: got shape ()")
        if part.shape != parts[0].shape:
            raise ValueError(
                f"outputs[{n}] must have the shape of outputs[0] {parts[0].shape}: got {part.shape}"
            )
        if log.shape != part.shape[:-1]:
            raise ValueError(
                f"lses[{n}] must have the shape of its output without the last axis "
                f"{part.shape[:-1]}: got {log.shape}"
            )
    return parts, logs


# ---------------------------------------------------------------------------
# The caller's own output
# ---------------------------------------------------------------------------


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
    places = np.sort(_places.__wrapped__(x.strides, x.shape))
    return bool((np.diff(places) < x.itemsize).any())


def check_overlap(out: Array, inputs: Sequence[Array | None]) -> None:
    """Check that `out` shares no element with what is read."""
    for name, x in zip((*_NAMES, "mask", "bias"), inputs, strict=True):
        if x is not None and np.shares_memory(out, x):
            raise ValueError(f"out must not share memory with {name}")
