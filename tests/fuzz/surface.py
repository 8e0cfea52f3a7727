"""One program for each public name: it draws calls, makes them, and judges what comes.

A call is valid, and must give a right result; or one argument of it was made wrong, and it must be
refused; or one argument was replaced by anything, and both will do. What is refused is refused with
a TypeError or ValueError, and leaves every array as it was.
"""

from collections.abc import Callable
from random import Random

from . import around, caches, functions

# With how often each is drawn: what has the most keywords most often.
PROGRAMS: dict[str, tuple[Callable[[Random], str], int]] = {
    "attention": (functions.attention, 8),
    "scaled_dot_product_attention": (functions.scaled_dot_product_attention, 3),
    "varlen_attention": (functions.varlen_attention, 4),
    "attention_weights": (functions.attention_weights, 2),
    "merge_states": (functions.merge_states, 1),
    "create_block_mask": (functions.create_block_mask, 1),
    "KVCache": (caches.kv_cache, 2),
    "PagedKVCache": (caches.paged_kv_cache, 2),
    "MultiHeadAttention": (around.multi_head_attention, 1),
    "sinusoidal_positions": (around.sinusoidal_positions, 1),
    "rotary_table": (around.rotary_table, 1),
    "apply_rotary": (around.apply_rotary, 1),
    "alibi_slopes": (around.alibi_slopes, 1),
    "embed_tokens": (around.embed_tokens, 1),
}

# Each of them, as often as it says.
_DRAWN = [name for name, (_, times) in PROGRAMS.items() for _ in range(times)]


def choose(dice: Random) -> str:
    """Return the name of a program."""
    return dice.choice(_DRAWN)
