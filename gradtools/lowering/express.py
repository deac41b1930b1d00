"""Express: the way of a call that is made up like one before.

When a signature has been through the general way, checked and watched, :mod:`.source`
writes code for calls like it; :class:`Code` holds that, and :class:`Express` what
differs between the shapes that share it. The code shows in tracebacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gradtools import torch_compat, trees
from gradtools.lowering import boundary, functions, higher_order
from gradtools.lowering.cotangents import fitted
from gradtools.lowering.flat import Plan
from gradtools.lowering.residuals import Layout, Source
from gradtools.lowering.source import Pattern, returned_names, write
from gradtools.lowering.state import Checks
from gradtools.lowering.text import compiled
from gradtools.lowering.user_code import noted, under_policy
from gradtools.probing import moment
from gradtools.rules.rule import Rule
from gradtools.trees import Outline, Structure

__all__ = [
    "ASTRAY",
    "TELLING_LITTLE",
    "Code",
    "Express",
    "Pattern",
    "astray",
    "is_settled",
    "pattern_of",
    "unpacked",
]

ASTRAY: Any = object()
"""What generated code returns for a call that is not like those it was written for."""

_MOST_SHAPES = 128

TELLING_LITTLE: dict[complex, float] = {
    number: number for number in (0.0, 1.0, math.inf, -math.inf)
}
"""Numbers with which a check or a test finds little: they hide what they multiply."""


def astray(entries: Sequence[Any]) -> Any:
    """Serve no call: no code is written yet."""
    return ASTRAY


class Code:
    """The code for one pattern of a rule's calls.

    Attributes:
        text: The source.
        call: Takes the entries of a call and returns the output, or ASTRAY.
        key: Takes leaves; returns what tells apart the calls that share this code.
        make: Makes a forward and a backward for an :class:`Express`.
        known: By that key: the ``apply`` of a Function.
    """

    def __init__(
        self,
        rule: Rule,
        pattern: Pattern,
        policy: Callable[[], str],
        owes: Callable[[Sequence[Any]], bool],
        checks: Checks,
    ) -> None:
        self.pattern = pattern
        self.text = write(pattern)
        self.known: dict[Any, Callable[..., Any]] = {}
        self.names: dict[str, Any] = {
            **_NAMES,
            "rule": rule,
            "fun": rule.fun,
            "fwd": rule.fwd,
            "bwd": under_policy(rule.bwd, pattern.policy, checks),
            "names": returned_names(pattern),
            "policy": policy,
            "owes": owes,
            "known": self.known,
        }
        exec(compiled(self.text, rule.name), self.names)
        self.call: Callable[[Sequence[Any]], Any] = boundary.unseen(self.names["call"])
        self.key: Callable[..., Any] = self.names["key"]
        self.make: Callable[..., Any] = self.names["make"]

    def learn(
        self, plan: Plan, layout: Layout, leaves: Sequence[Any]
    ) -> Callable[[Sequence[Any]], Any]:
        """Serve calls like this one from now on; return what takes them."""
        plan.express = Express(self, plan, layout, leaves)
        return self.serve(plan.express)

    def serve(self, express: Express) -> Callable[[Sequence[Any]], Any]:
        """Serve calls of a signature; return what takes them."""
        if len(self.known) >= _MOST_SHAPES:
            self.known.clear()
        self.known[express.key] = express.apply
        self.names["last"] = (express.apply, *express.key)
        return self.call

    def forget(self, express: Express) -> None:
        """Serve calls of a signature no longer."""
        self.known.pop(express.key, None)
        self.names["last"] = (None,) * (1 + len(express.key))


class Express:
    """What generated code knows of the calls of one signature.

    Attributes:
        code: The code.
        key: By which the code finds this.
        plan: The signature.
        layout: Where outputs and residuals live.
        inputs: What a second derivative runs fwd on, where all of it is saved anyway.
        apply: Runs the Function.
    """

    __slots__ = ("apply", "code", "inputs", "key", "layout", "plan")

    def __init__(
        self, code: Code, plan: Plan, layout: Layout, leaves: Sequence[Any]
    ) -> None:
        count = 2 if code.pattern.on_cpu else 3
        self.code = code
        self.key = code.key(*leaves)
        self.plan = plan
        self.layout = layout
        self.inputs = None
        if code.pattern.inputs == "kept":
            self.inputs = higher_order.Inputs(leaves, layout)
        metas = (meta[:count] for meta in plan.signature.metas if meta is not None)
        forward, backward = code.make(self, *(f for meta in metas for f in meta))
        self.apply = torch_compat.apply_of(
            functions.generated(plan.rule.name, forward, backward)
        )

    def spell_out(self, ctx: Any) -> None:
        """Leave on ctx what the general way leaves there."""
        ctx.plan, ctx.layout = self.plan, self.layout
        if self.code.pattern.inputs in ("none", "kept"):
            ctx.inputs = self.inputs
        structure = self.layout.residuals
        if structure.constants:
            values = trees.flatten(ctx.constants)[0]
            constants = dict(zip(sorted(structure.constants), values, strict=True))
            ctx.layout = Layout(
                self.layout.outputs,
                Structure(structure.spec, structure.count, constants),
                self.layout.kept,
                self.layout.slots,
                self.layout.floating,
            )


def _general_forward(
    express: Express, ctx: Any, leaves: Sequence[Any], returned: Any
) -> Any:
    """Go on in the general way with what fwd returned."""
    ctx.astray = True
    plan = express.plan
    plan.express = None
    plan.strays += 1
    express.code.forget(express)
    out, residuals = plan.parted(plan.signature.entries(leaves), returned)
    outs, new, layout = plan.laid_out(out, residuals, leaves)
    return functions.Direct.finish(ctx, plan, leaves, outs, new, layout)


def _general_backward(express: Express, ctx: Any, cotangents: Sequence[Any]) -> Any:
    """Run backward in the general way."""
    if not ctx.astray:
        express.spell_out(ctx)
    return tuple(functions.Direct.pulled_back(ctx, ctx.needs_input_grad, cotangents))


def _refitted(express: Express, returned: Any) -> Any:
    """Return one cotangent per leaf from a return of bwd that is put another way."""
    plan = express.plan
    return tuple(fitted(plan.rule, plan.signature, returned))


def unpacked(returned: Any) -> Any:
    """Return the user's output from what the general way's ``apply`` returned."""
    if isinstance(returned, torch.Tensor):
        return returned
    *tensors, layout = returned
    return layout.outputs.rebuild(tensors[: layout.outputs.count])


_NAMES: dict[str, Any] = {
    "Tensor": torch.Tensor,
    "Size": torch.Size,
    "dtype": torch.dtype,
    "device": torch.device,
    "layout": torch.layout,
    "Layout": Layout,
    "Inputs": higher_order.Inputs,
    "Ends": higher_order.Ends,
    "astray": ASTRAY,
    "alive": torch_compat.unwrap_if_dead,
    "transformed": torch_compat.transforms_active,
    "exports": boundary.export_flag_holder,
    "autocast": torch_compat.autocast_enabled,
    "watched": torch_compat.dispatch_modes,  # a test of a symbolic size is a guard
    "dual": torch_compat.dual_level_holder,
    "moment": moment,
    "telling_little": TELLING_LITTLE,
    "grad_enabled": torch.is_grad_enabled,
    "graph_is_kept": torch_compat.graph_is_kept,
    "note": noted,
    "unpacked": unpacked,
    "refitted": _refitted,
    "general_forward": _general_forward,
    "general_backward": _general_backward,
}


# What calls can be served.


def is_settled(plan: Plan) -> bool:
    """Whether nothing is left to check or to watch for at a signature."""
    state = plan.state
    is_known = state.watched >= {"fwd", "bwd"} and state.draws is not None
    return is_known and not plan.is_unchecked


def pattern_of(
    plan: Plan,
    layout: Layout,
    leaves: Sequence[Any],
    entries: Sequence[Any],
    has_free: bool,
) -> Pattern | None:
    """Return the pattern of a call; None where it takes the general way for good.

    Args:
        plan: Its signature.
        layout: Where its outputs and residuals live.
        leaves: Its arguments, flat.
        entries: Its arguments.
        has_free: Whether the rule's functions read variables beside them.
    """
    rule, state = plan.rule, plan.state
    arguments = trees.outline(tuple(entries))
    general = (
        plan.autocast
        or rule.autocast is not None
        or plan.has_callables
        or state.draws
        or state.foreign
        or layout.opaque
        or layout.outputs.constants
        or rule.bwd_takes_self
        or rule.parameters.var_keyword is not None
    )
    if arguments is None or general:
        return None
    constants = {
        number: type(leaf)
        for number, leaf in enumerate(leaves)
        if not isinstance(leaf, torch.Tensor)
    }
    if torch.Size in _kinds(arguments[0]) or not set(constants.values()) <= _CONSTANTS:
        return None
    outputs = trees.outline(layout.outputs.rebuild(range(layout.outputs.count)))
    residuals = trees.outline(_marked(layout))
    if outputs is None or residuals is None:
        return None
    places = list(_places(residuals[1], leaves))
    if None in places:
        return None
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    parameters = rule.parameters
    count = layout.outputs.count
    return Pattern(
        names=tuple(parameters.names(len(entries))),
        keywords=len(parameters.keyword_only),
        by_name=parameters.var_positional is None,
        arguments=arguments[0],
        constants=tuple(constants.items()),
        on_cpu=all(tensor.is_cpu for tensor in tensors),
        needs=plan.signature.needs,
        metas=tuple(meta is not None for meta in plan.signature.metas),
        outputs=outputs[0],
        floating=layout.floating or (True,) * count,
        residuals=residuals[0],
        places=tuple(place for place in places if place is not None),
        kept=layout.kept,
        nondiff=parameters.nondiff,
        has_fwd=rule.fwd is not None,
        fwd_takes_needs=rule.fwd_takes_needs,
        bwd_takes_needs=rule.bwd_takes_needs,
        materialize_grads=rule.materialize_grads,
        inputs=_inputs_of(plan, layout, leaves, constants),
        has_free=has_free,
        policy=plan.policy,
    )


_CONSTANTS = {
    type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout,
}  # fmt: skip


def _kinds(outline: Outline) -> Iterator[type | None]:
    yield outline.kind
    for child in outline.children:
        yield from _kinds(child)


def _marked(layout: Layout) -> Any:
    """Return the residuals with their places for their tensors."""
    slots = layout.slots or range(len(layout.kept))
    return layout.residuals.rebuild([_Mark(layout.kept[slot]) for slot in slots])


class _Mark:
    """Stands for a tensor."""

    def __init__(self, source: Source) -> None:
        self.source = source


def _places(
    residuals: Sequence[Any], leaves: Sequence[Any]
) -> Iterator[Source | str | None]:
    """Yield where each residual lives; of one that is no tensor, the test for it."""
    for value in residuals:
        kind = type(value)
        if isinstance(value, _Mark):
            yield value.source
        elif value is None:
            yield "{} is None"
        elif kind is torch.Size:
            yield f"type({{0}}) is Size and len({{0}}) == {len(value)}"
        elif kind in (bool, int, str, torch.dtype, torch.device, torch.layout):
            yield f"type({{}}) is {kind.__name__}"
        else:  # an argument is known to hide no tensor
            same = (f"{{}} is a{n}" for n, leaf in enumerate(leaves) if leaf is value)
            yield next(same, None)


def _inputs_of(
    plan: Plan, layout: Layout, leaves: Sequence[Any], constants: dict[int, type]
) -> str:
    if all(source.kind != "new" for source in layout.kept):
        return "none"
    if plan.rule.once_differentiable:
        return "ends"
    read = {source.number for source in layout.kept if source.kind == "input"}
    by_value = not {float, complex} & set(constants.values())
    return (
        "kept"
        if by_value and read | constants.keys() >= set(range(len(leaves)))
        else "apart"
    )
