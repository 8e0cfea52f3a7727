"""Looks for what makes calls slow, or fail, on this machine: each finding comes with its remedy."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from fastattn import runtime
from fastattn.cores import usable_cores

State = Literal["ok", "note", "warning", "error"]

# Compiled code of every dtype, some versions of it.
_CACHE_BYTES = 50 << 20

_SLOW_SETTINGS = {
    "NUMBA_OPT": "compiles with other optimisations",
    "NUMBA_BOUNDSCHECK": "checks every index",
    "NUMBA_DEBUGINFO": "compiles for a debugger",
    "NUMBA_ENABLE_AVX": "decides about AVX instructions",
}


class Finding(NamedTuple):
    """What was looked at, what it is like, and what to do where it is not as it should be."""

    state: State
    what: str
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Return what is found, in the order in which it matters."""
    return [
        *_compiler(),
        *_compiled_code(),
        *_threading_layer(),
        *_threads(),
        *_blas(),
        *_instruction_set(),
        *_settings(),
        *_torch(),
    ]


def _compiler() -> Iterator[Finding]:
    from numba import config

    if config.DISABLE_JIT:
        yield Finding(
            "error",
            "compiler",
            "switched off, so that every call fails",
            "unset NUMBA_DISABLE_JIT",
        )
    else:
        yield Finding("ok", "compiler", "on")


def _compiled_code() -> Iterator[Finding]:
    from fastattn.kernels import code_cache

    directory = code_cache.directory()
    if directory is None:
        root = code_cache.root()
        yield Finding(
            "warning",
            "compiled code",
            f"cannot be kept in {root}: every process compiles for some seconds",
            "set FASTATTN_CACHE_DIR to a folder that you, and nobody else, may write",
        )
        return
    free = shutil.disk_usage(directory).free
    if free < _CACHE_BYTES:
        yield Finding(
            "warning",
            "compiled code",
            f"kept in {directory}, where {free >> 20} MiB are left",
            "make room, or set FASTATTN_CACHE_DIR to a folder on another disk",
        )
    else:
        yield Finding("ok", "compiled code", f"kept in {directory}")


def _threading_layer() -> Iterator[Finding]:
    import numba
    from numba.np.ufunc.parallel import _launch_threads

    try:
        # What Numba itself does at the first parallel call.
        _launch_threads()
    except ValueError as error:
        reason = str(error).replace("\n", " ")
        setting = numba.config.THREADING_LAYER
        yield Finding(
            "error",
            "threading layer",
            f"cannot start: {reason}",
            f"unset NUMBA_THREADING_LAYER (it is {setting}), or install what that layer needs",
        )
        return
    layer = numba.threading_layer()
    if layer == "workqueue":
        yield Finding(
            "warning",
            "threading layer",
            "workqueue: starts slowly, and of calls at the same time only one gets several threads",
            "install TBB (pip install tbb) or OpenMP's runtime (on Debian: apt install libgomp1)",
        )
    else:
        yield Finding("ok", "threading layer", f"{layer}, safe with Python threads")


def _threads() -> Iterator[Finding]:
    threads, cores = runtime.get_num_threads(), usable_cores()
    remedy = f"set NUMBA_NUM_THREADS={cores}, or call fastattn.set_num_threads({cores})"
    if threads > cores:
        yield Finding(
            "warning",
            "threads",
            f"{threads}, but this process gets {cores} cores: they wait for each other",
            remedy,
        )
    elif threads < cores:
        yield Finding("note", "threads", f"{threads} of {cores} cores", remedy)
    else:
        yield Finding("ok", "threads", f"{threads}, as many as cores")


def _blas() -> Iterator[Finding]:
    blas = str(np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"])
    if "openblas" in blas and "OPENBLAS_THREAD_TIMEOUT" not in os.environ and usable_cores() > 1:
        yield Finding(
            "note",
            "NumPy",
            "its products (OpenBLAS) keep all cores busy for some 20 ms after they are done:"
            " calls right after a product take up to twice as long",
            "set OPENBLAS_THREAD_TIMEOUT=4 before Python starts",
        )


def _instruction_set() -> Iterator[Finding]:
    from fastattn.kernels.host import HOST

    name, features = (os.environ.get(f"NUMBA_CPU_{each}") for each in ("NAME", "FEATURES"))
    found = f"{HOST.instruction_set} for {HOST.cpu}"
    if name is not None or features is not None:
        yield Finding(
            "warning",
            "instruction set",
            f"{found}, because NUMBA_CPU_NAME or NUMBA_CPU_FEATURES is set",
            "unset both, unless code for another CPU is wanted",
        )
    elif not HOST.fused:
        yield Finding(
            "note",
            "instruction set",
            f"{found}: without fused multiply-adds, at about half of the speed of AVX2",
            "if the CPU is newer than that, let the virtual machine pass its features on",
        )
    else:
        yield Finding("ok", "instruction set", found)


def _settings() -> Iterator[Finding]:
    for name, effect in _SLOW_SETTINGS.items():
        if name in os.environ:
            yield Finding("warning", name, f"{os.environ[name]!r} {effect}", f"unset {name}")


def _torch() -> Iterator[Finding]:
    import numba

    try:
        is_openmp = numba.threading_layer() == "omp"
    except ValueError:  # it cannot start, which has been said
        is_openmp = False
    if is_openmp and importlib.util.find_spec("torch") is not None:
        yield Finding(
            "note",
            "torch",
            "is some times as slow if imported after the first call of fastattn",
            "import torch before that",
        )
