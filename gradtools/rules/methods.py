"""A rule that was stated in the body of a class: what instances see of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

if TYPE_CHECKING:
    from gradtools.gradcheck.report import Report
    from gradtools.rules.custom_vjp import StatedRule

__all__ = ["BoundRule", "Method"]

P = ParamSpec("P")
R = TypeVar("R")


class Method:
    """What a rule stated in the body of a class leaves there.

    A rule has no ``__get__`` of its own: Dynamo 2.11 would not find it where it is an
    attribute of an instance.
    """

    def __init__(self, rule: StatedRule[..., Any]) -> None:
        self.rule = rule

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self.rule if instance is None else BoundRule(self.rule, instance)


class BoundRule(Generic[P, R]):
    """A rule looked up on an instance, as a bound method is a function."""

    # Dynamo 2.11 asks an object for its hash before __init__ has run.
    rule: Any = None
    instance: Any = None

    def __init__(self, rule: StatedRule[..., R], instance: Any) -> None:
        self.rule = rule
        self.instance = instance

    @property
    def __name__(self) -> str:
        return self.rule.rule.name

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the method."""
        return self.rule(self.instance, *args, **kwargs)

    def gradcheck(self, *args: P.args, **kwargs: P.kwargs) -> Report:
        """Check the rule on these arguments now; see :meth:`StatedRule.gradcheck`."""
        return self.rule.gradcheck(self.instance, *args, **kwargs)

    @property
    def reports(self) -> tuple[Report, ...]:
        """What has been checked so far."""
        return self.rule.reports

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BoundRule)
            and self.rule is other.rule
            and self.instance is other.instance
        )

    def __hash__(self) -> int:
        return hash((id(self.rule), id(self.instance)))

    def _repr_html_(self) -> str:
        return self.rule._repr_html_()

    def __repr__(self) -> str:
        return f"<bound {self.rule.headline} of {self.instance!r}>"
