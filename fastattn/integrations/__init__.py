"""What other libraries call, or hand their own arrays to: one module for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(package: str) -> Iterator[None]:
    """Say which extra to install where the imports in this block find no such package.

    Examples
    --------
    >>> with needs("no_such_package"):
    ...     import no_such_package
    Traceback (most recent call last):
    ...
    ImportError: fastattn.integrations.no_such_package needs the package no_such_package: pip
    install 'fastattn[no_such_package]'
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"fastattn.integrations.{package} needs the package {package}: "
            f"pip install 'fastattn[{package}]'"
        ) from error
