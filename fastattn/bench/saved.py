"""Runs as they are kept: one JSON file each, a line for each result.

A run holds every sample, so that two of them can be compared with a measure of doubt, and what
it was measured on. Files of a history are named by day, CPU and commit.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fastattn

from .machine import THREADS
from .providers import FASTATTN, NAIVE, PEERS, installed_version

FORMAT = 1

# The folder of the package.
SOURCE = Path(fastattn.__file__).parent

# What a file must hold, and of what types.
_FIELDS: dict[str, tuple[type, ...]] = {
    "date": (str,),
    "commit": (str, type(None)),
    "machine": (dict,),
    "versions": (dict,),
    "results": (list,),
}

# The same of a result that compares speeds.
_ROW_FIELDS: dict[str, tuple[type, ...]] = {
    "target": (str,),
    "case": (str,),
    "dtype": (str,),
    "is_small": (bool,),
    "flops": (int, float),
    "cores": (int, float),
    "seconds": (dict,),
    "spread": (dict,),
    "samples": (dict,),
    "yardstick": (str,),
    "speed_over": (dict,),
    "peak_share": (dict,),
    "best_peer": (str,),
}

# What a machine must have in common with another one to compare with it, besides the threads.
_CPU = ("cpu", "target", "instruction_set")

# Digits of a number that is kept. Clocks are worse.
_DIGITS = 6

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Results, with when, of what code and on what machine they were measured.

    `machine` is what `this_machine` returns. `commit` is None for code that is not in a
    repository, and ends with ``+`` where files had been changed.
    """

    date: str
    commit: str | None
    machine: dict[str, Any]
    versions: dict[str, str]
    results: Sequence[Row]

    @classmethod
    def of(cls, results: Iterable[Row]) -> Run:
        """Return a run of this moment, on this machine."""
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=_commit(),
            machine=this_machine(),
            versions=installed_versions(),
            results=list(results),
        )

    @property
    def speeds(self) -> dict[str, Row]:
        """The results that compare speeds, by the names of their cases."""
        return {row["case"]: row for row in timed(self.results)}

    @property
    def file_name(self) -> str:
        """The name of the run's file in a history."""
        commit = (self.commit or "unknown").removesuffix("+")[:7]
        return f"{self.date[:10]}-{self.machine['target']}-{commit}.json"

    def save(self, path: Path) -> None:
        """Write the run."""
        head = {"format": FORMAT, **asdict(self)}
        results = ",\n".join(json.dumps(_rounded(row)) for row in head.pop("results"))
        lines = [f"{json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
        path.write_text("\n".join(["{", *lines, f'"results": [\n{results}\n]', "}\n"]), "utf-8")

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a run; raise ValueError, naming the file, for anything else.

        An OSError, where there is no such file or it cannot be read, passes through.
        """
        try:
            saved = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: torn, or not JSON: {error}") from error
        if not isinstance(saved, dict) or "format" not in saved:
            raise ValueError(f"{path}: must be a run that fastattn bench --json has saved")
        if saved.pop("format") != FORMAT:
            raise ValueError(
                f"{path}: must be of format {FORMAT}: measure it anew with this version"
            )
        _check_fields(str(path), saved, _FIELDS)
        for name in (*_CPU, "threads"):
            if name not in saved["machine"]:
                raise ValueError(f"{path}: machine must have an entry {name}")
        for number, row in enumerate(saved["results"]):
            _check_row(f"{path}: results[{number}]", row)
        return cls(**{name: saved[name] for name in _FIELDS})


def timed(results: Iterable[Row]) -> list[Row]:
    """Return those of the results that compare speeds."""
    return [row for row in results if "samples" in row]


def same_cpu(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether machines compare: of one CPU, and compiled for the same instructions."""
    return all(one[name] == other[name] for name in _CPU)


def described(machine: dict[str, Any]) -> str:
    """Return a machine in a few words."""
    return "{cpu} ({target}, {instruction_set}, {threads} threads)".format(**machine)


def history(folder: Path) -> list[Run]:
    """Return the runs of a folder, oldest first."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    return sorted((Run.load(path) for path in folder.glob("*.json")), key=lambda run: run.date)


def this_machine() -> dict[str, Any]:
    """Return what results depend on besides the code."""
    import llvmlite.binding as llvm

    from fastattn.kernels.host import HOST

    return {
        "cpu": _cpu_name(),
        "target": llvm.get_host_cpu_name(),
        "instruction_set": HOST.instruction_set,
        "threads": THREADS,
        "system": platform.platform(),
    }


def installed_versions() -> dict[str, str]:
    """Return the versions of whatever computes attention, and of what compiles it."""
    names = {each.name: each.distribution for each in (FASTATTN, NAIVE, *PEERS)}
    names |= {"Numba": "numba", "llvmlite": "llvmlite"}
    found = {name: installed_version(each) for name, each in names.items()}
    return {"Python": platform.python_version()} | {
        name: version for name, version in found.items() if version is not None
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git(*arguments: str) -> str:
    """Return what git says about the folder of the package."""
    command = ["git", "-C", str(SOURCE), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _commit() -> str | None:
    """Return the commit of the code in use, None where it is not kept by git."""
    try:
        # A virtual environment may lie in a repository, which is another one.
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=no", ":/*.py")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _check_fields(name: str, saved: Row, fields: dict[str, tuple[type, ...]]) -> None:
    for field, kinds in fields.items():
        if not isinstance(saved.get(field), kinds):
            raise ValueError(f"{name}: {field} is missing or of another type than it should be")


def _check_row(name: str, row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{name} must be an object: got {row!r}")
    if not timed([row]):
        return
    _check_fields(name, row, _ROW_FIELDS)
    for who in ("fastattn", row["yardstick"]):
        if who not in row["samples"]:
            raise ValueError(f"{name}: samples must hold those of {who}")
    rounds = len(row["samples"]["fastattn"])
    lists = row["samples"] | {"yardstick_cores": row.get("yardstick_cores")}
    for who, values in lists.items():
        if not (
            isinstance(values, list)
            and len(values) == rounds
            and all(isinstance(each, float) and 0 < each < math.inf for each in values)
        ):
            raise ValueError(f"{name}: {who} must be a number above 0 for each round")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value
