"""What has changed between two runs, and with what doubt.

Times of different hours do not compare: a shared machine is a tenth slower at noon. So each round
divides fastattn's time by that of a yardstick in the same round, and runs are compared by the
medians of these over the rounds. Rounds in which somebody else used the cores are left out.

What else shares the machine may still slow fastattn and the yardstick differently. A comparison
to build on takes both versions in turns (`turns.py`), as the gate does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .providers import FASTATTN
from .saved import Row, Run, described, same_cpu
from .table import QUIET_CORES, aligned

# With fewer rounds than this nothing can be said.
_FEWEST_ROUNDS = 3

_RESAMPLES = 2000
_CONFIDENCE = 95  # percent

# By how much processes of the same code differ, whatever their rounds say: where their memory lies
# is luck. A standard deviation, in logarithms, from a hundred pairs of processes that took turns
# (0.031 between the two of a pair, on a shared machine).
PROCESS_SPREAD = 0.02


class Change(NamedTuple):
    """How many times as fast a case has become, and where that lies with 95% confidence."""

    case: str
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What can be said beyond noise."""
        if self.high < 1:
            return "slower"
        return "faster" if self.low > 1 else ""

    def is_slower_than(self, share: float) -> bool:
        """Whether the speed has fallen below a share of what it was, beyond noise."""
        return self.ratio < share and self.verdict == "slower"


def changes(old: Run, new: Run) -> list[Change]:
    """Compare the cases that both runs have.

    Raises ValueError for runs of different machines, and for two that have no case in common.
    """
    machines = [run.machine for run in (old, new)]
    threads = [machine["threads"] for machine in machines]
    if not same_cpu(*machines) or threads[0] != threads[1]:
        one, other = map(described, machines)
        raise ValueError(f"runs must be of the same machine: got {one} and {other}")
    common = [name for name in old.speeds if name in new.speeds]
    if not common:
        raise ValueError("runs must have a case in common: got none")
    return [change(old.speeds[name], new.speeds[name]) for name in common]


def change(old: Row, new: Row) -> Change:
    """Compare the results of a case."""
    levels, could_be = [], []
    # The same numbers for every case and call: what is compared twice gives the same twice.
    rng = np.random.default_rng(0)
    for row in (old, new):
        rounds = quiet_rounds(row)
        if len(rounds) < _FEWEST_ROUNDS:
            return Change(old["case"], math.nan, 0.0, math.inf)
        resampled = np.median(rng.choice(rounds, (_RESAMPLES, len(rounds))), axis=1)
        levels.append(float(np.median(rounds)))
        could_be.append(resampled + rng.normal(0.0, PROCESS_SPREAD, _RESAMPLES))
    tail = (100 - _CONFIDENCE) / 2
    low, high = np.percentile(could_be[0] - could_be[1], [tail, 100 - tail])
    return Change(old["case"], *map(math.exp, (levels[0] - levels[1], low, high)))


def quiet_rounds(row: Row) -> np.ndarray:
    """Return log(time / time of the yardstick) for each round that had its cores to itself."""
    own, theirs = (np.log(row["samples"][name]) for name in (FASTATTN.name, row["yardstick"]))
    return np.asarray((own - theirs)[np.array(row["yardstick_cores"]) >= QUIET_CORES])


def text(compared: Iterable[Change]) -> str:
    """Return a table of changes, with what has changed beyond noise marked."""
    lines = [["case", "speed", "95% within", ""]]
    for each in compared:
        if math.isnan(each.ratio):
            lines.append([each.case, "", "", "too busy to tell"])
        else:
            within = f"{each.low:.3f} .. {each.high:.3f}"
            lines.append([each.case, f"{each.ratio:.3f}x", within, each.verdict])
    return "\n".join(aligned(lines, "<>><"))
