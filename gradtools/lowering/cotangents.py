"""What bwd must return: cotangents that fit the arguments, one by one.

By position, by name, or bare; all that is wrong in one return is said at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradtools import trees
from gradtools.errors import BackwardContractError, Violation
from gradtools.lowering.contract import describe
from gradtools.rules.rule import Rule
from gradtools.rules.signature import CallSignature, Meta
from gradtools.spelling import suggestion

__all__ = ["fitted"]

Cotangents = Sequence[torch.Tensor | None]


def fitted(
    rule: Rule,
    signature: CallSignature,
    returned: Any,
    *,
    cast: bool = False,
    leading: tuple[int, ...] = (),
) -> Cotangents:
    """Return one cotangent per leaf from what bwd returned, or raise.

    Args:
        rule: The rule whose bwd it was.
        signature: The call that bwd belongs to.
        returned: Whatever bwd returned.
        cast: Whether a cotangent takes its argument's dtype (under autocast only).
        leading: Sizes of batch dimensions in front of every cotangent, each of which
            may be 1 instead.
    """
    if signature.spec is None and type(returned) is tuple and not cast and not leading:
        metas = signature.metas
        if len(returned) == len(metas) and not signature.parameters.nondiff:
            for value, meta in zip(returned, metas, strict=True):
                if value is not None and (
                    meta is None
                    or not isinstance(value, torch.Tensor)
                    or value.shape != meta.shape
                    or value.dtype != meta.dtype
                    or value.device != meta.device
                ):
                    break
            else:
                return returned
    return _Matching(rule, signature, cast, leading).run(returned)


class _Matching:
    """Lay what bwd returned over the arguments, collecting everything that is wrong."""

    def __init__(
        self, rule: Rule, signature: CallSignature, cast: bool, leading: tuple[int, ...]
    ) -> None:
        self.rule = rule
        self.signature = signature
        self.cast = cast
        self.leading = leading
        self.violations: list[Violation] = []
        self.fixes: dict[str, None] = {}
        self.values: list[torch.Tensor | None] = [None] * len(signature.metas)

    def run(self, returned: Any) -> Cotangents:
        signature = self.signature
        nondiff = signature.parameters.nondiff
        skeleton = signature.entries(range(len(signature.metas)))
        names = signature.names
        places = [i for i in range(signature.count) if i not in nondiff]
        by_place = self.by_place(returned, places, names, skeleton)
        for i, value in by_place.items():
            self.match(skeleton[i], value, f"args.{names[i]}")
        if self.violations:
            many = len(self.violations) > 1
            raise BackwardContractError(
                f"{self.rule.name}: bwd returned "
                + ("cotangents" if many else "a cotangent")
                + f" that {'do' if many else 'does'} not fit the arguments",
                rule=self.rule.where,
                function=self.rule.which("bwd"),
                violations=self.violations,
                fix=" ".join(self.fixes),
            )
        return self.values

    def by_place(
        self,
        returned: Any,
        places: list[int],
        names: list[str],
        skeleton: Sequence[Any],
    ) -> dict[int, Any]:
        """Give each parameter what bwd returned for it."""
        if type(returned) in (tuple, list):
            if len(returned) == len(places) - 1 and self.omits_self(places, skeleton):
                places = places[1:]
            if len(returned) == len(places):
                return dict(zip(places, returned, strict=True))
            self.wrong_count(returned, [names[i] for i in places])
        elif isinstance(returned, dict):
            return self.by_name(returned, places, names, skeleton)
        elif returned is None or isinstance(returned, torch.Tensor):
            able = [i for i in places if self.differentiable(skeleton[i])]
            if len(able) == 1:
                return {able[0]: returned}
            self.wrong_count(returned, [names[i] for i in places])
        else:
            self.wrong_count(returned, [names[i] for i in places])
        return {}

    def by_name(
        self,
        returned: dict[Any, Any],
        places: list[int],
        names: list[str],
        skeleton: Any,
    ) -> dict[int, Any]:
        at = {names[i]: i for i in places}
        var = self.signature.parameters.var_positional
        returned = dict(returned)
        if var in returned and isinstance(returned[var], (tuple, list)):
            values = returned.pop(var)
            returned |= {f"{var}[{i}]": value for i, value in enumerate(values)}
        unknown = [key for key in returned if key not in at]
        if unknown:
            own = [
                name
                for name, i in at.items()
                if {key for key, _ in trees.children(skeleton[i]) or ()}
                >= {f"[{key!r}]" for key in unknown}
            ]
            self.report(
                "return",
                f"a dict by parameter name: {', '.join(at)}",
                f"unknown names {', '.join(map(repr, unknown))}",
                f"Return {{{own[0]!r}: {{...}}}}: the outer dict is by parameter name."
                if own
                else f"{suggestion(unknown[0], at)} A parameter left out gets zero.",
            )
        return {at[name]: value for name, value in returned.items() if name in at}

    def omits_self(self, places: list[int], skeleton: Sequence[Any]) -> bool:
        return self.rule.is_method and not self.differentiable(skeleton[places[0]])

    def differentiable(self, node: Any) -> bool:
        return any(self.signature.metas[i] is not None for i in trees.flatten(node)[0])

    def wrong_count(self, returned: Any, names: list[str]) -> None:
        expected = f"a tuple of {len(names)} ({', '.join(names)}), or a dict by name"
        self.report(
            "return",
            expected,
            describe(returned),
            "Return one cotangent per parameter, None where it is zero or the argument "
            "has none.",
        )

    def report(self, where: str, expected: str, got: str, fix: str) -> None:
        self.violations.append(Violation(where, expected, got))
        self.fixes[fix] = None

    def match(self, node: Any, value: Any, where: str) -> None:
        """Match one cotangent with its argument, whose leaves are their numbers."""
        if value is None:
            return
        below = trees.children(node)
        if below is None:
            self.match_leaf(node, value, where)
            return
        given = dict(trees.children(value) or ())
        same_kind = (
            type(value) is type(node)
            or (type(value) is list and type(node) is tuple)
            or (type(value) is dict and type(node) not in (tuple, list))
        )  # a dict serves for any container with its keys: a TensorDict, an OrderedDict
        if not same_kind or given.keys() != {key for key, _ in below}:
            self.report(
                where,
                describe(node),
                describe(value),
                "Return a tree with the structure of the argument; None stands for a "
                "zero leaf or subtree.",
            )
            return
        for key, child in below:
            self.match(child, given[key], where + key)

    def match_leaf(self, number: int, value: Any, where: str) -> None:
        meta = self.signature.metas[number]
        if self.rule.is_lifted and isinstance(value, torch.Tensor):
            if meta is None:
                return
            value = _fitted(meta, value, sums=not self.leading)
        if meta is None:
            self.report(
                where,
                "None (the argument is no floating or complex tensor)",
                describe(value),
                "Return None for an argument that has no gradient.",
            )
            return
        if isinstance(value, torch.Tensor):
            if self.cast and value.dtype != meta.dtype and value.is_floating_point():
                value = value.to(meta.dtype)
            if self.leading:
                front = [
                    1 if has == 1 else wanted
                    for has, wanted in zip(value.shape, self.leading, strict=False)
                ]
                meta = meta._replace(shape=torch.Size((*front, *meta.shape)))
            if Meta.of(value) == meta:
                self.values[number] = value
                return
        self.report(where, str(meta), describe(value), _advice(meta, value))


def _fitted(meta: Meta, value: torch.Tensor, *, sums: bool) -> torch.Tensor:
    """Do what autograd does with a gradient of another shape or dtype."""
    if sums and value.shape != meta.shape:
        try:
            value = value.sum_to_size(meta.shape)
        except RuntimeError:  # no broadcast of the argument; the caller says so
            return value
    if value.is_complex() and not meta.dtype.is_complex:
        value = value.real
    return value.to(meta.dtype)


def _advice(meta: Meta, value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return "Return a tensor like the argument, or None for zero."
    if value.shape != meta.shape:
        try:
            summable = torch.broadcast_shapes(value.shape, meta.shape) == value.shape
        except RuntimeError:
            summable = False
        if summable:
            return (
                "Sum over the dimensions along which the argument was broadcast: "
                "cotangent.sum_to_size(argument.shape)."
            )
        return "Return a cotangent of the argument's shape."
    if value.dtype != meta.dtype:
        if value.is_complex() and not meta.dtype.is_complex:
            return "The cotangent of a real argument is real: return cotangent.real."
        return "Return the argument's dtype: cotangent.to(argument.dtype)."
    return "Return a cotangent on the argument's device."
