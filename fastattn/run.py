"""From a checked problem to its result: plan it, and call the compiled code."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastattn import runtime
from fastattn.formats import Array, Format, address, known_format
from fastattn.kernels.record import BFLOAT, BLOCK_KV, CHUNK, FLOAT32, HALF, field
from fastattn.loading import loads
from fastattn.plan import Plan, chunks, divide, plan, plan_chunks, plan_packed
from fastattn.problem import Problem

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


def _start(problem: Problem, record: Array, planned: Plan, code: _Compiled) -> None:
    """Run the compiled code on one thread or several."""
    query, key, value, out, lse, *_ = problem
    _, tiles, workers, is_long = planned
    if workers == 1 and not is_long:
        if code.run(query, key, value, out, lse, tiles, record, code.kernel) == 0:
            raise MemoryError(runtime.NO_MEMORY)
    else:
        placed = np.empty_like(record)
        code.place(query, key, value, out, lse, tiles, record, placed)
        runtime.launch(code.kernel, placed, workers, is_long=is_long)


def run(problem: Problem) -> None:
    """Plan a checked problem and run it."""
    record, frame = problem.record, problem.frame
    if problem.out.size == 0 and problem.lse.size == 0:
        return
    planned = plan(frame, runtime.usable_threads())
    if planned.is_decode and frame.seqlen_kv > CHUNK:
        heads = frame.batch * frame.num_kv_heads
        rows = frame.num_heads // frame.num_kv_heads * frame.seqlen_q
        record = record.copy()
        _room = _give_room(problem, record, heads * chunks(frame.seqlen_kv), heads, rows)
    _start(problem, record, planned, _code(problem, planned.is_decode))


class Part(NamedTuple):
    """What one kernel does of a call of packed sequences."""

    plan: Plan
    code: _Compiled
    states: int  # to be kept while it runs: of how many chunks, each with so many rows
    rows: int
    fields: tuple[tuple[int, int], ...]  # of the record
    owners: Any  # arrays of which those hold addresses


def run_packed(problem: Problem) -> None:
    """Plan and run a checked call of packed sequences: each as it would be run by itself."""
    run_parts(problem, parts_of(problem))


def parts_of(problem: Problem) -> list[Part]:
    """Plan a checked call of packed sequences.

    The parts are also those of a call that differs in arrays, and in lengths such that none of them
    begins or ends a page or a block of keys: only the number of threads might be another then.
    """
    frame, packed = problem.frame, problem.packed
    assert packed is not None  # that is what the call is
    if 0 in frame.result and problem.lse.size == 0:
        return []
    threads = runtime.usable_threads()
    few, many = divide(frame, packed, threads)
    parts = []
    if few is not None:
        planned = plan_chunks(frame, packed, few, threads)
        parts.append(_part(problem, planned, few.work, few.members, few.states, few.rows))
    if many is not None:
        tile_queries = _tile_queries(problem.format.accumulation)
        planned, work = plan_packed(frame, packed, many, tile_queries, threads)
        parts.append(_part(problem, planned, work))
    return parts


def _part(
    problem: Problem,
    planned: Plan,
    work: Array,
    members: Array | None = None,
    states: int = 0,
    rows: int = 0,
) -> Part:
    """Return a part with its work, and the members and rows if it is for the decode kernel."""
    fields = [(_WORK, address(work)), (_WORK_ITEMS, len(work))]
    if members is not None:
        fields += [(_MEMBERS, address(members)), (_ROWS, rows)]
    code = _code(problem, planned.is_decode)
    return Part(planned, code, states, rows, tuple(fields), (work, members))


def run_parts(problem: Problem, parts: list[Part]) -> None:
    """Run a call by the parts that are known of it."""
    frame = problem.frame
    for part in parts:
        record = problem.record.copy()
        if part.states:
            heads, states = frame.batch * frame.num_kv_heads, part.states * frame.num_kv_heads
            _room = _give_room(problem, record, states, heads, part.rows)
        for place, number in part.fields:
            record[place] = number
        _start(problem, record, part.plan, part.code)


@cache
@loads
def _tile_queries(accumulation: np.dtype[Any]) -> int:
    """Return the queries of one tile."""
    from numba.np.numpy_support import from_dtype

    from fastattn.kernels.prefill import most_queries

    queries: int = most_queries(from_dtype(accumulation))
    return queries


def _give_room(
    problem: Problem, record: Array, states: int, heads: int, rows: int
) -> tuple[Array, Array]:
    """Put into a record where there is room for what is known after each chunk of keys.

    The room lasts as long as what is returned.
    """
    padded = -(-problem.frame.head_dim_v // 16) * 16  # whole registers of any instruction set
    room = np.empty(states * rows * (padded + 2), problem.format.accumulation)
    finished = np.zeros(heads, np.int64)
    record[_STATES], record[_FINISHED] = address(room), address(finished)
    return room, finished
