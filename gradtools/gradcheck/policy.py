"""Whether checks run: a property of the run, never of a rule."""

from __future__ import annotations

import contextlib
import functools
import os
from contextvars import ContextVar, Token
from typing import Any, Literal, get_args

from gradtools.errors import DefinitionError

__all__ = [
    "Policy",
    "chosen",
    "current_policy",
    "from_environment",
    "gradcheck_policy",
]

Policy = Literal["first", "always", "off"]

_VARIABLE = "GRADTOOLS_GRADCHECK"
chosen: ContextVar[Policy | None] = ContextVar("gradcheck_policy", default=None)


def current_policy() -> Policy:
    """Return the policy in force: the innermost context's, else the environment's."""
    return chosen.get() or from_environment()


@functools.cache
def from_environment() -> Policy:
    """Return the policy that the environment asks for."""
    return _valid(os.environ.get(_VARIABLE, "first"), f"the environment's {_VARIABLE}")


def _valid(name: str, source: str) -> Any:
    if name not in get_args(Policy):
        raise DefinitionError(
            f"{source} asks for the gradient check policy {name!r}, which is none of "
            + ", ".join(map(repr, get_args(Policy))),
            fix='Use "first" (check at first use), "always" (at every call) or "off".',
        )
    return name


class gradcheck_policy(contextlib.ContextDecorator):  # noqa: N801
    """Choose when rules are checked, as a context manager or a decorator.

    Args:
        policy: ``"first"``: a rule is checked when it is first used with a signature
            (the default; the environment variable ``GRADTOOLS_GRADCHECK`` changes it).
            ``"always"``: at every call. ``"off"``: never, and the report says so.
            Malformed returns of bwd are errors under every policy. What no check
            can copy (meta and fake tensors, a DTensor: one rank alone would wait for
            the others) is not checked, with a warning; ``f.gradcheck`` checks the rule
            on plain tensors.

    Raises:
        DefinitionError: The policy is none of the three.

    Example:
        >>> with gt.gradcheck_policy("off"):
        ...     gt.scale_grad(torch.ones(2, requires_grad=True), 2.0).sum().backward()
    """

    def __init__(self, policy: Policy) -> None:
        self.policy: Policy = _valid(policy, "gradcheck_policy")
        self._tokens: list[Token[Policy | None]] = []

    def __enter__(self) -> gradcheck_policy:
        self._tokens.append(chosen.set(self.policy))
        return self

    def __exit__(self, *exception: object) -> None:
        chosen.reset(self._tokens.pop())

    def _recreate_cm(self) -> gradcheck_policy:
        return type(self)(self.policy)
