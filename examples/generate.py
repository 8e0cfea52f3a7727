"""Let a language model go on from a few words, token by token, with a cache of keys and values.

    python examples/generate.py                                  # after reading about Python
    python examples/generate.py "An object is" --temperature 1 --top-k 4 --seed 2
    python examples/generate.py "Call me" --text moby-dick.txt --context 8000 --cache int8

The model (`decoder.py`) first reads the beginning of a text, then every prompt, and goes on until
the paragraph ends. Its weights are written down rather than trained (`induction.py`): what it says,
it has found in what it read, through attention over the whole cache.

Afterwards the first prompt is continued again: with a cache in fewer bits, with textbook NumPy
attention and, where torch is installed, by the same model in torch, to show what each way costs and
whether it chooses the same tokens. At last all tokens are computed in one pass without a cache, and
have to be the same.
"""

import argparse
import importlib.util
import io
import itertools
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
from decoder import CachedAttention, Decoder, NaiveAttention
from induction import induction_model
from tqdm import tqdm

import fastattn

PROMPTS = ("An exception", "The operator", "Python")
PARAGRAPH = "\n\n"

# Words and marks, with the space before them where there is one: together they are the text again.
PIECE = re.compile(r"\n\n| ?\w+| ?[^\w\s]|\s")

CACHE_DTYPES = ("float32", "float16", "int8")
WIDTH = 98


def read_text(path: Path | None) -> str:
    """Return the paragraphs of a file, each on one line, or those of `reference_text`."""
    if path is None:
        return reference_text()
    text = one_line_each(re.split(r"\n\s*\n", path.read_text(encoding="utf-8-sig")))
    if not text:
        raise ValueError("no words in it")
    return text


def reference_text() -> str:
    """Return the prose of Python's language reference, which every installation carries."""
    paragraphs = [
        paragraph
        for topic in topics.topics.values()
        for paragraph in re.split(r"\n\s*\n", topic)
        if paragraph[:1].isupper() and paragraph.endswith(".")
    ]
    # Topics share paragraphs. Signs of markup are no prose.
    return re.sub(r'["*`]|\[\d+\]', "", one_line_each(dict.fromkeys(paragraphs)))


def one_line_each(paragraphs: Iterable[str]) -> str:
    """Return the paragraphs that have words, with an empty line between each two."""
    lines = (" ".join(paragraph.split()) for paragraph in paragraphs)
    return PARAGRAPH.join(line for line in lines if line)


class Vocabulary:
    """The pieces of a text, each with a number."""

    def __init__(self, text: str) -> None:
        self.pieces = list(dict.fromkeys(PIECE.findall(text)))
        self.numbers = {piece: number for number, piece in enumerate(self.pieces)}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Return the numbers of the pieces of a text, which have to be known."""
        return [self.numbers[piece] for piece in PIECE.findall(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of the pieces."""
        return "".join(self.pieces[token] for token in tokens)


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen from the logits; temperature 0 takes the largest."""

    temperature: float = 0.0
    top_k: int | None = None  # only the k most probable
    top_p: float = 1.0  # only the most probable that have this much probability together
    seed: int = 0

    def chooser(self) -> Callable[[np.ndarray], int]:
        """Return a function from logits to a token that draws the same again every time."""
        rng = np.random.default_rng(self.seed)

        def choose(logits: np.ndarray) -> int:
            if self.temperature == 0:
                return int(logits.argmax())
            tokens = np.argsort(-logits, kind="stable")[: self.top_k]
            scores = logits[tokens].astype(np.float64)
            probabilities = np.exp((scores - scores[0]) / self.temperature)
            probabilities /= probabilities.sum()
            more_probable = np.cumsum(probabilities) - probabilities
            probabilities[more_probable > self.top_p] = 0.0
            return int(rng.choice(tokens, p=probabilities / probabilities.sum()))

        return choose


def generate(
    model: Any,
    memory: Any,
    prompt: Sequence[int],
    count: int,
    choose: Callable[[np.ndarray], int],
    stop: int | None = None,
) -> Iterator[int]:
    """Yield up to `count` tokens that follow the prompt, `stop` the last of them.

    The prompt goes through the model at once, then every token alone. What was there before it is
    in the memory, where the new keys and values join them.
    """
    new = prompt
    for _ in range(count):
        token = choose(model.next_logits(new, memory))
        yield token
        if token == stop:
            return
        new = [token]


def recompute(
    model: Decoder,
    prompt: Sequence[int],
    tokens: Sequence[int],
    choose: Callable[[np.ndarray], int],
) -> list[int]:
    """Choose every token again, from one pass over all of them with textbook attention.

    No token sees those behind it, so that the state of each is what a pass that ended with it would
    give. If the choices are the tokens, then so they are without any cache.
    """
    everything = [*prompt, *tokens[:-1]]
    states = model.states(everything, NaiveAttention(model.shape, len(everything)))
    return [choose(logits) for logits in model.logits(states[len(prompt) - 1 :])]


@dataclass(frozen=True)
class Way:
    """One way of running the model: a model with `next_logits` and a memory that it can use."""

    name: str
    model: Any
    new_memory: Callable[[], Any]


def ways(model: Decoder, capacity: int) -> list[Way]:
    """Return what is compared; the first is what the others are held to."""
    size = (model.shape, capacity)
    found = [
        Way(f"fastattn {dtype}", model, partial(CachedAttention, *size, dtype))
        for dtype in CACHE_DTYPES
    ]
    found.append(Way("naive NumPy", model, partial(NaiveAttention, *size)))
    if importlib.util.find_spec("torch"):
        from decoder_torch import TorchAttention, TorchDecoder

        found.append(Way("torch", TorchDecoder(model), partial(TorchAttention, *size)))
    return found


class TimedMemory:
    """A memory that adds up the seconds its attention takes."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.seconds = 0.0

    def __call__(self, layer: int, query: Any, key: Any, value: Any) -> Any:
        """Attend, and take the time."""
        start = time.perf_counter()
        context = self.memory(layer, query, key, value)
        self.seconds += time.perf_counter() - start
        return context

    @property
    def length(self) -> int:
        """Tokens seen."""
        return int(self.memory.length)


@dataclass(frozen=True)
class Cost:
    """Seconds that something took, and those of them that went into attention."""

    seconds: float
    attention: float


@dataclass(frozen=True)
class Run:
    """What one way of running the model made of a prompt, and at what cost."""

    name: str
    nbytes: int  # keys and values
    prompt: Cost  # with the first token
    step: Cost  # one later token: medians over all
    tokens: list[int]


def measure(way: Way, prompt: Sequence[int], count: int, sampler: Sampler) -> Run:
    """Generate and take the time of the prompt and of each token."""
    # What is compiled or allocated once, at the first call of a kind, is no part of the speed.
    for _ in generate(way.model, way.new_memory(), prompt[-9:], 2, sampler.chooser()):
        pass
    memory = TimedMemory(way.new_memory())
    tokens, clocks = [], [(time.perf_counter(), 0.0)]
    steps = generate(way.model, memory, prompt, count, sampler.chooser())
    for token in tqdm(steps, way.name, count, leave=False, unit="token"):
        tokens.append(token)
        clocks.append((time.perf_counter(), memory.seconds))
    seconds = np.diff(clocks, axis=0)
    first, later = Cost(*seconds[0]), Cost(*np.median(seconds[1:], axis=0))
    return Run(way.name, memory.memory.nbytes, first, later, tokens)


def equal_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens are equal before the first that is not."""
    pairs = zip(first, second, strict=True)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def print_runs(runs: Sequence[Run]) -> None:
    """Print what each run cost, and how long its tokens are those of the first."""
    print(
        f"{'':18}{'prompt':>9}{'attention':>11}{'token':>11}{'attention':>11}"
        f"{'tokens/s':>10}{'cache':>11}{'same tokens':>13}"
    )
    for run in runs:
        same = equal_tokens(run.tokens, runs[0].tokens)
        print(
            f"{run.name:18}{run.prompt.seconds:>7.2f} s{run.prompt.attention:>9.2f} s"
            f"{run.step.seconds * 1e3:>8.2f} ms{run.step.attention * 1e3:>8.2f} ms"
            f"{1 / run.step.seconds:>10.1f}{run.nbytes / 2**20:>7.1f} MiB"
            f"{f'{same} of {len(run.tokens)}':>13}"
        )
    rates = ", ".join(f"{1 / run.prompt.seconds:.1f} with {run.name}" for run in runs)
    print(
        textwrap.fill(
            f"tokens/s without a cache, where each costs what the prompt does: {rates}", WIDTH
        )
    )


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from the command line that refuses smaller ones."""

    def read(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}: got {number}")
        return number

    return read


def between(low: float, high: float) -> Callable[[str], float]:
    """Return a reader of numbers from the command line that refuses those out of a range."""

    def read(text: str) -> float:
        number = float(text)
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"must lie between {low} and {high}: got {number}")
        return number

    return read


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a word that it does not know ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description="Let a language model go on from a few words, with fastattn as the attention."
    )
    parser.add_argument("prompts", nargs="*", default=PROMPTS, help="how paragraphs begin")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="text to read first, paragraphs between empty lines "
        "(default: Python's language reference)",
    )
    parser.add_argument(
        "--context", type=at_least(1), default=4096, help="tokens of it to read (default: 4096)"
    )
    parser.add_argument(
        "--tokens", type=at_least(3), default=64, help="most tokens to generate (default: 64)"
    )
    parser.add_argument(
        "--temperature",
        type=between(0, 100),
        default=0.0,
        help="0 chooses the most probable token, 1 by probability, more is bolder (default: 0)",
    )
    parser.add_argument("--top-k", type=at_least(1), help="choose among so many tokens")
    parser.add_argument(
        "--top-p",
        type=between(0, 1),
        default=1.0,
        help="choose among the most probable that together have this probability (default: 1)",
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="of all random numbers (default: 0)"
    )
    parser.add_argument(
        "--cache",
        choices=CACHE_DTYPES,
        default=CACHE_DTYPES[0],
        help="what keys and values are kept in (default: float32)",
    )
    parser.add_argument(
        "--no-comparison", action="store_true", help="only go on; do not run the model other ways"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, go on, compare; return the exit status: 1 where a token is not that of recomputing."""
    options = parse_arguments(arguments)
    try:
        text = read_text(options.text)
    except (OSError, ValueError) as error:
        print(f"generate: {options.text}: {error}", file=sys.stderr)
        return 2

    vocabulary = Vocabulary(PARAGRAPH.join([text, *options.prompts]))
    tokens = np.array(vocabulary.encode(text), np.intp)
    model = induction_model(tokens, len(vocabulary), options.seed)
    sampler = Sampler(options.temperature, options.top_k, options.top_p, options.seed)
    context = tokens[: options.context].tolist()
    prompts = [vocabulary.encode(PARAGRAPH + prompt) for prompt in options.prompts]
    capacity = len(context) + max(map(len, prompts)) + options.tokens
    print(
        f"{len(tokens)} tokens of text, {len(vocabulary)} different; "
        f"the model keeps {len(context)} of them in sight"
    )

    fastattn.warmup([np.float32])
    memory = CachedAttention(model.shape, capacity, options.cache)
    model.states(context, memory)
    (stop,) = vocabulary.encode(PARAGRAPH)
    for words, prompt in zip(options.prompts, prompts, strict=True):
        memory.truncate(len(context))  # all but the text is forgotten, which is read only once
        steps = generate(model, memory, prompt, options.tokens, sampler.chooser(), stop)
        found = list(tqdm(steps, "generating", options.tokens, leave=False, unit="token"))
        continued = f"[{words}]{vocabulary.decode(found).rstrip()}"
        print(f"\n{textwrap.fill(continued, WIDTH)}")

    if options.no_comparison:
        return 0
    prompt = context + prompts[0]
    print(f"\nThe first once more: {len(prompt)} tokens at once, then {options.tokens} one by one")
    runs = [measure(way, prompt, options.tokens, sampler) for way in ways(model, capacity)]
    print_runs(runs)
    again = recompute(model, prompt, runs[0].tokens, sampler.chooser())
    same = equal_tokens(runs[0].tokens, again)
    print(f"recomputed in one pass, without a cache: {same} of {len(again)} tokens are the same")
    return 0 if same == len(again) else 1


if __name__ == "__main__":
    # A text may hold what the terminal's encoding has no character for.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
