"""Has it become slower? Asked in a way that a noisy machine cannot answer wrongly by accident.

A case that looks slower than in an earlier run is measured again, in a process of its own, before
anything is said. Only what is slower every time, and beyond noise, is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .compare import Change, changes
from .saved import Run, history, same_cpu, this_machine

ATTEMPTS = 3

# Returns a new run of the cases that are named, measured in a fresh process.
Measure = Callable[[Sequence[str]], Run]


class Answer(NamedTuple):
    """What came out of the first measurement, and which cases the repetitions have left."""

    first: list[Change]
    slower: list[Change]
    unclear: list[Change]  # too busy to tell, every time


def last_run(folder: Path) -> Run:
    """Return the newest run in a folder that was measured on this CPU.

    Raises ValueError where there is none.
    """
    here = this_machine()
    runs = [run for run in history(folder) if same_cpu(run.machine, here)]
    if not runs:
        raise ValueError(
            f"{folder}: must hold a run of this CPU, {here['cpu']} ({here['target']}, "
            f"{here['instruction_set']}): fastattn bench --keep {folder} adds one"
        )
    return runs[-1]


def ask(base: Run, cases: Sequence[str], measure: Measure, fail_under: float) -> Answer:
    """Compare cases of a run with new measurements, again and again where they look slower."""
    first = suspects = changes(base, measure(cases))
    for _ in range(ATTEMPTS - 1):
        suspects = [each for each in suspects if _is_suspect(each, fail_under)]
        if not suspects:
            break
        suspects = changes(base, measure([each.case for each in suspects]))
    suspects = [each for each in suspects if _is_suspect(each, fail_under)]
    return Answer(
        first=first,
        slower=[each for each in suspects if not math.isnan(each.ratio)],
        unclear=[each for each in suspects if math.isnan(each.ratio)],
    )


def _is_suspect(change: Change, fail_under: float) -> bool:
    return change.is_slower_than(fail_under) or math.isnan(change.ratio)
