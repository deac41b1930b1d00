"""What the functions of a rule read past their arguments, for Dynamo to guard on.

Where a rule crosses into compiled code as one call, numbers that it reads from
closures, globals and objects would be baked in. So the traced code follows the same
paths to them: those of the rule's functions, and of rules that these call.
"""

from __future__ import annotations

import logging
import random
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from gradtools.lowering.free_variables import (
    Path,
    follow,
    free_variables,
    names_used,
)
from gradtools.rules.rule import Rule

__all__ = ["numbers_used", "reads_of"]

_ROLES = "fun", "fwd", "bwd", "jvp"
_DEPTH = 2


def reads_of(
    rule: Rule, before: Sequence[Path], objects: Sequence[Any], closed: set[str]
) -> tuple[list[Path], list[str]]:
    """Return the paths to what a rule reads, and every name in its code.

    Args:
        rule: The rule.
        before: The paths of an earlier trace: what they hold is used again, for Dynamo
            guards on it.
        objects: Arguments that are looked into as well.
        closed: Names that lead to arrays, in this trace or an earlier one; they are
            left out.
    """
    cells = {
        id(step.__closure__[0]): step
        for path in before
        for kind, step in path
        if kind == "call"
    }
    names: set[str] = set()
    found: list[tuple[Path, Any]] = []
    waiting: list[tuple[Path, Rule]] = [((), rule)]
    known = {id(rule)}
    for prefix, each in waiting:
        for role in _ROLES:
            function = getattr(each, role)
            names |= names_used(function)
            for path in free_variables(function).values():
                value = follow(function, path)
                path = (*prefix, ("attribute", role), *path)  # noqa: PLW2901
                inner = _rule_of(value)
                if inner is None:
                    found.append((path, value))
                elif id(inner) not in known:
                    known.add(id(inner))
                    waiting.append(((*path, ("attribute", "rule")), inner))
    found = [(path, x) for path, x in found if _can_be_followed(x, sorted(names))]
    for value in (*objects, *(value for _, value in found)):
        _is_of_arrays(value, names, _DEPTH, closed)
    return [_without_cells(rule, path, cells) for path, _ in found], sorted(
        names - closed
    )


def _rule_of(value: Any) -> Rule | None:
    """Return the rule of what a decorator of gradtools made."""
    if not type(value).__module__.startswith("gradtools."):
        return None
    rule = getattr(value, "rule", None)
    return rule if isinstance(rule, Rule) else None


def _without_cells(rule: Rule, path: Path, cells: dict[int, Any]) -> Path:
    """Return a path that calls a function for what stands in a cell.

    Dynamo reads no cell that the function it traces has as well; it does follow code
    that names the variable.
    """
    value: Any = rule
    steps: list[tuple[str, Any]] = []
    for kind, key in path:
        step = kind, key
        if kind == "cell":
            cell = value.__closure__[key]
            step = "call", cells.setdefault(id(cell), _reader(cell))
        steps.append(step)
        value = follow(value, (step,))
    return tuple(steps)


def _reader(cell: types.CellType) -> Callable[[], Any]:
    """Return a function without arguments that returns what is in a cell."""
    held = None

    def read() -> Any:
        return held

    return types.FunctionType(read.__code__, globals(), "read", None, (cell,))


def numbers_used(
    value: Any, names: Sequence[str], depth: int, found: list[Any]
) -> None:
    """Collect the numbers and texts that code using ``names`` reaches from a value."""
    if isinstance(value, (bool, int, float, complex, str)):
        found.append(value)
    elif depth == 0 or isinstance(value, _CLOSED):
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


_CLOSED = (
    torch.Tensor, np.ndarray, np.generic, np.dtype, np.ufunc,
    types.BuiltinFunctionType, slice, logging.Logger,
)  # fmt: skip
"""What Dynamo cannot ask for an attribute; none holds a number of the user's."""


def _is_of_arrays(
    value: Any, names: Iterable[str], depth: int, closed: set[str]
) -> bool:
    """Whether a value is an array, or a container of some; collect names of such.

    Of an array that is read inside a transform Dynamo makes a guard that never holds.
    """
    if isinstance(value, _ARRAYS):
        return True
    if depth == 0 or isinstance(value, (*_CLOSED, bool, int, float, complex, str)):
        return False
    if isinstance(value, (list, tuple, dict)):
        below = value.values() if isinstance(value, dict) else value
        return any(_is_of_arrays(x, names, depth - 1, closed) for x in below)
    for name in names:
        if hasattr(value, name) and _is_of_arrays(
            getattr(value, name), names, depth - 1, closed
        ):
            closed.add(name)
    return False


_ARRAYS = np.ndarray, np.generic


def _can_be_followed(value: Any, names: Sequence[str]) -> bool:
    """Whether a value can be looked into: some raise when asked for an attribute."""
    if isinstance(value, (*_CLOSED, random.Random)):
        return False
    try:
        numbers_used(value, names, _DEPTH, [])
        return not _is_of_arrays(value, names, _DEPTH, set())
    except Exception:
        return False
