"""From a checked problem to its result: plan it, and call the compiled code."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastattn import runtime
from fastattn.kernels.record import BLOCK_KV, CHUNK, HALF, PROBLEM, field
from fastattn.loading import loads
from fastattn.plan import chunks, plan, plan_packed
from fastattn.problem import Array, Format, Frame, Problem, known_format


class _Compiled(NamedTuple):
    """The compiled code for one kernel, and formats of queries and of keys and values."""

    kernel: int  # address
    run: Any
    place: Any


@cache
@loads
def _compiled(form: Format, stored: Format, is_decode: bool, in_place: bool) -> _Compiled:
    """Compile or load it; Numba, imported at the first call, takes most of a second by itself."""
    from numba.np.numpy_support import from_dtype

    from fastattn.kernels import decode, launch, prefill

    entries = launch.entries(form.view, stored.view, form.accumulation)
    element = from_dtype(form.accumulation)
    if is_decode:
        native = known_format(form.accumulation).storage
        kernel = decode.decode(element, stored.storage if in_place else native)
    else:
        kernel = prefill.prefill(element)
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


@cache
@loads
def _tile_queries(accumulation: np.dtype[Any]) -> int:
    """Return the queries of one tile."""
    from numba.np.numpy_support import from_dtype

    from fastattn.kernels.prefill import most_queries

    queries: int = most_queries(from_dtype(accumulation))
    return queries


def run_packed(problem: Problem) -> None:
    """Plan and run a checked call of packed sequences."""
    query, key, value, out, lse, record, form, frame, *_, packed = problem
    if out.size == 0 and lse.size == 0:
        return
    assert packed is not None  # that is what the call is
    ready = _compiled(form, form, is_decode=False, in_place=False)
    tile_queries = _tile_queries(form.accumulation)
    planned, work = plan_packed(frame, packed, tile_queries, runtime.usable_threads())
    fields = record.view(PROBLEM)[0]
    fields["work"], fields["work_items"] = work.ctypes.data, len(work)
    placed = np.empty_like(record)
    ready.place(query, key, value, out, lse, planned.tiles, record, placed)
    runtime.launch(ready.kernel, placed, planned.workers, is_long=planned.is_long)


_PAGE_SIZE, _STATES, _FINISHED = field("page_size"), field("states"), field("finished")
_ready: dict[tuple[int, int, bool, bool], _Compiled] = {}


def run(problem: Problem) -> None:
    """Plan a checked problem and run it."""
    query, key, value, out, lse, record, form, frame, *_, stored, _ = problem
    if out.size == 0 and lse.size == 0:
        return
    if stored is None:
        stored = form
    planned = plan(frame, runtime.usable_threads())
    is_decode, tiles, workers, is_long = planned
    in_place = (
        is_decode
        and stored.view.itemsize < form.accumulation.itemsize
        and _is_read_in_place(problem, stored)
    )
    name = (form.storage, stored.storage, is_decode, in_place)
    ready = _ready.get(name)
    if ready is None:
        ready = _ready[name] = _compiled(form, stored, is_decode, in_place)
    if is_decode and frame.seqlen_kv > CHUNK:
        record, _room = _with_states(record, frame, form)
    if workers == 1 and not is_long:
        if ready.run(query, key, value, out, lse, tiles, record, ready.kernel) == 0:
            raise MemoryError(runtime.NO_MEMORY)
    else:
        placed = np.empty_like(record)
        ready.place(query, key, value, out, lse, tiles, record, placed)
        runtime.launch(ready.kernel, placed, workers, is_long=is_long)


def _with_states(record: Array, frame: Frame, form: Format) -> tuple[Array, tuple[Array, ...]]:
    """Return the record with room for what is known after each chunk of keys, and that room."""
    heads = frame.batch * frame.num_kv_heads
    rows = frame.num_heads // frame.num_kv_heads * frame.seqlen_q
    padded = -(-frame.head_dim_v // 16) * 16  # whole registers of any instruction set
    states = np.empty(heads * chunks(frame.seqlen_kv) * rows * (padded + 2), form.accumulation)
    finished = np.zeros(heads, np.int64)
    record = record.copy()
    record[_STATES] = states.ctypes.data
    record[_FINISHED] = finished.ctypes.data
    return record, (states, finished)
