"""Pictures of attention: heat maps of one head or all, a shaded sentence, block masks.

Each returns a `matplotlib.figure.Figure`: its ``savefig`` writes it, a notebook shows it. Only
`heat_map_text` returns text, for a terminal, and needs no matplotlib.
Nothing is shown from here, and no style, backend or pyplot state of the process is touched. With
`ax`, one picture is drawn into axes of the caller's, whose figure comes back.

matplotlib is loaded with the first picture: ``pip install 'fastattn[plot]'``. It draws boxes for
letters that its font lacks, such as Chinese: name a font that has them in ``rcParams``, in
``font.family`` and, for `saliency`, in ``font.monospace``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal
from unicodedata import combining, east_asian_width

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn.arguments import check_int, check_number
from fastattn.formats import as_array, common_format
from fastattn.keywords import check_range

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]
Tokens = Sequence[object]

_SHADES = "Blues"
_LOOKING, _LOOKED_AT = "query: the token that looks", "key: the token that is looked at"

# Inches. A third of an inch for each token is comfortable; pictures of long texts stop growing at
# a size that a screen or a page can show, and their labels are thinned instead.
_COMFORTABLE = 0.33
_LARGEST = 14.0
_SCALE = 0.9  # room for the scale of shades with its numbers and label

# Points. Letters do not get smaller than this: where they would touch, labels are left out.
_SMALLEST_LETTERS, _LARGEST_LETTERS = 6.0, 10.0
_LINE = 1.2  # height of a line over that of its letters
_WORD_LINE = 2.4  # the same where words are shaded boxes
_ADVANCE = 0.602  # width of a letter over its height, in the monospaced font of matplotlib
_BEGINNING, _END = 9, 6  # of a label that is too long: words often differ at their end
_LONGEST_LABEL = _BEGINNING + 1 + _END

# Letters across a text. The scale below it and its label need some width, too.
_COLUMNS, _FEWEST_COLUMNS = 88, 40


# ---------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------


def heat_map(
    weights: ArrayLike,
    queries: Tokens | None = None,
    keys: Tokens | None = None,
    *,
    vmax: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the weights of one head: a row for each query, a column for each key.

    Parameters
    ----------
    weights : array_like, (seqlen_q, seqlen_kv)
        As `attention_weights` gives them; NaN stays white.
    queries, keys : sequences of tokens, optional
        Written along rows and columns. None counts them, but queries serve as keys where there are
        as many. Where letters would touch, only every second, third ... token is written.
    vmax : float, optional
        The weight that has the darkest shade, and with it all above. None is the largest weight.
    title : str, optional
    ax : matplotlib.axes.Axes, optional
        Drawn into, in place of a new figure.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        Without matplotlib.
    TypeError
        For weights without meaning as numbers.
    ValueError
        If weights are not a matrix with at least one row and column, or the tokens are not as many.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> x = np.eye(3)
    >>> figure = fastattn.plot.heat_map(fastattn.attention_weights(x, x), ["the", "cat", "sat"])
    >>> figure.axes[0].get_ylabel()
    'query: the token that looks'
    """
    matrix = _as_weights(weights, 2)
    rows, columns = _labels(matrix, queries, keys)
    darkest = _darkest(matrix, vmax)
    if ax is None:
        height, width = (_side(n, _LARGEST) for n in matrix.shape)
        ax = _figure(
            width + _margin(rows) + _SCALE, height + _margin(columns) + _heading(title)
        ).add_subplot()
    else:
        height, width = _inches(ax)
    image = _draw_matrix(ax, matrix, darkest)
    _label(ax.xaxis, columns, matrix.shape[1], width)
    _label(ax.yaxis, rows, matrix.shape[0], height)
    ax.set_xlabel(_LOOKED_AT)
    ax.set_ylabel(_LOOKING)
    ax.set_title(title or "", parse_math=False)
    _add_scale(image, [ax], matrix, "attention weight", height, width)
    return _figure_of(ax)


def heads(
    weights: ArrayLike,
    queries: Tokens | None = None,
    keys: Tokens | None = None,
    *,
    vmax: float | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the weights of every head, side by side and in the same shades.

    Parameters
    ----------
    weights : array_like, (num_heads, seqlen_q, seqlen_kv)
        As `attention_weights` gives them for one entry of a batch.
    queries, keys : sequences of tokens, optional
        Written at the left and at the bottom, as in `heat_map`.
    vmax : float, optional
        The weight that has the darkest shade. None is the largest weight of all heads.
    title : str, optional

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError, TypeError, ValueError
        As `heat_map`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> x = np.random.default_rng(0).standard_normal((8, 5, 4))
    >>> figure = fastattn.plot.heads(fastattn.attention_weights(x, x))
    >>> [ax.get_title() for ax in figure.axes[:2]]
    ['head 0', 'head 1']
    """
    stack = _as_weights(weights, 3)
    rows, columns = _labels(stack[0], queries, keys)
    darkest = _darkest(stack, vmax)
    down, across = _grid(len(stack))
    height, width = (_side(n, max(2.0, _LARGEST / across)) for n in stack.shape[1:])
    figure = _figure(
        across * (width + 0.1) + _margin(rows) + _SCALE,
        down * (height + 0.3) + _margin(columns) + _heading(title),
    )
    panels = figure.subplots(down, across, squeeze=False).reshape(-1)
    for head, (ax, matrix) in enumerate(zip(panels, stack, strict=False)):
        image = _draw_matrix(ax, matrix, darkest)
        ax.set_title(f"head {head}", fontsize=_LARGEST_LETTERS)
        ax.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
        if head // across == down - 1:
            _label(ax.xaxis, columns, stack.shape[2], width)
            ax.tick_params(bottom=True, labelbottom=True)
        if head % across == 0:
            _label(ax.yaxis, rows, stack.shape[1], height)
            ax.tick_params(left=True, labelleft=True)
    for ax in panels[len(stack) :]:
        ax.remove()
    figure.supxlabel(_LOOKED_AT, fontsize=_LARGEST_LETTERS)
    figure.supylabel(_LOOKING, fontsize=_LARGEST_LETTERS)
    if title is not None:
        figure.suptitle(title, parse_math=False)
    _add_scale(
        image, list(panels[: len(stack)]), stack, "attention weight", down * height, across * width
    )
    return figure


def saliency(
    weights: ArrayLike,
    tokens: Tokens,
    *,
    query: int | None = None,
    vmax: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Write a text with each token in the shade of the attention it gets, the mean of all heads.

    Parameters
    ----------
    weights : array_like, (num_heads, seqlen_q, seqlen_kv) or (seqlen_q, seqlen_kv)
    tokens : sequence, of seqlen_kv tokens
        The keys, in reading order.
    query : int, optional
        Whose attention is drawn. None is the mean over all queries.
    vmax : float, optional
        The weight that has the darkest shade. None is the largest.
    title : str, optional
    ax : matplotlib.axes.Axes, optional
        Drawn into, in place of a new figure.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError, TypeError
        As `heat_map`; TypeError also for a query that is not an integer.
    ValueError
        As `heat_map`; also for a query that is no row of the weights.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> layer = fastattn.MultiHeadAttention(8, num_heads=2, rng=0)
    >>> tokens = "the cat sat".split()
    >>> x = fastattn.embed_tokens([0, 1, 2], np.eye(3, 8))
    >>> _, weights = layer(x, need_weights=True)
    >>> figure = fastattn.plot.saliency(weights, tokens)
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['the', 'cat', 'sat']
    """
    stack = _as_weights(weights, 2, 3)
    texts = _texts("tokens", tokens, stack.shape[-1])
    means = stack.reshape(-1, *stack.shape[-2:]).mean(axis=0)
    if query is not None:
        check_range("query", np.array(check_int("query", query)), 0, len(means) - 1)
    shares = means.mean(axis=0) if query is None else means[query]
    darkest = _darkest(shares, vmax)

    letters, lengths = _LARGEST_LETTERS, [_cells(text) for text in texts]
    if ax is None:
        places, columns, lines = _wrapped(lengths, _COLUMNS)
        height, width = lines * _WORD_LINE * letters / 72, columns * _ADVANCE * letters / 72
        ax = _figure(width + 0.1, height + 0.75 + _heading(title)).add_subplot()
    else:
        height, width = _inches(ax)
        places, columns, lines = _wrapped(lengths, 72 * width / (_ADVANCE * letters))
        room = min(width / columns / _ADVANCE, height / lines / _WORD_LINE)
        letters = min(letters, 72 * room)
    image = _shades(darkest)
    for (x, line), text, share in zip(places, texts, shares, strict=True):
        _draw_word(ax, x, line, text, image.to_rgba(share), letters)
    ax.set_xlim(0, 72 * width / (_ADVANCE * letters))
    ax.set_ylim(72 * height / (_WORD_LINE * letters), 0)
    ax.set_axis_off()
    ax.set_title(title or "", parse_math=False)
    whose = "all queries" if query is None else f"query {query}"
    label = f"attention from {whose}, mean of the heads"
    _add_scale(image, [ax], shares, label, height, width, orientation="horizontal")
    return _figure_of(ax)


def heat_map_text(
    weights: ArrayLike,
    queries: Tokens | None = None,
    keys: Tokens | None = None,
    *,
    columns: int = 80,
    vmax: float | None = None,
    shades: str = " ░▒▓█",
) -> str:
    """Return the weights of one head as lines of block characters: a line for each query.

    A key takes two characters, or one where two do not fit. Where one does not fit either,
    neighbouring keys share a character, which shows the largest of their weights.

    Parameters
    ----------
    weights : array_like, (seqlen_q, seqlen_kv)
        As `attention_weights` gives them; NaN stays empty.
    queries, keys : sequences of tokens, optional
        As for `heat_map`; those of the keys are read downwards.
    columns : int, optional
        Width of the lines.
    vmax : float, optional
        The weight that has the darkest shade, and with it all above. None is the largest weight.
    shades : str, optional
        Characters from no weight to the darkest: ``" .:*#"`` where there are only plain ones.

    Returns
    -------
    str

    Raises
    ------
    TypeError
        For weights without meaning as numbers.
    ValueError
        As `heat_map`; also if `columns` leave no room beside the queries, or for fewer than two
        shades.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> x = 3 * np.eye(3)
    >>> weights = fastattn.attention_weights(x, x, causal=True)
    >>> print(fastattn.plot.heat_map_text(weights, ["the", "cat", "sat"], shades=" .:*#"))
        t c s
        h a a
        e t t
    the ##
    cat ..##
    sat ....##
    ' ' 0   '#' 0.75 to 1
    """
    matrix = _as_weights(weights, 2)
    rows, names = (
        [str(n) for n in range(count)] if labels is None else labels
        for labels, count in zip(_labels(matrix, queries, keys), matrix.shape, strict=True)
    )
    darkest = _darkest(matrix, vmax)
    if len(shades) < 2:
        raise ValueError(f"shades must be at least 2 characters: got {shades!r}")
    margin = max(map(_cells, rows)) + 1
    room = check_int("columns", columns) - margin
    if room < 1:
        raise ValueError(f"columns must be more than {margin}, beside the queries: got {columns}")

    together = math.ceil(len(names) / room)
    width = 2 if 2 * len(names) <= room else 1
    starts = range(0, len(names), together)
    largest = np.maximum.reduceat(np.nan_to_num(matrix), starts, axis=1)
    steps = np.ceil(np.clip(largest / darkest, 0, 1) * (len(shades) - 1)).astype(int)
    heading = [names[start] for start in starts]
    deepest = max(map(len, heading))
    lines = [
        " " * margin + "".join(letter + " " * (width - _cells(letter)) for letter in letters)
        for letters in zip(*(name.rjust(deepest) for name in heading), strict=True)
    ]
    lines += [
        " " * (margin - 1 - _cells(row))
        + f"{row} "
        + "".join(shades[step] * width for step in line)
        for row, line in zip(rows, steps, strict=True)
    ]
    if together > 1:
        lines.append(f"{together} keys in a column, which is named after the first of them")
    above = darkest * (len(shades) - 2) / (len(shades) - 1)
    lines.append(f"{shades[0]!r} 0   {shades[-1]!r} {above:.2g} to {darkest:.2g}")
    return "\n".join(line.rstrip() for line in lines)


# ---------------------------------------------------------------------------
# Block masks
# ---------------------------------------------------------------------------

_STATES = ("skip", "partial", "full")
_STATE_COLOURS = ("#f2f2f2", "#9ecae1", "#08519c")


def block_mask(
    mask: Any,
    *,
    batch: int = 0,
    head: int = 0,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw which blocks of scores are skipped, looked at element by element, or computed whole.

    Parameters
    ----------
    mask : BlockMask or array_like of integers, (num_q_blocks, num_kv_blocks)
        0 is skip, 1 partial, 2 full. Of a BlockMask, its `states`.
    batch, head : int
        Which part of a BlockMask; one that serves all is drawn for each.
    title : str, optional
    ax : matplotlib.axes.Axes, optional
        Drawn into, in place of a new figure.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        Without matplotlib.
    TypeError
        For states that are not integers.
    ValueError
        For states other than 0, 1 and 2, of another shape, or a batch or head out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> figure = fastattn.plot.block_mask(np.tri(4, dtype=int) + np.tri(4, k=-1, dtype=int))
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['skip 37.5%', 'partial 25.0%', 'full 37.5%']
    """
    states = _block_states(mask, batch, head)
    if ax is None:
        height, width = (min(_side(n, _LARGEST), 8.0) for n in states.shape)
        ax = _figure(width + 2.2, height + 0.6 + _heading(title)).add_subplot()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    ax.imshow(
        states,
        cmap=ListedColormap(_STATE_COLOURS),
        vmin=0,
        vmax=2,
        interpolation="nearest",
        aspect=_aspect(states),
    )
    if max(states.shape) <= 40:
        # White lines between the blocks, where blocks are large enough to tell apart.
        ax.set_xticks(np.arange(states.shape[1] + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(states.shape[0] + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="white", linewidth=1)
        ax.tick_params(which="minor", bottom=False, left=False)
    for axis in (ax.xaxis, ax.yaxis):
        _label(axis, None, 0, 0)
    ax.set_xlabel("block of keys")
    ax.set_ylabel("block of queries")
    ax.set_title(title or "", parse_math=False)
    counts = np.bincount(states.reshape(-1), minlength=3) / states.size
    ax.legend(
        handles=[
            Patch(facecolor=colour, edgecolor="#999999", label=f"{name} {share:.1%}")
            for name, colour, share in zip(_STATES, _STATE_COLOURS, counts, strict=True)
        ],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
    )
    return _figure_of(ax)


def _block_states(mask: Any, batch: int, head: int) -> Array:
    states = as_array("mask", getattr(mask, "states", mask))
    if states.dtype.kind not in "iu":
        raise TypeError(f"mask must be a BlockMask or integers: got {states.dtype}")
    if hasattr(mask, "states"):
        for name, index, count in zip(("batch", "head"), (batch, head), states.shape, strict=False):
            if count != 1:
                check_range(name, np.array(check_int(name, index)), 0, count - 1)
            states = states[index if count != 1 else 0]
    if states.ndim != 2 or states.size == 0:
        raise ValueError(
            f"mask must have shape (num_q_blocks, num_kv_blocks): got shape {states.shape}"
        )
    check_range("mask", states, 0, 2)
    return states


# ---------------------------------------------------------------------------
# Figures and axes
# ---------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "fastattn.plot needs the package matplotlib: pip install 'fastattn[plot]'"
        ) from error
    return Figure(figsize=(width, height), dpi=150, layout="compressed")


def _figure_of(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def _inches(ax: Axes) -> tuple[float, float]:
    """Return the height and width of axes."""
    box = ax.get_window_extent()
    dpi = _figure_of(ax).dpi
    return box.height / dpi, box.width / dpi


def _side(n: int, largest: float) -> float:
    return min(max(_COMFORTABLE * n, 2.0), largest)


def _heading(title: str | None) -> float:
    """Return the inches above a picture."""
    return 0.1 if title is None else 0.4


def _grid(count: int) -> tuple[int, int]:
    """Return rows and columns for so many panels: nearly square, without holes where it can be."""
    across = math.ceil(math.sqrt(count))
    full = [n for n in range(across, min(2 * across, 6) + 1) if count % n == 0]
    across = full[0] if full else across
    return math.ceil(count / across), across


def _aspect(matrix: Array) -> Literal["equal", "auto"]:
    """Square cells, but not for a long strip, which would be a thread."""
    return "equal" if max(matrix.shape) <= 6 * min(matrix.shape) else "auto"


def _draw_matrix(ax: Axes, matrix: Array, darkest: float) -> Any:
    return ax.imshow(
        matrix,
        cmap=_SHADES,
        vmin=0.0,
        vmax=darkest,
        interpolation="nearest",
        aspect=_aspect(matrix),
    )


def _shades(darkest: float) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(0.0, darkest), _SHADES)


def _add_scale(
    image: Any,
    axes: list[Axes],
    weights: Array,
    label: str,
    height: float,
    width: float,
    orientation: str = "vertical",
) -> None:
    """Add the scale of shades beside axes that fill an area, pointed where weights go beyond it."""
    darkest = image.norm.vmax
    beyond = bool((weights > darkest).any())
    thick, shrink = 0.18, 0.8
    along, over = (height, width) if orientation == "vertical" else (width, height)
    _figure_of(axes[0]).colorbar(
        image,
        ax=axes,
        label=f"{label}\n(darkest: {darkest:.2g} and more)" if beyond else label,
        extend="max" if beyond else "neither",
        orientation=orientation,
        fraction=min(0.5, thick / over),
        shrink=shrink,
        aspect=shrink * along / thick,
    )


def _draw_word(
    ax: Axes, x: float, line: float, text: str, colour: tuple[float, ...], letters: float
) -> None:
    from matplotlib.patches import Rectangle

    width = _cells(text) + 1.0
    ax.add_patch(Rectangle((x, line + 0.1), width, 0.8, facecolor=colour, edgecolor="none"))
    dark = np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.5
    ax.text(
        x + width / 2,
        line + 0.5,
        text,
        color="white" if dark else "black",
        ha="center",
        va="center",
        family="monospace",
        fontsize=letters,
        parse_math=False,
    )


def _wrapped(lengths: Sequence[int], widest: float) -> tuple[list[tuple[float, int]], float, int]:
    """Return (x, line) of words of the given lengths, and the columns and lines, in letters."""
    places = []
    x, line, columns = 0.0, 0, float(_FEWEST_COLUMNS)
    for length in lengths:
        if x and x + length + 1 > widest:
            x, line = 0.0, line + 1
        places.append((x, line))
        x += length + 1.5
        columns = max(columns, x)
    return places, columns, line + 1


# ---------------------------------------------------------------------------
# Numbers and labels
# ---------------------------------------------------------------------------


def _as_weights(weights: ArrayLike, *ndims: int) -> Array:
    """Return weights in float64, with one of the given numbers of axes."""
    x = as_array("weights", weights)
    common_format(("weights",), (x,))
    if x.ndim not in ndims or x.size == 0:
        shape = " or ".join(
            "(num_heads, seqlen_q, seqlen_kv)" if n == 3 else "(seqlen_q, seqlen_kv)" for n in ndims
        )
        raise ValueError(f"weights must have shape {shape} and not be empty: got {x.shape}")
    return x.astype(np.float64)


def _darkest(weights: Array, vmax: float | None) -> float:
    """Return the weight of the darkest shade; any will do where all are 0 or NaN."""
    if vmax is not None:
        return check_number("vmax", vmax, above=0)
    finite = weights[np.isfinite(weights)]
    return float(finite.max(initial=0.0)) or 1.0


def _labels(
    matrix: Array, queries: Tokens | None, keys: Tokens | None
) -> tuple[list[str] | None, list[str] | None]:
    seqlen_q, seqlen_kv = matrix.shape
    rows = None if queries is None else _texts("queries", queries, seqlen_q)
    if keys is not None:
        return rows, _texts("keys", keys, seqlen_kv)
    return rows, rows if seqlen_q == seqlen_kv else None


def _texts(name: str, tokens: Tokens, count: int) -> list[str]:
    """Return tokens as they are written: no control characters, long ones without their middle."""
    if len(tokens) != count:
        raise ValueError(
            f"{name} must have as many tokens as weights have: got {len(tokens)} and {count}"
        )
    texts = [
        "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(token)) for token in tokens
    ]
    return [
        text if len(text) <= _LONGEST_LABEL else f"{text[:_BEGINNING]}…{text[-_END:]}"
        for text in texts
    ]


def _cells(text: str) -> int:
    """Return how many letters of a monospaced font are as wide: Chinese ones count twice."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def _margin(labels: list[str] | None) -> float:
    """Return the inches that labels take, and those of what is written beside them."""
    longest = max(map(len, labels or ["000"]))
    return 0.5 + longest * _ADVANCE * _LARGEST_LETTERS / 72


def _label(axis: Any, labels: list[str] | None, count: int, inches: float) -> None:
    """Write the labels of an axis, as many as have room; number it where there are none."""
    if labels is None:
        from matplotlib.ticker import MaxNLocator

        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return
    room = 72 * inches / count
    letters = min(max(0.7 * room, _SMALLEST_LETTERS), _LARGEST_LETTERS)
    every = max(1, math.ceil(_LINE * letters / room))
    axis.set_ticks(range(0, count, every), labels[::every], fontsize=letters, parse_math=False)
    if axis.axis_name == "x":
        axis.set_tick_params(rotation=90)
