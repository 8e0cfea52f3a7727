"""From a checked problem to its result: plan it, and call the compiled code."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastattn import runtime
from fastattn.plan import plan
from fastattn.problem import Format, Problem


class _Compiled(NamedTuple):
    """The compiled code for one storage format."""

    kernel: int  # address
    run: Any
    place: Any


@cache
def _compiled(form: Format) -> _Compiled:
    """Compile or load it; Numba, imported at the first call, takes most of a second by itself."""
    from numba.np.numpy_support import from_dtype

    from fastattn.kernels import launch, prefill

    entries = launch.entries(form.view, form.accumulation)
    return _Compiled(prefill.prefill(from_dtype(form.accumulation)), entries.run, entries.place)


_ready: dict[int, _Compiled] = {}


def run(problem: Problem) -> None:
    """Plan a checked problem and run it."""
    query, key, value, out, lse, record, form, frame, *_ = problem
    if out.size == 0 and lse.size == 0:
        return
    ready = _ready.get(form.storage)
    if ready is None:
        ready = _ready[form.storage] = _compiled(form)
    tiles, workers = plan(frame, runtime.usable_threads())
    if workers == 1:
        ready.run(query, key, value, out, lse, tiles, record, ready.kernel)
    else:
        placed = np.empty_like(record)
        ready.place(query, key, value, out, lse, tiles, record, placed)
        runtime.launch(ready.kernel, placed, workers)
