"""The example that generates text: cached tokens are those of recomputation, whatever the cache."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastattn

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    """Return the example as a module; what it imports lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("generate")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: steps are short, and threads that wait for work keep NumPy's from theirs."""
    before = fastattn.get_num_threads()
    fastattn.set_num_threads(1)
    yield
    fastattn.set_num_threads(before)


@pytest.fixture(scope="module")
def story():
    """Return 300 tokens of 100 kinds in random order: hardly any two follow each other twice."""
    return np.random.default_rng(1).integers(100, size=300)


@pytest.fixture(scope="module")
def model(example, story):
    return example.induction_model(story, vocabulary=100)


def test_as_a_program(tmp_path):
    run = subprocess.run(
        [sys.executable, EXAMPLES / "generate.py", "--context", "300", "--tokens", "8"],
        cwd=tmp_path,
        # With more, each product waits for a core that another process may be using.
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the model keeps 300 of them in sight" in run.stdout
    assert "\n[An exception] " in run.stdout
    assert "\nfastattn float32 " in run.stdout
    assert "\nnaive NumPy " in run.stdout
    assert "\ntorch " in run.stdout
    assert run.stdout.endswith("8 of 8 tokens are the same\n")


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_every_way_gives_the_tokens_of_recomputation(temperature, example, model, story):
    """Token after token from all that stands before it, with no cache at all."""
    sampler = example.Sampler(temperature, top_k=20, top_p=0.95, seed=5)
    prompt, expected = story[:200].tolist(), []
    choose = sampler.chooser()
    for _ in range(12):
        everything = [*prompt, *expected]
        memory = example.NaiveAttention(model.shape, len(everything))
        expected.append(choose(model.next_logits(everything, memory)))

    compared = example.ways(model, 256)
    assert [way.name for way in compared][-2:] == ["naive NumPy", "torch"]
    exact = [way for way in compared if way.name not in ("fastattn float16", "fastattn int8")]
    for way in exact:
        memory = way.new_memory()
        found = list(example.generate(way.model, memory, prompt, 12, sampler.chooser()))
        assert found == expected, way.name
        assert memory.length == 200 + 11
    assert example.recompute(model, prompt, expected, sampler.chooser()) == expected


def test_recomputing_finds_a_wrong_token(example, model, story):
    choose = example.Sampler().chooser()
    prompt = story[:200].tolist()
    memory = example.CachedAttention(model.shape, 256)
    tokens = list(example.generate(model, memory, prompt, 8, choose))
    tokens[5] = (tokens[5] + 1) % 100
    assert example.equal_tokens(tokens, example.recompute(model, prompt, tokens, choose)) == 5


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_model_goes_on_as_its_text_did(dtype, example, model, story):
    memory = example.CachedAttention(model.shape, 400, dtype)
    prompt = [*story, *story[40:44]]
    found = list(example.generate(model, memory, prompt, 24, example.Sampler().chooser()))
    np.testing.assert_array_equal(found, story[44:68])


def test_a_prompt_in_parts(example, model, story):
    """Positions and cache go on where the first part ended, and again after forgetting."""
    memory = example.CachedAttention(model.shape, 300)
    whole = model.states(story, memory)
    memory.truncate(120)
    rest = model.states(story[120:], memory)
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(rest, whole[120:], atol=1e-4)


def test_bytes_of_a_cache(example, model):
    nbytes = [way.new_memory().nbytes for way in example.ways(model, 128)]
    single = 2 * model.shape.layers * model.shape.kv_heads * 128 * model.shape.head_dim * 4
    assert nbytes[0] == nbytes[3] == nbytes[4] == single
    assert nbytes[1] == single // 2
    assert nbytes[2] == single // 4 + single // model.shape.head_dim  # and a scale for each row


class TestSampler:
    """What the choice of a token depends on."""

    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))

    def draw(self, sampler, count=400):
        choose = sampler.chooser()
        return np.array([choose(self.logits) for _ in range(count)])

    def test_greedy(self, example):
        assert set(self.draw(example.Sampler())) == {1}

    def test_temperature(self, example):
        """By probability at 1; at 1/2 by its square."""
        for temperature in (1.0, 0.5):
            weights = np.exp(self.logits / temperature)
            expected = weights / weights.sum()
            counts = np.bincount(self.draw(example.Sampler(temperature), 4000), minlength=4)
            deviation = np.sqrt(4000 * expected * (1 - expected))
            assert (abs(counts - 4000 * expected) < 4 * deviation).all()

    def test_a_temperature_close_to_nothing(self, example):
        assert set(self.draw(example.Sampler(1e-6))) == {1}

    @pytest.mark.parametrize(("top_k", "kept"), [(1, {1}), (3, {1, 2, 3}), (9, {0, 1, 2, 3})])
    def test_top_k(self, top_k, kept, example):
        assert set(self.draw(example.Sampler(1.0, top_k=top_k))) == kept

    @pytest.mark.parametrize(("top_p", "kept"), [(0, {1}), (0.5, {1, 3}), (0.8, {1, 2, 3})])
    def test_top_p(self, top_p, kept, example):
        assert set(self.draw(example.Sampler(1.0, top_p=top_p))) == kept

    def test_a_seed_repeats_itself(self, example):
        first, again, other = (
            self.draw(example.Sampler(1.0, seed=seed)).tolist() for seed in (3, 3, 4)
        )
        assert first == again != other


@pytest.mark.parametrize(
    "text", ["", "One.  Two,\n\nthree\n four's (5)!", "\n\n\n", " ", "naïve — 漢字"]
)
def test_pieces_are_the_text_again(text, example):
    vocabulary = example.Vocabulary(text)
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert len(vocabulary) == len(set(vocabulary.encode(text)))


def test_a_text_of_ones_own(example, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text("The first line\nand the\tsecond.\n \nThe  end.\n", encoding="utf-8")
    assert example.read_text(file) == "The first line and the second.\n\nThe end."
    arguments = ["The first", "--text", str(file), "--cache", "int8", "--no-comparison"]
    assert example.main(arguments) == 0
    assert capsys.readouterr().out.endswith("\n[The first] line and the second.\n")


def test_files_that_are_no_text(example, tmp_path, capsys):
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\xfd")
    for path, message in (
        (empty, "no words"),
        (binary, "can't decode"),
        (tmp_path / "none", "No such file"),
    ):
        assert example.main(["--text", str(path)]) == 2
        assert f"generate: {path}: " in (error := capsys.readouterr().err)
        assert message in error


@pytest.mark.parametrize(
    "option",
    [
        *("--context=0", "--tokens=2", "--seed=-1", "--top-k=0", "--cache=int4"),
        *("--temperature=-1", "--temperature=nan", "--top-p=2"),
    ],
)
def test_options_out_of_range(option, example, capsys):
    with pytest.raises(SystemExit, match="2"):
        example.main([option])
    assert option.split("=")[0] in capsys.readouterr().err
