"""The worked examples that this library grew out of: their printed figures, through the kernels.

`examples/from_the_notes.py` holds the inputs and the figures; it is loaded by its path, since the
examples are no package.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from checks import assert_accurate, rounding_bound
from numpy.testing import assert_allclose

import fastattn

EXAMPLE = Path(__file__).parents[1] / "examples" / "from_the_notes.py"


@pytest.fixture(scope="module")
def notes():
    """Return the example as a module."""
    spec = importlib.util.spec_from_file_location("from_the_notes", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_printed(ours, figures, decimals):
    """Assert that ours, rounded as the notes print them, are the notes' figures."""
    assert np.isfinite(ours).all()
    assert_allclose(ours, figures, rtol=0, atol=0.5001 * 10.0**-decimals)


class TestWithoutWeights:
    """Six words that are query, key and value at once."""

    def test_shares(self, notes):
        """The first row's scores over their sum, their softmax, and its weighted sum of words."""
        ours = notes.without_weights()
        assert_printed(ours.shares, [0.2241, 0.2140, 0.2113, 0.1066, 0.1026, 0.1415], 4)
        assert_printed(ours.share_weights, [0.1763, 0.1745, 0.1740, 0.1567, 0.1561, 0.1623], 4)
        assert_printed(ours.share_context, [0.4338, 0.5860, 0.5401], 4)

    def test_weights(self, notes):
        weights = notes.without_weights().weights
        assert_printed(weights[0], [0.2098, 0.2006, 0.1981, 0.1242, 0.1220, 0.1452], 4)
        assert_allclose(weights.sum(axis=-1), np.ones(6), rtol=1e-15)

    def test_context(self, notes):
        figures = [
            [0.4421, 0.5931, 0.5790],
            [0.4419, 0.6515, 0.5683],
            [0.4431, 0.6496, 0.5671],
            [0.4304, 0.6298, 0.5510],
            [0.4671, 0.5910, 0.5266],
            [0.4177, 0.6503, 0.5645],
        ]
        assert_printed(notes.without_weights().context, figures, 4)


def test_integer_words(notes):
    """Integers go in as they are and come out as float64, to all eight digits printed."""
    ours = notes.integer_words()
    assert ours.query.dtype.kind == ours.key.dtype.kind == ours.value.dtype.kind == "i"
    assert ours.output.dtype == np.float64
    assert_printed(ours.output[0], [0.98522025, 1.74174051, 0.75652026], 8)


@pytest.mark.parametrize("seed", range(5))
def test_random_projections(notes, seed):
    """The notes draw these at random: what holds for every draw is asserted."""
    query, key, value, output = notes.random_projections(seed)
    assert_allclose(
        output, notes.textbook(query, key, value), atol=rounding_bound(query, key, value)
    )
    room = rounding_bound(query, key, value)
    assert (output >= value.min(axis=0) - room).all()
    assert (output <= value.max(axis=0) + room).all()


@pytest.mark.parametrize("seed", range(5))
def test_cross_attention(notes, seed):
    """Four queries of a target read six keys and values of an input."""
    query, key, value, output = notes.cross_attention(seed)
    assert (len(query), len(key), output.shape) == (4, 6, (4, 8))
    assert_allclose(
        output, notes.textbook(query, key, value), atol=rounding_bound(query, key, value)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_of_them_in_one_batch(notes, dtype):
    """The same system as heads and batch entries: what one call gives, many give."""
    words = np.broadcast_to(notes.WORDS.astype(dtype), (2, 8, 6, 3))
    output = fastattn.attention(words, words, words, scale=1)
    assert_accurate(output, words, words, words, scale=1)
    assert (output == output[0, 0]).all()


def test_the_figures_in_the_example_are_those_of_the_notes(notes, capsys):
    """It prints every one of them beside ours, and never a difference above half a digit."""
    notes.main()
    printed = capsys.readouterr().out
    for figure in ("0.2241", "0.1763", "0.4338", "0.2098", "0.4421", "0.98522025"):
        assert f"{figure}  " in printed
    differences = [float(line.split()[-1]) for line in printed.splitlines() if "largest d" in line]
    assert len(differences) == 9
    assert max(differences) <= 0.51e-4
