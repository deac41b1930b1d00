"""The exceptions that gradtools raises, and the one form that their messages take.

::

    GradtoolsError
     ├── DefinitionError          (TypeError)      a rule or a call that means nothing
     │    └── CapturedTensorError                  a tensor that is no argument
     ├── ForwardContractError     (TypeError)      what fwd, fun or a jvp rule returned
     ├── BackwardContractError    (TypeError)      what bwd returned
     ├── GradientMismatchError    (GradcheckError) the rule is not the derivative
     └── TransformError           (RuntimeError)   a transform the rule cannot serve

A message says, in this order: what is wrong, of which rule and function, where in the
arguments, what was expected and what came, and in one line how to mend it. Every part
is an attribute of the exception as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.autograd.gradcheck import GradcheckError


class Violation(NamedTuple):
    """One place where a promise was broken: where, what was expected, what came."""

    where: str
    expected: str
    got: str


class GradtoolsError(Exception):
    """Base of everything that gradtools raises on purpose.

    Attributes:
        what: The first line of the message.
        rule: Name and place of the rule, or ``None``.
        function: Name and place of the user's function that is to blame, or ``None``.
        violations: Every place that is wrong, as :class:`.Violation`.
        fix: What to do about it.

    Example:
        >>> try:
        ...     gt.hvp(torch.sum, torch.ones(2), torch.ones(2), mdoe="auto")
        ... except gt.GradtoolsError as error:
        ...     print(error.what)
        ...     print(error.fix)
        hvp() got an unexpected keyword argument 'mdoe'
        Did you mean 'mode'?
    """

    def __init__(
        self,
        what: str,
        *,
        rule: str | None = None,
        function: str | None = None,
        violations: Sequence[Violation] = (),
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.rule = rule
        self.function = function
        self.violations = tuple(violations)
        self.fix = fix
        super().__init__(self._message())

    def _message(self) -> str:
        rows = [("rule", self.rule), ("function", self.function)]
        for violation in self.violations:
            rows += zip(Violation._fields, violation, strict=True)
        rows.append(("fix", self.fix))
        return "\n".join(
            [self.what, *(f"  {name:<9} {text}" for name, text in rows if text)]
        )

    def __reduce__(self) -> tuple[Any, ...]:
        parts = (self.what, self.rule, self.function, self.violations, self.fix)
        return _rebuild, (type(self), *parts)


def _rebuild(
    cls: type[GradtoolsError],
    what: str,
    rule: str | None,
    function: str | None,
    violations: Sequence[Violation],
    fix: str | None,
) -> GradtoolsError:
    """Undo ``GradtoolsError.__reduce__`` (exceptions cross process boundaries)."""
    return cls(what, rule=rule, function=function, violations=violations, fix=fix)


class DefinitionError(GradtoolsError, TypeError):
    """A rule, or a call of it, that cannot mean anything.

    Example:
        >>> try:
        ...     gt.gradcheck_policy("sometimes")
        ... except gt.DefinitionError as error:
        ...     print(error.fix)
        Use "first" (check at first use), "always" (at every call) or "off".
    """


class CapturedTensorError(DefinitionError):
    """A tensor that needs a gradient reaches a rule past its arguments.

    torch would give it no gradient, silently.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> @gt.custom_vjp
        ... def scaled(x):
        ...     return weight * x
        >>> _ = scaled.def_bwd(lambda residuals, g: weight * g)
        >>> try:
        ...     scaled(torch.ones(2, requires_grad=True))
        ... except gt.CapturedTensorError as error:
        ...     print(error.violations[0].where)
        a tensor of shape () that is no argument
    """


class ForwardContractError(GradtoolsError, TypeError):
    """What a forward function or a jvp rule returned does not fit.

    Example:
        >>> double = gt.custom_vjp(lambda x: 2 * x)
        >>> double.defvjp(lambda x: 2 * x, lambda residuals, g: 2 * g)
        >>> try:
        ...     double(torch.ones(2, requires_grad=True))
        ... except gt.ForwardContractError as error:
        ...     print(error.fix)
        Return (output, residuals); with nothing to keep, return (output, ()).
    """


class BackwardContractError(GradtoolsError, TypeError):
    """What a backward function returned does not fit the arguments.

    Example:
        >>> total = gt.custom_vjp(lambda x: x.sum())
        >>> _ = total.def_bwd(lambda residuals, g: g)  # a scalar for two numbers
        >>> try:
        ...     total(torch.ones(2, requires_grad=True)).backward()
        ... except gt.BackwardContractError as error:
        ...     print(error.violations[0].where, error.violations[0].expected)
        args.x a tensor of shape (2,), float32, cpu
    """


class GradientMismatchError(GradtoolsError, GradcheckError):
    """A rule is not the derivative that it claims to be, or is not pure.

    Attributes:
        kind: What the mistake looks like, in a word: ``"sign"``, ``"factor"``, ...

    Example:
        >>> square = gt.custom_vjp(lambda x: x**2)
        >>> square.defvjp(lambda x: (x**2, x), lambda x, g: -2 * x * g)
        >>> try:
        ...     square(torch.ones(2, requires_grad=True))
        ... except gt.GradientMismatchError as error:
        ...     print(error.kind)
        sign
    """

    def __init__(
        self,
        what: str,
        *,
        kind: str = "unknown",
        rule: str | None = None,
        function: str | None = None,
        violations: Sequence[Violation] = (),
        fix: str | None = None,
    ) -> None:
        self.kind = kind
        super().__init__(
            what, rule=rule, function=function, violations=violations, fix=fix
        )

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, parts = super().__reduce__()
        return _rebuild_with_kind, (self.kind, rebuild, parts)


def _rebuild_with_kind(kind: str, rebuild: Any, parts: tuple[Any, ...]) -> Any:
    error = rebuild(*parts)
    error.kind = kind
    return error


class TransformError(GradtoolsError, RuntimeError):
    """A transform was asked of a rule that cannot serve it.

    Example:
        >>> x = torch.ones(2)
        >>> try:  # a clip is not linear: nothing can be transposed
        ...     torch.func.jvp(lambda x: gt.clip_grad(x, -1, 1), (x,), (x,))
        ... except gt.TransformError as error:
        ...     print(error.fix)
        State the forward mode with def_jvp, or use reverse mode only.
    """
