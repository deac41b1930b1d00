"""hvp_fn and ggnvp_fn: a Hessian or Gauss-Newton matrix at a point, as an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gradtools.second_order.accumulation import OverBatches, OverRanks
from gradtools.second_order.operators import CurvatureOperator
from gradtools.second_order.primals import Argnums, Primals
from gradtools.second_order.products import GaussNewton
from gradtools.second_order.reverse import Gradient, Products

__all__ = ["ggnvp_fn", "hvp_fn"]


def hvp_fn(
    f: Callable[..., Any],
    *primals: Any,
    argnums: Argnums = None,
    has_aux: bool = False,
    batches: Iterable[Any] | None = None,
    group: Any = None,
    progress: bool = False,
) -> CurvatureOperator:
    """Return the Hessian of a scalar function at a point, as an operator.

    The graph of the gradient is kept: a product is one backward pass through it, and f
    is not run again.

    Args:
        f: From tensors in pytrees to a real scalar.
        *primals: Its arguments.
        argnums: Which of them count, as in :func:`hvp`.
        has_aux: Whether f returns a pair ``(value, aux)``; with batches aux is left
            out.
        batches: Data that the function is summed over: ``f(*primals, batch)`` for each
            of them. Nothing is kept between products then; each goes through all
            batches again, so they must be a list or a loader, not an iterator.
        group: A process group of ``torch.distributed``: the function is summed over its
            ranks, with one all-reduce per product. Every rank must ask for the same
            products.
        progress: Whether to show a bar while the batches go by (needs rich).

    Returns:
        The operator, with ``op(v)``, ``op @ v``, ``op.block(V)``, ``op.value`` and
        ``op.grad``.

    Raises:
        DefinitionError: f returns no scalar, the batches can be read only once, or this
            rank is not in the group.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> with gt.hvp_fn(lambda x: (x**3).sum(), x) as op:
        ...     print(op.grad, op(torch.ones(2)), op @ torch.eye(2))
        tensor([ 3., 12.]) tensor([ 6., 12.]) tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    asked = Primals(primals, argnums, "hvp_fn")

    def at(*batch: Any) -> tuple[Gradient, Any]:
        flat = asked.flat(lambda *args: f(*args, *batch), has_aux=has_aux)
        gradient = Gradient(flat, asked.leaves)
        return gradient, flat.aux.rebuild(gradient.aux)

    return _operator("Hessian", asked, at, batches, group, progress)


def ggnvp_fn(
    f: Callable[..., Any],
    loss: Callable[..., Any],
    *primals: Any,
    argnums: Argnums = None,
    has_aux: bool = False,
    batches: Iterable[Any] | None = None,
    group: Any = None,
    progress: bool = False,
) -> CurvatureOperator:
    """Return the generalized Gauss-Newton matrix at a point, as an operator.

    That is ``J.T @ H @ J``, see :func:`ggnvp`. The graphs of the model, of its
    transpose and of the gradient of the loss are kept.

    Args:
        f: The model: from tensors in pytrees to tensors in a pytree.
        loss: From the output of f to a real scalar; with batches also of the batch:
            ``loss(f(*primals, batch), batch)``.
        *primals: The arguments of f.
        argnums: Which of them count, as in :func:`hvp`.
        has_aux: Whether f returns a pair ``(output, aux)``, as in :func:`hvp_fn`.
        batches: Data that the loss is summed over, as in :func:`hvp_fn`.
        group: A process group, as in :func:`hvp_fn`.
        progress: Whether to show a bar while the batches go by (needs rich).

    Returns:
        The operator; ``op.value`` is the loss and ``op.grad`` its gradient.

    Raises:
        DefinitionError: The loss is no scalar, or the batches can be read only once.

    Example:
        >>> data = torch.eye(2)
        >>> op = gt.ggnvp_fn(lambda w: data @ w, lambda out: (out**2).sum(),
        ...                  torch.tensor([1.0, 2.0]))
        >>> op(torch.tensor([1.0, 0.0])), op.grad
        (tensor([2., 0.]), tensor([2., 4.]))
    """
    asked = Primals(primals, argnums, "ggnvp_fn")

    def at(*batch: Any) -> tuple[GaussNewton, Any]:
        flat = asked.flat(lambda *args: f(*args, *batch), has_aux=has_aux)
        matrix = GaussNewton(flat, lambda out: loss(out, *batch), asked.leaves)
        return matrix, flat.aux.rebuild(matrix.aux)

    return _operator("Gauss-Newton matrix", asked, at, batches, group, progress)


def _operator(
    name: str,
    asked: Primals,
    at: Callable[..., tuple[Products, Any]],
    batches: Iterable[Any] | None,
    group: Any,
    progress: bool,
) -> CurvatureOperator:
    aux = None
    products: Products
    if batches is None:
        products, aux = at()
    else:
        products = OverBatches(lambda batch: at(batch)[0], batches, asked.who, progress)
    if group is None:
        return CurvatureOperator(name, asked, products, aux)
    ranks = OverRanks(products, group, asked.who)
    return CurvatureOperator(name, asked, ranks, aux, agree=ranks.largest)
