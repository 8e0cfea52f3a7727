"""Hostile calls: whatever is handed in, a right result comes out, or a TypeError or ValueError.

The programs of calls are those of `fuzz`. Here hypothesis draws them, and makes one smaller that
fails; `python -m fuzz` in this folder draws any number, in processes that may die.
"""

import itertools
import random
import sys

import numpy as np
import pytest
from fuzz import __main__ as runner
from fuzz import draw, functions, surface
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn

# A program draws hundreds of numbers, and a first one compiles.
FUZZING = settings(
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
        HealthCheck.filter_too_much,
    ]
)


@pytest.mark.parametrize("name", surface.PROGRAMS)
@FUZZING
@given(dice=st.randoms(use_true_random=False))
def test_a_right_result_or_a_refusal(name, dice):
    surface.PROGRAMS[name][0](dice)


@pytest.mark.parametrize("name", functions.FAULTS_OF_ATTENTION)
def test_each_fault_is_refused(name):
    """What the programs draw now and then, one by one, in two calls."""
    for seed, fault in itertools.product((0, 3), functions.FAULTS_OF_ATTENTION[name]):
        arguments = draw.attention(random.Random(seed), tame=True)
        with pytest.raises((TypeError, ValueError), match=name):
            fastattn.attention(**{**arguments, name: fault})


def test_in_a_process_that_may_die():
    """Another hundred, with what the script reports."""
    told = dict(runner.rounds(first=1, count=100))
    assert [*told] == [*range(1, 101)]
    assert {each["verdict"] for each in told.values()} == {"right", "refused"}


# ---------------------------------------------------------------------------
# What is wrong is noticed
# ---------------------------------------------------------------------------


def off_by_little(query, key, value, **keywords):
    """Be wrong in the fifth digit of every second output."""
    result = fastattn.reference.attention(query, key, value, **keywords)
    output = result[0] if isinstance(result, tuple) else result
    output[..., ::2] *= 1.00003
    return result


def nan_in_one_place(query, key, value, **keywords):
    result = ATTENTION(query, key, value, **keywords)
    output = result[0] if isinstance(result, tuple) else result
    output[(-1,) * output.ndim if output.size else ()] = np.nan
    return result


def writes_to_the_key(query, key, value, **keywords):
    result = ATTENTION(query, key, value, **keywords)
    if isinstance(key, np.ndarray) and key.flags.writeable:
        key[...] = 0
    return result


def takes_anything(query, key, value, **keywords):
    try:
        return ATTENTION(query, key, value, **keywords)
    except ValueError:
        return np.zeros(3)


def raises_something_else(query, key, value, **keywords):
    try:
        return ATTENTION(query, key, value, **keywords)
    except ValueError as error:
        raise IndexError(error) from error


ATTENTION = fastattn.attention
FAULTS = [off_by_little, nan_in_one_place, writes_to_the_key, takes_anything, raises_something_else]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_faults_are_noticed(fault, monkeypatch):
    monkeypatch.setattr(fastattn, "attention", fault)
    noticed = 0
    for seed in range(20):
        try:
            surface.PROGRAMS["attention"][0](random.Random(seed))
        except Exception:
            noticed += 1
    assert noticed > 1


DIES_AT_3_AND_HANGS_AT_5 = """
import json, os, sys, time
first, count = map(int, sys.argv[1:])
for seed in range(first, first + count):
    print(json.dumps({"begins": seed, "name": "x"}), flush=True)
    if seed == 3:
        os.abort()
    if seed == 5:
        time.sleep(100)
    print(json.dumps({"ended": seed, "name": "x", "verdict": "right", "calls": 1}), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process that aborts has another status")
def test_crashes_count():
    command = [sys.executable, "-c", DIES_AT_3_AND_HANGS_AT_5]
    told = dict(runner.rounds(first=1, count=7, patience=1, worker_command=command))
    assert [*told] == [*range(1, 8)]
    crashes = {seed: each["why"] for seed, each in told.items() if each["verdict"] == "crash"}
    assert crashes == {3: "died with status -6", 5: "hung for 1 seconds"}
