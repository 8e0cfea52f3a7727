"""Arrays of other libraries: read where they lie, or refused in words that name the argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checks import BFLOAT16, FLOAT_DTYPES, assert_same_bits, make_inputs

import fastattn
from fastattn.formats import as_array


class Exporter:
    """An array of which DLPack is all that is known."""

    def __init__(self, x, device=None):
        self.x, self.device = x, device

    def __dlpack__(self, **options):
        if self.device is not None:
            raise BufferError("memory on a device cannot be exported to the CPU")
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device or self.x.__dlpack_device__()


class Descriptor:
    """An array of which __array__ is all that is known."""

    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.x, dtype, copy=copy)


KINDS = {
    "torch": torch.from_numpy,
    "dlpack": Exporter,
    "array": Descriptor,
    "memoryview": memoryview,
    "jax": jnp.asarray,
}


@pytest.mark.parametrize("kind", KINDS)
class TestKinds:
    @pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=str)
    def test_every_argument(self, kind, dtype, rng):
        foreign = KINDS[kind]
        query, key, value = make_inputs(rng, dtype=dtype)
        others = {
            "mask": rng.random((5, 7)) < 0.8,
            "bias": rng.standard_normal((5, 7), dtype=np.float32),
            "kv_lengths": np.array([4, 7], np.int32),
            "sinks": np.array([0.1, 0.2, 0.3], np.float32),
        }
        output = fastattn.attention(
            *map(foreign, (query, key, value)), **{name: foreign(x) for name, x in others.items()}
        )
        assert_same_bits(output, fastattn.attention(query, key, value, **others))

    def test_is_read_in_place(self, kind, rng):
        x = rng.standard_normal((2, 3, 4))[:, ::2].astype(np.float32)
        foreign = KINDS[kind](x)
        place = x.ctypes.data
        if kind == "jax":  # which copied it
            place = foreign.unsafe_buffer_pointer()
        assert as_array("x", foreign).ctypes.data == place

    def test_in_the_other_functions(self, kind, rng):
        query, key, value = make_inputs(rng)
        foreign = [KINDS[kind](x) for x in (query, key, value)]
        assert_same_bits(
            fastattn.scaled_dot_product_attention(*foreign),
            fastattn.scaled_dot_product_attention(query, key, value),
        )
        assert_same_bits(
            fastattn.attention_weights(*foreign[:2]), fastattn.attention_weights(query, key)
        )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_jax_in_every_dtype(dtype, rng):
    inputs = make_inputs(rng, dtype=dtype)
    with jax.enable_x64(True):
        output = fastattn.attention(*map(jnp.asarray, inputs))
    assert_same_bits(output, fastattn.attention(*inputs))


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        (torch.ones(2, 3, 5, 8, dtype=torch.bfloat16), "Tensor.*BFloat16"),
        (torch.ones(2, 3, 5, 8, requires_grad=True), r"Tensor.*detach\(\)"),
        (torch.ones(2, 3, 5, 8, device="meta"), "Tensor.*meta"),
        (Exporter(np.ones((2, 3, 5, 8)), device=(2, 0)), "Exporter.*"),
        (Exporter(np.ones((2, 3, 5, 8), BFLOAT16)), "Exporter.*"),
    ],
    ids=["bfloat16 of torch", "gradients", "meta", "device", "bfloat16 of DLPack"],
)
@pytest.mark.parametrize("argument", ["query", "value", "bias"])
def test_what_numpy_cannot_read(argument, foreign, message):
    arguments = dict.fromkeys(("query", "key", "value"), np.ones((2, 3, 5, 8)))
    with pytest.raises(TypeError, match=rf"^{argument} must be readable by NumPy: got {message}"):
        fastattn.attention(**arguments | {argument: foreign})
