"""The caller's own functions: a score_mod or mask_mod as a C function of one ``TILE``.

No kernel is compiled for them. A small loop over a tile of scores is, with the function inside;
kernels call it by its address, once for each tile. Lanes are queries, so that scalar code of the
caller's becomes vector code wherever LLVM sees how.

Arguments that ``functools.partial`` holds are read when the tile is computed: other numbers and
arrays of the same types need no other code. What a function finds in its closure or its globals is
frozen into its code, as always with Numba.
"""

from __future__ import annotations

import hashlib
import itertools
import types as python
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba import typeof, types
from numba.core import errors
from numba.extending import overload
from numba.np.numpy_support import from_dtype

from .compile import foreign, glue, kernel
from .fingerprint import fingerprint, globals_of
from .record import TILE
from .simd.pointers import on, pointer, record_type, value_at
from .simd.registers import lanes, splat
from .simd.scalars import map_lanes

tile_at = record_type(TILE)

_INTEGER = np.int64(0)
_INDICES = (types.int64,) * 4
_addresses: dict[str, int] = {}
_unkept = itertools.count()
_copies = itertools.count()


class Custom(NamedTuple):
    """A caller's function, ready for a kernel."""

    address: int  # of a C function of one TILE
    frozen: Any  # int64: the arguments that functools.partial holds, as Numba lays them out
    owners: tuple[Any, ...]  # the arrays among them


def score_mod(function: Callable[..., Any], accumulation: np.dtype[Any]) -> Custom:
    """Compile, or look up, ``f(*frozen, score, b, h, i, j) -> score`` for a type of scores."""
    return _custom(_score_tile, function, (from_dtype(accumulation), *_INDICES))


def mask_mod(function: Callable[..., Any]) -> Custom:
    """Compile, or look up, ``f(*frozen, b, h, i, j) -> bool``."""
    return _custom(_mask_tile, function, _INDICES)


def _custom(
    make: Callable[..., int], function: Callable[..., Any], arguments: tuple[types.Type, ...]
) -> Custom:
    called, frozen = split(function)
    called = getattr(called, "py_func", called)
    frozen_types, words, owners = _lay_out(frozen)
    signature = (*frozen_types, *arguments)
    name, kept = _name(called, signature)
    if name not in _addresses:
        try:
            _addresses[name] = make(_jitted(called), frozen_types, arguments, name, kept)
        except errors.NumbaError:
            # By itself it fails with the caller's own line, or it returns what has no use.
            alone = _jitted(called)
            alone.compile(signature)
            returned = alone.nopython_signatures[0].return_type
            raise errors.TypingError(f"it returns {returned}") from None
    return Custom(_addresses[name], words, owners)


def split(function: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return what is called in the end, and the arguments that functools.partial puts first."""
    return (function.func, function.args) if isinstance(function, partial) else (function, ())


# ---------------------------------------------------------------------------
# The loops
# ---------------------------------------------------------------------------


def _score_tile(f: Any, frozen_types: Any, arguments: Any, name: str, kept: bool) -> int:
    zero = np.dtype(str(arguments[0])).type(0)

    @glue
    def one(score, head, row, batch, key, frozen):
        return _as(score, f(*frozen, score, batch, head, row, key))

    @kernel(name, kept=kept)
    def score_tile(address):
        """``S^T[n, x] = f(S^T[n, x], batch, heads[x], rows[x], key + n)``."""
        tile = tile_at(address)
        s = pointer(tile.scores, zero)
        heads, rows = pointer(tile.heads, _INTEGER), pointer(tile.rows, _INTEGER)
        frozen = value_at(tile.frozen, frozen_types)
        queries, keys, batch, key = tile.queries, tile.keys, tile.batch, tile.key
        register = splat(zero, 1)
        for x in range(0, queries, lanes(register)):
            for n in range(keys):
                at = on(s, n * queries + x)
                places = (at, on(heads, x), on(rows, x))
                map_lanes(register, one, at, places, (batch, key + n, frozen))

    return score_tile


def _mask_tile(f: Any, frozen_types: Any, arguments: Any, name: str, kept: bool) -> int:
    @glue
    def one(visible, head, row, batch, key, n, frozen):
        hidden = not _as(False, f(*frozen, batch, head, row, key + n))
        return visible & ~(np.int64(hidden) << n)

    @kernel(name, kept=kept)
    def mask_tile(address):
        """Bit n of ``visible[x]`` is cleared unless ``f(batch, heads[x], rows[x], key + n)``."""
        tile = tile_at(address)
        visible = pointer(tile.visible, _INTEGER)
        heads, rows = pointer(tile.heads, _INTEGER), pointer(tile.rows, _INTEGER)
        frozen = value_at(tile.frozen, frozen_types)
        queries, keys, batch, key = tile.queries, tile.keys, tile.batch, tile.key
        # Tiles of any type are whole registers of these.
        register = splat(0.0, 1)
        for x in range(0, queries, lanes(register)):
            places = (on(visible, x), on(heads, x), on(rows, x))
            for n in range(keys):
                map_lanes(register, one, on(visible, x), places, (batch, key, n, frozen))

    return mask_tile


def _as(like, result):
    """What a caller's function returns, as the type of a score or as a bool; when compiled."""


@overload(_as)
def _as_checked(like, result):
    if isinstance(like, types.Boolean):
        return (lambda like, result: result) if isinstance(result, types.Boolean) else None
    element = np.dtype(str(like)).type
    is_real = isinstance(result, types.Float | types.Integer | types.Boolean)
    return (lambda like, result: element(result)) if is_real else None


# ---------------------------------------------------------------------------
# The functions
# ---------------------------------------------------------------------------


def _name(function: python.FunctionType, signature: tuple[types.Type, ...]) -> tuple[str, bool]:
    """Return a name for code, and whether it lasts: whether that code can be kept."""
    digest = fingerprint(function)
    if digest is None:
        return f"unkept_{next(_unkept)}", False
    return hashlib.sha256(f"{digest} {signature}".encode()).hexdigest()[:32], True


def _jitted(function: python.FunctionType) -> Any:
    """Jit a copy of a caller's function, and of the plain functions that it calls, with our flags.

    The caller's own options do not count: what divides by zero is to give inf, as in NumPy, and not
    to raise, which a kernel could not pass on.
    """
    copies: dict[Any, Any] = {}

    def jit(value: Any) -> Any:
        if not isinstance(value, python.FunctionType):
            return value
        if value not in copies:
            copy = python.FunctionType(
                value.__code__,
                dict(value.__globals__),
                value.__name__,
                value.__defaults__,
                tuple(python.CellType() for _ in value.__closure__ or ()) or None,
            )
            copy.__qualname__ = f"{value.__qualname__}_{next(_copies)}"
            copies[value] = foreign(copy)
            for cell, held in zip(copy.__closure__ or (), value.__closure__ or (), strict=True):
                cell.cell_contents = jit(held.cell_contents)
            for name, held in globals_of(value).items():
                copy.__globals__[name] = jit(held)
        return copies[value]

    return jit(function)


# ---------------------------------------------------------------------------
# What functools.partial holds
# ---------------------------------------------------------------------------


def _lay_out(frozen: Any) -> tuple[types.Type, Any, tuple[Any, ...]]:
    """Return the type of a value, its words in memory, and the arrays that they point into."""
    if isinstance(frozen, tuple):
        parts = [_lay_out(each) for each in frozen]
        words = [words for _, words, _ in parts]
        return (
            types.BaseTuple.from_types([kind for kind, _, _ in parts]),
            np.concatenate(words) if words else np.empty(0, np.int64),
            tuple(owner for _, _, owners in parts for owner in owners),
        )
    if isinstance(frozen, bool | int | np.integer | np.bool_):
        return types.int64, np.array([frozen], np.int64), ()
    if isinstance(frozen, float | np.floating):
        return types.float64, np.array([frozen], np.float64).view(np.int64), ()
    if isinstance(frozen, np.ndarray):
        # Numba's array: owner and object, elements and bytes of one, address, shape, strides.
        words = [0, 0, frozen.size, frozen.itemsize, frozen.ctypes.data]
        return (
            typeof(frozen),
            np.array([*words, *frozen.shape, *frozen.strides], np.int64),
            (frozen,),
        )
    raise errors.TypingError(
        f"functools.partial must hold numbers, arrays or tuples: got {frozen!r}"
    )
