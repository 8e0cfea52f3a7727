"""What the tests measure with: the naive code and its bound, inputs, processes, layouts."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from fastattn import reference

Array = NDArray[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT_DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]


def make_inputs(
    rng: np.random.Generator,
    *,
    batch: Sequence[int] = (2,),
    heads: int = 3,
    kv_heads: int | None = None,
    seqlen_q: int = 5,
    seqlen_kv: int = 7,
    head_dim: int = 20,
    head_dim_v: int | None = None,
    dtype: Any = np.float32,
) -> tuple[Array, Array, Array]:
    """Return a normal query, key and value; kv_heads and head_dim_v are heads and head_dim if None.

    1 / sqrt(20) is no power of two: multiplying with one is exact, which would flatter the naive
    code that the bound of `assert_accurate` comes from.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    shapes = (
        (heads, seqlen_q, head_dim),
        (kv_heads, seqlen_kv, head_dim),
        (kv_heads, seqlen_kv, head_dim_v),
    )
    query, key, value = (rng.standard_normal((*batch, *shape)).astype(dtype) for shape in shapes)
    return query, key, value


def naive(
    query: Array,
    key: Array,
    value: Array,
    *,
    visible: Array | None = None,
    bias: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    modify: Callable[[Array], Array] | None = None,
    dot: Callable[[Array, Array], Array] = np.matmul,
) -> tuple[Array, Array]:
    """Return (output, lse) by the lines that people write, in the dtype of the inputs.

    `modify` is a score_mod for all scores at once.

    For 16-bit inputs they are written in float32 and the result is rounded: NumPy has no product of
    16-bit matrices but a scalar loop that rounds every partial sum, which nobody would keep, and
    whose error would excuse anything.
    """
    dtype = reference.result_dtype(query, key, value)
    wide = reference.accumulation_dtype(dtype)
    query, key, value = query.astype(wide), key.astype(wide), value.astype(wide)
    if query.ndim > 2:
        group_size = query.shape[-3] // key.shape[-3]
        key, value = np.repeat(key, group_size, axis=-3), np.repeat(value, group_size, axis=-3)

    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    scores = dot(query, np.swapaxes(key, -1, -2)) * factor
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.astype(wide)
    if modify is not None:
        scores = modify(scores).astype(wide)
    if visible is not None:
        scores = np.where(visible, scores, -np.inf)
    sink = np.asarray(-np.inf if sinks is None else sinks).astype(wide)[..., None, None]
    highest = np.maximum(scores.max(axis=-1, keepdims=True, initial=-np.inf), sink)
    weights = np.exp(scores - highest)
    denominator = weights.sum(axis=-1, keepdims=True) + np.exp(sink - highest)
    return dot(weights / denominator, value).astype(dtype), (highest + np.log(denominator))[..., 0]


def exact(function: Callable[..., Any], *arrays: Array, **keywords: Any) -> Any:
    """Return what a function of the reference gives in more digits than its result has.

    That is float64, and for float64 results the platform's longdouble.
    """
    wide = [to_float64(x) for x in arrays]
    if keywords.get("bias") is not None:
        keywords["bias"] = to_float64(keywords["bias"])
    if reference.result_dtype(*(np.asarray(x) for x in arrays)) != np.float64:
        return function(*wide, **keywords)
    if np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
        pytest.skip("longdouble is float64 here: nothing to measure float64 results with")
    longdouble = np.dtype(np.longdouble)
    with patch.object(reference, "accumulation_dtype", return_value=longdouble):
        return function(*wide, **keywords)


def assert_accurate(
    result: Array | tuple[Array, Array],
    query: Array,
    key: Array,
    value: Array,
    *,
    times: float = 4,
    **keywords: Any,
) -> None:
    """Assert that attention's result, or (output, lse), is as near the truth as the naive code's.

    The bound is derived: the largest error may be a few times that of the naive code in the same
    dtype, plus one rounding of the largest result. Where the truth is finite the result must be,
    elsewhere it must be the same NaN or Inf: neither can pass for being near.

    The promise is twice. It is held where thousands of outputs make the largest error a statistic
    (`test_attention.TestAccuracy`); that of a few hundred scatters by a factor of two, hence four.
    """
    results = result if isinstance(result, tuple) else (result,)
    truths = exact(reference.attention, query, key, value, return_lse=True, **keywords)
    naives = zip(*naive_in_any_order(query, key, value, **keywords), strict=True)
    for name, ours, truth, theirs in zip(("output", "lse"), results, truths, naives, strict=False):
        assert_same_kind(ours, truth, theirs[0].dtype, name)
        finite = np.isfinite(truth)
        error = largest_error(ours, truth)
        error_of_theirs = max(largest_error(each, truth) for each in theirs)
        one_rounding = rounding(ours.dtype) * np.abs(truth[finite]).max(initial=0)
        assert error <= times * error_of_theirs + one_rounding, (
            f"{name} of {ours.shape}: error {error:.2e}, "
            f"naive code {error_of_theirs:.2e}, one rounding {one_rounding:.2e}"
        )


def assert_within(ours: Array, truth: Array, dtype: Any, bound: float) -> None:
    """Assert that a result is finite where the truth is, and no further from it than a bound."""
    assert_same_kind(ours, truth, dtype)
    assert largest_error(ours, truth) <= bound


def assert_same_kind(ours: Array, truth: Array, dtype: Any, name: str = "result") -> None:
    """Assert the dtype and the shape of a result, and the place of every NaN and Inf."""
    assert isinstance(ours, np.ndarray), name
    assert (ours.dtype, ours.shape) == (dtype, truth.shape), name
    finite = np.isfinite(truth)
    assert np.isfinite(to_float64(ours)[finite]).all(), f"{name} must be finite like the reference"
    np.testing.assert_array_equal(to_float64(ours)[~finite], to_float64(truth)[~finite], name)


def largest_error(result: Array, truth: Array) -> float:
    """Return the largest difference where both are finite: the naive code's NaN is no error."""
    result = to_float64(result)
    both = np.isfinite(result) & np.isfinite(truth)
    return float(np.abs(result[both] - truth[both]).max(initial=0))


def naive_in_any_order(
    query: Array, key: Array, value: Array, *, orders: int = 8, **keywords: Any
) -> list[tuple[Array, Array]]:
    """Return the naive results for the keywords of attention, with its sums in several orders.

    In that of BLAS, and term by term with the features and the keys in so many orders. The largest
    error is that of a few sums, and in one order alone those may happen to round well; the next
    BLAS has another order anyway.
    """
    if swapped := keywords.pop("layout", "bhld") == "blhd":
        query, key, value = (np.swapaxes(x, -3, -2) for x in (query, key, value))
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    query, key, value = (np.broadcast_to(x, batch + x.shape[-3:]) for x in (query, key, value))
    # Scores of zeros are finite whatever the inputs hold, so that -inf means hidden.
    zeros = np.zeros(query.shape), np.zeros(key.shape)
    visible = reference.attention_weights(*zeros, stage="biased", **keywords) != -np.inf
    # What is left of them is what bias and ALiBi add.
    score_mod = keywords.pop("score_mod", None)
    bias = reference.attention_weights(*zeros, stage="biased", **keywords)
    bias = np.where(visible, bias, 0)
    same = {name: keywords.get(name) for name in ("scale", "softcap", "sinks")}

    def for_keys(j: Array) -> Callable[[Array], Array] | None:
        """Return the score_mod for all scores of keys in an order."""
        if score_mod is None:
            return None
        ask = np.frompyfunc(getattr(score_mod, "py_func", score_mod), 5, 1)
        b = np.arange(np.prod(batch, dtype=int)).reshape(*batch, 1, 1, 1)
        h, i = np.arange(query.shape[-3])[:, None, None], np.arange(query.shape[-2])[:, None]
        return lambda scores: ask(scores, b, h, i, j)

    rng = np.random.default_rng(0)
    features, keys = np.arange(query.shape[-1]), np.arange(key.shape[-2])
    drawn = [
        (features, keys),
        *((rng.permutation(features), rng.permutation(keys)) for _ in range(orders - 1)),
    ]
    with np.errstate(all="ignore"):  # it divides 0 by 0 for rows that see nothing
        by_blas = naive(
            query, key, value, visible=visible, bias=bias, modify=for_keys(keys), **same
        )
        one_by_one = naive(
            np.stack([query[..., d] for d, _ in drawn]),
            np.stack([key[..., j, :][..., d] for d, j in drawn]),
            np.stack([value[..., j, :] for _, j in drawn]),
            visible=np.stack([visible[..., j] for _, j in drawn]),
            bias=np.stack([bias[..., j] for _, j in drawn]),
            modify=for_keys(np.expand_dims([j for _, j in drawn], tuple(range(1, query.ndim)))),
            **same,
            dot=term_by_term,
        )
    results = [by_blas, *zip(*one_by_one, strict=True)]
    return [(np.swapaxes(out, -3, -2) if swapped else out, lse) for out, lse in results]


def term_by_term(a: Array, b: Array) -> Array:
    """Return a @ b with every sum taken in the order of its terms."""
    total = np.zeros(np.broadcast_shapes(a.shape[:-1], (*b.shape[:-2], 1)) + b.shape[-1:], a.dtype)
    for n in range(a.shape[-1]):
        total += a[..., :, n : n + 1] * b[..., n : n + 1, :]
    return total


def rounding_bound(
    query: Array, key: Array, value: Any, *, bias: Any = 0.0, scale: float | None = None
) -> float:
    """Return what two outputs may differ by that sum the same terms in any two orders.

    A weight is off by twice what its score and the largest score are off, and by the sum of
    seqlen_kv terms that it is divided by; the output by that and by another such sum.
    """
    dtype = reference.result_dtype(query, key)
    unit = rounding(reference.accumulation_dtype(dtype))
    weight_off = 2 * score_bound(query, key, bias=bias, scale=scale)
    weight_off += (2 * key.shape[-2] + 8) * unit
    return float((2 * weight_off + rounding(dtype)) * np.abs(to_float64(value)).max())


def score_bound(query: Array, key: Array, *, bias: Any = 0.0, scale: float | None = None) -> float:
    """Return what a score may be off: a dot of n terms is by at most n u times their magnitudes.

    u is the rounding of the accumulation type. See Higham 2002, "Accuracy and Stability of
    Numerical Algorithms", section 3.1; scale, bias and a change of base take a few more roundings.
    """
    unit = rounding(reference.accumulation_dtype(reference.result_dtype(query, key)))
    head_dim = query.shape[-1]
    factor = head_dim**-0.5 if scale is None else abs(scale)
    norms = [np.linalg.norm(to_float64(x), axis=-1).max() for x in (query, key)]
    return float((head_dim + 4) * unit * (factor * norms[0] * norms[1] + np.abs(bias).max()))


def rounding(dtype: np.dtype[Any]) -> float:
    """Return the largest relative error of rounding to a dtype: half of its epsilon."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


def to_float64(x: Any) -> Any:
    """Return an array in float64, None as it is."""
    return None if x is None else np.asarray(x).astype(np.float64)


def assert_same_bits(ours: Array, expected: Array) -> None:
    """Assert that two arrays hold the same bytes, so that -0.0 is not 0.0 and NaN is NaN."""
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    assert ours.tobytes() == expected.tobytes(), (
        f"largest difference {np.nanmax(np.abs(to_float64(ours) - to_float64(expected))):.2e}"
    )


TIMEOUT = 120  # seconds in which a process ends that does not hang


def printed(*words: Any, status: int = 0, cwd: Path | None = None) -> str:
    """Return what ``python -m`` prints with these words, and assert the status it ends with."""
    finished = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == status, finished.stderr
    return finished.stdout + finished.stderr


def in_a_process(
    function: Callable[..., None], *arguments: Any, status: int = 0, **environment: str | None
) -> None:
    """Call a function of a test file in a fresh process, and show its error here.

    ``environment`` comes on top of this process's; None takes a variable out.
    """
    whole = os.environ | environment
    module, name = Path(inspect.getfile(function)).stem, function.__name__
    run = subprocess.run(
        [sys.executable, "-c", f"import {module}; {module}.{name}{arguments}"],
        cwd=Path(__file__).parent,
        env={name: value for name, value in whole.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert run.returncode == status, run.stderr


def _folder_of_tbb() -> Path | None:
    """Return where pip put TBB's library, which is not where the system looks."""
    try:
        files = metadata.files("tbb") or []
    except metadata.PackageNotFoundError:
        return None
    return next(Path(each.locate()).resolve().parent for each in files if "libtbb" in each.name)


_TBB = _folder_of_tbb()

# Numba's ways to have threads.
LAYERS = [
    "omp",
    "workqueue",
    pytest.param(
        "tbb", marks=pytest.mark.skipif(_TBB is None, reason="the package tbb is not installed")
    ),
]


def with_layer(layer: str) -> dict[str, str]:
    """Return the environment of a process that takes one of the layers."""
    chosen = {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2"}
    return chosen | {"LD_LIBRARY_PATH": str(_TBB)} if layer == "tbb" else chosen


# Memory layouts. Each gives an array with the values of x and memory of another kind; the three of
# stride zero repeat one entry along an axis and so hold other values, as a contiguous copy of them
# does. They need not know more than that x has three axes.


def _fortran(x: Array) -> Array:
    return np.asfortranarray(x)


def _heads_inside(x: Array) -> Array:
    """(..., length, heads, features) in memory, as layers that split their features give it."""
    return np.swapaxes(np.ascontiguousarray(np.swapaxes(x, -3, -2)), -3, -2)


def _transposed(x: Array) -> Array:
    """(..., features, length) in memory: the last stride is not one element."""
    return np.swapaxes(np.ascontiguousarray(np.swapaxes(x, -1, -2)), -1, -2)


def _sliced(x: Array) -> Array:
    """A part of a larger array along every axis, features contiguous."""
    larger = np.zeros([n + 3 for n in x.shape], x.dtype)
    larger[tuple(slice(1, n + 1) for n in x.shape)] = x
    return larger[tuple(slice(1, n + 1) for n in x.shape)]


def _every_second(x: Array) -> Array:
    """Every second element along every axis."""
    larger = np.zeros([2 * n for n in x.shape], x.dtype)
    every_second = (slice(None, None, 2),) * x.ndim
    larger[every_second] = x
    return larger[every_second]


def _negative_rows(x: Array) -> Array:
    return np.flip(np.ascontiguousarray(np.flip(x, -2)), -2)


def _negative_everywhere(x: Array) -> Array:
    return np.flip(np.ascontiguousarray(np.flip(x)))


def _zero_over_heads(x: Array) -> Array:
    return np.broadcast_to(x[..., :1, :, :], x.shape)


def _zero_over_rows(x: Array) -> Array:
    return np.broadcast_to(x[..., :1, :], x.shape)


def _zero_over_features(x: Array) -> Array:
    return np.broadcast_to(x[..., :1], x.shape)


def _read_only(x: Array) -> Array:
    copy = x.copy()
    copy.flags.writeable = False
    return copy


def _misaligned(x: Array) -> Array:
    """Elements that start one byte off their alignment."""
    view = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def _in_records(x: Array) -> Array:
    """A field of packed records: strides that are no multiple of the element's size."""
    records = np.zeros(x.shape, np.dtype([("pad", np.int8), ("field", x.dtype)]))
    records["field"] = x
    return records["field"]


def _byte_swapped(x: Array) -> Array:
    """Big-endian elements; as it is for bfloat16, which has no such dtype."""
    return x if x.dtype == BFLOAT16 else x.astype(x.dtype.newbyteorder())


layouts: dict[str, Callable[[Array], Array]] = {
    "contiguous": np.ascontiguousarray,
    "fortran": _fortran,
    "heads_inside": _heads_inside,
    "transposed": _transposed,
    "sliced": _sliced,
    "every_second": _every_second,
    "negative_rows": _negative_rows,
    "negative_everywhere": _negative_everywhere,
    "zero_over_heads": _zero_over_heads,
    "zero_over_rows": _zero_over_rows,
    "zero_over_features": _zero_over_features,
    "read_only": _read_only,
    "misaligned": _misaligned,
    "in_records": _in_records,
    "byte_swapped": _byte_swapped,
}
