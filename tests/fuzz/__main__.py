"""`python -m fuzz`: any number of programs of calls, in processes that may die.

A seed is a program. A worker says which one it begins, and what became of it; if it dies or hangs,
the seed that it was at is reported and the next worker goes on behind it. Run it in tests/:

    python -m fuzz --programs 20000
    python -m fuzz --seed 4711            # one of them again, in this process
"""

import argparse
import json
import queue
import random
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS = 60  # in which a program ends that does not hang; a first one compiles


def work(first: int, count: int) -> None:
    """Run programs and print a line before and after each."""
    from fuzz import calling, surface

    warnings.simplefilter("error")
    for seed in range(first, first + count):
        dice = random.Random(seed)
        name = surface.choose(dice)
        say({"begins": seed, "name": name})
        before = calling.made
        try:
            told = {"verdict": surface.PROGRAMS[name][0](dice)}
        except Exception as error:
            told = {"verdict": "wrong", "why": f"{type(error).__name__}: {error}"[:500]}
        say({"ended": seed, "name": name, "calls": calling.made - before, **told})


def say(line: dict[str, object]) -> None:
    """Print a line at once."""
    print(json.dumps(line), flush=True)


WORKER = (sys.executable, "-X", "faulthandler", "-m", "fuzz", "--work")


def rounds(
    first: int,
    count: int,
    seconds: float = 1e9,
    patience: float = SECONDS,
    worker_command: Sequence[str] = WORKER,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (seed, what became of it) of so many programs, or of as many as the time allows."""
    end = time.monotonic() + seconds
    while count > 0 and time.monotonic() < end:
        begun = None
        with subprocess.Popen(
            [*worker_command, str(first), str(count)],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
        ) as worker:
            for line in lines_of(worker.stdout, min(patience, seconds)):
                told = json.loads(line)
                begun = told if "begins" in told else None
                if begun is None:
                    first, count = told["ended"] + 1, count - 1
                    yield told["ended"], told
                if time.monotonic() > end:
                    break
            with suppress(subprocess.TimeoutExpired):
                worker.wait(timeout=1)  # its end is known a little later than that of its lines
            hangs = worker.returncode is None
            worker.kill()
        if count == 0 or time.monotonic() > end:
            return
        what = f"hung for {patience} seconds" if hangs else f"died with status {worker.returncode}"
        if begun is None:
            raise RuntimeError(f"a worker {what} between two programs")
        first, count = begun["begins"] + 1, count - 1
        yield begun["begins"], {"name": begun["name"], "verdict": "crash", "calls": 1, "why": what}


def lines_of(stream: Any, patience: float) -> Iterator[str]:
    """Yield the lines of a stream until its end, or until none has come for so many seconds."""
    lines: queue.Queue[str] = queue.Queue()

    def forward() -> None:
        for line in stream:
            lines.put(line)
        lines.put("")

    threading.Thread(target=forward, daemon=True).start()
    with suppress(queue.Empty):
        while line := lines.get(timeout=patience):
            yield line


def main() -> int:
    """Run what the command line asks for, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--seed", type=int, help="run this one here, and show its error")
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return 0
    if options.seed is not None:
        from fuzz import surface

        warnings.simplefilter("error")
        dice = random.Random(options.seed)
        name = surface.choose(dice)
        print(name, surface.PROGRAMS[name][0](dice))
        return 0
    counts: Counter[tuple[str, str]] = Counter()
    calls, last, bad = 0, options.first, 0
    for last, told in rounds(options.first, options.programs, options.seconds):
        counts[told["name"], told["verdict"]] += 1
        calls += told["calls"]
        if told["verdict"] in ("wrong", "crash"):
            bad += 1
            print(f"seed {last}: {told['name']}: {told['verdict']}: {told['why']}", flush=True)
    print(f"\n{'':32}" + "".join(f"{each:>9}" for each in ("right", "refused", "wrong", "crash")))
    for name in sorted({name for name, _ in counts}):
        row = [counts[name, each] for each in ("right", "refused", "wrong", "crash")]
        print(f"{name:32}" + "".join(f"{n:>9}" for n in row))
    print(f"\n{calls} calls, seeds {options.first} to {last}, {bad} bad")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
