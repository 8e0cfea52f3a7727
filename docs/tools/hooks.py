"""What the site takes from elsewhere, so that each thing is written in one place.

Pages of the repository keep their paths, and with them the links between them. Pictures are drawn
by the code that stands beside them, or from the runs that were saved, as are the tables.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

from blocks import run
from measured import complete, tables

_ROOT = Path(__file__).parents[2]
_REPOSITORY = ("CHANGELOG.md", "CONTRIBUTING.md", "bench/README.md", "kernels/README.md")
_GALLERY = "gallery.md"
_MEASURED = "<!-- the runs in bench/history -->"
_NUMERICS = "<!-- what numerics measured -->"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages of the repository, and the pictures that the gallery draws."""
    for name in _REPOSITORY:
        files.append(File.generated(config, name, abs_src_path=str(_ROOT / name)))
    with TemporaryDirectory() as folder, contextlib.chdir(folder):
        run(Path(config.docs_dir, _GALLERY))
        # In a process of its own: the bench decides about the threads of the process that it is in.
        report = [sys.executable, "-m", "bench.report", complete(), folder]
        subprocess.run(report, cwd=_ROOT, check=True, stdout=subprocess.DEVNULL)
        for picture in sorted(Path(folder).glob("*.png")):
            files.append(File.generated(config, picture.name, content=picture.read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in what was measured, where a page asks for it."""
    if _NUMERICS in markdown:  # `python -m numerics` in tests/ printed it
        markdown = markdown.replace(_NUMERICS, Path(__file__).with_name("numerics.md").read_text())
    return markdown.replace(_MEASURED, tables()) if _MEASURED in markdown else markdown
