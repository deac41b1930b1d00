"""The examples of README and of the docstrings are tests; the device of all tests."""

import doctest
import itertools
import sys
import types
import warnings
from typing import Any

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

import gradtools as gt


def pytest_addoption(parser: Any) -> None:
    """Add the choice of a device, for what the tests make without naming one."""
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu")


def pytest_configure(config: Any) -> None:
    """Choose the device before any test is imported, for some make tensors there.

    By the default tensor type: torch.set_default_device would put a function mode
    around every call, which is another way through gradtools.
    """
    if config.getoption("--device") == "cuda":
        with warnings.catch_warnings(action="ignore"):  # it is deprecated
            torch.set_default_tensor_type(torch.cuda.FloatTensor)


def pytest_collection_modifyitems(config: Any, items: list[pytest.Item]) -> None:
    """Leave out what is about the CPU, where the tests run elsewhere."""
    device = config.getoption("--device")
    if device != "cpu":
        reason = f"about the CPU's kernels, or numpy, which take no tensors of {device}"
        for item in items:
            if item.get_closest_marker("on_cpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


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
