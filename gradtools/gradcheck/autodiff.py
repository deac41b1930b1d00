"""torch's own derivatives, taken at arm's length: of fun, and of bwd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradtools.gradcheck.subject import floats
from gradtools.probing import plainly

__all__ = ["pullback", "pulled_back", "tracked"]

Tensors = Sequence[torch.Tensor]
Optional = Sequence[torch.Tensor | None]


def tracked(values: Sequence[Any], places: Sequence[int] | None = None) -> list[Any]:
    """Return tensors (those at ``places``, or all) as leaves of a new graph."""
    return [
        value.detach().requires_grad_()
        if floats(value) and (places is None or place in places)
        else value
        for place, value in enumerate(values)
    ]


def pulled_back(
    outputs: Optional, inputs: Sequence[Any], weights: Optional, *, again: bool = False
) -> list[torch.Tensor | None] | None:
    """Return the vjp of outputs with a graph; None where none of them has one.

    Args:
        outputs: What was computed.
        inputs: What it was computed from; None is returned for those that torch does
            not see a way to.
        weights: One cotangent per output.
        again: The result is to be differentiated too.
    """
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
        total,
        [inputs[place] for place in able],
        allow_unused=True,
        create_graph=again,
        retain_graph=True,
    )
    found: list[torch.Tensor | None] = [None] * len(inputs)
    for place, value in zip(able, values, strict=True):
        found[place] = value
    return found


def pullback(
    function: Callable[[Sequence[Any]], Tensors],
    leaves: Sequence[Any],
    places: Sequence[int],
) -> Callable[[Optional], Optional] | None:
    """Return the vjp of a function by autograd; None where torch cannot see into it.

    Args:
        function: From leaves to floating tensors.
        leaves: Where.
        places: The leaves to differentiate by.
    """
    try:
        with torch.enable_grad(), plainly():
            inputs = tracked(leaves, places)
            outputs = function(inputs)
    except Exception:  # code that torch cannot see raises what it likes
        return None
    if not any(output.requires_grad for output in outputs):
        return None
    nothing: Optional = [None] * len(inputs)
    return lambda weights: pulled_back(outputs, inputs, weights) or nothing
