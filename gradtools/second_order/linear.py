"""The solution of a linear system, whose derivative does not go through a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradtools import trees
from gradtools.errors import DefinitionError
from gradtools.lowering.contents import Converted
from gradtools.rules.convert import closure_convert
from gradtools.rules.custom_vjp import custom_vjp
from gradtools.rules.signature import is_differentiable
from gradtools.second_order.cg import as_product, refuse_sides
from gradtools.second_order.directional import jvp, vjp
from gradtools.second_order.operators import CurvatureOperator
from gradtools.second_order.solvers import Solve, named_solver

__all__ = ["System", "linear_solve", "solved"]


def linear_solve(
    A: Any,
    b: Any,
    *,
    solve: str | Solve | None = None,
    transpose_solve: str | Solve | None = None,
    symmetric: bool = False,
) -> Any:
    """Solve ``A x = b``, differentiably in b and in whatever A is made of.

    The derivative is another solve, with the same matrix or its transpose, at any order
    and in forward mode too; it never goes through the solver's loop
    (``jax.lax.custom_linear_solve``).

    Args:
        A: A function of trees like b, linear, whose captured tensors count as
            arguments; or a matrix ``(n, n)``.
        b: The right-hand side: a pytree of floating tensors; ``(n,)`` for a matrix.
        solve: ``"cg"``, ``"normal-cg"``, ``"gmres"``, ``"dense"``, or a function
            ``solve(A, b)``. None: dense for a matrix, else cg for a symmetric A and
            gmres for any other.
        transpose_solve: The same for the transpose of A; None: as ``solve``.
        symmetric: Whether A is its own transpose.

    Returns:
        x, in the structure of b.

    Raises:
        DefinitionError: A is no matrix and no function, the solver is not known, or a
            matrix and b make no system.
        TransformError: cg or gmres finds no solution.

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [1.0, 4.0]])
        >>> gt.grad(lambda b: gt.linear_solve(A, b).sum())(torch.tensor([2.0, 5.0]))
        tensor([0.3750, 0.2500])
    """
    if isinstance(A, CurvatureOperator):
        raise DefinitionError(
            "linear_solve: an operator of hvp_fn keeps its graph, and has no "
            "derivative in what it was made of",
            fix="Give the function: lambda v: gt.hvp(f, (x,), (v,))[0].",
        )
    if isinstance(A, torch.Tensor):
        product, operands = Converted(_times), (A,)
    else:
        product, operands = closure_convert(as_product(A), b)
    default = "dense" if product.function is _times else "cg" if symmetric else "gmres"
    solver = named_solver(solve or default, "linear_solve")
    other = named_solver(transpose_solve or solver, "linear_solve")
    if isinstance(A, torch.Tensor):
        refuse_sides(A, b, "linear_solve")
    return solved(System(product, solver, other, is_symmetric=symmetric), operands, b)


class System:
    """A linear system apart from the tensors that it is made of.

    Args:
        product: ``product(x, *operands)``, linear in x.
        solve: Solves with it.
        transpose_solve: Solves with its transpose.
        is_symmetric: Whether the two are the same.
    """

    __slots__ = ("is_symmetric", "product", "solve", "transpose_solve")

    def __init__(
        self,
        product: Callable[..., Any],
        solve: Solve,
        transpose_solve: Solve,
        *,
        is_symmetric: bool = False,
    ) -> None:
        self.product = Converted(product)
        self.solve, self.transpose_solve = Converted(solve), Converted(transpose_solve)
        self.is_symmetric = is_symmetric

    def at(self, operands: Sequence[Any]) -> Callable[[Any], Any]:
        """Return the product as a function of x alone."""
        return lambda x: self.product(x, *operands)

    def transposed(self) -> System:
        """Return the system with the transposed matrix."""
        if self.is_symmetric:
            return self

        def product(x: Any, *operands: Any) -> Any:
            zeros = trees.map_tensors(torch.zeros_like, x)
            _, pull = vjp(self.at(operands), zeros)
            (found,) = pull(x)
            return found

        return System(product, self.transpose_solve, self.solve)


@custom_vjp
def solved(system: System, operands: Sequence[Any], b: Any) -> Any:
    """Solve, with operands that are differentiable."""
    return system.solve(system.at(operands), b)


@solved.def_fwd
def _(system: System, operands: Sequence[Any], b: Any) -> Any:
    x = system.solve(system.at(operands), b)
    return x, (system, operands, x)


@solved.def_bwd
def _(residuals: Any, cotangent: Any) -> Any:
    system, operands, x = residuals
    adjoint = solved(system.transposed(), operands, cotangent)
    if not _has_tensors(operands):
        return {"b": adjoint}
    _, pull = vjp(lambda operands: system.product(x, *operands), operands)
    (found,) = pull(trees.map_tensors(torch.neg, adjoint))
    return {"operands": found, "b": adjoint}


@solved.def_jvp
def _(primals: Any, tangents: Any) -> Any:
    system, operands, b = primals
    _, moving, given = tangents
    x = solved(system, operands, b)
    if _has_tensors(operands):
        _, moved = jvp(lambda *own: system.product(x, *own), operands, moving)
        given = trees.added(given, trees.map_tensors(torch.neg, moved))
    return x, solved(system, operands, given)


def _has_tensors(operands: Any) -> bool:
    return any(map(is_differentiable, trees.flatten(operands)[0]))


def _times(x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    return (A @ x.unsqueeze(-1)).squeeze(-1)
