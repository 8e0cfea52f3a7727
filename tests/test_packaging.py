"""The wheel: one top-level package with every module, its types, and two requirements."""

import re
import subprocess
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a clean copy of what it is made of, with nothing but setuptools."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    project = ["pyproject.toml", "README.md", "LICENSE"]
    packages = [path for name in ("fastattn", "kernels") for path in (ROOT / name).rglob("*")]
    for path in [ROOT / name for name in project] + packages:
        if path.is_file() and "__pycache__" not in path.parts:
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", source, "--wheel-dir", target, *options],
        capture_output=True,
        text=True,
        check=False,  # pip says why on stderr
    )
    assert built.returncode == 0, built.stderr
    (path,) = target.iterdir()
    with ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_only_one_top_level_package(wheel):
    """A top-level package named kernels would be somebody else's."""
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastattn"}


def test_every_module_and_both_markers(wheel):
    found = {name for name in wheel.namelist() if name.startswith("fastattn/")}
    expected = set()
    for folder, package in (("fastattn", "fastattn"), ("kernels", "fastattn/kernels")):
        for path in (*(ROOT / folder).rglob("*.py"), ROOT / folder / "py.typed"):
            expected.add(f"{package}/{path.relative_to(ROOT / folder).as_posix()}")
    assert found == expected


def test_requires_numba_and_numpy_only(metadata):
    required = [each for each in metadata.get_all("Requires-Dist") if "extra ==" not in each]
    assert {re.split(r"[^\w.-]", each)[0] for each in required} == {"numba", "numpy"}


def test_metadata(metadata):
    import fastattn

    assert metadata["Name"] == "fastattn"
    assert metadata["Version"] == fastattn.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-File"] == "LICENSE"
