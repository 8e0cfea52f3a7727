"""From a checked problem to its result: plan it, and call the compiled code."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastattn import runtime
from fastattn.kernels.record import BFLOAT, CHUNK, FINISHED, HALF, STATES
from fastattn.plan import chunks, plan
from fastattn.problem import Array, Format, Frame, Problem, known_format


class _Compiled(NamedTuple):
    """The compiled code for one storage format and kernel."""

    kernel: int  # address
    run: Any
    place: Any


@cache
def _compiled(form: Format, is_decode: bool, in_place: bool) -> _Compiled:
    """Compile or load it; Numba, imported at the first call, takes most of a second by itself."""
    from numba.np.numpy_support import from_dtype

    from fastattn.kernels import decode, launch, prefill

    entries = launch.entries(form.view, form.accumulation)
    element = from_dtype(form.accumulation)
    if is_decode:
        native = known_format(form.accumulation).storage
        kernel = decode.decode(element, form.storage if in_place else native)
    else:
        kernel = prefill.prefill(element)
    return _Compiled(kernel, entries.run, entries.place)


@cache
def _fits_registers(form: Format, length: int) -> bool:
    """Return whether the decode kernel can read rows of so many elements without a copy."""
    from fastattn.kernels.host import HOST

    if form.storage == HALF and not HOST.converts_half:
        return False
    return length * 4 % int(HOST.vector_bytes) == 0


_ready: dict[tuple[int, bool, bool], _Compiled] = {}


def run(problem: Problem) -> None:
    """Plan a checked problem and run it."""
    query, key, value, out, lse, record, form, frame, *_ = problem
    if out.size == 0 and lse.size == 0:
        return
    is_decode, tiles, workers = plan(frame, runtime.usable_threads())
    in_place = (
        is_decode
        and form.storage in (HALF, BFLOAT)
        and _fits_registers(form, frame.head_dim)
        and _fits_registers(form, frame.head_dim_v)
        and key.strides[-1] == value.strides[-1] == 2
    )
    ready = _ready.get((form.storage, is_decode, in_place))
    if ready is None:
        ready = _compiled(form, is_decode, in_place)
        _ready[form.storage, is_decode, in_place] = ready
    if is_decode and frame.seqlen_kv > CHUNK:
        record, _room = _with_states(record, frame, form)
    if workers == 1:
        ready.run(query, key, value, out, lse, tiles, record, ready.kernel)
    else:
        placed = np.empty_like(record)
        ready.place(query, key, value, out, lse, tiles, record, placed)
        runtime.launch(ready.kernel, placed, workers)


def _with_states(record: Array, frame: Frame, form: Format) -> tuple[Array, tuple[Array, ...]]:
    """Return the record with room for what is known after each chunk of keys, and that room."""
    heads = frame.batch * frame.num_kv_heads
    rows = frame.num_heads // frame.num_kv_heads * frame.seqlen_q
    padded = -(-frame.head_dim_v // 16) * 16  # whole registers of any instruction set
    states = np.empty(heads * chunks(frame.seqlen_kv) * rows * (padded + 2), form.accumulation)
    finished = np.zeros(heads, np.int64)
    record = record.copy()
    record[STATES] = states.ctypes.data
    record[FINISHED] = finished.ctypes.data
    return record, (states, finished)
