"""From the arguments of a call to a `Problem`, which kernels can trust.

Every check is done here or called from here: of arrays in `formats`, of shapes in `shapes`, of
keywords in `keywords`. Nothing is written to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastattn.formats import (
    BITS,
    DOUBLE,
    NAMES,
    SINGLE,
    Array,
    Format,
    address,
    as_array,
    as_one_type,
    common_format,
    known_format,
)
from fastattn.kernels.record import (
    ABSENT,
    BOOL,
    FLOAT64,
    OPERANDS,
    PROBLEM,
)
from fastattn.keywords import (
    check_bias,
    check_bounds,
    check_mask,
    check_position,
    check_precision,
    check_range,
    check_scale,
    check_softcap,
    check_terms,
    per_batch,
)
from fastattn.shapes import (
    Frame,
    as_heads,
    batch_offsets,
    check_out,
    check_overlap,
    check_starts,
    frame_of,
    packed_frame,
)


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
    SINGLE: np.empty((0, 0, 0), SINGLE),
    DOUBLE: np.empty((0, 0, 0), DOUBLE),
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
    q, k, v, dtype, form = as_one_type(inputs)
    one_head = q.ndim == k.ndim == v.ndim == 2
    q = as_heads("query", q, layout)
    k = as_heads("key", k, layout)
    v = as_heads("value", v, layout)
    frame = frame_of(q.shape, k.shape, v.shape, layout, one_head)
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
    if form.view is BITS:
        q, k, v, o = (x.view(BITS) for x in (q, k, v, o))

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
    if form.view is BITS:
        q, k, v, o = (x.view(BITS) for x in (q, k, v, o))
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
    q, k, v, dtype, form = as_one_type(inputs)
    for name, x in zip(NAMES, (q, k, v), strict=True):
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
    frame = packed_frame(q.shape, k.shape, v.shape, len(starts) - 1)

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


# ---------------------------------------------------------------------------
# The record
# ---------------------------------------------------------------------------


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
