"""How the kernels are compiled: each decision about Numba once, with its reason.

Numba compiles a jitted function once more inside every function that calls it. With the
loops of a kernel three calls deep that took four fifths of the compile time. Loops are
therefore C functions, compiled once and called by their symbol (``routine``); only the
thin layer between them is made of ordinary jitted functions (``glue``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from numba import njit, types
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

from .code_cache import keep

# Only what keeps NaN and Inf meaningful: masks are -inf and NaN must reach the output. "contract"
# fuses a product with the sum behind it; nothing may reorder sums, so that bits stay the same.
_FLAGS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "nsz", "arcp"}}

# C functions live as long as the process: other code holds their addresses.
_compiled: dict[str, CFunc] = {}


def _c_function(
    name: str, signature: Any, function: Callable[..., Any], *, kept: bool = True
) -> CFunc:
    # Symbols are made of the qualified name and a number that the next process gives to another
    # function: code from disk must not answer to the name of new code.
    function.__qualname__ = name
    compiled = CFunc(function, normalize_signature(signature), locals={}, options=dict(_FLAGS))
    if kept:
        keep(compiled, function, name)
    compiled.compile()
    _compiled[name] = compiled
    return compiled


def routine(signature: Any, *variant: Any) -> Callable[[Callable[..., Any]], Any]:
    """A loop over tiles or rows: a C function that other compiled code calls by its symbol.

    ``variant`` tells apart the functions that one closure makes.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        name = "_".join(["fastattn", function.__name__, *map(str, variant)])
        compiled = _c_function(name, signature, function)
        llvm.add_symbol(name, compiled.address)
        return types.ExternalFunction(name, signature)

    return decorate


def kernel(*variant: Any, kept: bool = True) -> Callable[[Callable[..., Any]], int]:
    """A whole kernel: the address of a C function of the address of its problem."""

    def decorate(function: Callable[..., Any]) -> int:
        name = "_".join(["fastattn", function.__name__, *map(str, variant)])
        compiled = _c_function(name, types.void(types.int64), function, kept=kept)
        assert compiled.address is not None  # it has been compiled
        return compiled.address

    return decorate


def glue(function: Callable[..., Any]) -> Any:
    """A thin part of a kernel, compiled into what calls it."""
    return njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_FLAGS)(function)


def foreign(function: Callable[..., Any]) -> Any:
    """A function that somebody else wrote, compiled into what calls it.

    Without counting references: its arrays outlive it, and a count for every score, which no other
    core may change meanwhile, takes twenty times as long as the function. It cannot allocate.
    """
    return njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False, **_FLAGS)(function)


def inline(function: Callable[..., Any]) -> Any:
    """A few lines that Numba copies into a short caller, not compiled by themselves."""
    return njit(inline="always", **_FLAGS)(function)


def entry(signature: Any, *variant: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A function that Python calls; it lets other Python threads run meanwhile.

    Compiled, or loaded, when it is defined, for its signature alone.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(nogil=True, **_FLAGS, **options)(function)
        keep(dispatcher, function, "_".join(["fastattn", function.__name__, *map(str, variant)]))
        dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return decorate
