"""Numba is imported, and code compiled or loaded, by one thread at a time.

Two that need the same do not make it twice. And who forks waits for it: a child has one thread, and
would wait for ever for locks of Numba, or of a module half imported, that another one held.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

_loading = threading.RLock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_loading.acquire,
        after_in_parent=_loading.release,
        after_in_child=_loading.release,
    )


def loads(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate what imports Numba, or what is built on it, and what compiles."""

    @wraps(function)
    def alone(*args: _P.args, **keywords: _P.kwargs) -> _R:
        with _loading:
            return function(*args, **keywords)

    return alone
