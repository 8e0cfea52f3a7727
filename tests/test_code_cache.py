"""Compiled code on disk: used again, never stale, never trusted blindly, never needed.

Every case is a process of its own that runs a copy of the package, so that its sources can change.
"""

import ctypes
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from checks import TIMEOUT
from fastattn.kernels import code_cache
from numpy.testing import assert_allclose

from fastattn import reference

ROOT = Path(__file__).parents[1]
X = np.linspace(-1, 2, 24, dtype=np.float32).reshape(1, 6, 4)
CALL = f"""
import numpy as np, fastattn
x = np.array({X.tolist()}, np.float32)
print(fastattn.attention(x, x, x).tolist())
"""

# Another exponential, as an edit of a helper's source: steps, flat or too steep.
EDIT = """
EXPONENTIALS["float32"] = EXPONENTIALS["float32"]._replace(
    coefficients=(1.0, 0.0), table_coefficients=(50.0, 0.0)
)
"""

# What takes few functions, and so little time where nothing can be kept.
SMALL_CALL = """
from fastattn import create_block_mask
def mask_mod(b, h, i, j):
    return i >= j
print(create_block_mask(mask_mod, 1, 1, 4, 4, block_size=2).states[0, 0].tolist())
"""

# The processes compile a kernel each.
pytestmark = pytest.mark.long

HAS_OWNERS = pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Return a folder with the package as it is installed."""
    folder = tmp_path_factory.mktemp("tree")
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fastattn", folder / "fastattn", ignore=unwanted)
    shutil.copytree(ROOT / "kernels", folder / "fastattn" / "kernels", ignore=unwanted)
    return folder


@pytest.fixture(scope="module")
def kept(tree, tmp_path_factory):
    """Return the directory that two first processes have filled, which started at once."""
    directory = tmp_path_factory.mktemp("kept")
    for started in [start(tree, directory) for _ in range(2)]:
        assert_right(output_of(started))
    assert files(directory)
    return directory


def start(tree, directory, code=CALL, **keywords):
    """Start a process that keeps its code in a directory and prints a result."""
    environment = os.environ | {"FASTATTN_CACHE_DIR": str(directory)} | keywords.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tree,  # where Python looks first
        env={name: value for name, value in environment.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **keywords,
    )


def output_of(process):
    """Return what a process has printed; it succeeds without a word about files."""
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    assert not errors
    return np.array(json.loads(output), np.float32)


def call(tree, directory):
    """Return what attention in a new process returns, with its code kept in a directory."""
    return output_of(start(tree, directory))


def assert_small_call_is_right(tree, directory, **keywords):
    states = output_of(start(tree, directory, SMALL_CALL, **keywords))
    np.testing.assert_array_equal(states, [[1, 0], [2, 1]])


def assert_right(output):
    assert_allclose(output, reference.attention(X, X, X), atol=1e-6)


def files(directory):
    """Return the size and time of every file."""
    found = {path: path.stat() for path in directory.rglob("*") if path.is_file()}
    return {path: (status.st_size, status.st_mtime_ns) for path, status in found.items()}


def test_second_process_compiles_nothing(tree, kept):
    before = files(kept)
    assert_right(call(tree, kept))
    assert files(kept) == before


def test_edit_of_a_helper_is_seen(tree, kept, tmp_path):
    """And undoing it finds the code that was kept before."""
    edited = shutil.copytree(tree, tmp_path / "edited")
    with (edited / "fastattn" / "kernels" / "exponential.py").open("a") as helper:
        helper.write(EDIT)
    before = files(kept)
    output = call(edited, kept)
    assert np.abs(output - reference.attention(X, X, X)).max() > 0.01
    after = files(kept)
    assert before.items() < after.items()
    assert_right(call(tree, kept))
    assert files(kept) == after


def flip(path):
    """Change one bit in the middle, where the machine code is."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SPOILT = [
    lambda path: os.truncate(path, path.stat().st_size // 2),
    lambda path: os.truncate(path, 0),
    lambda path: path.write_bytes(os.urandom(1000)),
    flip,
]


def test_spoilt_files(tree, kept, tmp_path):
    """Every file is torn, emptied, foreign or has another bit, and is replaced by a good one.

    But that of the kernel itself, which takes as long to compile as all the others.
    """
    directory = shutil.copytree(kept, tmp_path / "spoilt")
    good = {
        path: status for path, status in files(directory).items() if "_decode_" not in path.name
    }
    assert len(good) > 10
    for n, path in enumerate(sorted(good)):
        SPOILT[n % len(SPOILT)](path)
    spoilt = files(directory)
    assert_right(call(tree, directory))
    after = files(directory)
    assert after.keys() == spoilt.keys()
    # Of this version, that is: beside it may lie what another test has kept of another one.
    (folder,) = {path.parent for path in after if after[path] != spoilt[path]}
    for path in good.keys() & set(folder.iterdir()):
        assert after[path] != spoilt[path]
        assert after[path][0] == pytest.approx(good[path][0], rel=0.01)


def test_a_flipped_bit_is_noticed(tmp_path):
    """Each of them, of the digest as well as of the code, and nothing is unpickled."""
    store = code_cache._Files(tmp_path, "name")
    store.save("key", [1, 2, 3])
    assert store.load("key") == [1, 2, 3]
    assert store.load("another key") is None
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for n in range(8 * len(content)):
        changed = bytearray(content)
        changed[n // 8] ^= 1 << n % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="torn"):
            store.load("key")


def test_a_file_is_complete_or_not_there(tmp_path):
    """Who has opened the one before goes on reading it: the new one comes with its name."""
    store = code_cache._Files(tmp_path, "name")
    store.save("key", "before")
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    with path.open("rb") as opened:
        store.save("key", "afterwards")
        assert opened.read() == content
    assert store.load("key") == "afterwards"
    assert [*tmp_path.iterdir()] == [path]


def test_code_of_another_cpu(tree, tmp_path):
    """Of one with fewer instructions, and of one with more: each has its own."""
    smaller = {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": ""}
    assert_small_call_is_right(tree, tmp_path, env=smaller)
    of_smaller = files(tmp_path)
    assert_small_call_is_right(tree, tmp_path)
    both = files(tmp_path)
    assert len(both) == 2 * len(of_smaller)
    assert of_smaller.items() < both.items()
    assert_small_call_is_right(tree, tmp_path, env=smaller)
    assert files(tmp_path) == both


@pytest.mark.parametrize(
    ("module", "name", "other"),
    [
        (numba, "__version__", "0.1"),
        (code_cache.llvmlite, "__version__", "0.1"),
        (sys, "abiflags", "another"),
    ],
)
def test_code_of_other_versions(module, name, other, monkeypatch):
    before = code_cache.source_stamp.__wrapped__()
    monkeypatch.setattr(module, name, other)
    assert code_cache.source_stamp.__wrapped__() != before


# ---------------------------------------------------------------------------
# Nowhere to write
# ---------------------------------------------------------------------------

_DAC_OVERRIDE, _DAC_READ_SEARCH, _DROP_FROM_BOUNDING_SET = 1, 2, 24


def obey_modes():
    """Let even root need a permission to write, from the next exec on."""
    for capability in (_DAC_OVERRIDE, _DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(_DROP_FROM_BOUNDING_SET, capability, 0, 0, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")
def test_read_only_install_without_a_home(tree, tmp_path):
    """Neither the package nor the home of its user can be written, and the latter has no name."""
    installed = shutil.copytree(tree, tmp_path / "installed")
    for path in (installed, *(each for each in installed.rglob("*") if each.is_dir())):
        path.chmod(0o500)
    environment = {"FASTATTN_CACHE_DIR": None, "XDG_CACHE_HOME": None, "HOME": str(installed)}
    try:
        assert_small_call_is_right(installed, "", env=environment, preexec_fn=obey_modes)
        assert not list(installed.rglob("*.code"))
    finally:
        for path in (installed, *(each for each in installed.rglob("*") if each.is_dir())):
            path.chmod(0o700)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")
def test_read_only_folder_of_code(tree, tmp_path):
    """That was filled before: as right as the first time, and nothing is added."""
    (tmp_path / "code").mkdir()
    assert_small_call_is_right(tree, tmp_path / "code")
    (folder,) = (tmp_path / "code").iterdir()
    before = files(folder)
    assert before
    folder.chmod(0o500)
    try:
        assert_small_call_is_right(tree, tmp_path / "code", preexec_fn=obey_modes)
        assert files(folder) == before
    finally:
        folder.chmod(0o700)


def test_nobody_knows_the_home(monkeypatch):
    for name in ("FASTATTN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "home", unknown_home)
    assert code_cache.root() is None
    assert code_cache.directory.__wrapped__() is None


def unknown_home():
    raise RuntimeError("Could not determine home directory.")


def full_disk():
    """Let no file of this process grow beyond a few bytes: what is written fails half way."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for a full disk is Unix's")
def test_full_disk(tree, tmp_path):
    assert_small_call_is_right(tree, tmp_path, preexec_fn=full_disk)
    assert not files(tmp_path), "nothing half written is left"


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a disk of 64 KiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path],
        capture_output=True,
        check=False,  # not everybody may
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tmpfs is Linux's")
def test_small_disk(tree, small_disk):
    assert_small_call_is_right(tree, small_disk)
    assert not list(small_disk.rglob("*.part"))


def test_in_memory_where_nothing_can_be_written(tree, tmp_path):
    (tmp_path / "file").touch()
    assert_right(call(tree, tmp_path / "file" / "directory"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class TestDirectory:
    """Which directory is taken, without the memory of the process."""

    @pytest.fixture
    def choose(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "code"))
        return code_cache.directory.__wrapped__

    def test_is_below_the_chosen_one(self, choose, tmp_path):
        assert choose().parent == tmp_path / "code"

    def test_is_below_the_user_s_own(self, choose, tmp_path, monkeypatch):
        monkeypatch.delenv("FASTATTN_CACHE_DIR")
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert choose().parent == tmp_path / "fastattn"

    @HAS_OWNERS
    def test_is_private(self, choose):
        assert stat.S_IMODE(choose().stat().st_mode) == 0o700

    @HAS_OWNERS
    @pytest.mark.parametrize("mode", [0o720, 0o770, 0o702, 0o777])
    def test_others_may_not_write(self, mode, choose):
        """What is kept there will be unpickled."""
        choose().chmod(mode)
        assert choose() is None

    @HAS_OWNERS
    def test_belongs_to_the_user(self, choose, monkeypatch):
        user = choose().stat().st_uid
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
        assert choose() is None

    @pytest.mark.skipif(
        not hasattr(os, "getuid") or os.getuid() == 0, reason="this user may write everywhere"
    )
    def test_read_only(self, choose):
        directory = choose()
        directory.chmod(0o500)
        assert choose() is None
        directory.chmod(0o700)
