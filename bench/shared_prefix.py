"""What sharing the pages of a common prefix saves in decoding.

`python -m bench.shared_prefix` decodes a token for each of 16 sequences, of which 4096 keys lie in
shared pages, and in turns for 16 that have a copy each. Bits must be equal.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

import fastattn
from fastattn.bench.machine import THREADS

SEQUENCES, PREFIX, OWN, PAGE_SIZE, ROUNDS = 16, 4096, 64, 64, 9

# Heads, kv heads, features and the type.
CASES = [
    ((8, 8, 64), "float32"),
    ((32, 8, 128), "float32"),
    ((32, 8, 128), "float16"),
    ((32, 8, 128), "int8"),
]


def sequences(
    num_kv_heads: int, head_dim: int, dtype: str, share: bool
) -> tuple[fastattn.PagedKVCache, list[int]]:
    """Return a cache and sequences in it, with the prefix shared or copied."""
    rng = np.random.default_rng(0)
    copies = 1 if share else SEQUENCES
    pages = copies * PREFIX // PAGE_SIZE + SEQUENCES * (OWN // PAGE_SIZE + 1)
    cache = fastattn.PagedKVCache(pages, PAGE_SIZE, num_kv_heads, head_dim, dtype=dtype)
    key, value = rng.standard_normal((2, PREFIX, num_kv_heads, head_dim), dtype=np.float32)
    prompts = [cache.add() for _ in range(copies)]
    for prompt in prompts:
        cache.append([prompt], key, value, [0, PREFIX])
    ids = [cache.add(share=prompts[0]) for _ in range(SEQUENCES)] if share else prompts
    rows = (2, SEQUENCES * OWN, num_kv_heads, head_dim)
    key, value = rng.standard_normal(rows, dtype=np.float32)
    cache.append(ids, key, value, np.arange(SEQUENCES + 1) * OWN)
    return cache, ids


def seconds(cache: fastattn.PagedKVCache, query: np.ndarray, ids: list[int]) -> float:
    """Return how long a call takes."""
    begin = time.perf_counter()
    cache.attend(query, ids)
    return time.perf_counter() - begin


def main() -> None:
    """Measure every case and print it."""
    fastattn.set_num_threads(THREADS)
    rng = np.random.default_rng(1)
    print(f"{SEQUENCES} sequences, {PREFIX} keys in common and {OWN} of each its own")
    for (num_heads, num_kv_heads, head_dim), dtype in CASES:
        query = rng.standard_normal((SEQUENCES, num_heads, head_dim), dtype=np.float32)
        query = query.astype("float32" if dtype == "int8" else dtype)
        ways = [sequences(num_kv_heads, head_dim, dtype, share) for share in (True, False)]
        outputs = [cache.attend(query, ids) for cache, ids in ways]
        assert outputs[0].tobytes() == outputs[1].tobytes()
        rounds = [[seconds(cache, query, ids) for cache, ids in ways] for _ in range(ROUNDS)]
        shared, copied = (statistics.median(times) for times in zip(*rounds, strict=True))
        print(
            f"{num_heads:3} heads on {num_kv_heads} of {head_dim}, {dtype:8}"
            f"{shared * 1e3:8.2f} ms shared{copied * 1e3:8.2f} ms copied{copied / shared:7.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
