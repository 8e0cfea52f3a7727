"""The part of the machine that everyone is measured on: so many cores, and no more.

Every library has a switch for its number of threads, and some have none that works. So the
process is also tied to that many CPUs, where the system can: no library gets more than its
share, whatever its switch says.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

# Two cores are what continuous integration and small servers have.
THREADS = int(os.environ.get("FASTATTN_BENCH_THREADS", "2"))


@cache
def cpus() -> tuple[int, ...]:
    """Return the CPUs to measure on: of two that share a core, one."""
    if not hasattr(os, "sched_getaffinity"):
        return tuple(range(THREADS))
    chosen: dict[str, int] = {}
    allowed = sorted(os.sched_getaffinity(0))
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = siblings.read_text() if siblings.exists() else str(cpu)
        chosen.setdefault(core, cpu)
    # Fewer cores than threads: their second halves will have to do.
    rest = [cpu for cpu in allowed if cpu not in chosen.values()]
    return tuple([*chosen.values(), *rest][:THREADS])


def settings(threads: int) -> dict[str, str]:
    """Return the environment of a process in which every library has so many threads."""
    libraries = ("OMP", "OPENBLAS", "MKL", "VECLIB", "NUMBA")
    names = ["FASTATTN_BENCH_THREADS", *(f"{library}_NUM_THREADS" for library in libraries)]
    return dict.fromkeys(names, str(threads))


def limit_threads() -> None:
    """Hold this process, whatever it imports later, and its children to THREADS threads."""
    os.environ.update(settings(THREADS))
    tie_to(cpus())


def tie_to(these: Iterable[int]) -> None:
    """Hold the calling thread, and those that it will start, to some CPUs, where a system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, these)


def available_bytes() -> float:
    """Return how much memory new arrays may take; infinite where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024.0
    return math.inf
