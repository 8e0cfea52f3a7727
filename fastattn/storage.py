"""Rows of keys and values in the format that a cache keeps them in, and what every cache checks.

What only a cache knows is checked here, everything else as in any other call.
"""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastattn import reference
from fastattn.formats import QUANTISED, Format, as_array, is_float, known_format
from fastattn.kernels.record import FLOAT32, PROBLEM
from fastattn.problem import Problem, check, check_packed

Array = NDArray[Any]

# Those of `attention`.
_KEYWORDS = frozenset(
    name
    for name, each in signature(reference.attention).parameters.items()
    if each.kind is Parameter.KEYWORD_ONLY
)


class Storage:
    """Rows of keys and values, (slot, head, row, feature), in the format they are kept in."""

    def __init__(
        self, shape: tuple[int, int, int], head_dim: int, head_dim_v: int, dtype: Any
    ) -> None:
        self.dtype = dtype
        self.key = np.zeros((*shape, head_dim), dtype)
        self.value = np.zeros((*shape, head_dim_v), dtype)
        self.key_scale = self.value_scale = None
        self.is_quantised = bool(dtype == np.int8)  # with scales, then
        if self.is_quantised:
            self.key_scale, self.value_scale = (np.zeros(shape, np.float32) for _ in range(2))

    @property
    def format(self) -> Format:
        """How kernels are told of it."""
        return QUANTISED if self.is_quantised else known_format(self.dtype)

    @property
    def arrays(self) -> list[Array]:
        """Keys, values, and their scales where there are any."""
        scales = [x for x in (self.key_scale, self.value_scale) if x is not None]
        return [self.key, self.value, *scales]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in self.arrays)

    def convert(self, name: str, x: Array) -> tuple[Array, Array | None]:
        """Return rows in the format of the cache, and their scales."""
        if self.is_quantised:
            return quantise(name, x)
        if x.dtype == self.dtype:
            return x, None
        with np.errstate(over="ignore"):  # infinity is what rounding gives
            return x.astype(self.dtype), None

    def put(self, place: Any, key: tuple[Array, Any], value: tuple[Array, Any]) -> None:
        """Write converted rows to where an index of (slot, head, row) says."""
        self.key[place], self.value[place] = key[0], value[0]
        if self.key_scale is not None and self.value_scale is not None:
            self.key_scale[place], self.value_scale[place] = key[1], value[1]

    def move(self, target: Any, source: Any) -> None:
        """Copy rows inside the storage."""
        for x in self.arrays:
            x[target] = x[source]

    def resized(self, rows: int) -> Storage:
        """Return a storage with more rows for each slot, and what is there."""
        slots, heads, old, head_dim = self.key.shape
        new = Storage((slots, heads, rows), head_dim, self.value.shape[-1], self.dtype)
        for ours, theirs in zip(self.arrays, new.arrays, strict=True):
            theirs[:, :, :old] = ours
        return new

    def place(self, problem: Problem) -> Problem:
        """Return a problem, checked for other keys and values, with those that are kept."""
        record, form = problem.record.copy(), self.format
        fields = record.view(PROBLEM)[0]
        fields["k"]["storage"] = fields["v"]["storage"] = form.storage
        for name, scale in (("k_scale", self.key_scale), ("v_scale", self.value_scale)):
            if scale is not None:
                fields[name] = (scale.ctypes.data, *scale.strides, 0, FLOAT32)
        key, value = self.key.view(form.view), self.value.view(form.view)
        return problem._replace(key=key, value=value, record=record, stored=form)


def quantise(name: str, x: Array) -> tuple[Array, Array]:
    """Return rows as int8 and the scale of each: ``x ~ scale * integers``, symmetric.

    The largest element of a row becomes 127, so that no element is off by more than half of
    ``max(abs(x)) / 127``.
    """
    with np.errstate(over="ignore"):  # infinity is refused, whatever it comes from
        wide = x.astype(np.float32, copy=False)
    largest = np.abs(wide).max(axis=-1, initial=0)
    if not np.isfinite(largest).all():
        raise ValueError(f"{name} must be finite to be stored as int8: got NaN or infinity")
    scale = largest / np.float32(127)
    # A row of zeros has scale 0, and so do those whose scale is too small for a float32.
    divisor = np.where(scale > 0, scale, np.float32(1))
    return np.rint(wide / divisor[..., None]).clip(-127, 127).astype(np.int8), scale


def check_storage_dtype(dtype: DTypeLike) -> Any:
    """Return a dtype that keys and values can be kept in."""
    try:
        checked = np.dtype(dtype).newbyteorder("=")
    except TypeError:
        checked = np.dtype(object)
    if checked != np.int8 and not is_float(checked):
        raise TypeError(f"dtype must be one of {', '.join(reference.FLOATS)}, int8: got {dtype!r}")
    return checked


def check_rows(name: str, x: ArrayLike, shape: tuple[int | None, ...], axes: str) -> Array:
    """Return keys or values to be appended; None in the shape stands for any length."""
    rows = as_array(name, x)
    if not is_float(rows.dtype):
        raise TypeError(f"{name} must be float16, float32, float64 or bfloat16: got {rows.dtype}")
    fits = rows.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape, rows.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape {axes} = ({wanted}): got {rows.shape}")
    return rows


def check_integers(
    name: str, numbers: ArrayLike, shape: tuple[int, ...], low: int, high: Any
) -> Array:
    """Return ints between two bounds, both allowed, broadcast to a shape."""
    x = as_array(name, numbers)
    if x.dtype.kind not in "iu" and x.size:
        raise TypeError(f"{name} must be an int or ints: got {x.dtype}")
    try:
        x = np.broadcast_to(x, shape)
    except ValueError:
        raise ValueError(f"{name} must have shape {shape}: got {x.shape}") from None
    if ((x < low) | (x > high)).any():
        raise ValueError(f"{name} must lie between {low} and {high}: got {x}")
    return x.astype(np.int64)


# Those with which a checked call can be made again, as they hold no arrays.
REPEATABLE = frozenset(("causal", "window", "softcap", "scale", "return_lse"))

# How many checked calls a cache remembers.
_MOST_REMEMBERED = 64

# What `attention` has and `attend` has not, with the reason.
_WITHOUT = {"kv_lengths": "the cache knows how many keys there are"}
_WITHOUT_IF_PACKED = _WITHOUT | {
    "layout": "queries of all sequences lie end to end",
    "block_mask": "sequences have unequal lengths, give a mask_mod",
}


def _check_keywords(keywords: dict[str, Any], without: dict[str, str]) -> None:
    """Check that a call has no keyword but those of `attention` that have a meaning."""
    for name in keywords:
        if name in without or name not in _KEYWORDS:
            reason = f": {without[name]}" if name in without else ""
            raise TypeError(f"attend() got an unexpected keyword argument {name!r}{reason}")


def without_arrays(problem: Problem) -> Problem:
    """Return a problem that keeps no query and no result alive."""
    nothing = np.empty(0, problem.result.dtype)
    return problem._replace(query=nothing, out=nothing, result=nothing)


def again(known: Problem, query: Array, record: Array, owners: Any) -> Problem:
    """Return a known call made again, with a query, a result and a record of its own.

    `owners` are the arrays of which that record holds addresses.
    """
    form, frame = known.format, known.frame
    result = np.empty(frame.result, query.dtype)
    q, o = query, result
    if form.view is not query.dtype:
        q, o = query.view(form.view), result.view(form.view)
    if q.ndim == 3:  # packed: (tokens, heads, features)
        q, o = q.swapaxes(0, 1)[None], o.swapaxes(0, 1)[None]
    lse, result_lse = known.lse, None
    if known.result_lse is not None:
        lse = np.empty(lse.shape, lse.dtype)
        result_lse = lse.reshape(frame.result_lse)
    return Problem(
        *(q, known.key, known.value, o, lse, record, form, frame, result, result_lse),
        *((known.owners, owners), known.stored),
        permits_bfloat=known.permits_bfloat,
    )


def remember(known: dict[Any, Any], name: Any, call: Any) -> None:
    """Keep what is known of a call under a name, among the latest ones."""
    if len(known) >= _MOST_REMEMBERED:
        known.clear()
    known[name] = call


def _stand_ins(query: Array, shape: tuple[int, ...], storage: Storage) -> list[Array]:
    """Return key and value for checks that look at no element; they take no memory."""
    dtype = query.dtype if storage.is_quantised else storage.dtype
    element = np.zeros((), dtype)
    return [np.broadcast_to(element, (*shape, x.shape[-1])) for x in (storage.key, storage.value)]


def check_attend(
    query: Any, shape: tuple[int, ...], storage: Storage, lengths: Any, keywords: dict[str, Any]
) -> Problem:
    """Check a call with keys and values of a shape (batch, num_kv_heads, seqlen_kv)."""
    _check_keywords(keywords, _WITHOUT)
    q = as_array("query", query)
    if q.ndim != 4 or len(q) != shape[0]:
        raise ValueError(
            f"query must have four axes, the first of them {shape[0]}, as the cache: got {q.shape}"
        )
    key, value = _stand_ins(q, shape, storage)
    if keywords.get("layout") == "blhd":
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    return storage.place(check(q, key, value, kv_lengths=lengths, **keywords))


def check_attend_packed(
    query: Any, starts: Array, storage: Storage, lengths: Array, keywords: dict[str, Any]
) -> Problem:
    """Check a call with queries that lie end to end; where the keys lie is for the cache to add."""
    _check_keywords(keywords, _WITHOUT_IF_PACKED)
    q = as_array("query", query)
    key, value = _stand_ins(q, (0, storage.key.shape[1]), storage)
    return storage.place(check_packed(q, key, value, starts, kv_lengths=lengths, **keywords))
