"""Numbers, texts and flags that a rule's functions read past their arguments.

Under a transform torch.compile does not look into fwd and bwd, and would keep such a
value for ever. So the code is searched, in plain Python, for all that it can reach:
closures, globals, the attributes that it names, methods, modules, containers. The trace
then reads each of them itself, and so guards on it.
"""

from __future__ import annotations

import collections
import enum
import inspect
import numbers
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from gradtools.errors import TransformError, Violation
from gradtools.lowering.free_variables import (
    CALLABLES,
    Path,
    follow,
    is_foreign,
    names_in,
    uses,
)
from gradtools.rules.rule import Rule

__all__ = ["Cells", "Settings", "settings_read"]

Settings = tuple[tuple[Path, Any], ...]

_DEEPEST = 16
_CONSTANT = (
    type(None), bool, int, float, complex, str, enum.Enum, torch.dtype, torch.device,
    torch.layout,
)  # fmt: skip
_CONTAINERS = (
    list, tuple, dict, set, frozenset, collections.deque, collections.UserDict,
    collections.UserList, types.MappingProxyType,
)  # fmt: skip
_ROLES = ("fun", "fwd", "bwd", "jvp", "vmap_rule")
_MISSING = object()


class Cells:
    """Functions that return what is in the cells of others.

    Dynamo takes no cell apart that the function which it traces has as well; it does
    follow code that names the variable. Here they stay, for it guards on them.
    """

    def step_to(self, cell: types.CellType) -> tuple[str, str]:
        """Return the step to the function for a cell, as an attribute of this."""
        for name, read in vars(self).items():
            if any(own is cell for own in read.__closure__ or ()):  # == asks contents
                return "attribute", name
        held = None

        def read() -> Any:
            return held

        name = f"cell_{len(vars(self))}"
        made = types.FunctionType(read.__code__, globals(), name, None, (cell,))
        setattr(self, name, made)
        return "attribute", name


def settings_read(
    rule: Rule, cells: Cells, objects: Sequence[Any], *, in_aot: bool
) -> Settings:
    """Return a path and a value for all that a rule reads: of numbers, the number.

    Args:
        rule: The rule.
        cells: Its cells, which are kept with it.
        objects: Its arguments; tensors and numbers among them are none of this.
        in_aot: AOT autograd traces, which takes no tensor that it is not handed.

    Returns:
        Paths that start at ``(rule, cells, *objects)``.

    Raises:
        TransformError: The rule reads what can be neither guarded on nor traced.
    """
    names: frozenset[str] = frozenset()
    while True:  # a method may name attributes of what was searched before it was found
        search = _Search(rule, cells, names, in_aot)
        search.visit(rule, (("item", 0),))
        for index, value in enumerate(objects, 2):
            if not isinstance(value, (*_CONSTANT, torch.Tensor)):
                is_self = rule.is_method and index == 2
                search.visit(value, (("item", index),), is_called=not is_self)
        before, names = names, frozenset(search.used)
        if names == before:
            return tuple(search.found.items())


class _Search:
    """One walk through what the functions of a rule reach.

    Args:
        rule: The rule.
        cells: Its cells.
        names: The names that their code is known to use.
        in_aot: Captured tensors are errors.

    Attributes:
        used: The names that their code was found to use.
        found: The constants, by the path to each.
    """

    def __init__(
        self, rule: Rule, cells: Cells, names: frozenset[str], in_aot: bool
    ) -> None:
        self.rule = rule
        self.cells = cells
        self.names = names
        self.in_aot = in_aot
        self.used: set[str] = set()
        self.found: dict[Path, Any] = {}
        self.seen: set[tuple[int, Any]] = set()
        self.alive: list[Any] = []  # so that no number in seen is given anew

    def visit(
        self,
        value: Any,
        path: Path,
        label: str = "",
        *,
        is_called: bool = True,
        is_named: bool = True,
    ) -> None:
        """Search a value.

        Args:
            value: The value.
            path: What leads to it.
            label: The same in words.
            is_called: The rule may call it.
            is_named: Functions alone lead to it.
        """
        if isinstance(value, (np.ndarray, np.generic)):
            raise self.lost(label, f"a numpy {type(value).__name__}")
        if isinstance(value, _CONSTANT):
            is_number = isinstance(value, (bool, int, float))
            self.found[path] = value if is_number else None
        elif isinstance(value, numbers.Number):
            raise self.lost(label, f"a {type(value).__name__}")
        elif isinstance(value, torch.Tensor):
            if is_named and self.in_aot and path[-1][0] in ("call", "global"):
                raise self.lost(label, f"a tensor of shape {tuple(value.shape)}")
        elif isinstance(value, type) and issubclass(value, torch.autograd.Function):
            self.refuse_numbers_of(value)
        elif len(path) < _DEEPEST:
            self.alive.append(value)
            new: list[tuple[str, Path]] = []
            for below, holder, *way in self.parts(value, is_called):
                where = (id(holder), way[-1])
                if where not in self.seen:  # once, and by the shortest way
                    self.seen.add(where)
                    new.append((below, tuple(way)))
            for below, way in new:
                more = below if below[:1].isalpha() else label + below
                further = (*path, *way)
                if way[0][0] == "cell":
                    step = self.cells.step_to(value.__closure__[way[0][1]])
                    further = ("item", 1), step, ("call", None)
                of_code = is_named and _is_of_code(way)
                self.visit(follow(value, way), further, more, is_named=of_code)

    def parts(self, value: Any, is_called: bool) -> Iterator[tuple[Any, ...]]:
        """Yield the parts of a value: a label, what holds it, the steps to it."""
        if isinstance(value, Rule):
            for role in _ROLES[value.is_opaque :]:  # a kernel reads when it runs
                yield role, value, ("attribute", role)
        elif hasattr(type(value), "run_entries"):  # another rule
            if hasattr(value, "rule"):
                yield "", value, ("attribute", "rule")
        elif isinstance(value, types.FunctionType):
            if not is_foreign(value):
                self.used |= names_in(value)
                yield from uses(value)
        elif isinstance(value, CALLABLES):
            yield from uses(value)
        elif isinstance(value, _CONTAINERS):
            yield from _items(value)
        elif not is_foreign(value) and _has_attributes(value):
            yield from self.attributes(value, is_called)

    def attributes(self, value: Any, is_called: bool) -> Iterator[tuple[Any, ...]]:
        """Yield the attributes of an object, a class or a module that code names."""
        is_module = isinstance(value, torch.nn.Module)
        modules = vars(value)["_modules"] if is_module else {}
        if is_called:
            called = "forward" if is_module else "__call__"
            method = getattr(type(value), called, None)
            if isinstance(method, types.FunctionType):
                self.used |= names_in(method)  # also of torch.nn's: eps, training
                yield "", value, ("attribute", called)
            for name in modules:
                yield f".{name}", modules, ("attribute", "_modules"), ("item", name)
        for name in sorted(self.names):
            has = name in modules or _has(value, name)
            if has:
                yield f".{name}", value, ("attribute", name)
            elif has is False and not isinstance(value, (type, types.ModuleType)):
                yield "", value, ("has", name)

    def refuse_numbers_of(self, cls: type) -> None:
        """Raise where code names a number of a class that Dynamo reads nothing of."""
        for name in sorted(self.names):
            value = inspect.getattr_static(cls, name, None)
            function = getattr(value, "__func__", None)  # of a staticmethod
            if isinstance(function, types.FunctionType):
                self.used |= names_in(function)
            if isinstance(value, (int, float, str)) and not name.startswith("__"):
                raise self.lost(f"{cls.__name__}.{name}", f"a {type(value).__name__}")

    def lost(self, label: str, got: str) -> TransformError:
        """Return the error for what can be neither guarded on nor traced."""
        return TransformError(
            f"{self.rule.name}: where torch.compile meets a transform, it would not "
            "see a value change that the rule does not get as an argument",
            rule=self.rule.where,
            violations=[
                Violation(
                    label,
                    "an argument, or a Python number in a closure, a global or an "
                    "object",
                    got,
                )
            ],
            fix="Pass it as an argument (gradtools.closure_convert finds all tensors), "
            "or convert it outside of the rule: tensor.item(), float(number).",
        )


def _is_of_code(way: Path) -> bool:
    """Whether functions alone lead there: attributes may be met by accident."""
    return all(
        kind != "attribute" or key in (*_ROLES, "rule", "func", "__func__")
        for kind, key in way
    )


def _has_attributes(value: Any) -> bool:
    """Whether a value is an object of the user's, not a part of Python itself."""
    has_slots = any("__slots__" in vars(cls) for cls in type(value).__mro__)
    return hasattr(value, "__dict__") or has_slots


def _has(value: Any, name: str) -> bool | None:
    """Whether an object has an attribute; None where asking for it fails."""
    static = inspect.getattr_static(value, name, _MISSING)
    if isinstance(value, type) and inspect.isdatadescriptor(static):
        return None
    try:
        found = getattr(value, name)
    except AttributeError:
        return False
    except Exception:  # a property, or a library, that has nothing to say yet
        return None
    # Parameters of a module are no settings: that they are there is enough.
    return static is not _MISSING or not isinstance(found, torch.Tensor)


def _items(value: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the parts of a container, and how many there are."""
    if isinstance(value, (collections.UserDict, collections.UserList)):
        yield "", value, ("attribute", "data")
        return
    yield "", value, ("length", None)
    if isinstance(value, (list, tuple, collections.deque)):
        for index in range(len(value)):
            yield f"[{index}]", value, ("item", index)
    else:
        is_mapping = isinstance(value, (dict, types.MappingProxyType))
        step = "item" if is_mapping else "contains"
        for key in value:
            if isinstance(key, (str, int, float)):
                yield f"[{key!r}]", value, (step, key)
