"""What must hold before a derivative of a rule may be derived from its bwd.

These are no checks of the formula and no policy switches them off: the transpose of a
clip is a plausible wrong number, and the derivative of code that torch cannot see
(numpy, ``.item()``, ``.detach()``, ``no_grad``) is zero without a sign. Each is tested
once per rule and signature, on the tensors of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from gradtools import torch_compat
from gradtools.errors import TransformError, Violation
from gradtools.lowering import captures
from gradtools.lowering.flat import Lowerable, Optional, Tensors
from gradtools.lowering.replay import random_state, replayed
from gradtools.lowering.residuals import Layout
from gradtools.probing import probing
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


def refusal(plan: Lowerable) -> TransformError | None:
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


def refuse_nonzero(error: TransformError, values: Optional) -> None:
    """Raise where a derivative that does not exist is really wanted; zeros pass."""
    for value in values:
        if value is None:
            continue
        bare = torch_compat.plain(value)
        if torch_compat.is_fake(bare) or bare.is_meta or bool((bare != 0).any()):
            raise error


def refuse_hidden(rule: Rule, layout: Layout) -> None:
    """Raise where an object holds tensors of a batch, which nothing can take apart."""
    error = _hidden(rule, layout)
    if error is not None:
        raise error


def refuse_differentiated(plan: Lowerable, values: Sequence[Any]) -> None:
    """Raise where forward mode would be differentiated again, and cannot be.

    Args:
        plan: The rule at a signature.
        values: What the tangent is computed from.
    """
    error = plan.state.jvp_second_order if plan.has_jvp else refusal(plan)
    if error is not None and any(
        torch_compat.is_differentiated(value)
        for value in values
        if isinstance(value, torch.Tensor)
    ):
        raise error


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
    once = plan.rule.once_differentiable
    if once or not _to_be_tested(plan, "second_order", tensors):
        return
    with probing(), torch_compat.clean_autograd():
        plan.state.second_order = (
            _hidden(plan.rule, layout)
            or (_opaque_fwd(plan, layout, leaves) if leaves is not None else None)
            or _opaque_bwd(plan, layout, kept, cotangents)
        )
    plan.state.tested.add("second_order")


def linearity(plan: Lowerable, layout: Layout, kept: Tensors, outs: Tensors) -> None:
    """Find out whether bwd is linear in its cotangent, so that it can be transposed."""
    if not _to_be_tested(plan, "linearity", [*kept, *outs]):
        return
    with probing(), torch_compat.clean_autograd():
        plan.state.linear = _hidden(plan.rule, layout) or _nonlinear_bwd(
            plan, layout, kept, outs
        )
    plan.state.tested.add("linearity")


def jvp_second_order(
    plan: Lowerable, layout: Layout, leaves: Sequence[Any], outs: Tensors
) -> None:
    """Find out whether the jvp rule can be differentiated."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not _to_be_tested(plan, "jvp_second_order", tensors):
        return
    with probing(), torch_compat.clean_autograd():
        plan.state.jvp_second_order = _opaque_jvp(plan, layout, leaves, outs)
    plan.state.tested.add("jvp_second_order")


def jvp_linearity(
    plan: Lowerable, layout: Layout, leaves: Sequence[Any], outs: Tensors
) -> None:
    """Find out whether the jvp rule is linear, so that it can be transposed."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not _to_be_tested(plan, "jvp_linearity", tensors):
        return
    with probing(), torch_compat.clean_autograd():
        plan.state.jvp_linear = _nonlinear_jvp(plan, layout, leaves, outs)
    plan.state.tested.add("jvp_linearity")


def _to_be_tested(plan: Lowerable, what: str, tensors: Tensors) -> bool:
    return (
        what not in plan.state.tested
        and not torch_compat.transforms_active()
        and not any(torch_compat.is_fake(t) or t.is_meta for t in tensors)
    )


# Opaque objects.


def _hidden(rule: Rule, layout: Layout) -> TransformError | None:
    found = [
        Violation(
            f"residuals, a {type(constant).__name__}",
            "tensors in containers that torch's pytree knows",
            f"a tensor of shape {tuple(tensor.shape)} inside ({path.lstrip('.')})",
        )
        for constant in layout.opaque
        for path, tensor in captures.hidden_tensors(constant)[:1]
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


# Opaque code.


def _opaque_fwd(
    plan: Lowerable, layout: Layout, leaves: Sequence[Any]
) -> TransformError | None:
    def at(values: Sequence[Any]) -> tuple[Tensors, list[bytes]]:
        with replayed(layout.rng):
            _, new, there = plan.forward(values)
        numbers = map(captures.hidden_numbers, there.opaque)
        return new, [np.asarray(n).tobytes() for found in numbers for n in found]

    try:
        with torch.enable_grad():
            new, numbers = at(_tracked(leaves))
        blind = [k for k, t in enumerate(new) if _floating(t) and not t.requires_grad]
        if not blind and not numbers:
            return None
        with torch.no_grad():
            here, numbers = at(_off_zero(leaves))
            near, moved_numbers = at(_moved(_off_zero(leaves)))
    except Exception as error:
        return _opaque(plan.rule, "fwd", "the residuals", error)
    for k in blind:
        if not _equal(here[k], near[k]):
            return _opaque(plan.rule, "fwd", _place_of(layout, "new", k), None)
    if numbers != moved_numbers:
        return _opaque(plan.rule, "fwd", "a residual that is no tensor", None)
    return None


def _opaque_bwd(
    plan: Lowerable, layout: Layout, kept: Tensors, cotangents: Optional
) -> TransformError | None:
    needs = [meta is not None for meta in plan.signature.metas]
    count = len(kept)

    def bwd(values: Sequence[Any]) -> Optional:
        return plan.backward(layout, values[:count], values[count:], needs)

    given = [None if c is None else _pattern(c) for c in cotangents]
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


def _opaque_jvp(
    plan: Lowerable, layout: Layout, leaves: Sequence[Any], outs: Tensors
) -> TransformError | None:
    count = len(leaves)
    able = [meta is not None for meta in plan.signature.metas]

    def jvp(values: Sequence[Any]) -> Optional:
        return plan.jvp(layout, values[:count], values[count:], outs)

    moving = [_pattern(x) if can else None for x, can in zip(leaves, able, strict=True)]
    try:
        found = _unseen(jvp, [*leaves, *moving])
    except Exception as error:
        return _opaque(plan.rule, "jvp", "the tangents", error)
    if found is None:
        return None
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
        tracked = _tracked(values)
        results = run(tracked)
    for place, tensor in enumerate(tracked):
        if not _floating(tensor):
            continue
        blind = [
            index
            for index, result in enumerate(results)
            if result is not None and not _reaches(result, tensor)
        ]
        if not blind:
            continue
        with torch.no_grad():
            near = _off_zero(values)
            before = run(near)
            near[place] = _moved([near[place]])[0]
            after = run(near)
        for index in blind:
            if not _equal(before[index], after[index]):
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


# Linearity.


def _nonlinear_bwd(
    plan: Lowerable, layout: Layout, kept: Tensors, outs: Tensors
) -> TransformError | None:
    needs = [meta is not None for meta in plan.signature.metas]

    def bwd(cotangents: Optional) -> Optional:
        return plan.backward(layout, _detached(kept), cotangents, needs)

    wrong = _nonlinear(bwd, outs, random_state(kept))
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


def _nonlinear_jvp(
    plan: Lowerable, layout: Layout, leaves: Sequence[Any], outs: Tensors
) -> TransformError | None:
    able = [meta is not None for meta in plan.signature.metas]

    def jvp(tangents: Optional) -> Optional:
        return plan.jvp(layout, _detached(leaves), tangents, outs)

    like = [leaf if can else None for leaf, can in zip(leaves, able, strict=True)]
    wrong = _nonlinear(jvp, like, random_state(leaves))
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


def _nonlinear(
    function: Callable[[Optional], Optional], like: Sequence[Any], state: Any
) -> tuple[str, str] | None:
    """Say how a function fails to be visibly linear; None if it does not fail."""
    first = [_pattern(x) if _floating(x) else None for x in like]
    second = [_pattern(x, 0.37) if _floating(x) else None for x in like]

    def at(a: float, b: float) -> list[torch.Tensor]:
        mixed = [
            None if u is None or v is None else a * u + b * v
            for u, v in zip(first, second, strict=True)
        ]
        with replayed(state), torch.no_grad():
            return [_dense(value) for value in function(mixed) if value is not None]

    u, v, both = at(1, 0), at(0, 1), at(1, 1)
    if not _agree(both, [a + b for a, b in zip(u, v, strict=True)]):
        return "is not linear", "f(u + v) is not f(u) + f(v)"
    for scale in _scales(like):
        if not _agree(at(scale, 0), [scale * value for value in u]):
            return "is not linear", f"f({scale:g} u) is not {scale:g} f(u)"
    with replayed(state), torch.enable_grad():
        if not _has_transpose(function, first):
            return "is opaque", "torch sees a part of its operations, or none"
    return None


def _has_transpose(
    function: Callable[[Optional], Optional], given: Sequence[torch.Tensor | None]
) -> bool:
    """Whether autograd sees all of a linear f: <w, f(u)> is then <f'(w), u>."""
    moved = [None if u is None else u.detach().requires_grad_() for u in given]
    try:
        values = [_dense(value) for value in function(moved) if value is not None]
        seen = [value for value in values if value.requires_grad]
        inputs = [u for u in moved if u is not None]
        weights = [_pattern(value, 0.73) for value in seen]
        back = (
            torch.autograd.grad(seen, inputs, weights, materialize_grads=True)
            if seen
            else map(torch.zeros_like, inputs)
        )
    except Exception:  # opaque code may raise anything on a tensor with a graph
        return False
    there = sum(_products(_pattern(v, 0.73), v).sum() for v in values)
    size = sum(_products(_pattern(v, 0.73), v).abs().sum() for v in values)
    again = sum(_products(b, u).sum() for b, u in zip(back, inputs, strict=True))
    coarsest = max((torch.finfo(v.dtype).eps for v in values), default=0.0)
    return not bool(abs(there - again) > coarsest**0.5 * size)


def _products(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Terms of the real inner product."""
    product = (first.conj() * second).detach()
    return (product.real if product.is_complex() else product).to(torch.float64)


def _scales(like: Sequence[Any]) -> tuple[float, ...]:
    narrow = any(_floating(x) and x.dtype == torch.float16 for x in like)
    return (-1.0, 1e-2, 1e2) if narrow else (-1.0, 1e-4, 1e4)


def _agree(first: Tensors, second: Tensors) -> bool:
    for a, b in zip(first, second, strict=True):
        finite = torch.isfinite(a) & torch.isfinite(b)
        if bool(finite.any()):
            gap, size = (a - b)[finite].abs().max(), b[finite].abs().max()
            if bool(gap > torch.finfo(a.dtype).eps ** 0.5 * size):
                return False
    return True


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


# Tensors to test on.


def _floating(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and (
        tensor.is_floating_point() or tensor.is_complex()
    )


def _detached(values: Sequence[Any]) -> list[Any]:
    return [v.detach() if isinstance(v, torch.Tensor) else v for v in values]


def _tracked(values: Sequence[Any]) -> list[Any]:
    return [v.detach().requires_grad_() if _floating(v) else v for v in values]


def _off_zero(values: Sequence[Any]) -> list[Any]:
    """Put other numbers in the place of zeros, which do not move when multiplied."""
    return [
        torch.where(v == 0, _pattern(v), v.detach()) if _floating(v) else v
        for v in _detached(values)
    ]


def _moved(values: Sequence[Any]) -> list[Any]:
    """Move every number a little, and no number across zero."""
    return [v.detach() * _near_one(v) if _floating(v) else v for v in values]


def _near_one(tensor: torch.Tensor) -> torch.Tensor:
    step = 16 * torch.finfo(tensor.dtype).eps
    return 1 + step * (0.5 + _fractions(tensor))


def _pattern(tensor: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    """Return values between 0.5 and 1.5 in the shape of ``tensor``, drawing nothing."""
    return 0.5 + _fractions(tensor, offset)


def _fractions(tensor: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    count = torch.arange(tensor.numel(), device=tensor.device, dtype=torch.float64)
    values = (offset + 0.618033988749895 * (count + 1)) % 1
    return values.reshape(tensor.shape).to(tensor.dtype)


def _equal(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    if first.shape != second.shape:
        return False
    first, second = _dense(first.detach()), _dense(second.detach())
    return torch.equal(torch.nan_to_num(first), torch.nan_to_num(second))


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
