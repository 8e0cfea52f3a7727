"""Every way to become several processes: each child gives right results, and none hangs.

What is forked has one thread, the one that forked, and whatever the others held.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
from checks import LAYERS, TIMEOUT, in_a_process, make_inputs, with_layer

import fastattn
from fastattn.runtime import usable_threads

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


def attend(seed, dtype=np.float32):
    inputs = make_inputs(
        np.random.default_rng(seed), seqlen_q=130, seqlen_kv=130, head_dim=32, dtype=dtype
    )
    return hashlib.sha256(fastattn.attention(*inputs)).hexdigest()


def assert_child_is_right(seed, expected, dtype=np.float32, threads=None):
    """Fork, and call in the child, which has so many threads."""
    child = os.fork()
    if child == 0:
        signal.alarm(TIMEOUT // 4)  # a child that hangs would keep the pipes open
        is_right = attend(seed, dtype) == expected and threads in (None, usable_threads())
        os._exit(0 if is_right else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, "the child has failed, died or hung"


def fork_before_first_use():
    """As servers do that import first and fork then; and children of children."""
    results = multiprocessing.SimpleQueue()
    children = [os.fork()]
    if children[0] == 0:
        signal.alarm(TIMEOUT // 4)
        expected = attend(0)
        assert_child_is_right(0, expected)
        results.put(expected)
        os._exit(0)
    assert os.waitpid(children[0], 0)[1] == 0
    assert results.get() == attend(0)


@pytest.mark.parametrize("layer", LAYERS)
def test_fork_before_first_use(layer):
    in_a_process(fork_before_first_use, **with_layer(layer))


def fork_beside_the_first_use():
    """Fork while another thread imports Numba and loads or compiles code, which takes a second."""
    others = [threading.Thread(target=attend, args=(0, each)) for each in (np.float32, np.float64)]
    for each in others:
        each.start()
    for _ in range(2):
        time.sleep(0.1)
        child = os.fork()
        if child == 0:
            signal.alarm(TIMEOUT // 4)
            attend(0)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, "the child has failed, died or hung"
    for each in others:
        each.join()


def test_fork_beside_the_first_use():
    in_a_process(fork_beside_the_first_use)


def fork_among_threads(layer):
    """Fork again and again while other threads call, and while one compiles, or loads, code."""
    expected = attend(0)
    is_done = threading.Event()

    def keep_calling():
        while not is_done.is_set():
            assert attend(0) == expected

    others = [threading.Thread(target=keep_calling) for _ in range(2)]
    others.append(threading.Thread(target=attend, args=(0, np.float64)))
    for each in others:
        each.start()
    time.sleep(0.1)
    try:
        for _ in range(10):
            # Under OpenMP always, under TBB as it comes, a child would hang with more than one.
            assert_child_is_right(0, expected, threads=2 if layer == "workqueue" else 1)
        others[-1].join()
        of_doubles = attend(0, np.float64)
        for _ in range(3):
            assert_child_is_right(0, of_doubles, np.float64)
    finally:
        is_done.set()
        for each in others:
            each.join()


@pytest.mark.parametrize("layer", LAYERS)
def test_fork_among_threads(layer):
    in_a_process(fork_among_threads, layer, **with_layer(layer))


def fork_beside_a_long_call():
    """Fork from another thread while the main one waits for the thread beside it; call in both."""
    x = np.ones((1, 1, 12000, 64), np.float32)
    fastattn.attention(*[x[..., :200, :]] * 3)
    statuses = []

    def fork():
        time.sleep(0.1)
        child = os.fork()
        if child == 0:
            signal.alarm(TIMEOUT // 4)
            fastattn.attention(x, x, x)  # long as well, in what is the child's main thread
            os._exit(0)
        statuses.append(os.waitpid(child, 0)[1])

    other = threading.Thread(target=fork)
    other.start()
    fastattn.attention(x, x, x)
    other.join()
    assert statuses == [0], "the child has failed, died or hung"


def test_fork_beside_a_long_call():
    in_a_process(fork_beside_a_long_call)


def call_in_server():
    expected = [attend(n) for n in range(4)]
    with multiprocessing.get_context("forkserver").Pool(2) as pool:
        assert pool.map_async(attend, range(4)).get(TIMEOUT / 2) == expected


def test_forkserver():
    in_a_process(call_in_server)
