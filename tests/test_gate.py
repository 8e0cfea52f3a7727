"""The gate: a planted slow-down is caught, and code that has not changed raises no alarm.

Most of it runs on rounds drawn from those that a real run has recorded, noise and all; one test
plants a real delay and measures it.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fastattn.bench import compare, gate, turns
from fastattn.bench.saved import SOURCE, Run, git
from fastattn.testing import assert_speedup

ROOT = Path(__file__).parents[1]
FAIL_UNDER = 0.93  # the default

RECORDED = Run.load(ROOT / "bench" / "history" / "2026-11-25-emeraldrapids-50ac752.json")
CASES = list(RECORDED.speeds)

# What two processes of the same code that took turns have found, as 1000 log(time / time), on a
# machine that others were using: twelve pairs of processes for each of eight cases.
PAIRS = {
    "float32 1x12x512x64": "0 -9 -16 4 10 0 -102 -15 -6 -6 -21 34",
    "float32 1x8x1024x64 causal": "0 19 -2 -5 6 0 0 -25 -3 16 -2 22",
    "float64 1x8x1024x64": "2 20 4 -10 35 0 16 -19 51 -3 -16 16",
    "float32 1x8x256x64 causal": "-6 4 3 -26 62 0 22 -23 31 14 -19 37",
    "float32 1x8x64x64": "49 3 58 6 101 0 -55 -125 -36 29 -102 -18",
    "float32 1x4x16x32": "37 4 13 0 21 -38 -15 4 -13 27 4 -6",
    "float32 6x3": "-5 -13 28 3 18 -30 -4 17 -22 -6 -38 -44",
    "float32 32x12x48x32": "-51 3 -14 -5 -3 0 -6 19 23 1 -26 -29",
}


def another_run(rng, cases=CASES, slower=None):
    """Return a run as a new process would measure it: its rounds are drawn from recorded ones."""
    slower = slower or {}
    rows = []
    for name in cases:
        row = RECORDED.speeds[name]
        drawn = rng.integers(row["rounds"], size=row["rounds"])
        samples = {who: np.array(row["samples"][who])[drawn] for who in row["samples"]}
        luck = np.exp(rng.normal(0.0, compare.PROCESS_SPREAD))
        samples["fastattn"] *= luck * slower.get(name, 1.0)
        cores = [row["yardstick_cores"][n] for n in drawn]
        rows.append(row | {"samples": samples, "yardstick_cores": cores})
    return Run(RECORDED.date, None, RECORDED.machine, {}, rows)


def in_turns(rng, cases, slower):
    """Return what two new processes would find in turns: as a recorded pair, and as planted."""
    found = {}
    for name in cases:
        pairs = PAIRS[name if name in PAIRS else rng.choice(list(PAIRS))].split()
        found[name] = float(rng.choice(pairs)) / 1000 - np.log(slower.get(name, 1.0))
    return found


def ask(seed, slower=None):
    """Ask the gate about all cases of a history that consists of one run."""
    rng = np.random.default_rng(seed)
    return gate.ask(CASES, lambda cases: in_turns(rng, cases, slower or {}), FAIL_UNDER)


def names(found):
    return {each.case for each in found}


@pytest.mark.parametrize("seed", range(10))
def test_no_change_raises_no_alarm(seed):
    assert ask(seed).slower == []


def test_noise_is_such_that_one_measurement_would_raise_alarms():
    """The test above would pass for nothing if nothing had to be measured again."""
    first = [levels[0] for seed in range(10) for levels in ask(seed).levels.values()]
    assert sum(level < np.log(FAIL_UNDER) for level in first) >= 3


@pytest.mark.parametrize("case", CASES)
def test_a_slow_down_of_15_percent_is_caught(case):
    answer = ask(seed=1, slower={case: 1.15})
    assert names(answer.slower) == {case}
    assert answer.slower[0].ratio == pytest.approx(1 / 1.15, rel=0.1)


def test_all_slower_at_once():
    assert names(ask(seed=2, slower=dict.fromkeys(CASES, 1.15)).slower) == set(CASES)


@pytest.mark.parametrize(
    ("levels", "is_slower"),
    [
        ([-0.15, -0.14, -0.16, -0.15, -0.14], True),
        ([-0.01, -0.20, -0.20, -0.20, -0.20, -0.20], True),
        ([+0.01], False),
        ([-0.30, +0.20], False),
        ([-0.05, -0.05], False),
        ([-0.40, +0.20, -0.40, -0.40, +0.40, +0.30], False),
        ([-0.50, +0.20] * 5, False),
        ([-0.20, -0.08, -0.20, -0.08, -0.20, -0.08, -0.20], True),
    ],
    ids=[
        "all",
        "but for one",
        "not at all",
        "not again",
        "too little",
        "by accident",
        "who knows",
        "after all",
    ],
)
def test_attempts_decide_together(levels, is_slower):
    answers = iter(levels)
    answer = gate.ask(["a case"], lambda cases: dict.fromkeys(cases, next(answers)), FAIL_UNDER)
    assert bool(answer.slower) == is_slower
    assert answer.levels == {"a case": levels}


def test_a_new_case_has_nothing_to_be_compared_with():
    answer = gate.ask(["a case"], lambda _: {}, FAIL_UNDER)
    assert answer.slower == []
    assert gate.text(answer.levels).split() == [
        "case",
        "speed",
        "attempts",
        "a",
        "case",
        "new",
        "0",
    ]


# ---------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------


def test_a_run_equals_itself():
    for each in compare.changes(RECORDED, RECORDED):
        assert each.ratio == 1.0
        assert each.low < 1 < each.high
        assert each.verdict == ""


@pytest.mark.parametrize("factor", [0.5, 0.87, 1.15, 2.0])
def test_the_ratio_is_that_of_speeds(factor):
    case = min(CASES, key=lambda name: np.ptp(compare.quiet_rounds(RECORDED.speeds[name])))
    new = another_run(np.random.default_rng(4), [case], {case: 1 / factor})
    (change,) = compare.changes(RECORDED, new)
    assert change.low < factor < change.high
    assert change.verdict == ("faster" if factor > 1 else "slower")


def test_confidence_holds_what_it_promises():
    """95% of the intervals hold the truth: as many of 22 cases in 20 runs as chance allows."""
    held = [
        each.low < 1 < each.high
        for seed in range(20)
        for each in compare.changes(
            another_run(np.random.default_rng(seed)), another_run(np.random.default_rng(100 + seed))
        )
    ]
    assert 0.92 < np.mean(held) < 1.0


def test_disturbed_rounds_do_not_count():
    (case,) = CASES[:1]
    row = RECORDED.speeds[case]
    slow = np.array(row["samples"]["fastattn"])
    slow[:8] *= 3
    cores = np.where(np.arange(len(slow)) < 8, 0.5, 0.95)
    disturbed = row | {"samples": row["samples"] | {"fastattn": slow}, "yardstick_cores": cores}
    assert compare.change(row, disturbed).ratio == pytest.approx(1.0, abs=0.1)


def test_too_busy_to_tell():
    (case,) = CASES[:1]
    row = RECORDED.speeds[case]
    busy = row | {"yardstick_cores": [0.5] * row["rounds"]}
    change = compare.change(row, busy)
    assert np.isnan(change.ratio)
    assert not change.is_slower_than(1e9)
    assert "too busy" in compare.text([change])


@pytest.mark.parametrize(
    ("difference", "message"),
    [({"cpu": "another"}, "must be of the same machine"), ({"threads": 64}, "64 threads")],
)
def test_other_machines_do_not_compare(difference, message):
    other = Run(RECORDED.date, None, RECORDED.machine | difference, {}, RECORDED.results)
    with pytest.raises(ValueError, match=message):
        compare.changes(RECORDED, other)


def test_runs_without_a_common_case_do_not_compare():
    other = Run(RECORDED.date, None, RECORDED.machine, {}, [])
    with pytest.raises(ValueError, match="a case in common"):
        compare.changes(RECORDED, other)


# ---------------------------------------------------------------------------
# The real thing
# ---------------------------------------------------------------------------

# Every call takes as long as it does, and 15% of that.
DELAY = """
import time as _time

_undelayed = attention


def attention(*arrays, **keywords):
    begin = _time.perf_counter()
    out = _undelayed(*arrays, **keywords)
    end = begin + 1.15 * (_time.perf_counter() - begin)
    while _time.perf_counter() < end:
        pass
    return out
"""


@pytest.fixture(scope="module")
def delayed(tmp_path_factory):
    """Return a copy of the code that is 15% slower."""
    folder = tmp_path_factory.mktemp("delayed")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SOURCE, folder / "fastattn", ignore=ignored)
    shutil.copytree(ROOT / "kernels", folder / "fastattn" / "kernels", ignore=ignored)
    with (folder / "fastattn" / "attention.py").open("a") as file:
        file.write(DELAY)
    return folder


@pytest.mark.alone
def test_a_real_delay_is_caught(delayed):
    case = "float32 1x4x16x32"

    def compared(cases):
        return dict(turns.in_turns(SOURCE.parent, delayed, cases, threads=1))

    answer = gate.ask([case], compared, FAIL_UNDER)
    assert names(answer.slower) == {case}
    assert 0.80 < answer.slower[0].ratio < 0.93


def test_a_case_that_the_other_code_does_not_know_is_left_out():
    assert list(turns.in_turns(SOURCE.parent, SOURCE.parent, ["no such case"], threads=1)) == []


def test_the_code_of_a_commit():
    try:
        commit = git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this code is not in a repository")
    with turns.checked_out(commit) as folder:
        assert (folder / "fastattn" / "kernels" / "launch.py").is_file()
    assert not folder.exists()


def test_what_is_no_commit():
    with (
        pytest.raises(ValueError, match="commit 0000000 is not to be had"),
        turns.checked_out("0000000"),
    ):
        pass


def test_without_its_code_a_run_is_compared_by_its_figures():
    run = Run(RECORDED.date, None, RECORDED.machine, {}, RECORDED.results)
    with gate.comparing(run, lambda _: run) as (compared, how):
        assert "not in a repository" in how
        assert compared(CASES) == dict.fromkeys(CASES, 0.0)


# ---------------------------------------------------------------------------
# assert_speedup
# ---------------------------------------------------------------------------


def work(amount):
    return lambda: sum(range(amount))


def test_assert_speedup():
    assert 2 < assert_speedup(work(1000), work(4000), 2, rounds=5) < 8


def test_assert_speedup_says_what_it_measured():
    with pytest.raises(AssertionError, match=r"must be 10 times .*: measured [.\d]+, [.\d]+$"):
        assert_speedup(work(1000), work(2000), 10, rounds=3, attempts=2)


@pytest.mark.parametrize(
    ("error", "message", "keywords"),
    [
        (ValueError, "at_least must be", {"at_least": 0}),
        (ValueError, "rounds must be", {"rounds": 0}),
        (TypeError, "attempts must be", {"attempts": 1.5}),
    ],
)
def test_errors_of_assert_speedup(error, message, keywords):
    with pytest.raises(error, match=message):
        assert_speedup(print, print, **keywords)
