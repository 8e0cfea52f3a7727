"""Pictures: what is in them, that they can be read, and that the process stays as it was."""

import subprocess
import sys
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
from checks import BFLOAT16
from matplotlib.figure import Figure
from numpy.testing import assert_array_equal

from fastattn import plot

SIX = ["the", "cat", "saw", "the", "other", "cat"]
LONG = [f"{word}{n}" for n, word in enumerate(SIX * 34)][:200]


def some_weights(rng, *shape):
    """Return rows that sum to 1, as attention's do."""
    weights = rng.random(shape)
    return weights / weights.sum(axis=-1, keepdims=True)


class Blocks:
    """What a picture asks of a BlockMask."""

    def __init__(self, states):
        self.states = np.asarray(states, np.int8)


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def drawn(figure, tmp_path):
    """Draw and save a figure as a caller would, and return it."""
    assert isinstance(figure, Figure)
    path = tmp_path / "picture.png"
    figure.savefig(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    return figure


def shown_labels(axis):
    """Return the labels that are drawn: those within the view."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    both_sides = (label for tick in ticks for label in (tick.label1, tick.label2))
    return [label for label in both_sides if label.get_visible() and label.get_text()]


def assert_readable(figure):
    """Assert that all stays inside of the figure, and that the labels of an axis keep apart."""
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.01, box
    for axis in (axis for ax in figure.axes if ax.axison for axis in (ax.xaxis, ax.yaxis)):
        own = shown_labels(axis)
        assert all(label.get_fontsize() >= 6 for label in own)
        for one, following in pairwise(label.get_window_extent() for label in own):
            assert not one.overlaps(following)


# ---------------------------------------------------------------------------
# What is in the pictures
# ---------------------------------------------------------------------------


class TestHeatMap:
    def test_rows_are_queries(self, rng, tmp_path):
        weights = some_weights(rng, 3, 6)
        ax = drawn(plot.heat_map(weights, ["a", "b", "c"], SIX, title="mine"), tmp_path).axes[0]
        (image,) = ax.images
        assert_array_equal(image.get_array(), weights)
        assert (labels(ax.yaxis), labels(ax.xaxis)) == (["a", "b", "c"], SIX)
        assert ax.yaxis_inverted(), "the first query stands at the top"
        assert ax.get_ylabel().startswith("query")
        assert ax.get_xlabel().startswith("key")
        assert ax.get_title() == "mine"

    def test_queries_serve_as_keys(self, rng):
        ax = plot.heat_map(some_weights(rng, 6, 6), SIX).axes[0]
        assert labels(ax.xaxis) == labels(ax.yaxis) == SIX

    def test_numbers_where_there_are_no_tokens(self, rng, tmp_path):
        ax = drawn(plot.heat_map(some_weights(rng, 6, 9), SIX), tmp_path).axes[0]
        assert {"0", "8"} <= set(labels(ax.xaxis))
        assert labels(ax.yaxis) == SIX

    @pytest.mark.parametrize(("vmax", "darkest"), [(None, 0.75), (0.5, 0.5), (1, 1)])
    def test_shades(self, vmax, darkest):
        figure = plot.heat_map([[0.25, 0.75], [0.5, 0.5]], vmax=vmax)
        (image,), scale = figure.axes[0].images, figure.axes[1]
        assert image.get_clim() == (0, darkest)
        beyond = darkest < 0.75
        assert ("and more" in scale.get_ylabel()) == beyond

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, BFLOAT16, np.int64, np.bool_])
    def test_dtypes(self, dtype, tmp_path):
        drawn(plot.heat_map(np.eye(4).astype(dtype), SIX[:4]), tmp_path)

    @pytest.mark.parametrize("fill", [0.0, np.nan])
    def test_nothing_to_see(self, fill, tmp_path):
        drawn(plot.heat_map(np.full((2, 3), fill)), tmp_path)

    def test_a_row_of_a_long_context(self, rng, tmp_path):
        figure = drawn(plot.heat_map(some_weights(rng, 1, 200), ["it"], LONG), tmp_path)
        assert figure.get_figheight() > 2.5
        assert_readable(figure)


class TestHeads:
    @pytest.mark.parametrize("num_heads", [1, 2, 5, 7, 8, 12, 16])
    def test_every_head_once(self, num_heads, rng, tmp_path):
        weights = some_weights(rng, num_heads, 6, 6)
        figure = drawn(plot.heads(weights, SIX, title="layer 3"), tmp_path)
        *panels, scale = figure.axes
        assert [ax.get_title() for ax in panels] == [f"head {h}" for h in range(num_heads)]
        for ax, matrix in zip(panels, weights, strict=True):
            assert_array_equal(ax.images[0].get_array(), matrix)
            assert ax.images[0].get_clim() == (0, weights.max())
        assert scale.get_ylabel() == "attention weight"
        assert figure.get_suptitle() == "layer 3"
        assert_readable(figure)

    @pytest.mark.parametrize(
        ("num_heads", "grid"),
        [(1, (1, 1)), (6, (2, 3)), (7, (3, 3)), (8, (2, 4)), (12, (3, 4)), (32, (6, 6))],
    )
    def test_grid(self, num_heads, grid):
        assert plot._grid(num_heads) == grid


class TestSaliency:
    def test_means_over_heads_and_queries(self, rng, tmp_path):
        weights = some_weights(rng, 4, 6, 6)
        for query, shares in ((None, weights.mean(axis=(0, 1))), (2, weights[:, 2].mean(axis=0))):
            figure = drawn(plot.saliency(weights, SIX, query=query), tmp_path)
            ax, scale = figure.axes
            assert [text.get_text() for text in ax.texts] == SIX
            shades = [patch.get_facecolor() for patch in ax.patches]
            expected = mpl.colormaps["Blues"](shares / shares.max())
            np.testing.assert_allclose(shades, expected)
            whose = "all queries" if query is None else "query 2"
            assert scale.get_xlabel() == f"attention from {whose}, mean of the heads"

    def test_one_head(self, rng):
        weights = some_weights(rng, 6, 6)
        one, stack = plot.saliency(weights, SIX), plot.saliency(weights[None], SIX)
        for left, right in zip(one.axes[0].patches, stack.axes[0].patches, strict=True):
            assert left.get_facecolor() == right.get_facecolor()

    def test_words_stand_in_reading_order_and_apart(self, rng, tmp_path):
        figure = drawn(plot.saliency(some_weights(rng, 2, 200, 200), LONG), tmp_path)
        boxes = [patch.get_extents() for patch in figure.axes[0].patches]
        for one, following in pairwise(boxes):
            same_line = abs(one.y0 - following.y0) < 1
            assert following.x0 > one.x1 if same_line else following.y1 < one.y0
        for patch, text in zip(figure.axes[0].patches, figure.axes[0].texts, strict=True):
            word = text.get_window_extent()
            assert patch.get_extents().padded(1).containsx(word.x0)
            assert patch.get_extents().padded(1).containsx(word.x1)


class TestBlockMask:
    STATES = np.array([[1, 0, 0], [2, 1, 0]])

    def test_states_and_shares(self, tmp_path):
        figure = drawn(plot.block_mask(self.STATES, title="causal"), tmp_path)
        (ax,) = figure.axes
        assert_array_equal(ax.images[0].get_array(), self.STATES)
        shares = [text.get_text() for text in ax.get_legend().get_texts()]
        assert shares == ["skip 50.0%", "partial 33.3%", "full 16.7%"]
        assert ax.get_title() == "causal"
        assert_readable(figure)

    def test_three_shades(self):
        image = plot.block_mask(self.STATES).axes[0].images[0]
        shades = image.to_rgba(np.array([0, 1, 2]))
        assert len(np.unique(shades, axis=0)) == 3

    def test_part_of_a_block_mask(self, rng):
        states = rng.integers(0, 3, (2, 4, 3, 5))
        image = plot.block_mask(Blocks(states), batch=1, head=2).axes[0].images[0]
        assert_array_equal(image.get_array(), states[1, 2])

    def test_one_for_all(self):
        """A BlockMask of one batch entry or head serves every other."""
        image = plot.block_mask(Blocks(self.STATES[None, None]), batch=7, head=3).axes[0].images[0]
        assert_array_equal(image.get_array(), self.STATES)


# ---------------------------------------------------------------------------
# Every picture
# ---------------------------------------------------------------------------


def pictures(rng, tokens, **keywords):
    """Return each picture of as many tokens, with blocks for tokens where there are none."""
    n = len(tokens)
    yield plot.heat_map(some_weights(rng, n, n), tokens, **keywords)
    yield plot.saliency(some_weights(rng, 3, n, n), tokens, **keywords)
    yield plot.block_mask(np.tri(n, dtype=int), **keywords)


@pytest.mark.parametrize("title", [None, "a title"])
@pytest.mark.parametrize("tokens", [["one"], SIX, LONG[:31], LONG], ids=len)
def test_readable(tokens, title, rng):
    for figure in pictures(rng, tokens, title=title):
        assert max(figure.get_size_inches()) < 20
        assert_readable(figure)


@pytest.mark.parametrize("tokens", [["one"], SIX, LONG], ids=len)
def test_heads_are_readable(tokens, rng):
    figure = plot.heads(some_weights(rng, 8, len(tokens), len(tokens)), tokens)
    assert max(figure.get_size_inches()) < 20
    assert_readable(figure)


def test_tokens_are_written_as_they_are(rng, tmp_path):
    """No mathematics between dollars, no line breaks, no endless words."""
    tokens = ["$x$", "a\nb", "", "w" * 40 + "1", 7, "\ud800"]
    written = ["$x$", r"a\nb", "", "w" * 9 + "…" + "w" * 5 + "1", "7", r"\ud800"]
    weights = some_weights(rng, 6, 6)
    for figure in (plot.heat_map(weights, tokens), plot.heads(weights[None], tokens)):
        assert labels(drawn(figure, tmp_path).axes[0].xaxis) == written
    figure = drawn(plot.saliency(weights, tokens, title="$a$ and $b$"), tmp_path)
    assert [text.get_text() for text in figure.axes[0].texts] == written
    assert not figure.axes[0].title.get_parse_math()


def test_wide_letters_take_two_places(rng):
    """Chinese words have boxes as wide as they are, and do not shift the rows of a terminal."""
    weights = some_weights(rng, 2, 2)
    boxes = plot.saliency(weights, ["日本語", "cat"]).axes[0].patches
    assert [box.get_width() for box in boxes] == [7, 4]
    lines = plot.heat_map_text(np.ones((2, 2)), ["日本", "cat"]).splitlines()
    assert lines[:5] == ["       c", "     日a", "     本t", "日本 ████", " cat ████"]


def test_axes_of_the_caller(rng, tmp_path):
    figure = Figure(figsize=(12, 9))
    axes = figure.subplots(2, 2).reshape(-1)
    weights = some_weights(rng, 6, 6)
    assert plot.heat_map(weights, SIX, ax=axes[0]) is figure
    assert plot.saliency(weights, SIX, ax=axes[1]) is figure
    assert plot.block_mask(np.tri(6, dtype=int), ax=axes[2]) is figure
    assert plot.saliency(some_weights(rng, 2, 200, 200), LONG, ax=axes[3]) is figure
    drawn(figure, tmp_path)
    assert len(axes[0].images) == len(axes[2].images) == 1
    assert [text.get_text() for text in axes[1].texts] == SIX
    bottom = axes[3].get_window_extent().y0
    assert all(patch.get_extents().y0 >= bottom - 1 for patch in axes[3].patches)


def test_nothing_of_the_process_changes():
    """No pyplot, no backend chosen, no style set; nothing is loaded before the first picture."""
    code = """
import sys
import fastattn
assert not any(name.startswith("matplotlib") for name in sys.modules)
import matplotlib
def style():
    return [*dict.items(matplotlib.rcParams)]  # to read one by one would choose a backend
before = style()
import numpy as np
tokens = ["a", "b"]
fastattn.plot.heat_map(np.eye(2), tokens)
fastattn.plot.heads(np.eye(2)[None], tokens)
fastattn.plot.saliency(np.eye(2), tokens)
fastattn.plot.block_mask(np.eye(2, dtype=int))
assert style() == before
assert matplotlib.get_backend(auto_select=False) is None
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "picture",
    [
        lambda: plot.heat_map(np.eye(2)),
        lambda: plot.heads(np.eye(2)[None]),
        lambda: plot.saliency(np.eye(2), ["a", "b"]),
        lambda: plot.block_mask(np.eye(2, dtype=int)),
    ],
    ids=["heat_map", "heads", "saliency", "block_mask"],
)
def test_without_matplotlib(picture, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'fastattn\[plot\]'$"):
        picture()


# ---------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------

EYE, EYES = np.eye(3), np.ones((2, 3, 3))

ERRORS = [
    (plot.heat_map, (EYES,), {}, ValueError,
     r"^weights must have shape \(seqlen_q, seqlen_kv\) and not be empty: got \(2, 3, 3\)$"),
    (plot.heat_map, (np.ones((0, 3)),), {}, ValueError, r"^weights must have .*: got \(0, 3\)$"),
    (plot.heat_map, (EYE * 1j,), {}, TypeError, r"^weights must be float16.*: got complex128$"),
    (plot.heat_map, (EYE, ["a"]), {}, ValueError,
     r"^queries must have as many tokens as weights have: got 1 and 3$"),
    (plot.heat_map, (EYE, None, list("abcd")), {}, ValueError, r"^keys must have .*: got 4 and 3$"),
    (plot.heat_map, (EYE,), {"vmax": 0}, ValueError, r"^vmax must be .* greater than 0: got 0$"),
    (plot.heat_map, (EYE,), {"vmax": "1"}, TypeError, r"^vmax must be a real number: got '1'"),
    (plot.heads, (EYE,), {}, ValueError,
     r"^weights must have shape \(num_heads, seqlen_q, seqlen_kv\) and .*: got \(3, 3\)$"),
    (plot.saliency, (EYES[0, 0], ["a"] * 3), {}, ValueError,
     r"^weights must have shape \(seqlen_q, .*\) or \(num_heads, .*\) and .*: got \(3,\)$"),
    (plot.saliency, (EYE, ["a"] * 2), {}, ValueError, r"^tokens must have .*: got 2 and 3$"),
    (plot.saliency, (EYE, ["a"] * 3), {"query": 3}, ValueError,
     r"^query must lie between 0 and 2: got 3$"),
    (plot.saliency, (EYE, ["a"] * 3), {"query": -1}, ValueError, r"^query must lie between"),
    (plot.saliency, (EYE, ["a"] * 3), {"query": 1.0}, TypeError, r"^query must be an int: got 1"),
    (plot.block_mask, (EYE,), {}, TypeError, r"^mask must be a BlockMask or integers: got float64"),
    (plot.block_mask, ([[0, 3]],), {}, ValueError, r"^mask must lie between 0 and 2: got 0 to 3$"),
    (plot.block_mask, ([0, 1],), {}, ValueError,
     r"^mask must have shape \(num_q_blocks, num_kv_blocks\): got shape \(2,\)$"),
    (plot.block_mask, (Blocks(EYES[None]),), {"batch": 0, "head": 2}, ValueError,
     r"^head must lie between 0 and 1: got 2$"),
    (plot.block_mask, (Blocks(EYES[:, None]),), {"batch": -1}, ValueError,
     r"^batch must lie between 0 and 1: got -1$"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "keywords", "error", "message"), ERRORS)
def test_error(function, arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        function(*arguments, **keywords)
