"""The examples of README and of the docstrings are tests."""

import doctest
import itertools
import sys
import types
from typing import Any

import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

import gradtools as gt

_DOCUMENTS = itertools.count(1)
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def _names(namespace: dict[str, Any]) -> None:
    """Make the names of a document a module, for Dynamo imports what it guards on.

    It keeps what it imported, so that each document has a module of its own.
    """
    module = types.ModuleType(f"document_{next(_DOCUMENTS)}")
    module.__getattr__ = namespace.get
    sys.modules[module.__name__] = module
    namespace.update(torch=torch, gt=gt, __name__=module.__name__)


pytest_collect_file = (
    Sybil(
        parsers=[PythonCodeBlockParser(doctest_optionflags=OPTIONS)],
        patterns=["README.md", "docs/*.md", "docs/**/*.md"],
        setup=_names,
    )
    + Sybil(
        parsers=[DocTestParser(OPTIONS)],
        patterns=["gradtools/*.py", "gradtools/**/*.py"],
        setup=_names,
    )
).pytest()
