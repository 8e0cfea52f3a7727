"""Compiled code on disk: where it is kept, and what makes it stale.

Numba keys its own cache on the decorated function's file alone, so that an edit in a
helper leaves old machine code running. Here the key is every file of this package, with
the versions of Numba, llvmlite and Python; Numba adds the CPU. Kept code is unpickled, so
it lives in a directory that belongs to the user alone. Where there is none, or anything
goes wrong with a file, code is compiled in memory: slower, never wrong.

One file holds the code of one function for one CPU. It appears under its name when it is
complete, so that processes which start at once need not know of each other, and begins
with a digest of the rest: a flipped bit of machine code would not raise, but run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import stat
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import llvmlite
import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.core.serialize import dumps


@cache
def source_stamp() -> str:
    """Digest of the kernels' sources and of what compiles them."""
    # Free-threaded Python of the same version has another ABI.
    python = f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}"
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {python}".encode())
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def root() -> Path | None:
    """The directory that holds compiled code of every version; None where there can be none."""
    chosen = os.environ.get("FASTATTN_CACHE_DIR")
    if chosen:
        return Path(chosen)
    try:
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "fastattn"
        if os.name == "nt":
            local = os.environ.get("LOCALAPPDATA")
            return Path(local) / "fastattn" / "cache" if local else None
        base = os.environ.get("XDG_CACHE_HOME")
        # The specification says that a relative path is to be ignored.
        if base and Path(base).is_absolute():
            return Path(base) / "fastattn"
        return Path.home() / ".cache" / "fastattn"
    except RuntimeError:
        # No home directory can be determined.
        return None


def _belongs_to_user(path: Path) -> bool:
    if not hasattr(os, "getuid"):
        return True
    status = path.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@cache
def directory() -> Path | None:
    """The directory that holds compiled code, made if need be; None where there can be none."""
    top = root()
    if top is None:
        return None
    path = top / source_stamp()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _belongs_to_user(path) or not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            return None
    except OSError:
        return None
    return path


def kept() -> dict[Path, int]:
    """The directories of compiled code that exist, of this version and of others, and their bytes.

    Nothing else that somebody may have put beside them is ever among these.
    """
    top = root()
    if top is None or not top.is_dir():
        return {}
    return {
        path: sum(file.stat().st_size for file in path.iterdir())
        for path in sorted(top.iterdir())
        if re.fullmatch(r"[0-9a-f]{16}", path.name) and path.is_dir()
    }


class _Locator(_CacheLocator):
    def __init__(self, path: Path) -> None:
        self._path = path

    def get_cache_path(self) -> str:
        return str(self._path)

    def get_source_stamp(self) -> str:
        return source_stamp()

    def get_disambiguator(self) -> str:
        return ""

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _Locator | None:
        path = directory()
        return None if path is None else cls(path)


class _Implementation(CompileResultCacheImpl):
    _locator_classes: ClassVar = [_Locator]

    def __init__(self, py_func: Any, name: str) -> None:
        super().__init__(py_func)
        self._filename_base = name


class _Files:
    """The files of one function, one for each key."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name

    def _path(self, key: Any) -> Path:
        return self._folder / f"{self._name}.{_digest(repr(key).encode()).hex()[:16]}.code"

    def load(self, key: Any) -> Any:
        """Return what was saved; None where there is nothing."""
        try:
            content = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        digest, data = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
        if digest != _digest(data):
            raise ValueError(f"the file of {self._name} is torn")
        return pickle.loads(data)  # noqa: S301, the directory belongs to the user alone

    def save(self, key: Any, content: Any) -> None:
        data = dumps(content)
        handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=self._name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_digest(data) + data)
            Path(temporary).replace(self._path(key))
        except BaseException:
            Path(temporary).unlink()
            raise


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


_DIGEST_SIZE = len(_digest(b""))


class CodeCache(FunctionCache):
    """Numba's cache with this package's key, directory, files and forgiveness."""

    def __init__(self, py_func: Any, name: str) -> None:
        self._kept_name = name
        self._impl_class = lambda function: _Implementation(function, name)
        super().__init__(py_func)
        self._cache_file = _Files(Path(self._cache_path), name)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        # The name says which closure this is; pickled cells would differ between processes.
        return sig, codegen.magic_tuple(), self._kept_name

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return kept code, or None where there is none that works."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:
            # A torn or foreign file: whatever unpickling or linking says, compiling is right, and
            # the new code will take its place.
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep code, where there is room."""
        # A full or read-only disk, or another process at the same file: the code is in memory.
        with contextlib.suppress(Exception):
            super().save_overload(sig, data)


def keep(compiled: Any, py_func: Any, name: str) -> None:
    """Let a dispatcher or C function of Numba keep its code on disk, where that is possible."""
    if directory() is not None:
        compiled._cache = CodeCache(py_func, name)
