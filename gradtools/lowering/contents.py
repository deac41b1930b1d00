"""The tensors and numbers inside an object: attributes, containers, closures."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from gradtools import trees
from gradtools.lowering.free_variables import (
    CALLABLES,
    follow,
    free_variables,
    is_assigned,
    is_library,
)

__all__ = [
    "PLAIN",
    "WITHOUT_TENSORS",
    "Converted",
    "hidden_numbers",
    "hidden_tensors",
    "modules_within",
    "name_of",
    "never_holds_tensors",
    "place_of",
    "tensors_used",
    "tensors_within",
    "unnamed",
    "versions",
]


def place_of(
    tensor: torch.Tensor, function: Any, objects: Iterable[Any] = ()
) -> str | None:
    """Say through which name, or which argument, a tensor reached a function."""
    places = [
        (label, follow(function, steps))
        for label, steps in free_variables(function).items()
    ]
    places += [(f"an argument of type {type(o).__name__}: ", o) for o in objects]
    for label, value in places:
        for path, found in _reachable(value, "", 3, set()):
            if found is tensor:
                return label + path
    return None


def name_of(tensor: torch.Tensor, function: Any, objects: Iterable[Any] = ()) -> str:
    """Say where a function has a tensor from, or else what it looks like."""
    return place_of(tensor, function, objects) or unnamed(tensor)


def unnamed(tensor: torch.Tensor) -> str:
    """Describe a tensor that no name leads to."""
    return f"a tensor of shape {tuple(tensor.shape)} that is no argument"


def _reachable(
    value: Any, path: str, depth: int, seen: set[int], kinds: Any = torch.Tensor
) -> Iterator[tuple[str, Any]]:
    """Yield the tensors that an object holds, each with the path to it."""
    if isinstance(value, kinds):
        yield path, value
        return
    if depth == 0 or id(value) in seen or isinstance(value, WITHOUT_TENSORS):
        return
    seen.add(id(value))
    for key, child in _parts(value):
        yield from _reachable(child, path + key, depth - 1, seen, kinds)


class Converted:
    """A function whose tensors have become arguments: none hides in it any more."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self.function(*args)


WITHOUT_TENSORS = (
    type(None), bool, int, float, complex, str, bytes, type, types.ModuleType,
    torch.dtype, torch.device, torch.Size, Converted,
)  # fmt: skip
PLAIN = (torch.Tensor, *WITHOUT_TENSORS)


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, torch.nn.Module):
        return _parts_of_module(value)
    if isinstance(value, CALLABLES):
        return _parts_of_callable(value)
    if isinstance(value, types.BuiltinFunctionType):  # tensor.mul, say
        return [(".__self__", value.__self__)]
    if isinstance(value, (set, frozenset)):
        return [("{...}", child) for child in value]
    below = trees.children(value)
    return _attributes(value) if below is None else below


def _parts_of_module(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    tensors = (*module.named_parameters(), *module.named_buffers())
    yield from ((f".{name}", tensor) for name, tensor in tensors)
    for prefix, inner in module.named_modules():
        for name, own in vars(inner).items():
            if not name.startswith("_"):
                yield f".{prefix}.{name}".replace("..", "."), own


def _parts_of_callable(function: Any) -> Iterator[tuple[str, Any]]:
    for label, steps in free_variables(function).items():
        yield f" {label}", follow(function, steps)
    if is_library(function):  # a pullback of torch.func's, say
        for cell in getattr(function, "__closure__", None) or ():
            if is_assigned(cell):
                yield " closure", cell.cell_contents


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from (
        (f".{name}", child) for name, child in getattr(value, "__dict__", {}).items()
    )
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield f".{name}", getattr(value, name)


def tensors_within(value: Any) -> list[torch.Tensor]:
    """Return all tensors that an object holds inside, each once, in any depth."""
    found = _reachable(value, "", 16, set())
    return list({id(tensor): tensor for _, tensor in found}.values())


def hidden_tensors(value: Any) -> list[tuple[str, torch.Tensor]]:
    """Return the floating tensors that an object holds inside, each with its path."""
    return [
        (path, tensor)
        for path, tensor in _reachable(value, "", 4, set())
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex
    ]


def versions(objects: Iterable[Any]) -> tuple[tuple[str, torch.Tensor, int], ...]:
    """Return the floating tensors inside objects, each with its path and its version.

    What modules hold may change: statistics of a batch are for nobody's derivative.
    """
    return tuple(
        (f"residuals, a {type(value).__name__} ({path.lstrip('.')})", tensor, version)
        for value in objects
        if not isinstance(value, torch.nn.Module)
        for path, tensor in hidden_tensors(value)
        if (version := _version(tensor)) is not None
    )


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def tensors_used(
    value: Any, names: frozenset[str], depth: int = 4, *, is_self: bool = False
) -> Iterator[torch.Tensor]:
    """Yield the tensors that code reaches from a value by these attribute names.

    This is for every call: it goes to few places and runs no code of the user's. All
    parameters of a module count, as it may be called, but not those of ``self``.
    """
    if isinstance(value, torch.Tensor):
        yield value
        return
    if depth == 0 or isinstance(value, WITHOUT_TENSORS):
        return
    if isinstance(value, torch.nn.Module):
        parts = _named_parts(value, names)
        parts += [] if is_self else value.parameters()
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (tuple, list, set, frozenset)):
        parts = list(value)
    elif isinstance(value, (*CALLABLES, types.BuiltinFunctionType)):
        parts = [child for _, child in _parts(value)]
    else:
        parts = _named_parts(value, names)
    for part in parts:
        yield from tensors_used(part, names, depth - 1)


def _named_parts(value: Any, names: frozenset[str]) -> list[Any]:
    """Return the attributes of an object that have these names, properties aside."""
    own = getattr(value, "__dict__", {})
    places = [
        own,
        *(own.get(f"_{k}", {}) for k in ("parameters", "buffers", "modules")),
    ]
    found = [place[name] for place in places for name in names & place.keys()]
    slots = (name for name in names if _is_slot(getattr(type(value), name, None)))
    return found + [getattr(value, name, None) for name in slots]


def _is_slot(descriptor: Any) -> bool:
    return isinstance(descriptor, types.MemberDescriptorType)


def modules_within(value: Any) -> list[torch.nn.Module]:
    """Return the modules that an object is or holds inside, in any depth."""
    found = _reachable(value, "", 4, set(), torch.nn.Module)
    return [inner for _, module in found for inner in module.modules()]


def hidden_numbers(value: Any) -> list[Any]:
    """Return the numbers and arrays, no tensors, that an object is or holds inside."""
    return [number for _, number in _reachable(value, "", 4, set(), _NUMBERS)]


_NUMBERS = (float, complex, np.ndarray, np.generic)


def never_holds_tensors(value: Any) -> bool:
    """Whether a free variable need not be looked through at every call.

    Another rule looks for what it captures itself.
    """
    is_library = isinstance(value, (types.ModuleType, type, ctypes.CDLL))
    return is_library or hasattr(type(value), "run_entries")
