"""Packages that gradtools can do without, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from gradtools.errors import DefinitionError

__all__ = ["extra"]


def extra(module: str, name: str) -> Any:
    """Import a module, or say how it is installed.

    Args:
        module: Its name.
        name: The extra of gradtools that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DefinitionError(
            f"this needs {package}, which is not installed",
            fix=f"pip install gradtools[{name}]",
        ) from error
