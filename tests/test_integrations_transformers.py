"""Tiny random models of transformers under fastattn, beside their own eager attention.

A model is as near the truth, itself in float64, as it is with its own attention, and generates the
same tokens. Its weights are large enough for every key to matter.
"""

import os
from functools import partial
from itertools import product
from unittest.mock import patch

import numpy as np
import pytest
import torch
from checks import rounding

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers as hf
from transformers import masking_utils

from fastattn.integrations import transformers as integration
from fastattn.integrations.torch import use_fastattn
from fastattn.integrations.transformers import Visibility, attend, make_mask, register

register()

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = SMALL | {
    "vocab_size": 99,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
EXPERTS = {"num_experts_per_tok": 1, "experts_implementation": "eager"}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 98,
    "decoder_start_token_id": 1,
    "init_std": 0.3,
}

DECODERS = {
    "Llama": partial(hf.LlamaConfig, **DECODER),
    "Mistral": partial(hf.MistralConfig, **DECODER, sliding_window=4),
    "Gemma 2": partial(
        hf.Gemma2Config, **DECODER | ALTERNATING, head_dim=8, attn_logit_softcapping=1.5
    ),
    "Gemma 3": partial(hf.Gemma3TextConfig, **DECODER | ALTERNATING, head_dim=8),
    "gpt-oss": partial(
        hf.GptOssConfig, **DECODER | ALTERNATING | EXPERTS, head_dim=8, num_local_experts=2
    ),
    # Leaves out the window when it calls its attention: the mask alone knows.
    "Qwen 2 MoE": partial(
        hf.Qwen2MoeConfig,
        **DECODER | ALTERNATING,
        use_sliding_window=True,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=2,
        **EXPERTS,
    ),
}
ENCODERS = {
    "BERT": partial(
        hf.BertConfig, **SMALL, vocab_size=99, intermediate_size=48, initializer_range=0.3
    ),
    "ModernBERT": partial(
        hf.ModernBertConfig,
        **SMALL,
        vocab_size=99,
        intermediate_size=48,
        initializer_range=0.3,
        pad_token_id=0,
        local_attention=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


def make(name, config):
    """Return a random model in evaluation mode, with its own attention."""
    torch.manual_seed(0)
    config = config(attn_implementation="eager")
    kind = hf.AutoModel if name in ENCODERS else hf.AutoModelForCausalLM
    model = kind.from_config(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "sinks" in parameter_name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request):
    return make(request.param, DECODERS[request.param])


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request):
    return make(request.param, ENCODERS[request.param])


@pytest.fixture
def texts():
    """Return two texts, the first two tokens of the second being padding, and their mask."""
    ids = torch.randint(2, 97, (2, 9), generator=torch.manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :2] = ids[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def with_attention(model, implementation, call):
    """Call a model with an implementation of attention, whatever it had."""
    model.set_attn_implementation(implementation)
    with torch.inference_mode():
        return call(model)


def in_float64(model, call):
    """Call a model in float64, its softmax included."""
    softmax = torch.nn.functional.softmax
    wide = patch.object(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    try:
        with wide:
            return with_attention(model.double(), "eager", call)
    finally:
        model.float()


def assert_near(model, call, real=...):
    """Assert that what a model returns is as near the truth as with its own attention."""
    truth = in_float64(model, call)[real].double()
    ours, theirs = (
        with_attention(model, implementation, call)[real].double()
        for implementation in ("fastattn", "eager")
    )
    assert torch.isfinite(ours).all()
    error, error_of_theirs = ((each - truth).abs().max() for each in (ours, theirs))
    one_rounding = rounding(np.dtype(np.float32)) * truth.abs().max()
    assert error <= 4 * error_of_theirs + one_rounding, f"{error:.2e}, theirs {error_of_theirs:.2e}"


def assert_same_tokens(model, **options):
    """Assert that a model generates the same with its own attention."""
    generate = partial(
        type(model).generate, max_new_tokens=8, do_sample=False, use_cache=True, **options
    )
    ours, theirs = (with_attention(model, each, generate) for each in ("fastattn", "eager"))
    assert torch.equal(ours, theirs)
    assert len(set(ours[0, -8:].tolist())) > 1


class TestDecoders:
    def test_logits(self, decoder, texts):
        real = texts["attention_mask"].bool()
        assert_near(decoder, lambda model: model(**texts).logits, real)

    def test_logits_of_a_chunk(self, decoder, texts):
        """A second chunk of queries, when a window's cache has forgotten the first keys."""

        def second_chunk(model):
            ids, mask = texts["input_ids"], texts["attention_mask"]
            cache = hf.DynamicCache(config=model.config)
            model(ids[:, :6], attention_mask=mask[:, :6], cache=cache)
            return model(ids[:, 6:], attention_mask=mask, cache=cache).logits

        assert_near(decoder, second_chunk)

    @pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}], ids=["whole", "chunks"])
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_generate(self, cache, options, decoder, texts):
        assert_same_tokens(
            decoder, **texts, **options, cache_implementation=cache, disable_compile=True
        )

    def test_beams(self, decoder, texts):
        assert_same_tokens(decoder, **texts, num_beams=2)

    def test_packed_texts(self, decoder, texts):
        """Two texts in one row, told apart by their positions."""
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        packed = {"input_ids": texts["input_ids"][:1], "position_ids": positions}
        assert_near(decoder, lambda model: model(**packed, use_cache=False).logits)

    def test_a_mask_of_the_callers(self, decoder, texts):
        mask = torch.tril(torch.ones(2, 1, 9, 9)).bool()
        mask[:, :, 5:, 2] = False
        added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        masks = {"sliding_attention": added, "full_attention": added}
        if not hasattr(decoder.config, "layer_types") or decoder.config.layer_types is None:
            masks = added
        ids = texts["input_ids"]
        assert_near(decoder, lambda model: model(ids, attention_mask=masks).logits)


class TestEncoders:
    @pytest.mark.parametrize("padded", [False, True])
    def test_hidden_states(self, padded, encoder, texts):
        if not padded:
            texts["attention_mask"][:] = 1
        real = texts["attention_mask"].bool()
        assert_near(encoder, lambda model: model(**texts).last_hidden_state, real)


@pytest.fixture(scope="module", params=["T5", "BART"])
def translator(request):
    torch.manual_seed(2)  # of which T5 does not repeat one token for ever
    if request.param == "BART":
        config = hf.BartConfig(**ENCODER_DECODER, attn_implementation="eager")
        return hf.BartForConditionalGeneration(config).eval()
    config = hf.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=99,
        decoder_start_token_id=0,
        initializer_factor=3.0,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return hf.T5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def whisper():
    torch.manual_seed(0)
    config = hf.WhisperConfig(
        **ENCODER_DECODER,
        num_mel_bins=8,
        max_source_positions=20,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        attn_implementation="eager",
    )
    return hf.WhisperForConditionalGeneration(config).eval()


class TestEncoderDecoders:
    def test_text(self, translator, texts):
        answer = torch.randint(2, 97, (2, 6), generator=torch.manual_seed(2))
        assert_near(translator, lambda model: model(**texts, decoder_input_ids=answer).logits)
        assert_same_tokens(translator, **texts)
        static = {"cache_implementation": "static", "disable_compile": True}
        assert_same_tokens(translator, **texts, **static)

    def test_speech(self, whisper):
        sound = torch.randn(2, 8, 40, generator=torch.manual_seed(1))
        answer = torch.randint(2, 97, (2, 6), generator=torch.manual_seed(2))

        def logits(model):
            return model(sound.to(model.dtype), decoder_input_ids=answer).logits

        assert_near(whisper, logits)
        assert_same_tokens(whisper, input_features=sound)


FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(3),
    "bidirectional": masking_utils.bidirectional_mask_function,
    "bidirectional window": masking_utils.sliding_window_bidirectional_mask_function(2),
    "two windows": masking_utils.and_masks(
        masking_utils.sliding_window_overlay(4), masking_utils.sliding_window_overlay(2)
    ),
}
STORED = {
    "chunks": masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=int)),
    "union": masking_utils.or_masks(
        masking_utils.causal_mask_function, masking_utils.sliding_window_overlay(2)
    ),
    "of the caller's": masking_utils.and_masks(
        masking_utils.causal_mask_function, lambda b, h, i, j: (i + j) % 2 == 0
    ),
}
PADDINGS = {
    "none": None,
    "all real": torch.ones(2, 12, dtype=bool),
    "left": torch.arange(12) >= torch.tensor([[0], [4]]),
    "right, short": torch.arange(9) < torch.tensor([[9], [6]]),
    "holes": torch.arange(12) % torch.tensor([[3], [5]]) > 0,
}


class TestMasks:
    """What is described is what transformers would have stored."""

    @pytest.mark.parametrize("function", FUNCTIONS | STORED)
    @pytest.mark.parametrize("padding", PADDINGS)
    def test_values(self, padding, function):
        for (queries, keys), q_offset, kv_offset in product(
            [(7, 7), (1, 9), (4, 12)], (0, 5), (0, 3)
        ):
            arguments = {
                "batch_size": 2,
                "q_length": queries,
                "kv_length": keys,
                "q_offset": q_offset,
                "kv_offset": kv_offset,
                "mask_function": (FUNCTIONS | STORED)[function],
                "attention_mask": PADDINGS[padding],
                "device": "cpu",
            }
            mask = make_mask(**arguments)
            assert isinstance(mask, Visibility) == (function in FUNCTIONS)
            expected = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
            assert mask.shape == expected.shape
            assert torch.equal(mask.clone(), expected)

    def test_what_looks_inside_finds_a_tensor(self):
        mask = Visibility((2, 1, 3, 4), window=(None, 0), offset=1)
        expected = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
        assert type(mask[1, 0]) is torch.Tensor
        assert torch.equal(mask[1, 0], expected)
        assert torch.equal(~mask[0, 0], ~expected)
        assert torch.where(mask, 0.0, 1.0).sum() == 2 * 3
        assert torch.equal(torch.cat([mask, mask])[3, 0], expected)

    def test_what_is_written_inside_counts(self):
        x = torch.randn(1, 2, 5, 8, generator=torch.manual_seed(0))
        mask = Visibility((1, 1, 5, 5), window=(None, 0), offset=0)
        mask[..., 1] = False
        output, _ = attend(None, x, x, x, mask)
        expected = torch.tril(torch.ones(5, 5)).bool()
        expected[:, 1] = False
        expected, _ = attend(None, x, x, x, expected)
        assert torch.equal(output, expected)

    def test_nothing_of_the_scores_shape_is_stored(self, texts, monkeypatch):
        seen = []

        def spy(*tensors, **keywords):
            seen.append(keywords)
            return attention(*tensors, **keywords)

        attention = integration.attention
        monkeypatch.setattr(integration, "attention", spy)
        model = make("Mistral", DECODERS["Mistral"])
        with_attention(model, "fastattn", lambda model: model(**texts))
        assert len(seen) == 2
        for keywords in seen:
            assert keywords["window"] == (3, 0)
            assert keywords["query_offset"] == 0
            assert keywords["mask"].shape == (2, 1, 1, 9)

    def test_the_mask_of_a_compiled_step_is_stored(self):
        mask = make_mask(2, 1, 12, q_offset=torch.tensor(5), allow_is_causal_skip=False)
        assert type(mask) is torch.Tensor


class TestCompiled:
    def test_one_graph(self, texts):
        model = make("Llama", DECODERS["Llama"])
        expected = with_attention(model, "fastattn", lambda model: model(**texts).logits)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.inference_mode():
            output = compiled(**texts, use_cache=False).logits
        real = texts["attention_mask"].bool()
        torch.testing.assert_close(output[real], expected[real])

    @pytest.mark.parametrize("name", ["Llama", "Gemma 3"])
    def test_decoding_steps(self, name, texts):
        """The prompt is read as always, and each step is one graph.

        One for all of them, but that transformers' own windowed cache makes one for each position.
        """
        graphs = []

        def backend(graph, inputs, **options):
            graphs.append(graph)
            return graph.forward

        torch.compiler.reset()
        config = hf.CompileConfig(backend=backend, fullgraph=True, dynamic=False)
        config._compile_all_devices = True
        model = make(name, DECODERS[name])
        generate = partial(type(model).generate, **texts, max_new_tokens=6, do_sample=False)
        expected = with_attention(model, "eager", generate)
        compiled = partial(generate, cache_implementation="static", compile_config=config)
        assert torch.equal(with_attention(model, "fastattn", compiled), expected)
        assert len(graphs) == 1 if name == "Llama" else len(graphs) > 1
        for graph in graphs:
            targets = [str(node.target) for node in graph.graph.nodes]
            assert targets.count("fastattn.attention.default") == 2


def test_sdpa_of_transformers_by_way_of_torchs_name(texts):
    model = make("Llama", DECODERS["Llama"])
    expected = with_attention(model, "fastattn", lambda model: model(**texts).logits)
    with use_fastattn():
        output = with_attention(model, "sdpa", lambda model: model(**texts).logits)
    real = texts["attention_mask"].bool()
    torch.testing.assert_close(output[real], expected[real])


class TestAttend:
    class Layer:
        is_causal = True

    def test_shape_and_layout(self):
        query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
        output, weights = attend(self.Layer(), query, key, key, None)
        assert output.shape == (2, 5, 4, 8)
        assert output.is_contiguous()
        assert weights is None

    @pytest.mark.parametrize("layers", [True, False])
    @pytest.mark.parametrize("argument", [None, True, False])
    def test_no_mask_is_what_the_layer_says(self, argument, layers):
        x = torch.randn(1, 2, 5, 8, generator=torch.manual_seed(0))
        layer = self.Layer()
        layer.is_causal = layers
        output, _ = attend(layer, x, x, x, None, is_causal=argument)
        causal = layers if argument is None else argument
        expected = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=causal)
        torch.testing.assert_close(output.transpose(1, 2), expected)

    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_bias_and_mask(self, kind):
        x = torch.randn(1, 2, 5, 8, generator=torch.manual_seed(0))
        mask = torch.arange(25).reshape(1, 1, 5, 5) % 3 > 0
        bias = torch.randn(1, 2, 5, 5, generator=torch.manual_seed(1))
        added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        given = mask if kind == "bool" else added
        output, _ = attend(self.Layer(), x, x, x, given, position_bias=bias)
        expected = torch.nn.functional.scaled_dot_product_attention(x, x, x, bias + added)
        torch.testing.assert_close(output.transpose(1, 2), expected)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dropout": 0.1}, r"dropout must be 0, call model\.eval\(\)"),
            ({"output_attentions": True}, "output_attentions must be off"),
            ({"indices": torch.zeros(1)}, "indices must be None"),
        ],
        ids=lambda value: value if isinstance(value, str) else next(iter(value)),
    )
    def test_refuses(self, options, message):
        x = torch.ones(1, 2, 5, 8)
        with pytest.raises(ValueError, match=message):
            attend(self.Layer(), x, x, x, None, **options)


class TestErrors:
    def test_gradients(self, texts):
        model = make("Llama", DECODERS["Llama"])
        model.set_attn_implementation("fastattn")
        with pytest.raises(ValueError, match=r"torch\.inference_mode\(\)"):
            model(**texts)

    @pytest.mark.parametrize(
        "config",
        [
            partial(hf.BloomConfig, hidden_size=32, n_layer=1, n_head=4, vocab_size=99),
            partial(hf.XGLMConfig, d_model=32, num_layers=1, attention_heads=4, vocab_size=99),
        ],
        ids=["BLOOM", "XGLM"],
    )
    def test_a_family_that_cannot_be_served(self, config, texts):
        model = hf.AutoModelForCausalLM.from_config(config(attn_implementation="fastattn")).eval()
        with torch.inference_mode(), pytest.raises(ValueError, match='attn_implementation="eager"'):
            model(**texts)
