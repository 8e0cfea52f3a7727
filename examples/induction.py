"""Weights for `decoder.py` that are written down, not trained: a model that reads and goes on.

Training a language model takes hours. What its layers learn for continuing a text that they have in
sight is known, though, and can be written down (Olsson et al. 2022, "In-context Learning and
Induction Heads", arXiv:2209.11895). The features of a token, between the layers, have parts:

    part        features
    constant    1           always 1
    word        127         a random direction for each word
    next        127         the word that is predicted to come next, in the directions of `word`
    back[n]     4 times 64  the word n + 1 places back, found by attention

Layer 0, attention: head n looks n + 1 words back. Query and key are the constant, so rotary
positions alone decide: the query is turned by as many steps. It copies the word into back[n].

Layer 1, attention: head n looks for places where the last n + 1 words stood before, and adds the
word that came after them to `next`. Its key at a place says which words stand before that place.

Both layers, SwiGLU: a memory (Geva et al. 2021, arXiv:2012.14913). Each hidden unit knows one word;
its gate opens for that word, and what it adds to `next` is the mean of the words that follow it.

Output: how much each word looks like `next`.

Such a model understands nothing: it goes on as the text in its sight once did, from one passage to
another where some words agree, and may run in circles. But it needs all that a trained model needs,
first of all what stands thousands of tokens back in its cache.
"""

import math

import numpy as np
from decoder import Decoder, Layer, Shape

DIM = 512
LAYERS = 2
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 128
ROTATED = 32  # positions; the other features of a head are for words
HIDDEN = 1024

CONSTANT = 0
WORD = slice(1, 128)
NEXT = slice(128, 255)
BACK = [slice(256 + 64 * n, 320 + 64 * n) for n in range(HEADS)]

# Scores before the softmax: of the right position, whose neighbours get 43 less, and of each word
# that agrees. Both leave nothing to thousands of wrong places together.
POSITION_SCORE = 1000.0
WORD_SCORE = 20.0

# A memory unit opens for what resembles its word by more than this; others do by up to 0.45.
THRESHOLD = 0.7
STEEPNESS = 20.0

# Logits for each head that has found a word.
LOGIT = 5.0


def induction_model(text: np.ndarray, vocabulary: int, seed: int = 0) -> Decoder:
    """Return a model that remembers which words follow which in a text, given as token numbers."""
    rng = np.random.default_rng(seed)
    words = rng.standard_normal((vocabulary, 127))
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    embedding = np.zeros((vocabulary, DIM))
    embedding[:, CONSTANT] = 1.0
    embedding[:, WORD] = words
    output = np.zeros((DIM, vocabulary))
    output[NEXT] = LOGIT * words.T

    shorten = projection(rng, 127, 64)
    attentions = (look_back(shorten), find_again(rng, shorten))
    commonest = np.argsort(-np.bincount(text, minlength=vocabulary), kind="stable")
    layers = []
    for index, attention in enumerate(attentions):
        units = commonest[index * HIDDEN : (index + 1) * HIDDEN]
        # Before layer 0 a token is the constant and a word; four more words join them there.
        before, behind = norm(2 if index == 0 else 6), norm(6)
        layers.append(Layer(before, *attention, behind, *remember(text, words, units)))
    shape = Shape(vocabulary, DIM, LAYERS, HEADS, KV_HEADS, HEAD_DIM, ROTATED, HIDDEN)
    return Decoder(shape, single(embedding), layers, norm(6), single(output))


def look_back(shorten: np.ndarray) -> list[np.ndarray]:
    """Return w_q, w_k, w_v, w_o with which head n copies the word n + 1 places back to back[n]."""
    w_q, w_k, w_v, w_o = empty_attention()
    strength = math.sqrt(POSITION_SCORE * math.sqrt(HEAD_DIM) / (ROTATED // 2))
    angles = 10000.0 ** -(np.arange(0, ROTATED, 2) / ROTATED)
    for n in range(HEADS):
        turned = np.concatenate([np.cos((n + 1) * angles), -np.sin((n + 1) * angles)])
        w_q[CONSTANT, n, :ROTATED] = strength * turned
        w_o[n, :64, BACK[n]] = np.eye(64)
    for group in range(KV_HEADS):
        w_k[CONSTANT, group, : ROTATED // 2] = strength
        w_v[WORD, group, :64] = shorten
    return matrices(w_q, w_k, w_v, w_o)


def find_again(rng: np.random.Generator, shorten: np.ndarray) -> list[np.ndarray]:
    """Return w_q, w_k, w_v, w_o with which head n copies what followed the last n + 1 words.

    The heads of a group share one key. It holds as many words as the last of them asks for, side by
    side in the features that positions leave alone.
    """
    w_q, w_k, w_v, w_o = empty_attention()
    strength = math.sqrt(WORD_SCORE * math.sqrt(HEAD_DIM))
    group_size = HEADS // KV_HEADS
    for group in range(KV_HEADS):
        asked = (group + 1) * group_size
        width = (HEAD_DIM - ROTATED) // asked
        for m in range(asked):
            features = slice(ROTATED + m * width, ROTATED + (m + 1) * width)
            code = strength * projection(rng, 64, width)
            w_k[BACK[m], group, features] = code
            for n in range(max(m, asked - group_size), asked):
                # To what comes next, the word itself is the one before.
                if m == 0:
                    w_q[WORD, n, features] = shorten @ code
                else:
                    w_q[BACK[m - 1], n, features] = code
        w_v[WORD, group, :127] = np.eye(127)
    for n in range(HEADS):
        w_o[n, :127, NEXT] = np.eye(127)
    return matrices(w_q, w_k, w_v, w_o)


def remember(text: np.ndarray, words: np.ndarray, units: np.ndarray) -> list[np.ndarray]:
    """Return w_gate, w_up, w_down whose units add the mean of what follows each one's word."""
    follow, times = np.zeros_like(words), np.bincount(text[:-1], minlength=len(words))
    np.add.at(follow, text[:-1], words[text[1:]])
    used = slice(len(units))
    w_gate, w_up, w_down = (
        np.zeros(size) for size in ((DIM, HIDDEN), (DIM, HIDDEN), (HIDDEN, DIM))
    )
    w_gate[WORD, used] = STEEPNESS * words[units].T
    w_gate[CONSTANT] = -STEEPNESS * THRESHOLD
    # Where a gate is open silu(x) is nearly x, and with this the product is 1.
    w_up[CONSTANT] = 1.0 / (STEEPNESS * (1.0 - THRESHOLD))
    w_down[used, NEXT] = follow[units] / np.maximum(times[units], 1)[:, None]
    return [single(weight) for weight in (w_gate, w_up, w_down)]


def empty_attention() -> tuple[np.ndarray, ...]:
    """Return w_q, w_k, w_v, w_o as zeros, with an axis for the heads."""
    return (
        np.zeros((DIM, HEADS, HEAD_DIM)),
        np.zeros((DIM, KV_HEADS, HEAD_DIM)),
        np.zeros((DIM, KV_HEADS, HEAD_DIM)),
        np.zeros((HEADS, HEAD_DIM, DIM)),
    )


def matrices(
    w_q: np.ndarray, w_k: np.ndarray, w_v: np.ndarray, w_o: np.ndarray
) -> list[np.ndarray]:
    """Return the weights as matrices, the heads side by side."""
    inputs = [single(weight.reshape(DIM, -1)) for weight in (w_q, w_k, w_v)]
    return [*inputs, single(w_o.reshape(-1, DIM))]


def projection(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Return a random projection that keeps the length of a vector on average."""
    orthogonal, _ = np.linalg.qr(rng.standard_normal((rows, columns)))
    return orthogonal * math.sqrt(rows / columns)


def norm(square: float) -> np.ndarray:
    """Return the weight of an RMSNorm that leaves rows of this squared length as they are."""
    return np.full(DIM, math.sqrt(square / DIM), np.float32)


def single(x: np.ndarray) -> np.ndarray:
    """Return x in single precision and in order."""
    return np.ascontiguousarray(x, np.float32)
