"""A long call hears signals: it ends soon, hands over what a handler raised, and harms nothing.

Handlers run between two steps of Python, and a kernel is one step: without the thread beside the
main one a signal would wait for the end of the call.
"""

import functools
import os
import signal
import threading
import time

import numpy as np
import pytest
from checks import assert_same_bits, in_a_process

import fastattn
from fastattn import runtime
from fastattn.plan import LONG_WORK, plan
from fastattn.problem import check_arrays

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(os.name != "posix", reason="signals are sent with os.kill"),
]

SOON = 0.5  # seconds from the signal to the end of the call, at most
LENGTH = 32768
BEGUN = 0.2  # seconds after which a call that takes some is under way


def inputs(length=LENGTH, heads=4):
    return np.random.default_rng(0).standard_normal((3, 1, heads, length, 64), dtype=np.float32)


def later(call, seconds=BEGUN):
    """Make a call from another thread, and return the times at which it was made."""
    times = []

    def wait():
        time.sleep(seconds)
        times.append(time.perf_counter())
        call()

    threading.Thread(target=wait).start()
    return times


def send(*numbers):
    """Send signals to this process."""
    for number in numbers:
        os.kill(os.getpid(), number)


def assert_ends_soon(call, *numbers, error=KeyboardInterrupt):
    """Assert that signals end a call with an error, in good time."""
    sent = later(functools.partial(send, *numbers))
    begin = time.perf_counter()
    with pytest.raises(error):
        call()
    assert sent, f"the call took {time.perf_counter() - begin:.2f} s, too few to interrupt"
    took = time.perf_counter() - sent[0]
    assert took < SOON, f"the call went on for {took:.2f} s"


def end(number, frame):
    raise SystemExit(f"signal {number}")


def slow(score, b, h, i, j):
    return score + np.sin(score) * np.cos(score) + np.tanh(score)


def shown(b, h, i, j):
    return np.sin(float(i)) * np.cos(float(j)) < 2


def interrupt_everything():
    query, key, value = inputs()
    small = tuple(x[..., :200, :] for x in (query, key, value))
    expected = fastattn.attention(*small)
    copies = query.copy(), key.copy(), value.copy()
    out = np.empty_like(query)
    packed = [x[0].swapaxes(0, 1) for x in (query, key, value)]
    signal.signal(signal.SIGTERM, end)
    # A process in the background of a shell begins with this ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Of which a single work item takes a second.
    many = np.broadcast_to(key[..., :1, :], (1, 4, 4 << 20, 64))
    calls = [
        lambda: fastattn.attention(query, key, value, out=out),
        lambda: fastattn.varlen_attention(*packed, [0, LENGTH], out=out[0].swapaxes(0, 1)),
        lambda: fastattn.attention(query, key, value, score_mod=slow, out=out),
        lambda: fastattn.create_block_mask(shown, 4, 4, LENGTH, LENGTH),
        lambda: fastattn.attention(query[..., :256, :], many, many),
    ]
    for threads in (2, 1):
        fastattn.set_num_threads(threads)
        for call in calls[: None if threads == 2 else 1]:
            if threads == 2:
                fastattn.attention(*small, score_mod=slow)  # nothing is left to compile
                fastattn.create_block_mask(shown, 1, 1, 9, 9)
            assert_ends_soon(call, signal.SIGINT)
            # Nobody writes to it any more.
            after = out[0, 0, :: LENGTH // 64].copy()
            time.sleep(0.05)
            np.testing.assert_array_equal(out[0, 0, :: LENGTH // 64], after)
            assert_same_bits(fastattn.attention(*small), expected)
    fastattn.set_num_threads(2)
    # Somebody impatient, and what a service gets when it is to end.
    assert_ends_soon(calls[0], signal.SIGINT, signal.SIGINT)
    assert_ends_soon(calls[0], signal.SIGTERM, error=SystemExit)
    for ours, theirs in zip((query, key, value), copies, strict=True):
        assert_same_bits(ours, theirs)


def test_long_calls_end_soon():
    in_a_process(interrupt_everything, NUMBA_NUM_THREADS="2")


def terminate():
    """End by SIGTERM as the system handles it where nobody else does; late, by SIGALRM."""
    fastattn.attention(*inputs(64))
    arrays = inputs()

    def send_both():
        signal.setitimer(signal.ITIMER_REAL, SOON)
        send(signal.SIGTERM)

    later(send_both)
    while True:
        fastattn.attention(*arrays)


def test_sigterm_ends_the_process():
    in_a_process(terminate, status=-signal.SIGTERM)


def is_long(length, threads):
    problem = check_arrays(*inputs(length, heads=1), False, None, "bhld")
    return plan(problem.frame, threads).is_long


def test_which_calls_are_long():
    """Twice the threads, half the time; those that are short are launched as they always were."""
    at_bound = int((LONG_WORK / 128) ** 0.5)
    assert [is_long(at_bound + n, 1) for n in (0, 1)] == [False, True]
    assert [is_long(at_bound + 1, n) for n in (1, 2)] == [True, False]


def long_inputs():
    """Return inputs of a call that is long on a few threads, in a twentieth of a second."""
    return inputs(6000, heads=1)


def test_handlers_that_return_change_nothing():
    query, key, value = arrays = long_inputs()
    expected = fastattn.attention(query, key, value)
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(time.perf_counter()))
    try:
        fastattn.set_num_threads(1)
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        result = fastattn.attention(*arrays)
        signal.setitimer(signal.ITIMER_REAL, 0)
        ended = time.perf_counter()
    finally:
        fastattn.set_num_threads(runtime._most_threads())
        signal.signal(signal.SIGALRM, before)
    assert heard
    assert heard[0] < ended - 0.005, "a handler runs meanwhile, not afterwards"
    assert_same_bits(result, expected)


def test_other_threads_call_as_well():
    """Python's signals reach the main thread alone; nobody else goes through the one beside it."""
    arrays = long_inputs()
    expected = fastattn.attention(*arrays)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(fastattn.attention(*arrays)))
        for _ in range(3)
    ]
    for each in threads:
        each.start()
    results.append(fastattn.attention(*arrays))
    for each in threads:
        each.join()
    assert len(results) == 4
    for result in results:
        assert_same_bits(result, expected)


def test_a_handler_may_call_itself():
    """As one that reports progress may: its call waits for the one that it interrupts."""
    arrays = long_inputs()
    expected = fastattn.attention(*arrays)
    results = []
    before = signal.signal(signal.SIGALRM, lambda *_: results.append(fastattn.attention(*arrays)))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.005)
        results.append(fastattn.attention(*arrays))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(results) == 2
    for result in results:
        assert_same_bits(result, expected)
