"""fastattn inside JAX's transformations: the same bits as for NumPy, under jit and vmap."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import BFLOAT16, assert_same_bits, make_inputs

import fastattn
from fastattn.integrations.jax import attention

jax.config.update("jax_platforms", "cpu")


@pytest.fixture(params=[False, True], ids=["plain", "jit"])
def call(request):
    """Return attention, and attention compiled, with what is no array fixed."""

    def compiled(*arrays, **options):
        fixed = {name: x for name, x in options.items() if not isinstance(x, np.ndarray)}
        traced = {name: x for name, x in options.items() if isinstance(x, np.ndarray)}
        return jax.jit(partial(attention, **fixed))(*arrays, **traced)

    return compiled if request.param else attention


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=str)
def test_same_bits_as_for_numpy(dtype, call, rng):
    inputs = make_inputs(rng, heads=4, kv_heads=2, dtype=dtype)
    output = call(*inputs, causal=True)
    assert isinstance(output, jax.Array)
    assert_same_bits(np.asarray(output), fastattn.attention(*inputs, causal=True))


def test_float64(call, rng):
    inputs = make_inputs(rng, dtype=np.float64)
    with jax.enable_x64(True):
        assert_same_bits(np.asarray(call(*inputs)), fastattn.attention(*inputs))


def test_integers_are_jaxs_default_float(call):
    x = np.arange(12).reshape(3, 4) % 3
    expected = fastattn.attention(*[x.astype(np.float32)] * 3)
    assert_same_bits(np.asarray(call(x, x, x)), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": "top_left", "scale": 0.1},
        {"causal": True, "window": (2, None), "query_offset": 3},
        {"query_offset": np.array([1, 2]), "causal": True, "kv_lengths": np.array([3, 7])},
        {"softcap": 0.5, "kv_lengths": 4},
        {"alibi_slopes": np.array([0.5, 0.25, 0.1, 0.0], np.float32)},
        {"sinks": np.array([0.5, -1.0, 0.1, 0.0], np.float32)},
        {"mask": np.eye(5, 7, dtype=bool), "bias": np.ones((4, 1, 7), np.float16)},
    ],
    ids=lambda options: " ".join(options),
)
def test_keywords(options, call, rng):
    inputs = make_inputs(rng, heads=4, kv_heads=2)
    output = call(*inputs, **options)
    assert_same_bits(np.asarray(output), fastattn.attention(*inputs, **options))


@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 8), (7, 8), (7, 6)),
        ((4, 5, 8), (7, 8), (7, 6)),
        ((3, 1, 4, 5, 8), (2, 4, 7, 8), (4, 7, 6)),
        ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 6)),
        ((0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 6)),
    ],
    ids=str,
)
def test_shapes(shapes, call, rng):
    inputs = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    assert_same_bits(np.asarray(call(*inputs)), fastattn.attention(*inputs))


class TestVmap:
    """One call for all of what is mapped over, and the bits of one call for each."""

    @pytest.mark.parametrize("mapped", ["query", "key", "value", "query key value"])
    @pytest.mark.parametrize("batch", [(), (2,)], ids=["heads", "batch"])
    def test_arrays(self, batch, mapped, rng):
        inputs = dict(zip(("query", "key", "value"), make_inputs(rng, batch=batch), strict=True))
        stacks = {name: np.stack([inputs[name], inputs[name] + 1]) for name in mapped.split()}
        output = jax.vmap(lambda stacks: attention(**inputs | stacks))(stacks)
        each = [
            fastattn.attention(**inputs | {name: x[n] for name, x in stacks.items()})
            for n in range(2)
        ]
        assert_same_bits(np.asarray(output), np.stack(each))

    def test_one_head_each(self, rng):
        query, key, value = make_inputs(rng, batch=(), heads=3)
        output = jax.vmap(attention)(query, key, value)
        assert_same_bits(np.asarray(output), fastattn.attention(query, key, value))

    @pytest.mark.parametrize(
        ("name", "stack"),
        [
            ("mask", np.stack([np.eye(5, 7, dtype=bool), np.ones((5, 7), bool)])),
            ("bias", np.arange(14, dtype=np.float32).reshape(2, 7)),
            ("kv_lengths", np.array([3, 5])),
            ("query_offset", np.array([0, 2])),
            ("alibi_slopes", np.array([[0.1, 0.2, 0.3], [0.0, 0.5, 1.0]], np.float32)),
        ],
    )
    @pytest.mark.parametrize("batch", [(), (2,)], ids=["heads", "batch"])
    def test_other_arguments(self, batch, name, stack, rng):
        inputs = make_inputs(rng, batch=batch)
        causal = name == "query_offset"
        output = jax.jit(jax.vmap(lambda each: attention(*inputs, causal=causal, **{name: each})))(
            stack
        )
        expected = [fastattn.attention(*inputs, causal=causal, **{name: each}) for each in stack]
        assert_same_bits(np.asarray(output), np.stack(expected))

    def test_twice(self, rng):
        query, key, value = make_inputs(rng, batch=(2, 4))
        output = jax.vmap(jax.vmap(attention, in_axes=(0, None, 0)), in_axes=(0, 0, None))(
            query, key[:, 0], value[0]
        )
        expected = fastattn.attention(query, key[:, :1], value[:1])
        assert_same_bits(np.asarray(output), expected)

    def test_sinks_that_are_not_mapped_over(self, rng):
        query, key, value = make_inputs(rng)
        sinks = np.array([0.1, 0.2, 0.3], np.float32)
        output = jax.vmap(lambda *x: attention(*x, sinks=sinks))(query, key, value)
        assert_same_bits(np.asarray(output), fastattn.attention(query, key, value, sinks=sinks))

    def test_sinks_that_are(self, rng):
        query, key, value = make_inputs(rng)
        with pytest.raises(jax.errors.JaxRuntimeError, match="sinks must not be mapped over"):
            jax.vmap(lambda x: attention(query, key, value, sinks=x))(np.ones((2, 3), np.float32))


def test_large_arrays_many_times(rng):
    """Callbacks that wait for the thread that waits for them would stop here."""
    query, _, value = make_inputs(rng, batch=(1,), heads=4, seqlen_q=700, seqlen_kv=700)

    @jax.jit
    def three_layers(x):
        for _ in range(3):
            x = attention(x, x @ jnp.eye(20), value) + x
        return x

    outputs = [three_layers(query + n) for n in range(20)]
    assert all(bool(jnp.isfinite(each).all()) for each in outputs)


class TestErrors:
    @pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.vmap], ids=["", "jit", "vmap"])
    def test_shapes_while_tracing(self, transform, rng):
        query, key, value = make_inputs(rng)
        with pytest.raises(ValueError, match=r"key.shape\[-1\] must equal query.shape\[-1\]"):
            transform(attention)(query, key[..., :3], value)

    def test_dtypes(self, rng):
        query, key, value = make_inputs(rng)
        with pytest.raises(TypeError, match="complex64"):
            attention(query * 1j, key, value)

    def test_gradients_name_the_way_out(self, rng):
        query, key, value = make_inputs(rng)
        with pytest.raises(TypeError, match=r"jax\.nn\.dot_product_attention"):
            jax.grad(lambda q: attention(q, key, value).sum())(query)

    def test_values_when_they_are_known(self, call, rng):
        with pytest.raises(jax.errors.JaxRuntimeError, match="kv_lengths must lie between 0 and 7"):
            call(*make_inputs(rng), kv_lengths=np.array([8, 1])).block_until_ready()
