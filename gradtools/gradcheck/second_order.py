"""What a second-order use of a rule computes: the derivative of bwd.

bwd reads residuals. One that is an argument leads to that argument, one that is an
output to the rule again, and one that fwd made to the arguments through fwd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradtools.lowering.flat import Plan

__all__ = ["gradient", "pulled_back"]

Tensors = Sequence[torch.Tensor]
Optional = Sequence[torch.Tensor | None]


def gradient(
    plan: Plan, leaves: Sequence[Any], cotangents: Optional, places: Sequence[int]
) -> list[torch.Tensor]:
    """Return the cotangents of the leaves at ``places`` for fixed output cotangents."""
    outs, new, layout = plan.forward(leaves)
    kept = layout.pick(leaves, outs, new)
    values = plan.backward(layout, kept, cotangents, _needs(leaves, places))
    return [_filled(values[place], leaves[place]) for place in places]


def pulled_back(
    plan: Plan,
    leaves: Sequence[Any],
    cotangents: Optional,
    places: Sequence[int],
    weights: Tensors,
) -> list[torch.Tensor | None] | None:
    """Return the derivative of the weighted :func:`gradient` in every leaf.

    Returns:
        One cotangent per leaf; None where torch sees nothing of bwd.
    """
    needs = _needs(leaves, places)
    with torch.enable_grad():
        tracked = [_tracked(leaf) for leaf in leaves]
        outs, new, layout = plan.forward(tracked)
        kept = [_tracked(tensor) for tensor in layout.pick(tracked, outs, new)]
        values = plan.backward(layout, kept, cotangents, needs)
    found = _grad([values[place] for place in places], kept, weights)
    if found is None:
        return None
    total: list[torch.Tensor | None] = [None] * len(leaves)
    again: list[torch.Tensor | None] = [None] * len(outs)
    made: list[torch.Tensor | None] = [None] * len(new)
    into = {"input": total, "output": again, "new": made}
    for (kind, number), value in zip(layout.kept, found, strict=True):
        into[kind][number] = value
    parts = []
    if any(value is not None for value in again):
        bare = [tensor.detach() for tensor in kept]
        parts.append(plan.backward(layout, bare, again, needs))
    if any(value is not None for value in made):
        parts.append(_grad(new, tracked, made) or [None] * len(leaves))
    for part in parts:
        total = [_added(a, b) for a, b in zip(total, part, strict=True)]
    return total


def _grad(
    outputs: Optional, inputs: Sequence[Any], weights: Optional
) -> list[torch.Tensor | None] | None:
    """Differentiate what has a graph; None where nothing has."""
    pairs = [
        (output, weight)
        for output, weight in zip(outputs, weights, strict=True)
        if output is not None and output.requires_grad and weight is not None
    ]
    able = [
        place
        for place, value in enumerate(inputs)
        if isinstance(value, torch.Tensor) and value.requires_grad
    ]
    if not pairs or not able:
        return None
    with torch.enable_grad():  # a scalar: torch imports much to verify grad_outputs
        parts = [(weight.conj() * output).sum().real for output, weight in pairs]
        total = sum(parts[1:], parts[0])
    values = torch.autograd.grad(
        total, [inputs[place] for place in able], allow_unused=True
    )
    found: list[torch.Tensor | None] = [None] * len(inputs)
    for place, value in zip(able, values, strict=True):
        found[place] = value
    return found


def _needs(leaves: Sequence[Any], places: Sequence[int]) -> list[bool]:
    return [place in places for place in range(len(leaves))]


def _tracked(value: Any) -> Any:
    able = isinstance(value, torch.Tensor) and (
        value.is_floating_point() or value.is_complex()
    )
    return value.detach().requires_grad_() if able else value


def _filled(value: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    if value is None:
        return torch.zeros_like(like)
    return value if value.layout is torch.strided else value.to_dense()


def _added(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b
