"""Nothing is read or written outside the caller's arrays: each ends or begins at a forbidden page.

One element too far ends the process, so that the battery runs in one of its own.
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


def read_behind_the_end():
    """What the battery must not do: see that it would be noticed."""
    x = Guarded(at_end=True)(np.zeros(5, np.float32))
    np.lib.stride_tricks.as_strided(x, (6,)).sum()


def shown(b, h, i, j):
    return (i + j) % 5 != 0


def battery(at_end):
    """Call with every array guarded, for every type, length and variant."""
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
            {"mask_mod": shown, "block_mask": blocks, "bias": bias.T.copy().T},
        ):
            guard = Guarded(at_end)
            query, key, value, out = map(guard, plain)
            guarded = {
                name: guard(each) if isinstance(each, np.ndarray) else each
                for name, each in keywords.items()
            }
            fastattn.attention(query, key, value, out=out, **guarded)
            np.testing.assert_array_equal(
                out, fastattn.attention(*plain[:3], **keywords), err_msg=str((dtype, lengths))
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


def test_a_forbidden_page_is_noticed():
    status, _ = in_a_process("read_behind_the_end()")
    assert status == -signal.SIGSEGV


@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_outside(at_end):
    status, errors = in_a_process(f"battery({at_end})")
    assert status == 0, errors
