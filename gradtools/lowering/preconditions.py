"""What must hold before a derivative of a rule may be derived from its bwd.

These are no checks of the formula and no policy switches them off: the transpose of a
clip is a plausible wrong number, and the derivative of code that torch cannot see
(numpy, ``.item()``, ``.detach()``, ``no_grad``) is zero without a sign. Each is tested
once per rule and signature, on the tensors of the call.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradtools import torch_compat
from gradtools.errors import GradtoolsError, TransformError
from gradtools.lowering import linear, opacity
from gradtools.lowering.flat import Lowerable, Optional, Tensors
from gradtools.lowering.residuals import Layout
from gradtools.probing import is_checking, probing
from gradtools.rules.rule import Rule

__all__ = [
    "jvp_linearity",
    "jvp_second_order",
    "linearity",
    "refusal",
    "refuse_differentiated",
    "refuse_hidden",
    "refuse_nonzero",
    "second_order",
]


def refusal(plan: Lowerable) -> GradtoolsError | None:
    """Return why the rule has no second derivative, as far as is known."""
    if plan.rule.once_differentiable:
        return TransformError(
            f"{plan.rule.name}: the second derivative was asked for of a rule that is "
            "declared once_differentiable",
            rule=plan.rule.where,
            function=plan.rule.which("bwd"),
            fix="Remove once_differentiable=True if bwd is differentiable torch code, "
            "or make bwd call a rule of its own.",
        )
    return plan.state.second_order


def refuse_nonzero(error: GradtoolsError, values: Optional) -> None:
    """Raise where a derivative that does not exist is really wanted; zeros pass."""
    for value in values:
        if value is None:
            continue
        bare = torch_compat.plain(value)
        if torch_compat.is_fake(bare) or bare.is_meta or bool((bare != 0).any()):
            raise copy.copy(error)  # without the frames of other calls


def refuse_hidden(rule: Rule, layout: Layout) -> None:
    """Raise where an object holds tensors of a batch, which nothing can take apart."""
    error = opacity.hidden(rule, layout)
    if error is not None:
        raise copy.copy(error)


def refuse_differentiated(plan: Lowerable, values: Sequence[Any]) -> None:
    """Raise where forward mode would be differentiated again, and cannot be.

    Args:
        plan: The rule at a signature.
        values: What the tangent is computed from.
    """
    error = plan.state.jvp_second_order if plan.has_jvp else refusal(plan)
    if error is None and plan.rule.jvp_takes_residuals:
        error = refusal(plan)
    if error is not None and any(
        torch_compat.is_differentiated(value)
        for value in values
        if isinstance(value, torch.Tensor)
    ):
        raise copy.copy(error)


def second_order(
    plan: Lowerable,
    layout: Layout,
    kept: Tensors,
    cotangents: Optional,
    leaves: Sequence[Any] | None,
) -> None:
    """Find out whether bwd, and fwd where it computes residuals, can be differentiated.

    Args:
        plan: The rule at a signature.
        layout: Of this call.
        kept: The kept tensors.
        cotangents: Tensors like the outputs; their values do not matter.
        leaves: The arguments, where fwd made residuals of its own.
    """
    tensors = [*kept, *(c for c in cotangents if c is not None)]
    if plan.rule.once_differentiable:
        return
    _once(
        plan,
        "second_order",
        tensors,
        lambda: (
            opacity.hidden(plan.rule, layout)
            or (
                opacity.opaque_fwd(plan, layout, leaves) if leaves is not None else None
            )
            or opacity.opaque_bwd(plan, layout, kept, cotangents)
        ),
    )


def linearity(plan: Lowerable, layout: Layout, kept: Tensors, outs: Tensors) -> None:
    """Find out whether bwd is linear in its cotangent, so that it can be transposed."""
    _once(
        plan,
        "linear",
        [*kept, *outs],
        lambda: (
            opacity.hidden(plan.rule, layout)
            or linear.nonlinear_bwd(plan, layout, kept, outs)
        ),
    )


def jvp_second_order(
    plan: Lowerable, layout: Layout, leaves: Sequence[Any], outs: Tensors, kept: Tensors
) -> None:
    """Find out whether the jvp rule can be differentiated."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    _once(
        plan,
        "jvp_second_order",
        tensors,
        lambda: opacity.opaque_jvp(plan, layout, leaves, outs, kept),
    )


def jvp_linearity(
    plan: Lowerable, layout: Layout, leaves: Sequence[Any], outs: Tensors
) -> None:
    """Find out whether the jvp rule is linear, so that it can be transposed."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    _once(
        plan,
        "jvp_linear",
        tensors,
        lambda: linear.nonlinear_jvp(plan, layout, leaves, outs),
    )


def _once(
    plan: Lowerable,
    what: str,
    tensors: Tensors,
    find: Callable[[], GradtoolsError | None],
) -> None:
    """Set an attribute of the state to what is found, if it has not been looked for.

    A rule that calls itself, as the solution of a linear system does, comes here again
    while its test runs, and goes on.
    """
    state = plan.state
    if (
        what in state.tested
        or torch_compat.transforms_active()
        or any(torch_compat.is_fake(t) or t.is_meta for t in tensors)
    ):
        return
    with state.lock:
        if what in state.tested | state.under_test:
            return
        state.under_test.add(what)
        in_check = is_checking()  # whose own modes have to stay
        unseen = contextlib.nullcontext() if in_check else torch_compat.without_modes()
        try:
            with probing(), unseen, torch_compat.clean_autograd():
                setattr(state, what, find())
        finally:
            state.under_test.discard(what)
    state.tested.add(what)
