"""What a caller's function compiles to, as a digest: under it the code can be kept on disk.

Numba reads more than the function's own text: constants, what its closure holds, and the globals
that it names, jitted functions among them. All of that goes into the digest. What has no lasting
name (an object of the caller's, a module that may change) makes a function that is compiled in
memory only: slower in the next process, never wrong.
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

# Modules whose functions and constants are those of a version that is part of the cache's key.
_KNOWN_MODULES = ("builtins", "math", "cmath", "operator", "numba", "numpy")

# Arrays are frozen into the code; from this size Numba leaves an address in it.
_MOST_BYTES = 1_000_000


class _UnknownError(Exception):
    """Something whose meaning in another process nobody knows."""


def fingerprint(function: types.FunctionType) -> str | None:
    """Return a digest of what a Python function compiles to, or None where there is none."""
    try:
        description = repr((sys.version_info, _describe(function, ())))
    except _UnknownError:
        return None
    return hashlib.sha256(description.encode()).hexdigest()[:32]


def globals_of(function: types.FunctionType) -> dict[str, Any]:
    """Return the globals that a function, or one defined in it, names."""
    known = function.__globals__
    return {name: known[name] for name in _names(function.__code__) if name in known}


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _describe(value: Any, outer: tuple[Any, ...]) -> Any:
    """Return nested tuples of strings and numbers; ``outer`` are functions being described."""
    kind = type(value).__name__
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return kind, repr(value)
    if isinstance(value, tuple | frozenset):
        parts = [_describe(each, outer) for each in value]
        return kind, sorted(parts, key=repr) if isinstance(value, frozenset) else parts
    if isinstance(value, np.generic):
        return kind, value.dtype.str, value.tobytes()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" and value.nbytes < _MOST_BYTES:
        order = value.flags.c_contiguous, value.flags.f_contiguous, value.flags.writeable
        return kind, value.dtype.str, value.shape, order, value.tobytes()
    if isinstance(value, types.CodeType):
        return _describe_code(value, outer)
    if isinstance(value, types.FunctionType):
        if value in outer:
            return kind, outer.index(value)
        outer = (*outer, value)
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        named = sorted(globals_of(value).items())
        read = (value.__code__, value.__defaults__, *held, *(each for _, each in named))
        return kind, [name for name, _ in named], [_describe(each, outer) for each in read]
    if hasattr(value, "py_func") and hasattr(value, "targetoptions"):
        return kind, repr(sorted(value.targetoptions.items())), _describe(value.py_func, outer)
    return kind, _lasting_name(value)


def _describe_code(code: types.CodeType, outer: tuple[Any, ...]) -> Any:
    constants = [_describe(each, outer) for each in code.co_consts]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return code.co_code, constants, names, code.co_argcount, code.co_flags


def _lasting_name(value: Any) -> str:
    """Return the name of a module, or of what one of the known modules calls so."""
    name = str(getattr(value, "__name__", ""))
    if isinstance(value, types.ModuleType):
        module, is_there = name, True
    else:
        # A ufunc of NumPy knows no module.
        module = getattr(value, "__module__", None) or "numpy"
        is_there = getattr(sys.modules.get(module), name, None) is value
    if is_there and module.partition(".")[0] in _KNOWN_MODULES:
        return f"{module}.{name}"
    raise _UnknownError
