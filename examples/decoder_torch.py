"""The decoder of `decoder.py` in torch, with the same weights: what it is compared with."""

from collections.abc import Sequence

import numpy as np
import torch
from decoder import NORM_EPSILON, Decoder, Shape
from torch.nn import functional

import fastattn


class TorchAttention:
    """torch's attention with a cache: tensors that are filled from the front."""

    def __init__(self, shape: Shape, capacity: int) -> None:
        size = (shape.layers, 1, shape.kv_heads, capacity, shape.head_dim)
        self.key, self.value = torch.zeros(size), torch.zeros(size)
        self.lengths = [0] * shape.layers

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Write the new rows behind the old ones and attend to all.

        torch's causal mask counts from the first key, so only the first tokens may be several.
        """
        start = self.lengths[layer]
        end = self.lengths[layer] = start + key.shape[2]
        self.key[layer, :, :, start:end] = key
        self.value[layer, :, :, start:end] = value
        return functional.scaled_dot_product_attention(
            query,
            self.key[layer, :, :, :end],
            self.value[layer, :, :, :end],
            is_causal=start == 0,
            enable_gqa=True,
        )

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.lengths[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.key.nbytes + self.value.nbytes


class TorchDecoder:
    """The same model; `next_logits` takes and returns what `Decoder.next_logits` does."""

    def __init__(self, model: Decoder) -> None:
        self.shape = model.shape
        self.embedding, self.norm = torch.from_numpy(model.embedding), torch.from_numpy(model.norm)
        # A row times a matrix is faster with the matrix as torch keeps its own: transposed.
        self.output = transposed(model.output)
        self.layers = [
            {name: transposed(weight) for name, weight in vars(layer).items()}
            for layer in model.layers
        ]

    @torch.inference_mode()
    def next_logits(self, tokens: Sequence[int], memory: TorchAttention) -> np.ndarray:
        """Return the logits of what follows the tokens, (vocabulary,), and remember the tokens."""
        angles = fastattn.rotary_table(len(tokens), self.shape.rotated, offset=memory.length)
        cos, sin = (torch.from_numpy(table) for table in angles)
        x = self.embedding[torch.as_tensor(tokens)]
        for index, layer in enumerate(self.layers):
            y = rms_norm(x, layer["attention_norm"])
            query, key, value = (
                functional.linear(y, layer[name])
                .view(1, len(x), -1, self.shape.head_dim)
                .transpose(1, 2)
                for name in ("w_q", "w_k", "w_v")
            )
            context = memory(index, rotate(query, cos, sin), rotate(key, cos, sin), value)
            joined = context.transpose(1, 2).reshape(len(x), -1)
            x = x + functional.linear(joined, layer["w_o"])
            y = rms_norm(x, layer["feed_forward_norm"])
            gate = functional.silu(functional.linear(y, layer["w_gate"]))
            x = x + functional.linear(gate * functional.linear(y, layer["w_up"]), layer["w_down"])
        return functional.linear(rms_norm(x[-1], self.norm), self.output).numpy()


def transposed(weight: np.ndarray) -> torch.Tensor:
    """Return a weight as (out features, in features)."""
    return torch.from_numpy(np.ascontiguousarray(weight.T))


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Divide each row by the root of its mean square."""
    return functional.rms_norm(x, weight.shape, weight, NORM_EPSILON)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the first features of each head by the angles of the tokens' positions."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
