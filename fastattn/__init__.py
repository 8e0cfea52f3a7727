"""Attention for NumPy arrays on the CPU: fused, parallel, compiled by Numba."""

from fastattn import masks, plot, reference
from fastattn.attention import (
    attention,
    attention_weights,
    merge_states,
    scaled_dot_product_attention,
    varlen_attention,
)
from fastattn.cache import KVCache
from fastattn.layers import MultiHeadAttention
from fastattn.masks import BlockMask, create_block_mask
from fastattn.paging import PagedKVCache
from fastattn.positions import (
    alibi_slopes,
    apply_rotary,
    embed_tokens,
    rotary_table,
    sinusoidal_positions,
)
from fastattn.runtime import get_num_threads, set_num_threads, show_versions, warmup

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "KVCache",
    "MultiHeadAttention",
    "PagedKVCache",
    "alibi_slopes",
    "apply_rotary",
    "attention",
    "attention_weights",
    "create_block_mask",
    "embed_tokens",
    "get_num_threads",
    "masks",
    "merge_states",
    "plot",
    "reference",
    "rotary_table",
    "scaled_dot_product_attention",
    "set_num_threads",
    "show_versions",
    "sinusoidal_positions",
    "varlen_attention",
    "warmup",
]
