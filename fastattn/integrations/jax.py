"""Attention for JAX arrays: a function that works inside ``jax.jit`` and ``jax.vmap``.

    from fastattn.integrations.jax import attention

    output = jax.jit(lambda q, k, v: attention(q, k, v, causal=True))(query, key, value)

XLA calls back into Python while it runs, on the CPU, where the kernel reads JAX's memory in place.
The result is copied into XLA's. Arrays on another device travel to the CPU and back.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

import fastattn
from fastattn.attention import Causal, Window
from fastattn.formats import check_dtype
from fastattn.integrations import needs
from fastattn.shapes import check_shapes

with needs("jax"):
    import jax
    import jax.numpy as jnp

__all__ = ["attention"]

# The axes of each array that are not the batch's.
_OWN_AXES = {
    "query": 3,
    "key": 3,
    "value": 3,
    "mask": 3,
    "bias": 3,
    "query_offset": 0,
    "kv_lengths": 0,
    "alibi_slopes": 1,
    "sinks": 1,
}


def attention(
    query: jax.typing.ArrayLike,
    key: jax.typing.ArrayLike,
    value: jax.typing.ArrayLike,
    *,
    mask: jax.typing.ArrayLike | None = None,
    bias: jax.typing.ArrayLike | None = None,
    causal: Causal = False,
    window: Window | None = None,
    query_offset: jax.typing.ArrayLike | None = None,
    kv_lengths: jax.typing.ArrayLike | None = None,
    softcap: float | None = None,
    alibi_slopes: jax.typing.ArrayLike | None = None,
    sinks: jax.typing.ArrayLike | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Return `fastattn.attention` of JAX arrays, as one.

    Parameters
    ----------
    query : array, (..., num_heads, seqlen_q, head_dim)
        float16, bfloat16, float32 or float64.
    key : array, (..., num_kv_heads, seqlen_kv, head_dim)
    value : array, (..., num_kv_heads, seqlen_kv, head_dim_v)
    mask, bias, query_offset, kv_lengths, alibi_slopes, sinks
        As in `fastattn.attention`. All but sinks may be mapped over by ``jax.vmap``.
    causal, window, softcap, scale
        As in `fastattn.attention`, known while tracing.

    Returns
    -------
    jax.Array, (..., num_heads, seqlen_q, head_dim_v)
        In JAX's common dtype of query, key and value; its default float where that is none.

    Raises
    ------
    TypeError, ValueError
        As `fastattn.attention`, while tracing, for dtypes and shapes; TypeError also for gradients,
        which this library does not compute. What is wrong with values, such as a length beyond the
        keys, becomes an error of JAX's when they are known.

    Notes
    -----
    ``jax.vmap`` adds a batch axis, in one call for all: what is not mapped over is not repeated.

    Examples
    --------
    >>> import jax
    >>> from fastattn.integrations.jax import attention
    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 8, 5, 16))
    >>> output = jax.jit(attention, static_argnames="causal")(query, key, value, causal=True)
    >>> output.shape
    (2, 8, 5, 16)
    >>> each = jax.vmap(lambda q, k, v: attention(q, k, v, causal=True))(query, key, value)
    >>> bool((each == output).all())
    True
    """
    q, k, v = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    dtype = jnp.result_type(q, k, v)
    if dtype.kind in "biu":
        dtype = jnp.result_type(float)
    check_dtype("query, key and value", dtype)
    one_head = q.ndim == k.ndim == v.ndim == 2
    given = {
        "query": q.astype(dtype),
        "key": k.astype(dtype),
        "value": v.astype(dtype),
        "mask": mask,
        "bias": bias,
        "query_offset": query_offset,
        "kv_lengths": kv_lengths,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
    }
    # Every array gets all of the batch axes: what vmap adds then stands in front of the same ones.
    batch_axes = max(3, q.ndim, k.ndim, v.ndim) - 3
    arrays = {
        name: _with_axes(x, batch_axes + _OWN_AXES[name])
        for name, x in given.items()
        if x is not None
    }
    q, k, v = arrays["query"], arrays["key"], arrays["value"]
    batch = check_shapes(q.shape, k.shape, v.shape)
    result = jax.ShapeDtypeStruct((*batch, *q.shape[-3:-1], v.shape[-1]), dtype)
    on_host = partial(_on_host, causal=causal, window=window, softcap=softcap, scale=scale)

    @jax.custom_jvp
    def call(arrays: dict[str, jax.Array]) -> jax.Array:
        return jax.pure_callback(on_host, result, arrays, vmap_method="expand_dims")

    @call.defjvp
    def derivative(_primals: Any, _tangents: Any) -> Any:
        raise TypeError("fastattn computes no gradients: jax.nn.dot_product_attention does")

    output = call(arrays)
    return output[0] if one_head else output


def _with_axes(x: jax.typing.ArrayLike, ndim: int) -> jax.Array:
    """Return an array with at least so many axes, new ones of length 1 in front."""
    array = jnp.asarray(x)
    return array.reshape((1,) * (ndim - array.ndim) + array.shape)


def _on_host(arrays: dict[str, Any], **keywords: Any) -> np.ndarray:
    """Compute what XLA asks for."""
    given: dict[str, Any] = {name: np.asarray(x) for name, x in arrays.items()}
    # What vmap maps over may be in any of the arrays, and attention's batch is that of the query.
    batches = [x.shape[: x.ndim - _OWN_AXES[name]] for name, x in given.items()]
    query = given["query"]
    given["query"] = np.broadcast_to(query, np.broadcast_shapes(*batches) + query.shape[-3:])
    if "sinks" in given:
        *batch, num_heads = given["sinks"].shape
        if math.prod(batch) != 1:
            raise ValueError(f"sinks must not be mapped over by jax.vmap: got {batch} of them")
        given["sinks"] = given["sinks"].reshape(num_heads)
    return fastattn.attention(**given, **keywords)
