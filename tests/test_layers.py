"""The layer, against a textbook in more digits and as near to it as torch's own layer."""

import math
import pickle
import subprocess
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from checks import BFLOAT16, FLOAT_DTYPES, assert_same_bits, assert_within, rounding, to_float64
from safetensors.numpy import save_file

import fastattn
from fastattn import MultiHeadAttention

TORCH_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


# ---------------------------------------------------------------------------
# The truth, and torch's way to it
# ---------------------------------------------------------------------------


def textbook(layer, query, key=None, value=None, *, visible=True):
    """Return (output, weights) head by head, in the longest float there is."""
    key = query if key is None else key
    value = key if value is None else value
    query, key, value = (to_float64(x).astype(np.longdouble) for x in (query, key, value))

    def projected(x, letter):
        weight, bias = getattr(layer, f"w_{letter}"), getattr(layer, f"b_{letter}")
        return x @ to_float64(weight) + (0 if bias is None else to_float64(bias))

    q, k, v = projected(query, "q"), projected(key, "k"), projected(value, "v")
    size, group = layer.head_dim, layer.num_heads // layer.num_kv_heads
    contexts, all_weights = [], []
    for h in range(layer.num_heads):
        own = slice(h * size, (h + 1) * size)
        shared = slice(h // group * size, (h // group + 1) * size)
        scores = q[..., own] @ k[..., shared].swapaxes(-1, -2) / np.sqrt(np.longdouble(size))
        weights = np.where(visible, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        contexts.append(weights @ v[..., shared])
        all_weights.append(weights)
    return projected(np.concatenate(contexts, axis=-1), "o"), np.stack(all_weights, axis=-3)


def torch_layer(embed_dim, num_heads, dtype="float32", *, seed=0, **keywords):
    """Return a module of torch's with biases that are not 0."""
    torch.manual_seed(seed)
    module = torch.nn.MultiheadAttention(
        embed_dim, num_heads, batch_first=True, dtype=TORCH_DTYPES[str(dtype)], **keywords
    ).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return module


def written_out(module):
    """Return the weights of a module as `textbook` takes them, read by hand."""
    size = module.embed_dim
    state = {name: x.double().numpy() for name, x in module.state_dict().items()}
    weights = {"w_o": state["out_proj.weight"].T, "b_o": state.get("out_proj.bias")}
    for n, letter in enumerate("qkv"):
        rows = slice(n * size, (n + 1) * size)
        packed, biases = state.get("in_proj_weight"), state.get("in_proj_bias")
        own = state[f"{letter}_proj_weight"] if packed is None else packed[rows]
        weights |= {f"w_{letter}": own.T, f"b_{letter}": None if biases is None else biases[rows]}
    heads = module.num_heads
    return SimpleNamespace(**weights, num_heads=heads, num_kv_heads=heads, head_dim=size // heads)


def torch_call(module, *inputs, **keywords):
    """Return torch's (output, weights) as arrays in float64."""
    dtype = module.out_proj.weight.dtype
    tensors = [torch.from_numpy(to_float64(x)).to(dtype) for x in inputs]
    with torch.no_grad():
        output, weights = module(*tensors, average_attn_weights=False, **keywords)
    return output.double().numpy(), weights.double().numpy()


def assert_as_near(ours, theirs, truth):
    """Assert that the largest error is that of theirs, give or take, plus one rounding.

    A few hundred outputs make the largest error scatter by a factor of two, hence four times.
    """
    error_of_theirs = float(np.abs(theirs - truth).max(initial=0))
    one_rounding = rounding(ours.dtype) * float(np.abs(truth).max(initial=0))
    assert_within(ours, truth, ours.dtype, 4 * error_of_theirs + one_rounding)


def make_inputs(rng, *shapes, dtype="float32"):
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


# ---------------------------------------------------------------------------
# Equality with torch
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
class TestAgainstTorch:
    """For 16 bits our layer holds torch's weights in 16 bits too: sums are rounded as there."""

    def layers(self, *arguments, dtype, **keywords):
        module = torch_layer(*arguments, dtype, **keywords)
        layer = MultiHeadAttention.from_torch(module.state_dict(), module.num_heads)
        if layer.w_q.dtype != dtype:  # bfloat16
            weights = {name: x for name, x in vars(layer).items() if name[1] == "_"}
            weights = {name: None if x is None else x.astype(dtype) for name, x in weights.items()}
            layer = MultiHeadAttention.from_arrays(weights, module.num_heads)
        assert layer.w_q.dtype == layer.w_o.dtype == dtype
        return layer, module

    def check(self, layer, module, *inputs, visible=True, theirs=None, **keywords):
        output, weights = layer(*inputs, need_weights=True, **keywords)
        full = [inputs[0]] * 3 if len(inputs) == 1 else inputs
        full = [*full, full[-1]] if len(full) == 2 else full
        truths = textbook(written_out(module), *inputs, visible=visible)
        torchs = torch_call(module, *full, **(theirs or {}))
        for ours, their, truth in zip((output, weights), torchs, truths, strict=True):
            assert ours.dtype == layer.w_q.dtype
            assert_as_near(ours, their, truth)
        assert_same_bits(layer(*inputs, **keywords), output)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(("embed_dim", "num_heads"), [(24, 4), (6, 1), (5, 5), (36, 3)])
    def test_self_attention(self, embed_dim, num_heads, bias, dtype, rng):
        layers = self.layers(embed_dim, num_heads, dtype=dtype, bias=bias)
        assert (layers[0].b_o is None) == (not bias)
        self.check(*layers, *make_inputs(rng, (3, 7, embed_dim), dtype=dtype))

    def test_cross_attention(self, dtype, rng):
        inputs = make_inputs(rng, (2, 4, 24), (2, 9, 24), (2, 9, 24), dtype=dtype)
        self.check(*self.layers(24, 4, dtype=dtype), *inputs)

    def test_key_is_value(self, dtype, rng):
        inputs = make_inputs(rng, (2, 4, 24), (2, 9, 24), dtype=dtype)
        self.check(*self.layers(24, 4, dtype=dtype), *inputs)

    @pytest.mark.parametrize("bias", [True, False])
    def test_features_of_their_own(self, bias, dtype, rng):
        layers = self.layers(24, 4, dtype=dtype, kdim=10, vdim=7, bias=bias)
        inputs = make_inputs(rng, (2, 4, 24), (2, 9, 10), (2, 9, 7), dtype=dtype)
        self.check(*layers, *inputs)

    def test_key_mask(self, dtype, rng):
        mask = rng.random((3, 7)) < 0.6
        mask[:, 0] = True
        self.check(
            *self.layers(24, 4, dtype=dtype),
            *make_inputs(rng, (3, 7, 24), dtype=dtype),
            key_mask=mask,
            visible=mask[:, None, :],
            theirs={"key_padding_mask": torch.from_numpy(~mask)},
        )

    def test_causal(self, dtype, rng):
        causal = np.tri(7, dtype=bool)
        self.check(
            *self.layers(24, 4, dtype=dtype),
            *make_inputs(rng, (3, 7, 24), dtype=dtype),
            causal=True,
            visible=causal,
            theirs={"attn_mask": torch.from_numpy(~causal)},
        )

    def test_causal_with_key_mask(self, dtype, rng):
        mask, causal = np.ones((3, 7), bool), np.tri(7, dtype=bool)
        mask[0, 5:] = mask[1, 2:] = False
        self.check(
            *self.layers(24, 4, dtype=dtype),
            *make_inputs(rng, (3, 7, 24), dtype=dtype),
            causal=True,
            key_mask=mask,
            visible=causal & mask[:, None, :],
            theirs={
                "attn_mask": torch.from_numpy(~causal),
                "key_padding_mask": torch.from_numpy(~mask),
            },
        )

    def test_one_sequence(self, dtype, rng):
        """Two dimensions, as torch takes them unbatched."""
        mask = np.array([True] * 6 + [False])
        self.check(
            *self.layers(24, 4, dtype=dtype),
            *make_inputs(rng, (5, 24), (7, 24), dtype=dtype),
            key_mask=mask,
            visible=mask,
            theirs={"key_padding_mask": torch.from_numpy(~mask)},
        )


# ---------------------------------------------------------------------------
# What torch's layer has not
# ---------------------------------------------------------------------------


class TestCall:
    def test_grouped_heads_are_repeated_heads(self, rng):
        layer = MultiHeadAttention(24, 6, num_kv_heads=2, dtype=np.float64, rng=rng)
        assert (layer.w_k.shape, layer.b_v.shape) == ((24, 8), (8,))
        layer.b_k, layer.b_v = rng.standard_normal((2, 8))
        x = rng.standard_normal((2, 5, 24))

        def repeated(weights):
            heads = weights.reshape(*weights.shape[:-1], 2, 4)
            return np.repeat(heads, 3, axis=-2).reshape(*weights.shape[:-1], 24)

        arrays = {name: getattr(layer, name) for name in ("w_q", "w_o", "b_q", "b_o")}
        arrays |= {name: repeated(getattr(layer, name)) for name in ("w_k", "w_v", "b_k", "b_v")}
        full = MultiHeadAttention.from_arrays(arrays, 6)
        assert (full.num_kv_heads, full.w_k.shape) == (6, (24, 24))
        # The products have the same terms, which BLAS may take in another order.
        truth, _ = textbook(layer, x)
        assert_as_near(layer(x), full(x), truth)

    @pytest.mark.parametrize("causal", [False, True, "top_left", "bottom_right"])
    def test_words_for_causal(self, causal, rng):
        layer = MultiHeadAttention(8, 2, dtype=np.float64, rng=rng)
        query, key = rng.standard_normal((3, 8)), rng.standard_normal((5, 8))
        offset = {False: 5, True: 2, "bottom_right": 2, "top_left": 0}[causal]
        visible = np.tri(3, 5, offset, dtype=bool)
        _, weights = layer(query, key, causal=causal, need_weights=True)
        assert ((weights > 0) == visible).all()

    def test_batches_of_several_axes(self, rng):
        layer = MultiHeadAttention(8, 2, rng=rng)
        x = rng.standard_normal((2, 3, 5, 8), dtype=np.float32)
        mask = rng.random((2, 3, 5)) < 0.7
        output, weights = layer(x, key_mask=mask, need_weights=True)
        assert weights.shape == (2, 3, 2, 5, 5)
        flat = layer(x.reshape(6, 5, 8), key_mask=mask.reshape(6, 5))
        assert_same_bits(output, flat.reshape(2, 3, 5, 8))

    def test_batches_broadcast(self, rng):
        """One text that many queries read."""
        layer = MultiHeadAttention(8, 2, dtype=np.float64, rng=rng)
        query, text = rng.standard_normal((3, 4, 8)), rng.standard_normal((1, 6, 8))
        output = layer(query, text)
        assert output.shape == (3, 4, 8)
        truth, _ = textbook(layer, query, text)
        bound = 64 * rounding(output.dtype) * np.abs(truth).max()  # sums of 8, 6 and 8 terms
        assert_within(output, truth, np.float64, float(bound))

    def test_queries_that_see_nothing_give_the_bias(self, rng):
        layer = MultiHeadAttention(8, 2, rng=rng)
        layer.b_o = rng.standard_normal(8).astype(np.float32)
        x = rng.standard_normal((2, 5, 8), dtype=np.float32)
        output, weights = layer(x, key_mask=np.zeros((2, 5), bool), need_weights=True)
        assert_same_bits(output, np.broadcast_to(layer.b_o, (2, 5, 8)))
        assert not weights.any()

    @pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (0, 8)])
    def test_empty(self, shape):
        output, weights = MultiHeadAttention(8, 2)(np.zeros(shape, "f4"), need_weights=True)
        assert output.shape == shape
        assert weights.shape == (*shape[:-2], 2, shape[-2], shape[-2])

    @pytest.mark.parametrize(
        ("weights", "inputs", "result"),
        [
            ("float32", "float64", "float64"),
            ("float64", "float32", "float64"),
            ("float16", "float32", "float32"),
            ("float32", "int64", "float64"),
        ],
    )
    def test_result_type(self, weights, inputs, result):
        layer = MultiHeadAttention(8, 2, dtype=weights)
        assert layer(np.ones((3, 8), inputs)).dtype == result

    def test_nested_lists_and_tensors(self, rng):
        layer = MultiHeadAttention(4, 2, dtype=np.float64, rng=rng)
        x = rng.standard_normal((3, 4))
        assert_same_bits(layer(x.tolist()), layer(x))
        assert_same_bits(layer(torch.from_numpy(x)), layer(x))

    def test_nothing_is_written(self, rng):
        layer = MultiHeadAttention(8, 2, rng=rng)
        x = rng.standard_normal((2, 5, 8), dtype=np.float32)
        before = pickle.dumps((vars(layer), x))
        layer(x, causal=True, need_weights=True)
        assert pickle.dumps((vars(layer), x)) == before


class TestDrawing:
    def test_a_seed_gives_the_same_weights(self):
        first, second = (MultiHeadAttention(8, 2, rng=5) for _ in range(2))
        assert_same_bits(first.w_k, second.w_k)
        assert not np.array_equal(first.w_k, first.w_q)
        assert not np.array_equal(MultiHeadAttention(8, 2).w_k, MultiHeadAttention(8, 2).w_k)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_shapes_dtype_and_spread(self, dtype):
        layer = MultiHeadAttention(64, 8, num_kv_heads=2, kdim=30, vdim=50, dtype=dtype, rng=0)
        shapes = {"w_q": (64, 64), "w_k": (30, 16), "w_v": (50, 16), "w_o": (64, 64)}
        for name, shape in shapes.items():
            weight, bias = getattr(layer, name), getattr(layer, f"b_{name[2]}")
            assert (weight.dtype, weight.shape) == (dtype, shape)
            assert (bias.dtype, bias.shape) == (dtype, shape[1:])
            assert not bias.any()
            bound = math.sqrt(6 / sum(shape))
            largest = np.abs(to_float64(weight)).max()
            assert 0.95 * bound < largest <= bound * (1 + rounding(dtype))

    def test_without_bias(self):
        layer = MultiHeadAttention(8, 2, bias=False)
        assert layer.b_q is layer.b_k is layer.b_v is layer.b_o is None


# ---------------------------------------------------------------------------
# Caches
# ---------------------------------------------------------------------------


class LongerEachTime:
    """The least that a cache must do, kept in the plainest way."""

    def __init__(self, batch, num_kv_heads, head_dim):
        self.key = self.value = np.zeros((batch, num_kv_heads, 0, head_dim))

    def __len__(self):
        return self.key.shape[2]

    def append(self, key, value):
        assert key.shape == (*self.key.shape[:2], key.shape[2], self.key.shape[3]) == value.shape
        self.key = np.concatenate([self.key, key], axis=2)
        self.value = np.concatenate([self.value, value], axis=2)

    def attend(self, query, **keywords):
        return fastattn.attention(query, self.key, self.value, **keywords)


class TestCache:
    @pytest.mark.parametrize("steps", [[6], [4, 1, 1], [1] * 6])
    def test_in_parts_equals_at_once(self, steps, rng):
        layer = MultiHeadAttention(24, 6, num_kv_heads=2, dtype=np.float64, rng=rng)
        x = rng.standard_normal((2, 6, 24))
        cache = LongerEachTime(2, 2, 4)
        parts = [
            layer(part, causal=True, cache=cache)
            for part in np.split(x, np.cumsum(steps)[:-1], axis=1)
        ]
        assert len(cache) == 6
        truth, _ = textbook(layer, x, visible=np.tri(6, dtype=bool))
        assert_as_near(np.concatenate(parts, axis=1), layer(x, causal=True), truth)

    def test_one_sequence(self, rng):
        layer = MultiHeadAttention(8, 2, dtype=np.float64, rng=rng)
        x = rng.standard_normal((5, 8))
        cache = LongerEachTime(1, 2, 4)
        layer(x[:4], cache=cache)
        last = layer(x[4:], cache=cache)
        assert last.shape == (1, 8)
        truth, _ = textbook(layer, x)
        assert_as_near(last, layer(x)[4:], truth[4:])

    def test_key_mask_counts_all_keys(self, rng):
        layer = MultiHeadAttention(8, 2, dtype=np.float64, rng=rng)
        x = rng.standard_normal((2, 5, 8))
        mask = rng.random((2, 5)) < 0.6
        mask[:, -1] = True
        cache = LongerEachTime(2, 2, 4)
        layer(x[:, :4], cache=cache)
        last = layer(x[:, 4:], cache=cache, key_mask=mask)
        truth, _ = textbook(layer, x, visible=mask[:, None])
        assert_as_near(last, layer(x, key_mask=mask)[:, 4:], truth[:, 4:])

    @pytest.mark.parametrize(
        "wrong",
        [
            {"need_weights": True},
            {"key_mask": [1, 0]},
            {"key": np.zeros((2, 3, 9))},
            {"value": np.zeros((2, 3, 8))},
        ],
        ids=str,
    )
    def test_an_error_appends_nothing(self, wrong):
        layer, cache = MultiHeadAttention(8, 2), LongerEachTime(2, 2, 4)
        with pytest.raises((TypeError, ValueError)):
            layer(np.zeros((2, 3, 8)), cache=cache, **wrong)
        assert len(cache) == 0


# ---------------------------------------------------------------------------
# Layers with given weights
# ---------------------------------------------------------------------------


def weights_of(layer):
    names = ("w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o")
    return {name: getattr(layer, name) for name in names}


def assert_same_weights(ours, expected):
    for name, x in weights_of(expected).items():
        if x is None:
            assert getattr(ours, name) is None
        else:
            assert_same_bits(getattr(ours, name), x)


class TestFromArrays:
    @pytest.mark.parametrize("bias", [True, False])
    def test_npz(self, bias, tmp_path):
        layer = MultiHeadAttention(24, 6, num_kv_heads=3, kdim=7, vdim=9, bias=bias)
        path = tmp_path / "layer.npz"
        np.savez(path, **{name: x for name, x in weights_of(layer).items() if x is not None})
        with np.load(path) as arrays:
            loaded = MultiHeadAttention.from_arrays(arrays, 6)
        assert_same_weights(loaded, layer)
        sizes = ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "kdim", "vdim")
        assert [getattr(loaded, name) for name in sizes] == [24, 6, 3, 4, 7, 9]

    def test_copies(self):
        arrays = {name: np.eye(4) for name in ("w_q", "w_k", "w_v", "w_o")}
        layer = MultiHeadAttention.from_arrays(arrays, 2)
        assert not any(np.shares_memory(getattr(layer, name), x) for name, x in arrays.items())

    def test_one_dtype(self):
        arrays = dict.fromkeys(["w_q", "w_k", "w_v"], np.eye(4, dtype=np.float32))
        layer = MultiHeadAttention.from_arrays(arrays | {"w_o": np.eye(4)}, 2)
        assert layer.w_q.dtype == layer.w_o.dtype == np.float64


class TestFromTorch:
    def test_arrays_tensors_and_parameters(self):
        module = torch_layer(8, 2)
        expected = MultiHeadAttention.from_torch(module.state_dict(), 2)
        arrays = {name: x.numpy() for name, x in module.state_dict().items()}
        for state in (arrays, dict(module.named_parameters())):
            assert_same_weights(MultiHeadAttention.from_torch(state, 2), expected)
        with torch.no_grad():
            module.in_proj_weight.zero_()
        assert expected.w_q.any(), "the layer shares memory with the module"

    def test_prefix(self):
        encoder = torch.nn.TransformerEncoderLayer(8, 2, dim_feedforward=4)
        ours = MultiHeadAttention.from_torch(encoder.state_dict(), 2, prefix="self_attn.")
        expected = MultiHeadAttention.from_torch(encoder.self_attn.state_dict(), 2)
        assert_same_weights(ours, expected)

    def test_bfloat16_becomes_float32(self):
        module = torch_layer(8, 2, "bfloat16")
        layer = MultiHeadAttention.from_torch(module.state_dict(), 2)
        assert layer.w_q.dtype == np.float32
        assert torch.equal(torch.from_numpy(layer.w_o.T), module.out_proj.weight.float())

    def test_torch_is_not_imported(self):
        code = """
import sys, numpy as np
from fastattn import MultiHeadAttention
state = {"in_proj_weight": np.ones((12, 4)), "out_proj.weight": np.eye(4)}
MultiHeadAttention.from_torch(state, 2)
assert "torch" not in sys.modules
"""
        subprocess.run([sys.executable, "-c", code], check=True)


class TestFromSafetensors:
    @pytest.fixture
    def state(self):
        return {name: x.numpy() for name, x in torch_layer(8, 2).state_dict().items()}

    @pytest.mark.parametrize("as_type", [str, lambda path: path])
    def test_file(self, as_type, state, tmp_path):
        path = tmp_path / "layer.safetensors"
        save_file(state, path)
        ours = MultiHeadAttention.from_safetensors(as_type(path), 2)
        assert_same_weights(ours, MultiHeadAttention.from_torch(state, 2))

    def test_prefix(self, state, tmp_path):
        path = tmp_path / "model.safetensors"
        tensors = {f"layers.0.self_attn.{name}": x for name, x in state.items()}
        save_file(tensors | {"embeddings": np.zeros((3, 8), "f4")}, path)
        ours = MultiHeadAttention.from_safetensors(path, 2, prefix="layers.0.self_attn.")
        assert_same_weights(ours, MultiHeadAttention.from_torch(state, 2))

    def test_bfloat16(self, state, tmp_path):
        path = tmp_path / "layer.safetensors"
        state = {name: x.astype(ml_dtypes.bfloat16) for name, x in state.items()}
        save_file(state, path)
        layer = MultiHeadAttention.from_safetensors(path, 2)
        assert layer.w_q.dtype == BFLOAT16
        assert_same_weights(layer, MultiHeadAttention.from_torch(state, 2))

    def test_without_the_package(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(ImportError, match=r"pip install 'fastattn\[safetensors\]'$"):
            MultiHeadAttention.from_safetensors(tmp_path / "layer.safetensors", 2)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            MultiHeadAttention.from_safetensors(tmp_path / "none.safetensors", 2)

    def test_another_file(self, tmp_path):
        path = tmp_path / "layer.safetensors"
        path.write_bytes(b"PK\3\4 no safetensors file")
        with pytest.raises(ValueError, match=r"^path must be that of a safetensors file: .*layer"):
            MultiHeadAttention.from_safetensors(path, 2)

    def test_another_prefix(self, state, tmp_path):
        path = tmp_path / "layer.safetensors"
        save_file(state, path)
        with pytest.raises(ValueError, match=r"after the prefix 'encoder\.': got nothing$"):
            MultiHeadAttention.from_safetensors(path, 2, prefix="encoder.")


# ---------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------

EYES = dict.fromkeys(["w_q", "w_k", "w_v", "w_o"], np.eye(8))
STATE = {"in_proj_weight": np.ones((24, 8)), "out_proj.weight": np.eye(8)}
X = np.zeros((2, 3, 8))


def make(**keywords):
    return MultiHeadAttention(**{"embed_dim": 8, "num_heads": 4} | keywords)


def from_arrays(num_heads=4, **arrays):
    return MultiHeadAttention.from_arrays(EYES | arrays, num_heads)


def from_torch(num_heads=4, without=(), **arrays):
    state = {name: x for name, x in STATE.items() if name not in without}
    return MultiHeadAttention.from_torch(state | arrays, num_heads)


def call(**keywords):
    return MultiHeadAttention(8, 4, kdim=6, vdim=5)(
        **{"query": X, "key": np.zeros((2, 7, 6)), "value": np.zeros((2, 7, 5))} | keywords
    )


ERRORS = [
    *(
        (make, {name: value}, error, rf"^{name} must be {rest}")
        for name in ("embed_dim", "num_heads", "num_kv_heads", "kdim", "vdim")
        for value, error, rest in (
            (0, ValueError, "at least 1: got 0$"), (2.0, TypeError, r"an int: got 2\.0"),
        )
    ),
    (make, {"num_heads": 3}, ValueError, r"^num_heads must divide embed_dim: got 3 and 8$"),
    (make, {"num_heads": 16}, ValueError, r"^num_heads must divide embed_dim: got 16 and 8$"),
    (make, {"num_kv_heads": 3}, ValueError, r"^num_kv_heads must divide num_heads: got 3 and 4$"),
    (make, {"num_kv_heads": 8}, ValueError, r"^num_kv_heads must divide num_heads: got 8 and 4$"),
    (make, {"dtype": "int8"}, TypeError, r"^dtype must be one of float16, .*: got 'int8'$"),

    (from_arrays, {"w_k": None}, ValueError, r"^arrays must hold w_q, w_k, w_v and w_o: lacks w_k"),
    (from_arrays, {"w_x": np.eye(8)}, ValueError, r"^arrays must hold only b_k, .*w_v: got w_x$"),
    (from_arrays, {"w_v": np.ones(8)}, ValueError, r"^w_v must have 2 dimensions: got .*\(8,\)$"),
    (from_arrays, {"w_q": np.ones((8, 6))}, ValueError,
     r"^w_q must have shape \(8, 8\): got \(8, 6\)$"),
    (from_arrays, {"w_k": np.ones((8, 3))}, ValueError,
     r"^w_k must have shape \(8, 2\): got \(8, 3\)$"),
    (from_arrays, {"w_k": np.ones((8, 4))}, ValueError,
     r"^w_v must have shape \(8, 4\): got \(8, 8\)$"),
    (from_arrays, {"w_k": np.ones((8, 6)), "w_v": np.ones((8, 6))}, ValueError,
     r"^num_kv_heads must divide num_heads: got 3 and 4$"),
    (from_arrays, {"b_o": np.ones((1, 8))}, ValueError,
     r"^b_o must have shape \(8,\): got \(1, 8\)$"),
    (from_arrays, {"w_q": np.eye(8) * 1j}, TypeError, r"^w_q must be float16.*: got complex128$"),
    (from_arrays, {"num_heads": 3}, ValueError, r"^num_heads must divide embed_dim: got 3 and 8$"),
    (from_arrays, {"num_heads": 9}, ValueError, r"^num_heads must divide embed_dim: got 9 and 8$"),
    (from_arrays, {"num_heads": "4"}, TypeError, r"^num_heads must be an int: got '4'"),
    (from_arrays, {"w_q": np.eye(8, dtype="f2"), "w_k": np.eye(8, dtype=ml_dtypes.bfloat16)},
     TypeError, r"^w_q, w_k, w_v, w_o must have a common dtype"),

    (from_torch, {"without": ["out_proj.weight"]}, ValueError,
     r"^state_dict must hold out_proj\.weight and either .*: got in_proj_weight$"),
    (from_torch, {"without": ["in_proj_weight"], "q_proj_weight": np.eye(8)}, ValueError,
     r"^state_dict must hold out_proj\.weight and .*: got out_proj\.weight, q_proj_weight$"),
    (from_torch, {"bias_k": np.ones((1, 1, 8))}, ValueError,
     r"^state_dict must hold only in_proj_bias, .* after the prefix '': got bias_k$"),
    (from_torch, {"in_proj_weight": np.ones((25, 8))}, ValueError,
     r"^in_proj_weight must have 3 \* embed_dim rows: got shape \(25, 8\)$"),
    (from_torch, {"in_proj_bias": np.float32(1)}, ValueError,
     r"^in_proj_bias must have 3 \* embed_dim rows: got shape \(\)$"),
    (from_torch, {"out_proj.weight": np.ones((8, 6))}, ValueError,
     r"^w_o must have shape \(8, 8\): got \(6, 8\)$"),
    (from_torch, {"num_heads": 5}, ValueError, r"^num_heads must divide embed_dim: got 5 and 8$"),

    *(
        (call, {name: np.zeros(shape)}, ValueError,
         rf"^{name} must have shape \(\.\.\., length, {features}\): got shape ")
        for name, features in (("query", 8), ("key", 6), ("value", 5))
        for shape in ((8,), (2, 3, 9), ())
    ),
    (call, {"key": None, "value": None}, ValueError, r"^key must have shape .* 6\): got .*8\)$"),
    (call, {"value": None}, ValueError, r"^value must have shape \(\.\.\., length, 5\): got .*6\)"),
    (call, {"key": None}, ValueError, r"^value must come with a key: got key=None$"),
    (call, {"query": X[0]}, ValueError, r"^query, key and value must have equally many dimensions"),
    (call, {"value": np.zeros((2, 6, 5))}, ValueError,
     r"^value must have the shape of key, features apart: got \(2, 6, 5\) and \(2, 7, 6\)$"),
    (call, {"query": np.zeros((3, 3, 8))}, ValueError,
     r"^the batch axes of query, key and value must broadcast: got \(3,\), \(2,\) and \(2,\)$"),
    (call, {"query": X.astype(complex)}, TypeError, r"^query must be float16.*: got complex128$"),
    (call, {"key_mask": np.ones((2, 7))}, TypeError,
     r"^key_mask must be bool \(True = attend\): got float64$"),
    *(
        (call, {"key_mask": np.ones(shape, bool)}, ValueError,
         r"^key_mask must have shape key\.shape\[:-1\] = \(2, 7\): got ")
        for shape in ((), (7,), (2, 3), (2, 1, 7))
    ),
    (call, {"causal": "diagonal"}, ValueError, r"^causal must be a bool, .*: got 'diagonal'$"),
    (call, {"causal": 1}, TypeError, r"^causal must be a bool, .*: got 1 of type int$"),
    (call, {"cache": LongerEachTime(2, 4, 2), "need_weights": True}, ValueError,
     r"^need_weights must be False with a cache"),
    (call, {"cache": LongerEachTime(2, 4, 2), "key_mask": np.array(True)}, ValueError,
     r"^key_mask must have shape \(\.\.\., seqlen_kv\): got \(\)$"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "keywords", "error", "message"), ERRORS)
def test_error(function, keywords, error, message):
    with pytest.raises(error, match=message):
        function(**keywords)


@pytest.mark.parametrize("function", [make, from_arrays, from_torch, call])
def test_arguments_that_the_table_starts_from_are_valid(function):
    function()
