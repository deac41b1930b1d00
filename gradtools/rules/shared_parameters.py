"""A callable argument whose parameters are arguments as well.

Checkpoints and adjoint methods take a module together with its parameters, and read
them through the module: the class is no function of its arguments. It becomes one when
the module's tensors are exchanged for the arguments while it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gradtools.lowering.contents import hidden_tensors
from gradtools.rules.convert import Exchange

__all__ = ["Sharing", "bared", "exchanged", "shared"]


class Sharing:
    """A callable argument, with the places of its tensors among the arguments.

    Attributes:
        callable: The argument.
        tensors: Tensors inside of it that are arguments too.
        places: Which arguments they are.
    """

    __slots__ = ("callable", "places", "tensors")

    def __init__(
        self,
        callable: Callable[..., Any],
        tensors: tuple[torch.Tensor, ...],
        places: tuple[int, ...],
    ) -> None:
        self.callable = callable
        self.tensors = tensors
        self.places = places


def shared(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments, with a Sharing for each callable that shares tensors."""
    if not any(map(_is_callable, args)):
        return args
    places = {
        id(arg): place for place, arg in enumerate(args) if type(arg) in _WITH_GRADIENT
    }
    return tuple(_sharing(arg, places) if _is_callable(arg) else arg for arg in args)


_WITH_GRADIENT = (torch.Tensor, torch.nn.Parameter)


def _is_callable(arg: Any) -> bool:
    return callable(arg) and not isinstance(arg, (torch.Tensor, type))


def _sharing(arg: Any, places: dict[int, int]) -> Any:
    inside = {id(tensor): tensor for _, tensor in hidden_tensors(arg)}
    both = [key for key in inside if key in places]
    if not both:
        return arg
    return Sharing(
        arg, tuple(inside[key] for key in both), tuple(places[key] for key in both)
    )


def bared(args: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arguments as the class is to see them."""
    return tuple(arg.callable if type(arg) is Sharing else arg for arg in args)


def exchanged(
    args: Sequence[Any], values: Sequence[Any] | Mapping[int, Any]
) -> contextlib.AbstractContextManager[Any]:
    """Use ``values`` where callables among ``args`` use tensors that they share.

    Args:
        args: The arguments.
        values: By place: the argument to use for the tensors at that place.
    """
    found = [
        (tensor, values[place])
        for arg in args
        if type(arg) is Sharing
        for tensor, place in zip(arg.tensors, arg.places, strict=True)
    ]
    if not found:
        return contextlib.nullcontext()
    tensors, given = zip(*found, strict=True)
    return Exchange(tensors, given)
