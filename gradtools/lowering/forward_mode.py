"""Forward mode from bwd, and reverse mode from a jvp rule, by transposition.

bwd is linear in the cotangent, so the tangent of the output is bwd transposed and
applied to the tangents of the inputs: one vjp of bwd. (The trick is J. Townsend's, "A
new trick for calculating Jacobian vector products", 2017.) A jvp rule is linear in the
tangents, so bwd is one vjp of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradtools import torch_compat, trees

if TYPE_CHECKING:
    from gradtools.lowering.flat import Lowerable
    from gradtools.lowering.residuals import Layout

__all__ = ["alias", "pulled_back", "transposed", "transposed_jvp"]

Tensors = Sequence[torch.Tensor]
Optional = Sequence[torch.Tensor | None]


def transposed(
    plan: Lowerable,
    layout: Layout,
    kept: Tensors,
    outs: Tensors,
    tangents: Sequence[Any],
) -> list[torch.Tensor | None]:
    """Return one tangent per output, None for an output that has none."""
    moved = [tangent is not None for tangent in tangents]
    given = [tangent for tangent in tangents if tangent is not None]

    def bwd(*cotangents: torch.Tensor) -> list[torch.Tensor]:
        every = layout.with_none(cotangents)
        values = plan.backward(layout, kept, every, moved)
        chosen = [value for value, move in zip(values, moved, strict=True) if move]
        return [
            torch.zeros_like(tangent) if value is None else value
            for value, tangent in zip(chosen, given, strict=True)
        ]

    # At ones rather than zeros: bwd of logcumsumexp, for one, takes a logarithm of its
    # cotangent, and its transpose at zero is NaN.
    floating = [out for out in layout.only_floating(outs) if out is not None]
    ones = [torch.ones_like(out) for out in floating]
    values = pulled_back(bwd, ones, given, kept)
    return list(layout.with_none(values))


def transposed_jvp(
    plan: Lowerable,
    layout: Layout,
    kept: Tensors,
    cotangents: Optional,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Return one cotangent per leaf from a jvp rule; its residuals are the leaves."""
    leaves = trees.flatten(layout.rebuild(kept))[0]
    given = [cotangent for cotangent in cotangents if cotangent is not None]

    def jvp(*tangents: torch.Tensor) -> list[torch.Tensor]:
        rest = iter(tangents)
        moving = [next(rest) if need else None for need in needs]
        moved = plan.jvp(layout, leaves, moving, ())
        return [
            torch.zeros_like(cotangent) if tangent is None else tangent
            for tangent, cotangent in zip(moved, cotangents, strict=True)
            if cotangent is not None
        ]

    ones = [
        torch.ones_like(leaf) for leaf, need in zip(leaves, needs, strict=True) if need
    ]
    values = iter(pulled_back(jvp, ones, given, leaves))
    return [next(values) if need else None for need in needs]


def pulled_back(
    function: Callable[..., Tensors],
    primals: Tensors,
    cotangents: Tensors,
    used: Sequence[Any],
) -> Tensors:
    """Return the vjp of a function at its primals.

    Under a transform this is ``torch.func.vjp``. Elsewhere plain autograd does the same
    for less, and under saved-tensor hooks, which torch.func refuses.

    Args:
        function: The function.
        primals: Its arguments.
        cotangents: One per value that it returns.
        used: The tensors that it uses beside its arguments.
    """
    if torch_compat.transforms_active():
        return torch.func.vjp(lambda *values: tuple(function(*values)), *primals)[1](
            tuple(cotangents)
        )
    again = torch.is_grad_enabled() and any(
        isinstance(tensor, torch.Tensor) and torch_compat.plain(tensor).requires_grad
        for tensor in (*primals, *cotangents, *used)
    )
    with torch.enable_grad():
        inputs = [alias(primal) for primal in primals]
        outputs = function(*inputs)
        pairs = [
            (output, cotangent)
            for output, cotangent in zip(outputs, cotangents, strict=True)
            if output.requires_grad
        ]
        if not pairs:
            return [torch.zeros_like(primal) for primal in primals]
        reached, given = zip(*pairs, strict=True)
        return torch.autograd.grad(
            reached,
            inputs,
            given,
            create_graph=again,
            allow_unused=True,
            materialize_grads=True,
        )


def alias(primal: torch.Tensor) -> torch.Tensor:
    """Return a tensor to differentiate by; behind it the graph, if any, goes on.

    Asked of the alias, not of the primal: a tensor whose transform has ended still says
    that it requires a gradient, and what is computed from it does not.
    """
    other = primal.view_as(primal)
    return other if other.requires_grad else other.detach().requires_grad_()
