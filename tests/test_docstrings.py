"""The docstrings of functions: no section is missing. pytest itself runs their examples."""

import inspect
import re

import pytest

import fastattn

FUNCTIONS = [
    getattr(fastattn, name)
    for name in fastattn.__all__
    if inspect.isfunction(getattr(fastattn, name))
]


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
