"""What a function reads from closures, globals and defaults, without running it.

A :data:`Path` leads from a function to one of its free variables, by steps that
torch.compile can follow as well: ``("cell", 0)``, ``("global", "K")``,
``("attribute", "__self__")``, ``("item", 1)``.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch

__all__ = [
    "CALLABLES",
    "Path",
    "follow",
    "free_variables",
    "is_assigned",
    "is_library",
    "names_used",
    "numbers_used",
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

    if isinstance(function, functools.partial):
        take("function of the partial", ("attribute", "func"))
        for index in range(len(function.args)):
            take(f"partial argument {index}", ("attribute", "args"), ("item", index))
        for name in function.keywords:
            take(
                f"partial argument {name!r}", ("attribute", "keywords"), ("item", name)
            )
    elif isinstance(function, types.MethodType):
        take("method", ("attribute", "__func__"))
        found.setdefault("self", (*path, ("attribute", "__self__")))
    elif isinstance(function, types.FunctionType):
        code, of = function.__code__, f" of {function.__name__}"
        if names is not None:
            names |= _names_in(code)
        for index, name in enumerate(code.co_freevars):
            if is_assigned((function.__closure__ or ())[index]):
                take(f"closure variable {name!r}{of}", ("cell", index))
        for name in _globals_in(code) & function.__globals__.keys():
            take(f"global {name!r}", ("global", name))
        defaults = function.__defaults__ or ()
        for index in range(len(defaults)):
            parameter = code.co_varnames[code.co_argcount - len(defaults) + index]
            take(
                f"default of parameter {parameter!r}{of}",
                ("attribute", "__defaults__"),
                ("item", index),
            )
        for name in function.__kwdefaults__ or {}:
            take(
                f"default of parameter {name!r}{of}",
                ("attribute", "__kwdefaults__"),
                ("item", name),
            )


CALLABLES = (types.FunctionType, types.MethodType, functools.partial)
_LIBRARIES = frozenset({"torch", "numpy", "math", "gradtools", "builtins", "functools"})


def is_library(value: Any) -> bool:
    """Whether a value is code that keeps no tensors of the user's."""
    if isinstance(value, types.ModuleType):
        name = value.__name__
    elif isinstance(value, (type, types.BuiltinFunctionType, types.FunctionType)):
        name = getattr(value, "__module__", None) or ""
    else:
        return False  # a partial or a bound method may hold what is the user's
    return name.split(".")[0] in _LIBRARIES or isinstance(value, type)


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


def _names_in(code: types.CodeType) -> frozenset[str]:
    return frozenset(name for inner in _codes(code) for name in inner.co_names)


def numbers_used(
    value: Any, names: Sequence[str], depth: int, found: list[Any]
) -> None:
    """Collect the numbers and texts that code using ``names`` reaches from a value."""
    if isinstance(value, (bool, int, float, complex, str)):
        found.append(value)
    elif isinstance(value, torch.Tensor) or depth == 0:
        return
    elif isinstance(value, (list, tuple)):
        for item in value:
            numbers_used(item, names, depth - 1, found)
    elif isinstance(value, dict):
        for item in value.values():
            numbers_used(item, names, depth - 1, found)
    else:
        for name in names:
            if hasattr(value, name):
                numbers_used(getattr(value, name), names, depth - 1, found)
