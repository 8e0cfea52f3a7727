"""Keys and values that are kept from token to token, one buffer for each sequence of a batch.

New tokens are written beside the old ones, and the kernels read the memory as it is.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastattn.arguments import check_int
from fastattn.kernels.record import field
from fastattn.keywords import UNBOUNDED
from fastattn.problem import Problem
from fastattn.run import run
from fastattn.storage import (
    REPEATABLE,
    Array,
    Storage,
    again,
    check_attend,
    check_integers,
    check_rows,
    check_storage_dtype,
    remember,
    without_arrays,
)

_LENGTHS, _POSITIONS, _LEFT, _SEQLEN_KV = (
    field(name) for name in ("lengths", "positions", "left", "seqlen_kv")
)

# What `save` writes.
_FORMAT = "fastattn.KVCache 1"
_ARRAYS = ("key", "value", "key_scale", "value_scale")
_BITS: dict[int, Any] = {
    1: np.dtype(np.int8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.float32),
    8: np.dtype("f8"),
}


class _Known(NamedTuple):
    """A checked call of `attend`, with what is written anew whenever it is made again."""

    problem: Problem  # its record, too
    positions: Array | None  # of query 0 of each sequence, where that matters


class KVCache:
    """Keys and values of a batch of sequences, one buffer for each.

    Parameters
    ----------
    batch, num_kv_heads, head_dim : int
    capacity : int
        Tokens that each sequence has room for.
    head_dim_v : int, optional
        Features of a value; None is `head_dim`.
    dtype : dtype
        What keys and values are kept in: float32, float64, float16, ``ml_dtypes.bfloat16``, or
        int8 with one float32 scale for each token and head: a quarter of float32's memory, and
        of the time that reading it takes.
    grow : bool
        Double the capacity when it is used up, instead of raising.
    window : int, optional
        Queries see the last `window` tokens, themselves included, and older ones are dropped
        when room is needed. A capacity of twice the window or more makes that rare.

    Raises
    ------
    TypeError, ValueError
        For sizes that are no int or below 1, a dtype that nothing is kept in, a window above the
        capacity.

    Notes
    -----
    `append` writes the new tokens and touches nothing else. A call that raises leaves the cache as
    it was.

    *Threads.* Any number may call `attend` at once, and read `lengths` and `positions`. While one
    calls what writes (`append`, `truncate`, `reorder`), no other may use the cache: hold a lock.

    *int8* keeps ``round(127 x / max(abs(x)))`` for each row, with the maximum over the features of
    one token and head. On normal data outputs differ from those of a float32 cache by less than 1%
    of their range. A feature that is far larger than the others of its row takes their precision.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> cache = fastattn.KVCache(batch=1, num_kv_heads=2, head_dim=16, capacity=32)
    >>> key, value = rng.standard_normal((2, 1, 2, 7, 16), dtype=np.float32)
    >>> cache.append(key, value)
    >>> query = rng.standard_normal((1, 8, 1, 16), dtype=np.float32)
    >>> output = cache.attend(query)
    >>> output.shape
    (1, 8, 1, 16)
    >>> bool(np.array_equal(output, fastattn.attention(query, key, value)))
    True
    >>> cache.lengths
    array([7])
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        head_dim_v: int | None = None,
        dtype: DTypeLike = np.float32,
        grow: bool = False,
        window: int | None = None,
    ) -> None:
        batch = check_int("batch", batch, 1)
        num_kv_heads = check_int("num_kv_heads", num_kv_heads, 1)
        head_dim = check_int("head_dim", head_dim, 1)
        capacity = check_int("capacity", capacity, 1)
        head_dim_v = head_dim if head_dim_v is None else check_int("head_dim_v", head_dim_v, 1)
        self.window = None if window is None else check_int("window", window, 1)
        if self.window is not None and self.window > capacity:
            raise ValueError(f"window must not exceed the capacity {capacity}: got {window}")
        self.grow = bool(grow)
        self._storage = Storage(
            (batch, num_kv_heads, capacity), head_dim, head_dim_v, check_storage_dtype(dtype)
        )
        # Written in place: records hold the address.
        self._lengths = np.zeros(batch, np.int64)
        self._lengths_address = self._lengths.ctypes.data
        self._longest = 0
        self._is_even = True  # whether all have the same length
        self._dropped = np.zeros(batch, np.int64)  # tokens before those that are kept
        self._known: dict[Any, _Known] = {}

    @property
    def dtype(self) -> Any:
        """What keys and values are kept in."""
        return self._storage.dtype

    @property
    def capacity(self) -> int:
        """Tokens that each sequence has room for."""
        return int(self._storage.key.shape[2])

    @property
    def lengths(self) -> Array:
        """Tokens that each sequence keeps, (batch,): the keys of `attend`."""
        return self._lengths.copy()

    @property
    def positions(self) -> Array:
        """Where the next token of each sequence stands, (batch,): behind what was dropped, too."""
        return self._lengths + self._dropped

    @property
    def nbytes(self) -> int:
        """Bytes of memory for keys, values and scales, free room included."""
        return self._storage.nbytes

    def append(self, key: ArrayLike, value: ArrayLike, lengths: ArrayLike | None = None) -> None:
        """Write new tokens behind those of every sequence.

        Parameters
        ----------
        key : array_like, (batch, num_kv_heads, tokens, head_dim)
        value : array_like, (batch, num_kv_heads, tokens, head_dim_v)
            Floats, rounded to the dtype of the cache.
        lengths : int or integers of shape (batch,), optional
            How many of the tokens count, for each sequence; the others are padding at the end.

        Raises
        ------
        TypeError
            If key or value are no floats.
        ValueError
            For shapes that do not fit, lengths beyond the tokens, more tokens than there is room
            for, or NaN or infinity for int8.
        """
        storage = self._storage
        batch, heads, _, head_dim = storage.key.shape
        axes = "(batch, num_kv_heads, tokens, features)"
        k = check_rows("key", key, (batch, heads, None, head_dim), axes)
        tokens = k.shape[2]
        v = check_rows("value", value, (batch, heads, tokens, storage.value.shape[-1]), axes)
        counts: int | Array = tokens
        if lengths is not None:
            counts = check_integers("lengths", lengths, (batch,), 0, tokens)
            if storage.is_quantised:
                # Padding may hold anything, and has a scale like any row.
                counted = np.arange(tokens) < counts[:, None]
                k, v = (np.where(counted[:, None, :, None], x, 0) for x in (k, v))
        new_key, new_value = storage.convert("key", k), storage.convert("value", v)
        self._make_room(counts)
        storage = self._storage
        if isinstance(counts, int) and self._is_even:
            end = self._longest + counts
            storage.put((slice(None), slice(None), slice(self._longest, end)), new_key, new_value)
            self._lengths += counts
            self._longest = end
            return
        begins, counts = self._lengths.tolist(), np.broadcast_to(counts, (batch,))
        for b, (begin, n) in enumerate(zip(begins, counts.tolist(), strict=True)):
            parts = [
                (x[b, :, :n], None if scale is None else scale[b, :, :n])
                for x, scale in (new_key, new_value)
            ]
            storage.put((b, slice(None), slice(begin, begin + n)), *parts)
        self._set_lengths(self._lengths + counts)

    def _set_lengths(self, lengths: Array) -> None:
        self._lengths[:] = lengths
        self._longest = int(lengths.max())
        self._is_even = bool(lengths.min() == self._longest)

    def _make_room(self, counts: int | Array) -> None:
        """Drop what no query will see, or grow, until so many tokens fit behind each sequence."""
        if isinstance(counts, int) and self._longest + counts <= self.capacity:
            return
        needed = self._lengths + counts
        if needed.max() <= self.capacity:
            return
        kept = self._lengths
        if self.window is not None:
            # The first new token sees itself and window - 1 before it.
            kept = np.where(needed > self.capacity, np.minimum(kept, self.window - 1), kept)
        most = int((kept + counts).max())
        if most > self.capacity:
            if not self.grow:
                raise ValueError(
                    f"key must fit into the capacity of {self.capacity}: "
                    f"got {np.max(counts)} tokens behind lengths {self._lengths}"
                )
            self._storage = self._storage.resized(max(2 * self.capacity, most))
            self._known.clear()
        for b in np.flatnonzero(kept < self._lengths).tolist():
            end, n = int(self._lengths[b]), int(kept[b])
            heads = slice(None)
            self._storage.move((b, heads, slice(0, n)), (b, heads, slice(end - n, end)))
        self._dropped += self._lengths - kept
        self._set_lengths(kept)

    def truncate(self, lengths: ArrayLike) -> None:
        """Forget the tokens from `lengths` on.

        What a cache with a window has dropped before does not come back.

        Parameters
        ----------
        lengths : int or (batch,) ints

        Raises
        ------
        TypeError, ValueError
            For lengths that are not integers, below 0 or above those of the cache.
        """
        self._set_lengths(check_integers("lengths", lengths, self._lengths.shape, 0, self._lengths))

    def reorder(self, indices: ArrayLike) -> None:
        """Let every sequence b become a copy of sequence ``indices[b]``, as in a beam search.

        Parameters
        ----------
        indices : (batch,) ints

        Raises
        ------
        TypeError, ValueError
            For indices that are not integers, or name no sequence.
        """
        batch = len(self._lengths)
        sources = check_integers("indices", indices, (batch,), 0, batch - 1)
        changed = np.flatnonzero(sources != np.arange(batch))
        taken = sources[changed]
        rows = slice(0, int(self._lengths[taken].max(initial=0)))
        self._storage.move((changed, slice(None), rows), (taken, slice(None), rows))
        self._set_lengths(self._lengths[sources])
        self._dropped = self._dropped[sources]

    def attend(self, query: ArrayLike, **keywords: Any) -> Any:
        """Return attention of queries to all tokens that are kept.

        Parameters
        ----------
        query : array_like, (batch, num_heads, seqlen_q, head_dim)
        **keywords
            Those of `attention` but `kv_lengths`, which the cache knows. seqlen_kv is the largest
            of `lengths`, and keys are counted from the first that is kept. With ``causal=True`` the
            last query sees every token: append first, then attend.

        Returns
        -------
        output or (output, lse)
            As `attention` would, in the result type of query and cache; of the query for int8.

        Raises
        ------
        TypeError, ValueError
            As `attention`; ValueError also for queries that are not the last tokens (`query_offset`
            or ``causal="top_left"``) of a cache with a window.

        Notes
        -----
        With a `window` of the cache a query sees at most so many tokens, itself included, and none
        behind it; a `window` given here can only narrow that.
        """
        keywords = {name: x for name, x in keywords.items() if x is not None}
        if self.window is not None:
            _check_last(keywords)
            keywords["causal"] = keywords.get("causal") or True
        problem = self._repeated(query, keywords)
        if problem is None:
            shape = (*self._storage.key.shape[:2], self._longest)
            problem = check_attend(query, shape, self._storage, self._lengths, keywords)
            self._limit(problem.record)
        run(problem)
        if problem.result_lse is not None:
            return problem.result, problem.result_lse
        return problem.result

    def _limit(self, record: Array) -> None:
        """Let no query see further back than the window."""
        if self.window is not None:
            record[_LEFT] = min(int(record[_LEFT]), self.window - 1)

    def _repeated(self, query: Any, keywords: dict[str, Any]) -> Problem | None:
        """Return a call that differs from a checked one in its lengths and arrays, or None.

        The lengths change from token to token, and nothing else. So a call is checked, and planned,
        for as many keys as a power of two, and its record is told how many there are.
        """
        causal = keywords.get("causal", False)
        if not (
            type(query) is np.ndarray
            and query.ndim == 4
            and len(query) == len(self._lengths)
            and keywords.keys() <= REPEATABLE
            and (causal is True or causal is False or causal == "bottom_right")
            and self._longest > 0
        ):
            return None
        keys = min(1 << (self._longest - 1).bit_length(), self.capacity)
        name = (query.shape, query.dtype, keys, *keywords.values(), *keywords)
        try:
            known = self._known.get(name)
        except TypeError:  # something that has no hash
            return None
        if known is None:
            known = self._checked(query, keys, keywords)
            if known.problem.result.dtype != query.dtype:
                return None
            known = known._replace(problem=without_arrays(known.problem))
            remember(self._known, name, known)
        problem, positions = known
        problem.record[_SEQLEN_KV] = self._longest
        if positions is not None:
            np.subtract(self._lengths, query.shape[2], positions)
        return again(problem, query, problem.record, known)

    def _checked(self, query: Array, keys: int, keywords: dict[str, Any]) -> _Known:
        """Check a call for so many keys, in a record that looks up where each sequence ends."""
        shape = (*self._storage.key.shape[:2], keys)
        problem = check_attend(query, shape, self._storage, None, keywords)
        self._limit(problem.record)
        problem.record[_LENGTHS] = self._lengths_address
        positions = None
        if keywords.get("causal") or "window" in keywords:
            positions = np.empty_like(self._lengths)
            problem.record[_POSITIONS] = positions.ctypes.data
        return _Known(problem, positions)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a file in NumPy's npz format, free room aside.

        The file appears under its name when it is complete.

        Parameters
        ----------
        path : str or path-like
            Taken as it is: no ending is added.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        rows = slice(0, self._longest)
        content: dict[str, Array] = {
            "format": np.array(_FORMAT),
            "dtype": np.array(self.dtype.name),
            "options": np.array(
                [self.capacity, self.grow, 0 if self.window is None else self.window], np.int64
            ),
            "lengths": self._lengths,
            "dropped": self._dropped,
        }
        for name, x in zip(_ARRAYS, self._storage.arrays, strict=False):
            # As bits: NumPy's format does not know bfloat16.
            content[name] = np.ascontiguousarray(x[:, :, rows]).view(_BITS[x.itemsize])
        target = Path(path)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, allow_pickle=False, **content)
            Path(temporary).replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KVCache:
        """Return the cache that `save` wrote to a file.

        Raises
        ------
        ValueError
            If the file is torn, or is something else. Nothing in it is ever run.
        OSError
            If it cannot be read.
        """
        try:
            with Path(path).open("rb") as file:
                return cls._from_file(file)
        except (
            *(ValueError, TypeError, KeyError, EOFError, AttributeError, MemoryError),
            *(zipfile.BadZipFile, zlib.error, NotImplementedError, OverflowError),
        ) as error:
            # The reason is an attachment: NumPy's may advise to unpickle the file.
            raise ValueError(f"path must be a file that KVCache.save wrote: got {path}") from error

    @classmethod
    def _from_file(cls, file: BinaryIO) -> KVCache:
        content = np.load(file, allow_pickle=False)
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array")
        if "format" not in content or str(content["format"]) != _FORMAT:
            raise ValueError("it holds other arrays")
        arrays = [content[name] for name in _ARRAYS if name in content]
        dtype = _dtype_named(str(content["dtype"]))
        capacity, grow, window = content["options"].tolist()
        lengths, dropped = content["lengths"], content["dropped"]
        batch, heads, rows, head_dim = arrays[0].shape
        cache = cls(
            *(batch, heads, head_dim, capacity),
            head_dim_v=arrays[1].shape[-1],
            dtype=dtype,
            grow=bool(grow),
            window=window or None,
        )
        for ours, theirs in zip(cache._storage.arrays, arrays, strict=True):
            if theirs.dtype != _BITS[ours.itemsize] or theirs.shape[:3] != (batch, heads, rows):
                raise ValueError(f"its arrays do not fit: got {theirs.dtype} {theirs.shape}")
            ours[:, :, :rows] = theirs.view(ours.dtype)
        for scale in cache._storage.arrays[2:]:
            if not (np.isfinite(scale) & (scale >= 0)).all():
                raise ValueError("its scales are not finite")
        cache._dropped[:] = check_integers("dropped", dropped, (batch,), 0, UNBOUNDED)
        cache._set_lengths(check_integers("lengths", lengths, (batch,), 0, rows))
        return cache


def _check_last(keywords: dict[str, Any]) -> None:
    """Check that the queries of a call are the last tokens: others may see what was dropped."""
    if "query_offset" in keywords or keywords.get("causal") == "top_left":
        raise ValueError(
            'query_offset and causal="top_left" must not be given to a cache with a window, '
            f"whose queries are the last tokens: got {keywords}"
        )


def _dtype_named(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
