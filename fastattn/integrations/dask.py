"""Attention for dask arrays: contexts larger than memory, on the cores of one machine or many.

    import dask.array as da
    from fastattn.integrations.dask import attention

    output = attention(query, key, value, causal=True)      # a dask array: nothing is computed yet
    output.compute()

Every chunk of queries meets every chunk of keys in a task of its own, and what the tasks leave is
merged by log-sum-exp in a tree. The arrays are never brought into one piece:

    chunk of keys        0      1      2      3      4      5
                         |      |      |      |      |      |
    chunk of queries    part   part   part   part   part   part     attention, with its lse
                         +------+--+---+------+      +--+---+
                                 merge                merge         merge_states
                                   +--------+-----------+
                                          output

A task holds one chunk of queries, of keys and of values. A chunk of keys that `causal`, `window` or
`kv_lengths` hides from a chunk of queries makes no task, and is not loaded for it.

*Progress.* ``with dask.diagnostics.ProgressBar(): output.compute()`` shows a bar for the schedulers
of one machine. On a cluster: ``output = output.persist(); distributed.progress(output)``.

*Threads.* The scheduler gives the cores to tasks, so a task uses one thread, and there should be as
many chunks as cores, or more. Where workers have more cores than they run tasks at a time,
``client.run(fastattn.set_num_threads, n)`` lets every task use n, at most the ``NUMBA_NUM_THREADS``
of the worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

import fastattn
from fastattn import runtime
from fastattn.attention import Causal, Layout, Precision, Window
from fastattn.formats import Shape, as_array, common_format
from fastattn.integrations import needs
from fastattn.keywords import check_bounds, check_position, per_batch
from fastattn.problem import check
from fastattn.reference import accumulation_dtype
from fastattn.shapes import Frame, as_heads

with needs("dask"):
    import dask.array as da
    from dask.base import tokenize
    from dask.highlevelgraph import HighLevelGraph
    from dask.task_spec import Task, TaskRef

__all__ = ["attention"]

Array = NDArray[Any]
Slices = Sequence[slice]

# A state is (output in the accumulation type, lse): attention over some of the keys.
State = tuple[Array, Array]

# How many one task merges, as in dask's own reductions: few, so that merging begins early and
# little lies ready for it.
_MERGED_AT_ONCE = 4

_REFUSED = {
    "score_mod": "it would be compiled anew for every chunk: give a bias",
    "mask_mod": "it would be compiled anew for every chunk: give a mask",
    "block_mask": "its blocks do not follow the chunks: give a mask",
    "out": "nothing is computed yet: store the result with dask.array.store",
}


@overload
def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any = ...,
    bias: Any = ...,
    causal: Causal = ...,
    window: Window | None = ...,
    query_offset: ArrayLike | None = ...,
    kv_lengths: ArrayLike | None = ...,
    softcap: float | None = ...,
    alibi_slopes: ArrayLike | None = ...,
    sinks: ArrayLike | None = ...,
    scale: float | None = ...,
    layout: Layout = ...,
    precision: Precision = ...,
    return_lse: Literal[False] = ...,
    **refused: Any,
) -> da.Array: ...


@overload
def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any = ...,
    bias: Any = ...,
    causal: Causal = ...,
    window: Window | None = ...,
    query_offset: ArrayLike | None = ...,
    kv_lengths: ArrayLike | None = ...,
    softcap: float | None = ...,
    alibi_slopes: ArrayLike | None = ...,
    sinks: ArrayLike | None = ...,
    scale: float | None = ...,
    layout: Layout = ...,
    precision: Precision = ...,
    return_lse: Literal[True],
    **refused: Any,
) -> tuple[da.Array, da.Array]: ...


def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    causal: Causal = False,
    window: Window | None = None,
    query_offset: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    scale: float | None = None,
    layout: Layout = "bhld",
    precision: Precision = "highest",
    return_lse: bool = False,
    **refused: Any,
) -> da.Array | tuple[da.Array, da.Array]:
    """Return `fastattn.attention` of dask arrays, as dask arrays.

    Parameters
    ----------
    query : dask array, (..., num_heads, seqlen_q, head_dim)
    key : dask array, (..., num_kv_heads, seqlen_kv, head_dim)
    value : dask array, (..., num_kv_heads, seqlen_kv, head_dim_v)
        Chunked along any axis but the last, each in its own way. What is not a dask array is taken
        as NumPy's, and cut as the others are.
    mask, bias : dask array or array_like, optional
        Broadcastable to (..., num_heads, seqlen_q, seqlen_kv), in any chunks.
    causal, window, query_offset, kv_lengths, softcap, alibi_slopes, sinks, scale
        As in `fastattn.attention`. Positions are those in the whole arrays. Numbers for each batch
        entry or head must be known at once: a dask array is computed here.
    layout, precision, return_lse
        As in `fastattn.attention`.

    Returns
    -------
    output : dask array, (..., num_heads, seqlen_q, head_dim_v)
        In the dtype that `fastattn.attention` has for the same arrays. Chunked as `query` is, and
        cut further along heads and batch axes where `key` or `value` are.
    lse : dask array, (..., num_heads, seqlen_q), only with `return_lse`

    Raises
    ------
    TypeError
        As `fastattn.attention`; also for `score_mod`, `mask_mod`, `block_mask` and `out`.
    ValueError
        As `fastattn.attention`; also for arrays whose features lie in several chunks, or whose
        chunks have unknown sizes. Everything is checked before anything is computed.

    Notes
    -----
    *Chunks.* A task takes in one chunk of queries, keys and values, and its work is that of their
    lengths multiplied: chunks of some thousand rows make tasks of milliseconds to seconds, which is
    what schedulers like. Long chunks of queries save reading keys again, once for each of them.

    *Heads.* Chunks of query heads and of kv heads need not match. Either are cut where the other
    begin a chunk, so that each task has query heads of one group, or whole groups.

    *Precision.* Parts are as exact as `fastattn.attention`, which rounds outputs of 16 bits once;
    they are merged in 32 bits and rounded once more. Bits depend on the chunks of keys, never on
    the scheduler.

    *Memory.* A chunk of keys is dropped when the last chunk of queries that sees it has used it:
    with one chunk of queries at once, with several when dask comes to it. Where the keys of a whole
    context do not fit, a cluster spills them to disk; ``output.blocks[:, :, i].compute()``, one
    chunk of queries at a time, reads them again instead. States, which are an output and an lse for
    a chunk of queries, wait by fours to be merged.

    *First call.* Each worker compiles, or loads what is on disk: ``client.run(fastattn.warmup)``.

    References
    ----------
    .. [1] Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", section 3.1,
       arXiv:1805.02867
    .. [2] Rocklin 2015, "Dask: Parallel Computation with Blocked algorithms and Task Scheduling",
       doi:10.25080/Majora-7b98e3ed-013

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> import fastattn
    >>> from fastattn.integrations.dask import attention
    >>> rng = da.random.default_rng(0)
    >>> query = rng.standard_normal((1, 8, 90, 16), chunks=(1, 8, 40, 16))
    >>> key, value = rng.standard_normal((2, 1, 2, 300, 16), chunks=(1, 1, 2, 100, 16))
    >>> output = attention(query, key, value, causal=True)
    >>> output.chunks
    ((1,), (8,), (40, 40, 10), (16,))
    >>> expected = fastattn.attention(*(x.compute() for x in (query, key, value)), causal=True)
    >>> bool(np.allclose(output.compute(scheduler="sync"), expected))
    True
    """
    _refuse(refused)
    given = {"query": query, "key": key, "value": value, "mask": mask, "bias": bias}
    arrays = {name: _array(name, x) for name, x in given.items() if x is not None}
    keywords = {
        "causal": causal,
        "window": window,
        "query_offset": _now(query_offset),
        "kv_lengths": _now(kv_lengths),
        "softcap": softcap,
        "alibi_slopes": _now(alibi_slopes),
        "sinks": _now(sinks),
        "scale": scale,
        "precision": precision,
    }
    dtype, frame = _check(arrays, keywords, layout)

    is_one_head = all(arrays[name].ndim == 2 for name in _INPUTS)
    arrays |= {name: as_heads(name, arrays[name], layout) for name in _INPUTS}
    output, lse = _merged(arrays, keywords, frame, dtype)
    if is_one_head:
        output, lse = output[0], lse[0]
    if layout == "blhd":
        output = output.swapaxes(-3, -2)
    return (output, lse) if return_lse else output


# ---------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------

_INPUTS = ("query", "key", "value")


def _refuse(keywords: dict[str, Any]) -> None:
    """Say why a keyword of `fastattn.attention` has no meaning here, where it is given."""
    for name, x in keywords.items():
        if name not in _REFUSED:
            raise TypeError(f"attention() got an unexpected keyword argument {name!r}")
        if x is not None:
            raise TypeError(f"{name} cannot be used with dask arrays, {_REFUSED[name]}")


def _array(name: str, x: Any) -> Any:
    """Return a dask array whose chunks can be used, or a NumPy array."""
    if not isinstance(x, da.Array):
        return as_array(name, x)
    if np.isnan(x.shape).any():
        raise ValueError(
            f"{name} must have chunks of known sizes, see its compute_chunk_sizes(): got {x.chunks}"
        )
    if name in _INPUTS and x.ndim > 0 and x.numblocks[-1] > 1:
        raise ValueError(
            f"{name} must have its features in one chunk, see its rechunk({{-1: -1}}): "
            f"got chunks of {x.chunks[-1]}"
        )
    return x


def _now(numbers: Any) -> Any:
    """Return numbers on which it depends which tasks there are, or what they are given."""
    return numbers.compute() if isinstance(numbers, da.Array) else numbers


def _check(
    arrays: dict[str, Any], keywords: dict[str, Any], layout: str
) -> tuple[np.dtype[Any], Frame]:
    """Check the call as `fastattn.attention` does; return the dtype of its result, and its frame.

    What is checked are arrays of the same shapes and dtypes that have no memory: an element that
    strides of 0 repeat, native floats so that nothing is converted, and values of no features, for
    which there is no result to allocate.
    """
    dtype, _ = common_format(_INPUTS, [np.empty(0, arrays[name].dtype) for name in _INPUTS])
    stand_ins: dict[str, Any] = {}
    for name, x in arrays.items():
        kind = dtype if name in _INPUTS else x.dtype.newbyteorder("=")
        if name == "bias" and kind.kind in "iu":
            kind = np.dtype(np.float64)
        shape = (*x.shape[:-1], 0) if name == "value" and x.ndim > 1 else x.shape
        stand_ins[name] = np.broadcast_to(np.empty((), kind), shape)
    return dtype, check(**stand_ins, **keywords, layout=layout).frame


# ---------------------------------------------------------------------------
# Pieces: how the axes are cut
# ---------------------------------------------------------------------------


def _cuts(length: int, axis: int, *arrays: Any) -> Array:
    """Return where any of the arrays begins or ends a chunk along an axis of some length.

    The axis counts from the last. Arrays that broadcast along it have nothing to say.
    """
    ends = [
        np.cumsum(x.chunks[axis])
        for x in arrays
        if isinstance(x, da.Array) and x.ndim >= -axis and x.shape[axis] == length
    ]
    return np.unique(np.concatenate([[0, length], *ends]))


def _heads(frame: Frame, query: Any, key: Any, value: Any) -> tuple[Slices, Slices, list[int]]:
    """Return the pieces of query heads and of kv heads, and which of those each of the first reads.

    Both are cut so that a piece of query heads lies within one group, or is whole groups. With
    groups of 4, chunks of 6 query heads and of 2 kv heads::

        query heads    0 1 2 3 . 4 5 | 6 7 . 8 9 10 11      one more cut at each side of a group
        kv heads          0    .     1     |     2          that a chunk of query heads divides
    """
    group_size = frame.num_heads // frame.num_kv_heads
    own = _cuts(frame.num_heads, -3, query)
    starts, ends = own // group_size * group_size, -(-own // group_size) * group_size
    theirs = _cuts(frame.num_kv_heads, -3, key, value) * group_size
    cuts = np.unique(np.concatenate([own, starts, ends, theirs]))
    kv_cuts = np.unique(cuts // group_size)
    reads = np.searchsorted(kv_cuts, cuts[:-1] // group_size, side="right") - 1
    return _slices(cuts), _slices(kv_cuts), reads.tolist()


def _slices(cuts: Array) -> Slices:
    """Return the pieces between cuts; no keys are one empty piece."""
    return [slice(start, stop) for start, stop in pairwise(cuts.tolist())] or [slice(0, 0)]


def _sizes(pieces: Slices) -> tuple[int, ...]:
    return tuple(piece.stop - piece.start for piece in pieces)


class _Operand:
    """An array in pieces, to be asked for the one that a task needs."""

    def __init__(self, x: Any, pieces: Sequence[Slices]) -> None:
        x = x[(None,) * (len(pieces) - x.ndim)]
        sizes = tuple(
            (1,) if n == 1 else _sizes(axis) for n, axis in zip(x.shape, pieces, strict=True)
        )
        if isinstance(x, da.Array):
            # As tasks: a shuffle between all workers, which dask may prefer, is for transposing.
            self.array = x.rechunk(sizes, method="tasks")
        else:
            self.array = da.from_array(x, chunks=sizes)

    def __getitem__(self, index: Sequence[int]) -> TaskRef:
        """Return the piece with this index: along an axis that broadcasts there is only one."""
        numblocks = self.array.numblocks
        where = (i if n > 1 else 0 for i, n in zip(index, numblocks, strict=True))
        return TaskRef((self.array.name, *where))


# ---------------------------------------------------------------------------
# Keywords: what they are for one piece
# ---------------------------------------------------------------------------


class _Keywords:
    """The keywords of a call that are no arrays of its chunks."""

    def __init__(self, keywords: dict[str, Any], frame: Frame) -> None:
        causal, window, slopes = (keywords[name] for name in ("causal", "window", "alibi_slopes"))
        self.same = {name: keywords[name] for name in ("window", "softcap", "scale", "precision")}
        self.same["causal"] = bool(causal)
        self.left, self.right = check_bounds(causal, window)

        shape = frame.batch_shape
        self.has_lengths = keywords["kv_lengths"] is not None
        lengths = keywords["kv_lengths"] if self.has_lengths else frame.seqlen_kv
        lengths = per_batch("kv_lengths", lengths, shape)
        self.has_positions = bool(causal) or window is not None or slopes is not None
        offset = check_position(
            causal,
            keywords["query_offset"],
            lengths,
            frame.seqlen_q,
            shape,
            stands=self.has_positions,
        )
        self.lengths, self.offset = (
            np.broadcast_to(x if isinstance(x, int) else x.reshape(shape), shape)
            for x in (lengths, offset)
        )
        self.slopes = None if slopes is None else np.broadcast_to(slopes, (*shape, frame.num_heads))
        self.sinks = None if keywords["sinks"] is None else np.asarray(keywords["sinks"])

    def seen(self, entries: Slices, rows: slice, keys: Slices) -> list[int]:
        """Return the pieces of keys that any of the rows sees in any of the batch entries."""
        offset, lengths = (x[*entries].reshape(-1) for x in (self.offset, self.lengths))
        first = np.maximum(offset + rows.start - self.left, 0)
        behind = np.minimum(offset + rows.stop + self.right, lengths)
        return [
            n
            for n, piece in enumerate(keys)
            if (np.maximum(first, piece.start) < np.minimum(behind, piece.stop)).any()
        ]

    def of(self, entries: Slices, heads: slice, rows: slice, keys: slice) -> dict[str, Any]:
        """Return what `fastattn.attention` is given for one piece, but the sinks.

        Rows and keys are counted from the start of theirs.
        """
        keywords = dict(self.same)
        if self.has_positions:
            keywords["query_offset"] = self.offset[*entries] + rows.start - keys.start
        if self.has_lengths:
            lengths = self.lengths[*entries] - keys.start
            keywords["kv_lengths"] = np.clip(lengths, 0, keys.stop - keys.start)
        if self.slopes is not None:
            keywords["alibi_slopes"] = self.slopes[*entries, heads]
        return keywords

    def sinks_of(self, heads: slice) -> Array | None:
        """Return the sinks of some heads: one state of those that are merged has them."""
        return None if self.sinks is None else self.sinks[heads]


# ---------------------------------------------------------------------------
# The graph, and what its tasks do
# ---------------------------------------------------------------------------


def _merged(
    arrays: dict[str, Any], keywords: dict[str, Any], frame: Frame, dtype: np.dtype[Any]
) -> tuple[da.Array, da.Array]:
    """Return the output (batch..., num_heads, seqlen_q, head_dim_v) and its lse."""
    shape, head_dim_v = frame.scores[:-1], arrays["value"].shape[-1]
    accumulation = accumulation_dtype(dtype)
    if 0 in shape:
        output = da.zeros((*shape, head_dim_v), dtype=dtype)
        return output, da.zeros(shape, dtype=accumulation)
    states = _states(arrays, keywords, frame, accumulation)
    output = states.map_blocks(
        _output_of,
        dtype,
        name=states.name.replace("states", "output"),
        new_axis=states.ndim,
        chunks=(*states.chunks, (head_dim_v,)),
        meta=np.empty((0,) * (states.ndim + 1), dtype),
    )
    lse = states.map_blocks(
        _lse_of,
        name=states.name.replace("states", "lse"),
        meta=np.empty((0,) * states.ndim, accumulation),
    )
    return output, lse


def _states(
    arrays: dict[str, Any], keywords: dict[str, Any], frame: Frame, accumulation: np.dtype[Any]
) -> da.Array:
    """Return an array (batch..., num_heads, seqlen_q) whose blocks are states over all keys."""
    query, key, value = (arrays[name] for name in _INPUTS)
    batch = [
        _slices(_cuts(n, axis - len(frame.scores), query, key, value))
        for axis, n in enumerate(frame.batch_shape)
    ]
    heads, kv_heads, kv_head_of = _heads(frame, query, key, value)
    rows = _slices(_cuts(frame.seqlen_q, -2, query))
    keys = _slices(_cuts(frame.seqlen_kv, -2, key, value))
    features, features_v = ([slice(0, x.shape[-1])] for x in (query, value))

    q = _Operand(query, [*batch, heads, rows, features])
    k = _Operand(key, [*batch, kv_heads, keys, features])
    v = _Operand(value, [*batch, kv_heads, keys, features_v])
    terms = {
        name: _Operand(arrays[name], [*batch, heads, rows, keys])
        for name in ("mask", "bias")
        if name in arrays
    }
    local = _Keywords(keywords, frame)
    token = tokenize(arrays, keywords)

    graph: dict[Any, Task] = {}
    axes = [*batch, heads, rows]
    for at in product(*(range(len(axis)) for axis in axes)):
        *entries, some_heads, some_rows = (axis[n] for axis, n in zip(axes, at, strict=True))
        kv_at = (*at[:-2], kv_head_of[at[-2]])
        sinks = local.sinks_of(some_heads)
        parts = [
            Task(
                (f"fastattn-part-{token}", *at, j),
                _part,
                q[*at, 0],
                k[*kv_at, j, 0],
                v[*kv_at, j, 0],
                sinks=sinks if n == 0 else None,  # counted once
                **{name: operand[*at, j] for name, operand in terms.items()},
                **local.of(entries, some_heads, some_rows, keys[j]),
            )
            for n, j in enumerate(local.seen(entries, some_rows, keys))
        ]
        if not parts:
            shape = _sizes([*entries, some_heads, some_rows])
            part = (f"fastattn-part-{token}", *at, 0)
            parts = [Task(part, _nothing, shape, value.shape[-1], accumulation, sinks)]
        graph |= {task.key: task for task in [*parts, *_tree(parts, token, at)]}

    name = f"fastattn-states-{token}"
    return da.Array(
        HighLevelGraph.from_collections(
            name, graph, dependencies=[x.array for x in (q, k, v, *terms.values())]
        ),
        name,
        chunks=tuple(_sizes(axis) for axis in axes),
        meta=np.empty((0,) * len(axes), object),
    )


def _tree(parts: list[Task], token: str, at: tuple[int, ...]) -> list[Task]:
    """Return the tasks that merge parts, the last of which is a block of `_states`."""
    tasks = []
    level = 0
    while len(parts) > _MERGED_AT_ONCE:
        parts = [
            Task(
                (f"fastattn-merge-{token}", *at, level, start),
                _merge,
                *(part.ref() for part in parts[start : start + _MERGED_AT_ONCE]),
            )
            for start in range(0, len(parts), _MERGED_AT_ONCE)
        ]
        tasks += parts
        level += 1
    last = Task((f"fastattn-states-{token}", *at), _merge, *(part.ref() for part in parts))
    return [*tasks, last]


def _part(query: Array, key: Array, value: Array, **keywords: Any) -> State:
    """Attend to one piece of the keys."""
    with runtime.among_others():
        output, lse = fastattn.attention(query, key, value, return_lse=True, **keywords)
    return output.astype(lse.dtype, copy=False), lse


def _nothing(shape: Shape, head_dim_v: int, dtype: np.dtype[Any], sinks: Array | None) -> State:
    """Return the state of rows that see no key."""
    lse = np.full(shape, -np.inf, dtype)
    if sinks is not None:
        lse[:] = sinks[:, None]
    return np.zeros((*shape, head_dim_v), dtype), lse


def _merge(*states: State) -> State:
    """Merge states over disjoint pieces of the keys."""
    return states[0] if len(states) == 1 else fastattn.merge_states(*zip(*states, strict=True))


def _output_of(state: State, dtype: np.dtype[Any]) -> Array:
    return state[0].astype(dtype, copy=False)


def _lse_of(state: State) -> Array:
    return state[1]
