"""The examples of README and of the docstrings are tests."""

import doctest
import sys
import types
from typing import Any

import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

import gradtools as gt

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def _names(namespace: dict[str, Any]) -> None:
    """Make the names of a document a module, for Dynamo imports what it guards on."""
    module = types.ModuleType("document")
    module.__getattr__ = namespace.get
    sys.modules["document"] = module
    namespace.update(torch=torch, gt=gt, __name__="document")


pytest_collect_file = (
    Sybil(
        parsers=[PythonCodeBlockParser(doctest_optionflags=OPTIONS)],
        patterns=["README.md", "docs/*.md", "docs/**/*.md"],
        setup=_names,
    )
    + Sybil(
        parsers=[DocTestParser(OPTIONS)], patterns=["gradtools/**/*.py"], setup=_names
    )
).pytest()
