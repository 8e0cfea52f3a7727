"""The worked examples of attention that this library grew out of, computed with fastattn.

Four small systems, each a function that returns its arrays, and the two steps around them that make
a transformer layer: embedded tokens with positions, and several heads. `main` prints what the notes
say beside what comes out; where the notes draw random numbers, the textbook formula stands in.

    python examples/from_the_notes.py
"""

import math
from typing import NamedTuple

import numpy as np

import fastattn

# Six words of three features each, and the figures that the notes give for them.
WORDS = np.array(
    [
        [0.43, 0.15, 0.89],
        [0.55, 0.87, 0.66],
        [0.57, 0.85, 0.64],
        [0.22, 0.58, 0.33],
        [0.77, 0.25, 0.10],
        [0.05, 0.80, 0.55],
    ]
)
SHARES_IN_NOTES = np.array([0.2241, 0.2140, 0.2113, 0.1066, 0.1026, 0.1415])
SHARE_WEIGHTS_IN_NOTES = np.array([0.1763, 0.1745, 0.1740, 0.1567, 0.1561, 0.1623])
SHARE_CONTEXT_IN_NOTES = np.array([0.4338, 0.5860, 0.5401])
FIRST_WEIGHTS_IN_NOTES = np.array([0.2098, 0.2006, 0.1981, 0.1242, 0.1220, 0.1452])
CONTEXT_IN_NOTES = np.array(
    [
        [0.4421, 0.5931, 0.5790],
        [0.4419, 0.6515, 0.5683],
        [0.4431, 0.6496, 0.5671],
        [0.4304, 0.6298, 0.5510],
        [0.4671, 0.5910, 0.5266],
        [0.4177, 0.6503, 0.5645],
    ]
)
INTEGER_FIRST_ROW_IN_NOTES = np.array([0.98522025, 1.74174051, 0.75652026])


def textbook(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Attention as its definition reads: softmax(query @ key.T / sqrt(features)) @ value."""
    scores = query @ key.T / math.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ value


class WithoutWeights(NamedTuple):
    """Attention among six words whose features serve as query, key and value at once."""

    shares: np.ndarray  # (6,) scores of the first word with every word, divided by their sum
    share_weights: np.ndarray  # (6,) softmax of the shares
    share_context: np.ndarray  # (3,) sum of the words with those weights
    weights: np.ndarray  # (6, 6) softmax of the raw scores of every word with every word
    context: np.ndarray  # (6, 3) sums of the words with those weights


def without_weights() -> WithoutWeights:
    """Attend with nothing learned: softmax(X @ X.T) @ X, and its first steps by hand.

    The notes use the raw dot products here, so `scale` is 1. Dividing scores by their sum before
    the softmax is a scale too: one over the sum.
    """
    first = WORDS[:1]
    scores = fastattn.attention_weights(first, WORDS, stage="scores", scale=1.0)
    one_over_sum = 1.0 / scores.sum()
    return WithoutWeights(
        shares=fastattn.attention_weights(first, WORDS, stage="scores", scale=one_over_sum)[0],
        share_weights=fastattn.attention_weights(first, WORDS, scale=one_over_sum)[0],
        share_context=fastattn.attention(first, WORDS, WORDS, scale=one_over_sum)[0],
        weights=fastattn.attention_weights(WORDS, WORDS, scale=1.0),
        context=fastattn.attention(WORDS, WORDS, WORDS, scale=1.0),
    )


class Projected(NamedTuple):
    """The three projections of an input, and what attention makes of them."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    output: np.ndarray


def integer_words() -> Projected:
    """Attend among four words given as integers, with integer weights: no conversion is needed.

    The notes draw their weights from NumPy's legacy generator; only it gives their figures again.
    """
    words = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]])
    generator = np.random.RandomState(42)
    w_q, w_k, w_v = (generator.randint(3, size=(3, 3)) for _ in range(3))
    query, key, value = words @ w_q, words @ w_k, words @ w_v
    return Projected(query, key, value, fastattn.attention(query, key, value))


def random_projections(seed: int = 0) -> Projected:
    """Attend among three inputs of four features, with weights drawn uniformly from [0, 1)."""
    inputs = np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    w_q, w_k, w_v = np.random.default_rng(seed).random((3, 4, 3))
    query, key, value = inputs @ w_q, inputs @ w_k, inputs @ w_v
    return Projected(query, key, value, fastattn.attention(query, key, value))


def cross_attention(seed: int = 0) -> Projected:
    """Let a target of four words read an input of six: one output row per word of the target."""
    rng = np.random.default_rng(seed)
    features = 8
    target, source = rng.standard_normal((4, features)), rng.standard_normal((6, features))
    w_q, w_k, w_v = rng.standard_normal((3, features, features)) / math.sqrt(features)
    query, key, value = target @ w_q, source @ w_k, source @ w_v
    return Projected(query, key, value, fastattn.attention(query, key, value))


def embedded(sentence: str, features: int = 12, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Return the words of a sentence and their vectors: a table's row plus a position's waves.

    Attention itself takes no notice of order; the waves tell the first "the" from the second. The
    even features hold sin(position / 10000^(feature / features)), the odd ones the cosine
    (Vaswani et al. 2017, section 3.5).
    """
    words = sentence.lower().split()
    vocabulary = sorted(set(words))
    table = np.random.default_rng(seed).standard_normal((len(vocabulary), features))
    numbers = [vocabulary.index(word) for word in words]
    return words, fastattn.embed_tokens(numbers, table)


class MultiHead(NamedTuple):
    """Several heads over the same input, side by side and mixed by one last product."""

    heads: np.ndarray  # (heads, length, head_dim)
    output: np.ndarray  # (length, features)
    expected: np.ndarray  # the same, one head after the other with the textbook formula


def multi_head(x: np.ndarray, num_heads: int = 3, seed: int = 0) -> MultiHead:
    """Attend with num_heads heads at once; each has a W_Q, W_K and W_V of its own.

    x is (length, features). A product with weights of shape (heads, features, head_dim) gives
    (heads, length, head_dim), which is what attention takes as so many heads.
    """
    length, features = x.shape
    head_dim = features // num_heads
    rng = np.random.default_rng(seed)
    w_q, w_k, w_v = rng.standard_normal((3, num_heads, features, head_dim)) / math.sqrt(features)
    w_o = rng.standard_normal((num_heads * head_dim, features)) / math.sqrt(features)

    heads = fastattn.attention(x @ w_q, x @ w_k, x @ w_v)
    output = heads.transpose(1, 0, 2).reshape(length, num_heads * head_dim) @ w_o

    one_by_one = [textbook(x @ q, x @ k, x @ v) for q, k, v in zip(w_q, w_k, w_v, strict=True)]
    return MultiHead(heads, output, np.concatenate(one_by_one, axis=-1) @ w_o)


def heat_map(weights: np.ndarray) -> str:
    """Draw a matrix of weights as rows of characters, darker for larger: rows are queries."""
    shades = " .:-=+*#%@"
    steps = np.rint(weights / weights.max() * (len(shades) - 1)).astype(int)
    return "\n".join("    " + " ".join(shades[step] * 2 for step in row) for row in steps)


def show(title: str, expected: np.ndarray, ours: np.ndarray, digits: int = 4) -> None:
    """Print expected figures beside ours, row by row, and the largest difference."""
    print(f"  {title}")
    for left, right in zip(np.atleast_2d(expected), np.atleast_2d(ours), strict=True):
        columns = ["  ".join(f"{figure:.{digits}f}" for figure in row) for row in (left, right)]
        print(f"    {columns[0]} | {columns[1]}")
    print(f"    largest difference {np.abs(expected - ours).max():.1e}")


def main() -> None:
    """Print every system, the expected figures on the left and ours on the right."""
    print("Six words attend to each other, nothing learned (notes, rounded | fastattn)")
    words = without_weights()
    show("scores of the first word, divided by their sum", SHARES_IN_NOTES, words.shares)
    show("softmax of those", SHARE_WEIGHTS_IN_NOTES, words.share_weights)
    show("weighted sum of the words", SHARE_CONTEXT_IN_NOTES, words.share_context)
    show("softmax(X X^T), first row", FIRST_WEIGHTS_IN_NOTES, words.weights[0])
    show("softmax(X X^T) X", CONTEXT_IN_NOTES, words.context)
    print("  softmax(X X^T) as a heat map")
    print(heat_map(words.weights))

    print("\nFour words as integers, integer weights (notes, rounded | fastattn)")
    show("first row", INTEGER_FIRST_ROW_IN_NOTES, integer_words().output[0], digits=8)

    print("\nThree inputs, random weights in [0, 1) (textbook formula | fastattn)")
    three = random_projections()
    show("output", textbook(three.query, three.key, three.value), three.output)
    low, high = three.value.min(axis=0), three.value.max(axis=0)
    between = bool(np.all((low <= three.output) & (three.output <= high)))
    print(f"    every row between the smallest and the largest value: {between}")

    print("\nA target of four words reads an input of six (textbook formula | fastattn)")
    cross = cross_attention()
    expected = textbook(cross.query, cross.key, cross.value)
    show("output, first four of eight features", expected[:, :4], cross.output[:, :4])

    print(
        "\nEmbedded tokens with positions, three heads (textbook formula, head by head | fastattn)"
    )
    tokens, x = embedded("the cat saw the other cat")
    layer = multi_head(x)
    print(f"  {len(tokens)} tokens: {x.shape} -> heads {layer.heads.shape} -> {layer.output.shape}")
    show("output, first four of twelve features", layer.expected[:, :4], layer.output[:, :4])


if __name__ == "__main__":
    main()
