"""Objects that hold tensors, as arguments and on ctx.

Checkpoints and adjoint methods take a module together with its parameters, and read
them through the module: the class is no function of its arguments. Others keep an
object on ctx that was built of arguments. Either becomes what it should be when the
object's tensors are exchanged while it is used: for the arguments, or for residuals
like any other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gradtools import trees
from gradtools.lowering.contents import PLAIN, tensors_within
from gradtools.lowering.residuals import Remark
from gradtools.rules.convert import Exchange
from gradtools.rules.marked_inputs import Aliases

__all__ = ["Sharing", "bared", "exchanged", "shared_arguments", "shared_attributes"]


class Sharing(Remark):
    """An object, with what its tensors are exchanged for.

    Attributes:
        object: The object.
        tensors: Tensors inside of it.
        places: Which arguments they are; a negative number for one that is none.
    """

    __slots__ = ("object", "places", "tensors")

    def __init__(
        self, object: Any, tensors: tuple[torch.Tensor, ...], places: tuple[int, ...]
    ) -> None:
        self.object = object
        self.tensors = tensors
        self.places = places

    def __eq__(self, other: object) -> bool:
        # From one element of a batch to the next only the tensors differ.
        return (
            isinstance(other, Sharing)
            and type(self.object) is type(other.object)
            and self.places == other.places
        )

    def __hash__(self) -> int:
        return hash(self.places)


def shared_arguments(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments, with a Sharing for each callable that shares tensors."""
    if not any(map(_is_callable, args)):
        return args
    places = _places(args)
    return tuple(_sharing(arg, places) if _is_callable(arg) else arg for arg in args)


def _is_callable(arg: Any) -> bool:
    return callable(arg) and not isinstance(arg, (torch.Tensor, type))


def _places(args: Sequence[Any]) -> dict[int, int]:
    return {
        id(arg): place
        for place, arg in enumerate(args)
        if isinstance(arg, torch.Tensor)
    }


def _sharing(arg: Any, places: dict[int, int]) -> Any:
    both = [tensor for tensor in tensors_within(arg) if id(tensor) in places]
    if not both:
        return arg
    return Sharing(arg, tuple(both), tuple(places[id(tensor)] for tensor in both))


def shared_attributes(
    attributes: dict[str, Any], args: Sequence[Any], aliases: Aliases
) -> tuple[dict[str, Any], dict[int, Any]]:
    """Return attributes of a ctx, and the tensors inside of objects among them.

    An object with a graph or with parameters stays as it is: it will be refused by name
    where their derivative would be lost.

    Returns:
        The attributes, with a Sharing for each object that holds tensors; by place:
        the arguments and, under negative numbers, other tensors that are to be used.
    """
    shared = {id(arg.object): arg for arg in args if type(arg) is Sharing}
    places, found = _places(args), dict(attributes)
    for key, (_, arg) in aliases.pairs.items():
        if id(arg) in places:
            places[key] = places[id(arg)]
    recording = torch.is_grad_enabled() and any(
        isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args
    )
    used = {place: args[place] for arg in shared.values() for place in arg.places}
    for name, value in attributes.items():
        if id(value) in shared:
            found[name] = shared[id(value)]
            continue
        if isinstance(value, PLAIN) or not trees.is_leaf(value):
            continue
        inside = tensors_within(value)
        known = [id(tensor) in places for tensor in inside]
        if not inside or any(
            t.requires_grad and not (k or recording)
            for t, k in zip(inside, known, strict=True)
        ):
            continue
        for tensor in inside:
            place = places.setdefault(id(tensor), -1 - len(places))
            used[place] = args[place] if place >= 0 else tensor
        numbers = tuple(places[id(tensor)] for tensor in inside)
        found[name] = Sharing(value, tuple(inside), numbers)
    return found, used


def bared(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return values as the class is to see them."""
    return tuple(value.object if type(value) is Sharing else value for value in values)


def exchanged(
    objects: Sequence[Any], values: Sequence[Any] | Mapping[int, Any]
) -> contextlib.AbstractContextManager[Any]:
    """Use ``values`` where objects use tensors that they share.

    Args:
        objects: The objects, or others, which share nothing.
        values: By place: the argument to use for the tensors at that place.
    """
    found = [
        (tensor, values[place])
        for value in objects
        if type(value) is Sharing
        for tensor, place in zip(value.tensors, value.places, strict=True)
    ]
    if not found:
        return contextlib.nullcontext()
    tensors, given = zip(*found, strict=True)
    return Exchange(tensors, given)
