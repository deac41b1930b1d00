"""Code that torch cannot see into, and objects: their derivative would be zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from gradtools.errors import TransformError, Violation
from gradtools.lowering import contents, samples
from gradtools.lowering.flat import Lowerable, Optional, Tensors
from gradtools.lowering.replay import random_state, replayed
from gradtools.lowering.residuals import Layout
from gradtools.rules.rule import Rule

__all__ = ["hidden", "opaque_bwd", "opaque_fwd", "opaque_jvp"]


def hidden(rule: Rule, layout: Layout) -> TransformError | None:
    """Return the error for objects that hold tensors; None if there are none."""
    found = [
        Violation(
            f"residuals, a {type(constant).__name__}",
            "tensors in containers that torch's pytree knows",
            f"a tensor of shape {tuple(tensor.shape)} inside ({path.lstrip('.')})",
        )
        for constant in layout.opaque
        for path, tensor in contents.hidden_tensors(constant)[:1]
    ]
    if not found:
        return None
    return TransformError(
        f"{rule.name}: a residual hides tensors inside an opaque object; they serve a "
        "first derivative only, and not under vmap",
        rule=rule.where,
        function=rule.which("fwd"),
        violations=found,
        fix="Return the tensors themselves among the residuals and build the object in "
        "bwd, or register its type with torch.utils._pytree.",
    )


def opaque_fwd(
    plan: Lowerable, layout: Layout, leaves: Sequence[Any]
) -> TransformError | None:
    """Return why the residuals that fwd made cannot be differentiated, or None."""

    def at(values: Sequence[Any]) -> tuple[Tensors, list[bytes]]:
        with replayed(layout.rng):
            _, new, there = plan.forward(values)
        numbers = map(contents.hidden_numbers, there.opaque)
        return new, [np.asarray(n).tobytes() for found in numbers for n in found]

    try:
        with torch.enable_grad():
            new, numbers = at(samples.tracked(leaves))
        blind = [
            k for k, t in enumerate(new) if samples.floating(t) and not t.requires_grad
        ]
        if not blind and not numbers:
            return None
        with torch.no_grad():
            here, numbers = at(samples.off_zero(leaves))
            near, moved_numbers = at(samples.moved(samples.off_zero(leaves)))
    except Exception as error:
        return _opaque(plan.rule, "fwd", "the residuals", error)
    for k in blind:
        if not samples.equal(here[k], near[k]):
            return _opaque(plan.rule, "fwd", _place_of(layout, "new", k), None)
    if numbers != moved_numbers:
        return _opaque(plan.rule, "fwd", "a residual that is no tensor", None)
    return None


def opaque_bwd(
    plan: Lowerable, layout: Layout, kept: Tensors, cotangents: Optional
) -> TransformError | None:
    """Return why bwd cannot be differentiated, or None."""
    needs = [meta is not None for meta in plan.signature.metas]
    count = len(kept)

    def bwd(values: Sequence[Any]) -> Optional:
        return plan.backward(layout, values[:count], values[count:], needs)

    given = [None if c is None else samples.pattern(c) for c in cotangents]
    role = "jvp" if plan.rule.bwd is None else "bwd"
    try:
        found = _unseen(bwd, [*kept, *given])
    except Exception as error:
        return _opaque(plan.rule, role, "the incoming cotangent", error)
    if found is None:
        return None
    place, result = found
    what = (
        _place_of(layout, *layout.kept[place])
        if place < count
        else "the incoming cotangent"
    )
    path = plan.signature.paths()[result]
    return _opaque(plan.rule, role, f"{what}, for {path}", None)


def opaque_jvp(
    plan: Lowerable, layout: Layout, leaves: Sequence[Any], outs: Tensors, kept: Tensors
) -> TransformError | None:
    """Return why the jvp rule cannot be differentiated, or None."""
    count = len(leaves)
    able = [meta is not None for meta in plan.signature.metas]

    def jvp(values: Sequence[Any]) -> Optional:
        return plan.jvp(
            layout, values[:count], values[count : 2 * count], outs, values[2 * count :]
        )

    moving = [
        samples.pattern(x) if can else None for x, can in zip(leaves, able, strict=True)
    ]
    try:
        found = _unseen(jvp, [*leaves, *moving, *kept])
    except Exception as error:
        return _opaque(plan.rule, "jvp", "the tangents", error)
    if found is None:
        return None
    if found[0] >= 2 * count:
        what = _place_of(layout, *layout.kept[found[0] - 2 * count])
        return _opaque(plan.rule, "jvp", what, None)
    path = plan.signature.paths()[found[0] % count]
    what = path if found[0] < count else f"the tangent of {path}"
    return _opaque(plan.rule, "jvp", what, None)


def _unseen(
    function: Callable[[Sequence[Any]], Optional], values: Sequence[Any]
) -> tuple[int, int] | None:
    """Find an argument and a result between which torch sees no connection.

    There is one: the result moves with the argument.
    """
    state = random_state(values)

    def run(values: Sequence[Any]) -> Optional:
        with replayed(state):
            return function(values)

    with torch.enable_grad():
        tracked = samples.tracked(values)
        results = run(tracked)
    for place, tensor in enumerate(tracked):
        if not samples.floating(tensor):
            continue
        blind = [
            index
            for index, result in enumerate(results)
            if result is not None and not _reaches(result, tensor)
        ]
        if not blind:
            continue
        with torch.no_grad():
            near = samples.off_zero(values)
            before = run(near)
            near[place] = samples.moved([near[place]])[0]
            after = run(near)
        for index in blind:
            if not samples.equal(before[index], after[index]):
                return place, index
    return None


def _opaque(
    rule: Rule, role: str, what: str, cause: Exception | None
) -> TransformError:
    error = TransformError(
        f"{rule.name}: {role} cannot be differentiated: torch does not see how its "
        f"result depends on {what}",
        rule=rule.where,
        function=rule.which(role),
        fix="Write it in differentiable torch operations (no .detach(), .item(), numpy "
        "or no_grad), make it a rule of its own, or declare once_differentiable=True.",
    )
    error.__cause__ = cause
    return error


def _place_of(layout: Layout, kind: str, index: int) -> str:
    """Name a kept tensor by its place among the residuals."""
    position = next(
        p for p, source in enumerate(layout.kept) if source == (kind, index)
    )
    slots = range(len(layout.kept)) if layout.slots is None else layout.slots
    names = layout.residuals.paths("residuals")
    return names[list(slots).index(position)]


def _reaches(value: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether there is a path in the graph from ``value`` to the leaf ``tensor``."""
    seen: set[Any] = set()
    for node in _walk(value.grad_fn, seen):
        if getattr(node, "variable", None) is tensor:
            return True
    return value is tensor


def _walk(node: Any, seen: set[Any]) -> Iterator[Any]:
    stack = [node]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [below for below, _ in node.next_functions]
