"""What a program waits for before the first result (T11), each step in a process of its own.

Run it with `python -m bench.startup`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

RUNS = 7

# Steps are told apart by what is imported before the clock starts: numba is part of a first call
# ever, but a program that has it already does not wait for it.
_CHILD = """
import json, time
steps = [time.perf_counter()]
import numpy
steps.append(time.perf_counter())
import fastattn
steps.append(time.perf_counter())
x = numpy.ones((1, 2, 64, 64), numpy.float32)
{before_the_call}
steps.append(time.perf_counter())
fastattn.attention(x, x, x)
steps.append(time.perf_counter())
print(json.dumps([later - sooner for sooner, later in zip(steps, steps[1:])]))
"""


class Startup(NamedTuple):
    """Seconds: medians of several processes, but for the first call ever, which has only one."""

    import_numpy: float
    import_fastattn: float  # over `import numpy`
    first_call_ever: float  # nothing compiled is kept yet; `import numba` included
    first_call: float  # compiled code is kept; over `import numba`


GOALS = {"import_fastattn": 0.060, "first_call_ever": 6.0, "first_call": 0.4}


def measure_startup() -> Startup:
    """Start Python again and again, with a home that holds nothing at first."""
    with tempfile.TemporaryDirectory() as home:
        cold = _run(home, "")
        warm = [_run(home, "import numba") for _ in range(RUNS)]
    return Startup(
        import_numpy=statistics.median(times[0] for times in warm),
        import_fastattn=statistics.median(times[1] for times in warm),
        first_call_ever=cold[3],
        first_call=statistics.median(times[3] for times in warm),
    )


def _run(home: str, before_the_call: str) -> list[float]:
    # Every place where a system lets programs keep what they can make again.
    places = ("HOME", "USERPROFILE", "LOCALAPPDATA", "XDG_CACHE_HOME")
    environment = {**os.environ, **dict.fromkeys(places, home)}
    # Settings of this shell that would lead elsewhere, or make every import compile the source.
    for setting in ("NUMBA_CACHE_DIR", "FASTATTN_CACHE_DIR", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(setting, None)
    finished = subprocess.run(
        [sys.executable, "-c", _CHILD.format(before_the_call=before_the_call)],
        env=environment,
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
    )
    return [float(seconds) for seconds in json.loads(finished.stdout)]


def main() -> None:
    """Print what was measured."""
    for name, seconds in measure_startup()._asdict().items():
        print(f"{name.replace('_', ' '):18}{seconds * 1e3:10.1f} ms")


if __name__ == "__main__":
    main()
