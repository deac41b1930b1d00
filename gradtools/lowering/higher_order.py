"""Derivatives of the derivative.

A residual that is an input or an output keeps its place in the graph by itself. A
residual that fwd computed does not: where a second derivative is asked for, fwd runs
again with gradients on, and the new residuals are differentiated through it. Leaving
that term out makes a Hessian wrong without a sign.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from gradtools import torch_compat
from gradtools.errors import TransformError
from gradtools.lowering.flat import Lowerable
from gradtools.lowering.forward_mode import pulled_back
from gradtools.lowering.replay import replayed
from gradtools.lowering.residuals import Layout
from gradtools.rules.rule import Rule

__all__ = ["Ends", "Inputs", "residual_cotangents", "residual_tangents", "traced"]

Tensors = Sequence[torch.Tensor]
Optional = Sequence[torch.Tensor | None]


class Inputs:
    """The arguments of a call, kept so that fwd can run again.

    What bwd reads is saved for it already and is taken from there. The rest is saved
    apart: bwd never unpacks it, so it may be changed in place after the call, as it may
    with a hand-written Function; only a second derivative will then complain.
    """

    __slots__ = ("places",)

    def __init__(self, leaves: Sequence[Any], layout: Layout) -> None:
        read = {
            source.number: position
            for position, source in enumerate(layout.kept)
            if source.kind == "input"
        }
        self.places: list[tuple[str, Any]] = [
            ("kept", read[index])
            if index in read
            else ("apart", torch_compat.keep(leaf))
            if isinstance(leaf, torch.Tensor)
            else ("constant", leaf)
            for index, leaf in enumerate(leaves)
        ]

    def leaves(self, kept: Tensors) -> list[Any]:
        """Return the arguments, given the kept tensors."""
        return [_unpack(kind, what, kept) for kind, what in self.places]


class Ends:
    """What leads back to the arguments and holds none of their memory.

    A rule that is once_differentiable needs it to refuse a second derivative: a
    residual that fwd computed leads nowhere, and the derivative would be zero.
    """

    __slots__ = ("ends",)

    def __init__(self, leaves: Sequence[Any]) -> None:
        with torch.enable_grad():
            self.ends = [
                _nothing_of(leaf)
                for leaf in leaves
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad
            ]

    def leaves(self, kept: Tensors) -> list[Any]:
        """Return an empty tensor for each argument that needs a gradient."""
        return self.ends


def _nothing_of(tensor: torch.Tensor) -> torch.Tensor:
    """Select no element: no view, and its backward keeps nothing but sizes."""
    nowhere = torch.empty(0, dtype=torch.int64, device=tensor.device)
    return torch.atleast_1d(tensor).index_select(0, nowhere)


def _unpack(kind: str, what: Any, kept: Tensors) -> Any:
    if kind == "kept":
        return kept[what]
    return what() if kind == "apart" else what


def traced(
    plan: Lowerable, layout: Layout, kept: Tensors, leaves: Sequence[Any]
) -> Tensors:
    """Return the kept tensors with every new one computed again, in the graph."""
    if all(source.kind != "new" for source in layout.kept):
        return kept
    with replayed(layout.rng):
        _, new, _ = plan.forward(leaves)
    fresh = [
        new[source.number] if source.kind == "new" else None for source in layout.kept
    ]
    for before, after in zip(kept, fresh, strict=True):
        if after is not None and not _agree(before, after):
            raise irreproducible(plan)
    return [old if now is None else now for old, now in zip(kept, fresh, strict=True)]


def _agree(before: torch.Tensor, after: torch.Tensor) -> bool:
    if before.shape != after.shape or before.dtype != after.dtype:
        return False
    if (
        torch_compat.transforms_active()
        or torch_compat.is_fake(before)
        or before.is_meta
    ):
        return True
    with torch_compat.without_modes(), torch.no_grad():
        if not before.is_floating_point() and not before.is_complex():
            return torch.equal(before, after)
        # Reductions on a GPU may differ in the last digits; hidden randomness differs
        # in the first.
        tolerance = torch.finfo(before.dtype).eps ** 0.5
        return torch.allclose(before, after, tolerance, tolerance, equal_nan=True)


def irreproducible(plan: Lowerable) -> TransformError:
    """Return the error for a fwd that gives other residuals when it runs again."""
    return TransformError(
        f"{plan.rule.name}: fwd gave other residuals when it was run again for a "
        "second derivative",
        rule=plan.rule.where,
        function=plan.rule.which("fwd"),
        fix="Draw random numbers from torch's global generators only, or draw them "
        "outside and pass them as an argument; keep no state between calls.",
    )


def _fwd_of(
    plan: Lowerable, layout: Layout, leaves: Sequence[Any], wanted: Sequence[bool]
) -> tuple[Callable[..., tuple[torch.Tensor, ...]], list[torch.Tensor]]:
    """Return fwd as a function from the wanted leaves to the new residuals."""
    places = [index for index, want in enumerate(wanted) if want]

    def function(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = list(leaves)
        for index, value in zip(places, given, strict=True):
            values[index] = value
        with replayed(layout.rng):
            return tuple(plan.forward(values)[1])

    return function, [leaves[index] for index in places]


def residual_cotangents(
    plan: Lowerable,
    layout: Layout,
    leaves: Sequence[Any],
    cotangents: Optional,
    needs: Sequence[bool],
) -> Optional:
    """Pull cotangents of the new residuals back through fwd; one per leaf."""
    function, given = _fwd_of(plan, layout, leaves, needs)
    wanted = [index for index, value in enumerate(cotangents) if value is not None]

    def chosen(*values: torch.Tensor) -> list[torch.Tensor]:
        new = function(*values)
        return [new[index] for index in wanted]

    known = [value for value in cotangents if value is not None]
    values = iter(pulled_back(chosen, given, known, leaves))
    return [next(values) if need else None for need in needs]


def residual_tangents(
    plan: Lowerable, layout: Layout, duals: Sequence[Any], tangents: Optional
) -> list[torch.Tensor | None]:
    """Push tangents through fwd to the new residuals.

    Runs inside a Function's jvp, with tangents switched on again: the leaves carry
    those of the innermost level, so running fwd on them is forward mode already.
    Where an operation has no forward mode, the vjp is transposed instead. So it is
    where fwd calls the rule itself, as fwd in JAX likes to: the tangent of that call
    would ask for those of its residuals, and so on for ever, though nobody reads it.
    """
    if plan.rule not in _under_way.rules:
        try:
            with _under_way.of(plan.rule), replayed(layout.rng):
                new = plan.forward(duals)[1]
            return [torch_compat.tangent_of(tensor) for tensor in new]
        except NotImplementedError:
            pass
    primals = [
        torch_compat.primal_of(leaf) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in duals
    ]
    moved = [tangent is not None for tangent in tangents]
    function, given = _fwd_of(plan, layout, primals, moved)

    def pull_back(*cotangents: torch.Tensor) -> Tensors:
        return pulled_back(function, given, cotangents, primals)

    ones = [torch.ones_like(output) for output in function(*given)]
    known = [tangent for tangent in tangents if tangent is not None]
    return list(pulled_back(pull_back, ones, known, primals))


class _UnderWay(threading.local):
    """The rules whose residuals are being moved, by thread."""

    rules: tuple[Rule, ...] = ()

    @contextlib.contextmanager
    def of(self, rule: Rule) -> Generator[None]:
        before, self.rules = self.rules, (*self.rules, rule)
        try:
            yield
        finally:
            self.rules = before


_under_way = _UnderWay()
