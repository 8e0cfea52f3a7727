"""How a case is measured: checked first, then timed in turns.

All providers are in one process, and their samples take turns, round by round and in an order
that is shuffled for each round: what the machine does besides (other tenants, frequency,
temperature) meets everybody alike. The peak of the machine is measured in the same rounds, and
so is fastattn on the plain case that a variant is compared with.

Every comparison is made within a round, and the median of the rounds is reported. Nobody is
timed whose result is wrong.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product, repeat
from typing import Any

import numpy as np

from fastattn import reference

from .cases import Case, Inputs, make_inputs
from .limits import multiply_adds, reading
from .machine import THREADS
from .providers import FASTATTN, NAIVE, PEERS, Prepared

# A sample is as many calls as fill this time: less would measure the clock and the scheduler.
SAMPLE_SECONDS = 0.02

# Workers of some libraries go on spinning after a call, up to a tenth of a second, on a core that
# somebody else wants by then: PyTorch is half as fast while NumPy's BLAS still waits for work.
# Nobody starts before all is quiet for one interval, longer than the ticks of CPU accounting.
QUIET_SECONDS = 0.012
MAX_WAIT_SECONDS = 0.5

# As many rounds as fit the time, within these bounds.
MIN_ROUNDS = 7
MAX_ROUNDS = 15
CASE_SECONDS = 6.0

# The distance from 1 to the next larger number.
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

PLAIN = "plain case"
PEAK = "fma_peak"
READING = "read_bandwidth"

# Queries that the reference computes at a time: with 8192 keys it then takes less than a gigabyte.
REFERENCE_ROWS = 1024

# How wrong a result may be that comes from 8 bits, as a share of the range of the output.
INT8_ERROR = 0.01


class WrongResultError(AssertionError):
    """The result of fastattn or of the textbook is wrong, so there is nothing to measure."""


# ---------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------


def reference_output(inputs: Inputs) -> np.ndarray:
    """Return the output in float64, some rows at a time: the reference holds their scores."""

    def four_dimensions(array: np.ndarray) -> np.ndarray:
        return array.reshape(*[1] * (4 - array.ndim), *array.shape)

    query, key, value = (four_dimensions(each) for each in (inputs.query, inputs.key, inputs.value))
    batch, num_heads, seqlen_q, _ = query.shape
    group_size = num_heads // key.shape[1]
    scores = (batch, num_heads, seqlen_q, key.shape[-2])
    mask, bias = (
        None if each is None else np.broadcast_to(four_dimensions(each), scores)
        for each in (inputs.mask, inputs.bias)
    )
    out = np.empty((batch, num_heads, seqlen_q, value.shape[-1]))
    for b, h, start in product(range(batch), range(num_heads), range(0, seqlen_q, REFERENCE_ROWS)):
        rows = slice(start, start + REFERENCE_ROWS)
        out[b, h, rows] = reference.attention(
            *(
                each.astype(np.float64)
                for each in (query[b, h, rows], key[b, h // group_size], value[b, h // group_size])
            ),
            mask=None if mask is None else mask[b, h, rows],
            bias=None if bias is None else bias[b, h, rows],
            softcap=inputs.softcap,
            causal=inputs.case.causal,
            query_offset=start + key.shape[-2] - seqlen_q,
        )
    return inputs.without_padding(out.reshape(*inputs.query.shape[:-1], value.shape[-1]))


def result_of(prepared: Prepared, inputs: Inputs) -> np.ndarray:
    """Return what a call gives, but for rows that are padding."""
    return inputs.without_padding(prepared.result())


def largest_error(result: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest distance from the reference; infinite where anything is not finite."""
    exact = result.astype(np.float64)
    if exact.shape != expected.shape or not np.isfinite(exact).all():
        return math.inf
    return float(np.abs(exact - expected).max())


def _naive_error(case: Case, expected: np.ndarray) -> float:
    if case.dtype != "float64":
        inputs = make_inputs(case)
        return largest_error(result_of(NAIVE.prepare(inputs), inputs), expected)
    # The reference is float64 itself and cannot tell. The same numbers in float32 can: errors
    # grow with the distance between two neighbouring numbers, and with nothing else.
    single = replace(case, dtype="float32")
    return _naive_error(single, expected) * EPSILON["float64"] / EPSILON["float32"]


def tolerance(case: Case, naive_error: float, expected: np.ndarray, times: float = 4) -> float:
    """Return how wrong a result may be: some times the textbook's error, and one rounding.

    Four times is wide enough for probabilities that are rounded to the storage type on the
    way, as some do, and narrow enough to find float32 inside where float64 was asked for.
    """
    if case.dtype == "int8":
        return INT8_ERROR * float(np.ptp(expected))
    return times * naive_error + EPSILON[case.dtype] / 2 * float(np.abs(expected).max())


# ---------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------


@dataclass
class Contender:
    """Something whose time is taken.

    For each round, `seconds` has what one call took, and `cores` the share of all cores that
    this process had meanwhile.
    """

    name: str
    prepared: Prepared
    calls: int = 1
    seconds: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)

    def calibrate(self) -> float:
        """Find out how many calls fill a sample; return the seconds that they take."""
        self.calls = 1
        while (elapsed := self._elapsed()) < SAMPLE_SECONDS:
            self.calls = math.ceil(self.calls * min(10.0, 1.2 * SAMPLE_SECONDS / elapsed))
        return elapsed

    def sample(self) -> None:
        """Take a sample."""
        wait_for_quiet()
        if self.calls > 1:
            # Wakes this library's workers and brings its code and data back into the caches.
            self.prepared.run()
        used = time.process_time()
        elapsed = self._elapsed()
        self.cores.append((time.process_time() - used) / (elapsed * THREADS))
        self.seconds.append(elapsed / self.calls)

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The distance between the quartiles as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.seconds, n=4)
        return (upper - lower) / self.median

    def _elapsed(self) -> float:
        run = self.prepared.run
        start = time.perf_counter()
        for _ in repeat(None, self.calls):
            run()
        return time.perf_counter() - start


def wait_for_quiet() -> None:
    """Wait until no worker spins, or the time is up."""
    deadline = time.perf_counter() + MAX_WAIT_SECONDS
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(QUIET_SECONDS)
        if time.process_time() - used < QUIET_SECONDS / 10:
            return


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Measurement:
    """One case: who can do it, how wrong they are, and how long they take."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.inputs = make_inputs(case)
        self.errors: dict[str, float] = {}
        self.left_out: dict[str, str] = {}
        self.contenders: dict[str, Contender] = {}
        self._random = random.Random(case.name)

        self._enter_providers()
        self.plain_flops = 0.0
        if case.plain is not None:
            plain_inputs = make_inputs(case.plain)
            plain = FASTATTN.prepare(plain_inputs)
            plain.run()
            self._enter(PLAIN, plain)
            self.plain_flops = plain_inputs.flops
        # 16-bit types are computed in float32.
        self.peak = multiply_adds("float64" if case.dtype == "float64" else "float32")
        self.contenders[PEAK] = Contender(PEAK, Prepared(self.peak.run))
        self.reading = reading() if case.goal.reading is not None else None
        if self.reading is not None:
            self.contenders[READING] = Contender(READING, Prepared(self.reading.run))
        seconds_per_round = 0.0
        for contender in self.contenders.values():
            seconds_per_round += contender.calibrate() + QUIET_SECONDS
        self.rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(CASE_SECONDS / seconds_per_round)))

    def take_round(self) -> float:
        """Take one sample of everybody, in random order; return fastattn's seconds for a call."""
        contenders = list(self.contenders.values())
        self._random.shuffle(contenders)
        with _without_garbage_collection():
            for contender in contenders:
                contender.sample()
        return self.contenders[FASTATTN.name].seconds[-1]

    def summary(self) -> dict[str, Any]:
        """Return everything that a table, a figure or a later run may want to know."""
        case, flops = self.case, self.inputs.flops
        own = self.contenders[FASTATTN.name]
        rivals = [
            each
            for name, each in self.contenders.items()
            if name not in (own.name, PLAIN, PEAK, READING)
        ]
        best = min(rivals, key=lambda each: each.median)
        speed_over = {each.name: _ratio(each.seconds, own.seconds) for each in rivals}
        peak = self.contenders[PEAK]
        peak_share = {}
        if not case.is_small:
            peak_share = {
                each.name: _ratio(peak.seconds, each.seconds) * flops / self.peak.amount
                for each in (own, *rivals)
            }
        reading_share = None
        if self.reading is not None:
            share = self.inputs.bytes_read / self.reading.amount
            reading_share = _ratio(self.contenders[READING].seconds, own.seconds) * share
        time_of_plain = None
        if PLAIN in self.contenders:
            time_of_plain = _ratio(own.seconds, self.contenders[PLAIN].seconds)
        return {
            "target": case.target,
            "case": case.name,
            "dtype": case.dtype,
            "is_small": case.is_small,
            "flops": flops,
            "rounds": len(own.seconds),
            "seconds": {name: each.median for name, each in self.contenders.items()},
            "spread": {name: each.spread for name, each in self.contenders.items()},
            "samples": {name: each.seconds for name, each in self.contenders.items()},
            # While only multiply-adds run, every core is ours, unless somebody else wants it.
            "cores": statistics.median(peak.cores),
            "fma_peak": self.peak.amount / peak.median,
            "peak_share": peak_share,
            "reading_share": reading_share,
            "speed_over": speed_over,
            "best_peer": best.name,
            "time_of_plain": time_of_plain,
            "errors": self.errors,
            "left_out": self.left_out,
            "goals": self._goals(
                speed_over, speed_over[best.name], peak_share, reading_share, time_of_plain
            ),
        }

    def _enter_providers(self) -> None:
        expected = reference_output(self.inputs)
        allowed = tolerance(self.case, _naive_error(self.case, expected), expected)
        for provider in (NAIVE, FASTATTN, *PEERS):
            if provider in PEERS and provider.version is None:
                self.left_out[provider.name] = "not installed"
                continue
            try:
                prepared = provider.prepare(self.inputs)
                error = largest_error(result_of(prepared, self.inputs), expected)
            except Exception as reason:
                # Whatever a peer raises for what it cannot do, it is the peer's answer.
                if provider not in PEERS:
                    raise
                self.left_out[provider.name] = str(reason).strip().partition("\n")[0]
                continue
            self.errors[provider.name] = error
            if error <= allowed:
                self._enter(provider.name, prepared)
            elif provider not in PEERS:
                raise WrongResultError(
                    f"{provider.name}, {self.case.name}: wrong by {error:.2e}, not {allowed:.2e}"
                )
            else:
                self.left_out[provider.name] = "further from float64 than rounding explains"

    def _enter(self, name: str, prepared: Prepared) -> None:
        self.contenders[name] = Contender(name, prepared)

    def _goals(
        self,
        speed_over: dict[str, float],
        over_best: float,
        peak_share: dict[str, float],
        reading_share: float | None,
        time_of_plain: float | None,
    ) -> list[dict[str, Any]]:
        goal = self.case.goal
        rate_of_plain = None
        if time_of_plain is not None:
            rate_of_plain = self.inputs.flops / self.plain_flops / time_of_plain
        torch = speed_over.get("PyTorch")
        # Nowhere slower than the textbook and PyTorch, whatever else a case is for.
        rows = [
            ("over NumPy", 1.0, speed_over[NAIVE.name], True),
            ("over PyTorch", goal.torch or 1.0, torch, True),
            ("over the best peer", goal.peer, over_best, True),
            ("of fma_peak", goal.peak, peak_share.get(FASTATTN.name), True),
            ("of read_bandwidth", goal.reading, reading_share, True),
            ("time of the plain case", goal.plain, time_of_plain, False),
            ("rate of the plain case", goal.rate, rate_of_plain, True),
        ]
        return [
            {
                "what": what,
                "goal": bound,
                "reached": reached,
                "met": reached >= bound if at_least else reached <= bound,
            }
            for what, bound, reached, at_least in rows
            if bound is not None and reached is not None
        ]


def _ratio(over: list[float], under: list[float]) -> float:
    """Return the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
