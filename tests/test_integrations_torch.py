"""fastattn under torch: the same bits as for NumPy, torch's meaning, and torch for the rest."""

import shutil
import subprocess
import sys
import textwrap
import threading
import warnings

import numpy as np
import pytest
import torch
from checks import BFLOAT16, FLOAT_DTYPES, assert_accurate, assert_same_bits, make_inputs
from torch.nn import functional

import fastattn
from fastattn.integrations import torch as integration
from fastattn.integrations.torch import attention, scaled_dot_product_attention, use_fastattn

OPERATOR = torch.ops.fastattn.attention.default
TORCHS_OWN = functional.scaled_dot_product_attention
COMPILED = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler"),
)


def to_torch(x):
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def to_numpy(x):
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(BFLOAT16)
    return x.numpy()


def make_tensors(rng, **options):
    return tuple(map(to_torch, make_inputs(rng, **options)))


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    """Let every test be the first that is warned."""
    monkeypatch.setattr(integration, "_warned", set())


class TestValues:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_accurate(self, is_causal, dtype, rng):
        inputs = make_inputs(rng, seqlen_q=7, dtype=dtype)
        output = scaled_dot_product_attention(*map(to_torch, inputs), is_causal=is_causal)
        assert_accurate(to_numpy(output), *inputs, causal=is_causal)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize(
        "options",
        [
            {"attn_mask": np.arange(35).reshape(5, 7) % 3 > 0},
            {"attn_mask": np.arange(35, dtype=np.float32).reshape(1, 5, 7)},
            {"is_causal": True, "scale": -0.3},
            {"is_causal": True, "attn_mask": np.arange(7) % 2 == 0},
            {"enable_gqa": True},
        ],
        ids=["mask", "bias", "scale", "mask and causal", "groups"],
    )
    def test_same_bits_as_for_numpy(self, options, dtype, rng):
        kv_heads = 2 if "enable_gqa" in options else None
        inputs = make_inputs(rng, heads=4, kv_heads=kv_heads, dtype=dtype)
        expected = fastattn.scaled_dot_product_attention(*inputs, **options)
        tensors = {
            name: to_torch(x) if isinstance(x, np.ndarray) else x for name, x in options.items()
        }
        output = scaled_dot_product_attention(*map(to_torch, inputs), **tensors)
        assert_same_bits(to_numpy(output), expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"causal": True},
            {"causal": "top_left", "scale": 0.1},
            {"causal": True, "window": (2, None), "query_offset": 3},
            {"window": (1, 1)},
            {"query_offset": np.array([1, 2]), "causal": True, "kv_lengths": np.array([3, 7])},
            {"softcap": 0.5, "kv_lengths": 4},
            {"alibi_slopes": np.array([0.5, 0.25, 0.1, 0.0], np.float32)},
            {"sinks": np.array([0.5, -1.0, 0.1, 0.0], np.float32)},
            {"mask": np.eye(5, 7, dtype=bool), "bias": np.ones((5, 7), np.float16)},
        ],
        ids=lambda options: " ".join(options),
    )
    def test_own_keywords(self, options, rng):
        inputs = make_inputs(rng, heads=4, kv_heads=2)
        tensors = {
            name: to_torch(x) if isinstance(x, np.ndarray) else x for name, x in options.items()
        }
        output = attention(*map(to_torch, inputs), **tensors)
        assert_same_bits(output.numpy(), fastattn.attention(*inputs, **options))

    @pytest.mark.parametrize(
        "shapes",
        [
            ((5, 8), (7, 8), (7, 6)),
            ((3, 5, 8), (7, 8), (7, 6)),
            ((5, 8), (3, 7, 8), (1, 7, 6)),
            ((2, 3, 5, 8), (2, 1, 7, 8), (3, 7, 6)),
            ((4, 1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
            ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 6)),
            ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 6)),
        ],
        ids=str,
    )
    def test_shapes(self, shapes, rng):
        query, key, value = (torch.from_numpy(rng.standard_normal(shape)) for shape in shapes)
        output = scaled_dot_product_attention(query, key, value)
        expected = TORCHS_OWN(query, key, value)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-14)

    def test_torchs_own_samples(self):
        """What torch tests its function with, float64, where a few roundings are 1e-14."""
        from torch.testing._internal.common_methods_invocations import (
            sample_inputs_scaled_dot_product_attention,
        )

        samples = list(
            sample_inputs_scaled_dot_product_attention(
                None, torch.device("cpu"), torch.float64, requires_grad=False
            )
        )
        compared = 0
        for sample in samples:
            if sample.kwargs.get("dropout_p", 0) == 0:
                expected = TORCHS_OWN(sample.input, *sample.args, **sample.kwargs)
                output = scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)
                torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)
                compared += 1
        assert compared > 10


class TestMemory:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_nothing_is_copied(self, dtype, rng, monkeypatch):
        tensors = make_tensors(rng, dtype=dtype)
        passed = []

        def spy(*arrays, **keywords):
            passed.extend(arrays)
            passed.append(fastattn_attention(*arrays, **keywords))
            return passed[-1]

        fastattn_attention = fastattn.attention
        monkeypatch.setattr(fastattn, "attention", spy)
        output = scaled_dot_product_attention(*tensors)
        places = [x.ctypes.data for x in passed]
        assert places == [x.data_ptr() for x in (*tensors, output)]

    def test_rows_of_all_heads_lie_side_by_side(self, rng):
        """So that what layers do next is a view."""
        output = scaled_dot_product_attention(*make_tensors(rng))
        assert output.transpose(1, 2).is_contiguous()

    def test_any_strides(self, rng):
        tensors = [x.transpose(1, 2)[..., ::2] for x in make_tensors(rng, seqlen_q=7, heads=7)]
        expected = scaled_dot_product_attention(*(x.contiguous() for x in tensors))
        assert_same_bits(scaled_dot_product_attention(*tensors).numpy(), expected.numpy())

    def test_result_outlives_the_call(self, rng):
        tensors = make_tensors(rng, seqlen_q=300, seqlen_kv=300)
        outputs = [scaled_dot_product_attention(*tensors) for _ in range(5)]
        assert all(torch.equal(outputs[0], each) for each in outputs[1:])
        assert len({each.data_ptr() for each in outputs}) == 5


class TestOperator:
    @pytest.mark.parametrize(
        "keywords",
        [{}, {"causal": "top_left", "scale": 0.5}, {"mask": torch.eye(5, 7) > 0}],
        ids=["plain", "causal", "mask"],
    )
    @pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=str)
    def test_opcheck(self, dtype, keywords, rng):
        torch.library.opcheck(OPERATOR, make_tensors(rng, dtype=dtype), keywords)

    @pytest.mark.parametrize(
        "shapes", [((5, 8),) * 3, ((3, 5, 8), (5, 8), (5, 6)), ((2, 1, 4, 3, 5), (6, 2, 7, 5))]
    )
    def test_opcheck_of_other_shapes(self, shapes, rng):
        query, key, *values = (torch.from_numpy(rng.standard_normal(shape)) for shape in shapes)
        torch.library.opcheck(OPERATOR, (query, key, *(values or [key])))

    # torch's own, when it loads inductor.
    @pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
    @pytest.mark.parametrize("backend", ["eager", "aot_eager", COMPILED])
    def test_compiles_into_one_graph(self, backend, rng):
        def layer(query, key, value):
            output = scaled_dot_product_attention(query + 1, key, value, is_causal=True)
            return output.transpose(1, 2).flatten(2) * 2

        tensors = make_tensors(rng)
        torch.compiler.reset()
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        with torch.inference_mode():
            assert torch.equal(compiled(*tensors), layer(*tensors))

    def test_compiles_for_any_length(self, rng):
        torch.compiler.reset()
        compiled = torch.compile(
            scaled_dot_product_attention, backend="eager", fullgraph=True, dynamic=True
        )
        for length in (3, 4, 50):
            tensors = make_tensors(rng, seqlen_q=length, seqlen_kv=length)
            assert torch.equal(compiled(*tensors), scaled_dot_product_attention(*tensors))

    def test_export_keeps_it_as_one_node(self, rng):
        class Layer(torch.nn.Module):
            def forward(self, query, key, value):
                return scaled_dot_product_attention(query, key, value)

        tensors = make_tensors(rng)
        program = torch.export.export(Layer(), tensors)
        targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert targets == [OPERATOR]
        assert torch.equal(program.module()(*tensors), scaled_dot_product_attention(*tensors))

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_vmap(self, rng):
        query, key, value = make_tensors(rng, batch=(4,))
        output = torch.vmap(scaled_dot_product_attention, in_dims=(0, None, None))(
            query, key, value
        )
        assert torch.equal(
            output, torch.stack([scaled_dot_product_attention(each, key, value) for each in query])
        )

    def test_errors_keep_their_kind(self, rng):
        query, key, value = make_tensors(rng)
        with pytest.raises(ValueError, match=r"key.shape\[-1\] must equal query.shape\[-1\]"):
            scaled_dot_product_attention(query, key[..., :3], value)

    def test_fewer_heads_need_a_word(self):
        x = torch.ones(1, 4, 5, 8)
        with pytest.raises(RuntimeError, match=r"enable_gqa=True: got \(1, 4\), \(1, 2\), "):
            scaled_dot_product_attention(x, x[:, :2], x[:, :2])

    @pytest.mark.parametrize("name", ["key", "mask", "bias", "sinks"])
    def test_arrays_are_no_tensors(self, name, rng):
        tensors = dict(zip(("query", "key", "value"), make_tensors(rng), strict=True))
        with pytest.raises(TypeError, match=f"^{name} must be a tensor: got ndarray$"):
            attention(**{**tensors, name: np.ones(3)})


class TestLeftToTorch:
    """What is not for this library is torch's, errors included, with a warning for each reason."""

    def test_gradients(self, rng):
        query, key, value = make_tensors(rng)
        query.requires_grad_()
        with pytest.warns(RuntimeWarning, match="gradients.*inference_mode"):
            output = scaled_dot_product_attention(query, key, value)
        output.sum().backward()
        assert query.grad.shape == query.shape
        with torch.no_grad():
            assert_same_bits(
                scaled_dot_product_attention(query, key, value).numpy(),
                scaled_dot_product_attention(query.detach(), key, value).numpy(),
            )

    def test_a_bias_that_wants_gradients(self, rng):
        bias = torch.zeros(5, 7, requires_grad=True)
        with pytest.warns(RuntimeWarning, match="gradients"):
            scaled_dot_product_attention(*make_tensors(rng), attn_mask=bias).sum().backward()
        assert bias.grad is not None

    def test_dropout(self, rng):
        tensors = make_tensors(rng)
        with pytest.warns(RuntimeWarning, match="dropout"):
            output = scaled_dot_product_attention(*tensors, dropout_p=0.999)
        assert (output == 0).any()

    def test_another_device(self):
        x = torch.empty(2, 3, 5, 8, device="meta")
        with pytest.warns(RuntimeWarning, match="tensors on meta"):
            assert scaled_dot_product_attention(x, x, x).device.type == "meta"

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
    def test_nested_tensors(self, layout):
        if layout is torch.jagged:  # has its lengths before its heads only
            texts = [torch.ones(length, 3, 8) for length in (5, 6)]
            nested = torch.nested.nested_tensor(texts, layout=layout).transpose(1, 2)
        else:
            texts = [torch.ones(3, length, 8) for length in (5, 6)]
            nested = torch.nested.nested_tensor(texts, layout=layout)
        with pytest.warns(RuntimeWarning, match="nested"):
            output = scaled_dot_product_attention(nested, nested, nested)
        assert output.is_nested

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
    def test_other_dtypes(self, dtype):
        x = torch.ones(2, 3, 5, 8).to(dtype)
        with pytest.warns(RuntimeWarning, match=str(dtype)), pytest.raises(RuntimeError):
            scaled_dot_product_attention(x, x, x)

    def test_a_mask_of_integers(self, rng):
        with pytest.warns(RuntimeWarning, match="int64"), pytest.raises(RuntimeError):
            scaled_dot_product_attention(*make_tensors(rng), torch.ones(5, 7, dtype=torch.int64))

    def test_bfloat16_without_ml_dtypes(self, rng, monkeypatch):
        known = {torch.float16, torch.float32, torch.float64}
        monkeypatch.setattr(integration, "_DTYPES", known)
        tensors = make_tensors(rng, dtype=BFLOAT16)
        with pytest.warns(RuntimeWarning, match=r"pip install 'fastattn\[torch\]'"):
            assert torch.equal(scaled_dot_product_attention(*tensors), TORCHS_OWN(*tensors))

    def test_one_warning_for_each_reason(self, rng):
        tensors = make_tensors(rng)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                scaled_dot_product_attention(*tensors, dropout_p=0.5)
                scaled_dot_product_attention(*(x.to("meta") for x in tensors))
        assert len(caught) == 2
        assert {each.filename for each in caught} == {__file__}

    @pytest.mark.parametrize(
        ("tensor", "message"),
        [
            (torch.empty(2, 3, 5, 8, device="meta"), "on the CPU: got tensors on meta"),
            (torch.ones(2, 3, 5, 8, requires_grad=True), "inference_mode"),
            (torch.ones(2, 3, 5, 8).to_sparse(), "got sparse"),
            (torch.ones(2, 3, 5, 8, dtype=torch.int32), "got tensors of torch.int32"),
        ],
        ids=["device", "gradients", "sparse", "dtype"],
    )
    def test_own_function_refuses(self, tensor, message):
        with pytest.raises(ValueError, match=message):
            attention(tensor, tensor, tensor)


class TestUseFastattn:
    def test_reaches_layers_of_torch(self, rng, monkeypatch):
        calls = []
        monkeypatch.setattr(fastattn, "attention", counted(fastattn.attention, calls))
        layer = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
        x = torch.from_numpy(rng.standard_normal((2, 6, 32), dtype=np.float32))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.inference_mode():
                expected, _ = layer(x, x, x, need_weights=False)
                assert not calls
                with use_fastattn():
                    output, _ = layer(x, x, x, need_weights=False)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert len(calls) == 1
        torch.testing.assert_close(output, expected)

    def test_is_undone(self):
        with use_fastattn():
            assert functional.scaled_dot_product_attention is scaled_dot_product_attention
        assert functional.scaled_dot_product_attention is TORCHS_OWN

    def test_is_undone_after_an_error(self):
        with pytest.raises(KeyError), use_fastattn():
            raise KeyError
        assert functional.scaled_dot_product_attention is TORCHS_OWN

    def test_nested(self):
        with use_fastattn():
            with use_fastattn():
                pass
            assert functional.scaled_dot_product_attention is scaled_dot_product_attention
        assert functional.scaled_dot_product_attention is TORCHS_OWN

    def test_decorates(self):
        @use_fastattn()
        def current():
            return functional.scaled_dot_product_attention

        assert current() is current() is scaled_dot_product_attention
        assert functional.scaled_dot_product_attention is TORCHS_OWN

    def test_threads_leave_in_any_order(self):
        """The first to enter leaves first, while the second is still inside."""
        first_is_in, second_is_in = threading.Event(), threading.Event()

        def first():
            with use_fastattn():
                first_is_in.set()
                second_is_in.wait(10)

        thread = threading.Thread(target=first)
        thread.start()
        first_is_in.wait(10)
        with use_fastattn():
            second_is_in.set()
            thread.join(10)
            assert functional.scaled_dot_product_attention is scaled_dot_product_attention
        assert functional.scaled_dot_product_attention is TORCHS_OWN

    def test_what_is_left_to_torch_does_not_come_back(self, rng):
        with use_fastattn(), pytest.warns(RuntimeWarning, match="dropout"):
            functional.scaled_dot_product_attention(*make_tensors(rng), dropout_p=0.5)

    def test_compiled_code_notices(self, rng, monkeypatch):
        tensors = make_tensors(rng)
        torch.compiler.reset()
        compiled = torch.compile(
            lambda *x: functional.scaled_dot_product_attention(*x), backend="eager", fullgraph=True
        )
        calls = []
        monkeypatch.setattr(fastattn, "attention", counted(fastattn.attention, calls))
        with torch.inference_mode():
            compiled(*tensors)
            assert len(calls) == 0
            with use_fastattn():
                compiled(*tensors)
            assert len(calls) == 1
            compiled(*tensors)
            assert len(calls) == 1


def counted(function, calls):
    def call(*arguments, **keywords):
        calls.append(arguments)
        return function(*arguments, **keywords)

    return call


def run(program):
    """Run a program in a process of its own and return what it wrote."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


class TestImports:
    def test_fastattn_alone_does_not_import_torch(self):
        program = (
            "import sys, fastattn.integrations; print(sorted({'torch', 'jax'} & {*sys.modules}))"
        )
        assert run(program) == "[]\n"

    @pytest.mark.parametrize("name", ["torch", "transformers", "jax"])
    def test_what_is_missing_is_an_extra(self, name):
        output = run(f"""
            import sys
            sys.modules[{name!r}] = None
            import fastattn.integrations.{name}
            """)
        assert output.splitlines()[-1] == (
            f"ImportError: fastattn.integrations.{name} needs the package {name}: "
            f"pip install 'fastattn[{name}]'"
        )

    def test_torch_after_the_threads_of_numba(self):
        output = run("""
            import numpy as np, fastattn
            fastattn.set_num_threads(2)
            x = np.ones((1, 8, 256, 64), np.float32)
            fastattn.attention(x, x, x)
            print(fastattn.runtime.threading_layer())
            import fastattn.integrations.torch
            """)
        layer = output.splitlines()[0]
        assert ("import torch or fastattn.integrations.torch first" in output) == (layer == "omp")

    def test_torch_before_the_threads_of_numba(self):
        output = run("""
            import fastattn.integrations.torch
            import torch
            fastattn.set_num_threads(2)
            x = torch.ones((1, 8, 256, 64))
            print(fastattn.integrations.torch.scaled_dot_product_attention(x, x, x).sum().item())
            """)
        assert output == f"{float(8 * 256 * 64)}\n"
