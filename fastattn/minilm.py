"""A sentence encoder in NumPy: the 6-layer MiniLM, with the attention function as a parameter.

The network is `sentence-transformers/all-MiniLM-L6-v2`: BERT (Devlin et al. 2018,
arXiv:1810.04805) with 6 layers of 12 heads, whose token vectors are averaged and normalised.
Because attention is a parameter, the same weights run with `fastattn.attention` and with anything
else, and any difference between two runs is one in attention alone (`examples/semantic_search.py`
shows it). The command ``fastattn heatmap`` draws what the network attends to.

    encoder = SentenceEncoder.from_folder("model")
    embeddings = encoder.encode(["The first text.", "The second."])      # (2, 384) float32
    similarity = embeddings @ embeddings.T                               # cosines: rows have norm 1
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastattn.attention import attention as fused_attention
from fastattn.attention import attention_weights
from fastattn.progress import draw_progress

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Array = NDArray[Any]

HIDDEN = 384
LAYERS = 6
HEADS = 12
HEAD_DIM = HIDDEN // HEADS
FEED_FORWARD = 1536
VOCABULARY = 30522
POSITIONS = 512
NORM_EPSILON = 1e-12

# The model is meant for texts of at most this many word pieces; the rest of a longer one is unread.
MAX_TOKENS = 256

# What config.json must agree with. Keys that it leaves out are not checked: the tensors are.
CONFIG = {
    "model_type": "bert",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FEED_FORWARD,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "position_embedding_type": "absolute",
    "hidden_act": "gelu",
    "layer_norm_eps": NORM_EPSILON,
}

# query, key, value of shape (batch, heads, length, head_dim) and the keyword kv_lengths of shape
# (batch,), the number of real tokens of each text; returns the shape of query.
Attention = Callable[..., Array]


@dataclass(frozen=True)
class Linear:
    """`x @ weight.T + bias`, with `weight` as PyTorch stores it: (out features, in features)."""

    weight: Array
    bias: Array

    def __call__(self, x: Array) -> Array:
        """Return x @ weight.T + bias."""
        product = x @ self.weight.T
        product += self.bias
        return product


@dataclass(frozen=True)
class LayerNorm:
    """Each row to mean 0 and variance 1, then scaled and shifted (Ba et al. 2016, section 3)."""

    weight: Array
    bias: Array

    def __call__(self, x: Array) -> Array:
        """Return the normalised rows."""
        centred: Array = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        centred *= self.weight / np.sqrt(variance + NORM_EPSILON)
        centred += self.bias
        return centred


def gelu(x: Array) -> Array:
    """`x * (1 + erf(x / sqrt(2))) / 2`, within 1e-6 (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    NumPy has no erf. This is formula 7.1.26 of Abramowitz and Stegun (1964), whose error in erf is
    at most 1.5e-7. What it gives is erfc(|x|), from which both halves follow without the
    cancellation that 1 + erf(x) suffers for negative x.
    """
    magnitude = np.abs(x)
    t = 1.0 / (1.0 + (0.3275911 / math.sqrt(2.0)) * magnitude)
    erfc = 1.061405429 * t
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        erfc += coefficient
        erfc *= t
    erfc *= np.exp(-0.5 * np.square(x))
    return np.maximum(x, 0.0) - 0.5 * magnitude * erfc


@dataclass(frozen=True)
class EncoderLayer:
    """One layer of BERT: attention, then feed-forward, each added to its input and normalised."""

    query_key_value: Linear
    attention_output: Linear
    attention_norm: LayerNorm
    widen: Linear
    narrow: Linear
    output_norm: LayerNorm

    def __call__(self, x: Array, lengths: Array, attention: Attention) -> Array:
        """x is (batch * length, HIDDEN): texts padded to one length, one after another."""
        x = self.attention_norm(x + self.attention_output(self._attend(x, lengths, attention)))
        return self.output_norm(x + self._feed_forward(x))

    def _attend(self, x: Array, lengths: Array, attention: Attention) -> Array:
        # One product for all three, cut into views: (3, batch, heads, length, head_dim), no copies.
        split = self.query_key_value(x).reshape(len(lengths), -1, 3, HEADS, HEAD_DIM)
        query, key, value = split.transpose(2, 0, 3, 1, 4)
        context = attention(query, key, value, kv_lengths=lengths)
        return context.transpose(0, 2, 1, 3).reshape(x.shape)

    def _feed_forward(self, x: Array, rows: int = 128) -> Array:
        # The widened rows pass through a dozen element-wise steps. A few rows at a time, they stay
        # in the processor's cache instead of going to memory and back at every step.
        output = np.empty_like(x)
        for start in range(0, len(x), rows):
            block = slice(start, start + rows)
            output[block] = self.narrow(gelu(self.widen(x[block])))
        return output


class SentenceEncoder:
    """Turns texts into vectors whose dot product is their similarity in meaning."""

    def __init__(self, tensors: dict[str, Array], tokenizer: Tokenizer) -> None:
        """Take the tensors named in `expected_shapes()` and the tokenizer that belongs to them."""
        self.tokenizer = tokenizer
        # The padding of this encoder depends on the batch, so whatever the file asks for is undone.
        tokenizer.no_padding()
        tokenizer.enable_truncation(MAX_TOKENS)

        self._words = tensors["embeddings.word_embeddings.weight"]
        # No text here has a second segment: token type 0 is the same for every token.
        self._positions = (
            tensors["embeddings.position_embeddings.weight"]
            + tensors["embeddings.token_type_embeddings.weight"][0]
        )
        self._norm = _layer_norm(tensors, "embeddings.LayerNorm")
        self._layers = [_encoder_layer(tensors, index) for index in range(LAYERS)]

    @classmethod
    def from_folder(cls, path: str | Path) -> SentenceEncoder:
        """Load `model.safetensors` and `tokenizer.json`; check `config.json` where there is one.

        Raises FileNotFoundError for a folder or file that is missing, ValueError, naming the file
        and what was expected of it, for one that cannot be read or holds another network, and
        ImportError without what reads them: ``pip install 'fastattn[minilm]'``.
        """
        try:
            import safetensors  # noqa: F401
            import tokenizers  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "fastattn.minilm needs the packages safetensors and tokenizers: "
                "pip install 'fastattn[minilm]'"
            ) from error
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such model folder")
        for name in ("model.safetensors", "tokenizer.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: no such file, and the model needs it")
        if (folder / "config.json").is_file():
            _check_config(folder / "config.json")
        tokenizer = _load_tokenizer(folder / "tokenizer.json")
        return cls(_load_tensors(folder / "model.safetensors"), tokenizer)

    def encode(
        self,
        texts: Sequence[str],
        *,
        attention: Attention = fused_attention,
        batch_size: int = 32,
        progress: bool = False,
    ) -> Array:
        """Return one unit vector per text, (len(texts), HIDDEN) float32, in the order given.

        attention is called once per layer and batch as `attention(query, key, value,
        kv_lengths=lengths)`.
        """
        tokens = self.tokenize(texts)
        embeddings = np.empty((len(tokens), HIDDEN), np.float32)
        done = 0
        for batch in batches_by_length(tokens, batch_size):
            embeddings[batch] = self.encode_batch([tokens[i] for i in batch], attention)
            done += len(batch)
            if progress:
                draw_progress("encoding", done, len(tokens))
        return embeddings

    def weights(self, text: str, layer: int) -> tuple[list[str], Array]:
        """Return the word pieces of one text, and the weights (HEADS, pieces, pieces) of a layer.

        The fused kernel never forms the weights. The queries and keys of the layer are therefore
        caught on their way in, and `attention_weights` computes the matrices. Layers count from 1.
        """
        if not 1 <= layer <= LAYERS:
            raise ValueError(f"layer must lie between 1 and {LAYERS}: got {layer}")
        inputs: list[tuple[Array, Array]] = []

        def recording(query: Array, key: Array, value: Array, *, kv_lengths: Array) -> Array:
            inputs.append((query, key))
            return fused_attention(query, key, value, kv_lengths=kv_lengths)

        self.encode([text], attention=recording)
        query, key = inputs[layer - 1]
        return self.pieces(text), attention_weights(query[0], key[0])

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the vocabulary numbers of each text's word pieces, [CLS] and [SEP] included."""
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings: got one string")
        return [encoding.ids for encoding in self._encodings(texts)]

    def pieces(self, text: str) -> list[str]:
        """Return the word pieces of one text as they are written in the vocabulary."""
        return list(self._encodings([text])[0].tokens)

    def _encodings(self, texts: Sequence[str]) -> list[Encoding]:
        # Half of a surrogate pair, as in an argument that was not UTF-8, cannot be tokenized.
        encodable = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        return list(self.tokenizer.encode_batch(encodable))

    def encode_batch(self, tokens: Sequence[list[int]], attention: Attention) -> Array:
        """Encode texts given as vocabulary numbers together, padded to the longest of them."""
        lengths = np.array([len(text) for text in tokens])
        longest = lengths.max()
        is_token = np.arange(longest) < lengths[:, None]
        numbers = np.zeros(is_token.shape, np.intp)
        numbers[is_token] = np.concatenate(tokens)

        x = self._words[numbers] + self._positions[:longest]
        x = self._norm(x.reshape(-1, HIDDEN))
        for layer in self._layers:
            x = layer(x, lengths, attention)

        shares = (is_token / lengths[:, None]).astype(np.float32)
        means: Array = (shares[:, None, :] @ x.reshape(*is_token.shape, HIDDEN))[:, 0]
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        return means


def darkest_between_words(weights: Array) -> float | None:
    """Return the largest weight between words, for the darkest shade of a picture.

    Most heads park their attention on [CLS] or [SEP] when they have nothing to say, and a picture
    would show little else than that. None where there are no words.
    """
    return float(weights[..., 1:-1, 1:-1].max(initial=0.0)) or None


def batches_by_length(tokens: Sequence[list[int]], batch_size: int) -> list[Array]:
    """Group texts of like length, so that little is padded; the longest come first.

    Longest first because a progress bar that speeds up is kinder than one that slows down, and
    because a batch too large for memory is then found at once.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1: got {batch_size}")
    order = np.argsort([-len(text) for text in tokens], kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that the encoder uses."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (VOCABULARY, HIDDEN),
        "embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
        "embeddings.LayerNorm.weight": (HIDDEN,),
        "embeddings.LayerNorm.bias": (HIDDEN,),
    }
    for index in range(LAYERS):
        layer = f"encoder.layer.{index}"
        for name, rows, columns in (
            ("attention.self.query", HIDDEN, HIDDEN),
            ("attention.self.key", HIDDEN, HIDDEN),
            ("attention.self.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", FEED_FORWARD, HIDDEN),
            ("output.dense", HIDDEN, FEED_FORWARD),
        ):
            shapes[f"{layer}.{name}.weight"] = (rows, columns)
            shapes[f"{layer}.{name}.bias"] = (rows,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{layer}.{name}.weight"] = (HIDDEN,)
            shapes[f"{layer}.{name}.bias"] = (HIDDEN,)
    return shapes


def _linear(tensors: dict[str, Array], name: str) -> Linear:
    return Linear(tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def _layer_norm(tensors: dict[str, Array], name: str) -> LayerNorm:
    return LayerNorm(tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def _encoder_layer(tensors: dict[str, Array], index: int) -> EncoderLayer:
    layer = f"encoder.layer.{index}"
    projections = [
        _linear(tensors, f"{layer}.attention.self.{name}") for name in ("query", "key", "value")
    ]
    return EncoderLayer(
        query_key_value=Linear(
            np.concatenate([projection.weight for projection in projections]),
            np.concatenate([projection.bias for projection in projections]),
        ),
        attention_output=_linear(tensors, f"{layer}.attention.output.dense"),
        attention_norm=_layer_norm(tensors, f"{layer}.attention.output.LayerNorm"),
        widen=_linear(tensors, f"{layer}.intermediate.dense"),
        narrow=_linear(tensors, f"{layer}.output.dense"),
        output_norm=_layer_norm(tensors, f"{layer}.output.LayerNorm"),
    )


def _check_config(path: Path) -> None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object: got {type(config).__name__}")
    for key, expected in CONFIG.items():
        if config.get(key, expected) != expected:
            raise ValueError(f"{path}: {key} must be {expected!r}: got {config[key]!r}")


def _load_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer file: {error}") from error
    size = tokenizer.get_vocab_size()
    if size != VOCABULARY:
        raise ValueError(f"{path}: the vocabulary must have {VOCABULARY} entries: got {size}")
    return tokenizer


def _load_tensors(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file: {error}") from error
    except TypeError as error:  # bfloat16 and float8, where nothing has taught NumPy about them
        raise ValueError(f"{path}: must hold float16, float32 or float64: {error}") from error

    for name, shape in expected_shapes().items():
        if name not in tensors:
            raise ValueError(f"{path}: lacks the tensor {name} of shape {shape}")
        tensor = tensors[name]
        if tensor.shape != shape:
            raise ValueError(f"{path}: {name} must have shape {shape}: got {tensor.shape}")
        if tensor.dtype.kind != "f":
            raise ValueError(
                f"{path}: {name} must be float16, float32 or float64: got {tensor.dtype}"
            )

    # A deeper network has every tensor of this one and would pass as it, with its last layers cut.
    deeper = f"encoder.layer.{LAYERS}."
    if any(name.startswith(deeper) for name in tensors):
        raise ValueError(f"{path}: expected {LAYERS} layers: got a tensor named {deeper}*")
    return {name: tensors[name].astype(np.float32, copy=False) for name in expected_shapes()}
