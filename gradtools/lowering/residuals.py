"""Where each residual lives between forward and backward.

A residual that is an input of the call is saved as that input, one that is an output as
that output, one that occurs twice once. Only what remains is new. Saving an input or an
output as a further tensor would cost its memory again, and the graph that leads through
it: second derivatives would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from gradtools.trees import Structure

__all__ = ["Layout", "Remark", "Source", "lay_out", "opaque_objects"]


class Remark:
    """Something about a call in which no derivative hides: shapes, flags."""

    __slots__ = ()


class Source(NamedTuple):
    """The place of one kept tensor: the ``number``-th input, output or new tensor."""

    kind: str
    number: int

    def pick(
        self, leaves: Sequence[Any], outs: Sequence[Any], new: Sequence[Any]
    ) -> Any:
        """Return the tensor that lives here."""
        places = {"input": leaves, "output": outs, "new": new}
        return places[self.kind][self.number]


class Layout:
    """One call's outputs and residuals without their tensors.

    Attributes:
        outputs: Structure of the output.
        residuals: Structure of the residuals.
        kept: The distinct tensors among the residuals.
        slots: For each tensor of the residuals its position in ``kept``; ``None`` where
            the two are the same list.
        floating: For each output tensor whether it is differentiable; None: all are.
        opaque: The objects among the residuals in which numbers may be hidden.
        rng: Random state before fwd, where fwd is known to draw.
        versions: The tensors inside those objects, each with its path and its version.
    """

    __slots__ = (
        "floating",
        "kept",
        "opaque",
        "outputs",
        "residuals",
        "rng",
        "slots",
        "versions",
    )

    def __init__(
        self,
        outputs: Structure,
        residuals: Structure,
        kept: tuple[Source, ...],
        slots: tuple[int, ...] | None,
        floating: tuple[bool, ...] | None,
    ) -> None:
        self.outputs = outputs
        self.residuals = residuals
        self.kept = kept
        self.slots = slots
        self.floating = floating
        self.opaque: tuple[Any, ...] = ()
        self.rng: Any = None
        self.versions: tuple[tuple[str, torch.Tensor, int], ...] = ()

    def pick(
        self, leaves: Sequence[Any], outs: Sequence[Any], new: Sequence[Any]
    ) -> list[torch.Tensor]:
        """Return the kept tensors."""
        return [source.pick(leaves, outs, new) for source in self.kept]

    def only_floating(self, cotangents: Sequence[Any]) -> Sequence[Any]:
        """Return the cotangents of the outputs, None for those that can have none."""
        given = cotangents[: self.outputs.count]
        if self.floating is None:
            return given
        return [
            c if able else None for c, able in zip(given, self.floating, strict=True)
        ]

    def with_none(self, values: Sequence[Any]) -> Sequence[Any]:
        """Return the values of differentiable outputs, None for the others."""
        if self.floating is None:
            return values
        rest = iter(values)
        return [next(rest) if able else None for able in self.floating]

    def rebuild(self, kept: Sequence[torch.Tensor]) -> Any:
        """Return the residuals as fwd returned them."""
        tensors = kept if self.slots is None else [kept[slot] for slot in self.slots]
        return self.residuals.rebuild(tensors)


def lay_out(
    outputs: Structure,
    outs: Sequence[torch.Tensor],
    residuals: Structure,
    tensors: Sequence[torch.Tensor],
    leaves: Sequence[Any],
) -> tuple[Layout, list[torch.Tensor]]:
    """Find where the residual tensors live; return the layout and the new tensors.

    Where an output is an input, a residual that is both counts as the input.
    """
    places: dict[int, Source] = {}
    for index, out in enumerate(outs):
        places.setdefault(id(out), Source("output", index))
    for index, leaf in reversed(list(enumerate(leaves))):
        if isinstance(leaf, torch.Tensor):
            places[id(leaf)] = Source("input", index)
    kept: dict[Source, int] = {}
    slots: list[int] = []
    new: list[torch.Tensor] = []
    for tensor in tensors:
        source = places.get(id(tensor))
        if source is None:
            source = places[id(tensor)] = Source("new", len(new))
            new.append(tensor)
        slots.append(kept.setdefault(source, len(kept)))
    floating = tuple(out.is_floating_point() or out.is_complex() for out in outs)
    layout = Layout(
        outputs,
        residuals,
        tuple(kept),
        None if len(kept) == len(slots) else tuple(slots),
        None if all(floating) else floating,
    )
    if residuals.constants:
        layout.opaque = opaque_objects(residuals, leaves)
    return layout, new


def opaque_objects(tree: Structure, leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Return the objects of a tree in which a dependence on the leaves may be hidden.

    A float may have been a tensor, a closure may hold one. Integers and the like have
    no derivative, and an object that is an argument did not come from the others.
    """
    return tuple(
        value
        for value in tree.constants.values()
        if not isinstance(value, _WITHOUT_DERIVATIVE)
        and not any(value is leaf for leaf in leaves)
    )


_WITHOUT_DERIVATIVE = (
    type(None), int, str, bytes, type, torch.dtype, torch.device, torch.layout, Remark,
)  # fmt: skip
