"""Solvers of linear systems that are known by their products: ``solve(A, b) -> x``.

Each takes a function of trees like b, and returns a tree like b. None of them is meant
to be differentiated: :func:`linear_solve` gives the solution its derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from gradtools import trees
from gradtools.errors import DefinitionError
from gradtools.second_order.cg import cg, is_over, refuse_unsolved
from gradtools.second_order.primals import Primals
from gradtools.second_order.reverse import Pullback

__all__ = ["SOLVERS", "Solve", "dense", "gmres", "named_solver", "normal_cg"]

Product: TypeAlias = Callable[[Any], Any]
Solve: TypeAlias = Callable[[Product, Any], Any]


def named_solver(solve: str | Solve, who: str) -> Solve:
    """Return a solver by its name, or the one that is given."""
    if callable(solve):
        return solve
    if solve in SOLVERS:
        return SOLVERS[solve]
    raise DefinitionError(
        f"{who}: there is no solver {solve!r}",
        fix=f"Use one of {', '.join(map(repr, SOLVERS))}, or a function solve(A, b).",
    )


def plain_cg(A: Product, b: Any, **options: Any) -> Any:
    """Solve with a symmetric positive definite matrix; see :func:`cg`."""
    asked: dict[str, Any] = {"rtol": _precision(b), **options}
    x, info = cg(A, b, **asked)
    right = [leaf.reshape(-1) for leaf in Primals((b,), 0, "solve").leaves]
    norm, far = torch.linalg.vector_norm(torch.cat(right)), info.residual_norm
    refuse_unsolved("cg", far, norm, asked["rtol"], info.negative_curvature)
    return trees.map_tensors(lambda leaf: _marked(leaf, far), x)


def normal_cg(A: Product, b: Any, **options: Any) -> Any:
    """Solve with any matrix of full rank, by cg on ``A.T A x = A.T b``.

    The condition number is squared.
    """
    transpose = transposed_product(A, b)
    return plain_cg(lambda v: transpose(A(v)), transpose(b), **options)


def dense(A: Product, b: Any) -> Any:
    """Solve with any invertible matrix, by making it: n products, n squared numbers."""
    flat = _Flat(A, b)
    identity = torch.eye(len(flat.b), dtype=flat.b.dtype, device=flat.b.device)
    columns = torch.func.vmap(flat.product)(identity)
    return flat.tree(torch.linalg.solve(_long(columns).mT, _long(flat.b)))


def gmres(
    A: Product,
    b: Any,
    *,
    rtol: float | None = None,
    restart: int = 30,
    maxiter: int = 20,
) -> Any:
    """Solve with any invertible matrix, from products with it alone.

    The generalized minimal residual method (Y. Saad and M. Schultz, 1986), restarted.

    Args:
        A: The product.
        b: The right-hand side.
        rtol: The residual norm to reach, relative to that of b; None: what the dtype
            allows.
        restart: How many vectors to keep.
        maxiter: How many restarts at most.
    """
    flat = _Flat(A, b)
    x, residual = torch.zeros_like(flat.b), flat.b
    norm = far = torch.linalg.vector_norm(flat.b)
    rtol = _precision(b) if rtol is None else rtol
    # As many as can be needed without rounding: in a trace they are all there.
    for _ in range(min(maxiter, 2 * -(-len(flat.b) // restart))):
        if is_over(far > rtol * norm):
            break
        x = x + _minimal(flat.product, residual, min(restart, len(flat.b)))
        residual = flat.b - flat.product(x)
        far = torch.linalg.vector_norm(residual)
    refuse_unsolved("gmres", far, norm, rtol)
    return flat.tree(_marked(x, far))


def transposed_product(A: Product, like: Any) -> Product:
    """Return the product with the transpose of a matrix, from that with it."""
    place = Primals((like,), 0, "transpose")
    zeros = [torch.zeros_like(leaf) for leaf in place.leaves]
    flat = place.flat(A)

    def multiply(vector: Any) -> Any:
        given = place.tangents(vector, "the vector")
        return place.tree(Pullback(flat, zeros)(given, is_last=True))

    return multiply


class _Flat:
    """A system laid flat: one vector in, one vector out."""

    def __init__(self, A: Product, b: Any) -> None:
        self.place = Primals((b,), 0, "solve")
        self.A = A
        self.b = self.vector(b)

    def vector(self, tree: Any) -> torch.Tensor:
        """Lay a tree flat."""
        parts = self.place.tangents(tree, "the product A(x)")
        return torch.cat([part.reshape(-1) for part in parts])

    def tree(self, vector: torch.Tensor) -> Any:
        """Undo it."""
        leaves = self.place.leaves
        parts = vector.split([leaf.numel() for leaf in leaves])
        return self.place.tree(
            [
                part.reshape(leaf.shape).to(leaf.dtype)
                for part, leaf in zip(parts, leaves, strict=True)
            ]
        )

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        return self.vector(self.A(self.tree(vector)))


def _minimal(
    product: Callable[[torch.Tensor], torch.Tensor], residual: torch.Tensor, size: int
) -> torch.Tensor:
    """Return the vector of the Krylov space that leaves the least residual."""
    norm = torch.linalg.vector_norm(residual)
    basis = [residual / _nonzero(norm)]
    columns = []
    for _ in range(size):
        vector = product(basis[-1])
        stack = torch.stack(basis)
        weights = stack.conj() @ vector
        vector = vector - weights @ stack
        again = stack.conj() @ vector  # once more: rounding spoils the first time
        vector = vector - again @ stack
        length = torch.linalg.vector_norm(vector)
        basis.append(vector / _nonzero(length))
        rest = torch.zeros(size - len(stack), dtype=vector.dtype, device=vector.device)
        columns.append(
            torch.cat([weights + again, length[None].to(vector.dtype), rest])
        )
    hessenberg = _long(torch.stack(columns, 1))
    # The pseudoinverse, for the space may be complete before it has its full size.
    coefficients = torch.linalg.pinv(hessenberg)[:, 0].to(residual.dtype) * norm
    return coefficients @ torch.stack(basis[:-1])


def _marked(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Make a solution NaN where its residual is not finite, and was not solved for."""
    return x + (0 * residual).to(x.dtype)


def _nonzero(norm: torch.Tensor) -> torch.Tensor:
    return torch.where(norm > 0, norm, torch.ones_like(norm))


def _long(matrix: torch.Tensor) -> torch.Tensor:
    """Return what LAPACK has: it knows no short numbers."""
    return matrix.float() if matrix.dtype.itemsize < 4 else matrix


def _precision(b: Any) -> float:
    """Return the relative residual that a solver of systems in a dtype should reach."""
    dtypes = [leaf.dtype for leaf in Primals((b,), 0, "solve").leaves]
    return 10 * max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.75


SOLVERS: dict[str, Solve] = {
    "cg": plain_cg,
    "normal-cg": normal_cg,
    "gmres": gmres,
    "dense": dense,
}
