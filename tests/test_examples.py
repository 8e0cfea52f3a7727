"""The example of an encoder runs, prints what it computes and writes its picture.

`test_notes.py` holds the worked notes to their figures, `test_generate.py` the decoder to the
tokens of recomputation.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checks import assert_same_bits

import fastattn

EXAMPLE = Path(__file__).parents[1] / "examples" / "transformer_encoder.py"


@pytest.fixture(scope="module")
def example():
    """Return the example as a module."""
    spec = importlib.util.spec_from_file_location("transformer_encoder", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_as_a_program(tmp_path):
    run = subprocess.run(
        [sys.executable, EXAMPLE], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("12 words: (12, 64) -> weights (8, 12, 12) -> (12, 64)\n")
    assert '"the" at 0 and at 5: ' in run.stdout
    assert run.stderr == ""
    assert (tmp_path / "saliency.png").read_bytes().startswith(b"\x89PNG")


def test_a_sentence_and_a_picture_of_ones_own(example, tmp_path, capsys):
    picture = tmp_path / "mine.png"
    assert example.main(["Some words some WORDS", "--picture", str(picture), "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 words: ")
    assert printed.endswith(f"saliency map: {picture}\n")
    assert picture.exists()


def test_a_seed_repeats_itself(example):
    first, second = example.encode("the cat saw the cat"), example.encode("the cat saw the cat")
    assert_same_bits(first.output, second.output)
    assert not np.array_equal(first.output, example.encode("the cat saw the cat", seed=1).output)


def test_equal_words_differ_by_their_positions(example):
    sentence = example.encode("the cat saw the cat")
    positions = fastattn.sinusoidal_positions(5, example.FEATURES)
    apart = sentence.embedded[4] - sentence.embedded[1]
    np.testing.assert_allclose(apart, positions[4] - positions[1], atol=1e-6)
    np.testing.assert_allclose(sentence.weights.sum(axis=-1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([" "], "must have a word"), (["a word", "--picture", "no/such/folder.png"], "no/such")],
)
def test_what_cannot_be_done(arguments, message, example, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert example.main(arguments) == 2
    assert message in capsys.readouterr().err
