"""How much a call's memory grows beyond its inputs and output (T12). Linux only.

`python -m bench.memory` measures every variant, each in a process of its own;
`python -m bench.memory causal 4096` only this one, for so many tokens, in its own process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fastattn
from fastattn.bench.machine import THREADS
from fastattn.bench.providers import FASTATTN, NAIVE, naive_attention

SEQLEN = 16384
HEAD_DIM = 64
GOAL_BYTES = 16 << 20


def _padding(seqlen: int) -> np.ndarray:
    return np.arange(seqlen) < seqlen - 100


def _nearby(_b: int, _h: int, i: int, j: int) -> bool:
    return abs(i - j) < 1000


def _tilted(score: float, _b: int, _h: int, i: int, j: int) -> float:
    return score - 0.01 * abs(i - j)


# Variants whose own arrays are small: the point is what the call allocates, not the caller. Each is
# the keywords for so many tokens.
VARIANTS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "plain": ("float32", lambda _: {}),
    "causal": ("float32", lambda _: {"causal": True}),
    "key padding": ("float32", lambda n: {"mask": _padding(n)}),
    "bias": (
        "float32",
        lambda n: {"bias": np.where(_padding(n), 0.5, -np.inf).astype(np.float32)},
    ),
    "kv_lengths": ("float32", lambda n: {"kv_lengths": n - 100}),
    "lse": ("float32", lambda _: {"return_lse": True}),
    "window": ("float32", lambda _: {"window": (255, 0)}),
    "softcap": ("float32", lambda _: {"softcap": 30.0}),
    "alibi": ("float32", lambda _: {"alibi_slopes": [0.25]}),
    "sinks": ("float32", lambda _: {"sinks": [1.0]}),
    "score_mod": ("float32", lambda _: {"score_mod": _tilted}),
    "mask_mod": ("float32", lambda _: {"mask_mod": _nearby}),
    "block mask": (
        "float32",
        lambda n: {"block_mask": fastattn.create_block_mask(_nearby, 1, 1, n, n)},
    ),
    "float16": ("float16", lambda _: {}),
    "float64": ("float64", lambda _: {}),
}


# The variant that is not fastattn, for comparison: NumPy's products and a matrix of scores.
TEXTBOOK = "textbook"

# By length, the scores of the textbook grow to a gigabyte.
LENGTHS = (1024, 2048, 4096, 8192, 16384)


def can_measure() -> bool:
    """Whether this system lets a process start a new count of its peak memory."""
    return Path("/proc/self/clear_refs").exists()


def measure_by_length() -> dict[str, list[int]]:
    """Return the growth for each of the lengths, of fastattn and of the textbook."""
    return {
        name: [measure_growth(variant, seqlen) for seqlen in LENGTHS]
        for name, variant in ((FASTATTN.name, "plain"), (NAIVE.name, TEXTBOOK))
    }


def measure_growth(variant: str, seqlen: int = SEQLEN) -> int:
    """Return by how many bytes the peak of a process of its own exceeds what it had before."""
    finished = subprocess.run(
        [sys.executable, "-m", "bench.memory", variant, str(seqlen)],
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(finished.stdout)


def growth_here(variant: str, seqlen: int) -> int:
    """Measure in this process, which must not have peaked higher for anything else since."""
    dtype, keywords_for = VARIANTS.get(variant, VARIANTS["plain"])
    fastattn.set_num_threads(THREADS)
    rng = np.random.default_rng(12)
    query, key, value = rng.standard_normal((3, 1, 1, seqlen, HEAD_DIM)).astype(dtype)
    out = np.ones_like(query)

    def call(length: int, keywords: dict[str, Any]) -> None:
        q, k, v, to = (each[..., :length, :] for each in (query, key, value, out))
        if variant == TEXTBOOK:
            to[:] = naive_attention(q, k, v, None, None)
        else:
            fastattn.attention(q, k, v, out=to, **keywords)

    # Compiling and starting threads take memory too, but once. A small call of the same kind
    # has done both.
    small = 256
    call(small, keywords_for(small))
    keywords = keywords_for(seqlen)

    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call(seqlen, keywords)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kibibytes) << 10


def main() -> None:
    """Print the growth of every variant, or only the number for the one that is named."""
    if len(sys.argv) > 1:
        variant, seqlen = sys.argv[1:]
        print(growth_here(variant, int(seqlen)))
        return
    for variant in VARIANTS:
        print(f"{variant:14}{measure_growth(variant) / 2**20:8.2f} MiB")


if __name__ == "__main__":
    main()
