"""Compiled code on disk: used again, never stale, never trusted blindly, never needed.

Every case is a process of its own that runs a copy of the package, so that its sources can change.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
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
    """Return the directory that a first process has filled."""
    directory = tmp_path_factory.mktemp("kept")
    assert_right(call(tree, directory))
    assert files(directory)
    return directory


def call(tree, directory):
    """Return what attention in a new process returns, with its code kept in a directory."""
    run = subprocess.run(
        [sys.executable, "-c", CALL],
        cwd=tree,  # where Python looks first
        env=os.environ | {"FASTATTN_CACHE_DIR": str(directory)},
        capture_output=True,
        text=True,
        check=False,  # the error is in stderr
    )
    assert run.returncode == 0, run.stderr
    return np.array(json.loads(run.stdout), np.float32)


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


def test_torn_files(tree, kept, tmp_path):
    """Half of the functions lose a half of their index, the others a half of their code.

    Not the kernel itself, which takes as long to compile as all of them.
    """
    directory = shutil.copytree(kept, tmp_path / "torn")
    functions = [path for path in files(directory) if "_decode_" not in path.name]
    names = sorted({path.name.split(".")[0] for path in functions})
    assert len(names) > 10
    for path in functions:
        torn = ".nbi" if names.index(path.name.split(".")[0]) % 2 else ".nbc"
        if path.suffix == torn:
            os.truncate(path, path.stat().st_size // 2)
    assert_right(call(tree, directory))


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
