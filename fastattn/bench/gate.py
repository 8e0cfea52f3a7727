"""Has it become slower? Asked in a way that a noisy machine cannot answer wrongly by accident.

All is measured once and compared with an earlier run. What may have become slower, by that, is
measured again: where git has the code of that run, in turns with it. Only what is slower each
time, and beyond noise, is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .compare import Change, changes, judge
from .saved import Run, history, same_cpu, this_machine
from .turns import checked_out, in_turns

# Repetitions, each in fresh processes.
ATTEMPTS = 3

# Each returns what is found about the cases that are named, measured in fresh processes.
Measure = Callable[[Sequence[str]], Run]
Compare = Callable[[Sequence[str]], list[Change]]


class Answer(NamedTuple):
    """What the first measurement has found, and what each of the repetitions has confirmed."""

    first: list[Change]
    slower: list[Change]


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


def ask(
    base: Run, cases: Sequence[str], measure: Measure, compare: Compare, fail_under: float
) -> Answer:
    """Measure cases and compare them with a run; compare again what may have become slower."""
    first = changes(base, measure(cases))
    suspects = [each for each in first if each.low < fail_under]
    for _ in range(ATTEMPTS):
        if suspects:
            again = compare([each.case for each in suspects])
            suspects = [each for each in again if each.is_slower_than(fail_under)]
    return Answer(first, suspects)


@contextmanager
def comparing(base: Run, measure: Measure) -> Iterator[tuple[Compare, str]]:
    """Provide the best way of comparing with a run, and what there is to say about it."""

    def with_figures(cases: Sequence[str]) -> list[Change]:
        return changes(base, measure(cases))

    with ExitStack() as stack:
        try:
            if base.commit is None:
                raise ValueError("its code was not in a repository")
            code = stack.enter_context(checked_out(base.commit))
        except ValueError as reason:
            yield with_figures, f"only its figures are compared with: {reason}"
            return

        def with_code(cases: Sequence[str]) -> list[Change]:
            return [
                judge(case, np.log(old) - np.log(new))
                for case, old, new in in_turns(code, cases, base.machine["threads"])
            ]

        yield with_code, "what may be slower is measured in turns with its code"
