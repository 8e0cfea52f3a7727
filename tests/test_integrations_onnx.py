"""ONNX's operators: ONNX's own cases and classes, and a language model from end to end."""

import importlib
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
from checks import assert_same_bits, assert_within, rounding_bound, score_bound
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.runner import Runner
from onnx.reference import ReferenceEvaluator

import fastattn
from fastattn.integrations.onnx import Attention, RotaryEmbedding

OURS = [Attention, RotaryEmbedding]


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # every operator's cases are made, with casts that overflow
    # All of them: a process that has asked for those of one operator gets no others.
    ALL_CASES = collect_testcases(None)

# Those of one node; each has an expanded twin of many other nodes.
CASES = {
    op: {
        case.name: case
        for case in ALL_CASES
        if case.model.graph.node[0].op_type == op.__name__ and not case.name.endswith("_expanded")
    }
    for op in OURS
}


class TestCasesOfOnnx:
    """Judged by the function that ONNX's own backend test judges with."""

    def test_none_is_lost(self):
        assert len([name for name in CASES[Attention] if name.startswith("test_attention_")]) == 93
        assert {op: len(cases) for op, cases in CASES.items()} == {
            Attention: 93,
            RotaryEmbedding: 8,
        }

    @pytest.mark.parametrize(("op", "name"), [(op, name) for op in OURS for name in CASES[op]])
    def test_case(self, op, name):
        case = CASES[op][name]
        session = ReferenceEvaluator(case.model, new_ops=OURS)
        assert [type(node) for node in session.rt_nodes_] == [op]
        ((inputs, expected),) = case.data_sets
        ours = session.run(None, dict(zip(session.input_names, inputs, strict=True)))
        for one, other in zip(ours, expected, strict=True):
            finite = np.isfinite(other.astype(np.float64))
            assert np.isfinite(one.astype(np.float64)[finite]).all()
        Runner.assert_similar_outputs(expected, ours, rtol=case.rtol, atol=case.atol)


# ---------------------------------------------------------------------------
# One node
# ---------------------------------------------------------------------------

INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
PAST = dict.fromkeys(("past_key", "past_value"), np.ones((2, 2, 2, 8), np.float32))
OUTPUTS = ("Y", "present_key", "present_value", "qk_matmul_output")
ROTARY_INPUTS = ("X", "cos_cache", "sin_cache", "position_ids")


def model_of_one_node(
    inputs, *, op_type="Attention", outputs=("Y",), opset=25, names=INPUTS, **attributes
):
    """Return a model of a node, given its inputs by name."""
    last = max(n for n, name in enumerate(names) if name in inputs)
    given = [name if name in inputs else "" for name in names[: last + 1]]
    node = helper.make_node(op_type, given, outputs, **attributes)
    dtypes = {name: helper.np_dtype_to_tensor_dtype(x.dtype) for name, x in inputs.items()}
    infos = [
        helper.make_tensor_value_info(name, dtypes[name], inputs[name].shape) for name in inputs
    ]
    made = [helper.make_tensor_value_info(name, dtypes[names[0]], None) for name in outputs if name]
    graph = helper.make_graph([node], "one_node", infos, made)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def evaluate(inputs, **node):
    """Return the outputs of a node."""
    return ReferenceEvaluator(model_of_one_node(inputs, **node), new_ops=OURS).run(None, inputs)


def rotate(inputs, **node):
    (rotated,) = evaluate(inputs, op_type="RotaryEmbedding", names=ROTARY_INPUTS, **node)
    return rotated


def qkv(rng, *, batch=2, heads=4, kv_heads=2, q_length=3, kv_length=5, dtype=np.float32):
    """Return inputs of four dimensions."""
    shapes = (heads, q_length, 8), (kv_heads, kv_length, 8), (kv_heads, kv_length, 6)
    return {
        name: rng.standard_normal((batch, *shape)).astype(dtype)
        for name, shape in zip("QKV", shapes, strict=True)
    }


def three_dimensional(x):
    batch, heads, length, features = x.shape
    return x.swapaxes(1, 2).reshape(batch, length, heads * features)


@st.composite
def nodes(draw):
    """Draw the inputs of a node, Q, K and V as it attends to them, its attributes and its opset.

    Where ONNX's class contradicts ONNX's text nothing is drawn: with causal, it gives all queries
    the frontier of the first if the mask has one row; in mode 0, scores have gone through softcap.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    # Scales of which the root is exact: ONNX's class takes it in float32, whatever the inputs.
    attributes = {
        "is_causal": draw(st.sampled_from([0, 1])),
        "scale": draw(st.sampled_from([None, 0.0625, 0.25, 4.0])),
        "softcap": draw(st.sampled_from([0.0, 1.5])),
        "softmax_precision": draw(st.sampled_from([None, TensorProto.DOUBLE])),
    }
    attributes["qk_matmul_output_mode"] = draw(st.integers(1 if attributes["softcap"] else 0, 3))
    opset = draw(st.sampled_from([23, 24, 25]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    batch, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    q_length, kv_length = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    caches = ["none", "past", "nonpad"] if opset > 23 else ["none", "past"]
    cache = draw(st.sampled_from(caches))
    past = draw(st.integers(0, 4)) if cache == "past" else 0
    total = past + kv_length

    inputs = qkv(
        rng,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_length=q_length,
        kv_length=kv_length,
        dtype=dtype,
    )
    seen = inputs
    if cache == "past":
        before = qkv(rng, batch=batch, kv_heads=kv_heads, kv_length=past, dtype=dtype)
        inputs |= {"past_key": before["K"], "past_value": before["V"]}
        seen = inputs | {
            name: np.concatenate((before[name], inputs[name]), axis=2) for name in ("K", "V")
        }
    longest = 0
    if cache == "nonpad":
        lengths = draw(st.lists(st.integers(0, kv_length), min_size=batch, max_size=batch))
        inputs["nonpad_kv_seqlen"] = np.array(lengths, np.int64)
        longest = max(lengths)
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    if kind != "none":
        shortest = total if opset == 23 else max(longest, 1)
        full = (batch, heads, q_length, draw(st.integers(shortest, total)))
        kept = [
            draw(st.booleans()),
            draw(st.booleans()),
            attributes["is_causal"] or draw(st.booleans()),
            1,
        ]
        shape = [n if keep else 1 for n, keep in zip(full, kept, strict=True)]
        shape = shape[draw(st.integers(0, 2 if attributes["is_causal"] else 3)) :]
        visible = rng.random(shape) < 0.7
        numbers = np.where(visible, rng.standard_normal(shape), -np.inf).astype(dtype)
        inputs["attn_mask"] = visible if kind == "bool" else numbers

    if opset == 25:
        for side in ("left_window_size", "right_window_size"):
            attributes[side] = draw(st.integers(-1, 4))
    if draw(st.booleans()):
        attributes |= {"q_num_heads": heads, "kv_num_heads": kv_heads}
        inputs = inputs | {name: three_dimensional(inputs[name]) for name in "QKV"}
    return inputs, seen, {k: v for k, v in attributes.items() if v is not None}, opset


@settings(max_examples=100)
@given(nodes())
def test_as_the_class_of_onnx(drawn):
    """The two sum the same terms in other orders."""
    inputs, seen, attributes, opset = drawn
    model = model_of_one_node(inputs, outputs=OUTPUTS, opset=opset, **attributes)
    ours, theirs = (
        ReferenceEvaluator(model, new_ops=ops).run(None, inputs) for ops in (OURS, None)
    )

    mask = inputs.get("attn_mask", np.zeros(1))
    bias = 0.0 if mask.dtype == bool else np.where(np.isfinite(mask), mask, 0)
    numbers = {"bias": bias, "scale": attributes.get("scale")}
    # ONNX's multiplies query and key by the root of the scale, two more roundings for each term.
    off = 2 * score_bound(seen["Q"], seen["K"], **numbers)
    weight_off = 2 * rounding_bound(seen["Q"], seen["K"], 1.0, **numbers)
    bounds = {
        "Y": weight_off * np.abs(seen["V"]).max(),
        "present_key": 0.0,
        "present_value": 0.0,
        "qk_matmul_output": weight_off if attributes["qk_matmul_output_mode"] == 3 else off,
    }
    for name, one, other in zip(OUTPUTS, ours, theirs, strict=True):
        assert_within(one, other, other.dtype, bounds[name])


def test_scores_are_not_stored(rng):
    """Nor is there anything of their size in the process, but where the node names them."""
    inputs = {
        name: x[:, :1] for name, x in qkv(rng, batch=1, q_length=1500, kv_length=1500).items()
    }
    evaluate(inputs)  # what is compiled at the first call is not counted
    peaks = []
    for outputs in (["Y"], OUTPUTS):
        tracemalloc.start()
        evaluate(inputs, outputs=outputs)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    scores = 4 * 1500 * 1500
    assert peaks[0] < scores / 4
    assert peaks[1] > scores


def test_what_no_output_names_is_not_computed(rng, monkeypatch):
    def computed(*_, **__):
        raise AssertionError

    monkeypatch.setattr("fastattn.integrations.onnx.attention_weights", computed)
    inputs = qkv(rng)
    for outputs in (["Y"], OUTPUTS[:3]):
        assert len(evaluate(inputs, outputs=outputs)) == len(outputs)


def test_outputs_without_a_name_are_nobodys_input(rng):
    """ONNX's evaluator keeps them under "", which is what the next layer's mask is called here."""
    inputs = qkv(rng, heads=2, q_length=6, kv_length=6) | PAST
    inputs["V"] = inputs["K"]  # six keys of eight features: a mask that fits eight keys
    infos, (result,) = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        for names in (inputs, ["result"])
    )

    def two_layers(*outputs):
        nodes = [
            helper.make_node("Attention", ["Q", "K", "V"], ["hidden", *outputs]),
            helper.make_node(
                "Attention", ["hidden", "K", "V", "", "past_key", "past_value"], ["result"]
            ),
        ]
        graph = helper.make_graph(nodes, "two_layers", infos, [result])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
        return ReferenceEvaluator(model, new_ops=OURS).run(None, inputs)

    (ours,), (expected,) = two_layers("", "", "heat_map"), two_layers()
    assert_same_bits(ours, expected)


def test_mode_0_is_before_the_softcap(rng):
    inputs = qkv(rng)
    names = ("Y", "", "", "qk_matmul_output")
    plain = evaluate(inputs, outputs=names)[1]
    capped = evaluate(inputs, outputs=names, softcap=0.5)[1]
    assert np.abs(plain).max() > 0.5
    assert_same_bits(capped, plain)


def test_without_a_past_present_is_what_came(rng):
    inputs = qkv(rng)
    _, key, value = evaluate(inputs, outputs=OUTPUTS[:3])
    assert_same_bits(key, inputs["K"])
    assert_same_bits(value, inputs["V"])


def test_a_mask_of_one_key(rng):
    """It serves all of them in opset 23; later ones say that what the mask lacks is hidden."""
    inputs = qkv(rng) | {"attn_mask": np.ones((3, 1), bool)}
    (alike,) = evaluate(inputs, opset=23)
    (first,) = evaluate(inputs, opset=24)
    (unmasked,) = evaluate({name: inputs[name] for name in "QKV"}, opset=23)
    assert_same_bits(alike, unmasked)
    assert_same_bits(first, np.repeat(inputs["V"][:, :, :1], 2, axis=1).repeat(3, axis=2))


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 1, 1, 5)])
def test_a_mask_of_one_row_with_causal(shape, rng):
    """The mask is for every query, and each has a frontier of its own."""
    inputs, mask = qkv(rng), rng.random(shape) < 0.6
    (ours,) = evaluate(inputs | {"attn_mask": mask}, is_causal=1)
    (expected,) = evaluate(inputs | {"attn_mask": mask & np.tri(3, 5, dtype=bool)})
    assert_same_bits(ours, expected)


@pytest.mark.parametrize("opset", [23, 24])
def test_a_mask_of_integers_is_added(opset, rng):
    numbers = rng.integers(-3, 3, (3, 5 if opset == 23 else 4))
    floats = np.where(np.arange(5) < numbers.shape[-1], np.resize(numbers, (3, 5)), -np.inf)
    floats[:, : numbers.shape[-1]] = numbers
    inputs = qkv(rng)
    (ours,) = evaluate(inputs | {"attn_mask": numbers}, opset=opset)
    (expected,) = evaluate(inputs | {"attn_mask": floats.astype(np.float32)}, opset=opset)
    assert_same_bits(ours, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_softmax_precision_is_a_lower_bound(dtype, rng):
    inputs = qkv(rng, dtype=dtype)
    (plain,) = evaluate(inputs)
    for precision in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
        assert_same_bits(evaluate(inputs, softmax_precision=precision)[0], plain)
    (double,) = evaluate(inputs, softmax_precision=TensorProto.DOUBLE)
    wide = fastattn.attention(*(x.astype(np.float64) for x in inputs.values()))
    assert_same_bits(double, wide.astype(dtype))


def test_values_of_another_type(rng):
    inputs = qkv(rng)
    wide = inputs | {"V": inputs["V"].astype(np.float64)}
    output, _, value = evaluate(wide, outputs=OUTPUTS[:3])
    assert (output.dtype, value.dtype) == (np.float32, np.float64)
    expected = fastattn.attention(*wide.values()).astype(np.float32)
    assert_same_bits(output, expected)


# ---------------------------------------------------------------------------
# A model
# ---------------------------------------------------------------------------

VOCABULARY, WIDTH, HEADS, KV_HEADS, POSITIONS = 11, 16, 4, 2, 12


def language_model(rng):
    """Return a model of one layer as exporters write it: tokens and a cache in, logits out."""

    def normal(*shape):
        return rng.standard_normal(shape) / np.sqrt(shape[0])

    kv_width = WIDTH // HEADS * KV_HEADS
    cos, sin = fastattn.rotary_table(POSITIONS, WIDTH // HEADS, dtype=np.float64)
    weights = {
        "table": rng.standard_normal((VOCABULARY, WIDTH)),
        "w_q": normal(WIDTH, WIDTH),
        "w_k": normal(WIDTH, kv_width),
        "w_v": normal(WIDTH, kv_width),
        "w_out": normal(WIDTH, VOCABULARY),
        "cos": cos,
        "sin": sin,
    }
    rotary = "RotaryEmbedding"
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["x"]),
        helper.make_node("MatMul", ["x", "w_q"], ["q"]),
        helper.make_node("MatMul", ["x", "w_k"], ["k"]),
        helper.make_node("MatMul", ["x", "w_v"], ["v"]),
        helper.make_node(rotary, ["q", "cos", "sin", "positions"], ["turned_q"], num_heads=HEADS),
        helper.make_node(
            rotary, ["k", "cos", "sin", "positions"], ["turned_k"], num_heads=KV_HEADS
        ),
        helper.make_node(
            "Attention",
            ["turned_q", "turned_k", "v", "", "past_key", "past_value"],
            ["attended", "present_key", "present_value"],
            is_causal=1,
            q_num_heads=HEADS,
            kv_num_heads=KV_HEADS,
        ),
        helper.make_node("MatMul", ["attended", "w_out"], ["logits"]),
    ]
    cache = ["batch", KV_HEADS, None, WIDTH // HEADS]
    declared = [
        ("tokens", TensorProto.INT64, ["batch", "length"]),
        ("positions", TensorProto.INT64, ["batch", "length"]),
        ("past_key", TensorProto.DOUBLE, cache),
        ("past_value", TensorProto.DOUBLE, cache),
        ("logits", TensorProto.DOUBLE, ["batch", "length", VOCABULARY]),
        ("present_key", TensorProto.DOUBLE, cache),
        ("present_value", TensorProto.DOUBLE, cache),
    ]
    infos = [helper.make_tensor_value_info(*each) for each in declared]
    initializers = [numpy_helper.from_array(x, name) for name, x in weights.items()]
    graph = helper.make_graph(nodes, "language_model", infos[:4], infos[4:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), weights


def test_model_from_end_to_end(rng):
    """A text at once, and token by token with the cache going round, as ONNX runs it at once."""
    model, weights = language_model(rng)
    ours, theirs = (ReferenceEvaluator(model, new_ops=ops) for ops in (OURS, None))
    tokens = rng.integers(0, VOCABULARY, (2, POSITIONS))
    empty = np.zeros((2, KV_HEADS, 0, WIDTH // HEADS))

    def feeds(start, stop, past_key, past_value):
        return {
            "tokens": tokens[:, start:stop],
            "positions": np.broadcast_to(np.arange(start, stop), (2, stop - start)),
            "past_key": past_key,
            "past_value": past_value,
        }

    whole = theirs.run(None, feeds(0, POSITIONS, empty, empty), intermediate=True)
    # The projection spreads what an element of attention is off by over a row of its weights.
    query = whole["turned_q"].reshape(2, POSITIONS, HEADS, -1)
    attended_off = 2 * rounding_bound(query, whole["present_key"], whole["v"])
    bound = attended_off * np.abs(weights["w_out"]).sum(axis=0).max()

    at_once = ours.run(["logits"], feeds(0, POSITIONS, empty, empty))[0]
    assert_within(at_once, whole["logits"], np.float64, bound)

    cache = [empty, empty]
    steps = []
    for start, stop in [(0, 5), *((p, p + 1) for p in range(5, POSITIONS))]:
        logits, *cache = ours.run(None, feeds(start, stop, *cache))
        steps.append(logits)
    assert_within(np.concatenate(steps, axis=1), whole["logits"], np.float64, bound)


# ---------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------

Q, KV = np.ones((2, 4, 3, 8), np.float32), np.ones((2, 2, 5, 8), np.float32)
VALID = {"Q": Q, "K": KV, "V": KV}
FLAT = {"Q": np.ones((2, 3, 32), np.float32)} | dict.fromkeys("KV", np.ones((2, 5, 16), np.float32))
NONPAD = {"nonpad_kv_seqlen": np.array([1, 5])}

ERRORS = [
    ({"Q": Q[0]}, {}, r"^Q, K and V must all have 3 or all have 4 dimensions: got 3, 4 and 4$"),
    (dict.fromkeys("QKV", Q[0, 0]), {}, r"^Q must have 3 or 4 dimensions: got shape \(3, 8\)$"),
    (FLAT, {}, r"^q_num_heads must be given where Q has 3 dimensions: got shape \(2, 3, 32\)$"),
    (FLAT, {"q_num_heads": 4}, r"^kv_num_heads must be given where K has 3 dimensions"),
    (FLAT, {"q_num_heads": 5, "kv_num_heads": 2}, r"^q_num_heads must divide Q\.shape.*5 and 32$"),
    (FLAT, {"q_num_heads": 0}, r"^q_num_heads must be at least 1: got 0$"),
    ({}, {"q_num_heads": 8}, r"^q_num_heads must equal Q\.shape\[1\]: got 8 and 4$"),
    ({"past_key": KV}, {}, r"^past_key and past_value must be given together: got one of them$"),
    (PAST | NONPAD, {}, r"^nonpad_kv_seqlen must not be given with past_key: got both$"),
    (PAST | {"past_key": KV[:, :1]}, {},
     r"^past_key must have shape \(2, 2, past, 8\), as the new ones have: got \(2, 1, 5, 8\)$"),
    (PAST | {"past_value": KV[0]}, {}, r"^past_value must have shape \(2, 2, past, 8\).*\(2, 5, 8"),
    (PAST | {"past_value": KV}, {}, r"^value must have as many rows as key: got seqlen_kv 7 in"),
    ({"nonpad_kv_seqlen": np.array([1, 6])}, {}, r"^nonpad_kv_seqlen must lie between 0 and 5: "),
    ({"nonpad_kv_seqlen": np.array([-1, 5])}, {}, r"^nonpad_kv_seqlen must lie between 0 and 5: "),
    ({"K": KV[..., :7]}, {}, r"^key\.shape\[-1\] must equal query\.shape\[-1\]: got 7 and 8$"),
    ({"attn_mask": np.ones((3, 6), bool)}, {}, r"^mask must broadcast to .* got shape \(3, 6\)$"),
    ({}, {"softmax_precision": 7}, r"^softmax_precision must be 1 \(FLOAT\), 10 .*: got 7$"),
    ({}, {"outputs": OUTPUTS, "qk_matmul_output_mode": 4},
     r"^qk_matmul_output_mode must be 0, 1, 2 or 3: got 4$"),
    ({}, {"left_window_size": -2}, r"^window must .*: got -2$"),
    ({}, {"softcap": -1.0}, r"^softcap must .*: got -1\.0$"),
    ({}, {"scale": float("nan")}, r"^scale must .*: got nan$"),
]  # fmt: skip

X, TABLE = np.ones((2, 4, 3, 8), np.float32), np.ones((5, 4), np.float32)
ROTARY_VALID = {
    "X": X,
    "cos_cache": TABLE,
    "sin_cache": TABLE,
    "position_ids": np.array([[0, 1, 4]] * 2),
}
ROTARY_ERRORS = [
    ({"X": X[0]}, {}, r"^num_heads must be given where X has 3 dimensions: got shape \(4, 3, 8\)$"),
    ({"X": X[0, 0]}, {}, r"^X must have 3 or 4 dimensions: got shape \(3, 8\)$"),
    ({}, {"rotary_embedding_dim": 6},
     r"^cos_cache\.shape\[-1\] must be half of the 6 features that are rotated: got 4$"),
    ({"position_ids": np.array([[0, 1, 5]] * 2)}, {}, r"^positions must lie between 0 and 4"),
    ({"position_ids": np.array([[0, 1]] * 2)}, {}, r"^positions must broadcast to x\.shape"),
    ({"sin_cache": TABLE[:4]}, {}, r"^cos and sin must have one shape"),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "attributes", "message"), ERRORS)
def test_error(inputs, attributes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(VALID | inputs, **attributes)


@pytest.mark.parametrize(("inputs", "attributes", "message"), ROTARY_ERRORS)
def test_rotary_error(inputs, attributes, message):
    with pytest.raises(ValueError, match=message):
        rotate(ROTARY_VALID | inputs, **attributes)


def test_what_the_tables_start_from_is_valid():
    for inputs in (VALID, VALID | PAST, VALID | NONPAD):
        evaluate(inputs)
    evaluate(FLAT, q_num_heads=4, kv_num_heads=2)
    rotate(ROTARY_VALID)


def test_types_without_a_common_one():
    with pytest.raises(TypeError) as caught:
        evaluate(VALID | {"Q": Q.astype(np.float16), "V": KV.astype("bfloat16")})
    assert "float16 and bfloat16 have none" in str(caught.value.__cause__)


def test_without_onnx(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "onnx"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fastattn.integrations.onnx")
    with pytest.raises(
        ImportError, match=r"needs the package onnx: pip install 'fastattn\[onnx\]'"
    ):
        importlib.import_module("fastattn.integrations.onnx")
