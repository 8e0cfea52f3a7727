"""From what is asked for to results: which cases, on what they can run, one after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from fastattn.plan import SERIAL_WORK

from .cases import CASES, Case, Variant
from .limits import Measured, measure_limits
from .machine import available_bytes
from .measure import Measurement
from .providers import PEERS, Provider, installed_version
from .saved import Row

# Arrays of scores that the textbook has at once, and the reference for one head.
_SCORES_AT_ONCE = 3

# How many scores the textbook computes in a fraction of a second.
_QUICK_SCORES = 1 << 24

Progress = Callable[[str, int, int], None]


def chosen(words: Sequence[str]) -> list[Case]:
    """Return the cases of the grid that are named: by group, by name, or by a part of it.

    Raises ValueError for a word that names none.
    """
    found: dict[Case, None] = {}
    for word in words:
        matches = [case for case in CASES if word == case.name]
        matches = matches or [case for case in CASES if word == case.target or word in case.name]
        if not matches:
            groups = ", ".join(dict.fromkeys(case.target for case in CASES))
            raise ValueError(
                f"no case is named {word!r}: the groups are {groups}, "
                "and fastattn bench --list names every case"
            )
        found |= dict.fromkeys(matches)
    return [case for case in (found or CASES) if can_run(case)]


def quick(cases: Iterable[Case]) -> list[Case]:
    """Return the first case of each group for which the textbook is quick."""
    first: dict[str, Case] = {}
    for case in cases:
        if _scores(case) <= _QUICK_SCORES:
            first.setdefault(case.target, case)
    return list(first.values())


def _scores(case: Case) -> int:
    return math.prod(case.shape[:-1]) * case.key_shape[-2]


def custom_case(shape: str, dtype: str, causal: bool, variant: Variant | None) -> Case:
    """Return a case from a shape written as ``B,Hq,Hkv,Lq,Lk,D``.

    Raises ValueError for what is no such shape, or cannot be measured.
    """
    words = shape.split(",")
    if len(words) != 6 or not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ValueError(
            f"--shape must be six whole numbers above 0, B,Hq,Hkv,Lq,Lk,D: got {shape!r}"
        )
    batch, num_heads, num_kv_heads, seqlen_q, seqlen_kv, head_dim = map(int, words)
    if num_heads % num_kv_heads:
        raise ValueError(f"--shape: Hkv must divide Hq: got {num_kv_heads} and {num_heads}")
    if causal and variant:
        raise ValueError(f"--causal and --variant {variant} are not measured together")
    if causal and seqlen_q > seqlen_kv:
        raise ValueError(f"--causal needs a key for each query: got {seqlen_q} on {seqlen_kv} keys")
    case = Case(
        "",
        (batch, num_heads, seqlen_q, head_dim),
        dtype=dtype,
        causal=causal,
        variant=variant,
        num_kv_heads=None if num_kv_heads == num_heads else num_kv_heads,
        seqlen_kv=None if seqlen_kv == seqlen_q else seqlen_kv,
        is_small=batch * num_heads * seqlen_q * seqlen_kv * 2 * head_dim < SERIAL_WORK,
    )
    if not can_run(case):
        raise ValueError("bfloat16 needs the package ml_dtypes: pip install 'fastattn[bfloat16]'")
    check_room(case)
    return case


def check_room(case: Case) -> None:
    """Raise ValueError for a case whose scores the textbook cannot hold in memory."""
    needed = _SCORES_AT_ONCE * _scores(case) * case.numpy_dtype.itemsize
    available = available_bytes()
    if needed > available:
        raise ValueError(
            f"{case.name}: the textbook that it is compared with needs {needed / 1e9:.1f} GB, and "
            f"{available / 1e9:.1f} GB are available: choose fewer heads or shorter lengths"
        )


def can_run(case: Case) -> bool:
    """Whether NumPy has the case's dtype: bfloat16 needs ml_dtypes."""
    return case.dtype != "bfloat16" or installed_version("ml_dtypes") is not None


def measure(
    cases: Sequence[Case], *, peers: Sequence[Provider] = PEERS, seconds: float, progress: Progress
) -> list[Row]:
    """Measure cases and the limits of the machine."""
    results = []
    for number, case in enumerate(cases):
        progress(case.name, number, len(cases))
        measurement = Measurement(case, peers=peers, seconds=seconds)
        for _ in range(measurement.rounds):
            measurement.take_round()
        results.append(measurement.summary())
    progress("limits", len(cases), len(cases))
    return [*results, limits_row(measure_limits())]


def limits_row(limits: Iterable[Measured]) -> Row:
    """Return limits as a result of a run."""
    return {"target": "", "figures": [(each.name, each.rate, each.unit, None) for each in limits]}
