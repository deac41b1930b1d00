"""Arguments that are declared to have no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradtools import torch_compat, trees
from gradtools.errors import DefinitionError, Violation
from gradtools.rules.rule import Rule
from gradtools.rules.signature import Meta, is_differentiable

__all__ = ["refuse", "without"]


def refuse(rule: Rule, entries: Sequence[Any]) -> None:
    """Raise for a tensor that needs a gradient in a place declared nondiff."""
    nondiff = rule.parameters.nondiff
    names = rule.parameters.names(len(entries)) if nondiff else ()
    violations = [
        Violation(f"args.{names[i]}", "a value without a gradient", str(Meta.of(t)))
        for i in nondiff
        for t in trees.flatten(entries[i])[0]
        if is_differentiable(t) and torch_compat.is_differentiated(t)
    ]
    if violations:
        raise DefinitionError(
            f"{rule.name}: a nondiff argument needs a gradient, and would get none",
            rule=rule.where,
            violations=violations,
            fix="Take the argument out of nondiff_argnums/nondiff_argnames, or detach "
            "it.",
        )


def without(
    rule: Rule, needs: Sequence[bool], leaves: Sequence[Any], entries: Sequence[Any]
) -> tuple[bool, ...]:
    """Return needs with False for nondiff arguments, of which none may need one."""
    if not any(needs):
        return tuple(needs)
    refuse(rule, entries)
    places = rule.parameters.nondiff
    out = [x for i in places for x in trees.flatten(entries[i])[0]]
    return tuple(
        need and not any(leaf is x for x in out)
        for need, leaf in zip(needs, leaves, strict=True)
    )
