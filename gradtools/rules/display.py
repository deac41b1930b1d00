"""What a rule shows of itself: what is given, derived, and has been checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from gradtools.rules.rule import Exact, Rule

if TYPE_CHECKING:
    from gradtools.gradcheck.report import Report

__all__ = ["HEADINGS", "headline", "rows"]

HEADINGS = "use", "comes from", "checked"
_ROLES = "fwd", "bwd", "jvp"


def headline(kind: str, module: str, rule: Rule) -> str:
    """Return a rule in one line: its name, its place, what is stated."""
    given = [role for role in _ROLES if getattr(rule, role) is not None]
    stated = ", ".join(given) or "nothing stated"
    written_in = getattr(rule.fun, "__module__", module)
    public = "" if module == written_in else f"{module}."
    return f"<{kind} {public}{rule.where}: {stated}>"


def rows(rule: Rule, reports: Iterable[Report]) -> Iterator[tuple[str, str, str]]:
    """Yield, for each use of a rule, where it comes from and what was found of it."""
    known = tuple(reports)
    yield "function", rule.which("fun"), ""
    yield "reverse", _reverse(rule), _found(known, "reverse")
    yield "forward mode", _forward(rule), _found(known, "forward mode")
    yield "second order", _second(rule), _found(known, "second order")
    yield "vmap", _vmap(rule), _found(known, "vmap")
    if rule.contract != Exact():
        yield "contract", repr(rule.contract), ""


def _reverse(rule: Rule) -> str:
    if rule.bwd is not None:
        return rule.which("bwd")
    return "not stated" if rule.jvp is None else "derived: the transpose of jvp"


def _forward(rule: Rule) -> str:
    if rule.jvp is not None:
        return rule.which("jvp")
    return "not stated" if rule.bwd is None else "derived: the transpose of bwd"


def _second(rule: Rule) -> str:
    if rule.once_differentiable:
        return "refused: once_differentiable"
    if rule.bwd is None:
        return "not stated" if rule.jvp is None else "derived: through jvp"
    return f"derived: through {'fun' if rule.fwd is None else 'fwd'} and bwd"


def _vmap(rule: Rule) -> str:
    if rule.vmap_rule is not None:
        return rule.which("vmap_rule").replace("vmap_rule", "def_vmap", 1)
    return "derived: torch.func.vmap" if rule.vmap == "auto" else f"{rule.vmap!r}"


def _found(reports: tuple[Report, ...], use: Any) -> str:
    """Return the outcomes at the signatures at which a use came up, worst first."""
    outcomes: list[str] = []
    for report in reports:
        of_use = {
            item.outcome
            for item in report.evidence
            if item.capability == use or item.question == "everything"
        }
        if of_use:
            outcomes.append(next(word for word in _WORST_FIRST if word in of_use))
    if not outcomes:
        return "not used yet"
    return ", ".join(
        word if (count := outcomes.count(word)) == 1 else f"{word} ({count} signatures)"
        for word in _WORST_FIRST
        if word in outcomes
    )


_WORST_FIRST = "failed", "not checked", "passed", "not given"
