"""Checks of the keywords of a call: positions and numbers, masks and biases, terms of the scores.

Each returns its keyword in a kernel's terms. TypeError for a wrong kind, ValueError for a wrong
value; messages name the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from inspect import signature
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastattn.formats import (
    DOUBLE,
    FLOAT_NAMES,
    Array,
    Format,
    Shape,
    as_array,
    format_of,
    is_float,
)
from fastattn.loading import loads
from fastattn.shapes import Frame, broadcast

# The largest position and length, and how far a query sees that has no bound: beyond any position,
# and far from overflow when one is added to it.
UNBOUNDED = 1 << 48
EVERYWHERE = 1 << 50
PRECISIONS = ("highest", "bf16")


# ---------------------------------------------------------------------------
# Masks and biases
# ---------------------------------------------------------------------------


def check_mask(name: str, mask: ArrayLike, shape: Shape) -> Array:
    """Return the mask as a view of the scores' shape."""
    x = as_array(name, mask)
    if x.dtype != np.bool_:
        raise TypeError(f"{name} must be bool (True = attend), numbers are a bias: got {x.dtype}")
    return broadcast(name, x, shape)


def check_bias(name: str, bias: ArrayLike, shape: Shape) -> Array:
    """Return the bias as a view of the scores' shape, copied only from what no kernel reads."""
    x = as_array(name, bias)
    if x.dtype.kind in "iu":
        x = x.astype(DOUBLE)
    elif not x.dtype.isnative and x.dtype.kind == "f":
        x = x.astype(x.dtype.newbyteorder("="))
    if format_of(x.dtype) is None:
        hint = ", a bool array is a mask" if x.dtype == np.bool_ else ""
        raise TypeError(f"{name} must be {FLOAT_NAMES} or integer{hint}: got {x.dtype}")
    return broadcast(name, x, shape)


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
# What else happens to scores
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
        raise TypeError(f"{name} must be {FLOAT_NAMES} or integer: got {x.dtype}")
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
