"""Objects that hold tensors which are arguments as well.

Checkpoints and adjoint methods take a module together with its parameters, and read
them through the module: the class is no function of its arguments. Others keep an
object on ctx that was built of arguments. Either becomes what it should be when the
object's tensors are exchanged for the arguments while it is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gradtools import trees
from gradtools.lowering.contents import PLAIN, hidden_tensors
from gradtools.lowering.residuals import Remark
from gradtools.rules.convert import Exchange

__all__ = ["Sharing", "bared", "exchanged", "shared_arguments", "shared_attributes"]


class Sharing(Remark):
    """An object, with the places of its tensors among the arguments.

    Attributes:
        object: The object.
        tensors: Tensors inside of it that are arguments too.
        places: Which arguments they are.
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
    return tuple(
        _sharing(arg, args, 4) or arg if _is_callable(arg) else arg for arg in args
    )


def shared_attributes(
    attributes: dict[str, Any], args: Sequence[Any]
) -> dict[str, Any]:
    """Return attributes of a ctx, with a Sharing for each object made of arguments.

    An object that holds other tensors as well stays: it will be refused by name where
    their derivative would be lost.
    """
    known = {id(arg.object): arg for arg in args if type(arg) is Sharing}
    found = dict(attributes)
    for name, value in attributes.items():
        if isinstance(value, PLAIN) or not trees.is_leaf(value):
            continue
        sharing = known.get(id(value)) or _sharing(value, args, 8, whole=True)
        if sharing is not None:
            found[name] = sharing
    return found


def _is_callable(arg: Any) -> bool:
    return callable(arg) and not isinstance(arg, (torch.Tensor, type))


def _sharing(
    value: Any, args: Sequence[Any], depth: int, *, whole: bool = False
) -> Sharing | None:
    places = {
        id(arg): place
        for place, arg in enumerate(args)
        if isinstance(arg, torch.Tensor)
    }
    inside = {id(tensor): tensor for _, tensor in hidden_tensors(value, depth)}
    both = [key for key in inside if key in places]
    if not both or (whole and len(both) < len(inside)):
        return None
    return Sharing(
        value, tuple(inside[key] for key in both), tuple(places[key] for key in both)
    )


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
