"""From a checked problem to its result: plan it, and call the compiled code."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastattn import runtime
from fastattn.kernels.record import BFLOAT, BLOCK_KV, CHUNK, FLOAT32, HALF, field
from fastattn.loading import loads
from fastattn.plan import Chunks, Plan, chunks, divide, plan, plan_chunks, plan_packed
from fastattn.problem import Array, Format, Packed, Problem, known_format

_PAGE_SIZE, _STATES, _FINISHED, _ROWS, _WORK, _WORK_ITEMS, _MEMBERS = (
    field(name)
    for name in ("page_size", "states", "finished", "rows", "work", "work_items", "members")
)


class _Compiled(NamedTuple):
    """The compiled code for one kernel, and formats of queries and of keys and values."""

    kernel: int  # address
    run: Any
    place: Any


@cache
@loads
def _compiled(
    form: Format, stored: Format, is_decode: bool, in_place: bool, is_bfloat: bool
) -> _Compiled:
    """Compile or load it; Numba, imported at the first call, takes most of a second by itself.

    `is_bfloat`: a unit for products of bfloat16 may be used.
    """
    from numba.np.numpy_support import from_dtype

    from fastattn.kernels import decode, launch, prefill
    from fastattn.kernels.host import HOST

    entries = launch.entries(form.view, stored.view, form.accumulation)
    element = from_dtype(form.accumulation)
    if is_decode:
        native = known_format(form.accumulation).storage
        kernel = decode.decode(element, stored.storage if in_place else native)
    else:
        kernel = prefill.prefill(element, is_bfloat and HOST.pairs_bfloat)
    return _Compiled(kernel, entries.run, entries.place)


@cache
@loads
def _fits_registers(stored: Format, length: int) -> bool:
    """Return whether rows of so many elements are whole registers that can be converted."""
    from fastattn.kernels.host import HOST

    if stored.storage == HALF and not HOST.converts_half:
        return False
    return length * 4 % int(HOST.vector_bytes) == 0


def _is_read_in_place(problem: Problem, stored: Format) -> bool:
    """Return whether the decode kernel can read keys and values of another format than its own."""
    itemsize = stored.view.itemsize
    page_size = int(problem.record[_PAGE_SIZE])
    return (
        problem.format.accumulation == np.float32
        and _fits_registers(stored, problem.frame.head_dim)
        and _fits_registers(stored, problem.frame.head_dim_v)
        and problem.key.strides[-1] == problem.value.strides[-1] == itemsize
        and page_size % BLOCK_KV == 0
    )


def _is_bfloat(problem: Problem, stored: Format) -> bool:
    """Return whether the products may be of bfloat16: they are, or the caller permits it."""
    storage = problem.format.storage
    return storage == stored.storage == BFLOAT or (problem.permits_bfloat and storage == FLOAT32)


_ready: dict[tuple[int, int, bool, bool, bool], _Compiled] = {}


def _code(problem: Problem, is_decode: bool) -> _Compiled:
    """Return the compiled code for a problem."""
    form, stored = problem.format, problem.stored or problem.format
    in_place = (
        is_decode
        and stored.view.itemsize < form.accumulation.itemsize
        and _is_read_in_place(problem, stored)
    )
    is_bfloat = not is_decode and _is_bfloat(problem, stored)
    name = (form.storage, stored.storage, is_decode, in_place, is_bfloat)
    ready = _ready.get(name)
    if ready is None:
        ready = _ready[name] = _compiled(form, stored, is_decode, in_place, is_bfloat)
    return ready


def _start(problem: Problem, record: Array, planned: Plan) -> None:
    """Run the compiled code on one thread or several."""
    query, key, value, out, lse, *_ = problem
    is_decode, tiles, workers, is_long = planned
    ready = _code(problem, is_decode)
    if workers == 1 and not is_long:
        if ready.run(query, key, value, out, lse, tiles, record, ready.kernel) == 0:
            raise MemoryError(runtime.NO_MEMORY)
    else:
        placed = np.empty_like(record)
        ready.place(query, key, value, out, lse, tiles, record, placed)
        runtime.launch(ready.kernel, placed, workers, is_long=is_long)


def run(problem: Problem) -> None:
    """Plan a checked problem and run it."""
    record, frame = problem.record, problem.frame
    if problem.out.size == 0 and problem.lse.size == 0:
        return
    planned = plan(frame, runtime.usable_threads())
    if planned.is_decode and frame.seqlen_kv > CHUNK:
        heads = frame.batch * frame.num_kv_heads
        rows = frame.num_heads // frame.num_kv_heads * frame.seqlen_q
        record, _room = _with_states(problem, record, heads * chunks(frame.seqlen_kv), heads, rows)
    _start(problem, record, planned)


def run_packed(problem: Problem) -> None:
    """Plan and run a checked call of packed sequences: each as it would be run by itself."""
    frame, packed = problem.frame, problem.packed
    assert packed is not None  # that is what the call is
    if problem.out.size == 0 and problem.lse.size == 0:
        return
    few, many = divide(frame, packed, runtime.usable_threads())
    if few is not None:
        _run_few(problem, packed, few)
    if many is not None:
        _run_many(problem, packed, many)


def _run_few(problem: Problem, packed: Packed, few: Chunks) -> None:
    """Run the decode kernel for some of packed sequences."""
    frame = problem.frame
    planned = plan_chunks(frame, packed, few, runtime.usable_threads())
    if few.states:
        heads, states = frame.batch * frame.num_kv_heads, few.states * frame.num_kv_heads
        record, _room = _with_states(problem, problem.record, states, heads, few.rows)
    else:
        record = problem.record.copy()
    record[_WORK], record[_MEMBERS] = few.addresses
    record[_WORK_ITEMS], record[_ROWS] = len(few.work), few.rows
    _start(problem, record, planned)


@cache
@loads
def _tile_queries(accumulation: np.dtype[Any]) -> int:
    """Return the queries of one tile."""
    from numba.np.numpy_support import from_dtype

    from fastattn.kernels.prefill import most_queries

    queries: int = most_queries(from_dtype(accumulation))
    return queries


def _run_many(problem: Problem, packed: Packed, chosen: Array) -> None:
    """Run the prefill kernel for some of packed sequences."""
    tile_queries = _tile_queries(problem.format.accumulation)
    threads = runtime.usable_threads()
    planned, work = plan_packed(problem.frame, packed, chosen, tile_queries, threads)
    record = problem.record.copy()
    record[_WORK], record[_WORK_ITEMS] = work.ctypes.data, len(work)
    _start(problem, record, planned)


def _with_states(
    problem: Problem, record: Array, states: int, heads: int, rows: int
) -> tuple[Array, tuple[Array, ...]]:
    """Return a record with room for what is known after each chunk of keys, and that room."""
    padded = -(-problem.frame.head_dim_v // 16) * 16  # whole registers of any instruction set
    room = np.empty(states * rows * (padded + 2), problem.format.accumulation)
    finished = np.zeros(heads, np.int64)
    record = record.copy()
    record[_STATES] = room.ctypes.data
    record[_FINISHED] = finished.ctypes.data
    return record, (room, finished)
