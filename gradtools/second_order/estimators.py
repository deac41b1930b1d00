"""The diagonal and the trace of a Hessian, exactly or by random probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from gradtools.errors import DefinitionError
from gradtools.second_order.curvature import hvp_fn
from gradtools.second_order.operators import CurvatureOperator
from gradtools.second_order.primals import Argnums
from gradtools.tables import as_html

__all__ = ["Estimate", "diagonal_of", "hessian_diag", "hessian_trace", "trace_of"]

DiagonalMethod = Literal["exact", "hutchinson"]
TraceMethod = Literal["exact", "hutchinson", "hutch++", "xtrace"]
CHUNK = 64
"""How many unit vectors are multiplied at a time."""


class Estimate(NamedTuple):
    """A value and how far it may be off.

    Attributes:
        value: What was estimated.
        stderr: Its standard error, in the same structure; zeros for an exact value.
    """

    value: Any
    stderr: Any

    def _repr_html_(self) -> str:
        rows = [("value", repr(self.value)), ("standard error", repr(self.stderr))]
        return as_html("Estimate", rows)


def hessian_diag(
    f: Callable[..., Any],
    *primals: Any,
    method: DiagonalMethod = "exact",
    samples: int = 100,
    generator: torch.Generator | None = None,
    argnums: Argnums = None,
    chunk: int | None = None,
) -> Estimate:
    """Return the diagonal of the Hessian of a scalar function.

    Args:
        f: From tensors in pytrees to a real scalar.
        *primals: Its arguments, all floating tensors of one dtype and device.
        method: ``"exact"``, with one product per number in the primals; or
            ``"hutchinson"``, the mean of ``v * (H @ v)`` over random signs v (C. Bekas,
            E. Kokiopoulou and Y. Saad, "An estimator for the diagonal of a matrix",
            2007), whose error is that of the entries beside the diagonal.
        samples: How many products the estimate may take, 2 or more.
        generator: Of the random signs; None: torch's default one.
        argnums: Which arguments count, as in :func:`hvp`.
        chunk: How many products to take at a time; None finds out.

    Returns:
        The diagonal and its standard error, in the structure of the primals.

    Raises:
        DefinitionError: The method is unknown, or ``samples`` too small for it.

    Example:
        >>> gt.hessian_diag(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0])).value
        tensor([ 6., 12.])
    """
    with hvp_fn(f, *primals, argnums=argnums) as op:
        return diagonal_of(
            op, method=method, samples=samples, generator=generator, chunk=chunk
        )


def hessian_trace(
    f: Callable[..., Any],
    *primals: Any,
    method: TraceMethod = "hutch++",
    samples: int = 100,
    generator: torch.Generator | None = None,
    argnums: Argnums = None,
) -> Estimate:
    """Return the trace of the Hessian of a scalar function.

    Args:
        f: From tensors in pytrees to a real scalar.
        *primals: Its arguments, all floating tensors of one dtype and device.
        method: ``"exact"``, with one product per number in the primals;
            ``"hutchinson"``, the mean of ``v @ H @ v`` over random signs (M.
            Hutchinson, 1989); ``"hutch++"``, which takes the trace of a low rank
            exactly and estimates the rest (R. Meyer, C. Musco, C. Musco and D.
            Woodruff, 2021); or ``"xtrace"``, which uses every product for both (E.
            Epperly, J. Tropp and R. Webber, 2024). The last two are far better where
            the spectrum decays.
        samples: How many products the estimate may take, 2 or more (4 for hutch++ and
            xtrace).
        generator: Of the random vectors; None: torch's default one.
        argnums: Which arguments count, as in :func:`hvp`.

    Returns:
        The trace and its standard error, tensors without dimensions.

    Raises:
        DefinitionError: The method is unknown, or ``samples`` too small for it.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> gt.hessian_trace(lambda x: (x**3).sum(), x, method="exact").value
        tensor(18.)
    """
    with hvp_fn(f, *primals, argnums=argnums) as op:
        return trace_of(op, method=method, samples=samples, generator=generator)


def diagonal_of(
    op: CurvatureOperator,
    *,
    method: DiagonalMethod = "exact",
    samples: int = 100,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> Estimate:
    """Return the diagonal of an operator; see :func:`hessian_diag`."""
    _ = op.matrix_dtype  # an error where there is none
    if method == "exact":
        parts = [
            _products(op, unit, chunk).diagonal(offset=-start)[: unit.shape[1]]
            for start, unit in _unit_vectors(op)
        ]
        diagonal = torch.cat(parts)
        spread = torch.zeros_like(diagonal)
    elif method == "hutchinson":
        _refuse_samples(samples, 2, method)
        signs = _signs(op, samples, generator)
        values = signs * _products(op, signs, chunk)
        diagonal, spread = values.mean(1), _stderr(values)
    else:
        raise _no_such(method, ("exact", "hutchinson"))
    return Estimate(op.unflatten(diagonal), op.unflatten(spread))


def trace_of(
    op: CurvatureOperator,
    *,
    method: TraceMethod = "hutch++",
    samples: int = 100,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Return the trace of an operator; see :func:`hessian_trace`."""
    _ = op.matrix_dtype  # an error where there is none
    if method == "exact":
        parts = [
            _products(op, unit).diagonal(offset=-start).sum()
            for start, unit in _unit_vectors(op)
        ]
        trace = torch.stack(parts).sum()
        return Estimate(trace, torch.zeros_like(trace))
    if method not in _ESTIMATORS:
        raise _no_such(method, ("exact", *_ESTIMATORS))
    estimator, least = _ESTIMATORS[method]
    _refuse_samples(samples, least, method)
    return estimator(op, samples, generator)


def _hutchinson(
    op: CurvatureOperator, samples: int, generator: torch.Generator | None
) -> Estimate:
    signs = _signs(op, samples, generator)
    values = (signs * _products(op, signs)).sum(0)
    return Estimate(values.mean(), _stderr(values))


def _hutch_plus_plus(
    op: CurvatureOperator, samples: int, generator: torch.Generator | None
) -> Estimate:
    """Use a third of the products for a basis, one in it, and one for the rest."""
    size = op.shape[0]
    rank = min(samples // 3, size)
    basis = torch.linalg.qr(_products(op, _signs(op, rank, generator)))[0]
    exact = (basis * _products(op, basis)).sum()
    count = samples - 2 * rank
    if rank == size:
        return Estimate(exact, torch.zeros_like(exact))
    signs = _signs(op, count, generator)
    rest = signs - basis @ (basis.mT @ signs)
    values = (rest * _products(op, rest)).sum(0)
    return Estimate(exact + values.mean(), _stderr(values))


def _xtrace(
    op: CurvatureOperator, samples: int, generator: torch.Generator | None
) -> Estimate:
    """Leave out one test vector after the other: a basis each time, and a sample.

    With ``A W = Q R`` the basis without the vector i is Q without the direction s_i,
    the i-th column of ``inv(R).T`` at length one; so one factorization serves all. The
    vectors are drawn on a sphere, and scaled anew in the space that a basis leaves.

    Where R is singular, the others reach all that A does: s_i is then a direction that
    A does not reach, and nothing is lost with it. So singular values are kept from
    zero, and none is left out, as a pseudoinverse would.
    """
    size = op.shape[0]
    count = min(samples // 2, size)
    normal = _normal(op, count, generator)
    tests = normal * (size**0.5 / torch.linalg.vector_norm(normal, dim=0))
    basis, triangle = torch.linalg.qr(_products(op, tests))
    inner = basis.mT @ _products(op, basis)
    if count == size:
        trace = inner.diagonal().sum()
        return Estimate(trace, torch.zeros_like(trace))
    left, singular, right = torch.linalg.svd(triangle)
    limits = torch.finfo(triangle.dtype)
    least = (singular.max() * limits.eps).clamp(min=limits.tiny)
    gone = (left * (least / singular.clamp(min=least))) @ right
    gone = gone / torch.linalg.vector_norm(gone, dim=0)
    inside = basis.mT @ tests
    # Of each test vector what lies in its own basis, and so not in the rest.
    along = (gone * inside).sum(0)
    kept = inside - gone * along
    exact = inner.diagonal().sum() - (gone * (inner @ gone)).sum(0)
    # w (I - P) A (I - P) w, where A w = Q r with the column r of the triangle.
    quadratic = (
        (tests * (basis @ triangle)).sum(0)
        - 2 * (kept * (triangle - gone * (gone * triangle).sum(0))).sum(0)
        + (kept * (inner @ kept)).sum(0)
    )
    outside = tests.square().sum(0) - kept.square().sum(0)
    values = exact + (size - count + 1) / outside * quadratic
    return Estimate(values.mean(), _stderr(values))


_ESTIMATORS: dict[str, tuple[Callable[..., Estimate], int]] = {
    "hutchinson": (_hutchinson, 2),
    "hutch++": (_hutch_plus_plus, 4),
    "xtrace": (_xtrace, 4),
}


def _products(
    op: CurvatureOperator, columns: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """Multiply with the columns of a matrix."""
    block = op.block(*op.apart(op.unflatten(columns.mT.contiguous())), chunk=chunk)
    return op.flatten(block, is_block=True).mT.detach()


def _unit_vectors(op: CurvatureOperator) -> list[tuple[int, torch.Tensor]]:
    """Return the unit vectors by parts, each with the number of its first."""
    size = op.shape[0]
    parts = []
    for start in range(0, max(size, 1), CHUNK):
        count = min(CHUNK, size - start)
        unit = torch.zeros(size, count, dtype=op.dtype, device=op.device)
        unit[start : start + count].fill_diagonal_(1)
        parts.append((start, unit))
    return parts


def _signs(
    op: CurvatureOperator, count: int, generator: torch.Generator | None
) -> torch.Tensor:
    return torch.where(_normal(op, count, generator) < 0, -1.0, 1.0).to(op.dtype)


def _normal(
    op: CurvatureOperator, count: int, generator: torch.Generator | None
) -> torch.Tensor:
    device = op.device if generator is None else generator.device
    drawn = torch.randn(
        op.shape[0], count, dtype=op.dtype, device=device, generator=generator
    )
    return drawn.to(op.device)


def _stderr(values: torch.Tensor) -> torch.Tensor:
    return values.std(-1) / values.shape[-1] ** 0.5


def _refuse_samples(samples: int, least: int, method: str) -> None:
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < least:
        raise DefinitionError(
            f"the method {method!r} was given {samples!r} samples",
            fix=f"Give {least} or more: an error is told by how the samples differ.",
        )


def _no_such(method: str, methods: tuple[str, ...]) -> DefinitionError:
    return DefinitionError(
        f"there is no method {method!r}",
        fix=f"Use one of {', '.join(map(repr, methods))}.",
    )
