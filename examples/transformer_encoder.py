"""The front of a transformer's encoder: tokens, positions, multi-head attention, and a picture.

    python examples/transformer_encoder.py
    python examples/transformer_encoder.py "the bank by the river" --picture bank.png --seed 3

A sentence's words become rows of an embedding table, sinusoidal positions are added, and one layer
of multi-head attention lets every word read the others. Nothing here is trained: the table and the
weights are drawn from a seed, and what the layer attends to is as good as its weights.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import fastattn

SENTENCE = "the animal did not cross the street because it was too tired"
FEATURES = 64
HEADS = 8


class Encoded(NamedTuple):
    """A sentence at each step of the way."""

    words: list[str]
    embedded: np.ndarray  # (length, FEATURES): table rows plus positions
    output: np.ndarray  # (length, FEATURES)
    weights: np.ndarray  # (HEADS, length, length): a row for each word that looks


def encode(sentence: str, seed: int = 0) -> Encoded:
    """Embed the words of a sentence, add their positions, and let them attend to each other."""
    words = sentence.lower().split()
    if not words:
        raise ValueError(f"the sentence must have a word: got {sentence!r}")
    vocabulary = sorted(set(words))
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((len(vocabulary), FEATURES), dtype=np.float32)
    embedded = fastattn.embed_tokens([vocabulary.index(word) for word in words], table)
    layer = fastattn.MultiHeadAttention(FEATURES, HEADS, rng=rng)
    output, weights = layer(embedded, need_weights=True)
    return Encoded(words, embedded, output, weights)


def print_weights(words: Sequence[str], weights: np.ndarray) -> None:
    """Print where each word looks most, how widely it looks, and how much it is looked at."""
    mean = weights.mean(axis=0)
    # The exponential of the entropy: that of an even look at n words is n.
    width = np.exp(-(mean * np.log(mean)).sum(axis=-1))
    column = max(map(len, words))
    print(f"{'word':{column}}  {'looks most at':{column + 6}}  as if at  is looked at")
    for i, word in enumerate(words):
        most = int(mean[i].argmax())
        print(
            f"{word:{column}}  {words[most]:{column}} {mean[i, most]:5.2f}  "
            f"{width[i]:4.1f} of {len(words)}  {mean[:, i].mean():10.3f}"
        )


def print_twins(sentence: Encoded) -> None:
    """Print what positions do for a word that stands in a sentence twice."""
    twins = [
        (i, j)
        for i, word in enumerate(sentence.words)
        for j in range(i + 1, len(sentence.words))
        if sentence.words[j] == word
    ]
    for i, j in twins:
        apart = [np.linalg.norm(x[i] - x[j]) for x in (sentence.embedded, sentence.output)]
        print(
            f'"{sentence.words[i]}" at {i} and at {j}: '
            f"{apart[0]:.2f} apart when embedded, {apart[1]:.2f} in the output"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Encode, print and draw; return the exit status."""
    parser = argparse.ArgumentParser(description="Send a sentence through multi-head attention.")
    parser.add_argument("sentence", nargs="?", default=SENTENCE, help="words between spaces")
    parser.add_argument("--seed", type=int, default=0, help="of table and weights (default: 0)")
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("saliency.png"),
        metavar="FILE",
        help="picture to write (default: saliency.png)",
    )
    options = parser.parse_args(arguments)
    try:
        sentence = encode(options.sentence, options.seed)
        shapes = [x.shape for x in (sentence.embedded, sentence.weights, sentence.output)]
        print(f"{len(sentence.words)} words: {shapes[0]} -> weights {shapes[1]} -> {shapes[2]}\n")
        print_weights(sentence.words, sentence.weights)
        print()
        print_twins(sentence)
        title = f"Attention that each word gets, mean of {HEADS} heads"
        figure = fastattn.plot.saliency(sentence.weights, sentence.words, title=title)
        figure.savefig(options.picture)
    except (OSError, ValueError) as error:
        print(f"transformer_encoder: {error}", file=sys.stderr)
        return 2
    print(f"saliency map: {options.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
