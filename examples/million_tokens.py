"""Attention over a million tokens whose keys and values never exist at once.

    python examples/million_tokens.py
    python examples/million_tokens.py --context 4194304 --workers 8 --memory-limit "1 GiB"

The last queries of a long context attend to all of it, on a cluster of processes that together have
less memory than its keys and values take. A chunk of those is drawn from a seed by the worker that
needs it, where a real program would read it from a file, and forgotten when its part of the result
is done. Then the cost is worked out on paper for more machines, at the rate that was measured.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import dask.array as da
import numpy as np
from dask.utils import format_bytes, format_time, parse_bytes
from distributed import Client, LocalCluster, progress
from distributed.diagnostics import MemorySampler

import fastattn
from fastattn.integrations.dask import attention

ITEM = 4  # bytes of a float32
MACHINES = (1, 8, 64)


class Context(NamedTuple):
    """The shapes of a call: queries that attend to a context of which they are the end."""

    queries: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        return 2 * self.length * self.kv_heads * self.head_dim * ITEM

    @property
    def query_bytes(self) -> int:
        """Bytes of the queries, and of their states: an output and an lse for each."""
        return self.queries * self.heads * (2 * self.head_dim + 1) * ITEM

    @property
    def flops(self) -> int:
        """Two products of 2 * head_dim flops, for every key that every query sees."""
        hidden = self.queries * (self.queries - 1) // 2
        return 4 * self.head_dim * self.heads * (self.queries * self.length - hidden)


def draw(seed: int | list[int], shape: tuple[int, ...]) -> np.ndarray:
    """Return normal float32 numbers that depend on the seed alone."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def draw_chunk(seed: int, block_info: dict | None = None) -> np.ndarray:
    """Return the chunk of keys or values that dask asks for."""
    chunk = block_info[None]
    return draw([seed, *chunk["chunk-location"]], chunk["chunk-shape"])


def lazy(seed: int, context: Context, chunk: int) -> da.Array:
    """Return keys or values (1, kv_heads, length, head_dim), nothing of which is drawn yet."""
    shape = (1, context.kv_heads, context.length, context.head_dim)
    chunks = da.core.normalize_chunks((1, -1, chunk, -1), shape)
    return da.map_blocks(draw_chunk, seed, chunks=chunks, meta=np.empty((0,) * 4, np.float32))


def largest_difference(
    output: np.ndarray, query: np.ndarray, key: da.Array, value: da.Array
) -> float:
    """Return how far the last row is from attention in float64, chunk by chunk in this process."""
    last = query[:, :, -1:].astype(np.float64)
    states = [
        fastattn.attention(last, *da.compute(*pair), return_lse=True)
        for pair in zip(key.blocks.ravel(), value.blocks.ravel(), strict=True)
    ]
    expected, _ = fastattn.merge_states(*zip(*states, strict=True))
    return float(np.abs(output[:, :, -1:] - expected).max())


def print_paper(context: Context, rate: float, network: float) -> None:
    """Print what more machines would take, each of which has its share of everything."""
    print(f"{context.queries:,} queries of {context.length:,} keys: {context.flops:.1e} flops")
    for machines in MACHINES:
        # Either the queries visit the keys of all others and their states come back, or the keys
        # visit the queries of all others.
        moved = min(context.query_bytes, context.kv_bytes) * (machines - 1)
        print(
            f"  {machines:3} x {format_bytes(context.kv_bytes // machines):>10} of keys and values,"
            f" {format_bytes(moved):>9} to move in {format_time(moved / (machines * network)):>9},"
            f" {format_time(context.flops / (machines * rate)):>9} to compute"
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Attend to a context that does not fit memory.")
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--context", default=1 << 20, help="keys (default: 1048576)", **number)
    parser.add_argument("--queries", default=256, help="the last of them (default: 256)", **number)
    parser.add_argument("--heads", default=8, help="query heads (default: 8)", **number)
    parser.add_argument("--kv-heads", default=2, help="kv heads (default: 2)", **number)
    parser.add_argument("--head-dim", default=64, help="features of a head (default: 64)", **number)
    parser.add_argument(
        "--chunk", default=1 << 15, help="keys of a task (default: 32768)", **number
    )
    parser.add_argument("--workers", default=2, help="processes (default: 2)", **number)
    parser.add_argument(
        "--memory-limit", default="384 MiB", help="of each worker (default: 384 MiB)"
    )
    parser.add_argument(
        "--network", type=float, default=10, help="Gbit/s of a machine, on paper (default: 10)"
    )
    parser.add_argument("--check", action="store_true", help="compare a row with one process")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute, check and print; return the exit status."""
    options = parse(arguments)
    context = Context(
        options.queries, options.context, options.heads, options.kv_heads, options.head_dim
    )
    query = draw(0, (1, context.heads, context.queries, context.head_dim))
    key, value = (lazy(seed, context, options.chunk) for seed in (1, 2))
    output = attention(query, key, value, causal=True)

    limit = parse_bytes(options.memory_limit)
    print(
        f"{context.length:,} keys and values: {format_bytes(context.kv_bytes)} in "
        f"{key.npartitions} chunks, for {options.workers} workers of {format_bytes(limit)}"
    )
    sampler = MemorySampler()
    with (
        LocalCluster(
            n_workers=options.workers,
            threads_per_worker=1,
            memory_limit=limit,
            dashboard_address=None,
        ) as cluster,
        Client(cluster) as client,
    ):
        client.run(fastattn.warmup, ["float32"])
        with sampler.sample("run", interval=0.1):
            begin = time.perf_counter()
            future = client.compute(output)
            progress(future)
            result = future.result()
            seconds = time.perf_counter() - begin
    peak = max(nbytes for _, nbytes in sampler.samples["run"])
    rate = context.flops / seconds
    print(
        f"\n{result.shape} in {seconds:.1f} s, {rate / 1e9:.0f} GFLOP/s with the drawing; "
        f"all workers together never held more than {format_bytes(peak)}"
    )
    if options.check:
        print(f"last row: {largest_difference(result, query, key, value):.1e} from float64")

    print(f"\nOn paper, with this machine's rate and {options.network:g} Gbit/s for each:")
    network = options.network * 1e9 / 8
    print_paper(context, rate, network)
    print_paper(context._replace(queries=context.length), rate, network)
    return 0


if __name__ == "__main__":
    sys.exit(main())
