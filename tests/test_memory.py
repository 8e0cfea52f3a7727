"""Memory: none is left behind by a call, too little is a MemoryError, and much can be addressed."""

import gc
import itertools
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from checks import assert_same_bits, in_a_process, make_inputs

import fastattn

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, as Linux has")


def memory_of_process():
    """Return the bytes of addresses of this process, and those that are in memory."""
    pages = Path("/proc/self/statm").read_text().split()[:2]
    return tuple(int(n) * os.sysconf("SC_PAGE_SIZE") for n in pages)


# ---------------------------------------------------------------------------
# Growth
# ---------------------------------------------------------------------------

CALLS = 10_000
ALLOWED = 64  # bytes for each call: less than any object that one would leave behind
ALLOWED_RESIDENT = 8 << 20  # for allocators that divide what they have: 0.8 KB for each call


def all_kinds():
    """Return calls of every kind that are over soon: on one thread and two, good and bad."""
    rng = np.random.default_rng(0)
    query, key, value = make_inputs(rng, batch=(1,), heads=2, seqlen_q=3, head_dim=8)
    large = make_inputs(rng, batch=(1,), heads=2, seqlen_q=70, seqlen_kv=70)
    out = np.empty_like(query)
    mask = np.ones((3, 7), bool)
    cache = fastattn.KVCache(1, 2, 8, 16, window=8)
    pages = fastattn.PagedKVCache(4, 16, 2, 8)
    packed = [x[0].swapaxes(0, 1) for x in (query, key, value)]
    lengths = itertools.cycle(range(1, 8))

    def decode():
        cache.append(key[..., :1, :], value[..., :1, :])
        cache.attend(query[..., :1, :])

    def serve():
        mine = pages.add()
        pages.append([mine], packed[1], packed[2], [0, 7])
        pages.attend(packed[0], [mine], [0, 3], causal=True)
        pages.free(mine)

    def refused():
        with pytest.raises(ValueError, match="key"):
            fastattn.attention(query, key[..., :5], value)

    return [
        lambda: fastattn.attention(query, key, value, return_lse=True),
        lambda: fastattn.attention(query, key, value, mask=mask, bias=np.eye(3, 7), out=out),
        lambda: fastattn.attention(query, key, value, kv_lengths=next(lengths), window=(2, 0)),
        lambda: fastattn.attention(*large, causal=True),
        lambda: fastattn.varlen_attention(*packed, [0, 1, 3], [0, 5, 7]),
        lambda: fastattn.attention_weights(query, key),
        decode,
        serve,
        refused,
    ]


def growth_over_calls():
    calls = all_kinds()
    for n in range(2000):  # whatever is remembered for good is, and allocators have settled
        calls[n % len(calls)]()
    gc.collect()
    tracemalloc.start()
    begin, begin_resident = tracemalloc.get_traced_memory()[0], memory_of_process()[1]
    for n in range(CALLS):
        calls[n % len(calls)]()
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - begin
    assert grown < ALLOWED * CALLS, f"{grown / CALLS:.0f} bytes for each call"
    grown = memory_of_process()[1] - begin_resident
    assert grown < ALLOWED_RESIDENT, f"{grown / CALLS:.0f} resident bytes for each call"


@LINUX
def test_calls_leave_nothing_behind():
    in_a_process(growth_over_calls)


# ---------------------------------------------------------------------------
# Too little
# ---------------------------------------------------------------------------


def run_out():
    """Let kernels, then Python, ask for more than there is; then call as if nothing had been."""
    import resource

    large = make_inputs(np.random.default_rng(0), seqlen_q=130, seqlen_kv=130, head_dim=32)
    expected = fastattn.attention(*large)
    decoded = fastattn.attention(large[0][:, :, :1], *large[1:])
    # Scratch grows with head_dim alone; few queries are on one thread, or are decoded.
    calls = []
    for seqlen_q, features in ((40, 400_000), (9, 400_000), (1, 400_000)):
        x = np.ones((1, 1, seqlen_q, features), np.float32)
        calls.append((x, np.empty_like(x)))
    for threads in (1, 2):
        fastattn.set_num_threads(threads)
        limit = memory_of_process()[0] + (64 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        for x, out in calls:
            with pytest.raises(MemoryError):
                fastattn.attention(x, x[..., :1, :], x[..., :1, :], out=out)
        x = np.broadcast_to(np.float32(1), (1, 1, 40, 1 << 22))
        with pytest.raises(MemoryError):
            fastattn.attention(x, x, x)
        with pytest.raises(MemoryError):
            fastattn.attention_weights(*np.broadcast_to(np.float32(1), (2, 1, 1 << 14, 2)))
        with pytest.raises(MemoryError):
            fastattn.KVCache(1, 1, 1 << 14, 1 << 14)
        assert_same_bits(fastattn.attention(*large), expected)
        assert_same_bits(fastattn.attention(large[0][:, :, :1], *large[1:]), decoded)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    for x, out in calls:
        fastattn.attention(x, x[..., :1, :], x[..., :1, :], out=out)
        np.testing.assert_array_equal(out, 1)


@LINUX
def test_too_little_is_a_memory_error():
    in_a_process(run_out, NUMBA_NUM_THREADS="2")


# ---------------------------------------------------------------------------
# Much
# ---------------------------------------------------------------------------

MANY = (1 << 31) // 64 + 65  # keys of 64 features, so that the last ones lie behind element 2**31


def test_more_elements_than_an_int32_counts(rng):
    """By strides of zero: the sums, and the numbers of keys, are those of so many."""
    query, key, value = make_inputs(
        rng, batch=(1,), heads=1, seqlen_q=1, seqlen_kv=1, head_dim=64, dtype=np.float64
    )
    many = [np.broadcast_to(x, (1, 1, MANY, 64)) for x in (key, value)]
    assert many[0].size > 1 << 31
    output, lse = fastattn.attention(query, *many, return_lse=True)
    # Sums of 512 terms, and then of so many of them.
    off = (MANY / 512 + 512) * np.finfo(np.float64).eps
    np.testing.assert_allclose(output, value, rtol=2 * off)
    score = (query * key).sum(axis=-1) / 8
    np.testing.assert_allclose(lse, score + np.log(MANY), rtol=off)


@LINUX
def test_addresses_behind_two_to_the_31(rng):
    """Of pages that nobody has written, and which therefore take none: only the last key is set."""
    try:
        keys = np.zeros((1, 1, MANY, 64), np.float16)
    except MemoryError:
        pytest.skip("4 GB of addresses are more than there may be here")
    keys[..., -1, :] = 40
    query = np.ones((1, 1, 2, 64), np.float16)
    # A weight of exp(320) beside 33 million of 1.
    np.testing.assert_array_equal(fastattn.attention(query, keys, keys), 40 * query)
    rows = fastattn.attention_weights(query, keys[..., -70:, :])
    np.testing.assert_array_equal(rows[..., -1], 1)
