"""Conjugate gradients on pytrees, for one system or many at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gradtools import torch_compat
from gradtools.errors import DefinitionError, TransformError
from gradtools.lowering.boundary import is_tracing
from gradtools.second_order.operators import CurvatureOperator
from gradtools.second_order.primals import Primals, Tensors

__all__ = ["CGInfo", "as_product", "cg", "is_over", "refuse_sides", "refuse_unsolved"]

STEPS_BETWEEN_LOOKS = 8
"""How often the loop asks a device whether it may end: an answer stops its queue."""


class CGInfo(NamedTuple):
    """What came of a solve; one entry per system.

    Attributes:
        converged: Whether the residual is below the tolerance.
        iterations: How many steps were taken.
        residual_norm: Of ``b - A x``, as the recurrence has it.
        negative_curvature: Whether a direction p with ``p @ A p <= 0`` was met; x is
            then what it was before, and A is not positive definite.
    """

    converged: torch.Tensor
    iterations: torch.Tensor
    residual_norm: torch.Tensor
    negative_curvature: torch.Tensor


def cg(
    A: Any,
    b: Any,
    *,
    x0: Any = None,
    M: Any = None,
    damping: float | torch.Tensor = 0.0,
    rtol: float = 1e-6,
    atol: float = 0.0,
    maxiter: int | None = None,
    batch_dims: int = 0,
) -> tuple[Any, CGInfo]:
    """Solve ``(A + damping) x = b`` for a positive definite A, known by its products.

    The method of conjugate gradients (M. Hestenes and E. Stiefel, 1952). On an
    accelerator nothing waits for the device but a look every eight steps; under vmap
    and in a batch each system stops by itself; under torch.compile the loop is
    unrolled.

    Autograd would go through the loop: :func:`linear_solve` has the derivative of the
    solution.

    Args:
        A: A function of trees like b, a matrix ``(n, n)``, or an operator of
            :func:`hvp_fn`.
        b: The right-hand side, a pytree of floating tensors.
        x0: Where to begin; None: zeros.
        M: A preconditioner, an approximation of the inverse of A: like A.
        damping: What to add to the diagonal, for all or for each system.
        rtol: The residual norm to reach, relative to that of b.
        atol: The residual norm to reach, absolutely; the larger one counts.
        maxiter: The most steps; None: ten times the numbers in b.
        batch_dims: How many leading dimensions of every tensor of b count systems. A
            gets the whole batch. A matrix is applied to each, an operator of hvp_fn
            takes one batch dimension.

    Returns:
        ``(x, info)`` with x in the structure of b, and a :class:`.CGInfo`.

    Raises:
        DefinitionError: The products of A have another structure than b, the batch or
            the damping does not fit, or torch.compile meets a call without
            ``maxiter=``.

    Example:
        >>> A = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
        >>> x, info = gt.cg(A, torch.tensor([5.0, 5.0]))
        >>> x.round(decimals=4), info.converged
        (tensor([1., 2.]), tensor(True))
    """
    asked = Primals((b,), 0, "cg")
    right = asked.leaves
    _refuse_batch(right, batch_dims, damping)
    for matrix in (A, M):
        if isinstance(matrix, torch.Tensor):
            refuse_sides(matrix, b, "cg", batch_dims)
    multiply = _on_leaves(as_product(A, batch_dims), asked, "the product A(x)")
    inner = _InnerProduct(batch_dims)
    start = [torch.zeros_like(part) for part in right]
    if x0 is not None:
        start = asked.tangents(x0, "x0")
    state = _State(
        lambda v: inner.plus(multiply(v), damping, v),
        _on_leaves(as_product(M, batch_dims), asked, "M(x)") if M is not None else None,
        inner,
        (rtol, atol),
        start,
        right,
        from_zero=x0 is None,
    )
    look = STEPS_BETWEEN_LOOKS if right[0].device.type != "cpu" else 1
    for step in range(_most(maxiter, right, batch_dims)):
        if step % look == 0 and is_over(state.active):
            break
        state.advance()
    return asked.tree(state.x), state.info()


class _State:
    """Where the iteration stands, for all systems."""

    def __init__(
        self,
        multiply: Callable[[Tensors], Tensors],
        precondition: Callable[[Tensors], Tensors] | None,
        inner: _InnerProduct,
        tolerances: tuple[float, float],
        start: Tensors,
        right: Tensors,
        *,
        from_zero: bool,
    ) -> None:
        self.multiply, self.inner = multiply, inner
        self.precondition = precondition or (lambda vector: vector)
        self.x = start
        self.residual = right if from_zero else inner.minus(right, multiply(start))
        self.direction = self.precondition(self.residual)
        self.rz = inner(self.residual, self.direction)
        self.square = inner(self.residual, self.residual)
        rtol, atol = tolerances
        self.enough = torch.clamp(rtol**2 * inner(right, right), min=atol**2)
        self.bent = torch.zeros_like(self.square, dtype=torch.bool)
        self.steps = torch.zeros_like(self.square, dtype=torch.int64)

    @property
    def active(self) -> torch.Tensor:
        """Which systems go on."""
        return (self.square > self.enough) & ~self.bent

    def advance(self) -> None:
        """Take one step, in the systems that go on."""
        active = self.active
        product = self.multiply(self.direction)
        curvature = self.inner(self.direction, product)
        self.bent = self.bent | (active & (curvature <= 0))
        goes = active & ~self.bent
        one = torch.ones_like(curvature)
        length = torch.where(goes, self.rz / torch.where(goes, curvature, one), 0)
        self.x = self.inner.plus(self.x, length, self.direction)
        self.residual = self.inner.plus(self.residual, -length, product)
        towards = self.precondition(self.residual)
        rz = self.inner(self.residual, towards)
        share = torch.where(goes, rz / torch.where(goes, self.rz, one), 0)
        self.direction = self.inner.plus(towards, share, self.direction)
        self.rz = torch.where(goes, rz, self.rz)
        self.square = self.inner(self.residual, self.residual)
        self.steps = self.steps + goes

    def info(self) -> CGInfo:
        """Say how it went."""
        return CGInfo(
            (self.square <= self.enough) & self.square.isfinite(),
            self.steps,
            self.square.sqrt(),
            self.bent,
        )


class _InnerProduct:
    """Arithmetic of vectors that are lists of tensors, one system or several."""

    def __init__(self, batch_dims: int) -> None:
        self.batch_dims = batch_dims

    def __call__(self, left: Tensors, right: Tensors) -> torch.Tensor:
        """Return one number per system; real, also for complex vectors."""
        parts = [self._summed(_times(a, b)) for a, b in zip(left, right, strict=True)]
        return sum(parts[1:], parts[0])

    def plus(
        self, left: Tensors, factor: float | torch.Tensor, right: Tensors
    ) -> Tensors:
        """Return ``left + factor * right``, with one factor per system."""
        if not isinstance(factor, torch.Tensor):
            if factor == 0:
                return left
            return [a + factor * b for a, b in zip(left, right, strict=True)]
        return [
            a + self._broad(factor, b).to(b.dtype) * b
            for a, b in zip(left, right, strict=True)
        ]

    @staticmethod
    def minus(left: Tensors, right: Tensors) -> Tensors:
        """Return ``left - right``."""
        return [a - b for a, b in zip(left, right, strict=True)]

    def _summed(self, product: torch.Tensor) -> torch.Tensor:
        return product.reshape(*product.shape[: self.batch_dims], -1).sum(-1)

    def _broad(self, factor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return factor.reshape((*factor.shape, *[1] * (like.dim() - factor.dim())))


def _times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply number by number, for a sum of real parts.

    In float32 what is shorter: the square of 300 is beyond float16, and that of 1e-4.
    """
    if a.is_complex():
        return (a.conj() * b).real
    return a.float() * b.float() if a.dtype.itemsize < 4 else a * b


def as_product(A: Any, batch_dims: int = 0) -> Callable[[Any], Any]:
    """Return the function that multiplies with a matrix, in whatever form it comes."""
    if isinstance(A, CurvatureOperator):
        if batch_dims == 0:
            return lambda tree: A(*A.apart(tree))
        return lambda tree: A.block(*A.apart(tree))
    if isinstance(A, torch.Tensor):
        return lambda vector: (A @ vector.unsqueeze(-1)).squeeze(-1)
    if callable(A):
        return A
    raise DefinitionError(
        f"a matrix is needed, or a function that multiplies with one, not "
        f"{type(A).__name__}",
        fix="Give a tensor (n, n), a function of a vector, or hvp_fn(...).",
    )


def is_over(active: torch.Tensor) -> bool:
    """Whether no system goes on; not to be known while torch.compile traces.

    Under vmap the batch is looked at as a whole, underneath.
    """
    return _has_values(active) and not bool(torch_compat.plain(active).any())


def refuse_unsolved(
    name: str,
    residual: torch.Tensor,
    right: torch.Tensor,
    rtol: float,
    bent: Any = None,
) -> None:
    """Raise where a residual is far above the tolerance, and known.

    Half of the digits will do: the rest may be lost to rounding. What is not finite
    stays so, and may be what the caller looks out for.
    """
    far = (residual > rtol**0.5 * right) & residual.isfinite()
    if not _has_values(far) or is_over(far):
        return
    if bent is not None and bool(torch_compat.plain(bent).any()):
        raise TransformError(
            f"{name}: the matrix is not positive definite, and no solution was found",
            fix="Turn the sign of a negative definite one (of the equation); for any "
            'other use solve="gmres" or "dense".',
        )
    shares = torch_compat.plain(torch.where(far, residual / right, 0))
    raise TransformError(
        f"{name}: no solution was found: the residual is {float(shares.max()):.0e} of "
        "the right-hand side",
        fix='Use solve="dense", or a function solve(A, b) that goes on for longer.',
    )


def _has_values(tensor: torch.Tensor) -> bool:
    return not (is_tracing() or torch_compat.is_fake(torch_compat.plain(tensor)))


def refuse_sides(A: torch.Tensor, b: Any, who: str, batch_dims: int = 0) -> None:
    """Raise where a right-hand side is none of a matrix, or has several in columns."""
    is_square = A.dim() > 1 and A.shape[-1] == A.shape[-2]
    if is_square and isinstance(b, torch.Tensor) and b.dim() >= batch_dims:
        systems = b.shape[:batch_dims] if A.dim() == 2 else A.shape[:-2]
        if b.shape == (*systems, A.shape[-1]):
            return
    got = tuple(b.shape) if isinstance(b, torch.Tensor) else type(b).__name__
    raise DefinitionError(
        f"{who}: a matrix of shape {tuple(A.shape)} and a right-hand side of "
        f"{'shape ' if isinstance(b, torch.Tensor) else 'type '}{got} make no system",
        fix="Give (n, n) and (n,). For several in columns take torch.vmap over them: "
        "in_dims=1, out_dims=1.",
    )


def _refuse_batch(
    right: Tensors, batch_dims: int, damping: float | torch.Tensor
) -> None:
    """Raise where the systems of a batch are not counted the same everywhere."""
    shapes = [tuple(part.shape) for part in right]
    leading = {shape[:batch_dims] for shape in shapes} if batch_dims >= 0 else set()
    if len(leading) != 1 or len(systems := leading.pop()) != batch_dims:
        raise DefinitionError(
            f"cg: the tensors of b have no {batch_dims} leading dimensions in common: "
            f"their shapes are {', '.join(map(str, shapes))}",
            fix="Say with batch_dims= how many of them count systems.",
        )
    if isinstance(damping, torch.Tensor) and damping.shape not in ((), systems):
        raise DefinitionError(
            f"cg: the damping has shape {tuple(damping.shape)}, and the batch of "
            f"systems {systems}",
            fix="Give one number, or one for each system.",
        )


def _on_leaves(
    function: Callable[[Any], Any], asked: Primals, word: str
) -> Callable[[Tensors], Tensors]:
    return lambda vector: asked.tangents(function(asked.tree(vector)), word)


def _most(maxiter: int | None, right: Tensors, batch_dims: int) -> int:
    if maxiter is not None:
        return maxiter
    if is_tracing() or torch_compat.is_fake(torch_compat.plain(right[0])):
        raise DefinitionError(
            "cg: torch.compile unrolls the loop, and nothing says how long it is",
            fix="Give maxiter=.",
        )
    return 10 * sum(math.prod(part.shape[batch_dims:]) for part in right)
