"""Where a token stands: sinusoidal waves, rotary embeddings with their scalings, ALiBi slopes.

Angles are computed in float64 and rounded once, so that a table of far positions is as good as one
of near ones.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastattn.arguments import check_float_dtype, check_int, check_number
from fastattn.formats import as_array, common_format, is_float
from fastattn.keywords import check_range

Array = NDArray[Any]


# ---------------------------------------------------------------------------
# Sinusoidal
# ---------------------------------------------------------------------------


def sinusoidal_positions(
    length: int,
    dim: int,
    *,
    offset: int = 0,
    base: float = 10000.0,
    dtype: DTypeLike = np.float32,
) -> Array:
    """Return the waves that tell positions apart, to be added to embeddings.

    ``table[p, 2 i] = sin((p + offset) / base^(2 i / dim))``, and the cosine in column 2 i + 1.

    Parameters
    ----------
    length : int
        The number of positions.
    dim : int
        The features of each. Where it is odd, the last column is a sine without its cosine.
    offset : int
        The position of row 0.
    base : float
        Greater than 1: wavelengths run from 2 pi to nearly ``2 pi base``.
    dtype : dtype
        A float of 16 to 64 bits, `ml_dtypes.bfloat16` included.

    Returns
    -------
    ndarray, (length, dim)

    Raises
    ------
    TypeError
        For counts that are not integers, a base that is no real number, a dtype that is no float.
    ValueError
        If length is below 0, dim below 1 or base not greater than 1.

    See Also
    --------
    embed_tokens : a lookup and these positions in one.

    References
    ----------
    .. [1] Vaswani et al. 2017, "Attention Is All You Need", section 3.5, arXiv:1706.03762

    Examples
    --------
    >>> import fastattn
    >>> fastattn.sinusoidal_positions(3, 4).round(2)
    array([[ 0.  ,  1.  ,  0.  ,  1.  ],
           [ 0.84,  0.54,  0.01,  1.  ],
           [ 0.91, -0.42,  0.02,  1.  ]], dtype=float32)
    """
    kind = check_float_dtype("dtype", dtype)
    dim = check_int("dim", dim, 1)
    positions = _positions(length, offset)
    angles = positions[:, None] * _frequencies(dim, check_number("base", base, above=1))
    table = np.empty((len(positions), dim), kind)
    table[:, 0::2] = np.sin(angles)
    table[:, 1::2] = np.cos(angles[:, : dim // 2])
    return table


def embed_tokens(
    tokens: ArrayLike,
    table: ArrayLike,
    *,
    offset: int = 0,
    base: float = 10000.0,
    scale: float = 1.0,
) -> Array:
    """Return ``scale * table[tokens] + sinusoidal_positions(length, dim)``: what an encoder reads.

    Parameters
    ----------
    tokens : array_like of integers, (..., length)
        Rows of the table, ``0 <= token < vocabulary``.
    table : array_like, (vocabulary, dim)
        The embedding of each token.
    offset : int
        The position of the first token.
    base : float
        As in `sinusoidal_positions`.
    scale : float
        Vaswani et al. take ``sqrt(dim)``, so that the waves do not drown a table of small numbers.

    Returns
    -------
    ndarray, (..., length, dim)
        In the table's dtype; float64 where that is an integer or bool.

    Raises
    ------
    TypeError
        For tokens that are not integers, a table without meaning as numbers, an offset that is no
        integer.
    ValueError
        If a token is not a row of the table, tokens have no axis or the table has not two.

    References
    ----------
    .. [1] Vaswani et al. 2017, "Attention Is All You Need", sections 3.4 and 3.5, arXiv:1706.03762

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> table = np.zeros((10, 4), np.float32)
    >>> embedded = fastattn.embed_tokens([3, 1, 3], table)
    >>> embedded.shape, bool((embedded == fastattn.sinusoidal_positions(3, 4)).all())
    ((3, 4), True)
    """
    numbers, rows = as_array("tokens", tokens), as_array("table", table)
    if numbers.ndim == 0:
        raise ValueError("tokens must have at least 1 dimension: got shape ()")
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"table must have shape (vocabulary, dim): got {rows.shape}")
    numbers = _as_rows("tokens", numbers, len(rows))
    dtype, form = common_format(("table",), (rows,))
    length, dim = numbers.shape[-1], rows.shape[1]
    positions = sinusoidal_positions(length, dim, offset=offset, base=base, dtype=form.accumulation)
    embedded = rows[numbers].astype(form.accumulation) * check_number("scale", scale) + positions
    return embedded.astype(dtype, copy=False)


# ---------------------------------------------------------------------------
# Rotary
# ---------------------------------------------------------------------------


def rotary_table(
    length: int,
    dim: int,
    *,
    offset: int = 0,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    dtype: DTypeLike = np.float32,
) -> tuple[Array, Array]:
    """Return the cosines and sines of rotary embeddings, for `apply_rotary`.

    ``cos[p, i] = cos((p + offset) * base^(-2 i / dim))``, and sin likewise.

    Parameters
    ----------
    length : int
        The number of positions.
    dim : int
        The features that will be rotated, an even number: head_dim, or less for partial rotation.
    offset : int
        The position of row 0.
    base : float
        Greater than 1; `rope_theta` in model configurations.
    scaling : mapping, optional
        How a model was stretched to longer contexts: what its ``config.json`` holds as
        ``rope_scaling`` or ``rope_parameters``, see Notes.
    dtype : dtype
        A float of 16 to 64 bits, `ml_dtypes.bfloat16` included.

    Returns
    -------
    cos, sin : ndarray, (length, dim // 2)

    Raises
    ------
    TypeError
        For counts that are not integers, numbers that are not real, a dtype that is no float.
    ValueError
        If length is below 0, dim odd or below 2, base not greater than 1; if `scaling` names an
        unknown type, lacks a key of its type, has one that its type has not, or a number out of
        range.

    Notes
    -----
    Keys of `scaling`: ``rope_type`` (or ``type``) and those of its type, as in transformers; None
    counts as absent, and ``rope_theta`` takes the place of `base`. With f the frequencies
    ``base^(-2 i / dim)`` and L the length that the model was trained on,
    ``original_max_position_embeddings``:

    - "default": f.
    - "linear": f / factor, as if positions were closer together [2]_.
    - "ntk": a base of ``base * factor^(dim / (dim - 2))``, which leaves the highest frequency and
      divides the lowest by factor.
    - "dynamic": "ntk" with ``factor * n / L - (factor - 1)`` in place of factor, where n is
      ``offset + length`` or L, whichever is more. It needs L. A table for the whole context is not
      the beginning of a table for a longer one.
    - "llama3": f / factor below ``low_freq_factor`` turns in L, f above ``high_freq_factor`` turns,
      in between a mix that is linear in the turns [3]_.
    - "yarn": f / factor below ``beta_slow`` turns (1), f above ``beta_fast`` turns (32), in between
      a mix that is linear in i; cos and sin are multiplied with ``attention_factor``, by default
      ``0.1 log(factor) + 1``, or the quotient of two such for ``mscale`` and ``mscale_all_dim``
      [4]_. ``truncate`` (True): the ends of the mix are whole numbers.

    References
    ----------
    .. [1] Su et al. 2021, "RoFormer", section 3.2.2, arXiv:2104.09864
    .. [2] Chen et al. 2023, "Extending Context Window of Large Language Models via Positional
       Interpolation", section 2.3, arXiv:2306.15595
    .. [3] Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.4.2, arXiv:2407.21783
    .. [4] Peng et al. 2023, "YaRN", sections 3.1 to 3.4, arXiv:2309.00071

    Examples
    --------
    >>> import fastattn
    >>> cos, sin = fastattn.rotary_table(1024, 64)
    >>> cos.shape, sin.shape
    ((1024, 32), (1024, 32))
    >>> halved, _ = fastattn.rotary_table(1024, 64, scaling={"rope_type": "linear", "factor": 2.0})
    >>> bool((halved[::2] == cos[:512]).all())
    True
    """
    kind = check_float_dtype("dtype", dtype)
    dim = check_int("dim", dim, 2)
    if dim % 2:
        raise ValueError(f"dim must be even, features are rotated in pairs: got {dim}")
    base = check_number("base", base, above=1)
    positions = _positions(length, offset)
    frequencies, factor = _scaled_frequencies(dim, base, offset + length, scaling)
    angles = positions[:, None] * frequencies
    return (factor * np.cos(angles)).astype(kind), (factor * np.sin(angles)).astype(kind)


def apply_rotary(
    x: ArrayLike,
    cos: ArrayLike,
    sin: ArrayLike,
    *,
    positions: ArrayLike | None = None,
    interleaved: bool = False,
) -> Array:
    """Return x with its features rotated, pair by pair, by the angles of their position.

    ``(a, b) -> (a cos - b sin, b cos + a sin)``

    Parameters
    ----------
    x : array_like, (..., length, features)
        Queries or keys.
    cos, sin : array_like, (length, rotated // 2)
        What `rotary_table` gave. The first ``rotated = 2 * cos.shape[-1]`` features are rotated,
        the others stay. Without `positions` more axes may come first, which broadcast.
    positions : array_like of integers, optional
        The row of cos and sin for each token, broadcastable to ``x.shape[:-1]``. None means that
        token p takes row p, of as many rows as tokens. For one series for each batch entry of
        (batch, heads, length, features) that is (batch, 1, length); for (batch, length, heads,
        features) it is (batch, length, 1).
    interleaved : bool
        Which features are a pair, here of six::

            False    0 1 2 0 1 2    halves: GPT-NeoX, Llama in transformers, ONNX by default
            True     0 0 1 1 2 2    neighbours: RoFormer, GPT-J, Llama as published

    Returns
    -------
    ndarray, the shape of x
        In the dtype of x, whatever that of cos and sin; float64 where x is an integer or bool.

    Raises
    ------
    TypeError
        For arrays without meaning as numbers, positions that are not integers, an `interleaved`
        that is not a bool.
    ValueError
        If shapes do not fit, or a position is not a row of cos.

    Notes
    -----
    The product of a rotated query and a rotated key depends on the distance of their positions
    alone. 16-bit inputs are rotated in float32 and rounded once.

    References
    ----------
    .. [1] Su et al. 2021, "RoFormer", section 3.4.2, arXiv:2104.09864

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> cos, sin = fastattn.rotary_table(16, 8)
    >>> query = np.random.default_rng(0).standard_normal((2, 4, 16, 8), dtype=np.float32)
    >>> rotated = fastattn.apply_rotary(query, cos, sin)
    >>> rotated.shape
    (2, 4, 16, 8)
    >>> last = fastattn.apply_rotary(query[:, :, -1:], cos, sin, positions=[15])
    >>> bool((last == rotated[:, :, -1:]).all())
    True
    """
    tokens = as_array("x", x)
    dtype, form = common_format(("x",), (tokens,))
    if tokens.ndim < 2:
        raise ValueError(f"x must have at least 2 dimensions: got shape {tokens.shape}")
    if not isinstance(interleaved, bool | np.bool_):
        raise TypeError(f"interleaved must be a bool: got {interleaved!r}")
    c, s = _rows_of_tokens(tokens.shape, as_array("cos", cos), as_array("sin", sin), positions)
    c, s = c.astype(form.accumulation, copy=False), s.astype(form.accumulation, copy=False)

    half = c.shape[-1]
    first, second = slice(half), slice(half, 2 * half)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    a = tokens[..., first].astype(form.accumulation, copy=False)
    b = tokens[..., second].astype(form.accumulation, copy=False)
    rotated = np.empty(tokens.shape, dtype)
    rotated[..., first] = a * c - b * s
    rotated[..., second] = b * c + a * s
    rotated[..., 2 * half :] = tokens[..., 2 * half :]
    return rotated


# ---------------------------------------------------------------------------
# ALiBi
# ---------------------------------------------------------------------------


def alibi_slopes(num_heads: int, dtype: DTypeLike = np.float32) -> Array:
    """Return the slopes of ALiBi, one for each head: ``2^(-8 h / num_heads)`` for h from 1.

    Parameters
    ----------
    num_heads : int
        Where it is no power of two, the slopes of the next smaller power n come first and every
        second one of 2 n after them, as in the authors' code.
    dtype : dtype
        A float of 16 to 64 bits, `ml_dtypes.bfloat16` included.

    Returns
    -------
    ndarray, (num_heads,)

    Raises
    ------
    TypeError
        If num_heads is not an integer or dtype no float.
    ValueError
        If num_heads is below 1.

    References
    ----------
    .. [1] Press et al. 2022, "Train Short, Test Long", section 3, arXiv:2108.12409

    Examples
    --------
    >>> import fastattn
    >>> fastattn.alibi_slopes(4)
    array([0.25 , 0.0625 , 0.015625 , 0.00390625], dtype=float32)
    >>> fastattn.alibi_slopes(3)
    array([0.0625 , 0.00390625, 0.25 ], dtype=float32)
    """
    kind = check_float_dtype("dtype", dtype)
    count = check_int("num_heads", num_heads, 1)
    power = 1 << (count.bit_length() - 1)
    exponents = np.concatenate([np.arange(1, power + 1), np.arange(0.5, count - power)])
    return np.exp2(-8.0 / power * exponents).astype(kind)


# ---------------------------------------------------------------------------
# Angles and the scaling of their frequencies
# ---------------------------------------------------------------------------


def _positions(length: int, offset: int) -> Array:
    return check_int("offset", offset) + np.arange(check_int("length", length, 0))


def _frequencies(dim: int, base: float) -> Array:
    """Return base^(-2 i / dim), the angle from one position to the next."""
    return base ** -(np.arange(0, dim, 2) / dim)


def _scaled_frequencies(
    dim: int, base: float, length: int, scaling: Mapping[str, Any] | None
) -> tuple[Array, float]:
    """Return the frequencies that a configuration asks for, and the factor of cos and sin."""
    if scaling is None:
        return _default(dim, base, length)
    if not isinstance(scaling, Mapping):
        raise TypeError(f"scaling must be a mapping: got {scaling!r}")
    keys = {name: value for name, value in scaling.items() if value is not None}
    named = [keys.pop(name) for name in ("rope_type", "type") if name in keys]
    base = check_number("scaling['rope_theta']", keys.pop("rope_theta", base), above=1)
    kind = named[0] if named else "default"
    if any(other != kind for other in named) or kind not in _SCALINGS or (keys and not named):
        raise ValueError(
            f"scaling['rope_type'] must be one of {', '.join(_SCALINGS)}: got {dict(scaling)}"
        )
    scaled = _SCALINGS[kind]
    try:
        inspect.signature(scaled).bind(dim, base, length, **keys)
    except TypeError as error:
        raise ValueError(f"scaling of type {kind!r}: {error}") from None
    for name, value in keys.items():
        if name != "truncate":
            check_number(f"scaling[{name!r}]", value, above=0)
        elif not isinstance(value, bool):
            raise TypeError(f"scaling['truncate'] must be a bool: got {value!r}")
    return scaled(dim, base, length, **keys)


# Each takes the keys that transformers knows for its type, and returns frequencies and the factor
# of cos and sin.


def _default(dim: int, base: float, _length: int) -> tuple[Array, float]:
    return _frequencies(dim, base), 1.0


def _linear(dim: int, base: float, _length: int, *, factor: float) -> tuple[Array, float]:
    return _frequencies(dim, base) / factor, 1.0


def _ntk(dim: int, base: float, _length: int, *, factor: float) -> tuple[Array, float]:
    # The one frequency of two features is 1 with any base.
    return _frequencies(dim, base * factor ** (dim / max(dim - 2, 1))), 1.0


def _dynamic(
    dim: int, base: float, length: int, *, factor: float, original_max_position_embeddings: float
) -> tuple[Array, float]:
    stretch = max(length / original_max_position_embeddings, 1.0)
    return _ntk(dim, base, length, factor=factor * stretch - (factor - 1))


def _llama3(
    dim: int,
    base: float,
    _length: int,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> tuple[Array, float]:
    if high_freq_factor <= low_freq_factor:
        raise ValueError(
            "scaling['high_freq_factor'] must be greater than scaling['low_freq_factor']: "
            f"got {high_freq_factor} and {low_freq_factor}"
        )
    plain = _frequencies(dim, base)
    turns = original_max_position_embeddings * plain / (2 * math.pi)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return kept * plain + (1 - kept) * plain / factor, 1.0


def _yarn(
    dim: int,
    base: float,
    _length: int,
    *,
    factor: float,
    original_max_position_embeddings: float,
    attention_factor: float | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> tuple[Array, float]:
    def feature(turns: float) -> float:
        """Return the i whose frequency makes so many turns in the original length."""
        wavelength = original_max_position_embeddings / (2 * math.pi * turns)
        return dim * math.log(wavelength) / (2 * math.log(base))

    low, high = feature(beta_fast), feature(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001  # transformers' way out of dividing by zero
    divided = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
    plain = _frequencies(dim, base)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if attention_factor is None:
        attention_factor = magnitude(1.0)
        if mscale and mscale_all_dim:
            attention_factor = magnitude(mscale) / magnitude(mscale_all_dim)
    return (1 - divided) * plain + divided * plain / factor, attention_factor


_SCALINGS: dict[str, Callable[..., tuple[Array, float]]] = {
    "default": _default,
    "linear": _linear,
    "ntk": _ntk,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}


# ---------------------------------------------------------------------------
# Tables and their rows
# ---------------------------------------------------------------------------


def _as_rows(name: str, numbers: Array, rows: int) -> Array:
    """Return numbers as rows of a table; below 0, NumPy would count from its end."""
    if numbers.dtype.kind not in "iu" and numbers.size:  # an empty list is one of floats
        raise TypeError(f"{name} must be integers: got {numbers.dtype}")
    check_range(name, numbers, 0, rows - 1)
    return numbers.astype(np.intp, copy=False)


def _rows_of_tokens(
    shape: tuple[int, ...], cos: Array, sin: Array, positions: ArrayLike | None
) -> tuple[Array, Array]:
    """Return the cosines and sines of every token, broadcastable to the features they rotate."""
    for name, table in (("cos", cos), ("sin", sin)):
        if not is_float(table.dtype):
            raise TypeError(f"{name} must be an array of floats: got {table.dtype}")
    if cos.ndim < 2 or cos.shape != sin.shape:
        raise ValueError(
            "cos and sin must have one shape (length, rotated // 2): "
            f"got {cos.shape} and {sin.shape}"
        )
    *tokens, length, features = shape
    if 2 * cos.shape[-1] > features:
        raise ValueError(
            f"cos.shape[-1] must be at most half of x.shape[-1]: got {cos.shape[-1]} and {features}"
        )
    if positions is None:
        rotated = (*tokens, length, cos.shape[-1])
        if cos.shape[-2] != length or not _broadcasts(cos.shape, rotated):
            raise ValueError(
                "cos must have a row for each of the tokens of x, without positions: "
                f"got shapes {cos.shape} and {shape}"
            )
        return cos, sin
    numbers = as_array("positions", positions)
    if cos.ndim != 2:
        raise ValueError(f"cos must have 2 dimensions with positions: got shape {cos.shape}")
    if not _broadcasts(numbers.shape, shape[:-1]):
        raise ValueError(
            f"positions must broadcast to x.shape[:-1] = {shape[:-1]}: got shape {numbers.shape}"
        )
    numbers = _as_rows("positions", numbers, len(cos))
    return cos[numbers], sin[numbers]


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False
