"""Masks that are functions: block masks, and mask_mods to build them from.

A mask_mod is a function ``f(b, h, i, j) -> bool`` of batch entry, query head, and row of query and
key; True = attend. Those made here are ``functools.partial`` objects: the numbers and arrays that
they hold are read at every call, so that another length or another set of documents needs no
compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial, reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn import runtime
from fastattn.arguments import check_int
from fastattn.formats import as_array
from fastattn.kernels.record import BLOCKS, HIDDEN, VISIBLE
from fastattn.keywords import check_mod, check_range, check_window
from fastattn.loading import loads
from fastattn.plan import is_long

Array = NDArray[Any]
MaskMod = Callable[..., bool]


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """A mask_mod, and what is known of it by blocks: made by `create_block_mask`.

    Attributes
    ----------
    states : ndarray of int8, (B, H, num_q_blocks, num_kv_blocks), read-only
        0 where a block is hidden, which is then skipped; 2 where it is visible, which then costs
        nothing more; 1 where `mask_mod` is asked of every score.
    block_size : (int, int)
        Queries and keys of one block.
    shape : (B, H, seqlen_q, seqlen_kv)
        That of the scores. A 1 for B or H serves every batch entry or head.
    mask_mod : function
        ``f(b, h, i, j) -> bool``

    Examples
    --------
    >>> from fastattn import create_block_mask, masks
    >>> print(create_block_mask(masks.window(8, 0), 1, 1, 40, 40, block_size=8))
    BlockMask(shape=(1, 1, 40, 40), block_size=(8, 8), sparsity=0.64)
    ░░
    ░░░░
      ░░░░
        ░░░░
          ░░░░
    """

    states: Array
    block_size: tuple[int, int]
    shape: tuple[int, int, int, int]
    mask_mod: MaskMod

    def __post_init__(self) -> None:
        check_mod("mask_mod", self.mask_mod)
        size, shape = _check_block_size(self.block_size), _check_shape(self.shape)
        expected = (*shape[:2], *(-(-n // rows) for n, rows in zip(shape[2:], size, strict=True)))
        given = as_array("states", self.states)
        if given.shape != expected:
            raise ValueError(f"states must have shape {expected}: got {given.shape}")
        if given.dtype.kind not in "iu":
            raise TypeError(f"states must be integers: got {given.dtype}")
        check_range("states", given, HIDDEN, VISIBLE)
        states = np.array(given, np.int8, order="C")
        states.flags.writeable = False
        for name, checked in (("states", states), ("block_size", size), ("shape", shape)):
            object.__setattr__(self, name, checked)

    @property
    def sparsity(self) -> float:
        """The share of blocks that are skipped."""
        return float(np.mean(self.states == HIDDEN)) if self.states.size else 0.0

    def __repr__(self) -> str:
        return (
            f"BlockMask(shape={self.shape}, block_size={self.block_size}, "
            f"sparsity={self.sparsity:.2f})"
        )

    def __str__(self) -> str:
        """Draw the blocks of the first batch entry and head: hidden, ░░ partial, ██ visible."""
        if self.states.size == 0:
            return repr(self)
        states = _pooled(_pooled(self.states[0, 0], 0), 1)
        rows = ("".join(_CELLS[state] for state in row).rstrip() for row in states)
        return "\n".join([repr(self), *rows])


_CELLS = ("  ", "░░", "██")
_MOST_CELLS = 32


def _pooled(states: Array, axis: int) -> Array:
    """Return no more cells along an axis than a picture has, partial where blocks differ."""
    starts = np.arange(0, states.shape[axis], -(-states.shape[axis] // _MOST_CELLS))
    lowest, highest = (f.reduceat(states, starts, axis) for f in (np.minimum, np.maximum))
    return np.where(lowest == highest, lowest, 1)


def create_block_mask(
    mask_mod: MaskMod,
    B: int,
    Hq: int,
    Lq: int,
    Lk: int,
    block_size: int | tuple[int, int] = 128,
) -> BlockMask:
    """Ask a mask_mod of every score, and return what is known of it by blocks.

    Attention with the result skips the blocks that are hidden and asks again only in those that are
    partial.

    Parameters
    ----------
    mask_mod : function
        ``f(b, h, i, j) -> bool``, jitted by Numba or to be jitted; see `attention`.
    B, Hq : int
        Batch entries and query heads; 1 where all are masked alike.
    Lq, Lk : int
        Rows of query and key.
    block_size : int or (int, int)
        Queries and keys of one block. Multiples of 64 are the fastest; any size is right.

    Returns
    -------
    BlockMask

    Raises
    ------
    TypeError
        If mask_mod is not callable, takes another number of arguments, does not compile or does not
        return a bool; if a size is not an int.
    ValueError
        If a size is negative, or one of a block less than 1.

    Notes
    -----
    Works on all threads, in the memory of a few tiles: no array has Lq x Lk elements.

    References
    ----------
    .. [1] Dong et al. 2024, "Flex Attention", section 3, arXiv:2412.05496

    Examples
    --------
    >>> from fastattn import create_block_mask, masks
    >>> mask = create_block_mask(masks.causal(), 1, 1, 512, 512)
    >>> print(mask)
    BlockMask(shape=(1, 1, 512, 512), block_size=(128, 128), sparsity=0.38)
    ░░
    ██░░
    ████░░
    ██████░░
    """
    custom = check_mod("mask_mod", mask_mod)
    sizes = (("B", B), ("Hq", Hq), ("Lq", Lq), ("Lk", Lk))
    batch, heads, seqlen_q, seqlen_kv = (check_int(name, size, 0) for name, size in sizes)
    block_q, block_kv = _check_block_size(block_size)
    states = np.empty((batch, heads, -(-seqlen_q // block_q), -(-seqlen_kv // block_kv)), np.int8)
    record = np.zeros(1, BLOCKS)
    fields = record[0]
    fields["batches"], fields["heads"] = batch, heads
    fields["seqlen_q"], fields["seqlen_kv"] = seqlen_q, seqlen_kv
    asked = fields["mask"]
    asked["states"] = states.ctypes.data
    asked["queries"], asked["keys"] = block_q, block_kv
    asked["mask_mod"] = (custom.address, custom.frozen.ctypes.data)
    if states.size:
        workers = runtime.usable_threads()
        # A function of the caller's takes about as long as a hundred multiply-adds.
        work = 100 * batch * heads * seqlen_q * seqlen_kv
        record_of_ints = record.view(np.int64)
        runtime.launch(_block_states(), record_of_ints, workers, is_long=is_long(work, workers))
    return BlockMask(states, (block_q, block_kv), (batch, heads, seqlen_q, seqlen_kv), mask_mod)


@cache
@loads
def _block_states() -> int:
    """Return the address of the kernel."""
    from fastattn.kernels.blocks import block_states

    states: int = block_states()
    return states


# ---------------------------------------------------------------------------
# mask_mods
# ---------------------------------------------------------------------------


def causal(offset: int = 0) -> MaskMod:
    """Return the mask_mod of queries that see the keys up to their own position i + offset.

    ``seqlen_kv - seqlen_q`` aligns as "bottom_right" does.

    Examples
    --------
    >>> from fastattn import masks
    >>> mask_mod = masks.causal(offset=3)
    >>> [mask_mod(0, 0, 1, j) for j in range(6)]
    [True, True, True, True, True, False]
    """
    return window(None, 0, offset)


def window(left: int | None, right: int | None, offset: int = 0) -> MaskMod:
    """Return the mask_mod of queries that see ``i + offset - left <= j <= i + offset + right``.

    None is unbounded.

    Examples
    --------
    >>> from fastattn import masks
    >>> mask_mod = masks.window(1, 0)
    >>> [mask_mod(0, 0, 2, j) for j in range(4)]
    [False, True, True, False]
    """
    return partial(_in_window, *check_window((left, right)), check_int("offset", offset))


def _in_window(left: int, right: int, offset: int, _b: int, _h: int, i: int, j: int) -> bool:
    return -right <= i + offset - j <= left


def document(segments: ArrayLike, kv_segments: ArrayLike | None = None) -> MaskMod:
    """Return the mask_mod of queries that see the keys of their own document.

    Parameters
    ----------
    segments : array_like of ints, (seqlen_q,) or (B, seqlen_q)
        The document that each query belongs to, of all batch entries or of each.
    kv_segments : array_like of ints, (seqlen_kv,) or (B, seqlen_kv), optional
        The same of the keys; those of the queries, if not given.

    Notes
    -----
    Rows and batch entries behind the end of the arrays belong to no document.

    Examples
    --------
    >>> from fastattn import masks
    >>> mask_mod = masks.document([0, 0, 1, 1, 1])
    >>> [bool(mask_mod(0, 0, 1, j)) for j in range(5)]
    [True, True, False, False, False]
    """
    ids = _per_row("segments", segments)
    kv_ids = ids if kv_segments is None else _per_row("kv_segments", kv_segments)
    return partial(_in_document, ids, kv_ids)


def _in_document(ids: Array, kv_ids: Array, b: int, _h: int, i: int, j: int) -> bool:
    bq, bk = (0 if len(ids) == 1 else b), (0 if len(kv_ids) == 1 else b)
    # An index from outside must not reach behind the arrays.
    if bq < ids.shape[0] and bk < kv_ids.shape[0] and i < ids.shape[1] and j < kv_ids.shape[1]:
        return bool(ids[bq, i] == kv_ids[bk, j])
    return False


def prefix_lm(prefix: ArrayLike, offset: int = 0) -> MaskMod:
    """Return the mask_mod of queries that see a prefix of the keys, and else are causal.

    Parameters
    ----------
    prefix : int or ints of shape (B,)
        How many keys every query sees.
    offset : int
        As in `causal`.

    Examples
    --------
    >>> from fastattn import masks
    >>> mask_mod = masks.prefix_lm(2)
    >>> [bool(mask_mod(0, 0, 0, j)) for j in range(4)]
    [True, True, False, False]
    """
    lengths = _per_row("prefix", np.atleast_1d(prefix))[0]
    return partial(_in_prefix, lengths, check_int("offset", offset))


def _in_prefix(lengths: Array, offset: int, b: int, _h: int, i: int, j: int) -> bool:
    entry = 0 if len(lengths) == 1 else b
    return j <= i + offset or (entry < len(lengths) and j < lengths[entry])


def and_masks(mask_mod: MaskMod, *others: MaskMod) -> MaskMod:
    """Return the mask_mod of what all of them let see.

    Examples
    --------
    >>> from fastattn import masks
    >>> mask_mod = masks.and_masks(masks.causal(), masks.document([0, 0, 1, 1]))
    >>> [mask_mod(0, 0, 2, j) for j in range(4)]
    [False, False, True, False]
    """
    return reduce(_both, others, mask_mod)


def _both(first: MaskMod, second: MaskMod) -> MaskMod:
    (f, f_held), (g, g_held) = _parts(first), _parts(second)

    def mask_mod(f_held: Any, g_held: Any, b: int, h: int, i: int, j: int) -> Any:
        return f(*f_held, b, h, i, j) and g(*g_held, b, h, i, j)

    return partial(mask_mod, f_held, g_held)


def or_masks(mask_mod: MaskMod, *others: MaskMod) -> MaskMod:
    """Return the mask_mod of what any of them lets see.

    Examples
    --------
    >>> from fastattn import masks
    >>> mask_mod = masks.or_masks(masks.window(1, 1), masks.prefix_lm(1))
    >>> [bool(mask_mod(0, 0, 3, j)) for j in range(6)]
    [True, True, True, True, True, False]
    """
    return reduce(_either, others, mask_mod)


def _either(first: MaskMod, second: MaskMod) -> MaskMod:
    (f, f_held), (g, g_held) = _parts(first), _parts(second)

    def mask_mod(f_held: Any, g_held: Any, b: int, h: int, i: int, j: int) -> Any:
        return f(*f_held, b, h, i, j) or g(*g_held, b, h, i, j)

    return partial(mask_mod, f_held, g_held)


def _parts(mask_mod: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return what a mask_mod calls, and the arguments that functools.partial holds for it."""
    return (mask_mod.func, mask_mod.args) if isinstance(mask_mod, partial) else (mask_mod, ())


# ---------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------


def _check_block_size(block_size: Any) -> tuple[int, int]:
    sizes = block_size if isinstance(block_size, tuple | list) else (block_size, block_size)
    if len(sizes) != 2:
        raise ValueError(f"block_size must be an int or a pair of ints: got {block_size!r}")
    block_q, block_kv = (check_int("block_size", size, 1) for size in sizes)
    return block_q, block_kv


def _check_shape(shape: Any) -> tuple[int, int, int, int]:
    if not isinstance(shape, tuple | list) or len(shape) != 4:
        raise ValueError(f"shape must be (B, H, seqlen_q, seqlen_kv): got {shape!r}")
    batch, heads, seqlen_q, seqlen_kv = (check_int("shape", n, 0) for n in shape)
    return batch, heads, seqlen_q, seqlen_kv


def _per_row(name: str, numbers: ArrayLike) -> Array:
    """Return ints of shape (length,) or (batch, length) as (batch or 1, length) int64."""
    x = as_array(name, numbers)
    if x.dtype.kind not in "iu":
        raise TypeError(f"{name} must be ints: got {x.dtype}")
    if x.ndim not in (1, 2):
        raise ValueError(f"{name} must have 1 or 2 dimensions: got shape {x.shape}")
    return np.atleast_2d(np.ascontiguousarray(x, np.int64))
