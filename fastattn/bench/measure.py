"""How a case is measured: checked first, then timed in turns.

All providers are in one process and take turns (`timing.py`). The peak of the machine is
measured in the same rounds, and so is fastattn on the plain case that a variant is compared
with. Nobody is timed whose result is wrong.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from fastattn import reference

from .cases import Case, Inputs, make_inputs
from .limits import multiply_adds, reading
from .machine import THREADS
from .providers import FASTATTN, NAIVE, PEERS, Provider, import_torch_first
from .timing import QUIET_SECONDS, Contender, Prepared, ratio, take_round

# As many rounds as fit the time, within these bounds.
MIN_ROUNDS = 7
MAX_ROUNDS = 15
CASE_SECONDS = 6.0
QUICK_SECONDS = 1.5

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


class Measurement:
    """One case: who can do it, how wrong they are, and how long they take.

    The number of rounds is what fits `seconds`, within bounds.
    """

    def __init__(
        self, case: Case, *, peers: Sequence[Provider] = PEERS, seconds: float = CASE_SECONDS
    ) -> None:
        import_torch_first()
        self.case = case
        self.peers = peers
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
        peak = multiply_adds(case.dtype)
        self._enter(PEAK, Prepared(peak.run), times=peak.amount / self.inputs.flops)
        if case.is_decode:
            read = reading()
            self._enter(READING, Prepared(read.run), times=read.amount / self.inputs.bytes_read)
        seconds_per_round = 0.0
        for contender in self.contenders.values():
            seconds_per_round += contender.calibrate() + QUIET_SECONDS
        self.rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / seconds_per_round)))

    def take_round(self) -> float:
        """Take one sample of everybody; return fastattn's seconds for a call."""
        take_round(self.contenders.values(), self._random)
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
        speed_over = {each.name: ratio(each.seconds, own.seconds) for each in rivals}
        peak = self.contenders[PEAK]
        peak_share = {}
        if not case.is_small:
            peak_share = {each.name: ratio(peak.seconds, each.seconds) for each in (own, *rivals)}
        reading_share = None
        if READING in self.contenders:
            reading_share = ratio(self.contenders[READING].seconds, own.seconds)
        time_of_plain = None
        if PLAIN in self.contenders:
            time_of_plain = ratio(own.seconds, self.contenders[PLAIN].seconds)
        # What runs on one thread is compared with NumPy on one, or else with what limits it.
        yardstick = self.contenders.get(READING, peak)
        share = 1
        if case.is_small:
            yardstick, share = self.contenders[NAIVE.name], THREADS
        return {
            "target": case.target,
            "case": case.name,
            "dtype": case.dtype,
            "is_small": case.is_small,
            "flops": flops,
            "bytes": self.inputs.bytes_moved,
            "rounds": len(own.seconds),
            "seconds": {name: each.median for name, each in self.contenders.items()},
            "spread": {name: each.spread for name, each in self.contenders.items()},
            "samples": {name: each.seconds for name, each in self.contenders.items()},
            "yardstick": yardstick.name,
            # In each round, the share that it had of the cores that it can use.
            "yardstick_cores": [share * each for each in yardstick.cores],
            # While only multiply-adds run, every core is ours, unless somebody else wants it.
            "cores": statistics.median(peak.cores),
            "fma_peak": flops / peak.median,
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
        for provider in (NAIVE, FASTATTN, *self.peers):
            if provider in self.peers and provider.version is None:
                self.left_out[provider.name] = "not installed"
                continue
            try:
                prepared = provider.prepare(self.inputs)
                error = largest_error(result_of(prepared, self.inputs), expected)
            except Exception as reason:
                # Whatever a peer raises for what it cannot do, it is the peer's answer.
                if provider not in self.peers:
                    raise
                self.left_out[provider.name] = str(reason).strip().partition("\n")[0]
                continue
            self.errors[provider.name] = error
            if error <= allowed:
                self._enter(provider.name, prepared)
            elif provider not in self.peers:
                raise WrongResultError(
                    f"{provider.name}, {self.case.name}: wrong by {error:.2e}, not {allowed:.2e}"
                )
            else:
                self.left_out[provider.name] = f"wrong by {error:.1e}, not {allowed:.1e}"

    def _enter(self, name: str, prepared: Prepared, times: float = 1.0) -> None:
        self.contenders[name] = Contender(name, prepared, times)

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
