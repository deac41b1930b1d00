"""Keyword arguments that were misspelled: an error that names the right one.

Python 3.13 suggests a name for a function; gradtools does for all that it makes public,
rules too, on every Python. It looks at the names of a call only, and only where there
are any: what is called with positional arguments pays one Python call for it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Iterable, MutableMapping
from typing import Any, TypeVar

from gradtools.errors import DefinitionError

__all__ = ["publish", "spelled", "suggestion", "unexpected"]

T = TypeVar("T")
_NEAR = 0.6  # of the letters in common, as difflib counts them


def suggestion(name: object, known: Iterable[str]) -> str:
    """Return a sentence that names what ``name`` may have meant.

    Args:
        name: What was written.
        known: What could have been; names that are equally near are all suggested.
    """
    near = {other: _likeness(str(name), other) for other in known}
    best = max(near.values(), default=0.0)
    if best >= _NEAR:
        nearest = [repr(other) for other, value in near.items() if value == best]
        return f"Did you mean {' or '.join(nearest)}?"
    if not near:
        return "There is none."
    return f"Use one of {', '.join(map(repr, near))}."


def _likeness(name: str, other: str) -> float:
    """Return the share of letters in common; order breaks ties between letters."""
    name, other = name.lower(), other.lower()
    return difflib.SequenceMatcher(None, name, other, autojunk=False).ratio()


def unexpected(function: str, name: str, known: Iterable[str]) -> DefinitionError:
    """Return the error for a keyword argument that a function does not have."""
    return DefinitionError(
        f"{function}() got an unexpected keyword argument {name!r}",
        fix=suggestion(name, known),
    )


def spelled(target: T) -> T:
    """Let a function, or a class in its constructor, suggest names for unknown ones.

    Args:
        target: A function or a class. Rules have their own way, where they bind.

    Returns:
        The class; or a function with the same signature in place of the function.
    """
    given: Any = target
    if inspect.isfunction(given):
        return _watched(given)
    if inspect.isclass(given) and inspect.isfunction(vars(given).get("__init__")):
        setattr(given, "__init__", _watched(vars(given)["__init__"], given))  # noqa: B010 (pyright: no such attribute of a type)
    return target


def _watched(function: Any, cls: type | None = None) -> Any:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return function
    known = tuple(
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name != "self"
    )
    if not known:
        return function
    shown = (cls or function).__qualname__

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in known:
                raise unexpected(shown, name, known)
        return function(*args, **kwargs)

    return watched


def publish(module: str, names: MutableMapping[str, Any]) -> None:
    """Make what a module lists in ``__all__`` public.

    It says in messages, reprs and pickles that it is found there, and not where it was
    written, and it knows the names of its arguments.

    Args:
        module: The name of the module.
        names: Its globals, which are changed.
    """
    for name in names["__all__"]:
        names[name] = public = spelled(names[name])
        public.__module__ = module
