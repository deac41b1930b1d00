"""Plans become ``torch.autograd.Function`` classes; :mod:`.traced` has Dynamo's.

:class:`Direct` has the combined ``forward(ctx, ...)`` and serves plain reverse mode: it
is what an expert writes by hand, and costs what that costs. :class:`Composable` has a
``setup_context`` and serves torch.func and forward mode: the new residuals are outputs,
so that every transform sees them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import Function

from gradtools import torch_compat
from gradtools.lowering import (
    batching,
    boundary,
    forward_mode,
    higher_order,
    preconditions,
)
from gradtools.lowering.apart import BackwardPlan
from gradtools.lowering.flat import Lowerable, Optional, Plan, Tensors
from gradtools.lowering.replay import recorded
from gradtools.lowering.residuals import Layout

__all__ = ["Composable", "Direct", "composed", "generated", "named"]


def named(base: type[Function], name: str) -> type[Function]:
    """Return a subclass whose graph nodes carry the name of a rule."""
    return type(name, (base,), {})


def generated(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any]
) -> type[Function]:
    """Return a Direct with a forward and a backward that were written for a pattern."""
    function = named(Direct, name)
    function.forward = staticmethod(forward)
    function.backward = staticmethod(backward)
    torch_compat.call_backward_directly(function)
    return function


class Direct(Function):
    """Plain reverse mode, of any order, outside torch.func."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *leaves: Any) -> Any:
        plan.first_use(leaves)
        outs, new, layout = plan.forward(leaves)
        if plan.rule.bwd is None:
            preconditions.jvp_linearity(plan, layout, leaves, outs)
        if plan.is_learning and not layout.opaque:
            plan.layout = layout
        return Direct.finish(ctx, plan, leaves, outs, new, layout)

    @staticmethod
    def finish(
        ctx: Any,
        plan: Plan,
        leaves: Sequence[Any],
        outs: Tensors,
        new: Tensors,
        layout: Layout,
    ) -> Any:
        """Save what backward will need, and return what ``apply`` returns."""
        ctx.save_for_backward(*layout.pick(leaves, outs, new))
        ctx.set_materialize_grads(plan.rule.materialize_grads)
        ctx.plan, ctx.layout = plan, layout
        ctx.inputs = None
        if new or layout.opaque:
            ctx.inputs = (
                higher_order.Ends(leaves)
                if plan.rule.once_differentiable
                else higher_order.Inputs(leaves, layout)
            )
        return outs[0] if layout.outputs.spec is None else (*outs, layout)

    @staticmethod
    @boundary.unseen
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return None, *Direct.pulled_back(ctx, ctx.needs_input_grad[1:], cotangents)

    @staticmethod
    def pulled_back(ctx: Any, needs: Sequence[bool], cotangents: Sequence[Any]) -> Any:
        """Return the cotangents of the leaves."""
        plan, layout, kept = ctx.plan, ctx.layout, ctx.saved_tensors
        given = layout.only_floating(cotangents)
        if torch.is_grad_enabled() or torch_compat.forward_ad_active():
            leaves = None if ctx.inputs is None else ctx.inputs.leaves(kept)
            preconditions.second_order(plan, layout, kept, given, leaves)
            if preconditions.refusal(plan) is not None:
                return _apart(plan, layout, kept, given, needs, leaves)
            plan.first_derived("second order")
            if leaves is not None:
                kept = higher_order.traced(plan, layout, kept, leaves)
        values = plan.backward(layout, kept, given, needs)
        if not torch_compat.graph_is_kept():
            ctx.inputs = None
        return values


class Composable(Function):
    """torch.func transforms in any nesting, and forward mode."""

    @staticmethod
    def forward(plan: Lowerable, *leaves: Any) -> Any:
        plan.first_use(leaves)
        outs, new, layout = recorded(plan.forward, leaves)
        if not plan.primal:
            kept = layout.pick(leaves, outs, new)
            if plan.rule.bwd is None:
                preconditions.jvp_linearity(plan, layout, leaves, outs)
            if not (plan.moving and plan.has_jvp and plan.order == 1):
                like = layout.only_floating(outs)
                made = leaves if new or layout.opaque else None
                preconditions.second_order(plan, layout, kept, like, made)
            if plan.order > 1 and preconditions.refusal(plan) is None:
                plan.first_derived("second order")
            if plan.moving and plan.has_jvp:
                preconditions.jvp_second_order(plan, layout, leaves, outs, kept)
                plan.first_derived("forward mode")
            elif plan.moving:
                preconditions.linearity(plan, layout, kept, outs)
                if plan.state.linear is None:
                    plan.first_derived("forward mode")
        return *outs, *(tensor.detach() for tensor in new), layout

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        plan, *leaves = inputs
        *tensors, layout = output
        outs, new = _parted(layout, tensors)
        ctx.plan, ctx.layout = plan, layout
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*layout.pick(leaves, outs, new))
        ctx.like = [(out.shape, out.dtype, out.device) for out in outs]
        ctx.inputs = None
        if new or layout.opaque:
            ctx.inputs = higher_order.Inputs(leaves, layout)
        if plan.moving:
            ctx.constants = [None if isinstance(x, torch.Tensor) else x for x in leaves]
            tensors = [x if isinstance(x, torch.Tensor) else None for x in leaves]
            ctx.save_for_forward(*tensors, *outs, *new)

    @staticmethod
    @boundary.unseen
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return None, *Composable.pulled_back(ctx, ctx.needs_input_grad[1:], cotangents)

    @staticmethod
    def pulled_back(ctx: Any, needs: Sequence[bool], cotangents: Sequence[Any]) -> Any:
        """Return the cotangents of the leaves."""
        plan, layout = ctx.plan, ctx.layout
        # What pulls back may be called when the transform is over, and a vmap runs.
        kept = tuple(map(_alive, ctx.saved_tensors))
        given = layout.only_floating(cotangents)
        extra = cotangents[layout.outputs.count : -1]
        refused = preconditions.refusal(plan) is not None
        again = torch.is_grad_enabled() and not torch_compat.transforms_active()
        if again and not refused:
            plan.first_derived("second order")
        inputs = ctx.inputs
        values: Optional = [None] * len(needs)
        if any(cotangent is not None for cotangent in given):
            if plan.rule.materialize_grads:
                given = _materialized(layout, given, ctx.like)
            if refused:
                leaves = None if inputs is None else inputs.leaves(kept)
                values = _apart(plan, layout, kept, given, needs, leaves)
            elif _vectorized_by_itself(plan):
                values = _apart(plan, layout, kept, given, needs)
            else:
                values = plan.backward(layout, kept, given, needs)
        if any(cotangent is not None for cotangent in extra):
            error = preconditions.refusal(plan)
            if error is not None:
                preconditions.refuse_nonzero(error, extra)
            else:
                leaves = ctx.inputs.leaves(kept)
                more = higher_order.residual_cotangents(
                    plan, layout, leaves, extra, needs
                )
                values = [_sum(a, b) for a, b in zip(values, more, strict=True)]
        return values

    @staticmethod
    @boundary.unseen
    def jvp(ctx: Any, *args: Any) -> Any:
        _, *tangents = args
        plan, layout = ctx.plan, ctx.layout
        with torch_compat.forward_ad_enabled():
            count = len(ctx.constants)
            saved = ctx.saved_tensors
            duals = _filled(saved[:count], ctx.constants)
            primals = [None if t is None else torch_compat.primal_of(t) for t in saved]
            leaves = _filled(primals[:count], ctx.constants)
            outs, new = _parted(layout, primals[count:])
            preconditions.refuse_differentiated(plan, (*primals, *tangents))
            if plan.has_jvp:
                kept = layout.pick(leaves, outs, new)
                moved = plan.jvp(layout, leaves, tangents, outs, kept)
            elif plan.state.linear is not None:
                raise plan.state.linear
            else:
                kept = layout.pick(leaves, outs, new)
                moved = forward_mode.transposed(plan, layout, kept, outs, tangents)
            more: Optional = [None] * len(new)
            if new and preconditions.refusal(plan) is None:
                more = higher_order.residual_tangents(plan, layout, duals, tangents)
            return *_zeros(moved, outs), *_zeros(more, new), None

    @staticmethod
    @boundary.unseen
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        plan, *leaves = args
        batched = batching.batch(plan, in_dims[1:], info)
        *tensors, layout = Composable.apply(batched, *leaves)
        return (*tensors, layout.inner), (*layout.out_dims, *layout.new_dims, None)


class OneLevel(torch_compat.AtOneLevel):
    """The part of a Composable that belongs to one grad or vjp of torch.func."""

    @staticmethod
    def forward(
        ctx: Any, plan: Lowerable, level: torch_compat.GradLevel, *leaves: Any
    ) -> Any:
        inner = (
            x if not isinstance(x, torch.Tensor) else level.unwrap(x) for x in leaves
        )
        with torch.enable_grad(), level.lower():
            *tensors, layout = _through_levels(plan, tuple(inner))
        returned = (*map(level.wrap, tensors), layout)
        Composable.setup_context(ctx, (plan, *leaves), returned)
        return returned

    @staticmethod
    @boundary.unseen
    def backward(ctx: Any, *cotangents: Any) -> Any:
        needs = ctx.needs_input_grad[2:]
        return None, None, *Composable.pulled_back(ctx, needs, cotangents)


def composed(plan: Lowerable, leaves: Sequence[Any]) -> Any:
    """Apply a Composable, by a shorter way than torch's where there is one.

    Under torch.func ``apply`` makes a class per call and level, and takes pytrees apart
    a dozen times: two thirds of the time of a small call.
    """
    if torch_compat.only_reverse_and_vmap():
        return _through_levels(plan, [_alive(leaf) for leaf in leaves])
    return Composable.apply(plan, *leaves)


def _through_levels(plan: Lowerable, leaves: Sequence[Any]) -> Any:
    level = torch_compat.innermost_transform()
    if level is None:
        if any(isinstance(x, torch.Tensor) and x.requires_grad for x in leaves):
            return Composable.apply(plan, *leaves)
        with torch.no_grad():
            return Composable.forward(plan, *leaves)
    if isinstance(level, torch_compat.GradLevel):
        lifted = [level.lift(x) if isinstance(x, torch.Tensor) else x for x in leaves]
        return level.apply(OneLevel, plan, level, *lifted)
    values, dims = zip(*map(level.unwrap, leaves), strict=True)
    with level.lower():
        if all(dim is None for dim in dims):
            return _through_levels(plan, leaves)
        batched = batching.batch(plan, dims, level.info)
        *tensors, layout = _through_levels(batched, values)
    dims = (*layout.out_dims, *layout.new_dims)
    return *map(level.wrap, tensors, dims), layout.inner


def _apart(
    plan: Lowerable,
    layout: Layout,
    kept: Tensors,
    given: Optional,
    needs: Sequence[bool],
    leaves: Sequence[Any] | None = None,
) -> Optional:
    """Run bwd as a Function of its own."""
    *values, returned = composed(
        BackwardPlan(plan, layout, needs), (*kept, *given, *(leaves or ()))
    )
    return returned.outputs.rebuild(values)


def _vectorized_by_itself(plan: Lowerable) -> bool:
    return plan.rule.vmap != "auto" and torch_compat.transforms_active()


def _materialized(layout: Layout, given: Optional, like: Sequence[Any]) -> Optional:
    able = layout.floating or (True,) * len(like)
    return [
        torch.zeros(shape, dtype=dtype, device=device) if c is None and can else c
        for c, (shape, dtype, device), can in zip(given, like, able, strict=True)
    ]


def _parted(layout: Layout, tensors: Sequence[Any]) -> tuple[Tensors, Tensors]:
    count = layout.outputs.count
    return tensors[:count], tensors[count:]


def _filled(tensors: Sequence[Any], constants: Sequence[Any]) -> list[Any]:
    return [c if t is None else t for t, c in zip(tensors, constants, strict=True)]


def _alive(leaf: Any) -> Any:
    """Unwrap a tensor of a transform that is over, such as what a pullback has kept."""
    is_tensor = isinstance(leaf, torch.Tensor)
    return torch_compat.unwrap_if_dead(leaf) if is_tensor else leaf


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b


def _zeros(tangents: Optional, like: Tensors) -> list[torch.Tensor | None]:
    """Make tangents complete: torch wants one for every floating output."""
    return [
        torch.zeros_like(x)
        if t is None and (x.is_floating_point() or x.is_complex())
        else t
        for t, x in zip(tangents, like, strict=True)
    ]


class _Trivial(inspect.Signature):
    """A signature that binds nothing: ``apply`` binds on every call, at some 35 us."""

    class _Bound(NamedTuple):
        args: tuple[Any, ...]
        kwargs: dict[str, Any]

        def apply_defaults(self) -> None:
            """Do nothing: there are none."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return self._Bound(args, kwargs)


Composable.forward.__signature__ = _Trivial()
