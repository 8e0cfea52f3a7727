"""Two versions of the code in turns: two processes, one of which works at a time.

On a shared machine all may be a fifth slower for an hour, and differently so for code that
multiplies, reads or waits. Two versions that take turns of 20 ms meet the same, and the ratio of
their times is what the code is worth.

``python -m fastattn.bench.turns`` is one of the two processes. It reads lines, the name of a case
or ``sample``, and answers each with a line: whether it knows the case, or a time in seconds.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from .machine import settings
from .saved import SOURCE, git
from .timing import ratio

ROUNDS = 15

_SAMPLE = "sample"


def in_turns(
    old: Path, new: Path, cases: Sequence[str], threads: int
) -> Iterator[tuple[str, float]]:
    """Yield each case that both know, with log(old time / new time), the median over the rounds.

    Code is given as the folder that holds the package.
    """
    order = random.Random(0)
    with ExitStack() as stack:
        processes = [stack.enter_context(_process(folder, threads)) for folder in (old, new)]
        for case in cases:
            if not all(_ask(process, case) == "True" for process in processes):
                continue
            seconds: tuple[list[float], list[float]] = ([], [])
            for _ in range(ROUNDS):
                for turn in order.sample((0, 1), 2):
                    seconds[turn].append(float(_ask(processes[turn], _SAMPLE)))
            yield case, math.log(ratio(*seconds))


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Unpack a commit into a folder of its own, for as long as it is needed.

    Raises ValueError where that is no commit of the repository that holds this code, or one from
    before there was this module.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder, archive = Path(temporary, "code"), Path(temporary, "code.tar")
        try:
            # Of the whole repository: the code is a folder in it.
            top = git("rev-parse", "--show-toplevel")
            git("-C", top, "archive", f"--output={archive}", commit)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(f"commit {commit} is not to be had from {SOURCE}") from error
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        if not (folder / "fastattn" / "bench" / Path(__file__).name).is_file():
            raise ValueError(f"commit {commit} is too old to take turns")
        # An installation does the same by way of pyproject.toml.
        (folder / "fastattn" / "kernels").symlink_to(folder / "kernels")
        yield folder


@contextmanager
def _process(folder: Path, threads: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        cwd=folder,
        env=os.environ | settings(threads) | {"PYTHONPATH": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _ask(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    print(line, file=process.stdin, flush=True)
    answer = process.stdout.readline().strip()
    if not answer:
        raise RuntimeError(f"measuring in turns has ended with status {process.wait()}")
    return answer


def answer(questions: IO[str], answers: IO[str]) -> None:
    """Be one of the processes."""
    from .cases import CASES, make_inputs
    from .machine import cpus, tie_to
    from .providers import FASTATTN
    from .timing import Contender, wait_for_quiet

    cases = {case.name: case for case in CASES}
    contender = None
    for line in map(str.strip, questions):
        if line == _SAMPLE and contender is not None:
            contender.sample()
            # This process's threads may spin for a while, on a core that the other one needs next.
            wait_for_quiet()
            said = repr(contender.seconds[-1])
        else:
            if line in cases:
                # Of two cores, one may be the slower for as long as somebody else shares it: calls
                # on one thread are compared on one core.
                tie_to(cpus()[:1] if cases[line].is_small else cpus())
                contender = Contender(line, FASTATTN.prepare(make_inputs(cases[line])))
                contender.prepared.run()
                contender.calibrate()
            said = str(line in cases)
        print(said, file=answers, flush=True)


if __name__ == "__main__":
    from .machine import limit_threads

    limit_threads()
    answer(sys.stdin, sys.stdout)
