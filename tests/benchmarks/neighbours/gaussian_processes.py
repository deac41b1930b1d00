"""linear_operator and gpytorch: solvers, quadrature, covariances, natural gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import linear_operator
import torch
from gpytorch.functions._log_normal_cdf import LogNormalCDF
from gpytorch.functions.matern_covariance import MaternCovariance
from gpytorch.functions.rbf_covariance import RBFCovariance
from gpytorch.variational import (
    ciq_variational_strategy,
    large_batch_variational_strategy,
    natural_variational_distribution,
    tril_natural_variational_distribution,
    variational_strategy,
)
from linear_operator import settings
from linear_operator.functions import (
    _diagonalization,
    _dsmm,
    _inv_quad,
    _inv_quad_logdet,
    _matmul,
    _pivoted_cholesky,
    _root_decomposition,
    _solve,
    _sqrt_inv_matmul,
)

import gradtools as gt
from tests.benchmarks.neighbours import Case, harvest

SIZE = 6


def _random(*shape: int, needy: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    return tensor.requires_grad_(needy)


def _definite(needy: bool = True) -> torch.Tensor:
    """A symmetric positive definite matrix with eigenvalues well apart."""
    q = torch.linalg.qr(_random(SIZE, SIZE, needy=False))[0]
    values = torch.linspace(1.0, 4.0, SIZE, dtype=torch.float64)
    return ((q * values) @ q.mT).requires_grad_(needy)


def _operator() -> Any:
    return linear_operator.to_linear_operator(_definite())


def _of_operator(function: Any, use: Callable[[Any], Any]) -> Case:
    def run() -> None:
        with (
            settings.max_cholesky_size(1),
            settings.fast_computations(True, True, True),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            use(_operator())

    torch.manual_seed(0)
    return Case(function, harvest(function, run))


def _squared_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ((a.unsqueeze(-2) - b.unsqueeze(-3)) ** 2).sum(-1)


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _squared_distance(a, b).sqrt()


def _points() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = _random(4, 2, needy=False)
    lengthscale = torch.full((1, 1), 0.7, dtype=torch.float64, requires_grad=True)
    return x, x.flip(0) + 0.3, lengthscale


def _natural(natural: Any) -> Case:
    return Case(
        natural,
        (_random(SIZE), (-0.5 * _definite(False)).requires_grad_()),
        {"contract": gt.Surrogate()},  # a natural gradient is none
    )


def _triangle(needy: bool = True) -> torch.Tensor:
    return torch.linalg.cholesky(_definite(False)).requires_grad_(needy)


CASES: dict[str, Callable[[], Case]] = {
    "linear_operator Matmul": lambda: _of_operator(
        _matmul.Matmul, lambda a: a @ _random(SIZE, 2)
    ),
    "linear_operator Solve": lambda: _of_operator(
        _solve.Solve, lambda a: a.solve(_random(SIZE, 2))
    ),
    "linear_operator InvQuad": lambda: _of_operator(
        _inv_quad.InvQuad, lambda a: a.inv_quad(_random(SIZE, 2))
    ),
    "linear_operator InvQuadLogdet": lambda: _of_operator(
        _inv_quad_logdet.InvQuadLogdet,
        lambda a: a.inv_quad_logdet(_random(SIZE, 2), logdet=True),
    ),
    "linear_operator SqrtInvMatmul": lambda: _of_operator(
        _sqrt_inv_matmul.SqrtInvMatmul,
        lambda a: a.sqrt_inv_matmul(_random(SIZE, 2), _random(3, SIZE)),
    ),
    "linear_operator DSMM": lambda: Case(
        _dsmm.DSMM,
        (torch.eye(SIZE, dtype=torch.float64).to_sparse(), _random(SIZE, 2)),
    ),
    "linear_operator PivotedCholesky": lambda: _of_operator(
        _pivoted_cholesky.PivotedCholesky, lambda a: a.pivoted_cholesky(3)
    ),
    "linear_operator Diagonalization": lambda: _of_operator(
        _diagonalization.Diagonalization, lambda a: a.diagonalization("lanczos")
    ),
    "linear_operator RootDecomposition": lambda: _of_operator(
        _root_decomposition.RootDecomposition,
        lambda a: a.root_decomposition(method="lanczos"),
    ),
    "gpytorch RBFCovariance": lambda: Case(
        RBFCovariance, (*_points(), _squared_distance), {"nondiff_argnums": (0, 1)}
    ),
    "gpytorch MaternCovariance": lambda: Case(
        MaternCovariance, (*_points(), 1.5, _distance), {"nondiff_argnums": (0, 1)}
    ),
    "gpytorch LogNormalCDF": lambda: Case(LogNormalCDF, (_random(5),)),
    "gpytorch QuadFormDiagonal": lambda: Case(
        large_batch_variational_strategy.QuadFormDiagonal,
        (_definite(False), _random(SIZE, 3)),  # the matrix is taken for symmetric
        {"nondiff_argnums": 0},
    ),
    "gpytorch ComputePredictiveUpdates": lambda: Case(
        variational_strategy.ComputePredictiveUpdates,
        (_triangle(False), _random(SIZE, 3), _definite(False), _random(SIZE)),
        {"nondiff_argnums": (0, 2)},  # taken for triangular, and for symmetric
    ),
    "gpytorch _NaturalToMuVarSqrt": lambda: _natural(
        natural_variational_distribution._NaturalToMuVarSqrt
    ),
    "gpytorch _TrilNaturalToMuVarSqrt": lambda: Case(
        tril_natural_variational_distribution._TrilNaturalToMuVarSqrt,
        (_random(SIZE), _triangle()),
        {"contract": gt.Surrogate()},
    ),
    "gpytorch _NgdInterpTerms": lambda: Case(
        ciq_variational_strategy._NgdInterpTerms,
        (
            _random(SIZE, 3),
            _random(SIZE),
            (-0.5 * _definite(False)).requires_grad_(),
        ),
        {"contract": gt.Surrogate()},
    ),
}
