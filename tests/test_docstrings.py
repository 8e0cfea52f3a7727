"""The documentation in the code: its examples run, and no section is missing."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import fastattn

# The compiled part has no examples, and docstrings of its own kind.
MODULES = ["fastattn"] + [
    module.name
    for module in pkgutil.walk_packages(fastattn.__path__, "fastattn.")
    if not module.name.startswith("fastattn.kernels")
]
FUNCTIONS = [
    getattr(fastattn, name)
    for name in fastattn.__all__
    if inspect.isfunction(getattr(fastattn, name))
]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(importlib.import_module(module), optionflags=options).failed == 0


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_sections(function):
    """Every function has examples, and what it takes, returns and raises where it does."""
    parts = re.split(r"^([A-Z]\w+)\n-+\n", inspect.getdoc(function), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    signature = inspect.signature(function)
    assert "Examples" in sections
    if signature.parameters:
        assert {"Parameters", "Raises"} <= sections.keys()
        entries = re.findall(r"^(\w[\w, ]*)", sections["Parameters"], re.MULTILINE)
        assert {name.strip() for entry in entries for name in entry.split(",")} == {
            *signature.parameters
        }
        # A function of no arguments says what it returns in its first line.
        assert "Returns" in sections or signature.return_annotation == "None"
