"""custom_jvp: the forward-mode twin of custom_vjp."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, overload

from gradtools import trees
from gradtools.errors import DefinitionError
from gradtools.rules.custom_vjp import F, StatedRule
from gradtools.rules.options import name_of, refuse_options
from gradtools.rules.rule import Contract, Exact, Rule
from gradtools.rules.signature import Parameters
from gradtools.spelling import spelled

__all__ = ["CustomJVP", "custom_jvp"]

P = ParamSpec("P")
R = TypeVar("R")


class CustomJVP(StatedRule[P, R]):
    """A function with a forward-mode rule of its own; made by :func:`.custom_jvp`."""

    __slots__ = ()

    @spelled
    def defjvp(self, jvp: F) -> F:
        """State the rule: ``jvp(primals, tangents) -> (output, output_tangent)``.

        See :meth:`~.CustomVJP.def_jvp`, which this is under its name in JAX.
        """
        return self.def_jvp(jvp)

    def defjvps(self, *jvps: Callable[..., Any] | None) -> None:
        """State the rule argument by argument.

        Args:
            jvps: One function per parameter: ``jvp(tangent, output, *primals)`` returns
                what the tangent of this argument adds to that of the output; None for
                an argument that adds nothing.

        Raises:
            DefinitionError: There are more or fewer functions than parameters.
        """
        rule, parameters = self.rule, self.rule.parameters
        if parameters.nondiff:
            raise DefinitionError(
                f"{rule.name}: defjvps cannot state a rule with nondiff arguments",
                rule=rule.where,
                fix="State the whole rule with defjvp; None stands for an argument "
                "that adds nothing, so that nondiff is not needed for it.",
            )

        def refuse(count: int) -> None:
            if count != len(jvps):
                raise DefinitionError(
                    f"{rule.name}: defjvps got {len(jvps)} functions for {count} "
                    "arguments",
                    rule=rule.where,
                    fix="Give one function per argument, None where it adds nothing.",
                )

        if parameters.var_positional is None:
            refuse(len(parameters.signature.parameters))

        def jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
            refuse(len(primals))
            out = parameters.call(parameters.function, primals)
            parts = [
                part(tangent, out, *primals)
                for part, tangent in zip(jvps, tangents, strict=True)
                if part is not None and tangent is not None
            ]
            return out, functools.reduce(trees.added, parts) if parts else None

        self._state(jvp=functools.update_wrapper(jvp, rule.fun))


@overload
def custom_jvp(fun: Callable[P, R], /) -> CustomJVP[P, R]: ...
@overload
def custom_jvp(
    *,
    nondiff_argnums: int | Sequence[int] = ...,
    nondiff_argnames: str | Sequence[str] = ...,
    contract: Contract = ...,
    probe: Callable[[], Any] | None = ...,
) -> Callable[[Callable[P, R]], CustomJVP[P, R]]: ...
def custom_jvp(
    fun: Any = None,
    /,
    *,
    nondiff_argnums: int | Sequence[int] = (),
    nondiff_argnames: str | Sequence[str] = (),
    contract: Contract = Exact(),  # noqa: B008 (immutable)
    probe: Callable[[], Any] | None = None,
) -> Any:
    """Give a function a forward-mode rule of its own; reverse mode is its transpose.

    Args:
        fun: The function.
        nondiff_argnums: Positions of arguments that the rule gets in front of primals
            and tangents, as in JAX.
        nondiff_argnames: The same, by name.
        contract: What the rule claims to be, see :func:`custom_vjp`.
        probe: Returns the arguments to check the rule on.

    Returns:
        The function, with the methods of :class:`.CustomJVP`; or a decorator.

    Raises:
        DefinitionError: An option has a value that it does not know.

    Example:
        >>> @gt.custom_jvp
        ... def double_sine(x):
        ...     return 2 * torch.sin(x)
        >>> @double_sine.defjvp
        ... def _(primals, tangents):
        ...     (x,), (t,) = primals, tangents
        ...     return 2 * torch.sin(x), 2 * torch.cos(x) * t
        >>> torch.func.grad(double_sine)(torch.tensor(0.0))
        tensor(2.)
    """
    refuse_options(contract=contract, probe=probe)

    def state(fun: Callable[..., Any]) -> CustomJVP[..., Any]:
        parameters = Parameters(fun, nondiff_argnums, nondiff_argnames)
        return CustomJVP(
            Rule(
                name=name_of(fun),
                fun=fun,
                parameters=parameters,
                contract=contract,
                probe=probe,
                definition="@{name}.defjvp, or {name}.defjvps(...)",
            )
        )

    return state if fun is None else state(fun)
