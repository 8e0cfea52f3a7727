"""scaled_dot_product_attention on the inputs that torch tests its own with."""

import functools

import ml_dtypes
import numpy as np
import pytest
import torch
from checks import assert_within, exact, largest_error, rounding
from torch.testing._internal.common_methods_invocations import (
    sample_inputs_scaled_dot_product_attention,
)

from fastattn import reference, scaled_dot_product_attention

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Three shapes, causal or not, without dropout and with half, each of these twice; one with a mask.
COUNT, WITHOUT_DROPOUT = 25, 13


@functools.cache
def samples_of(dtype):
    torch.manual_seed(0)
    return list(sample_inputs_scaled_dot_product_attention(None, "cpu", dtype, False))


def as_numpy(x):
    """Return a tensor's memory as an array; NumPy's dtypes have no bfloat16 that torch knows."""
    if not isinstance(x, torch.Tensor):
        return x
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def arguments(sample):
    """Return the positional and keyword arguments of a sample, as arrays."""
    return [as_numpy(x) for x in (sample.input, *sample.args)], {
        name: as_numpy(x) for name, x in sample.kwargs.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_none_is_lost(dtype):
    dropouts = [sample.kwargs["dropout_p"] for sample in samples_of(dtype)]
    assert len(dropouts) == COUNT
    assert dropouts.count(0.0) == WITHOUT_DROPOUT
    assert any("attn_mask" in sample.kwargs for sample in samples_of(dtype))


@pytest.mark.parametrize("n", range(COUNT))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample(dtype, n):
    """As near the truth as torch is: a few times its error, plus one rounding of the largest."""
    sample = samples_of(dtype)[n]
    arrays, keywords = arguments(sample)
    if keywords["dropout_p"] != 0:
        with pytest.raises(ValueError, match=r"^dropout_p must be 0, .* inference: got 0\.5$"):
            scaled_dot_product_attention(*arrays, **keywords)
        return
    ours = scaled_dot_product_attention(*arrays, **keywords)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        sample.input, *sample.args, **sample.kwargs
    )
    truth = exact(reference.scaled_dot_product_attention, *arrays, **keywords)
    one_rounding = rounding(arrays[0].dtype) * np.abs(truth).max()
    bound = 4 * largest_error(as_numpy(theirs), truth) + one_rounding
    assert_within(ours, truth, arrays[0].dtype, bound)
