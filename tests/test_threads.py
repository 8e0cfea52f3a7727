"""Load: everything public from many threads at once, under every layer, beside others' threads."""

import asyncio
import ctypes
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
from checks import LAYERS, assert_same_bits, in_a_process, make_inputs, with_layer

import fastattn
from fastattn import runtime


def softer(score, b, h, i, j):
    return score * 0.5


def near(b, h, i, j):
    return abs(i - j) < 40


def arrays(seed, **sizes):
    return make_inputs(np.random.default_rng(seed), **{"seqlen_q": 90, "seqlen_kv": 90} | sizes)


def filled_cache(seed):
    _, key, value = arrays(seed)
    cache = fastattn.KVCache(2, 3, 20, 200)
    cache.append(key, value)
    return cache


def filled_pages(seed):
    _, key, value = (x[0].swapaxes(0, 1) for x in arrays(seed))
    cache = fastattn.PagedKVCache(8, 64, 3, 20)
    cache.append([cache.add()], key, value, [0, len(key)])
    return cache


def packed(seed):
    query, key, value = (x[0].swapaxes(0, 1) for x in arrays(seed))
    return fastattn.varlen_attention(query, key, value, [0, 30, 90])


def rotated(seed):
    return fastattn.apply_rotary(arrays(seed)[0], *fastattn.rotary_table(90, 20))


def layer_of(seed):
    rng = np.random.default_rng(seed)
    layer = fastattn.MultiHeadAttention(32, 4, rng=rng)
    return layer(rng.standard_normal((2, 70, 32), dtype=np.float32))


def merged(seed):
    query, key, value = arrays(seed)
    parts = [
        fastattn.attention(query, key[..., part, :], value[..., part, :], return_lse=True)
        for part in (slice(40), slice(40, 90))
    ]
    return fastattn.merge_states(*zip(*parts, strict=True))[0]


# One call of each kind, from a number alone. Most are work for several threads.
ENTRIES = {
    "attention": lambda n: fastattn.attention(*arrays(n), causal=True),
    "attention float64": lambda n: fastattn.attention(*arrays(n, dtype=np.float64)),
    "decode": lambda n: fastattn.attention(*arrays(n, seqlen_q=1, seqlen_kv=1500)),
    "bias": lambda n: fastattn.attention(*arrays(n), bias=np.eye(90), window=(20, 5)),
    "score_mod": lambda n: fastattn.attention(*arrays(n), score_mod=softer),
    "mask_mod": lambda n: fastattn.attention(*arrays(n), mask_mod=near),
    "create_block_mask": lambda n: fastattn.create_block_mask(near, 1, 1, 90, 90 + n).states,
    "scaled_dot_product_attention": lambda n: fastattn.scaled_dot_product_attention(*arrays(n)),
    "varlen_attention": packed,
    "attention_weights": lambda n: fastattn.attention_weights(*arrays(n)[:2]),
    "merge_states": merged,
    "KVCache": lambda n: filled_cache(n).attend(arrays(n)[0], causal=True),
    "PagedKVCache": lambda n: filled_pages(n).attend(arrays(n)[0][0, :, :1].swapaxes(0, 1), [0]),
    "MultiHeadAttention": layer_of,
    "apply_rotary": rotated,
    "sinusoidal_positions": lambda n: fastattn.sinusoidal_positions(90, 20, offset=n),
    "alibi_slopes": lambda n: fastattn.alibi_slopes(3 + n),
}


def call_everything(layer):
    """Call each entry from many threads at once, the first calls of a process; then one by one."""
    numba.set_num_threads(1)
    calls = [(name, n) for n in range(4) for name in ENTRIES]
    start = threading.Barrier(8)

    def call(k):
        if k < 8:
            start.wait()
        name, n = calls[k]
        return ENTRIES[name](n)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, range(len(calls))))
    assert numba.threading_layer() == layer
    for (name, n), result in zip(calls, results, strict=True):
        assert_same_bits(result, ENTRIES[name](n))
    assert numba.get_num_threads() == 1, "the caller's own number, for the caller's own loops"
    call_in_a_loop_of_numba()


def call_in_a_loop_of_numba():
    """Call from the threads of a prange of the caller's, where some layers cannot launch again."""
    inputs = arrays(0)
    expected = fastattn.attention(*inputs)
    results = [np.empty(0, np.float32)] * 8

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
    def call(n):
        results[n] = fastattn.attention(*inputs)
        return 0

    @numba.njit(parallel=True)
    def loop():
        for n in numba.prange(8):
            call(n)

    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    loop()
    for result in results:
        assert_same_bits(result, expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_entry_point_at_once(layer):
    in_a_process(call_everything, layer, **with_layer(layer))


# ---------------------------------------------------------------------------
# Inside what others start
# ---------------------------------------------------------------------------


def attend(seed):
    """Return the bytes of a call, as another process can send them."""
    return fastattn.attention(*arrays(seed)).tobytes()


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_joblib(backend):
    joblib = pytest.importorskip("joblib")
    expected = [attend(n) for n in range(4)]
    with joblib.Parallel(2, backend) as parallel:
        assert parallel(joblib.delayed(attend)(n) for n in range(4)) == expected


class Attended:
    """A data set whose items are results of attention."""

    def __len__(self):
        return 4

    def __getitem__(self, n):
        return attend(n)


def load_in_workers():
    """Let DataLoader fork its workers after the first call of this process."""
    from torch.utils.data import DataLoader

    expected = [attend(n) for n in range(4)]
    assert list(DataLoader(Attended(), batch_size=None, num_workers=2, timeout=60)) == expected


def test_torch_data_loader():
    pytest.importorskip("torch")
    in_a_process(load_in_workers)


def test_asyncio():
    """A server that answers on a few threads, and itself calls between them."""

    async def serve():
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(4) as pool:
            answers = [loop.run_in_executor(pool, attend, n % 4) for n in range(16)]
            mine = attend(0)
            return [mine, *await asyncio.gather(*answers)]

    assert asyncio.run(serve()) == [attend(0), *(attend(n % 4) for n in range(16))]


# ---------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------


def test_numbers_of_threads_outlive_errors():
    query, key, value = arrays(0)
    before = fastattn.get_num_threads(), numba.get_num_threads(), runtime.usable_threads()
    with pytest.raises(ValueError, match="softcap"):
        fastattn.attention(query, key, value, softcap=-1.0)
    with pytest.raises(ValueError, match="n must lie"):
        fastattn.set_num_threads(10**6)
    with pytest.raises(ValueError, match="key"), runtime.among_others():
        fastattn.attention(query, key[:, :2], value)
    after = fastattn.get_num_threads(), numba.get_num_threads(), runtime.usable_threads()
    assert after == before


# ---------------------------------------------------------------------------
# Caches that threads share
# ---------------------------------------------------------------------------


def test_many_readers_of_a_cache():
    """Nothing else is needed while nobody writes; who writes keeps the readers out."""
    cache, alone = filled_cache(0), filled_cache(0)
    query, key, value = arrays(1, seqlen_q=1, seqlen_kv=1)
    for _ in range(20):
        expected = [alone.attend(query * n, causal=True) for n in range(16)]
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda n: cache.attend(query * n, causal=True), range(16)))
        for result, each in zip(results, expected, strict=True):
            assert_same_bits(result, each)
        for each in (cache, alone):
            each.append(key, value)


def test_one_writer_beside_the_readers_of_pages():
    """Sequences come, share a prefix, grow and go, while others are read."""
    cache = fastattn.PagedKVCache(24, 16, 3, 20)
    rows = [x[0].swapaxes(0, 1) for x in arrays(2)]
    query, key, value = rows
    read = cache.add()
    cache.append([read], key, value, [0, 90])
    expected = cache.attend(query[:1], [read])
    is_done = threading.Event()

    def write():
        for n in range(150):
            mine = cache.add(share=read)  # 90 tokens: the last page is copied at the first write
            cache.append([mine], key[:40] * n, value[:40] * n, [0, 40])
            cache.append([mine], key[:1], value[:1])
            cache.free(mine)
        is_done.set()

    def look():
        count = 0
        while not is_done.is_set():
            assert_same_bits(cache.attend(query[:1], [read]), expected)
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(look) for _ in range(3)]
        pool.submit(write).result()
        assert all(each.result() > 0 for each in readers)
    assert cache.pages_free == 24 - 6


def test_readers_of_different_pages_at_once():
    """Calls of one shape differ in what they read: none may see another's lengths or pages."""
    cache = fastattn.PagedKVCache(64, 16, 3, 20)
    rng = np.random.default_rng(3)
    query = rng.standard_normal((1, 3, 20), dtype=np.float32)
    ids = [cache.add() for _ in range(4)]
    for each, length in zip(ids, (3, 60, 230, 600), strict=True):
        cache.append(
            [each], *rng.standard_normal((2, length, 3, 20), dtype=np.float32), [0, length]
        )
    expected = [cache.attend(query, [each], causal=True) for each in ids]

    def look(n):
        for _ in range(300):
            assert_same_bits(cache.attend(query, [ids[n]], causal=True), expected[n])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(look, range(4)))
    finally:
        sys.setswitchinterval(interval)
