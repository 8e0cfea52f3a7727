"""Multi-head attention as a layer: four projections around `attention`, weights as plain arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from os import PathLike
from typing import Any, Literal, Protocol, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastattn.arguments import check_float_dtype, check_int
from fastattn.attention import Causal, attention, attention_weights
from fastattn.formats import as_array, common_format, known_format

Array = NDArray[Any]


class Cache(Protocol):
    """What a layer asks of a cache: `KVCache` does both."""

    def append(self, key: Array, value: Array) -> object:
        """Keep keys and values (batch, num_kv_heads, length, head_dim), after those it holds."""

    def attend(self, query: Array, *, mask: Array | None, causal: Causal) -> Any:
        """Return `attention` of queries (batch, num_heads, length, head_dim) to all it holds."""


class MultiHeadAttention:
    """Attention in several heads, each of which projects its input in a way of its own.

    ``concat(head_1, ..., head_n) @ w_o + b_o`` with
    ``head_h = attention(query @ w_q[h] + b_q[h], key @ w_k[h] + b_k[h], value @ w_v[h] + b_v[h])``

    Parameters
    ----------
    embed_dim : int
        Features of the query and of the output.
    num_heads : int
        Must divide embed_dim: ``head_dim = embed_dim // num_heads``.
    num_kv_heads : int, optional
        Must divide num_heads; query head h reads kv head ``h // (num_heads // num_kv_heads)``. None
        is num_heads.
    kdim, vdim : int, optional
        Features of key and value. None is embed_dim.
    bias : bool
        Whether there are b_q, b_k, b_v and b_o; they start as zeros.
    dtype : dtype
        Of the weights: a float of 16 to 64 bits, `ml_dtypes.bfloat16` included.
    rng : int or numpy.random.Generator, optional
        Where the weights are drawn from, uniformly between ``-r`` and ``r`` with
        ``r = sqrt(6 / (rows + columns))`` [2]_. None draws others each time.

    Attributes
    ----------
    embed_dim, num_heads, num_kv_heads, head_dim, kdim, vdim : int
    w_q : ndarray, (embed_dim, embed_dim)
    w_k : ndarray, (kdim, num_kv_heads * head_dim)
    w_v : ndarray, (vdim, num_kv_heads * head_dim)
    w_o : ndarray, (embed_dim, embed_dim)
        (in, out), as in ``x @ w``: the transpose of what torch keeps. Head h owns columns
        ``h * head_dim`` to ``(h + 1) * head_dim`` of the first three and these rows of the last.
    b_q, b_k, b_v, b_o : ndarray or None
        As long as their weight is wide.

    Raises
    ------
    TypeError
        For counts that are not integers, a dtype that is no float.
    ValueError
        For counts below 1 or heads that do not divide.

    See Also
    --------
    from_arrays, from_torch, from_safetensors : layers with given weights.

    References
    ----------
    .. [1] Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2, arXiv:1706.03762
    .. [2] Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward neural
       networks", section 4.2.1

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> layer = fastattn.MultiHeadAttention(16, num_heads=4, rng=0)
    >>> x = np.random.default_rng(1).standard_normal((2, 5, 16), dtype=np.float32)
    >>> output, weights = layer(x, causal=True, need_weights=True)
    >>> output.shape, weights.shape
    ((2, 5, 16), (2, 4, 5, 5))
    >>> bool(np.allclose(weights.sum(axis=-1), 1))
    True
    """

    w_q: Array
    w_k: Array
    w_v: Array
    w_o: Array
    b_q: Array | None
    b_k: Array | None
    b_v: Array | None
    b_o: Array | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        dtype: DTypeLike = np.float32,
        rng: int | np.random.Generator | None = None,
    ) -> None:
        shapes = self._configure(
            embed_dim,
            num_heads,
            num_heads if num_kv_heads is None else num_kv_heads,
            embed_dim if kdim is None else kdim,
            embed_dim if vdim is None else vdim,
        )
        kind = check_float_dtype("dtype", dtype)
        generator = np.random.default_rng(rng)
        for name, shape in shapes.items():
            if name.startswith("w"):
                bound = math.sqrt(6 / sum(shape))
                setattr(self, name, generator.uniform(-bound, bound, shape).astype(kind))
            else:
                setattr(self, name, np.zeros(shape, kind) if bias else None)

    def _configure(
        self, embed_dim: int, num_heads: int, num_kv_heads: int, kdim: int, vdim: int
    ) -> dict[str, tuple[int, ...]]:
        """Check and keep the sizes; return the shape of every weight and bias."""
        self.embed_dim = check_int("embed_dim", embed_dim, 1)
        self.num_heads = check_int("num_heads", num_heads, 1)
        self.num_kv_heads = check_int("num_kv_heads", num_kv_heads, 1)
        self.kdim, self.vdim = check_int("kdim", kdim, 1), check_int("vdim", vdim, 1)
        for name, part, whole in (
            ("num_heads must divide embed_dim", num_heads, embed_dim),
            ("num_kv_heads must divide num_heads", num_kv_heads, num_heads),
        ):
            if whole % part:
                raise ValueError(f"{name}: got {part} and {whole}")
        kv_dim = self.num_kv_heads * self.head_dim
        return {
            "w_q": (self.embed_dim, self.embed_dim),
            "w_k": (self.kdim, kv_dim),
            "w_v": (self.vdim, kv_dim),
            "w_o": (self.embed_dim, self.embed_dim),
            "b_q": (self.embed_dim,),
            "b_k": (kv_dim,),
            "b_v": (kv_dim,),
            "b_o": (self.embed_dim,),
        }

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.embed_dim // self.num_heads

    # -----------------------------------------------------------------------
    # Layers with given weights
    # -----------------------------------------------------------------------

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, ArrayLike | None], num_heads: int
    ) -> MultiHeadAttention:
        """Return a layer with the given weights.

        Parameters
        ----------
        arrays : mapping from name to array
            w_q, w_k, w_v, w_o and, where there are biases, b_q, b_k, b_v, b_o, of the shapes that
            the class describes; what `numpy.load` gives for an ``.npz`` file will do. They are
            copied, into one dtype. The shape of w_k says how many kv heads there are.
        num_heads : int

        Returns
        -------
        MultiHeadAttention

        Raises
        ------
        TypeError
            For arrays without meaning as numbers or without a common dtype.
        ValueError
            For a name too many or too few, a shape that does not fit, heads that do not divide.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> weights = dict.fromkeys(["w_q", "w_k", "w_v", "w_o"], np.eye(4))
        >>> layer = fastattn.MultiHeadAttention.from_arrays(weights, num_heads=2)
        >>> x = np.eye(4)[:3]
        >>> bool(np.allclose(layer(x)[:, :2], fastattn.attention(x[:, :2], x[:, :2], x[:, :2])))
        True
        """
        given = {name: as_array(name, x) for name, x in arrays.items() if x is not None}
        if missing := {"w_q", "w_k", "w_v", "w_o"} - given.keys():
            raise ValueError(f"arrays must hold w_q, w_k, w_v and w_o: lacks {_listed(missing)}")
        for name in ("w_q", "w_k", "w_v"):
            if given[name].ndim != 2:
                raise ValueError(f"{name} must have 2 dimensions: got shape {given[name].shape}")
        layer = cls.__new__(cls)
        embed_dim = len(given["w_q"])
        head_dim = embed_dim // check_int("num_heads", num_heads, 1)
        # A width that is no whole number of heads fails below, where shapes are compared.
        num_kv_heads = max(1, given["w_k"].shape[1] // max(1, head_dim))
        shapes = layer._configure(
            embed_dim, num_heads, num_kv_heads, len(given["w_k"]), len(given["w_v"])
        )
        if unknown := given.keys() - shapes.keys():
            raise ValueError(f"arrays must hold only {_listed(shapes)}: got {_listed(unknown)}")
        for name, x in given.items():
            if x.shape != shapes[name]:
                raise ValueError(f"{name} must have shape {shapes[name]}: got {x.shape}")
        dtype, _ = common_format(list(given), list(given.values()))
        for name in shapes:
            setattr(layer, name, np.array(given[name], dtype, order="C") if name in given else None)
        return layer

    @classmethod
    def from_torch(
        cls, state_dict: Mapping[str, Any], num_heads: int, *, prefix: str = ""
    ) -> MultiHeadAttention:
        """Return the layer that `torch.nn.MultiheadAttention` is, with a copy of its weights.

        Parameters
        ----------
        state_dict : mapping from name to tensor or array
            What the module's ``state_dict()`` gives: in_proj_weight, or q_proj_weight,
            k_proj_weight and v_proj_weight; out_proj.weight; in_proj_bias and out_proj.bias, where
            there are biases. torch is not imported.
        num_heads : int
        prefix : str
            What the names begin with, such as ``"encoder.layers.0.self_attn."`` in the state of a
            whole model; other names are then passed over.

        Returns
        -------
        MultiHeadAttention
            In the dtype of the tensors. Those of torch.bfloat16 become float32, which holds them
            exactly, because NumPy has no such type.

        Raises
        ------
        TypeError
            For tensors without meaning as numbers or without a common dtype.
        ValueError
            For a name too many or too few (bias_k and bias_v of ``add_bias_kv=True`` among them), a
            shape that does not fit, heads that do not divide.

        Notes
        -----
        Inputs are (batch, length, features), torch's ``batch_first=True``. masks say which keys to
        attend, and torch's say which to ignore: ``layer(x, key_mask=~key_padding_mask)``. A query
        that sees no key gives ``b_o``, not NaN.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> state = {"in_proj_weight": np.ones((12, 4)), "out_proj.weight": np.eye(4)}
        >>> layer = fastattn.MultiHeadAttention.from_torch(state, num_heads=2)
        >>> layer(np.full((3, 4), 0.5)).tolist()
        [[2.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0]]
        """
        names = {name.removeprefix(prefix): name for name in state_dict if name.startswith(prefix)}
        if unknown := names.keys() - _FROM_TORCH.keys():
            raise ValueError(
                f"state_dict must hold only {_listed(_FROM_TORCH)} after the prefix {prefix!r}: "
                f"got {_listed(unknown)}"
            )
        arrays: dict[str, Array] = {}
        for short, name in names.items():
            parts, whole = _FROM_TORCH[short], _from_tensor(name, state_dict[name])
            if whole.ndim == 0 or len(whole) % len(parts):
                raise ValueError(
                    f"{name} must have {len(parts)} * embed_dim rows: got shape {whole.shape}"
                )
            arrays |= zip(parts, (x.T for x in np.split(whole, len(parts))), strict=True)
        if not {"w_q", "w_k", "w_v", "w_o"} <= arrays.keys():
            raise ValueError(
                "state_dict must hold out_proj.weight and either in_proj_weight or q_proj_weight, "
                f"k_proj_weight and v_proj_weight after the prefix {prefix!r}: "
                f"got {_listed(names) or 'nothing'}"
            )
        return cls.from_arrays(arrays, num_heads)

    @classmethod
    def from_safetensors(
        cls, path: str | PathLike[str], num_heads: int, *, prefix: str = ""
    ) -> MultiHeadAttention:
        """Return the layer whose tensors a safetensors file holds, under torch's names.

        Parameters
        ----------
        path : str or path
            Only the tensors of this layer are read.
        num_heads : int
        prefix : str
            What their names begin with, as in `from_torch`.

        Returns
        -------
        MultiHeadAttention
            In the dtype of the tensors.

        Raises
        ------
        ImportError
            Without the package safetensors: ``pip install 'fastattn[safetensors]'``.
        OSError
            If the file cannot be opened.
        TypeError, ValueError
            As `from_torch`; ValueError also for what is no safetensors file.
        """
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ImportError(
                "from_safetensors needs the package safetensors: "
                "pip install 'fastattn[safetensors]'"
            ) from error
        with suppress(ImportError):
            import ml_dtypes  # noqa: F401  (teaches NumPy the name bfloat16)
        try:
            with safe_open(path, framework="numpy") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"path must be that of a safetensors file: {path}: {error}") from error
        return cls.from_torch(tensors, num_heads, prefix=prefix)

    # -----------------------------------------------------------------------
    # Calling
    # -----------------------------------------------------------------------

    @overload
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike | None = ...,
        value: ArrayLike | None = ...,
        *,
        key_mask: ArrayLike | None = ...,
        causal: Causal = ...,
        cache: Cache | None = ...,
        need_weights: Literal[False] = ...,
    ) -> Array: ...

    @overload
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike | None = ...,
        value: ArrayLike | None = ...,
        *,
        key_mask: ArrayLike | None = ...,
        causal: Causal = ...,
        cache: Cache | None = ...,
        need_weights: Literal[True],
    ) -> tuple[Array, Array]: ...

    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        *,
        key_mask: ArrayLike | None = None,
        causal: Causal = False,
        cache: Cache | None = None,
        need_weights: bool = False,
    ) -> Array | tuple[Array, Array]:
        """Return what the queries read from the values.

        Parameters
        ----------
        query : array_like, (..., seqlen_q, embed_dim)
            Usually (batch, length, features); (length, features) is one sequence.
        key : array_like, (..., seqlen_kv, kdim), optional
            None is the query: self-attention.
        value : array_like, (..., seqlen_kv, vdim), optional
            None is the key.
        key_mask : array_like of bool, (..., seqlen_kv), optional
            True = attend. With a cache seqlen_kv counts all keys that it then holds.
        causal : bool, "bottom_right" or "top_left"
            As in `attention`.
        cache : KVCache, optional
            The projected key and value are appended to it, and the queries attend to all it holds.
            Anything with such an ``append(key, value)`` and ``attend(query, *, mask, causal)`` will
            do; see `Cache`.
        need_weights : bool
            Also return the attention of each head: seqlen_q * seqlen_kv numbers, which attention
            itself never stores. Not with a cache.

        Returns
        -------
        output : ndarray, (..., seqlen_q, embed_dim)
            In ``np.result_type`` of query, key, value and the weights; float64 where that is an
            integer. Sums are float32 for 16 bits. A query that sees no key gives `b_o`.
        weights : ndarray, (..., num_heads, seqlen_q, seqlen_kv), only with `need_weights`

        Raises
        ------
        TypeError
            As `attention`.
        ValueError
            For shapes that do not fit, a value without a key, weights wanted from a cache.
        """
        if key is None and value is not None:
            raise ValueError("value must come with a key: got key=None")
        if need_weights and cache is not None:
            raise ValueError("need_weights must be False with a cache: its keys are its own")
        q = as_array("query", query)
        k = q if key is None else as_array("key", key)
        v = k if value is None else as_array("value", value)
        self._check_inputs(q, k, v)
        dtype, _ = common_format(("query", "key", "value", "w_q"), (q, k, v, self.w_q))
        mask = None
        if key_mask is not None:
            checked = _check_key_mask(key_mask, k.shape[:-1] if cache is None else None)
            mask = checked[..., None, None, :]

        one_sequence = q.ndim == 2
        if one_sequence:
            q, k, v = q[None], k[None], v[None]
        queries = split_heads(_affine(q, self.w_q, self.b_q, dtype), self.num_heads)
        keys = split_heads(_affine(k, self.w_k, self.b_k, dtype), self.num_kv_heads)
        values = split_heads(_affine(v, self.w_v, self.b_v, dtype), self.num_kv_heads)
        if cache is None:
            context = attention(queries, keys, values, mask=mask, causal=causal)
        else:
            cache.append(keys, values)
            context = cache.attend(queries, mask=mask, causal=causal)
        output = _affine(join_heads(context), self.w_o, self.b_o, dtype)
        if one_sequence:
            output = output[0]
        if not need_weights:
            return output
        weights = attention_weights(queries, keys, mask=mask, causal=causal)
        return output, weights[0] if one_sequence else weights

    def _check_inputs(self, query: Array, key: Array, value: Array) -> None:
        for name, x, features in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.ndim < 2 or x.shape[-1] != features:
                raise ValueError(
                    f"{name} must have shape (..., length, {features}): got shape {x.shape}"
                )
        if not query.ndim == key.ndim == value.ndim:
            raise ValueError(
                "query, key and value must have equally many dimensions: "
                f"got shapes {query.shape}, {key.shape} and {value.shape}"
            )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                "value must have the shape of key, features apart: "
                f"got {value.shape} and {key.shape}"
            )


def _check_key_mask(key_mask: ArrayLike, shape: tuple[int, ...] | None) -> Array:
    """Return the mask; its shape is the cache's to check where the keys are the cache's."""
    mask = as_array("key_mask", key_mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"key_mask must be bool (True = attend): got {mask.dtype}")
    if mask.ndim == 0 or (shape is not None and mask.shape != shape):
        expected = "(..., seqlen_kv)" if shape is None else f"key.shape[:-1] = {shape}"
        raise ValueError(f"key_mask must have shape {expected}: got {mask.shape}")
    return mask


# ---------------------------------------------------------------------------
# Projections and heads
# ---------------------------------------------------------------------------


def _affine(x: Array, weight: Array, bias: Array | None, dtype: np.dtype[Any]) -> Array:
    """Return x @ weight + bias in a dtype; 16-bit sums are float32 and rounded once.

    NumPy multiplies a stack of matrices one by one: as one of many rows they are a single product.
    """
    wide = known_format(dtype).accumulation
    rows = x.reshape(-1, x.shape[-1]).astype(wide, copy=False)
    product: Array = rows @ weight.astype(wide, copy=False)
    if bias is not None:
        product += bias.astype(wide, copy=False)
    return product.astype(dtype, copy=False).reshape(*x.shape[:-1], weight.shape[1])


def split_heads(x: Array, num_heads: int) -> Array:
    """Return (..., length, features) as (..., num_heads, length, head_dim), a view."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads).swapaxes(-3, -2)


def join_heads(x: Array) -> Array:
    """Return (..., num_heads, length, head_dim) as (..., length, features)."""
    *batch, num_heads, length, head_dim = x.shape
    return x.swapaxes(-3, -2).reshape(*batch, length, num_heads * head_dim)


# ---------------------------------------------------------------------------
# What torch calls it
# ---------------------------------------------------------------------------

# Each tensor, and which of our weights and biases are stacked in it.
_FROM_TORCH = {
    "in_proj_weight": ("w_q", "w_k", "w_v"),
    "in_proj_bias": ("b_q", "b_k", "b_v"),
    "q_proj_weight": ("w_q",),
    "k_proj_weight": ("w_k",),
    "v_proj_weight": ("w_v",),
    "out_proj.weight": ("w_o",),
    "out_proj.bias": ("b_o",),
}


def _from_tensor(name: str, x: Any) -> Array:
    """Return a tensor as an array, without importing torch."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        if str(x.dtype) == "torch.bfloat16":
            x = x.float()
    return as_array(name, x)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
