"""The command line: ``fastattn COMMAND``, or ``python -m fastattn COMMAND``.

Bad input ends a command with status 2 and one line that says what was wrong. Status 1 is an answer:
something is slower than it was, or the doctor has found an error.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn import plot
from fastattn.cores import usable_cores
from fastattn.progress import draw_progress

if TYPE_CHECKING:
    from fastattn.bench.cases import Case
    from fastattn.bench.saved import Run

# What bad input raises: here, in the library, or in the system when a file is opened. RuntimeError
# is that of a process that was to measure something.
_EXPECTED = (ImportError, OSError, RuntimeError, TypeError, ValueError)

_VARIANTS = ("mask", "key_padding", "bias", "softcap")
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    # A token or a file's name may hold what the terminal's encoding has no character for.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    options.arguments = arguments
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has seen enough. Python would complain once more when it closes the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except _EXPECTED as error:
        said = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            said = f"{error.filename}: {error.strerror}"
        print(f"fastattn {options.command}: {said}", file=sys.stderr)
        return 2
    return status


# ---------------------------------------------------------------------------
# doctor, warmup, cache
# ---------------------------------------------------------------------------


def _doctor(_: argparse.Namespace) -> int:
    from fastattn.doctor import examine

    fastattn.show_versions()
    print()
    findings = examine()
    width = max(len(each.what) for each in findings)
    for each in findings:
        print(f"{each.state:7}  {each.what:{width}}  {each.found}")
        if each.remedy:
            print(f"{'':7}  {'':{width}}  -> {each.remedy}")
    return int(any(each.state == "error" for each in findings))


def _warmup(options: argparse.Namespace) -> int:
    from fastattn.kernels import code_cache

    if "bfloat16" in options.dtypes:
        import ml_dtypes  # noqa: F401  (teaches NumPy the name)
    begin = time.perf_counter()
    fastattn.warmup(options.dtypes or None)
    where = code_cache.directory()
    kept = "only in the memory of this process" if where is None else f"in {where}"
    print(f"compiled in {time.perf_counter() - begin:.1f} s, and kept {kept}")
    return 0


def _cache(options: argparse.Namespace) -> int:
    from fastattn.kernels import code_cache

    current, kept = code_cache.directory(), code_cache.kept()
    others = {path: size for path, size in kept.items() if path != current}
    if options.action is not None:
        removed = kept if options.action == "clear" else others
        for path in removed:
            shutil.rmtree(path)
        print(f"removed {_mebibytes(removed)}")
    elif current is None:
        print("nothing can be kept: fastattn doctor says why")
    else:
        print(f"{current}: {_mebibytes({current: kept[current]})}")
        print(f"of other versions: {_mebibytes(others)} in {len(others)} folders beside it")
    return 0


def _mebibytes(sizes: dict[Path, int]) -> str:
    return f"{sum(sizes.values()) / 2**20:.1f} MiB"


# ---------------------------------------------------------------------------
# bench, compare, gate
# ---------------------------------------------------------------------------


def _bench(options: argparse.Namespace) -> int:
    from fastattn.bench import run, table
    from fastattn.bench.machine import limit_threads
    from fastattn.bench.measure import CASE_SECONDS, QUICK_SECONDS, WrongResultError
    from fastattn.bench.providers import PEERS
    from fastattn.bench.saved import Run

    cases = _cases(options)
    if options.list:
        print("\n".join(f"{case.target:4} {case.name}" for case in cases))
        return 0
    for folder in (options.json and options.json.parent, options.keep):
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
    if options.json is not None and options.json.is_dir():
        raise IsADirectoryError(f"{options.json}: --json needs a file, --keep a folder")
    status = _in_limited_process(options.threads or usable_cores(), options.arguments)
    if status is not None:
        return status

    limit_threads()
    try:
        results = run.measure(
            cases,
            peers=() if options.no_peers else PEERS,
            seconds=QUICK_SECONDS if options.quick else CASE_SECONDS,
            progress=_progress,
        )
    except WrongResultError as error:
        print(f"fastattn bench: {error}", file=sys.stderr)
        return 1
    print(table.text(results))
    measured = Run.of(results)
    if options.json:
        measured.save(options.json)
    if options.keep:
        measured.save(options.keep / measured.file_name)
    return 0


def _cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases that are asked for."""
    from fastattn.bench import run

    if options.shape is not None:
        if options.cases:
            raise ValueError("--shape is a case of its own: name no others")
        case = run.custom_case(
            options.shape, options.dtype or "float32", options.causal, options.variant
        )
        return [case]
    if options.dtype or options.causal or options.variant:
        raise ValueError("--dtype, --causal and --variant describe a --shape: give one")
    cases = run.chosen(options.cases)
    return run.quick(cases) if options.quick and not options.cases else cases


def _in_limited_process(threads: int, arguments: Sequence[str]) -> int | None:
    """Run the command in a process whose libraries have so many threads; None if this is one.

    NumPy's BLAS asks for its number of threads when it is loaded, which it has been by now.
    """
    from fastattn.bench.machine import settings

    wanted = settings(threads)
    if wanted.items() <= os.environ.items():
        return None
    command = [sys.executable, "-m", "fastattn", *arguments]
    return subprocess.run(command, env=os.environ | wanted, check=False).returncode


def _progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        draw_progress("measuring", done, total, what)


def _compare(options: argparse.Namespace) -> int:
    from fastattn.bench import compare
    from fastattn.bench.saved import Run

    old, new = (Run.load(path) for path in (options.old, options.new))
    compared = compare.changes(old, new)
    print(_heading(old, new))
    print(compare.text(compared))
    for name, run, other in (("old", old, new), ("new", new, old)):
        missing = [case for case in run.speeds if case not in other.speeds]
        if missing:
            print(f"\nonly in the {name} run: {', '.join(missing)}")
    return int(any(each.is_slower_than(options.fail_under) for each in compared))


def _heading(old: Run, new: Run) -> str:
    """Return what a table of changes is about."""
    commits = (f"{run.commit or 'unknown code'} of {run.date}" for run in (old, new))
    return "speed of {1}\n  over that of {0}\n".format(*commits)


def _gate(options: argparse.Namespace) -> int:
    from fastattn.bench import compare, gate, run

    base = gate.last_run(options.folder)
    cases = [case.name for case in run.chosen(options.cases) if case.name in base.speeds]
    if not cases:
        raise ValueError(f"{options.folder}: the last run of this CPU has none of these cases")

    def measure(cases: Sequence[str]) -> Run:
        return _measured(cases, base.machine["threads"])

    with gate.comparing(base, measure) as (again, how):
        print(f"compared with {base.commit or 'unknown code'} of {base.date}, {how}\n", flush=True)
        answer = gate.ask(cases, again, options.fail_under)
    print(gate.text(answer.levels))
    if answer.slower:
        print(f"\nslower\n{compare.text(answer.slower)}")
        return 1
    print(f"\nnothing has fallen under {options.fail_under:g} of its speed")
    return 0


def _measured(cases: Sequence[str], threads: int) -> Run:
    """Measure cases, without the peers, in a fresh process."""
    from fastattn.bench.saved import Run

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.json")
        options = ["--no-peers", "--threads", str(threads), "--json", str(path)]
        command = [sys.executable, "-m", "fastattn", "bench", *options, "--", *cases]
        status = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        if status:
            raise RuntimeError(f"measuring has ended with status {status}")
        return Run.load(path)


# ---------------------------------------------------------------------------
# heatmap
# ---------------------------------------------------------------------------


class _Picture(NamedTuple):
    """Weights of one head or several, and the tokens along them."""

    weights: NDArray[Any]
    queries: list[str] | None
    keys: list[str] | None


def _heatmap(options: argparse.Namespace) -> int:
    is_text = options.text is not None
    weights, queries, keys = _of_text(options) if is_text else _of_file(options)
    if options.head != "all":
        weights = _one_head(weights, options.head)
    elif options.output is None:
        raise ValueError("--head all is for pictures: give an --output")
    vmax = None
    if is_text:
        from fastattn.minilm import darkest_between_words

        vmax = darkest_between_words(weights)
    if options.output is not None:
        draw = plot.heads if options.head == "all" else plot.heat_map
        draw(weights, queries, keys, vmax=vmax).savefig(options.output)
        return 0
    columns = shutil.get_terminal_size().columns
    shades = " ░▒▓█" if _shows_blocks() else " .:*#"
    print(plot.heat_map_text(weights, queries, keys, columns=columns, vmax=vmax, shades=shades))
    return 0


def _of_text(options: argparse.Namespace) -> _Picture:
    """Return what an encoder attends to in a text."""
    from fastattn.minilm import SentenceEncoder

    if options.model is None or options.file is not None or options.tokens is not None:
        raise ValueError("--text needs a --model FOLDER, and neither a FILE nor --tokens")
    pieces, weights = SentenceEncoder.from_folder(options.model).weights(
        options.text, options.layer
    )
    return _Picture(weights, pieces, pieces)


def _of_file(options: argparse.Namespace) -> _Picture:
    """Return the weights of a file, and the tokens that it holds or that were given."""
    if options.file is None:
        raise ValueError("give a FILE of weights, or a --text and a --model FOLDER")
    arrays = _arrays(options.file)
    if "weights" not in arrays:
        names = ", ".join(arrays) or "nothing"
        raise ValueError(f"{options.file}: must hold an array named weights: got {names}")
    if options.tokens is not None:
        arrays["tokens"] = np.array(options.tokens.split())
    tokens = arrays.get("tokens")
    queries, keys = (
        None if each is None else [str(token) for token in each]
        for each in (arrays.get("queries", tokens), arrays.get("keys", tokens))
    )
    return _Picture(arrays["weights"], queries, keys)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz file by name; that of an .npy file is called weights."""
    try:
        loaded = np.load(path, allow_pickle=False)
        return {"weights": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (EOFError, ValueError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: torn, or neither an .npy nor an .npz file") from error


def _one_head(weights: NDArray[Any], head: int | None) -> NDArray[Any]:
    """Return the weights of one head, or the mean of all."""
    if head is None:
        return weights.mean(axis=0) if weights.ndim == 3 else weights
    if weights.ndim != 3 or head >= len(weights):
        raise ValueError(f"--head must be a head of the weights, whose shape is {weights.shape}")
    return np.asarray(weights[head])


def _shows_blocks() -> bool:
    try:
        "█".encode(sys.stdout.encoding)
    except (LookupError, UnicodeEncodeError):
        return False
    return True


# ---------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """End the program."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastattn",
        description="Watch what attention costs on this machine, and what it looks at.",
        epilog="fastattn COMMAND --help says more about each.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastattn {fastattn.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], summary: str, details: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.\n\n{details}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.set_defaults(run=run)
        return added

    command("doctor", _doctor, "look for what makes calls slow, or fail, on this machine", _DOCTOR)

    warmup = command("warmup", _warmup, "compile the kernels beforehand", _WARMUP)
    warmup.add_argument("dtypes", nargs="*", metavar="DTYPE", help="default: float32 float64")

    cache = command("cache", _cache, "show, or remove, the compiled code on disk", _CACHE)
    cache.add_argument(
        "action",
        nargs="?",
        choices=["prune", "clear"],
        help="remove that of other versions of the kernels (prune), or all (clear)",
    )

    bench = command("bench", _bench, "measure attention here, against others", _BENCH)
    bench.add_argument("cases", nargs="*", metavar="CASE", help="a group, or a part of a name")
    bench.add_argument("--list", action="store_true", help="only name the cases")
    bench.add_argument(
        "--quick",
        action="store_true",
        help="fewer rounds, and fewer cases unless some are named: under two minutes",
    )
    bench.add_argument("--shape", metavar="B,Hq,Hkv,Lq,Lk,D", help="a case of your own")
    bench.add_argument("--dtype", choices=_DTYPES, help="of that case (default: float32)")
    bench.add_argument("--causal", action="store_true", help="hide keys behind their queries")
    bench.add_argument("--variant", choices=_VARIANTS, help="what is added, without --causal")
    bench.add_argument("--no-peers", action="store_true", help="only the textbook in NumPy")
    bench.add_argument(
        "--threads", type=_count, metavar="N", help="for everybody (default: every core)"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="save the run")
    bench.add_argument("--keep", type=Path, metavar="FOLDER", help="save it in a history")

    compare = command("compare", _compare, "say what changed between two runs", _COMPARE)
    compare.add_argument("old", type=Path, metavar="OLD", help="what bench --json has saved")
    compare.add_argument("new", type=Path, metavar="NEW", help="the same, later")
    compare.add_argument(
        "--fail-under",
        type=_ratio,
        default=0.0,
        metavar="RATIO",
        help="status 1 if the speed of any case fell below this share, beyond noise",
    )

    gate = command("gate", _gate, "measure whether anything has become slower", _GATE)
    gate.add_argument("folder", type=Path, metavar="FOLDER", help="of runs: bench --keep fills it")
    gate.add_argument("cases", nargs="*", metavar="CASE", help="as of bench (default: all)")
    gate.add_argument(
        "--fail-under",
        type=_ratio,
        default=0.93,
        metavar="RATIO",
        help="the share of its speed that a case may fall to (default: 0.93)",
    )

    heatmap = command("heatmap", _heatmap, "draw who attends to whom", _HEATMAP)
    heatmap.add_argument("file", nargs="?", type=Path, metavar="FILE", help=".npy or .npz")
    heatmap.add_argument("--tokens", metavar="WORDS", help="along both axes: 'the cat sat'")
    heatmap.add_argument("--text", help="draw what an encoder attends to in this text")
    heatmap.add_argument(
        "--model", type=Path, metavar="FOLDER", help="model.safetensors and tokenizer.json"
    )
    heatmap.add_argument("--layer", type=int, default=4, help="of the encoder, 1 to 6 (default: 4)")
    heatmap.add_argument(
        "--head", type=_head, metavar="N", help="from 0, or all (default: their mean)"
    )
    heatmap.add_argument("--output", type=Path, metavar="FILE", help="a picture, such as a .png")
    return parser


def _count(text: str) -> int:
    cores = usable_cores()
    if not text.isdecimal() or not 1 <= int(text) <= cores:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {cores}: got {text!r}")
    return int(text)


def _ratio(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0: got {text!r}")
    return number


def _head(text: str) -> int | str:
    if text == "all":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be all, or a whole number from 0: got {text!r}")
    return int(text)


_DOCTOR = """\
Prints versions and findings, each with its remedy. Status 1 if calls cannot work at all.
"""

_WARMUP = """\
The first call of a dtype compiles for some seconds, in every new environment. Run this where an
image is built, and no user waits:

  fastattn warmup
  fastattn warmup float32 bfloat16
"""

_CACHE = """\
Compiled code is kept for each version of the kernels, and an update leaves that of the last one
behind. What is removed is compiled again by whoever needs it. FASTATTN_CACHE_DIR chooses another
folder.
"""

_BENCH = """\
Everybody who is installed computes the same in turns, in one process: the textbook in NumPy,
PyTorch, OpenVINO, onnxruntime, JAX. Nobody is timed whose result is wrong.

  fastattn bench --quick                        # an overview
  fastattn bench T1 causal                      # some cases of the grid; --list names them
  fastattn bench --shape 1,8,2,1024,1024,64 --causal --dtype float16
  fastattn bench --json today.json              # to compare with later

A shape is batch, query heads, key/value heads, queries, keys, head_dim.

  time        the median of one call, +- the distance between the quartiles
  GFLOP/s     flops for visible pairs of query and key only
  of peak     share of the multiply-adds that these cores can do, measured in the same rounds
  NumPy ...   how many times as fast as they; * marks the fastest of them
  of plain    time as a multiple of the same case without mask, bias or causal, or in float32
"""

_COMPARE = """\
Times of two hours do not compare, so each round is divided by a yardstick of that round: what the
cores can multiply or read at most, or NumPy for small calls. Above 1 the new run is faster.
"slower" and "faster" mark what the spread of rounds, and of processes, does not explain.

  fastattn compare before.json after.json --fail-under 0.95
"""

_GATE = """\
Compares with the last run of the same CPU in FOLDER: in turns with the code of that run, where git
has it, because what else runs on a machine changes with the hour; or else by its figures. What
looks slower is measured again, five to ten times, and only what is slower by all of them together,
beyond what they differ by, ends with status 1.

  fastattn bench --keep history                 # first: something to compare with
  fastattn gate history
"""

_HEATMAP = """\
Rows are queries, columns are keys. An .npz file holds weights, of shape (queries, keys) or
(heads, queries, keys), and may hold tokens, or queries and keys, to write beside them.

  fastattn heatmap weights.npz                  # in the terminal
  fastattn heatmap weights.npy --tokens "the cat sat" --output weights.png
  fastattn heatmap --text "The cat sat, because it was tired." --model FOLDER
"""
