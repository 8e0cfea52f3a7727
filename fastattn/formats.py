"""Arrays and their formats: which dtypes are computed in, and what several have in common.

Copied is only what no kernel can read in place: integers, mixed types and foreign byte order.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, c_char
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn.kernels.record import BFLOAT, FLOAT32, FLOAT64, HALF, INT8

Array = NDArray[Any]
Shape = tuple[int, ...]
SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
BITS = np.dtype(np.uint16)
FLOAT_NAMES = "float16, float32, float64 or bfloat16"
NAMES = ("query", "key", "value")


class Format(NamedTuple):
    """How elements of one dtype are stored, computed and handed to a kernel."""

    storage: int  # a format of `kernels/record.py`
    accumulation: np.dtype[Any]
    view: np.dtype[Any]  # what Numba takes in its place


@lru_cache(maxsize=64)
def format_of(dtype: np.dtype[Any]) -> Format | None:
    """Return the format of a dtype in native byte order; None for what is not a known float."""
    if dtype == SINGLE:
        return Format(FLOAT32, SINGLE, SINGLE)
    if dtype == DOUBLE and dtype.char == "d":
        return Format(FLOAT64, DOUBLE, DOUBLE)
    if dtype == np.float16:
        return Format(HALF, SINGLE, BITS)
    # By name: ml_dtypes need not be installed.
    if dtype.name == "bfloat16" and dtype.itemsize == 2:
        return Format(BFLOAT, SINGLE, BITS)
    return None


QUANTISED = Format(INT8, SINGLE, np.dtype(np.int8))
_NATIVE: dict[np.dtype[Any], Format] = {
    each: known
    for each in (SINGLE, DOUBLE, np.dtype(np.float16))
    if (known := format_of(each)) is not None
}


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
    form = format_of(dtype)
    assert form is not None
    return form


def is_float(dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype is one of the floats that are computed in, in any byte order."""
    return format_of(dtype.newbyteorder("=")) is not None


def check_dtype(name: str, dtype: Any) -> np.dtype[Any]:
    """Return a dtype that `attention` computes in."""
    try:
        checked: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        checked = np.dtype(object)
    if checked.kind not in "biu" and format_of(checked) is None:
        raise TypeError(f"{name} must be {FLOAT_NAMES}, or integer or bool: got {dtype!r}")
    return checked


def as_one_type(
    inputs: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array, np.dtype[Any], Format]:
    """Return query, key and value in their common dtype, that and its format."""
    q, k, v = inputs
    dtype = q.dtype
    form = _NATIVE.get(dtype)
    if form is None or k.dtype is not dtype or v.dtype is not dtype:
        dtype, form = common_format(NAMES, inputs)
        q, k, v = (x if x.dtype == dtype else x.astype(dtype) for x in inputs)
    return q, k, v, dtype, form


def common_format(names: Sequence[str], arrays: Sequence[Array]) -> tuple[np.dtype[Any], Format]:
    """Return the dtype of the result, and its format.

    NumPy's promotion; float64 for integers and bool. float16 and bfloat16 have no common type.
    """
    kinds = set()
    for name, x in zip(names, arrays, strict=True):
        native = x.dtype.newbyteorder("=")
        if x.dtype.kind not in "biu" and format_of(native) is None:
            raise TypeError(f"{name} must be {FLOAT_NAMES}, or integer or bool: got {x.dtype}")
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
        dtype = DOUBLE
    return dtype, known_format(dtype)
