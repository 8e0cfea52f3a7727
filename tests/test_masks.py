"""Masks that are functions: their blocks, the mask_mods to build them from, and their compilation.

The blocks are held to the whole mask, made by asking the function of every score in Python.
"""

import functools
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from fastattn.kernels import custom
from fastattn.kernels.fingerprint import fingerprint
from hypothesis import given
from hypothesis import strategies as st
from numba import njit
from numpy.testing import assert_array_equal

import fastattn
from fastattn import BlockMask, create_block_mask, masks

SEGMENTS = np.repeat(np.arange(9), [3, 1, 20, 40, 1, 1, 60, 7, 67])
MASK_MODS = {
    "causal": masks.causal(),
    "causal, offset": masks.causal(-30),
    "window": masks.window(17, 3),
    "window, one side": masks.window(None, 0, 5),
    "document": masks.document(SEGMENTS),
    "documents of a batch": masks.document(np.stack([SEGMENTS, SEGMENTS[::-1]])),
    "prefix": masks.prefix_lm(70),
    "prefixes of a batch": masks.prefix_lm([0, 130], offset=2),
    "and": masks.and_masks(masks.causal(), masks.document(SEGMENTS), masks.window(50, 0)),
    "or": masks.or_masks(masks.document(SEGMENTS), masks.window(5, 5)),
    "nothing": lambda b, h, i, j: False,
    "everything": lambda b, h, i, j: True,
    "heads": njit(lambda b, h, i, j: (i + j * h + b) % 64 != 3),
}


def whole_mask(mask_mod, shape):
    """Return what a mask_mod says of every score, asked in Python."""
    if isinstance(mask_mod, functools.partial):
        ask = mask_mod
    else:
        ask = getattr(mask_mod, "py_func", mask_mod)
    return np.frompyfunc(ask, 4, 1)(*np.ogrid[tuple(map(slice, shape))]).astype(bool)


def states_of(mask, block_q, block_kv):
    """Return 0, 1 or 2 for every block of a whole mask."""
    q, kv = (
        np.arange(0, n, size) for n, size in zip(mask.shape[-2:], (block_q, block_kv), strict=True)
    )
    some = np.logical_or.reduceat(np.logical_or.reduceat(mask, q, -2), kv, -1)
    every = np.logical_and.reduceat(np.logical_and.reduceat(mask, q, -2), kv, -1)
    return some.astype(np.int8) + every


class TestCreate:
    @pytest.mark.parametrize(
        "block_size", [(128, 128), (64, 128), (32, 64), (100, 30), (7, 1)], ids=str
    )
    @pytest.mark.parametrize("mask_mod", MASK_MODS.values(), ids=MASK_MODS)
    def test_states(self, mask_mod, block_size):
        shape = (2, 2, 150, 200)
        block_mask = create_block_mask(mask_mod, *shape, block_size=block_size)
        assert (block_mask.shape, block_mask.block_size) == (shape, block_size)
        assert block_mask.states.dtype == np.int8
        assert_array_equal(block_mask.states, states_of(whole_mask(mask_mod, shape), *block_size))

    @pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 64, 65), (3, 1, 33, 129)], ids=str)
    def test_shapes(self, shape):
        block_mask = create_block_mask(masks.window(9, 0), *shape, block_size=16)
        mask = whole_mask(masks.window(9, 0), shape)
        assert_array_equal(block_mask.states, states_of(mask, 16, 16))

    @pytest.mark.parametrize(
        "shape", [(0, 1, 5, 5), (1, 0, 5, 5), (1, 1, 0, 5), (1, 1, 5, 0)], ids=str
    )
    def test_empty(self, shape):
        block_mask = create_block_mask(masks.causal(), *shape)
        assert (block_mask.states.size, block_mask.sparsity) == (0, 0.0)
        assert "sparsity" in str(block_mask)

    def test_threads(self):
        before = fastattn.get_num_threads()
        states = []
        try:
            for n in (1, before):
                fastattn.set_num_threads(n)
                states.append(
                    create_block_mask(masks.document(SEGMENTS), 1, 5, 200, 200, 16).states
                )
        finally:
            fastattn.set_num_threads(before)
        assert_array_equal(*states)

    def test_memory(self):
        """32768 x 32768 scores would take a gigabyte."""
        create_block_mask(masks.causal(), 1, 1, 1, 1)
        tracemalloc.start()
        create_block_mask(masks.window(64, 0), 1, 1, 2**15, 2**15)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()

    @given(
        lengths=st.tuples(st.integers(1, 90), st.integers(1, 140)),
        block_size=st.tuples(st.integers(1, 50), st.integers(1, 100)),
        numbers=st.tuples(st.integers(1, 9), st.integers(0, 8), st.integers(-40, 40)),
    )
    def test_any_size(self, lengths, block_size, numbers):
        mask_mod = functools.partial(_striped, *numbers)
        block_mask = create_block_mask(mask_mod, 1, 1, *lengths, block_size=block_size)
        mask = whole_mask(mask_mod, (1, 1, *lengths))
        assert_array_equal(block_mask.states, states_of(mask, *block_size))


def _striped(every, least, offset, b, h, i, j):
    return (i // 8 + j // 16) % every >= least or j < offset


class TestBlockMask:
    def test_picture(self):
        block_mask = create_block_mask(masks.causal(), 1, 1, 300, 256)
        assert repr(block_mask) == (
            "BlockMask(shape=(1, 1, 300, 256), block_size=(128, 128), sparsity=0.17)"
        )
        assert str(block_mask).splitlines()[1:] == ["░░", "██░░", "████"]

    def test_picture_of_many_blocks(self):
        lines = str(create_block_mask(masks.causal(), 1, 1, 1000, 1000, block_size=5)).splitlines()
        assert 16 < len(lines) <= 33
        assert lines[1:3] == ["░░", "██░░"]

    def test_frozen(self):
        block_mask = create_block_mask(masks.causal(), 1, 1, 5, 5)
        with pytest.raises(AttributeError):
            block_mask.states = None
        with pytest.raises(ValueError, match="read-only"):
            block_mask.states[...] = 0

    def test_states_of_another_shape_are_refused(self):
        with pytest.raises(
            ValueError, match=r"^states must have shape \(1, 2, 3, 2\): got \(1, 2\)$"
        ):
            BlockMask(np.zeros((1, 2)), (2, 4), (1, 2, 5, 7), masks.causal())


class TestCompilation:
    @pytest.fixture
    def compiled(self, monkeypatch):
        """Return the names of what is compiled, or loaded, while a test runs."""
        names = []
        make = custom._mask_tile

        def counting(*arguments):
            names.append(arguments[-2])
            return make(*arguments)

        monkeypatch.setattr(custom, "_mask_tile", counting)
        return names

    def test_another_length_or_document_compiles_nothing(self, compiled):
        for n in range(5):
            create_block_mask(masks.window(n, 1), 1, 1, 9, 9)
            create_block_mask(masks.document(np.arange(30) // (n + 1)), 1, 1, 9, 9)
            create_block_mask(masks.and_masks(masks.causal(n), masks.prefix_lm(n)), 1, 1, 9, 9)
        assert len(compiled) <= 3

    def test_the_same_closure_made_again_compiles_nothing(self, compiled):
        def make(n):
            return lambda b, h, i, j: j < i + n * 1001

        for n in (5, 5, 6, 5, 6):
            create_block_mask(make(n), 1, 1, 9, 9)
        assert len(compiled) == 2

    def test_held_arrays_are_read_when_called(self):
        segments = np.zeros((1, 6), np.int64)
        mask_mod = functools.partial(_same, segments)
        assert create_block_mask(mask_mod, 1, 1, 6, 6).states.item() == 2
        segments[0, 3:] = 1
        assert create_block_mask(mask_mod, 1, 1, 6, 6).states.item() == 1

    @pytest.mark.parametrize("view", [np.s_[::2], np.s_[::-1], np.s_[3:]], ids=str)
    def test_held_arrays_may_have_any_strides(self, view):
        held = np.arange(40)[view] // 6
        mask_mod = functools.partial(_same, held[None])
        n = held.size
        expected = states_of(whole_mask(mask_mod, (1, 1, n, n)), 4, 4)
        assert_array_equal(create_block_mask(mask_mod, 1, 1, n, n, 4).states, expected)

    def test_plain_functions_that_it_calls_are_jitted_too(self):
        block_mask = create_block_mask(_calls_another, 1, 1, 8, 8, 2)
        assert_array_equal(
            block_mask.states, states_of(whole_mask(_calls_another, (1, 1, 8, 8)), 2, 2)
        )

    def test_code_is_kept_on_disk(self, tmp_path, monkeypatch):
        """A second process loads what the first compiled, and a changed constant is other code."""
        monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
        for number, new in ((3, True), (3, False), (4, True)):
            before = kept(tmp_path)
            subprocess.run([sys.executable, "-c", PROGRAM.format(number)], check=True)
            assert (kept(tmp_path) - before != set()) is new


def kept(directory):
    """Return the files of compiled mask_mods."""
    return set(Path(directory).rglob("*mask_tile*.code"))


PROGRAM = """
from fastattn import create_block_mask
def mask_mod(b, h, i, j):
    return i - j < {}
print(create_block_mask(mask_mod, 1, 1, 9, 9))
"""


def _same(segments, b, h, i, j):
    return segments[0, i] == segments[0, j]


def _near(i, j):
    return abs(i - j) < 3


def _calls_another(b, h, i, j):
    return _near(i, j)


class TestFingerprint:
    """Equal for what compiles to the same code, different for what does not."""

    @staticmethod
    def closure(held):
        return lambda b, h, i, j: i < held

    @pytest.mark.parametrize(
        "held", [3, 3.0, True, (1, 2), "x", np.float32(3), np.sqrt, np.float32, len, np]
    )
    def test_what_has_a_lasting_name(self, held):
        assert fingerprint(self.closure(held)) == fingerprint(self.closure(held))

    def test_what_differs(self):
        arrays = [np.arange(3), np.arange(3.0), np.arange(4), np.array([0, 1, 3])]
        functions = [lambda x: x + 1, lambda x: x + 2, njit(lambda x: x + 2), np.exp, np.log]
        held = [3, 3.0, 4, -0.0, 0.0, (3,), (3, 4), None, *arrays, *functions]
        assert len({fingerprint(self.closure(each)) for each in held}) == len(held)

    def test_globals(self, monkeypatch):
        before = fingerprint(_calls_another)
        monkeypatch.setitem(globals(), "_near", lambda i, j: abs(i - j) < 4)
        assert fingerprint(_calls_another) != before

    @pytest.mark.parametrize(
        "held",
        [object(), sys, fastattn, fastattn.attention.__class__, {}, [1]],
        ids=lambda held: type(held).__name__,
    )
    def test_what_has_none(self, held):
        assert fingerprint(self.closure(held)) is None

    def test_recursion(self):
        assert fingerprint(_recursive) is not None


def _recursive(n):
    return n and _recursive(n - 1)
