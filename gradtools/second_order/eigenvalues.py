"""The largest, or the smallest, eigenvalues of a Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from gradtools.errors import DefinitionError, TransformError
from gradtools.second_order.curvature import hvp_fn
from gradtools.second_order.extras import extra
from gradtools.second_order.operators import CurvatureOperator
from gradtools.second_order.primals import Argnums

__all__ = ["Eigenpairs", "eigenpairs_of", "hessian_eigs"]

Which = Literal["LA", "SA", "LM"]


class Eigenpairs(NamedTuple):
    """Eigenvalues and their vectors.

    Attributes:
        values: A tensor ``(k,)``, the one that was asked for most first.
        vectors: In the structure of the primals, with a leading dimension k; of length
            1.
    """

    values: torch.Tensor
    vectors: Any


def hessian_eigs(
    f: Callable[..., Any],
    *primals: Any,
    k: int = 1,
    which: Which = "LA",
    method: Literal["lanczos", "lobpcg"] = "lanczos",
    tol: float = 0.0,
    maxiter: int | None = None,
    generator: torch.Generator | None = None,
    argnums: Argnums = None,
) -> Eigenpairs:
    """Return some eigenvalues of the Hessian of a scalar function, from products alone.

    Args:
        f: From tensors in pytrees to a real scalar.
        *primals: Its arguments, all floating tensors of one dtype and device.
        k: How many.
        which: The largest (``"LA"``), the smallest (``"SA"``), or the largest in
            absolute value (``"LM"``; by Lanczos only).
        method: ``"lanczos"`` (scipy's ``eigsh``: ARPACK), or ``"lobpcg"``.
        tol: Relative accuracy; 0: that of the dtype.
        maxiter: The most iterations; None leaves it to scipy.
        generator: Of the vector to begin with; None: torch's default one.
        argnums: Which arguments count, as in :func:`hvp`.

    Returns:
        Eigenvalues and vectors.

    Raises:
        TransformError: They did not converge.
        DefinitionError: ``k`` is no number from 1 to n; scipy is not installed.

    Example:
        >>> values, vectors = gt.hessian_eigs(
        ...     lambda x: (x**3).sum(), torch.tensor([1.0, 3.0, 2.0])
        ... )
        >>> values, vectors.abs().round(decimals=4)
        (tensor([18.]), tensor([[0., 1., 0.]]))
    """
    with hvp_fn(f, *primals, argnums=argnums) as op:
        return eigenpairs_of(
            op,
            k,
            which=which,
            method=method,
            tol=tol,
            maxiter=maxiter,
            generator=generator,
        )


def eigenpairs_of(
    op: CurvatureOperator,
    k: int = 1,
    *,
    which: Which = "LA",
    method: Literal["lanczos", "lobpcg"] = "lanczos",
    tol: float = 0.0,
    maxiter: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """Return some eigenvalues of an operator; see :func:`hessian_eigs`."""
    size, dtype = op.shape[0], op.matrix_dtype
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= size:
        raise DefinitionError(
            f"hessian_eigs: k is {k!r}, and there are {size} eigenvalues",
            fix=f"Give a number from 1 to {size}.",
        )
    for given, known in ((which, ("LA", "SA", "LM")), (method, ("lanczos", "lobpcg"))):
        if given not in known:
            raise DefinitionError(
                f"hessian_eigs: there is no {given!r}",
                fix=f"Use one of {', '.join(map(repr, known))}.",
            )
    # Where a Krylov space, or the three blocks of lobpcg, would be the whole one.
    if size <= max(_DENSE, (3 if method == "lanczos" else 5) * k):
        values, vectors = _of_the_matrix(op, k, which)
    else:
        start = torch.randn(
            size,
            1 if method == "lanczos" else k,
            dtype=dtype,
            device="cpu" if generator is None else generator.device,
            generator=generator,
        )
        found = _lanczos if method == "lanczos" else _lobpcg
        array = start.cpu().numpy()
        found_values, found_vectors = found(op, k, which, array, tol, maxiter)
        values = torch.as_tensor(found_values, dtype=dtype, device=op.device)
        vectors = torch.as_tensor(found_vectors, dtype=dtype, device=op.device)
    order = _sorted(values, which)
    return Eigenpairs(values[order], op.unflatten(vectors[:, order].mT.contiguous()))


_DENSE = 32


def _of_the_matrix(
    op: CurvatureOperator, k: int, which: Which
) -> tuple[torch.Tensor, torch.Tensor]:
    matrix = op @ torch.eye(op.shape[0], dtype=op.dtype, device=op.device)
    _refuse_not_finite(bool(matrix.isfinite().all()))
    values, vectors = torch.linalg.eigh((matrix + matrix.mT).detach() / 2)
    chosen = _sorted(values, which)[:k]
    return values[chosen], vectors[:, chosen]


def _lanczos(
    op: CurvatureOperator,
    k: int,
    which: Which,
    start: np.ndarray[Any, Any],
    tol: float,
    maxiter: int | None,
) -> Any:
    linalg = extra("scipy.sparse.linalg", "scipy")
    operator, begin = op.to_scipy(), start[:, 0]
    moved = operator @ begin
    _refuse_not_finite(bool(np.isfinite(moved).all()))
    if not moved.any():  # of a random vector nothing is left: the matrix is zero
        return np.zeros(k), np.eye(op.shape[0], k)
    # ARPACK begins in the range of the matrix, and would not find what is mapped to
    # zero: dead parameters. Where the order of the eigenvalues allows, it is shifted.
    shift = 0.0
    if which != "LM":
        shift = float(np.linalg.norm(moved) / np.linalg.norm(begin))
    shifted = linalg.LinearOperator(
        operator.shape,
        dtype=operator.dtype,
        matvec=lambda v: operator @ v + shift * v,
    )
    try:
        values, vectors = linalg.eigsh(
            shifted, k, which=which, v0=begin, tol=tol, maxiter=maxiter
        )
        return values - shift, vectors
    except linalg.ArpackNoConvergence as error:
        raise TransformError(
            f"hessian_eigs: {len(error.eigenvalues)} of {k} eigenvalues converged",
            fix="Raise maxiter= or tol=, or ask for fewer.",
        ) from error
    except linalg.ArpackError as error:
        raise TransformError(
            f"hessian_eigs: Lanczos failed in {operator.dtype}: {error}",
            fix='Use method="lobpcg", or a longer dtype.',
        ) from error


def _lobpcg(
    op: CurvatureOperator,
    k: int,
    which: Which,
    start: np.ndarray[Any, Any],
    tol: float,
    maxiter: int | None,
) -> Any:
    if which == "LM":
        raise DefinitionError(
            'hessian_eigs: lobpcg finds the largest or the smallest, not "LM"',
            fix='Use method="lanczos".',
        )
    linalg = extra("scipy.sparse.linalg", "scipy")
    operator = op.to_scipy()
    wanted = tol or 1e-6
    values, vectors = linalg.lobpcg(
        operator, start, largest=which == "LA", tol=wanted, maxiter=maxiter or 500
    )
    residuals = np.linalg.norm(operator @ vectors - vectors * values, axis=0)
    far = ~(residuals <= 10 * max(wanted, wanted * float(np.abs(values).max())))
    if far.any():
        raise TransformError(
            f"hessian_eigs: {int((~far).sum())} of {k} eigenvalues converged",
            fix='Raise maxiter= or tol=, ask for fewer, or use method="lanczos".',
        )
    return values, vectors


def _refuse_not_finite(is_finite: bool) -> None:
    if not is_finite:
        raise TransformError(
            "hessian_eigs: products of the Hessian are not finite",
            fix="Move the primals away from where the function has no second "
            "derivative.",
        )


def _sorted(values: torch.Tensor, which: Which) -> torch.Tensor:
    key = {"LA": values, "SA": -values, "LM": values.abs()}[which]
    return key.argsort(descending=True)
