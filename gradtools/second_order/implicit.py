"""Implicit differentiation: the derivative of a solution, whatever computed it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from gradtools import trees
from gradtools.errors import TransformError
from gradtools.probing import is_checking
from gradtools.rules.custom_vjp import custom_vjp
from gradtools.rules.rule import Approximate, Contract
from gradtools.rules.signature import is_differentiable
from gradtools.second_order.directional import linearize, vjp
from gradtools.second_order.linear import System, solved
from gradtools.second_order.primals import Primals, name_of
from gradtools.second_order.solvers import Solve, named_solver
from gradtools.second_order.sound import is_within_transforms

__all__ = ["custom_fixed_point", "custom_root"]

P = ParamSpec("P")
R = TypeVar("R")


def custom_root(
    F: Callable[..., Any],
    *,
    solve: str | Solve = "gmres",
    has_aux: bool = False,
    contract: Contract | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give a solver of ``F(x, *theta) = 0`` the derivative of its solution in theta.

    By the implicit function theorem the solution moves by
    ``dx = -(dF/dx)^-1 (dF/dtheta) dtheta`` (the decorator is that of JAXopt: M. Blondel
    et al., "Efficient and modular implicit differentiation", 2022). Each derivative is
    one linear solve; nothing goes through the solver's loop, and none of its steps is
    kept. It is a rule like any other: of any order, with forward mode and vmap, and
    checked on its first call.

    Args:
        F: ``F(x, *theta)``, in the structure of x, zero at the solution; for a minimum
            the gradient of the objective.
        solve: How systems with ``dF/dx`` and its transpose are solved: ``"cg"`` (for a
            symmetric positive definite one, as at a minimum), ``"normal-cg"``,
            ``"gmres"``, ``"dense"``, or a function ``solve(A, b)``.
        has_aux: Whether the solver returns a pair ``(x, aux)``; aux has no derivative.
        contract: What the first call's check holds the rule to; None: the derivative up
            to 1%, for a solver is exact up to its own tolerance only.

    Returns:
        The decorator of a solver ``solver(init, *theta)``, whose first argument gets no
        gradient: the solution does not depend on where the search begins.

    Example:
        >>> @gt.custom_root(lambda x, a: x**2 - a)
        ... def square_root(init, a):
        ...     for _ in range(30):
        ...         init = (init + a / init) / 2
        ...     return init
        >>> gt.grad(square_root, 1)(torch.tensor(1.0), torch.tensor(4.0))
        tensor(0.2500)
    """
    solver = named_solver(solve, "custom_root")
    root = _Root(F, solver, is_symmetric=solve == "cg", has_aux=has_aux)
    return functools.partial(root.decorate, contract=contract or Approximate())


def custom_fixed_point(
    T: Callable[..., Any],
    *,
    solve: str | Solve = "gmres",
    has_aux: bool = False,
    contract: Contract | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give a solver of ``T(x, *theta) = x`` the derivative of its solution in theta.

    That is :func:`custom_root` of ``T(x, *theta) - x``.

    Args:
        T: ``T(x, *theta)``, in the structure of x.
        solve: As for :func:`custom_root`.
        has_aux: Whether the solver returns a pair ``(x, aux)``.
        contract: As for :func:`custom_root`.

    Returns:
        The decorator of a solver ``solver(init, *theta)``.

    Example:
        >>> @gt.custom_fixed_point(lambda x, a: torch.cos(a * x))
        ... def iterated(init, a):
        ...     for _ in range(200):
        ...         init = torch.cos(a * init)
        ...     return init
        >>> gt.grad(iterated, 1)(torch.tensor(0.5), torch.tensor(1.0))
        tensor(-0.2975)
    """

    @functools.wraps(T)
    def difference(x: Any, *theta: Any) -> Any:
        place = Primals((x,), 0, "custom_fixed_point")
        moved = place.tangents(T(x, *theta), "the values of T")
        return place.tree([a - b for a, b in zip(moved, place.leaves, strict=True)])

    solver = named_solver(solve, "custom_fixed_point")
    root = _Root(difference, solver, is_symmetric=solve == "cg", has_aux=has_aux)
    return functools.partial(root.decorate, contract=contract or Approximate())


_NEAR = 1e-2
"""Of its size, how far a solution may be off where its derivative is checked."""


class _Root:
    """An equation, and how its linearization is solved."""

    def __init__(
        self, F: Callable[..., Any], solve: Solve, *, is_symmetric: bool, has_aux: bool
    ) -> None:
        self.F, self.solve, self.has_aux = F, solve, has_aux
        self.is_symmetric = is_symmetric

    def decorate(self, solver: Callable[P, R], *, contract: Contract) -> Callable[P, R]:
        """Make a rule of a solver."""
        has_aux, F = self.has_aux, self.F
        run: Any = solver
        system = System(
            self._transposed, self.solve, self.solve, is_symmetric=self.is_symmetric
        )

        @functools.wraps(solver)
        def fun(init: Any, *theta: Any) -> Any:
            out = run(trees.map_tensors(torch.Tensor.detach, init), *theta)
            if is_checking() and not is_within_transforms():
                self._refuse_unsolved(out[0] if has_aux else out, theta, fun.__name__)
            return out

        def fwd(init: Any, *theta: Any) -> Any:
            out = fun(init, *theta)
            return out, (out[0] if has_aux else out, theta)

        def bwd(residuals: Any, cotangent: Any) -> Any:
            x, theta = residuals
            given = cotangent[0] if has_aux else cotangent
            adjoint = solved(system, (x, theta), trees.map_tensors(torch.neg, given))
            if not any(map(is_differentiable, trees.flatten(theta)[0])):
                return (None,) * (1 + len(theta))
            _, pull = vjp(lambda *theta: F(x, *theta), *theta)
            return (None, *pull(adjoint))

        fun.__name__ = name_of(solver)
        del fun.__wrapped__  # its parameters: a default is no part of the equation
        rule: Any = custom_vjp(fun, contract=contract)
        rule.defvjp(fwd, bwd)
        return rule

    def _refuse_unsolved(self, x: Any, theta: Any, name: str) -> None:
        """Raise where what the solver returned is no root, by the next Newton step.

        There the derivative of what it computed is another one.
        """
        x, theta = trees.map_tensors(torch.Tensor.detach, (x, theta))
        values = Primals((x,), 0, name).leaves
        flat = Primals((self.F(x, *theta),), 0, name)
        _, push = linearize(lambda x: self.F(x, *theta), x)
        steps = Primals((self.solve(push, flat.tree(flat.leaves)),), 0, name).leaves
        far = sum(float(step.abs().square().sum()) for step in steps)
        size = sum(float(value.abs().square().sum()) for value in values)
        if not far <= _NEAR**2 * max(size, 1.0):
            raise TransformError(
                f"{name}: what the solver returned is no solution: the next Newton "
                f"step is {far**0.5:.1e} long, and the solution {size**0.5:.1e}",
                fix="Let it iterate further, or correct the equation.",
            )

    def _transposed(self, cotangent: Any, x: Any, theta: Any) -> Any:
        """Multiply with the transpose of ``dF/dx``."""
        _, pull = vjp(lambda x: self.F(x, *theta), x)
        (found,) = pull(cotangent)
        return found
