"""How far the results are from float64, beside the textbook in the same type (T13).

Run it with `python -m bench.accuracy`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastattn.bench.cases import Case, make_inputs
from fastattn.bench.measure import largest_error, reference_output, tolerance
from fastattn.bench.providers import FASTATTN, hidden_pairs, naive_attention

DTYPES = ("float32", "float64", "float16", "bfloat16")

# Short, odd, long, wide; causal rows that see few keys, whose errors nothing averages away.
SHAPES = ((1, 2, 16, 32), (2, 3, 77, 40), (1, 2, 333, 80), (1, 2, 1024, 64), (1, 1, 512, 256))


class Accuracy(NamedTuple):
    """The largest error of both, and the most that the contract of the project allows."""

    case: str
    own: float
    naive: float
    allowed: float


def measure_accuracy() -> list[Accuracy]:
    """Compare with the reference on every shape, causal and not, in every type."""
    return [
        _compare(Case("T13", shape, dtype=dtype, causal=causal))
        for dtype in DTYPES
        for shape in SHAPES
        for causal in (False, True)
    ]


def _compare(case: Case) -> Accuracy:
    inputs = make_inputs(case)
    arrays = (inputs.query, inputs.key, inputs.value)
    hidden = hidden_pairs(inputs)
    expected = reference_output(inputs)
    if case.dtype == "float64":
        # What float64 leaves out takes more than float64 to see.
        query, key, value = (each.astype(np.longdouble) for each in arrays)
        expected = naive_attention(query, key, value, hidden, None)
    # Unlike the one that is timed, this textbook stays in the type of its inputs throughout.
    naive = naive_attention(*arrays, hidden, None)
    naive_error = largest_error(naive.astype(case.numpy_dtype), expected)
    return Accuracy(
        case=case.name,
        own=largest_error(FASTATTN.prepare(inputs).result(), expected),
        naive=naive_error,
        allowed=tolerance(case, naive_error, expected, times=2),
    )


def main() -> None:
    """Print the errors, worst ratio last."""
    for each in sorted(measure_accuracy(), key=lambda each: each.own / each.naive):
        print(
            f"{each.case:34} own {each.own:.2e}   textbook {each.naive:.2e}"
            f"   ratio {each.own / each.naive:5.2f}{'' if each.own <= each.allowed else '   WRONG'}"
        )


if __name__ == "__main__":
    main()
