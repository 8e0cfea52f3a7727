"""Threads that were asleep begin on cores of their own.

A thread that is woken may be put on the core of the thread that woke it, although another one has
nothing to do: in virtual machines that is the rule, because a core that sleeps looks as if
somebody else had it. It would wait there until the caller has done all of the work alone. So the
caller steps aside for a moment, and who finds itself on the caller's core leaves it.
"""

from __future__ import annotations

import sys

import numpy as np
from numba import types

from .compile import glue
from .simd.pointers import address, data, keep

# Integers with a bit for each core, as many as the C library has.
_WORDS = 1024 // 64

if sys.platform == "linux":
    _get_core = types.ExternalFunction("sched_getcpu", types.intc())
    _step_aside = types.ExternalFunction("sched_yield", types.intc())
    # Both of (thread, bytes, address of one bit for each core); thread 0 is the one that calls.
    _get_allowed, _set_allowed = (
        types.ExternalFunction(name, types.intc(types.intc, types.uintp, types.uintp))
        for name in ("sched_getaffinity", "sched_setaffinity")
    )

    @glue
    def core_in_use():
        """The number of the core that this runs on."""
        return _get_core()

    @glue
    def let_others_begin():
        """Let a thread run that waits for this core."""
        _step_aside()

    @glue
    def leave(core):
        """Go to any other core, if this runs on that one, and be free to be moved again."""
        if 0 <= core < _WORDS * 64 and _get_core() == core:
            allowed = np.zeros(_WORDS, np.int64)
            others = np.zeros(_WORDS, np.int64)
            size = _WORDS * 8
            _get_allowed(0, size, address(data(allowed)))
            for n in range(_WORDS):
                others[n] = allowed[n]
            others[core // 64] &= ~(np.int64(1) << core % 64)
            # Where no other core is allowed, nothing changes.
            if _set_allowed(0, size, address(data(others))) == 0:
                _set_allowed(0, size, address(data(allowed)))
            keep(allowed)
            keep(others)

else:

    @glue
    def core_in_use():
        """Nobody knows."""
        return 0

    @glue
    def let_others_begin():
        """Where it is not known to help, nobody steps aside."""

    @glue
    def leave(core):
        """Stay."""
