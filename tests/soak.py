"""Serve mixed requests from several processes and threads for some minutes, and say how it went.

Prompts, tokens from caches that live on, packed batches, masks, bad requests: what a server gets,
in any order. Every answer must have the bits that it had the first time. Run by hand:

    .venv/bin/python tests/soak.py 30 --processes 2 --threads 3

It ends with the requests of each kind and second, percentiles of their latency, and the memory of
each process at the start and at the end; and with status 1 if an answer was wrong, a process ended,
or memory grew.
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import sys
import threading
import time
from array import array
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np

import fastattn

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
CAPACITY = 512
PERCENTILES = (50, 90, 99, 99.9, 100)
ALLOWED_GROWTH = 0.10  # of the resident memory when everything has been called once
SETTLING = 0.1  # of the time, at most 30 seconds, after which memory is read for the first time


def shown(b, h, i, j):
    return (i - j) % 7 != 3


@cache
def inputs(seed, seqlen_q, seqlen_kv, dtype=np.float32):
    rng = np.random.default_rng(seed)
    heads = ((HEADS, seqlen_q), (KV_HEADS, seqlen_kv), (KV_HEADS, seqlen_kv))
    return [rng.standard_normal((1, *each, HEAD_DIM)).astype(dtype) for each in heads]


class Requests:
    """What one thread serves: each returns its name and its output.

    Its caches are its own, but for the pages, which all threads read.
    """

    def __init__(self, seed, pages, shared):
        self.random = random.Random(seed)
        self.pages, self.shared = pages, shared
        self.lock = pages.lock
        self.expected = {}
        self.cache = fastattn.KVCache(1, KV_HEADS, HEAD_DIM, CAPACITY)
        self.small = None

    def check(self, name, output):
        """Assert that a request gives the bits that it gave the first time."""
        assert np.isfinite(output).all(), f"{name} gives NaN or Inf"
        digest = hashlib.sha256(np.ascontiguousarray(output)).digest()
        assert self.expected.setdefault(name, digest) == digest, f"{name} gives other bits"

    def prefill(self):
        length, causal = self.random.choice((33, 128, 500, 1000)), self.random.random() < 0.5
        dtype = self.random.choice((np.float32, np.float32, np.float16, np.float64))
        arrays = inputs(length, length, length, dtype)
        output = fastattn.attention(*arrays, causal=causal)
        return ("prefill", length, causal, dtype), output

    def decode(self):
        if self.cache.lengths[0] == CAPACITY:
            self.cache.truncate(0)
        position = int(self.cache.lengths[0])
        query, key, value = inputs(position, 1, 1)
        self.cache.append(key, value)
        return ("decode", position), self.cache.attend(query, causal=True)

    def quantised(self):
        if self.small is None or self.small.positions[0] == CAPACITY:
            self.small = fastattn.KVCache(
                1, KV_HEADS, HEAD_DIM, CAPACITY // 2, window=200, dtype=np.int8
            )
        position = int(self.small.positions[0])
        query, key, value = inputs(position, 1, 1)
        self.small.append(key, value)
        return ("quantised", position), self.small.attend(query)

    def paged(self):
        query, key, value = (x[0].swapaxes(0, 1) for x in inputs(0, 3, 40))
        with self.lock:
            mine = self.pages.add(share=self.shared)
            self.pages.append([mine], key, value, [0, 40])
        output = self.pages.attend(query, [mine], [0, 3], causal=True)
        with self.lock:
            self.pages.free(mine)
        return "paged", output

    def packed(self):
        lengths = self.random.choice(((5, 300, 1), (90, 90), (1, 1, 1, 700)))
        starts = np.cumsum([0, *lengths])
        arrays = [x[0].swapaxes(0, 1) for x in inputs(1, starts[-1], starts[-1])]
        output = fastattn.varlen_attention(*arrays, starts, causal=True)
        return ("packed", lengths), output

    def variant(self):
        arrays = inputs(2, 200, 300)
        kind = self.random.choice(("mask", "bias", "mask_mod", "softcap", "window"))
        keywords = {
            "mask": {"mask": np.arange(300) % 5 > 0},
            "bias": {"bias": np.linspace(-1, 1, 300)},
            "mask_mod": {"mask_mod": shown},
            "softcap": {"softcap": 20.0, "sinks": np.zeros(HEADS)},
            "window": {"window": (50, 0), "alibi_slopes": fastattn.alibi_slopes(HEADS)},
        }[kind]
        return ("variant", kind), fastattn.attention(*arrays, **keywords)

    def refused(self):
        query, key, value = inputs(3, 4, 9)
        bad = self.random.choice(
            (
                ((query, key[..., :8], value), {}),
                ((query, key, value[:, :, :3]), {}),
                ((query, key, value.astype(complex)), {}),
                ((query, key, value), {"scale": float("nan")}),
                ((query, key, value), {"kv_lengths": 99}),
                ((query, key, value), {"causal": "sideways"}),
            )
        )
        try:
            fastattn.attention(*bad[0], **bad[1])
        except (TypeError, ValueError):
            return "refused", np.zeros(0)
        raise AssertionError(f"nothing was said against {bad[1]}")

    def draw(self):
        """Return a request: mostly tokens, as servers see it."""
        kinds = ("decode", "quantised", "prefill", "paged", "packed", "variant", "refused")
        return self.random.choices(kinds, (40, 10, 10, 15, 10, 10, 5))[0]


def resident():
    """Return the bytes of this process that are in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def serve(seed, threads, seconds, answers):
    """Serve from several threads of this process until the time is over."""
    pages = fastattn.PagedKVCache(8 * threads, 64, KV_HEADS, HEAD_DIM)
    pages.lock = threading.Lock()  # one writer at a time; readers need none
    shared = pages.add()
    key, value = (x[0].swapaxes(0, 1) for x in inputs(4, 1, 100)[1:])
    pages.append([shared], key, value, [0, 100])
    begin = time.monotonic()
    latencies = [defaultdict(partial(array, "d")) for _ in range(threads)]

    def serve_on_one(n):
        requests = Requests(seed * threads + n, pages, shared)
        while time.monotonic() - begin < seconds:
            kind = requests.draw()
            start = time.perf_counter()
            name, output = getattr(requests, kind)()
            latencies[n][kind].append(time.perf_counter() - start)
            requests.check(name, output)

    with ThreadPoolExecutor(threads) as pool:
        serving = [pool.submit(serve_on_one, n) for n in range(threads)]
        time.sleep(min(30, SETTLING * seconds))
        memory_at_start = resident()
        for each in serving:
            each.result()
    # What the script itself keeps is not the library's.
    kept = sum(times.itemsize * len(times) for each in latencies for times in each.values())
    answers.put((latencies, memory_at_start, resident() - kept))


def report(answers, seconds):
    """Print what happened, and return whether memory stayed where it was."""
    print(f"{'':10} {'requests':>9} {'a second':>9}", *(f"{f'p{p}':>9}" for p in PERCENTILES), "ms")
    latencies = [each for of_process, _, _ in answers for each in of_process]
    for kind in sorted({kind for each in latencies for kind in each}):
        times = np.concatenate([each[kind] for each in latencies]) * 1000
        shares = (f"{each:9.3f}" for each in np.percentile(times, PERCENTILES))
        print(f"{kind:10} {len(times):9} {len(times) / seconds:9.1f}", *shares)
    total = sum(len(times) for each in latencies for times in each.values())
    print(f"{'all':10} {total:9} {total / seconds:9.1f}")
    stayed = True
    for n, (_, begin, end) in enumerate(answers):
        print(f"process {n}: {begin / 2**20:.1f} MiB, then {end / 2**20:.1f} MiB")
        stayed &= end < begin * (1 + ALLOWED_GROWTH)
    return stayed


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("minutes", type=float)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=3)
    options = parser.parse_args()
    seconds = options.minutes * 60
    fastattn.warmup(progress=False)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=serve, args=(n, options.threads, seconds, answers))
        for n in range(options.processes)
    ]
    for each in processes:
        each.start()
    found = []
    while len(found) < len(processes):
        try:
            found.append(answers.get(timeout=1))
        except Exception:  # nothing yet
            if any(each.exitcode for each in processes):
                break
    for each in processes:
        each.join()
    failed = [each.exitcode for each in processes if each.exitcode]
    fastattn.show_versions()
    stayed = bool(found) and report(found, seconds)
    print("every answer was right" if not failed else f"processes ended with {failed}")
    if not stayed:
        print(f"memory grew by more than {ALLOWED_GROWTH:.0%}")
    return 1 if failed or not stayed else 0


if __name__ == "__main__":
    sys.exit(main())
