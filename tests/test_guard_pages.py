"""Nothing is read or written outside any array: each ends or begins at a forbidden page.

That is every array of the caller's, and every one that Python makes on the way to a kernel: slopes
and sinks, lengths and offsets, lse, work lists, states of chunks, pages, what a cache keeps. One
element too far ends the process, so that the batteries run in processes of their own.
"""

import ctypes
import itertools
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checks import FLOAT_DTYPES

import fastattn
from fastattn import cache, masks, paging, plan, problem, run, shapes, storage
from fastattn import keywords as keyword_checks

PAGE = mmap.PAGESIZE
PROT_NONE = 0

# Every tail of a tile and of a register: one key to two blocks, features beside whole registers.
LENGTHS = [(1, 1), (1, 63), (1, 530), (3, 65), (16, 17), (17, 64), (33, 129), (50, 7)]
HEAD_DIMS = [(1, 1), (3, 17), (16, 8), (64, 64), (65, 33)]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pages are forbidden with mprotect")


class Guarded:
    """Copies of arrays that touch a forbidden page, at their end or at their beginning."""

    def __init__(self, at_end):
        self.at_end = at_end
        self.kept = []
        self.protect = ctypes.CDLL(None, use_errno=True).mprotect

    def __call__(self, x):
        size = max(-(-x.nbytes // PAGE), 1) * PAGE
        memory = mmap.mmap(-1, size + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (start, start + PAGE + size):
            assert self.protect(ctypes.c_void_p(page), PAGE, PROT_NONE) == 0
        offset = PAGE + (size - x.nbytes if self.at_end else 0)
        view = np.frombuffer(memory, np.uint8, x.nbytes, offset).view(x.dtype).reshape(x.shape)
        view[...] = x
        self.kept.append(memory)
        return view


class GuardedNumPy:
    """NumPy for a module of ours: what it makes there touches a forbidden page."""

    MAKES = ("empty", "zeros", "array", "ascontiguousarray", "empty_like", "diff", "full")

    def __init__(self, guard):
        self.guard = guard

    def __getattr__(self, name):
        made = getattr(np, name)
        return self.made(made) if name in self.MAKES else made

    def made(self, make):
        def guarded(*arguments, **keywords):
            x = make(*arguments, **keywords)
            return self.guard(x) if x.size and x.flags.c_contiguous else x

        return guarded


def guard_what_is_made(guard):
    """From now on guard what Python makes for a kernel."""
    for module in (cache, keyword_checks, masks, paging, plan, problem, run, shapes, storage):
        module.np = GuardedNumPy(guard)


def read_behind_the_end():
    """What the battery must not do: see that it would be noticed."""
    x = Guarded(at_end=True)(np.zeros(5, np.float32))
    np.lib.stride_tricks.as_strided(x, (6,)).sum()


def read_behind_what_is_made():
    """The same of an array that a check makes."""
    guard_what_is_made(Guarded(at_end=True))
    shape = np.zeros((1, 3, 5, 8), np.float32)
    lse = problem.check(shape, shape, shape, return_lse=True).lse
    np.lib.stride_tricks.as_strided(lse, (16,), (4,)).sum()


def shown(b, h, i, j):
    return (i + j) % 5 != 0


def lower(score, b, h, i, j):
    return score - 0.25 * j


def battery(at_end):
    """Call `attention` with every array guarded, for every type, length and variant."""
    rng = np.random.default_rng(0)
    for dtype, lengths, head_dims in itertools.product(FLOAT_DTYPES, LENGTHS, HEAD_DIMS):
        seqlen_q, seqlen_kv = lengths
        shapes = [(4, seqlen_q, head_dims[0]), (2, seqlen_kv, head_dims[0])]
        shapes += [(2, seqlen_kv, head_dims[1]), (4, seqlen_q, head_dims[1])]
        plain = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
        mask = rng.random((4, seqlen_q, seqlen_kv)) < 0.8
        padding = rng.random(seqlen_kv) < 0.8
        bias = rng.standard_normal((seqlen_q, seqlen_kv)).astype(dtype)
        slopes = rng.random(4).astype(np.float32)
        blocks = fastattn.create_block_mask(shown, 1, 1, seqlen_q, seqlen_kv, block_size=(5, 9))
        for keywords in (
            {},
            {"causal": True, "mask": padding},
            {"mask": mask, "bias": bias, "kv_lengths": seqlen_kv - 1},
            {"window": (5, 1), "alibi_slopes": slopes, "sinks": slopes, "bias": bias[:1]},
            {"softcap": 2.0, "bias": bias.astype(np.float64), "score_mod": lower},
            {"mask_mod": shown, "block_mask": blocks, "bias": bias.T.copy().T},
        ):
            guard = Guarded(at_end)
            query, key, value, out = map(guard, plain)
            guarded = {
                name: guard(each) if isinstance(each, np.ndarray) else each
                for name, each in keywords.items()
            }
            guard_what_is_made(guard)
            _, lse = fastattn.attention(query, key, value, out=out, return_lse=True, **guarded)
            np.testing.assert_array_equal(
                out, fastattn.attention(*plain[:3], **keywords), err_msg=str((dtype, lengths))
            )
            assert not np.isnan(lse).any()


def battery_of_sequences(at_end):
    """The same for packed sequences, and for caches in every format, whole and in pages."""
    rng = np.random.default_rng(0)
    guard = Guarded(at_end)
    guard_what_is_made(guard)
    for dtype, (features, features_v) in itertools.product(FLOAT_DTYPES, HEAD_DIMS):
        starts = np.array([0, 1, 1, 34, 99])
        shapes = [(99, 4, features), (99, 2, features), (99, 2, features_v), (99, 4, features_v)]
        query, key, value, out = (guard(rng.standard_normal(x).astype(dtype)) for x in shapes)
        for keywords in (
            {},
            {"causal": True, "alibi_slopes": np.ones(4), "sinks": np.ones(4)},
            {"query_offset": np.arange(4), "window": (20, 1), "mask_mod": shown},
        ):
            packed = query, key, value, guard(starts)
            fastattn.varlen_attention(*packed, out=out, return_lse=True, **keywords)
            assert np.isfinite(out.astype(float)).all()
        guard.kept.clear()
    for dtype, head_dims in itertools.product((*FLOAT_DTYPES, np.dtype(np.int8)), HEAD_DIMS):
        for seqlen_q, seqlen_kv in LENGTHS:
            use_caches(guard, rng, dtype, head_dims, seqlen_q, seqlen_kv)
            guard.kept.clear()


def use_caches(guard, rng, dtype, head_dims, seqlen_q, seqlen_kv):
    """Fill caches to their last row, and attend."""
    query = guard(rng.standard_normal((1, 4, seqlen_q, head_dims[0]), dtype=np.float32))
    key, value = (
        guard(rng.standard_normal((1, 2, seqlen_kv, n), dtype=np.float32)) for n in head_dims
    )
    sizes = {"head_dim_v": head_dims[1], "dtype": dtype}
    if dtype == np.float16:
        query = guard(query.astype(np.float16))
    whole = fastattn.KVCache(1, 2, head_dims[0], seqlen_kv, **sizes)
    whole.append(key, value)
    results = [whole.attend(query, causal=causal, return_lse=True) for causal in (False, True)]
    page_size = 64 if seqlen_kv % 2 else 5
    pages = fastattn.PagedKVCache(-(-seqlen_kv // page_size), page_size, 2, head_dims[0], **sizes)
    ids, ends = [pages.add()], np.array([0, seqlen_kv])
    pages.append(ids, key[0].swapaxes(0, 1), value[0].swapaxes(0, 1), ends)
    packed = query[0].swapaxes(0, 1)
    results += [pages.attend(packed, ids, [0, seqlen_q], return_lse=True)]
    for _ in range(2):  # checked, and made again
        results += [pages.attend(packed[:1], ids, causal=True, return_lse=True)]
    for output, _ in results:
        assert np.isfinite(output.astype(float)).all()


def block_masks(at_end):
    """Make block masks whose states are guarded, and attend with them."""
    rng = np.random.default_rng(0)
    guard = Guarded(at_end)
    guard_what_is_made(guard)
    for (seqlen_q, seqlen_kv), size in itertools.product(LENGTHS, [(5, 9), (64, 64), (1, 7)]):
        query, key, value = (
            guard(rng.standard_normal((1, 2, n, 16), dtype=np.float32))
            for n in (seqlen_q, seqlen_kv, seqlen_kv)
        )
        for batch, heads in ((1, 1), (1, 2)):
            blocks = fastattn.create_block_mask(shown, batch, heads, seqlen_q, seqlen_kv, size)
            output = fastattn.attention(query, key, value, block_mask=blocks)
            np.testing.assert_array_equal(
                output, fastattn.attention(query, key, value, mask_mod=shown)
            )


def in_a_process(call):
    """Return the exit status of a call of this file in a process of its own, and its errors."""
    run = subprocess.run(
        [sys.executable, "-c", f"import test_guard_pages as t; t.{call}"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.returncode, run.stderr


@pytest.mark.parametrize("call", ["read_behind_the_end()", "read_behind_what_is_made()"])
def test_a_forbidden_page_is_noticed(call):
    status, _ = in_a_process(call)
    assert status == -signal.SIGSEGV


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("calls", ["battery", "battery_of_sequences", "block_masks"])
def test_nothing_outside(calls, at_end):
    status, errors = in_a_process(f"{calls}({at_end})")
    assert status == 0, errors
