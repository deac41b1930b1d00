"""Whether bwd is linear in its cotangent, or a jvp rule in its tangents, to torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradtools.errors import TransformError, Violation
from gradtools.lowering import samples
from gradtools.lowering.flat import Lowerable, Optional, Tensors
from gradtools.lowering.replay import random_state, replayed
from gradtools.lowering.residuals import Layout

__all__ = ["nonlinear_bwd", "nonlinear_jvp"]


def nonlinear_bwd(
    plan: Lowerable, layout: Layout, kept: Tensors, outs: Tensors
) -> TransformError | None:
    """Return why bwd has no transpose; None if it has one."""
    needs = [meta is not None for meta in plan.signature.metas]

    def bwd(cotangents: Optional) -> Optional:
        return plan.backward(layout, samples.detached(kept), cotangents, needs)

    wrong = _nonlinear(bwd, outs, random_state(kept), _precision(plan, [*kept, *outs]))
    if wrong is None:
        return None
    return TransformError(
        f"{plan.rule.name}: forward mode cannot be derived from bwd, which {wrong[0]} "
        "in its cotangent",
        rule=plan.rule.where,
        function=plan.rule.which("bwd"),
        violations=[Violation("cotangent", "a bwd linear in its cotangent", wrong[1])],
        fix="State the forward mode with def_jvp, or use reverse mode only.",
    )


def nonlinear_jvp(
    plan: Lowerable, layout: Layout, leaves: Sequence[Any], outs: Tensors
) -> TransformError | None:
    """Return why the jvp rule has no transpose; None if it has one."""
    able = [meta is not None for meta in plan.signature.metas]

    def jvp(tangents: Optional) -> Optional:
        return plan.jvp(layout, samples.detached(leaves), tangents, outs)

    like = [leaf if can else None for leaf, can in zip(leaves, able, strict=True)]
    wrong = _nonlinear(jvp, like, random_state(leaves), _precision(plan, leaves))
    if wrong is None:
        return None
    return TransformError(
        f"{plan.rule.name}: reverse mode cannot be derived from the jvp rule, which "
        f"{wrong[0]} in its tangents",
        rule=plan.rule.where,
        function=plan.rule.which("jvp"),
        violations=[
            Violation("tangents", "a jvp rule linear in its tangents", wrong[1])
        ],
        fix="State the reverse mode with custom_vjp, or use forward mode only.",
    )


def _precision(plan: Lowerable, values: Sequence[Any]) -> float:
    """Return the relative precision of the coarsest numbers that a rule computes with.

    Autocast computes in its own dtype whatever comes in and out.
    """
    dtypes = {value.dtype for value in values if samples.floating(value)}
    dtypes |= {dtype for _, dtype in plan.autocast}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


def _nonlinear(
    function: Callable[[Optional], Optional],
    like: Sequence[Any],
    state: Any,
    precision: float,
) -> tuple[str, str] | None:
    """Say how a function fails to be visibly linear; None if it does not fail."""
    first = [samples.pattern(x) if samples.floating(x) else None for x in like]
    second = [samples.pattern(x, 0.37) if samples.floating(x) else None for x in like]

    def at(a: float, b: float) -> list[torch.Tensor]:
        mixed = [
            None if u is None or v is None else a * u + b * v
            for u, v in zip(first, second, strict=True)
        ]
        with replayed(state), torch.no_grad():
            return [
                samples.dense(value) for value in function(mixed) if value is not None
            ]

    u, v, both = at(1, 0), at(0, 1), at(1, 1)
    if not _agree(both, [a + b for a, b in zip(u, v, strict=True)], precision):
        return "is not linear", "f(u + v) is not f(u) + f(v)"
    for scale in _scales(like):
        if not _agree(at(scale, 0), [scale * value for value in u], precision):
            return "is not linear", f"f({scale:g} u) is not {scale:g} f(u)"
    with replayed(state), torch.enable_grad():
        if not _has_transpose(function, first, precision):
            return "is opaque", "torch sees a part of its operations, or none"
    return None


def _has_transpose(
    function: Callable[[Optional], Optional],
    given: Sequence[torch.Tensor | None],
    precision: float,
) -> bool:
    """Whether autograd sees all of a linear f: <w, f(u)> is then <f'(w), u>."""
    moved = [None if u is None else u.detach().requires_grad_() for u in given]
    try:
        values = [
            samples.dense(value) for value in function(moved) if value is not None
        ]
        seen = [value for value in values if value.requires_grad]
        inputs = [u for u in moved if u is not None]
        weights = [samples.pattern(value, 0.73) for value in seen]
        back = (
            torch.autograd.grad(seen, inputs, weights, materialize_grads=True)
            if seen
            else map(torch.zeros_like, inputs)
        )
    except Exception:  # opaque code may raise anything on a tensor with a graph
        return False
    there = sum(_products(samples.pattern(v, 0.73), v).sum() for v in values)
    size = sum(_products(samples.pattern(v, 0.73), v).abs().sum() for v in values)
    again = sum(_products(b, u).sum() for b, u in zip(back, inputs, strict=True))
    return not bool(abs(there - again) > precision**0.5 * size)


def _products(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Terms of the real inner product."""
    product = (first.conj() * second).detach()
    return (product.real if product.is_complex() else product).to(torch.float64)


def _scales(like: Sequence[Any]) -> tuple[float, ...]:
    narrow = any(samples.floating(x) and x.dtype == torch.float16 for x in like)
    return (-1.0, 1e-2, 1e2) if narrow else (-1.0, 1e-4, 1e4)


def _agree(first: Tensors, second: Tensors, precision: float) -> bool:
    for a, b in zip(first, second, strict=True):
        finite = torch.isfinite(a) & torch.isfinite(b)
        if bool(finite.any()):
            gap, size = (a - b)[finite].abs(), b[finite].abs()
            rounding = 10 * precision * size.max()
            if bool((gap > torch.maximum(precision**0.5 * size, rounding)).any()):
                return False
    return True
