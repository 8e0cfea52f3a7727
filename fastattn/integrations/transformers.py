"""Attention for the models of transformers, on the CPU: ``attn_implementation="fastattn"``.

    import fastattn.integrations.transformers

    fastattn.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastattn")
    with torch.inference_mode():
        model.generate(...)

Two functions are registered: one that attends, and one that makes masks. Without the second,
transformers hands over no mask at all, and the model silently sees the future.

transformers' own mask is a tensor of batch x queries x keys. Nearly always it says little: up to
the query's position, back to the edge of a window, not the padding. `Visibility` is that said in
four numbers and a row for each text, which is what the kernel wants to know; whoever looks inside
finds the tensor that he expects.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import getclosurevars
from typing import Any

from fastattn.attention import Window
from fastattn.integrations import needs
from fastattn.integrations.torch import attention

with needs("transformers"):
    import torch
    from torch.utils._pytree import tree_map_only
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        prepare_padding_mask,
        sdpa_mask,
    )
    from transformers.utils.import_utils import is_tracing

__all__ = ["Visibility", "attend", "make_mask", "register"]

NAME = "fastattn"


def register() -> None:
    """Make ``attn_implementation="fastattn"`` known to transformers.

    Also for a model that is loaded already: ``model.set_attn_implementation("fastattn")``.

    Notes
    -----
    *Families.* What hands its attention to transformers' interface is served, with grouped heads,
    sliding windows, soft-capping, sinks and position biases, any cache and any padding: Llama,
    Mistral, Gemma, Qwen, gpt-oss, BERT, T5, BART, Whisper and most others. A family that computes
    its attention by itself, as BLOOM and XGLM do, is a ValueError at its first mask. Where such a
    family makes no mask either, the name changes nothing, and results are right.

    *Inference only.* Gradients, dropout, attention weights (``output_attentions``) and tensors on
    other devices are errors that name the way out.

    *Padding.* What stands at padded queries differs from transformers': they see nothing here and
    give 0. No real token ever sees them.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaModel
    >>> from fastattn.integrations.transformers import register
    >>> register()
    >>> config = LlamaConfig(
    ...     vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    ...     num_attention_heads=4, num_key_value_heads=2, attn_implementation="fastattn",
    ... )
    >>> model = LlamaModel(config).eval()
    >>> with torch.inference_mode():
    ...     model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 32])
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


# ---------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------


class Visibility(torch.Tensor):
    """A bool mask (batch, 1, seqlen_q, seqlen_kv) that is described, and stored when it is used.

    Query i sees key j if it is no padding and ``i + offset - left <= j <= i + offset + right``,
    None being no bound. Any operation of torch's on it works on the stored mask, and gives plain
    tensors. From the first one on the stored mask is what counts, since it may have been written
    to.

    Parameters
    ----------
    shape : (batch, 1, seqlen_q, seqlen_kv)
    window : (left, right)
    offset : int
        The position of query 0 among the keys.
    padding : Tensor of bool, (batch, 1, 1, seqlen_kv), optional
        False at keys that nobody sees.

    Examples
    --------
    >>> from fastattn.integrations.transformers import Visibility
    >>> mask = Visibility((1, 1, 2, 5), window=(1, 0), offset=3)
    >>> mask.int()
    tensor([[[[0, 0, 1, 1, 0],
              [0, 0, 0, 1, 1]]]], dtype=torch.int32)
    """

    window: Window
    offset: int
    padding: torch.Tensor | None
    _stored: torch.Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(
        cls,
        shape: tuple[int, int, int, int],
        *,
        window: Window,
        offset: int,
        padding: torch.Tensor | None = None,
    ) -> Visibility:
        """Describe a mask."""
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool)
        self.window, self.offset, self.padding = window, offset, padding
        self._stored = None
        return self

    def keywords(self) -> dict[str, Any]:
        """Return the mask as keywords of `attention`."""
        if self._stored is not None:
            return {"mask": self._stored}
        rows, columns = self.shape[-2:]
        # As a word it costs a third of the time of a window and an offset: that is every token.
        if self.window == (None, 0) and self.offset == columns - rows:
            return {"mask": self.padding, "causal": "bottom_right"}
        return {"mask": self.padding, "window": self.window, "query_offset": self.offset}

    def stored(self) -> torch.Tensor:
        """Return the mask as a plain tensor, the same at every call."""
        if self._stored is None:
            self._stored = self._as_described()
        return self._stored

    def _as_described(self) -> torch.Tensor:
        left, right = self.window
        rows, columns = self.shape[-2:]
        behind = torch.arange(rows)[:, None] + self.offset - torch.arange(columns)
        visible = torch.ones(self.shape, dtype=torch.bool)
        if left is not None:
            visible &= behind <= left
        if right is not None:
            visible &= -behind <= right
        return visible if self.padding is None else visible & self.padding

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Carry out an operation of torch's on the stored mask."""
        args, kwargs = tree_map_only(Visibility, Visibility.stored, (args, kwargs or {}))
        return function(*args, **kwargs)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **keywords: Any,
) -> torch.Tensor:
    """Return which keys are seen: described where that can be, stored where it cannot.

    The parameters are those of ``transformers.masking_utils.sdpa_mask``. It makes the masks that
    are stored: of functions without a name here, and of what is or will be compiled, since a
    description would be compiled anew for every position.
    """
    if config is not None:
        _check_family(config.__class__)
    window = _window(mask_function)
    is_causal = window is not None and window[1] == 0
    # transformers forbids to skip masks for one query where it means to compile the decoding step.
    decodes_compiled = is_causal and q_length == 1 and not allow_is_causal_skip
    if window is None or decodes_compiled or is_tracing(attention_mask):
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            **keywords | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
        )
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, None, None, kv_offset : kv_offset + kv_length]
        padding = None if padding.all() else padding
    return Visibility(
        (batch_size, 1, q_length, kv_length),
        window=window,
        offset=int(q_offset) - kv_offset,
        padding=padding,
    )


def _window(mask_function: Any) -> Window | None:
    """Return how far a function of transformers' lets a query see; None for one unknown here."""
    if getattr(mask_function, "__module__", None) != sdpa_mask.__module__:
        return None
    if mask_function is bidirectional_mask_function:
        return None, None
    if mask_function is causal_mask_function:
        return None, 0
    maker = mask_function.__qualname__.partition(".")[0]
    if maker not in ("and_masks", "sliding_window_overlay", "sliding_window_bidirectional_overlay"):
        return None
    held = getclosurevars(mask_function).nonlocals
    if maker == "sliding_window_overlay":
        return held["sliding_window"] - 1, None
    if maker == "sliding_window_bidirectional_overlay":
        return held["sliding_window"], held["sliding_window"]
    windows = [_window(each) for each in held["mask_functions"]]
    if None in windows:
        return None
    lefts, rights = zip(*windows, strict=True)
    return _nearest(lefts), _nearest(rights)


def _nearest(bounds: tuple[int | None, ...]) -> int | None:
    return min((bound for bound in bounds if bound is not None), default=None)


_served: set[Any] = set()


@torch.compiler.assume_constant_result  # or it would be compiled
def _check_family(config: Any) -> None:
    """Check that the models of a config hand their attention to transformers' interface.

    transformers does not: they would compute it by themselves, from a mask that is not what they
    expect.
    """
    if config in _served:
        return
    package = config.__module__.rpartition(".")[0]
    for name, module in list(sys.modules.items()):
        if not name.startswith(f"{package}.modeling_"):
            continue
        for model in vars(module).values():
            if PreTrainedModel not in getattr(model, "__bases__", ()):
                continue
            others = (model._supports_sdpa, model._supports_flash_attn, model._supports_flex_attn)
            if not model._can_set_attn_implementation() or not any(others):
                raise ValueError(
                    f"{model.__name__} must leave its attention to transformers' interface, and "
                    'computes it by itself: use attn_implementation="eager"'
                )
    _served.add(config)


# ---------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of one layer, (batch, seqlen_q, num_heads, head_dim_v), and no weights.

    Parameters
    ----------
    module : Module
        The layer; its `is_causal` counts where neither a mask nor the argument says it.
    query, key, value : Tensor, (batch, heads, length, features)
        Fewer kv heads than query heads are grouped.
    attention_mask : Tensor, optional
        What `make_mask` made, or a mask of the caller's: bool (True = attend) or float (added). It
        is complete: windows are in it, and the keyword `sliding_window` says nothing new.
    dropout : float
        Must be 0.
    scaling : float, optional
        None is ``1 / sqrt(head_dim)``.
    is_causal : bool, optional
        Whether no mask means a causal one.
    position_bias : Tensor, optional
        Added to the scores.
    softcap, s_aux
        `softcap` and `sinks` of `fastattn.attention`.
    """
    if dropout:
        raise ValueError(f"dropout must be 0, call model.eval(): got {dropout}")
    if keywords.get("output_attentions"):
        raise ValueError(
            "output_attentions must be off, weights are never stored: "
            'use attn_implementation="eager" to see them'
        )
    for name in ("indices", "block_indices"):
        if keywords.get(name) is not None:
            raise ValueError(f'{name} must be None: use attn_implementation="eager"')
    visible: dict[str, Any] = {"mask": attention_mask}
    if isinstance(attention_mask, Visibility):
        visible = attention_mask.keywords()
    elif attention_mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        visible = {"causal": "top_left" if is_causal else False}
    elif attention_mask.dtype is not torch.bool:
        visible = {}
        position_bias = attention_mask + (0 if position_bias is None else position_bias)
    output = attention(
        query,
        key,
        value,
        bias=position_bias,
        softcap=softcap,
        sinks=s_aux,
        scale=scaling,
        **visible,
    )
    return output.transpose(1, 2), None
