"""What the user's functions must return: count, structure, shape, dtype, device.

torch accepts much of what is wrong here in silence: it sums a cotangent of the wrong
but broadcastable shape, casts a wrong dtype, drops a cotangent for an integer. Here all
of it is an error, on every call, and all that is wrong in one call is said at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradtools import trees
from gradtools.errors import (
    ForwardContractError,
    TransformError,
    Violation,
)
from gradtools.lowering.contents import hidden_tensors
from gradtools.lowering.residuals import opaque_objects
from gradtools.rules.rule import Rule
from gradtools.rules.signature import Meta

__all__ = [
    "describe",
    "output_and_residuals",
    "output_tangents",
    "refuse_edited",
    "refuse_hidden_outputs",
    "refuse_unlike",
]


def describe(value: Any) -> str:
    """Say what a value is, for the lines "expected" and "got"."""
    if isinstance(value, torch.Tensor):
        is_usual = value.layout is torch.strided
        layout = "" if is_usual else f", {str(value.layout).removeprefix('torch.')}"
        return f"{Meta.of(value)}{layout}"
    if value is None:
        return "None"
    below = trees.children(value)
    if below is None:
        return f"a value of type {type(value).__name__}"
    keys = ", ".join(key for key, _ in below)
    return f"a {type(value).__name__} of {len(below)} ({keys})"


def _structure(tree: Any) -> str:
    """Describe a tree by the paths of its leaves."""
    if trees.children(tree) is None:
        return describe(tree)
    return f"a {type(tree).__name__} with {', '.join(trees.paths(tree)) or 'nothing'}"


def output_and_residuals(rule: Rule, returned: Any) -> tuple[Any, Any]:
    """Take apart what fwd returned."""
    if isinstance(returned, tuple) and len(returned) == 2:
        return returned
    raise ForwardContractError(
        f"{rule.name}: fwd must return a pair (output, residuals)",
        rule=rule.where,
        function=rule.which("fwd"),
        violations=[Violation("return", "a tuple of 2", describe(returned))],
        fix="Return (output, residuals); with nothing to keep, return (output, ()).",
    )


def refuse_edited(
    rule: Rule, versions: Sequence[tuple[str, torch.Tensor, int]]
) -> None:
    """Raise where a tensor inside an opaque residual was edited after fwd.

    torch watches over the tensors that it saves; over these only we can.
    """
    edited = [
        Violation(where, f"a tensor at version {known}", f"version {tensor._version}")
        for where, tensor, known in versions
        if tensor._version != known
    ]
    if edited:
        raise TransformError(
            f"{rule.name}: a tensor that bwd needs was changed in place after fwd had "
            "kept it inside an opaque object",
            rule=rule.where,
            function=rule.which("fwd"),
            violations=edited,
            fix="Change a copy of it, tensor.clone(), or do so after the backward.",
        )


def refuse_hidden_outputs(
    rule: Rule, outputs: trees.Structure, leaves: Sequence[Any]
) -> None:
    """Raise for tensors inside an object that is an output: they get no gradient."""
    violations = [
        Violation(
            f"output, a {type(value).__name__}",
            "tensors in containers that torch's pytree knows",
            f"{describe(tensor)} inside ({path.lstrip('.')})",
        )
        for value in opaque_objects(outputs, leaves)
        for path, tensor in hidden_tensors(value)
    ]
    if violations:
        raise ForwardContractError(
            f"{rule.name}: an output hides tensors inside an opaque object, and they "
            "would get no gradient",
            rule=rule.where,
            function=rule.which("fwd" if rule.fwd is not None else "fun"),
            violations=violations,
            fix="Return the tensors themselves, or register the object's type with "
            "torch.utils._pytree.",
        )


def refuse_unlike(rule: Rule, role: str, out: Any, argument: Any) -> None:
    """Raise where an output must have the structure, shapes and dtypes of an argument.

    Args:
        rule: The rule.
        role: Which of its functions returned the output.
        out: The output.
        argument: What it must be like.
    """
    places = trees.paths(argument, "output")
    violations = [
        Violation(place, describe(wanted), describe(leaf))
        for place, wanted, leaf in zip(
            places, trees.flatten(argument)[0], trees.flatten(out)[0], strict=False
        )
        if describe(wanted) != describe(leaf)
    ]
    if trees.paths(out) != trees.paths(argument):
        violations = [Violation("output", _structure(argument), _structure(out))]
    if violations:
        raise ForwardContractError(
            f"{rule.name}: the output is not like the argument",
            rule=rule.where,
            function=rule.which(role),
            violations=violations,
            fix="Return tensors of the argument's structure, shapes and dtypes.",
        )


def output_tangents(
    rule: Rule,
    returned: Any,
    outputs: trees.Structure,
    outs: Sequence[torch.Tensor],
) -> list[torch.Tensor | None]:
    """Return one tangent per output tensor from what a jvp rule returned, or raise.

    Args:
        rule: The rule.
        returned: Whatever its jvp rule returned.
        outputs: The structure of the function's output.
        outs: The outputs of the call; empty where they are not at hand.
    """
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise ForwardContractError(
            f"{rule.name}: a jvp rule must return a pair (output, output_tangent)",
            rule=rule.where,
            function=rule.which("jvp"),
            violations=[Violation("return", "a tuple of 2", describe(returned))],
            fix="Return (output, output_tangent), both with the structure of the "
            "output.",
        )
    primals, structure = trees.Structure.split(returned[0])
    places = structure.paths("return[0]")
    violations = [
        Violation(place, describe(out), describe(primal))
        for place, primal, out in zip(places, primals, outs, strict=False)
        if Meta.of(primal) != Meta.of(out)
    ]
    if structure.spec != outputs.spec:
        like = outputs.rebuild([None] * outputs.count)
        expected = "a tensor" if outputs.spec is None else _structure(like)
        violations = [Violation("return[0]", expected, _structure(returned[0]))]
    tangents = _tangents_of(returned[0], returned[1])
    if tangents is None:
        violations.append(
            Violation("return[1]", _structure(returned[0]), _structure(returned[1]))
        )
    for place, tangent, primal in zip(places, tangents or (), primals, strict=False):
        able = primal.is_floating_point() or primal.is_complex()
        if tangent is not None and (not able or describe(tangent) != describe(primal)):
            expected = describe(primal) if able else "None (the output is no float)"
            violations.append(
                Violation(place.replace("[0]", "[1]", 1), expected, describe(tangent))
            )
    if violations:
        raise ForwardContractError(
            f"{rule.name}: what the jvp rule returned does not fit the output",
            rule=rule.where,
            function=rule.which("jvp"),
            violations=violations,
            fix="Return an output and a tangent with the structure, shapes and dtypes "
            "of the function's output; None for a tangent of zero.",
        )
    return tangents or []


def _tangents_of(out: Any, tangent: Any) -> list[Any] | None:
    """Return the tangent of each tensor in ``out``; None if the structure differs."""
    below = trees.children(out)
    if tangent is None or below is None:
        return [
            tangent for leaf in trees.flatten(out)[0] if isinstance(leaf, torch.Tensor)
        ]
    given = dict(trees.children(tangent) or ())
    if given.keys() != {key for key, _ in below}:
        return None
    found: list[Any] = []
    for key, child in below:
        part = _tangents_of(child, given[key])
        if part is None:
            return None
        found += part
    return found
