"""Keys and values that are kept from token to token, in pages of a pool that sequences share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastattn.arguments import check_int
from fastattn.formats import address, as_array
from fastattn.kernels.record import BLOCK_KV, field
from fastattn.keywords import UNBOUNDED
from fastattn.problem import Pages, Problem
from fastattn.run import Part, parts_of, run_parts
from fastattn.runtime import usable_threads
from fastattn.storage import (
    REPEATABLE,
    Array,
    Storage,
    again,
    check_attend_packed,
    check_integers,
    check_rows,
    check_storage_dtype,
    remember,
    without_arrays,
)

_PAGES, _PAGES_STEP, _PAGE_SIZE, _LENGTHS, _POSITIONS = (
    field(name) for name in ("pages", "pages_step", "page_size", "lengths", "positions")
)


class _Planned(NamedTuple):
    """A call of one query for each of some sequences, but for its arrays and lengths."""

    problem: Problem
    has_positions: bool  # of the queries
    parts: list[Part]


class _Placed(NamedTuple):
    """Where some sequences lie, and calls of them, as long as tables and blocks are these."""

    tables: list[tuple[int, ...]]
    blocks: list[int]  # of keys that each has, begun ones counted
    pages: Pages
    fields: tuple[int, int, int]  # address, pages_step and page_size of a record
    calls: dict[Any, _Planned]

    def locate(self, problem: Problem) -> Problem:
        """Return a checked call that knows where the sequences lie."""
        record = problem.record.copy()
        record[_PAGES], record[_PAGES_STEP], record[_PAGE_SIZE] = self.fields
        assert problem.packed is not None  # as it was checked
        owners = problem.owners, self.pages
        packed = problem.packed._replace(pages=self.pages)
        return problem._replace(record=record, owners=owners, packed=packed)


class PagedKVCache:
    """Keys and values of any number of sequences, in pages that they take from one pool.

    Parameters
    ----------
    num_pages : int
        Pages of the pool.
    page_size : int
        Tokens of a page. The kernels read pages of a multiple of 64 where they lie; others are
        gathered in blocks.
    num_kv_heads, head_dim : int
    head_dim_v : int, optional
        Features of a value; None is `head_dim`.
    dtype : dtype
        As in `KVCache`.

    Raises
    ------
    TypeError, ValueError
        For sizes that are no int or below 1, or a dtype that nothing is kept in.

    Notes
    -----
    Sequences share the pages of a common prefix (`add` with `share`). Each page counts who uses it;
    whoever writes to a page that others use gets a copy of it first. A call that raises leaves
    every sequence as it was.

    *Threads.* One at a time may write (`add`, `append`, `free`): hold a lock. Meanwhile any number
    may `attend` to other sequences, also to those that share pages with what is written.

    References
    ----------
    .. [1] Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with
       PagedAttention", section 4, arXiv:2309.06180

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> cache = fastattn.PagedKVCache(num_pages=8, page_size=64, num_kv_heads=2, head_dim=16)
    >>> prompt = cache.add()
    >>> key, value = rng.standard_normal((2, 70, 2, 16), dtype=np.float32)
    >>> cache.append([prompt], key, value, [0, 70])
    >>> ids = [cache.add(share=prompt), cache.add(share=prompt)]
    >>> key, value = rng.standard_normal((2, 2, 2, 16), dtype=np.float32)
    >>> cache.append(ids, key, value)
    >>> cache.lengths(ids), cache.pages_free
    (array([71, 71]), 4)
    >>> cache.attend(rng.standard_normal((2, 4, 16), dtype=np.float32), ids).shape
    (2, 4, 16)
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        num_pages = check_int("num_pages", num_pages, 1)
        self.page_size = check_int("page_size", page_size, 1)
        num_kv_heads = check_int("num_kv_heads", num_kv_heads, 1)
        head_dim = check_int("head_dim", head_dim, 1)
        head_dim_v = head_dim if head_dim_v is None else check_int("head_dim_v", head_dim_v, 1)
        self._storage = Storage(
            (num_pages, num_kv_heads, self.page_size),
            head_dim,
            head_dim_v,
            check_storage_dtype(dtype),
        )
        # A table is replaced, never changed: what is equal to it is still true of it.
        self._tables: dict[int, tuple[int, ...]] = {}
        self._lengths: dict[int, int] = {}
        self._users = [0] * num_pages
        self._free = list(range(num_pages))[::-1]
        self._next_id = 0
        self._known: dict[Any, Problem] = {}
        self._block = math.gcd(BLOCK_KV, self.page_size)
        self._placed: dict[tuple[int, ...], _Placed] = {}

    @property
    def dtype(self) -> Any:
        """What keys and values are kept in."""
        return self._storage.dtype

    @property
    def pages_free(self) -> int:
        """Pages that no sequence uses."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of memory for keys, values and scales, free pages included."""
        return self._storage.nbytes

    def lengths(self, ids: Sequence[int]) -> Array:
        """Return the numbers of tokens of some sequences, int64 (len(ids),).

        Raises
        ------
        TypeError, ValueError
            For ids that are not those of sequences.
        """
        return np.array([self._lengths[each] for each in self._known_ids(ids)], np.int64)

    def add(self, share: int | None = None) -> int:
        """Add a sequence and return its id: empty, or with the tokens of the sequence `share`.

        Nothing is copied: the tokens are shared until one of both writes to their last page.

        Raises
        ------
        TypeError, ValueError
            If `share` is not the id of a sequence.
        """
        table: tuple[int, ...] = ()
        length = 0
        if share is not None:
            (shared,) = self._known_ids([share], "share")
            table, length = self._tables[shared], self._lengths[shared]
        for page in table:
            self._users[page] += 1
        new = self._next_id
        self._next_id += 1
        self._tables[new], self._lengths[new] = table, length
        return new

    def free(self, id: int) -> None:  # noqa: A002, as `add` returns it
        """Forget a sequence; pages that nobody else uses are free again.

        Raises
        ------
        TypeError, ValueError
            If `id` is not that of a sequence; ids are never used again.
        """
        (known,) = self._known_ids([id], "id")
        for page in self._tables.pop(known):
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free.append(page)
        del self._lengths[known]

    def append(
        self,
        ids: Sequence[int],
        key: ArrayLike,
        value: ArrayLike,
        cu_seqlens: ArrayLike | None = None,
    ) -> None:
        """Write new tokens behind those of some sequences.

        Parameters
        ----------
        ids : sequence of int
            Each sequence once.
        key : array_like, (tokens, num_kv_heads, head_dim)
        value : array_like, (tokens, num_kv_heads, head_dim_v)
            Floats, packed: the tokens of the first sequence, then those of the second...
        cu_seqlens : integers of shape (len(ids) + 1,), optional
            Where the tokens of each sequence begin, from 0 to the number of all. None is one token
            for each sequence.

        Raises
        ------
        TypeError
            If key or value are no floats.
        ValueError
            For ids that are unknown, freed or given twice, shapes or `cu_seqlens` that do not fit,
            more tokens than the free pages have room for, or NaN or infinity for int8.
        """
        storage = self._storage
        known = self._known_ids(ids)
        heads, head_dim = storage.key.shape[1], storage.key.shape[3]
        axes = "(tokens, num_kv_heads, features)"
        k = check_rows("key", key, (None, heads, head_dim), axes)
        v = check_rows("value", value, (len(k), heads, storage.value.shape[-1]), axes)
        starts = _starts("cu_seqlens", cu_seqlens, len(known), len(k))
        new_key, new_value = storage.convert("key", k), storage.convert("value", v)
        counts = np.diff(starts).tolist()
        self._make_room(known, counts)
        if cu_seqlens is None:
            self._write_one_each(known, new_key, new_value)
            return
        for each, start, count in zip(known, starts.tolist(), counts, strict=False):
            self._write(each, start, count, new_key, new_value)

    def _make_room(self, ids: list[int], counts: list[int]) -> None:
        """Give every sequence the pages that it is going to write to, or raise."""
        users = dict[int, int]()
        copied: list[tuple[int, int]] = []  # sequences that need their last page for themselves
        added: list[tuple[int, int]] = []
        for each, count in zip(ids, counts, strict=True):
            table, length = self._tables[each], self._lengths[each]
            if count and length % self.page_size:
                last = table[-1]
                users.setdefault(last, self._users[last])
                if users[last] > 1:
                    users[last] -= 1
                    copied.append((each, last))
            pages = -(-(length + count) // self.page_size)
            added.append((each, pages - len(table)))
        needed = len(copied) + sum(n for _, n in added)
        if needed > len(self._free):
            raise ValueError(
                f"key must fit into the free pages: got {sum(counts)} tokens, "
                f"which need {needed} pages of {len(self._free)} that are free"
            )
        for each, page in copied:
            mine = self._take()
            self._storage.move(mine, page)
            self._users[page] -= 1
            self._tables[each] = (*self._tables[each][:-1], mine)
        for each, n in added:
            if n:
                self._tables[each] += tuple(self._take() for _ in range(n))

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _write_one_each(self, ids: list[int], key: Any, value: Any) -> None:
        """Write a row for each of some sequences."""
        places = [divmod(self._lengths[each], self.page_size) for each in ids]
        pages = [self._tables[each][page] for each, (page, _) in zip(ids, places, strict=True)]
        self._storage.put((pages, slice(None), [row for _, row in places]), key, value)
        for each in ids:
            self._lengths[each] += 1

    def _write(self, each: int, start: int, count: int, key: Any, value: Any) -> None:
        """Write rows from `start` on of what is packed to the pages of a sequence."""
        length, table = self._lengths[each], self._tables[each]
        done = 0
        while done < count:
            page, row = divmod(length + done, self.page_size)
            n = min(self.page_size - row, count - done)
            packed = slice(start + done, start + done + n)
            # (tokens, heads, ...) to (heads, tokens, ...)
            parts = [
                (x[packed].swapaxes(0, 1), None if scale is None else scale[packed].swapaxes(0, 1))
                for x, scale in (key, value)
            ]
            self._storage.put((table[page], slice(None), slice(row, row + n)), *parts)
            done += n
        self._lengths[each] = length + count

    def attend(
        self,
        query: ArrayLike,
        ids: Sequence[int],
        cu_seqlens_q: ArrayLike | None = None,
        **keywords: Any,
    ) -> Any:
        """Return attention of the queries of some sequences to all tokens of each.

        Parameters
        ----------
        query : array_like, (queries, num_heads, head_dim)
            Packed: those of the first sequence, then those of the second...
        ids : sequence of int
        cu_seqlens_q : integers of shape (len(ids) + 1,), optional
            Where the queries of each sequence begin, from 0 to the number of all. None is one query
            for each sequence.
        **keywords
            Those of `varlen_attention`: arguments for batch entries have one entry for each of
            `ids`, and rows are counted in each sequence. Beside them `mask` and `bias`, which
            broadcast to (num_heads, queries, most tokens of one of `ids`): a row for each query,
            from token 0 of its own sequence on. With ``causal=True`` the last query of a sequence
            sees all of its tokens: append first, then attend.

        Returns
        -------
        output : ndarray, (queries, num_heads, head_dim_v)
        lse : ndarray, (num_heads, queries), only with ``return_lse=True``

        Raises
        ------
        TypeError, ValueError
            As `attention`; ValueError also for ids that are unknown or freed, and `cu_seqlens_q`
            that does not fit.

        Notes
        -----
        Sequences that write a token each and one whose prompt is taken in by parts go through one
        call. Bits do not depend on what else is in it.

        *Shared prefix.* Keys and values in shared pages are read from memory once for all sequences
        of the call that write a token or few, part by part, and each part joins what a sequence has
        of its own as in `merge_states` [1]_ [2]_. Nothing has to be asked for, and no bit changes.

        References
        ----------
        .. [1] Juravsky et al. 2024, "Hydragen", section 3, arXiv:2402.05099
        .. [2] Ye et al. 2024, "Cascade Inference",
           https://flashinfer.ai/2024/02/02/cascade-inference.html
        """
        keywords = {name: x for name, x in keywords.items() if x is not None}
        known = self._known_ids(ids, unique=False)
        lengths = [self._lengths[each] for each in known]
        placed = self._place(known, lengths)
        repeated = None
        if cu_seqlens_q is None:
            repeated = self._repeated(query, lengths, placed, keywords)
        if repeated is None:
            q = as_array("query", query)
            if q.ndim != 3:
                raise ValueError(
                    f"query must have shape (queries, num_heads, head_dim): got {q.shape}"
                )
            starts = _starts("cu_seqlens_q", cu_seqlens_q, len(known), len(q))
            keys = np.array(lengths, np.int64)
            problem = check_attend_packed(q, starts, self._storage, keys, keywords)
            problem = placed.locate(problem)
            repeated = problem, parts_of(problem)
        problem, parts = repeated
        run_parts(problem, parts)
        if problem.result_lse is not None:
            return problem.result, problem.result_lse
        return problem.result

    def _repeated(
        self, query: Any, lengths: list[int], placed: _Placed, keywords: dict[str, Any]
    ) -> tuple[Problem, list[Part]] | None:
        """Return a call, of one query for each sequence, that differs from a checked one in arrays.

        As in `KVCache`; None where it may differ in more.
        """
        if not (
            type(query) is np.ndarray
            and query.ndim == 3
            and 0 < len(query) == len(lengths)
            and keywords.keys() <= REPEATABLE
        ):
            return None
        kind = type(keywords.get("causal"))  # 1 is no bool, though it equals one
        threads = usable_threads()
        shape = query.shape, query.strides, query.dtype
        name = (*shape, threads, kind, *keywords.values(), *keywords)
        try:
            found = placed.calls.get(name)
        except TypeError:  # something that has no hash
            return None
        keys = np.array(lengths, np.int64)
        if found is None:
            found = self._planned(query, keys, placed, name, keywords)
            remember(placed.calls, name, found)
        known, has_positions, parts = found
        if known.result.dtype != query.dtype:
            return None
        # What differs is this call's own: others of the same shape may run at the same time.
        record, positions = known.record.copy(), None
        record[_LENGTHS] = address(keys)
        if has_positions:
            positions = keys - 1
            record[_POSITIONS] = address(positions)
        return again(known, query, record, (keys, positions, parts)), parts

    def _planned(
        self, query: Array, keys: Array, placed: _Placed, name: Any, keywords: dict[str, Any]
    ) -> _Planned:
        """Check a call of one query for each sequence, unless one like it is known, and plan it."""
        known = self._known.get(name)
        if known is None:
            starts = np.arange(len(keys) + 1)
            known = check_attend_packed(query, starts, self._storage, keys, keywords)
            known = without_arrays(known)
            remember(self._known, name, known)
        packed = known.packed
        assert packed is not None  # as it was checked
        has_positions = isinstance(packed.position, np.ndarray)
        packed = packed._replace(lengths=keys, position=keys - 1 if has_positions else 0)
        known = placed.locate(known._replace(packed=packed))
        known.record.flags.writeable = False  # each call has a copy
        return _Planned(known, has_positions, parts_of(known))

    def _place(self, ids: list[int], lengths: list[int]) -> _Placed:
        """Return where sequences lie."""
        tables = [self._tables[each] for each in ids]
        # Within a block of keys and a page, work is the same token by token.
        blocks = [-(-length // self._block) for length in lengths]
        name = tuple(ids)
        known = self._placed.get(name)
        if known is not None and known.tables == tables and known.blocks == blocks:
            return known
        pages = np.zeros((len(ids), max([1, *map(len, tables)])), np.int64)
        for row, table in zip(pages, tables, strict=True):
            row[: len(table)] = table
        # Whatever happened to the tables, no page outside the pool is read.
        if pages.size and (pages.min() < 0 or pages.max() >= len(self._users)):
            raise ValueError(f"pages must lie between 0 and {len(self._users) - 1}")
        fields = address(pages), pages.shape[1], self.page_size
        known = _Placed(tables, blocks, Pages(pages, self.page_size), fields, {})
        remember(self._placed, name, known)
        return known

    def _known_ids(self, ids: Sequence[int], name: str = "ids", unique: bool = True) -> list[int]:
        """Return ids of sequences that exist."""
        if type(ids) is list and {*map(type, ids)} == {int}:
            chosen = {*ids}
            if chosen <= self._tables.keys() and (len(chosen) == len(ids) or not unique):
                return ids
        known = check_integers(name, np.asarray(ids), np.shape(ids), 0, UNBOUNDED)
        if known.ndim != 1:
            raise ValueError(f"{name} must have one dimension: got shape {known.shape}")
        for each in known.tolist():
            if each not in self._tables:
                what = "was freed" if each < self._next_id else "was never added"
                kind = "sequences" if name == "ids" else "a sequence"
                raise ValueError(f"{name} must be {kind} of this cache: got {each}, which {what}")
        if unique and len(set(known.tolist())) < len(known):
            raise ValueError(f"{name} must name each sequence once: got {known}")
        found: list[int] = known.tolist()
        return found


def _starts(name: str, numbers: ArrayLike | None, count: int, total: int) -> Array:
    """Return where the rows of each sequence begin, and where the last one ends."""
    if numbers is None:
        if total != count:
            raise ValueError(
                f"{name} must be given unless there is one row for each of {count} ids: got {total}"
            )
        return np.arange(count + 1)
    starts = check_integers(name, numbers, (count + 1,), 0, total)
    if (
        np.shape(numbers) != starts.shape
        or starts[0] != 0
        or starts[-1] != total
        or (np.diff(starts) < 0).any()
    ):
        raise ValueError(f"{name} must not decrease, and go from 0 to {total}: got {starts}")
    return starts
