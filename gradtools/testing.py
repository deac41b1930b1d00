"""Checks for test suites: of derivatives, and of what transforms make of them.

Both take any function of torch tensors, a rule of gradtools or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from gradtools import trees
from gradtools.errors import DefinitionError
from gradtools.gradcheck.check import check_now
from gradtools.gradcheck.report import Capability, Report
from gradtools.gradcheck.transforms import check_transforms, flattened, weighted
from gradtools.lowering.forward_mode import pulled_back
from gradtools.rules.custom_vjp import StatedRule, custom_vjp
from gradtools.rules.methods import BoundRule
from gradtools.rules.rule import Exact
from gradtools.rules.signature import is_differentiable
from gradtools.spelling import publish

__all__ = ["check_grads", "check_transforms"]

_MODES: dict[str, Capability] = {"rev": "reverse", "fwd": "forward mode"}


def check_grads(
    f: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    order: int = 1,
    modes: Iterable[str] = ("rev",),
    rtol: float | None = None,
    atol: float | None = None,
) -> Report:
    """Check the derivatives of a function against differences.

    A rule of gradtools is asked what its first call asks it: purity, linearity, every
    element against autograd, directions against differences. For any other function
    autograd's derivative is what is checked.

    Args:
        f: The function, from tensors and other objects in pytrees to tensors in a
            pytree.
        args: Its arguments, of any shapes; floating and complex tensors are
            differentiated, in float64 where the function allows it.
        kwargs: Its keyword arguments.
        order: How many derivatives to check, 1 or more.
        modes: ``"rev"`` for reverse mode, ``"fwd"`` for forward mode, or both.
        rtol: Relative tolerance beyond what the check earns by itself.
        atol: Absolute tolerance beyond it.

    Returns:
        What was checked, with figures.

    Raises:
        GradientMismatchError: A derivative is wrong.
        DefinitionError: The mode is unknown, or the order less than 1.

    Example:
        >>> from gradtools.testing import check_grads
        >>> x = torch.linspace(0.1, 1.0, 4)
        >>> check_grads(torch.sin, (x,), order=2, modes=("fwd", "rev")).outcome
        'passed'
    """
    uses = _uses(order, modes)
    if isinstance(f, BoundRule):
        args, f = (f.instance, *args), f.rule
    contract = Exact(rtol, atol)
    if isinstance(f, StatedRule):
        wide = contract if rtol or atol else f.rule.contract
        rule = dataclasses.replace(f.rule, contract=wide)
        uses += ("second order",) if order > 1 else ()
        plan, leaves = f.plan_for_check(args, kwargs or {})
        report = check_now(dataclasses.replace(plan, rule=rule), leaves, uses)
        deeper = order - 2
        following = _gradient_of(_gradient_of(f)) if deeper > 0 else f
    else:
        rule = _as_rule(f, contract)
        plan, leaves = rule.plan_for_check((tuple(args), dict(kwargs or {})), {})
        report = check_now(plan, leaves, uses, watch=False)
        deeper, following = order - 1, _gradient_of(f)
    if deeper > 0:
        below = check_grads(
            following, args, kwargs, order=deeper, modes=modes, rtol=rtol, atol=atol
        )
        report = _with_deeper(report, below, order - deeper + 1)
    return report


def _uses(order: int, modes: Iterable[str]) -> tuple[Capability, ...]:
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    for mode in modes:
        if mode not in _MODES:
            raise DefinitionError(
                f"check_grads was asked for the mode {mode!r}, which is none of "
                + ", ".join(map(repr, _MODES)),
                fix='Use "rev", "fwd", or ("rev", "fwd").',
            )
    if not modes or isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise DefinitionError(
            f"check_grads was asked for order {order!r} in the modes {modes!r}: that "
            "is no derivative",
            fix="Ask for an order of 1 or more, in one mode at least.",
        )
    return tuple(_MODES[mode] for mode in modes)


def _with_deeper(report: Report, below: Report, order: int) -> Report:
    """Add what was found of a derivative of an order; deeper ones say theirs."""
    evidence = []
    for item in below.evidence:
        question, _, deeper = item.question.removesuffix(")").partition(" (order ")
        number = int(deeper) + order - 1 if deeper else order
        question = f"{question} (order {number})"
        evidence.append(dataclasses.replace(item, question=question))
    return dataclasses.replace(
        report,
        evidence=(*report.evidence, *evidence),
        seconds=report.seconds + below.seconds,
        evaluations=report.evaluations + below.evaluations,
    )


def _as_rule(f: Callable[..., Any], contract: Exact) -> StatedRule[..., Any]:
    """Make a rule of a function and the derivatives that torch gives it."""

    def fun(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # out of autograd's sight: it is autograd that is on trial
        args, kwargs = trees.map_tensors(torch.Tensor.detach, (args, kwargs))
        with torch.no_grad():
            return trees.map_tensors(torch.Tensor.detach, f(*args, **kwargs))

    def fwd(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return fun(args, kwargs), (args, kwargs)

    def bwd(residuals: Any, cotangent: Any) -> Any:
        flat, leaves, spec = flattened(f, *residuals)
        with torch.enable_grad():
            inputs = [leaf.detach().requires_grad_() for leaf in leaves.tensors]
            outs = flat(*inputs)
        given = [g for g in trees.flatten(cotangent)[0] if g is not None]
        pairs = [(o, g) for o, g in zip(outs, given, strict=True) if o.requires_grad]
        found: Sequence[Any] = [None] * len(inputs)
        if pairs:
            reached, weights = zip(*pairs, strict=True)
            found = torch.autograd.grad(reached, inputs, weights, allow_unused=True)
        return trees.unflatten(leaves.spread(found), spec)

    def jvp(primals: Any, tangents: Any) -> Any:
        flat, leaves, _ = flattened(f, *primals)
        moving = leaves.chosen(trees.flatten(tangents)[0])
        moved = iter(torch.func.jvp(flat, leaves.tensors, moving)[1])
        out = fun(*primals)
        values, spec = trees.flatten(out)
        return out, trees.unflatten(
            [next(moved) if is_differentiable(value) else None for value in values],
            spec,
        )

    rule = custom_vjp(fun, contract=contract)
    rule.__name__ = getattr(f, "__name__", type(f).__name__)
    rule.rule = dataclasses.replace(rule.rule, name=rule.__name__)
    rule.defvjp(fwd, bwd)
    rule.def_jvp(jvp)
    return rule


def _gradient_of(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return the gradient of a weighted sum of the outputs, by autograd."""

    def gradient(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        flat, leaves, _ = flattened(f, args, kwargs)
        one = torch.ones((), dtype=torch.float64, device=leaves.tensors[0].device)
        return tuple(
            pulled_back(
                lambda *tensors: [weighted(flat)(*tensors)],
                leaves.tensors,
                [one],
                leaves.tensors,
            )
        )

    gradient.__name__ = f"gradient of {getattr(f, '__name__', type(f).__name__)}"
    return gradient


publish(__name__, globals())
