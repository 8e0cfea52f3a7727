"""Has it become slower? Asked in a way that a noisy machine cannot answer wrongly by accident.

The code of an earlier run and that in use are measured in turns, where git has the former; or else
the figures of that run are compared with new ones. What looks slower is measured again, in fresh
processes. Only what has fallen below the share that is allowed, by all attempts together and beyond
what they differ by, is reported.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from .compare import Change, changes
from .saved import SOURCE, Run, history, installed_versions, same_cpu, this_machine
from .table import aligned
from .turns import checked_out, in_turns

# In how many pairs of processes a case is measured until it is called slower: the fewest, and the
# most where they differ so much that the doubt reaches above the share that is allowed.
FEWEST, MOST = 5, 10

# Student's t for 95% of what the mean of so many attempts may be.
_T = {5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

# Measures the cases that are named, in fresh processes: log(old time / new time) of each.
Compare = Callable[[Sequence[str]], Mapping[str, float]]


class Answer(NamedTuple):
    """What each attempt has found for a case, as log(old time / new time), and what is slower."""

    levels: dict[str, list[float]]
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


def ask(cases: Sequence[str], compare: Compare, fail_under: float) -> Answer:
    """Compare cases, and those that look slower again."""
    levels: dict[str, list[float]] = {case: [] for case in cases}
    slower: dict[str, Change] = {}
    suspects = list(cases)
    for attempt in range(1, MOST + 1):
        again = compare(suspects) if suspects else {}
        for case, level in again.items():
            levels[case].append(level)
        suspects = [case for case in again if _looks_slower(levels[case], fail_under)]
        if attempt >= FEWEST:
            found = [_together(case, levels[case]) for case in suspects]
            slower |= {each.case: each for each in found if each.high < fail_under}
            suspects = [case for case in suspects if case not in slower]
    return Answer(levels, list(slower.values()))


def _looks_slower(levels: Sequence[float], fail_under: float) -> bool:
    # One process may be lucky by a tenth, where calls take less than 0.1 ms on several threads.
    bound = 1.0 if len(levels) == 1 else fail_under
    return math.exp(statistics.mean(levels)) < bound


def _together(case: str, levels: Sequence[float]) -> Change:
    """Return the change that all attempts have found, and its bounds."""
    number = len(levels)
    mean, doubt = statistics.mean(levels), _T[number] * statistics.stdev(levels) / math.sqrt(number)
    return Change(case, *map(math.exp, (mean, mean - doubt, mean + doubt)))


def text(levels: Mapping[str, Sequence[float]]) -> str:
    """Return a table of what attempts have found."""
    lines = [["case", "speed", "attempts"]]
    for case, found in levels.items():
        ratio = f"{math.exp(statistics.mean(found)):.3f}x" if found else "new"
        lines.append([case, ratio, str(len(found))])
    return "\n".join(aligned(lines, "<>>"))


@contextmanager
def comparing(base: Run, measure: Callable[[Sequence[str]], Run]) -> Iterator[tuple[Compare, str]]:
    """Provide the best way of comparing with a run, and say which.

    `measure` returns a new run of the cases that are named, measured in a fresh process.
    """

    def with_figures(cases: Sequence[str]) -> dict[str, float]:
        found = {each.case: math.log(each.ratio) for each in changes(base, measure(cases))}
        busy = [case for case, level in found.items() if math.isnan(level)]
        if busy:
            raise RuntimeError(
                f"too busy to tell, something else uses the cores: {', '.join(busy)}"
            )
        return found

    with ExitStack() as stack:
        try:
            if base.commit is None:
                raise ValueError("its code was not in a repository")
            code = stack.enter_context(checked_out(base.commit))
        except ValueError as reason:
            yield with_figures, f"by its figures, because {reason}"
            return

        def with_code(cases: Sequence[str]) -> dict[str, float]:
            return dict(in_turns(code, SOURCE.parent, cases, base.machine["threads"]))

        note = "in turns with its code"
        now = installed_versions()
        others = [
            each for each in ("Python", "NumPy", "Numba") if now[each] != base.versions.get(each)
        ]
        if others:
            note += f", both under today's {' and '.join(others)}"
        yield with_code, note
