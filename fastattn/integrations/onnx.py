"""ONNX's attention and rotary operators on NumPy, for ``onnx.reference.ReferenceEvaluator``.

With these two classes, a model runs on NumPy with fused attention::

    ReferenceEvaluator(model, new_ops=[Attention, RotaryEmbedding])

Each carries the name of its operator, which is how the evaluator finds it. The classes of ONNX that
they stand in for store every score; here only the output that asks for scores does.

This module needs the package onnx: ``pip install 'fastattn[onnx]'``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.arguments import check_int
from fastattn.attention import attention, attention_weights
from fastattn.formats import is_float
from fastattn.integrations import needs
from fastattn.keywords import check_range
from fastattn.layers import join_heads, split_heads
from fastattn.positions import apply_rotary
from fastattn.problem import STAGES

with needs("onnx"):
    from onnx import TensorProto
    from onnx.reference.op_run import OpRun

__all__ = ["Attention", "RotaryEmbedding"]

Array = NDArray[Any]

_PRECISIONS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


class _Operator(OpRun):
    """What the two have in common: inputs that a node leaves out are None.

    The evaluator keeps results by name, "" among them. An output that a node does not name is then
    what inputs without a name get: the values of one layer would be the mask of the next.
    """

    def run(self, *inputs: Array | None, **keywords: Any) -> tuple[Array, ...]:
        named = (x if name else None for name, x in zip(self.input, inputs, strict=True))
        results: tuple[Array, ...] = super().run(*named, **keywords)
        return results


class Attention(_Operator):
    """ONNX's operator Attention, of opsets 23 to 25, by `fastattn.attention`.

    An instance stands for one node; the evaluator makes it, and hands it the node's inputs. The
    names below are those of the operator's specification.

    Parameters
    ----------
    Q : ndarray, (batch, q_num_heads, q_length, head_size) or (batch, q_length, hidden_size)
        float16, float32, float64 or bfloat16. With 3 dimensions the attributes `q_num_heads` and
        `kv_num_heads` say how many heads hidden_size holds; with 4 they may be left out.
    K, V : ndarray, likewise with kv_num_heads and kv_length
        V may have another head_size. kv_num_heads must divide q_num_heads.
    attn_mask : ndarray, optional, broadcastable to (batch, q_num_heads, q_length, total_length)
        bool (True = attend), or numbers added to the score. ``total_length = past + kv_length``;
        from opset 24 on the last axis may be shorter, keys beyond it are hidden.
    past_key, past_value : ndarray, optional, (batch, kv_num_heads, past, head_size)
        What a cache holds; K and V come after it.
    nonpad_kv_seqlen : ndarray of int64, (batch,), optional
        K and V are a cache with room to spare, of which each batch entry has so many keys. Not
        with past_key. Not before opset 24.

    Returns
    -------
    Y : ndarray of the shape of Q with the head_size of V
    present_key, present_value : ndarray, (batch, kv_num_heads, total_length, head_size)
        The past and K or V; without a past, K or V themselves.
    qk_matmul_output : ndarray, (batch, q_num_heads, q_length, total_length)
        Only if the node names this output: the attribute `qk_matmul_output_mode` is the number of
        the stage of `fastattn.attention_weights`, 0 for "scores" to 3 for "probabilities".

    Raises
    ------
    ValueError
        For shapes, heads, lengths or attributes that do not fit, and whatever
        `fastattn.attention` refuses.
    TypeError
        For dtypes without a common one. The evaluator raises another from it, which has the
        message as its cause.

    Notes
    -----
    *Positions.* Query i stands at ``i + offset``, for `is_causal`, `left_window_size` and
    `right_window_size` (-1 is unbounded; opset 25). The offset is the number of keys before this
    block of queries: past, or ``nonpad_kv_seqlen - q_length``, or 0 without either. The last is
    "top_left" where `fastattn.attention` by itself would take "bottom_right".

    *Precision.* `softmax_precision` is a lower bound: nothing here is narrower than float32. Only
    for DOUBLE everything is converted, to float64. Y has the dtype of Q in any case.

    *Memory.* Three-dimensional inputs are read where they lie; Y is put in order once. A mask that
    is too short is copied.

    References
    ----------
    .. [1] https://onnx.ai/onnx/operators/onnx__Attention.html

    Examples
    --------
    >>> import numpy as np
    >>> from onnx import TensorProto, helper
    >>> from onnx.reference import ReferenceEvaluator
    >>> from fastattn.integrations.onnx import Attention, RotaryEmbedding
    >>> names = ["Q", "K", "V"]
    >>> node = helper.make_node("Attention", names, ["Y"], is_causal=1)
    >>> info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in [*names, "Y"]]
    >>> graph = helper.make_graph([node], "example", info[:3], info[3:])
    >>> model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    >>> session = ReferenceEvaluator(model, new_ops=[Attention, RotaryEmbedding])
    >>> feeds = dict(zip(names, np.ones((3, 1, 2, 5, 8), np.float32)))
    >>> (output,) = session.run(None, feeds)
    >>> output.shape
    (1, 2, 5, 8)
    """

    def _run(
        self,
        query: Array,
        key: Array,
        value: Array,
        attn_mask: Array | None = None,
        past_key: Array | None = None,
        past_value: Array | None = None,
        nonpad_kv_seqlen: Array | None = None,
        *,
        is_causal: int,
        kv_num_heads: int | None,
        left_window_size: int,
        q_num_heads: int | None,
        qk_matmul_output_mode: int,
        right_window_size: int,
        scale: float | None,
        softcap: float,
        softmax_precision: int | None,
    ) -> tuple[Array, ...]:
        if not query.ndim == key.ndim == value.ndim:
            raise ValueError(
                "Q, K and V must all have 3 or all have 4 dimensions: "
                f"got {query.ndim}, {key.ndim} and {value.ndim}"
            )
        q = _as_heads("Q", query, "q_num_heads", q_num_heads)
        k = _as_heads("K", key, "kv_num_heads", kv_num_heads)
        v = _as_heads("V", value, "kv_num_heads", kv_num_heads)
        if (past_key is None) != (past_value is None):
            raise ValueError("past_key and past_value must be given together: got one of them")
        offset: int | Array = 0
        if past_key is not None and past_value is not None:
            if nonpad_kv_seqlen is not None:
                raise ValueError("nonpad_kv_seqlen must not be given with past_key: got both")
            k, v = _after("past_key", past_key, k), _after("past_value", past_value, v)
            offset = past_key.shape[2]
        if nonpad_kv_seqlen is not None:
            check_range("nonpad_kv_seqlen", nonpad_kv_seqlen, 0, k.shape[2])
            offset = nonpad_kv_seqlen - q.shape[2]
        if attn_mask is not None and attn_mask.ndim and self._opset >= 24:
            attn_mask = _lengthened(attn_mask, k.shape[2])
        is_bool = attn_mask is not None and attn_mask.dtype == np.bool_
        keywords: dict[str, Any] = {
            "mask": attn_mask if is_bool else None,
            "bias": None if is_bool else attn_mask,
            "causal": bool(is_causal),
            "window": tuple(
                None if size == -1 else size for size in (left_window_size, right_window_size)
            ),
            "query_offset": offset,
            "kv_lengths": nonpad_kv_seqlen,
            "softcap": softcap or None,
            "scale": scale,
        }
        if softmax_precision not in (None, *_PRECISIONS):
            raise ValueError(
                "softmax_precision must be 1 (FLOAT), 10 (FLOAT16), 11 (DOUBLE) or 16 (BFLOAT16): "
                f"got {softmax_precision}"
            )
        if softmax_precision == TensorProto.DOUBLE:
            q = q.astype(np.float64)  # the others follow: computed is in the common dtype

        output = attention(q, k, v, **keywords).astype(query.dtype, copy=False)
        results = (join_heads(output) if query.ndim == 3 else output, k, v)
        if not any(self.output[3:]):
            return results
        if qk_matmul_output_mode not in range(len(STAGES)):
            raise ValueError(
                f"qk_matmul_output_mode must be 0, 1, 2 or 3: got {qk_matmul_output_mode}"
            )
        stage: Any = STAGES[qk_matmul_output_mode]
        weights = attention_weights(q, k, stage=stage, **keywords)
        return (*results, weights.astype(query.dtype, copy=False))

    @property
    def _opset(self) -> int:
        """The opset of the model: `_schema` is that of the newest, whatever the model says."""
        opset: int = self.run_params["opsets"][self.domain]
        return opset


class RotaryEmbedding(_Operator):
    """ONNX's operator RotaryEmbedding, of opset 23, by `fastattn.apply_rotary`.

    An instance stands for one node; the evaluator makes it, and hands it the node's inputs. The
    names below are those of the operator's specification.

    Parameters
    ----------
    X : ndarray, (batch, num_heads, length, head_size) or (batch, length, hidden_size)
        With 3 dimensions the attribute `num_heads` says how many heads hidden_size holds.
    cos_cache, sin_cache : ndarray, (positions, rotated // 2)
        Without position_ids (batch, length, rotated // 2). ``rotated`` is the attribute
        `rotary_embedding_dim`, or head_size where that is 0.
    position_ids : ndarray of int64, (batch, length), optional
        The row of cos_cache and sin_cache for each token.

    Returns
    -------
    Y : ndarray, the shape and dtype of X
        The first ``rotated`` features of each head are rotated: neighbours with `interleaved`,
        else the first half with the second.

    Raises
    ------
    ValueError
        For shapes, heads or attributes that do not fit, or a position that is no row of cos_cache.

    References
    ----------
    .. [1] https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html
    """

    def _run(
        self,
        x: Array,
        cos: Array,
        sin: Array,
        position_ids: Array | None = None,
        *,
        interleaved: int,
        num_heads: int | None,
        rotary_embedding_dim: int,
    ) -> tuple[Array]:
        heads = _as_heads("X", x, "num_heads", num_heads)
        rotated = rotary_embedding_dim or heads.shape[-1]
        if 2 * cos.shape[-1] != rotated:
            raise ValueError(
                f"cos_cache.shape[-1] must be half of the {rotated} features that are rotated: "
                f"got {cos.shape[-1]}"
            )
        # One series for all heads, whose axis stands between those of the batch and the tokens.
        if position_ids is None:
            cos, sin = (np.expand_dims(table, -3) for table in (cos, sin))
        else:
            position_ids = np.expand_dims(position_ids, -2)
        output = apply_rotary(
            heads, cos, sin, positions=position_ids, interleaved=bool(interleaved)
        )
        return (join_heads(output) if x.ndim == 3 else output,)


def _as_heads(name: str, x: Array, count_name: str, count: int | None) -> Array:
    """Return an input as (batch, heads, length, features), a view."""
    if x.ndim not in (3, 4):
        raise ValueError(f"{name} must have 3 or 4 dimensions: got shape {x.shape}")
    if count is None:
        if x.ndim == 3:
            raise ValueError(
                f"{count_name} must be given where {name} has 3 dimensions: got shape {x.shape}"
            )
        return x
    check_int(count_name, count, 1)
    if x.ndim == 4:
        if x.shape[1] != count:
            raise ValueError(
                f"{count_name} must equal {name}.shape[1]: got {count} and {x.shape[1]}"
            )
        return x
    if x.shape[-1] % count:
        raise ValueError(
            f"{count_name} must divide {name}.shape[-1]: got {count} and {x.shape[-1]}"
        )
    return split_heads(x, count)


def _after(name: str, past: Array, new: Array) -> Array:
    """Return new keys or values after those of the past."""
    batch, heads, _, features = new.shape
    if past.ndim != 4 or past.shape != (batch, heads, past.shape[2], features):
        raise ValueError(
            f"{name} must have shape ({batch}, {heads}, past, {features}), as the new ones have: "
            f"got {past.shape}"
        )
    return np.concatenate((past, new), axis=2)


def _lengthened(mask: Array, length: int) -> Array:
    """Return a mask whose last axis has at least a length: what it lacks is hidden."""
    missing = length - mask.shape[-1]
    if missing <= 0:
        return mask
    shape = (*mask.shape[:-1], missing)
    if mask.dtype == np.bool_:
        hidden = np.zeros(shape, np.bool_)
    else:  # no integer says -inf
        hidden = np.full(shape, -np.inf, mask.dtype if is_float(mask.dtype) else np.float64)
    return np.concatenate((mask, hidden), axis=-1)
