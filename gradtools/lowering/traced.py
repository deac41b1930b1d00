"""Code for torch.compile to follow: one call of a rule with everything spelled out.

Dynamo guards on every attribute, global and builtin that the code it follows reads, and
looks at all of them again before every call. The general way reads some two hundred, at
10 us a call; the code written here little more than a Function by hand.

What the code looks like is found by running fwd once on tensors without values. Where
it turns out otherwise in the trace, the trace starts anew and takes the general way.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import Function

from gradtools import torch_compat, torch_modes, trees
from gradtools.lowering.flat import Plan
from gradtools.lowering.residuals import Layout
from gradtools.lowering.source import Pattern, arguments, fitted, returned_names
from gradtools.lowering.state import State
from gradtools.lowering.text import (
    Lines,
    compiled,
    indented,
    names,
    numbered,
    put,
    row,
    same,
    taken,
)
from gradtools.trees import Structure

__all__ = ["STATE", "Traced", "Written"]


STATE = State(watched={"fwd", "bwd"})
"""What is known of a rule in a trace: its watches and checks have had their turn."""


class Traced(Function):
    """The Function that Dynamo follows: first-order reverse mode and nothing else."""

    @staticmethod
    def forward(ctx: Any, plan: Any, *leaves: Any) -> Any:
        out, residuals = plan.call_fwd(plan.signature.entries(leaves))
        outs, outputs = Structure.split(out)
        tensors, structure = Structure.split(residuals)
        ctx.save_for_backward(*tensors)
        floating = tuple(out.is_floating_point() or out.is_complex() for out in outs)
        ctx.plan, ctx.layout = plan, Layout(outputs, structure, (), None, floating)
        if torch_modes.edited_outputs_lose_gradients:
            outs = [out.view_as(out) for out in outs]
        return (*outs, outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        plan, layout = ctx.plan, ctx.layout
        given = layout.only_floating(cotangents)
        values = plan.backward(
            layout, ctx.saved_tensors, given, ctx.needs_input_grad[1:]
        )
        return (None, *values)


class Written:
    """The functions that were written for a rule; Dynamo finds them as attributes.

    Attributes:
        is_closed: A trace went otherwise than fwd had let expect.
        known: By what was written: the attribute that holds it.
    """

    def __init__(self) -> None:
        self.is_closed = False
        self.known: dict[str, str] = {}

    def add(
        self,
        plan: Plan,
        leaves: Sequence[Any],
        entries: Sequence[Any],
        binding: Sequence[str],
        otherwise: Callable[[], None],
    ) -> str:
        """Write the code for a call; return the attribute that holds it, or nothing.

        Args:
            plan: The signature of the call.
            leaves: Its arguments, flat, as tensors without values.
            entries: The same in their containers.
            binding: How each of them is found among ``args`` and ``kwargs``.
            otherwise: Starts the trace anew.
        """
        pattern = _pattern_of(plan, leaves, entries)
        if pattern is None:
            return ""
        text = "\n".join(_write(pattern, binding))
        name = self.known.setdefault(text, f"call_{len(self.known)}")
        if not hasattr(self, name):
            rule = plan.rule
            space: dict[str, Any] = {
                "fun": rule.fun,
                "fwd": rule.fwd,
                "bwd": rule.bwd,
                "names": returned_names(pattern),
                "otherwise": otherwise,
            }
            exec(compiled(text, rule.name), space)
            members = {key: staticmethod(space[key]) for key in ("forward", "backward")}
            space["Written"] = types.new_class(
                rule.name, (Function,), {}, lambda body: body.update(members)
            )
            setattr(self, name, space["call"])
        return name


def _pattern_of(
    plan: Plan, leaves: Sequence[Any], entries: Sequence[Any]
) -> Pattern | None:
    rule = plan.rule
    given = trees.outline(tuple(entries))
    if (
        given is None
        or len(given[1]) != len(leaves)
        or plan.autocast
        or rule.autocast is not None
        or rule.bwd_takes_self
        or rule.parameters.var_keyword is not None
    ):
        return None
    with torch_compat.fake_tensors() as fake:
        out, kept = plan.call_fwd(
            plan.signature.entries([fake(leaf) for leaf in leaves])
        )
    outputs, residuals = trees.outline(out), trees.outline(kept)
    if outputs is None or residuals is None:
        return None
    if not all(isinstance(leaf, torch.Tensor) for leaf in outputs[1]):
        return None
    return Pattern(
        names=tuple(rule.parameters.names(len(entries))),
        keywords=len(rule.parameters.keyword_only),
        by_name=rule.parameters.var_positional is None,
        arguments=given[0],
        constants=(),
        on_cpu=False,
        needs=plan.signature.needs,
        metas=tuple(meta is not None for meta in plan.signature.metas),
        outputs=outputs[0],
        floating=tuple(
            leaf.is_floating_point() or leaf.is_complex() for leaf in outputs[1]
        ),
        residuals=residuals[0],
        places=tuple(
            "tensor" if isinstance(leaf, torch.Tensor) else "" for leaf in residuals[1]
        ),
        kept=(),
        nondiff=rule.parameters.nondiff,
        has_fwd=rule.fwd is not None,
        fwd_takes_needs=rule.fwd_takes_needs,
        bwd_takes_needs=rule.bwd_takes_needs,
        materialize_grads=rule.materialize_grads,
        inputs="none",
        has_free=False,
    )


def _write(pattern: Pattern, binding: Sequence[str]) -> Lines:
    yield from _call(pattern, binding)
    yield from _forward(pattern)
    yield from _backward(pattern)


def _call(pattern: Pattern, binding: Sequence[str]) -> Lines:
    leaves = names("a", pattern.arguments)
    yield "def call(args, kwargs):"
    for index, (where, child) in enumerate(
        zip(binding, pattern.arguments.children, strict=True)
    ):
        yield f"    e{index} = {where}"
        yield from indented(taken(child, f"e{index}", "a", "otherwise()"))
    yield f"    out = Written.apply({', '.join(leaves)})"
    if pattern.outputs.kind is not None:
        yield f"    {row(names('o', pattern.outputs))} = out"
        yield f"    return {put(pattern.outputs, numbered('o'))}"
    else:
        yield "    return out"
    yield ""


def _forward(pattern: Pattern) -> Lines:
    leaves = ", ".join(names("a", pattern.arguments))
    role = "fwd" if pattern.has_fwd else "fun"
    yield f"def forward(ctx, {leaves}):"
    yield f"    returned = {role}({arguments(pattern)})"
    children = pattern.residuals.children
    front = [children[place] for place in range(len(pattern.nondiff))]
    own = children[-1] if front else pattern.residuals
    if pattern.has_fwd:
        yield "    out, residuals = returned"
        yield from indented(taken(own, "residuals", "r", "otherwise()"))
    else:
        yield "    out = returned"
    yield from indented(taken(pattern.outputs, "out", "o", "otherwise()"))
    if not pattern.has_fwd:  # the residuals are (arguments, output)
        yield from indented(same(own.children[0], "r", pattern.arguments, "a"))
        yield from indented(same(own.children[1], "r", pattern.outputs, "o"))
    for place, index in enumerate(pattern.nondiff):
        source = pattern.arguments.children[index]
        yield from indented(same(front[place], "r", source, "a"))
    tensors, others = _kinds(pattern)
    if tensors:
        yield f"    ctx.save_for_backward({', '.join(tensors)})"
    if others:
        yield f"    ctx.constants = {row(others)}"
    metas = [
        f"a{number}.{what}"
        for number, able in enumerate(pattern.metas)
        if able
        for what in ("shape", "dtype", "device")
    ]
    yield f"    ctx.metas = {row(metas)}"
    outputs = names("o", pattern.outputs)
    if torch_modes.edited_outputs_lose_gradients:
        outputs = [f"{name}.view_as({name})" for name in outputs]
    yield f"    return {outputs[0] if pattern.outputs.kind is None else row(outputs)}"
    yield ""


def _backward(pattern: Pattern) -> Lines:
    given = ", ".join(f"g{index}" for index in range(len(pattern.floating)))
    yield f"def backward(ctx, {given}):"
    tensors, others = _kinds(pattern)
    if tensors:
        yield f"    {row(tensors)} = ctx.saved_tensors"
    if others:
        yield f"    {row(others)} = ctx.constants"
    residuals = pattern.residuals
    parts = residuals.children if pattern.nondiff else [residuals]
    cotangents = [f"g{i}" if can else "None" for i, can in enumerate(pattern.floating)]
    passed = [put(part, numbered("r")) for part in parts]
    passed.append(put(pattern.outputs, cotangents.__getitem__))
    if pattern.bwd_takes_needs:
        needs = row(f"n{number}" for number in range(len(pattern.needs)))
        yield f"    {needs} = ctx.needs_input_grad"
        passed.append("needs=" + put(pattern.arguments, numbered("n")))
    yield f"    returned = bwd({', '.join(passed)})"
    metas = [
        f"{what}{number}"
        for number, able in enumerate(pattern.metas)
        if able
        for what in "sdv"
    ]
    yield f"    {row(metas)} = ctx.metas"
    yield from indented(fitted(pattern, "otherwise()"))


def _kinds(pattern: Pattern) -> tuple[list[str], list[str]]:
    """Return the names of the residuals that are tensors, and of the others."""
    kinds: tuple[list[str], list[str]] = ([], [])
    for number, place in enumerate(pattern.places):
        kinds[not place].append(f"r{number}")
    return kinds
