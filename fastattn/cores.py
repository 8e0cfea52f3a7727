"""How many cores this process gets: as the system counts them, and as a container's quota does."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cores() -> int:
    """Return how many CPUs this process may use at the same time."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, math.ceil(min(count, cgroup_quota())))


def cgroup_quota(
    groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> float:
    """Return how many CPUs' time the control groups of this process allow; infinite without limit.

    The arguments are where Linux says which groups these are, and what their limits are.
    """
    limits = [_quota(_words(mounted / "cpu/cpu.cfs_quota_us", mounted / "cpu/cpu.cfs_period_us"))]
    for line in _lines(groups):
        # Version 2 has one hierarchy, and a group is held to the limits of all above it as well.
        number, _, name = line.split(":", 2)
        if number == "0":
            group = mounted / name.lstrip("/")
            limits += [_quota(_words(path / "cpu.max")) for path in (group, *group.parents)]
    return min(limits)


def _quota(words: list[str]) -> float:
    """Return quota / period; without a limit, version 2 says max and version 1 says -1."""
    if len(words) == 2 and all(word.isdecimal() and int(word) > 0 for word in words):
        return int(words[0]) / int(words[1])
    return math.inf


def _words(*paths: Path) -> list[str]:
    return [word for path in paths for line in _lines(path) for word in line.split()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
