"""What a function reads from closures, globals and defaults, without running it.

A :data:`Path` leads from a function to one of its free variables, by steps that
torch.compile can follow as well: ``("cell", 0)``, ``("global", "K")``,
``("attribute", "__self__")``, ``("item", 1)``; ``("call", None)`` calls what is there.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

__all__ = [
    "CALLABLES",
    "Path",
    "follow",
    "free_variables",
    "is_assigned",
    "is_foreign",
    "is_library",
    "names_in",
    "names_used",
    "uses",
]

Path = tuple[tuple[str, Any], ...]


def follow(value: Any, path: Path) -> Any:
    """Return what a path leads to; None for a closure variable not assigned yet."""
    for kind, key in path:
        if kind == "cell":
            value = value.__closure__[key].cell_contents
        elif kind == "global":
            value = value.__globals__[key]
        elif kind == "item":
            value = value[key]
        elif kind == "has":
            value = hasattr(value, key)
        elif kind == "length":
            value = len(value)
        elif kind == "contains":
            value = key in value
        elif kind == "call":
            value = value()
        else:
            value = getattr(value, key)
    return value


def free_variables(function: Any) -> dict[str, Path]:
    """Return what a function uses beside its arguments: a label and a path for each.

    Closure cells, globals that its code names, defaults, what a partial holds, the
    object of a bound method; for Python functions among them, theirs as well.
    """
    found: dict[str, Path] = {}
    _collect(function, (), found, set())
    return found


def names_used(function: Any) -> frozenset[str]:
    """Return every attribute name in the code of a function and of those it calls."""
    names: set[str] = set()
    seen: set[int] = set()
    _collect(function, (), {}, seen, names)
    return frozenset(names)


def _collect(
    function: Any,
    path: Path,
    found: dict[str, Path],
    seen: set[int],
    names: set[str] | None = None,
) -> None:
    if id(function) in seen or is_library(function):
        return
    seen.add(id(function))

    def take(label: str, *steps: tuple[str, Any]) -> None:
        value = follow(function, steps)
        if isinstance(value, CALLABLES):
            _collect(value, (*path, *steps), found, seen, names)
        elif not is_library(value):
            found.setdefault(label, (*path, *steps))

    if isinstance(function, types.FunctionType) and names is not None:
        names |= names_in(function)
    for label, _, *steps in uses(function):
        if label == "self":
            found.setdefault(label, (*path, *steps))
        else:
            take(label, *steps)


def uses(function: Any) -> Iterator[tuple[Any, ...]]:
    """Yield a label, what holds the thing, and the steps to all that a callable uses.

    These are its own steps only: those of the callables among them are not taken.
    """
    if isinstance(function, functools.partial):
        held = function.args, function.keywords
        yield "function of the partial", function, ("attribute", "func")
        for index in range(len(function.args)):
            label = f"partial argument {index}"
            yield label, held[0], ("attribute", "args"), ("item", index)
        for name in function.keywords:
            label = f"partial argument {name!r}"
            yield label, held[1], ("attribute", "keywords"), ("item", name)
    elif isinstance(function, types.MethodType):
        yield "method", function, ("attribute", "__func__")
        yield "self", function, ("attribute", "__self__")
    elif isinstance(function, types.FunctionType):
        yield from _used_by_code(function)


def _used_by_code(function: types.FunctionType) -> Iterator[tuple[Any, ...]]:
    code, of = function.__code__, f" of {function.__name__}"
    if _is_type_check(function):
        for index, cell in enumerate(function.__closure__ or ()):
            if is_assigned(cell) and isinstance(cell.cell_contents, CALLABLES):
                yield "", cell, ("cell", index)  # what it wraps is among these
        return
    for index, name in enumerate(code.co_freevars):
        cell = (function.__closure__ or ())[index]
        if is_assigned(cell):
            yield f"closure variable {name!r}{of}", cell, ("cell", index)
    for name in _globals_in(code) & function.__globals__.keys():
        if not name.isidentifier():  # @pytest_ar: put there by a rewriting of asserts
            continue
        yield f"global {name!r}", function.__globals__, ("global", name)
    defaults = function.__defaults__ or ()
    for index in range(len(defaults)):
        parameter = code.co_varnames[code.co_argcount - len(defaults) + index]
        label = f"default of parameter {parameter!r}{of}"
        yield label, defaults, ("attribute", "__defaults__"), ("item", index)
    for name in function.__kwdefaults__ or {}:
        label, held = f"default of parameter {name!r}{of}", function.__kwdefaults__
        yield label, held, ("attribute", "__kwdefaults__"), ("item", name)


def _is_type_check(function: types.FunctionType) -> bool:
    """Whether it is a wrapper that checks types, by the name of what it wraps."""
    return _top(function.__globals__.get("__name__")) in _CHECKERS_OF_TYPES


CALLABLES = (types.FunctionType, types.MethodType, functools.partial)
# Their wrappers reach hundreds of objects, none of which is the user's.
_CHECKERS_OF_TYPES = frozenset({"beartype", "jaxtyping", "typeguard"})
_LIBRARIES = _CHECKERS_OF_TYPES | {
    *("torch", "numpy", "math", "gradtools", "builtins", "functools"),
    *("einops", "opt_einsum", "scipy", "tensordict"),
}
# Dynamo cannot look into their objects, and no number of the user's is there.
_NO_VALUES = _CHECKERS_OF_TYPES | {"typing", "inspect", "re", "ctypes", "logging"}
# What there is in Python itself to hold values of the user's, beside containers.
_HOLDERS = frozenset({"argparse", "types"})


def is_library(value: Any) -> bool:
    """Whether a value is code that keeps no tensors of the user's."""
    if isinstance(value, types.ModuleType):
        name = value.__name__
    elif isinstance(value, (type, types.BuiltinFunctionType, types.FunctionType)):
        name = getattr(value, "__module__", None) or ""
    else:  # a partial or a bound method may hold what is the user's
        return _top(type(value).__module__) in _NO_VALUES
    return _top(name) in _LIBRARIES or isinstance(value, type)


def is_foreign(value: Any) -> bool:
    """Whether nothing that a value leads to can be a setting of the user's."""
    if isinstance(value, types.ModuleType):
        top = _top(value.__name__)
    elif isinstance(value, (type, types.FunctionType)):
        top = _top(value.__module__)
    else:
        top = _top(type(value).__module__)
        if top in sys.stdlib_module_names:  # locks, random numbers, files
            return top not in _HOLDERS
        return top in _NO_VALUES or (
            top in _LIBRARIES and not isinstance(value, torch.nn.Module)
        )
    return top in _LIBRARIES or top in sys.stdlib_module_names


def _top(module: str | None) -> str:
    return (module or "").partition(".")[0]


def is_assigned(cell: types.CellType) -> bool:
    """Whether a closure's variable has a value yet."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


@functools.lru_cache(maxsize=1024)
def _globals_in(code: types.CodeType) -> frozenset[str]:
    return frozenset(
        instruction.argval
        for inner in _codes(code)
        for instruction in dis.get_instructions(inner)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    )


def names_in(function: types.FunctionType) -> frozenset[str]:
    """Return every attribute name in the code of a function, as getattr's texts too."""
    if _is_type_check(function):
        return frozenset()
    return _names_in(function.__code__)


@functools.lru_cache(maxsize=1024)
def _names_in(code: types.CodeType) -> frozenset[str]:
    found: set[str] = set()
    for inner in _codes(code):
        found |= {*inner.co_names}
        if not {"getattr", "hasattr"}.isdisjoint(inner.co_names):
            texts = (text for text in inner.co_consts if isinstance(text, str))
            found |= {text for text in texts if text.isidentifier()}
    return frozenset(found)
