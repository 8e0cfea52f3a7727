"""Who can compute attention, each at its best.

A provider is given the inputs of a case and returns a function to be timed: everything that
has to be done only once (moving the arrays into its own kind, building a graph, compiling) is
behind it by then. What a provider cannot do, it says with `UnsupportedError`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import fastattn

from .cases import Case, Inputs
from .machine import THREADS
from .timing import Prepared


def import_torch_first() -> None:
    """Import PyTorch, where it is installed, before Numba starts its threads.

    Numba switches nested parallelism on in the system's OpenMP runtime. PyTorch shares that
    runtime, and then starts threads within threads and is fifty times as slow, unless it has
    loaded its own runtime by then.
    """
    if importlib.util.find_spec("torch") is not None:
        importlib.import_module("torch")


class UnsupportedError(Exception):
    """A provider cannot do a case; the message says why."""


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Provider:
    """A name, the distribution that must be installed, and how to prepare a call."""

    name: str
    distribution: str
    prepare: Callable[[Inputs], Prepared]

    @property
    def version(self) -> str | None:
        """The version that is installed, None where there is none."""
        return installed_version(self.distribution)


# ---------------------------------------------------------------------------
# fastattn and the textbook
# ---------------------------------------------------------------------------


def prepare_fastattn(inputs: Inputs) -> Prepared:
    """Prepare `fastattn.attention` as a user calls it, output array included."""
    fastattn.set_num_threads(THREADS)
    keywords = dict(inputs.keywords)
    if inputs.mask is not None and not keywords:
        keywords["mask"] = inputs.mask
    if inputs.bias is not None and not keywords:
        keywords["bias"] = inputs.bias
    if inputs.case.causal:
        keywords["causal"] = True
    query, key, value = inputs.query, inputs.key, inputs.value
    if inputs.lengths is not None:
        return _prepare_packed(inputs, inputs.lengths)
    if inputs.case.dtype == "int8":
        batch, num_kv_heads, seqlen_kv, head_dim = key.shape
        cache = fastattn.KVCache(batch, num_kv_heads, head_dim, seqlen_kv, dtype=np.int8)
        cache.append(key, value)
        return Prepared(lambda: cache.attend(query, **keywords))
    return Prepared(lambda: fastattn.attention(query, key, value, **keywords))


def _prepare_packed(inputs: Inputs, lengths: np.ndarray) -> Prepared:
    """Prepare `fastattn.varlen_attention` of the rows that are no padding."""
    starts = np.cumsum([0, *lengths])
    query, key, value = (
        np.concatenate([x[:, :n].swapaxes(0, 1) for x, n in zip(each, lengths, strict=True)])
        for each in (inputs.query, inputs.key, inputs.value)
    )

    def to_numpy(out: Any) -> np.ndarray:
        padded = np.zeros_like(inputs.query)
        for b, n in enumerate(lengths):
            padded[b, :, :n] = out[starts[b] : starts[b + 1]].swapaxes(0, 1)
        return padded

    return Prepared(lambda: fastattn.varlen_attention(query, key, value, starts), to_numpy)


def naive_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    hidden: np.ndarray | None,
    bias: np.ndarray | None,
    softcap: float | None = None,
) -> np.ndarray:
    """Compute what everybody writes first: four lines, and three for what a case may add."""
    scores = query @ key.swapaxes(-1, -2) * query.dtype.type(1 / math.sqrt(query.shape[-1]))
    if softcap is not None:
        scores = np.tanh(scores / softcap) * softcap
    if bias is not None:
        scores += bias
    if hidden is not None:
        np.copyto(scores, -np.inf, where=hidden)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out: np.ndarray = weights @ value
    return out


def hidden_pairs(inputs: Inputs) -> np.ndarray | None:
    """Return which keys are hidden from which queries; None where all can be seen."""
    if inputs.mask is not None:
        return ~inputs.mask
    if inputs.case.causal:
        seqlen_q, seqlen_kv = inputs.query.shape[-2], inputs.key.shape[-2]
        return np.tri(seqlen_q, seqlen_kv, seqlen_kv - seqlen_q) == 0
    return None


def prepare_naive(inputs: Inputs) -> Prepared:
    """Prepare the textbook in NumPy; 16 bits by way of float32, for which there is a BLAS."""
    case = inputs.case
    hidden, bias = hidden_pairs(inputs), inputs.bias
    group_size = math.prod(case.shape[:-2]) // math.prod(case.key_shape[:-2])

    def run() -> np.ndarray:
        query, key, value = inputs.query, inputs.key, inputs.value
        if case.has_groups:
            key, value = (np.repeat(each, group_size, axis=-3) for each in (key, value))
        if case.numpy_dtype.itemsize == 2:
            query, key, value = (each.astype(np.float32) for each in (query, key, value))
        out = naive_attention(query, key, value, hidden, bias, inputs.softcap)
        return out.astype(case.numpy_dtype, copy=False)

    return Prepared(run)


# ---------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------


def _check_alignment(case: Case) -> None:
    """Raise for what fastattn aligns at the last key, and others at the first."""
    if case.causal and case.shape[-2] != case.key_shape[-2]:
        raise UnsupportedError("aligns causal at the first key")


def prepare_torch(inputs: Inputs) -> Prepared:
    """Prepare PyTorch's `scaled_dot_product_attention`, which picks its kernel by itself."""
    import torch

    torch.set_num_threads(THREADS)
    if not torch.is_inference_mode_enabled():
        # Once for the process: for every call it would cost as much as the smallest case.
        torch.inference_mode().__enter__()

    def tensor(array: np.ndarray) -> Any:
        if inputs.case.dtype == "bfloat16" and array.dtype != np.bool_:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def to_numpy(result: Any) -> np.ndarray:
        if inputs.case.dtype == "bfloat16":
            return np.asarray(result.float().numpy())
        return np.asarray(result.numpy())

    case = inputs.case
    _check_alignment(case)
    query, key, value = (tensor(each) for each in (inputs.query, inputs.key, inputs.value))
    extra = inputs.mask if inputs.mask is not None else inputs.bias
    attn_mask = None if extra is None else tensor(extra)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return Prepared(
        lambda: sdpa(
            query, key, value, attn_mask, is_causal=case.causal, enable_gqa=case.has_groups
        ),
        to_numpy,
    )


def prepare_openvino(inputs: Inputs) -> Prepared:
    """Prepare OpenVINO's operation, compiled for latency and in the precision of the case."""
    import openvino as ov
    from openvino import opset13 as op

    case = inputs.case
    _check_alignment(case)
    if case.dtype == "float64":
        raise UnsupportedError("computes in float32")
    if len(case.shape) != 4:
        raise UnsupportedError("takes four dimensions")
    if case.has_groups:
        raise UnsupportedError("takes as many key heads as query heads")
    arrays = [inputs.query, inputs.key, inputs.value]
    arrays += [each for each in (inputs.mask, inputs.bias) if each is not None]
    precision = ov.Type.f32
    if case.dtype == "bfloat16":
        # The way it is meant to be used: float32 in and out, and a hint.
        arrays = [each.astype(np.float32) for each in arrays]
        precision = ov.Type.bf16
    parameters = [op.parameter(list(each.shape), ov.Type(each.dtype)) for each in arrays]
    node = op.scaled_dot_product_attention(*parameters, causal=case.causal)
    compiled = ov.Core().compile_model(
        ov.Model([node], parameters, "attention"),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": THREADS,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        },
    )
    request = compiled.create_infer_request()
    for index, array in enumerate(arrays):
        request.set_input_tensor(index, ov.Tensor(array, shared_memory=True))
    return Prepared(
        lambda: request.infer(share_outputs=True),
        lambda _: np.array(request.get_output_tensor(0).data),
        holds=arrays,
    )


def _heads_last(array: np.ndarray) -> np.ndarray:
    """Turn (B, H, L, D) into (B, L, H * D), as onnxruntime's operations have it."""
    batch, num_heads, seqlen, head_dim = array.shape
    return np.ascontiguousarray(array.swapaxes(1, 2)).reshape(batch, seqlen, num_heads * head_dim)


def _onnxruntime_call(
    inputs: Inputs, operation: str, arrays: list[np.ndarray | None], **attributes: Any
) -> Prepared:
    """Prepare one of onnxruntime's contributed operations; None is an input that is not given."""
    import onnxruntime as ort
    from onnx import helper

    case = inputs.case

    def element(dtype: Any) -> int:
        return int(helper.np_dtype_to_tensor_dtype(dtype))

    names = ["" if each is None else f"input_{n}" for n, each in enumerate(arrays)]
    feeds = {name: each for name, each in zip(names, arrays, strict=True) if each is not None}
    outputs = ["out"]
    if operation == "GroupQueryAttention":
        outputs += ["present_key", "present_value"]
    graph = helper.make_graph(
        [helper.make_node(operation, names, outputs, domain="com.microsoft", **attributes)],
        "attention",
        [
            helper.make_tensor_value_info(name, element(each.dtype), each.shape)
            for name, each in feeds.items()
        ],
        [helper.make_tensor_value_info(name, element(case.numpy_dtype), None) for name in outputs],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(
        helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    binding = session.io_binding()
    values = {name: ort.OrtValue.ortvalue_from_numpy(each) for name, each in feeds.items()}
    for name, each in values.items():
        binding.bind_ortvalue_input(name, each)
    for name in outputs:
        past = {"present_key": "input_3", "present_value": "input_4"}.get(name)
        if past in values:
            binding.bind_ortvalue_output(name, values[past])
        else:
            binding.bind_output(name)

    def to_numpy(_: Any) -> np.ndarray:
        out = np.asarray(binding.copy_outputs_to_cpu()[0])
        batch, num_heads, seqlen_q, _ = case.shape
        return out.reshape(batch, seqlen_q, num_heads, -1).swapaxes(1, 2)

    return Prepared(lambda: session.run_with_iobinding(binding), to_numpy, holds=arrays)


def prepare_onnxruntime(inputs: Inputs) -> Prepared:
    """Prepare onnxruntime's `MultiHeadAttention`, or `GroupQueryAttention` for groups."""
    case = inputs.case
    if case.dtype in ("float64", "bfloat16"):
        raise UnsupportedError("takes float32 and float16")
    if len(case.shape) != 4:
        raise UnsupportedError("takes batch and heads")
    batch, num_heads, seqlen_q, _ = case.shape
    _, num_kv_heads, seqlen_kv, _ = case.key_shape
    flat: list[np.ndarray | None]
    flat = [_heads_last(each) for each in (inputs.query, inputs.key, inputs.value)]
    if case.has_groups and seqlen_q == 1:
        return _prepare_onnxruntime_decode(inputs)
    if case.has_groups:
        if not case.causal:
            raise UnsupportedError("has grouped heads in causal attention only")
        last_key = np.full(batch, seqlen_kv - 1, np.int32)
        total = np.array([seqlen_kv], np.int32)
        return _onnxruntime_call(
            inputs,
            "GroupQueryAttention",
            [*flat, None, None, last_key, total],
            num_heads=num_heads,
            kv_num_heads=num_kv_heads,
        )
    _check_alignment(case)
    attention_bias = inputs.bias
    if inputs.mask is not None:
        shape = (len(inputs.mask), 1, seqlen_q, seqlen_kv)
        hidden = ~np.broadcast_to(inputs.mask, shape)
        attention_bias = np.where(hidden, -np.inf, 0).astype(case.numpy_dtype)
    return _onnxruntime_call(
        inputs,
        "MultiHeadAttention",
        [*flat, None, None, attention_bias],
        num_heads=num_heads,
        unidirectional=int(case.causal),
    )


def _prepare_onnxruntime_decode(inputs: Inputs) -> Prepared:
    """Prepare `GroupQueryAttention` with a cache that holds all keys but the last.

    The cache is both input and output, as generation has it: nothing is copied but the last key.
    """
    case = inputs.case
    batch, _, seqlen_kv, _ = case.key_shape
    last = [_heads_last(each[:, :, -1:]) for each in (inputs.key, inputs.value)]
    return _onnxruntime_call(
        inputs,
        "GroupQueryAttention",
        [
            *(_heads_last(inputs.query), *last, inputs.key, inputs.value),
            np.full(batch, seqlen_kv - 1, np.int32),
            np.array([seqlen_kv], np.int32),
        ],
        num_heads=case.shape[1],
        kv_num_heads=case.key_shape[1],
    )


def prepare_jax(inputs: Inputs) -> Prepared:
    """Prepare `jax.nn.dot_product_attention`, compiled by XLA for the CPU."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    case = inputs.case
    _check_alignment(case)

    def lengths_first(array: np.ndarray) -> Any:
        if array.ndim == 2:
            return jax.numpy.asarray(array[:, None, :])
        return jax.numpy.asarray(array.swapaxes(-2, -3))

    def to_numpy(result: Any) -> np.ndarray:
        return np.asarray(result).swapaxes(-2, -3).reshape(case.shape)

    query, key, value = (lengths_first(each) for each in (inputs.query, inputs.key, inputs.value))
    extra = {
        name: jax.numpy.asarray(each)
        for name, each in (("mask", inputs.mask), ("bias", inputs.bias))
        if each is not None
    }
    call = jax.jit(
        lambda q, k, v, extra: jax.nn.dot_product_attention(q, k, v, **extra, is_causal=case.causal)
    )
    return Prepared(lambda: call(query, key, value, extra).block_until_ready(), to_numpy)


def _without_softcap(prepare: Callable[[Inputs], Prepared]) -> Callable[[Inputs], Prepared]:
    def refuse_or_prepare(inputs: Inputs) -> Prepared:
        if inputs.softcap is not None:
            raise UnsupportedError("has no softcap")
        return prepare(inputs)

    return refuse_or_prepare


FASTATTN = Provider("fastattn", "fastattn", prepare_fastattn)
NAIVE = Provider("NumPy", "numpy", prepare_naive)
PEERS = (
    Provider("PyTorch", "torch", _without_softcap(prepare_torch)),
    Provider("OpenVINO", "openvino", _without_softcap(prepare_openvino)),
    Provider("onnxruntime", "onnxruntime", _without_softcap(prepare_onnxruntime)),
    Provider("JAX", "jax", _without_softcap(prepare_jax)),
)
