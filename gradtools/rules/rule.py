"""Rule: the plain record of what a user stated, which the other rooms read."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch

from gradtools.rules.signature import Parameters

__all__ = ["Approximate", "Contract", "Exact", "Rule", "Surrogate", "VmapMode", "place"]

VmapMode = Literal["auto", "sequential", "expand_dims", "broadcast_all"]


@dataclasses.dataclass(frozen=True)
class Exact:
    """The rule is the derivative of the function, and is checked to be.

    Args:
        rtol: Relative tolerance of the check; ``None`` lets the check derive it from
            the error that it measures of its own differences.
        atol: Absolute tolerance of the check, likewise.

    Example:
        >>> solve = gt.custom_vjp(torch.reciprocal, contract=gt.Exact(rtol=1e-4))
        >>> _ = solve.def_bwd(lambda residuals, g: -1.00001 * g * residuals[1] ** 2)
        >>> solve.gradcheck(torch.ones(2)).outcome
        'passed'
    """

    rtol: float | None = None
    atol: float | None = None


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """The rule is deliberately not the derivative.

    Args:
        reference: A backward function with the signature of the rule's, which *is* the
            derivative (the same formula before it was clipped, say). It is what the
            gradient check examines.

    Example:
        >>> identity = gt.Surrogate(reference=lambda residuals, g: 2 * g)
        >>> double = gt.custom_vjp(lambda x: 2 * x, contract=identity)
        >>> _ = double.def_bwd(lambda residuals, g: (2 * g).clamp(-1, 1))
        >>> double.gradcheck(torch.ones(2)).outcome
        'passed'
    """

    reference: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class Approximate:
    """The rule is the derivative up to a budget, which the check measures and holds.

    Args:
        rel: The relative error that is allowed, per argument.
        abs: The absolute error that is allowed, per argument.

    Example:
        >>> rough = gt.custom_vjp(torch.exp, contract=gt.Approximate(rel=0.01))
        >>> _ = rough.def_bwd(lambda residuals, g: 1.002 * g * residuals[1])
        >>> rough.gradcheck(torch.ones(2)).outcome
        'passed'
    """

    rel: float = 1e-2
    abs: float | None = None


Contract = Exact | Surrogate | Approximate


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """A function and its derivative, as the user stated them.

    The functions are the user's, called with the user's arguments; nothing here knows
    of tensors laid flat, of Functions or of transforms. The attributes below are read
    off the functions' signatures.

    Attributes:
        is_opaque: What fun does with a dtype that it was not written for is unknown.
        definition: How the derivative is stated, for messages.
        fwd_takes_needs: fwd asks for ``needs``.
        bwd_takes_needs: bwd asks for ``needs``.
        is_lifted: A Function class states the rule. What bwd returns is fitted to the
            arguments as torch does it: summed, cast, dropped for an integer; elsewhere
            that is an error.
        jvp_takes_residuals: The jvp rule gets the output and the residuals as
            well.
        bwd_takes_self: bwd was written as a method: ``bwd(self, residuals,
            cotangent)``.
        jvp_takes_self: So was the jvp rule: ``jvp(self, primals, tangents)``.
    """

    name: str
    fun: Callable[..., Any]
    parameters: Parameters
    fwd: Callable[..., Any] | None = None
    bwd: Callable[..., Any] | None = None
    jvp: Callable[..., Any] | None = None
    vmap_rule: Callable[..., Any] | None = None
    vmap: VmapMode = "auto"
    contract: Contract = dataclasses.field(default_factory=Exact)
    once_differentiable: bool = False
    materialize_grads: bool = True
    autocast: torch.dtype | None = None
    probe: Callable[..., Any] | None = None
    is_method: bool = False
    is_opaque: bool = False
    is_lifted: bool = False
    jvp_takes_residuals: bool = False
    definition: str = "@{name}.def_bwd, or {name}.defvjp(fwd, bwd)"
    fwd_takes_needs: bool = dataclasses.field(init=False)
    bwd_takes_needs: bool = dataclasses.field(init=False)
    bwd_takes_self: bool = dataclasses.field(init=False)
    jvp_takes_self: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        own = "needs" in self.parameters.signature.parameters
        first = 2 + len(self.parameters.nondiff)
        traits = {
            "fwd_takes_needs": _takes_needs(self.fwd) and not own,
            "bwd_takes_needs": _takes_needs(self.bwd),
            "bwd_takes_self": self.is_method
            and _count_positional(self.bwd) == first + 1,
            "jvp_takes_self": self.is_method and _count_positional(self.jvp) == 3,
        }
        for name, value in traits.items():
            object.__setattr__(self, name, value)

    @property
    def where(self) -> str:
        """Name of the rule and place of its function, for messages."""
        return f"{self.name} ({place(self.fun)})"

    def which(self, role: str) -> str:
        """Role of one of the rule's functions and its place, for messages."""
        function = getattr(self, role)
        return (
            f"{role} ({place(function)})"
            if function is not None
            else f"{role} (derived)"
        )


def place(function: Any) -> str:
    """Return ``file:line`` of a function, or its type where there is no source."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(
        getattr(function, "__func__", None), "__code__", None
    )
    if code is None:
        return f"{type(function).__module__}.{type(function).__qualname__}"
    return f"{code.co_filename}:{code.co_firstlineno}"


def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # builtins have none
        return None


def _takes_needs(function: Any) -> bool:
    signature = _signature(function) if function is not None else None
    parameter = signature.parameters.get("needs") if signature else None
    return parameter is not None and parameter.kind is parameter.KEYWORD_ONLY


def _count_positional(function: Any) -> int:
    signature = _signature(function) if function is not None else None
    if signature is None:
        return 0
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(
        parameter.kind in kinds and parameter.default is parameter.empty
        for parameter in signature.parameters.values()
    )
