"""Threads, processes, warm-up and versions: what surrounds the kernels.

Nothing here touches Numba's process-wide settings: the number of threads is this library's own,
and the threading layer is whatever the process has or gets.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fastattn.formats import Array, check_dtype
from fastattn.kernels.record import COUNTER, STOPPED
from fastattn.loading import loads
from fastattn.progress import draw_progress

_threads: int | None = None
_is_alone = True  # whether this thread was the only one at the last fork
_has_lost_threads = False  # in a forked child
_among_others: ContextVar[bool] = ContextVar("_among_others", default=False)
# Numba's workqueue aborts the process when two Python threads launch at once.
_launching = threading.Lock()
_layer: str | None = None


# How often GOMP's threads ask for more work before they sleep: some 30 microseconds. Its default,
# 300 times as long, keeps cores from the threads of NumPy's BLAS, which want them next: six layers
# of a decoder in NumPy took 48 ms for a token, and take 6.
_SPINS = {"GOMP_SPINCOUNT": "1000"}
_CALLERS_CHOICE = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def _before_fork() -> None:
    global _is_alone
    _is_alone = threading.active_count() == 1


def _after_fork() -> None:
    """Let a child use one thread unless the layer is known to survive a fork.

    Under OpenMP it would hang or die at its first launch, and so it would under TBB where another
    thread may have been using that.
    """
    global _has_lost_threads, _launching
    _has_lost_threads |= not (_layer == "workqueue" or (_layer == "tbb" and _is_alone))
    _launching = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


@cache
@loads
def _most_threads() -> int:
    from numba import config

    return int(config.NUMBA_NUM_THREADS)


def set_num_threads(n: int) -> None:
    """Set how many threads the calls of this library use, at most.

    Parameters
    ----------
    n : int
        From 1 to the number of threads that Numba has (``NUMBA_NUM_THREADS``, by default the
        number of cores). Nobody else's setting changes. Results do not depend on it.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is out of range.

    Examples
    --------
    >>> import fastattn
    >>> before = fastattn.get_num_threads()
    >>> fastattn.set_num_threads(1)
    >>> fastattn.get_num_threads()
    1
    >>> fastattn.set_num_threads(before)
    """
    global _threads
    if isinstance(n, bool) or not isinstance(n, int | np.integer):
        raise TypeError(f"n must be an int: got {n!r} of type {type(n).__name__}")
    most = _most_threads()
    if not 1 <= n <= most:
        raise ValueError(f"n must lie between 1 and {most}: got {n}")
    _threads = int(n)


def threading_layer() -> str | None:
    """Return the layer of Numba's that calls of this library have started, None before that."""
    return _layer


def get_num_threads() -> int:
    """Return how many threads the calls of this library use, at most.

    Examples
    --------
    >>> import fastattn
    >>> fastattn.get_num_threads() >= 1
    True
    """
    return _most_threads() if _threads is None else _threads


def usable_threads() -> int:
    """Return how many threads a call may use here and now.

    One in a forked child whose layer has not survived, and `among_others`, where nobody has set a
    number.
    """
    if _has_lost_threads:
        return 1
    if _threads is None and _among_others.get():
        return 1
    return get_num_threads()


@contextmanager
def among_others() -> Iterator[None]:
    """Within this, calls are tasks of a scheduler that has given the other cores to other tasks."""
    token = _among_others.set(True)
    try:
        yield
    finally:
        _among_others.reset(token)


@contextmanager
def _threads_that_sleep_soon() -> Iterator[None]:
    """Within this, GOMP is loaded such that its idle threads sleep, unless the caller has chosen.

    GOMP reads its environment once, when the threading layer loads it. Where the process has it
    loaded already, nothing changes.
    """
    if any(name in os.environ for name in _CALLERS_CHOICE):
        yield
        return
    os.environ.update(_SPINS)
    try:
        yield
    finally:
        for name in _SPINS:
            del os.environ[name]


# ---------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------


# What it means that no work item was taken. Where only some threads have none, the others do their
# work.
NO_MEMORY = "there must be memory for the scratch of one thread: got none"


def launch(kernel: int, record: Array, workers: int, *, is_long: bool) -> None:
    """Run a kernel; where it takes long, so that the handler of a signal can end it.

    Raises what the handler raises, and MemoryError.
    """
    if is_long and threading.current_thread() is threading.main_thread():
        _call_beside(
            partial(_launch, kernel, record, workers),
            partial(record.__setitem__, COUNTER, STOPPED),
        )
    else:
        _launch(kernel, record, workers)


def _launch(kernel: int, record: Array, workers: int) -> None:
    """Run a kernel on several threads, or on one where the layer is busy and cannot."""
    on_this_thread, on_several, layer = _launchers(workers > 1)
    if workers == 1:
        on_this_thread(kernel, record)
    elif layer != "workqueue":
        on_several(kernel, record, workers)
    elif _is_ours() and _launching.acquire(blocking=False):
        try:
            on_several(kernel, record, workers)
        finally:
            _launching.release()
    else:
        on_this_thread(kernel, record)
    if record[COUNTER] == 0:
        raise MemoryError(NO_MEMORY)


@cache
@loads
def _launchers(several: bool) -> tuple[Any, Any, str | None]:
    """Return what calls a kernel on this thread and, if asked for, on several, and their layer."""
    global _layer
    import numba

    from fastattn.kernels import launch

    if not several:
        return launch.call, None, None
    with _threads_that_sleep_soon():
        launcher = launch.launcher()  # compiling or loading it starts the threading layer
    _layer = numba.threading_layer()
    return launch.call, launcher, _layer


def _is_ours() -> bool:
    """Return whether this thread is Python's: workqueue aborts at a launch inside a launch."""
    return not isinstance(threading.current_thread(), threading._DummyThread)


# ---------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------


def _call_beside(call: Callable[[], None], stop: Callable[[], None]) -> None:
    """Make a call on a thread beside the main one, which waits where Python hears signals.

    What the handler of a signal raises stops the call. It goes on when the call has ended, so that
    nothing is written to the caller's arrays after it. Handlers that return change nothing.

    The thread ends with the call: OpenMP gives each thread that launches a team of its own, and
    while there are more threads than cores, none of them waits for work: short calls took 1.7
    times as long.
    """
    turn, ended = threading.Lock(), threading.Lock()
    ended.acquire()
    pending, errors = [True], list[BaseException]()

    def answer() -> None:
        if turn.acquire(blocking=False):
            try:
                call()
            except BaseException as error:
                errors.append(error)
            pending.clear()
            ended.release()

    thread = threading.Thread(target=answer, name="fastattn", daemon=True)
    is_asked = False
    try:
        while pending:
            try:
                if not is_asked:
                    is_asked = True
                    _start(thread, answer)
                ended.acquire()
            except BaseException as error:
                stop()
                errors.append(error)
                if turn.acquire(blocking=False):
                    break  # the call has not begun, and never will
        if errors:
            raise errors[0]
    finally:
        errors.clear()  # an error knows this frame: a cycle would keep the caller's arrays


def _start(thread: threading.Thread, target: Callable[[], None]) -> None:
    """Start a thread, or do its work here where there can be none."""
    try:
        thread.start()
    except RuntimeError:  # too many threads, or too little memory, or Python is ending
        target()


# ---------------------------------------------------------------------------
# Warm-up
# ---------------------------------------------------------------------------

_WARM_UP_AFTER = 1.0


def warmup(dtypes: Iterable[DTypeLike] | None = None, progress: bool | None = None) -> None:
    """Compile, or load, what calls with the given dtypes need.

    The first call ever of a dtype compiles for some seconds; the code is kept on disk, where later
    processes load it in a fraction of a second. After this, calls have nothing left to wait for.

    Parameters
    ----------
    dtypes : iterable of dtypes, optional
        None means float32 and float64. 16-bit types share most of float32's code.
    progress : bool, optional
        Show a progress bar on standard error. None shows it where standard error is a terminal
        and the work takes longer than a second.

    Raises
    ------
    TypeError
        If a dtype is not one that `attention` computes in.

    Examples
    --------
    >>> import fastattn
    >>> fastattn.warmup(["float32"], progress=False)
    """
    from fastattn.attention import attention

    if dtypes is None:
        dtypes = (np.float32, np.float64)
    if isinstance(dtypes, str) or not isinstance(dtypes, Iterable):
        raise TypeError(f"dtypes must be a sequence of dtypes: got {dtypes!r}")
    wanted = [check_dtype("dtypes", each) for each in dtypes]
    steps: list[Callable[[], object]] = []
    for dtype in wanted:
        small = np.ones((1, 1, 2, 1), dtype)
        # Enough work for several threads, in as little time as that takes.
        large = np.ones((1, 4, 64, 64), dtype)
        steps += [lambda x=small: attention(x, x, x), lambda x=large: attention(x, x, x)]  # type: ignore[misc]
    begin = time.monotonic()
    late = False
    for n, step in enumerate(steps):
        late = time.monotonic() - begin > _WARM_UP_AFTER
        if progress or (progress is None and sys.stderr.isatty() and late):
            draw_progress("compiling", n, len(steps))
        step()
    if progress or (progress is None and sys.stderr.isatty() and late):
        draw_progress("compiling", len(steps), len(steps))


# ---------------------------------------------------------------------------
# Versions
# ---------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Return what `show_versions` prints, as text by name."""
    import llvmlite
    import numba

    import fastattn
    from fastattn.kernels import code_cache
    from fastattn.kernels.host import HOST

    directory = code_cache.directory()
    try:
        layer = numba.threading_layer()
    except ValueError:
        layer = f"not started yet (Numba is set to {numba.config.THREADING_LAYER})"
    return {
        "fastattn": fastattn.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "platform": platform.platform(),
        "cpu": HOST.cpu,
        "instruction set": f"{HOST.instruction_set}, {HOST.vector_bytes} bytes"
        + ("" if HOST.fused else ", no fused multiply-add"),
        "lanes": f"{HOST.vector_bytes // 4} float32, {HOST.vector_bytes // 8} float64",
        "accumulators": f"{HOST.wide[0]} x {HOST.wide[1]} registers",
        "bfloat16": "in pairs, by a unit for dot products" if HOST.pairs_bfloat else "as float32",
        "threading layer": layer,
        "threads": f"{get_num_threads()} of {_most_threads()}",
        "compiled code": "in memory only (no writable directory)"
        if directory is None
        else f"{directory} (writable)",
    }


def show_versions() -> None:
    """Print the versions, CPU, threads and directory that matter for a report.

    Examples
    --------
    >>> import fastattn
    >>> fastattn.show_versions()  # doctest: +ELLIPSIS
    fastattn ...
    """
    found = versions()
    width = max(map(len, found))
    for name, text in found.items():
        print(f"{name:{width}}  {text}")
