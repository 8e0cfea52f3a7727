"""Attention for NumPy arrays on the CPU: fused, parallel, compiled by Numba."""

from fastattn import reference
from fastattn.attention import (
    attention,
    attention_weights,
    merge_states,
    scaled_dot_product_attention,
)
from fastattn.runtime import get_num_threads, set_num_threads, show_versions, warmup

__version__ = "0.1.0"

__all__ = [
    "attention",
    "attention_weights",
    "get_num_threads",
    "merge_states",
    "reference",
    "scaled_dot_product_attention",
    "set_num_threads",
    "show_versions",
    "warmup",
]
