"""custom_vjp: a function and its derivative, stated as pure functions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    ParamSpec,
    TypeVar,
    overload,
)

import torch

from gradtools.errors import DefinitionError
from gradtools.gradcheck.policy import chosen, current_policy
from gradtools.lowering.boundary import call, is_tracing, register
from gradtools.lowering.dispatch import Lowered
from gradtools.lowering.express import ASTRAY
from gradtools.lowering.flat import Plan
from gradtools.lowering.traced import Written
from gradtools.rules.display import HEADINGS, headline, rows
from gradtools.rules.methods import BoundRule, Method
from gradtools.rules.options import name_of, refuse_options
from gradtools.rules.rule import Contract, Exact, Rule, VmapMode
from gradtools.rules.signature import Parameters
from gradtools.spelling import spelled
from gradtools.tables import as_html, as_text

if TYPE_CHECKING:
    from gradtools.gradcheck.check import Checker
    from gradtools.gradcheck.report import Report

__all__ = ["CustomVJP", "StatedRule", "custom_vjp"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")
F = TypeVar("F", bound=Callable[..., Any])


class StatedRule(Generic[P, R]):
    """A callable that carries a rule: what custom_vjp and custom_jvp have in common."""

    # Apart from the __dict__, which functools.wraps copies: Dynamo would guard on it.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_checker",
        "_lowered",
        "closed",
        "key",
        "names",
        "reads",
        "rule",
        "written",
    )

    __qualname__: str

    def __init__(self, rule: Rule) -> None:
        functools.update_wrapper(self, rule.fun)
        self.__name__ = rule.name
        self.rule = rule
        self.key = register(self)
        self.reads: Sequence[Any] = ()  # for torch.compile; see lowering.boundary
        self.names: Sequence[str] = ()
        self.closed: set[str] = set()
        self.written = Written()
        self._checker: Checker | None = None
        self._lowered: Lowered | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function."""
        if is_tracing():
            return call(self, args, kwargs)
        lowered = self._lowered or self._lower()
        if not kwargs:
            out = lowered.express(args)
            if out is not ASTRAY:
                return out
        return lowered.call(args, kwargs)

    def run_entries(self, entries: Sequence[Any]) -> Any:
        """Call the function with arguments that are bound already, in eager mode."""
        return (self._lowered or self._lower()).run_entries(tuple(entries))

    def plan_for_check(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Plan, Sequence[Any]]:
        """Return a plan in which every differentiable argument counts; its leaves."""
        lowered = self._lowered or self._lower()
        bound = self.rule.parameters.bind(tuple(args), dict(kwargs))
        return lowered.plan_for_check(bound)

    def before_trace(
        self,
        entries: tuple[Any, ...] | None,
        wants: Callable[[Any], bool] | None,
        order: int,
    ) -> None:
        """Check the rule where torch.compile traces it before any call has.

        Args:
            entries: The arguments, with tensors that have no values; None where that
                cannot be told.
            wants: Whether the gradient of a value among them is wanted; None: that of
                all that can have one.
            order: How many derivatives are under way.
        """
        lowered = self._lowered or self._lower()
        if entries is None:
            self.checker.before_blind_trace(self.rule, current_policy())
        else:
            plan, leaves = lowered.plan_for_trace(entries, wants)
            self.checker.before_trace(plan, leaves, order)

    @property
    def checker(self) -> Checker:
        """What decides when the rule is checked, and keeps what was found."""
        if self._checker is None:
            # Two thirds of gradtools: whoever imports it may never call a rule.
            from gradtools.gradcheck.check import Checker

            self._checker = Checker()
        return self._checker

    def write_for_trace(
        self,
        entries: tuple[Any, ...],
        wants: Callable[[Any], bool],
        binding: Sequence[str],
        otherwise: Callable[[], None],
    ) -> str:
        """Write code for torch.compile to follow; see :class:`.Written`."""
        from gradtools.gradcheck.surroundings import in_fresh_thread

        lowered = self._lowered or self._lower()
        plan, leaves = lowered.plan_for_trace(entries, wants)
        try:
            return in_fresh_thread(
                lambda: self.written.add(plan, leaves, entries, binding, otherwise)
            )
        except Exception:  # fwd needs values, or is wrong: the general way will tell
            return ""

    def _lower(self) -> Lowered:
        self._lowered = Lowered(self.rule, self.checker, current_policy, chosen.get)
        return self._lowered

    def _state(self, **parts: Any) -> None:
        """Replace parts of the rule; forget what was derived from the old ones."""
        for role, function in parts.items():
            if role != "is_method" and not callable(function):
                raise DefinitionError(
                    f"{self.rule.name}: {role} must be a function, not {function!r}",
                    rule=self.rule.where,
                    fix="Hand over the function itself: "
                    f"@{self.rule.name}.def_{role.removesuffix('_rule')}.",
                )
        self.rule = dataclasses.replace(self.rule, **parts)
        self._checker = None
        self._lowered = None
        self.written = Written()

    @spelled
    def def_jvp(self, jvp: F) -> F:
        """State forward mode: ``jvp(primals, tangents) -> (output, output_tangent)``.

        Both arguments are tuples with one entry per parameter. A tangent is zeros where
        the argument does not move, and ``None`` where it can have none.

        Args:
            jvp: The rule; it must be linear in the tangents.

        Returns:
            The function that was given.
        """
        self._state(jvp=jvp)
        return jvp

    @spelled
    def def_vmap(self, vmap_rule: F) -> F:
        """State what ``torch.func.vmap`` calls where no gradient is wanted.

        Args:
            vmap_rule: ``vmap_rule(info, in_dims, *args) -> (output, out_dims)``;
                ``info`` has ``batch_size`` and ``randomness``, ``in_dims`` mirrors the
                arguments with an int or ``None`` per leaf, ``out_dims`` the output.

        Returns:
            The function that was given.
        """
        self._state(vmap_rule=vmap_rule)
        return vmap_rule

    def gradcheck(self, *args: P.args, **kwargs: P.kwargs) -> Report:
        """Check the rule on these arguments now, whatever the policy.

        Without any, it is checked on those that its ``probe=`` returns.

        Returns:
            What was checked, with figures; it prints as a table.

        Raises:
            GradientMismatchError: The rule is not what its contract claims.
        """
        given: Any = args
        if not args and not kwargs and self.rule.probe is not None:
            given = self.rule.probe()
            given = given if isinstance(given, tuple) else (given,)
        return self.checker.check_in_full(*self.plan_for_check(given, kwargs))

    @property
    def reports(self) -> tuple[Report, ...]:
        """What has been checked so far, one report per signature."""
        return () if self._checker is None else tuple(self._checker.reports.values())

    # As a method.

    def __set_name__(self, owner: type, name: str) -> None:
        self._state(is_method=True)
        setattr(owner, name, Method(self))

    if TYPE_CHECKING:  # at run time Method has it

        @overload
        def __get__(
            self, instance: None, owner: type | None = None
        ) -> StatedRule[P, R]: ...
        @overload
        def __get__(
            self: StatedRule[Concatenate[S, Q], R],
            instance: S,
            owner: type | None = None,
        ) -> BoundRule[Q, R]: ...
        def __get__(self, instance: Any, owner: type | None = None) -> Any: ...

    # A rule is like a function: one object, found by its name.

    def __copy__(self) -> StatedRule[P, R]:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> StatedRule[P, R]:
        return self

    def __reduce__(self) -> str:
        return self.__qualname__

    @property
    def headline(self) -> str:
        """The rule in one line: its name, its place, what is stated."""
        return headline(type(self).__name__, self.__module__, self.rule)

    def __repr__(self) -> str:
        return as_text(self.headline, list(rows(self.rule, self.reports)))

    def _repr_html_(self) -> str:
        return as_html(self.headline, list(rows(self.rule, self.reports)), HEADINGS)


class CustomVJP(StatedRule[P, R]):
    """A function with a backward of its own; made by :func:`.custom_vjp`."""

    __slots__ = ()

    @spelled
    def def_fwd(self, fwd: F) -> F:
        """State the forward: ``fwd(*args) -> (output, residuals)``.

        Args:
            fwd: Takes the function's arguments and, if it asks for it, the keyword-only
                ``needs``, a tuple like the arguments with a bool per leaf. Residuals
                may be any pytree of any objects.

        Returns:
            The function that was given.
        """
        self._state(fwd=fwd)
        return fwd

    @spelled
    def def_bwd(self, bwd: F) -> F:
        """State the backward: ``bwd(residuals, cotangent) -> cotangents``.

        Args:
            bwd: Gets what fwd returned as residuals (``((arg, ...), output)`` without a
                fwd) and a cotangent with the structure of the output, None for
                integers. It returns a tuple with one entry per parameter, a dict by
                parameter name, or one bare tensor where only one argument is
                differentiable; ``None`` anywhere means zero. It may ask for the
                keyword-only ``needs``.

        Returns:
            The function that was given.
        """
        self._state(bwd=bwd)
        return bwd

    @spelled
    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        """State forward and backward at once, as ``jax.custom_vjp`` does."""
        self._state(fwd=fwd, bwd=bwd)


class _Missing:
    """Stands for the function while the decorator is only being given options."""


@overload
def custom_vjp(fun: Callable[P, R], /) -> CustomVJP[P, R]: ...
@overload
def custom_vjp(
    *,
    nondiff_argnums: int | Sequence[int] = ...,
    nondiff_argnames: str | Sequence[str] = ...,
    contract: Contract = ...,
    vmap: VmapMode = ...,
    once_differentiable: bool = ...,
    materialize_grads: bool = ...,
    autocast: torch.dtype | None = ...,
    probe: Callable[[], Any] | None = ...,
) -> Callable[[Callable[P, R]], CustomVJP[P, R]]: ...
@overload
def custom_vjp(
    fun: Callable[P, R],
    /,
    *,
    nondiff_argnums: int | Sequence[int] = ...,
    nondiff_argnames: str | Sequence[str] = ...,
    contract: Contract = ...,
    vmap: VmapMode = ...,
    once_differentiable: bool = ...,
    materialize_grads: bool = ...,
    autocast: torch.dtype | None = ...,
    probe: Callable[[], Any] | None = ...,
) -> CustomVJP[P, R]: ...
def custom_vjp(
    fun: Any = _Missing,
    /,
    *,
    nondiff_argnums: int | Sequence[int] = (),
    nondiff_argnames: str | Sequence[str] = (),
    contract: Contract = Exact(),  # noqa: B008 (immutable)
    vmap: VmapMode = "auto",
    once_differentiable: bool = False,
    materialize_grads: bool = True,
    autocast: torch.dtype | None = None,
    probe: Callable[[], Any] | None = None,
) -> Any:
    """Give a function a derivative of its own.

    The function is stated as usual, its forward and backward as two pure functions with
    :meth:`~.CustomVJP.def_fwd` and :meth:`~.CustomVJP.def_bwd`. From then on it works
    under ``backward``, every ``torch.func`` transform in any nesting, forward mode,
    derivatives of any order and ``torch.compile``. On its first call with a signature
    it is checked against the function, see :class:`gradcheck_policy`.

    For complex tensors cotangents follow torch's convention: the gradient of a real
    loss L is the conjugate derivative, so that a step along its negative descends; bwd
    of a holomorphic f returns ``cotangent * f'(z).conj()``.

    Args:
        fun: The function; its parameters may be pytrees of tensors and any other
            objects. Floating and complex tensors are differentiable, everything else
            takes part without a gradient.
        nondiff_argnums: Positions of arguments that bwd gets in front of the residuals
            and returns nothing for, as in JAX. Nothing needs this to be an integer.
        nondiff_argnames: The same, by name.
        contract: What the rule claims to be: :class:`Exact`, :class:`Surrogate` or
            :class:`Approximate`.
        vmap: How fwd and bwd are vectorized: ``"auto"`` by torch; ``"sequential"`` one
            element at a time; ``"expand_dims"`` with a leading batch dimension, of size
            1 where an argument is not batched; ``"broadcast_all"`` with a leading batch
            dimension everywhere.
        once_differentiable: Second derivatives are an error, and nothing is kept for
            them.
        materialize_grads: Give bwd zeros for the cotangent of an unused output; else
            None.
        autocast: Under autocast, cast floating arguments to this dtype and run without
            it.
        probe: Returns the arguments to check the rule on, in place of those of a call.

    Returns:
        The function, with the methods of :class:`.CustomVJP`; or, without a function, a
        decorator.

    Raises:
        DefinitionError: An option means nothing.

    Example:
        >>> @gt.custom_vjp
        ... def cube(x):
        ...     return x**3
        >>> @cube.def_fwd
        ... def _(x):
        ...     return x**3, (x,)
        >>> @cube.def_bwd
        ... def _(residuals, g):
        ...     (x,) = residuals
        ...     return g * 3 * x**2
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> torch.autograd.grad(cube(x), x)
        (tensor(12.),)
    """
    refuse_options(
        vmap=vmap,
        contract=contract,
        once_differentiable=once_differentiable,
        materialize_grads=materialize_grads,
        autocast=autocast,
        probe=probe,
    )

    def state(fun: Callable[..., Any]) -> CustomVJP[..., Any]:
        return CustomVJP(
            Rule(
                name=name_of(fun),
                fun=fun,
                parameters=Parameters(fun, nondiff_argnums, nondiff_argnames),
                contract=contract,
                vmap=vmap,
                once_differentiable=once_differentiable,
                materialize_grads=materialize_grads,
                autocast=autocast,
                probe=probe,
            )
        )

    return state if fun is _Missing else state(fun)
