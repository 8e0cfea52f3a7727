"""How much a call's memory grows beyond its inputs and output (T12). Linux only.

`python -m bench.memory` measures every variant, each in a process of its own;
`python -m bench.memory causal` only this one, in its own process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import fastattn

from .machine import THREADS

SEQLEN = 16384
HEAD_DIM = 64
GOAL_BYTES = 16 << 20

_PADDING = np.arange(SEQLEN) < SEQLEN - 100

# Variants whose own arrays are small: the point is what the call allocates, not the caller.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("float32", {}),
    "causal": ("float32", {"causal": True}),
    "key padding": ("float32", {"mask": _PADDING}),
    "bias": ("float32", {"bias": np.where(_PADDING, 0.5, -np.inf).astype(np.float32)}),
    "kv_lengths": ("float32", {"kv_lengths": SEQLEN - 100}),
    "lse": ("float32", {"return_lse": True}),
    "float16": ("float16", {}),
    "float64": ("float64", {}),
}


def can_measure() -> bool:
    """Whether this system lets a process start a new count of its peak memory."""
    return Path("/proc/self/clear_refs").exists()


def measure_growth(variant: str) -> int:
    """Return by how many bytes the peak of a process of its own exceeds what it had before."""
    finished = subprocess.run(
        [sys.executable, "-m", "bench.memory", variant],
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(finished.stdout)


def growth_here(variant: str) -> int:
    """Measure in this process, which must not have peaked higher for anything else since."""
    dtype, keywords = VARIANTS[variant]
    fastattn.set_num_threads(THREADS)
    rng = np.random.default_rng(12)
    query, key, value = rng.standard_normal((3, 1, 1, SEQLEN, HEAD_DIM)).astype(dtype)
    out = np.ones_like(query)

    # Compiling and starting threads take memory too, but once. A small call of the same kind
    # has done both.
    small = slice(0, 256)
    shorter: dict[str, Any] = {
        name: each[small] if isinstance(each, np.ndarray) else each
        for name, each in keywords.items()
    }
    if "kv_lengths" in shorter:
        shorter["kv_lengths"] = 200
    fastattn.attention(*(each[..., small, :] for each in (query, key, value)), **shorter)

    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    fastattn.attention(query, key, value, out=out, **keywords)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kibibytes) << 10


def main() -> None:
    """Print the growth of every variant, or only the number for the one that is named."""
    if len(sys.argv) > 1:
        print(growth_here(sys.argv[1]))
        return
    for variant in VARIANTS:
        print(f"{variant:14}{measure_growth(variant) / 2**20:8.2f} MiB")


if __name__ == "__main__":
    main()
