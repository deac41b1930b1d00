"""Products of a Hessian or a Gauss-Newton matrix with a vector, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch.autograd import forward_ad

from gradtools.errors import DefinitionError
from gradtools.second_order.directional import transposed
from gradtools.second_order.dual_numbers import dual
from gradtools.second_order.graph import Graph, Run, captures
from gradtools.second_order.primals import Argnums, Flat, Primals, Tensors, as_tuple
from gradtools.second_order.reverse import Gradient, Pullback
from gradtools.second_order.sound import (
    in_both_modes,
    in_forward_mode,
    is_under_way,
    is_within_transforms,
    plainly,
    usable,
)

__all__ = ["ggnvp", "hvp", "vhp"]

Mode: TypeAlias = Literal["auto", "reverse-over-reverse", "forward-over-reverse"]


def hvp(
    f: Callable[..., Any],
    primals: Any,
    tangents: Any,
    *,
    argnums: Argnums = None,
    has_aux: bool = False,
    mode: Mode = "auto",
) -> Any:
    """Multiply the Hessian of a scalar function with a vector.

    The product costs one forward and two backward passes, whatever the size, and no
    matrix is made (B. Pearlmutter, "Fast exact multiplication by the Hessian", 1994).

    It is taken by reverse over reverse, outside of transforms with plain autograd: so
    checkpointing, saved-tensor hooks and buffers that are updated in place are welcome.
    The result has a graph of its own if gradients are on and a primal, a tangent or a
    captured tensor requires one.

    Args:
        f: From tensors in pytrees to a real scalar.
        primals: The arguments of f, a tuple. Their floating and complex tensors are
            differentiated; the rest takes part as it is.
        tangents: What to multiply with, in the structure of the primals that count,
            with the shape, dtype and device of each; None stands for zeros.
        argnums: Which arguments count: all as a tuple (None), one by itself (an int),
            or a tuple of some.
        has_aux: Whether f returns a pair ``(value, aux)``.
        mode: ``"reverse-over-reverse"``, which ``"auto"`` is, or
            ``"forward-over-reverse"``.

    Returns:
        The product, in the structure of the primals that count, with None where they
        have no floating tensor; with has_aux a pair ``(product, aux)``.

    Raises:
        DefinitionError: f returns no scalar, or the tangents do not fit.

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [0.0, 3.0]])  # not symmetric
        >>> x, v = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0])
        >>> gt.hvp(lambda x: x @ A @ x, (x,), (v,))  # (A + A.T) @ v
        (tensor([2., 2.]),)
    """
    if mode not in _MODES:
        raise DefinitionError(
            f"hvp: mode {mode!r} is none of {', '.join(map(repr, _MODES))}",
            fix='Leave it out: "auto" is right for every function.',
        )
    asked = Primals(as_tuple(primals, "hvp"), argnums, "hvp")
    vectors = asked.tangents(tangents)
    flat = asked.flat(f, has_aux=has_aux)
    if mode == "forward-over-reverse":
        found, aux = _forward_over_reverse(flat, asked.leaves, vectors)
    else:
        gradient = Gradient(flat, asked.leaves)
        found, aux = gradient.product(vectors, is_last=True), gradient.aux
    return flat.with_aux(asked.tree(found), aux)


def vhp(
    f: Callable[..., Any],
    primals: Any,
    cotangents: Any,
    *,
    argnums: Argnums = None,
    has_aux: bool = False,
) -> Any:
    """Multiply a vector with the Hessian of a scalar function, from the left.

    A Hessian is symmetric, so this is :func:`hvp`, under the name that
    ``torch.autograd.functional`` has for it.

    Args:
        f: From tensors in pytrees to a real scalar.
        primals: The arguments of f, a tuple.
        cotangents: What to multiply with, in the structure of the primals that count.
        argnums: Which arguments count, as in :func:`hvp`.
        has_aux: Whether f returns a pair ``(value, aux)``.

    Returns:
        The product, as :func:`hvp` returns it.

    Raises:
        DefinitionError: f returns no scalar, or the cotangents do not fit.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> gt.vhp(lambda x: (x**3).sum(), (x,), (torch.ones(2),))
        (tensor([ 6., 12.]),)
    """
    asked = Primals(as_tuple(primals, "vhp"), argnums, "vhp")
    vectors = asked.tangents(cotangents, "cotangents")
    flat = asked.flat(f, has_aux=has_aux)
    gradient = Gradient(flat, asked.leaves)
    found = gradient.product(vectors, is_last=True)
    return flat.with_aux(asked.tree(found), gradient.aux)


def ggnvp(
    f: Callable[..., Any],
    loss: Callable[[Any], Any],
    primals: Any,
    tangents: Any,
    *,
    argnums: Argnums = None,
    has_aux: bool = False,
) -> Any:
    """Multiply the generalized Gauss-Newton matrix of ``loss(f(*primals))``.

    That is ``J.T @ H @ J`` with the Jacobian of f and the Hessian of the loss at f's
    output; it is positive semidefinite where the loss is convex (N. Schraudolph, "Fast
    curvature matrix-vector products", 2002).

    f runs once, tangents go through it on the way, and cotangents back. Where an
    operator has no forward mode, or sees it differently (``torch.no_grad()`` inside),
    and where the result is differentiated in its turn, f runs by itself, and tangents
    go through it by two reverse passes.

    Args:
        f: The model: from tensors in pytrees to tensors in a pytree.
        loss: From the output of f to a real scalar.
        primals: The arguments of f, a tuple.
        tangents: What to multiply with, in the structure of the primals that count.
        argnums: Which arguments count, as in :func:`hvp`.
        has_aux: Whether f returns a pair ``(output, aux)``.

    Returns:
        The product, in the structure of the primals that count; with has_aux a pair
        ``(product, aux)``.

    Raises:
        DefinitionError: The loss returns no scalar, or the tangents do not fit.

    Example:
        >>> data, target = torch.eye(2), torch.zeros(2)
        >>> model = lambda w: data @ w
        >>> loss = lambda out: ((out - target) ** 2).sum()
        >>> gt.ggnvp(model, loss, (torch.ones(2),), (torch.tensor([1.0, 0.0]),))
        (tensor([2., 0.]),)
    """
    asked = Primals(as_tuple(primals, "ggnvp"), argnums, "ggnvp")
    vectors = asked.tangents(tangents)
    flat = asked.flat(f, has_aux=has_aux)
    found, aux = _by_dual_numbers(flat, loss, asked.leaves, vectors) or _by_graphs(
        flat, loss, asked.leaves, vectors
    )
    return flat.with_aux(asked.tree(found), aux)


class GaussNewton:
    """The Gauss-Newton matrix at a point, with the graphs that give its products.

    Args:
        flat: The model.
        loss: Of its output.
        leaves: Where it is differentiated.
        run: A run of the model, if it has been run there.

    Attributes:
        value: The loss.
        grads: Its gradient, one tensor per leaf.
        aux: Tensors.
    """

    def __init__(
        self,
        flat: Flat,
        loss: Callable[[Any], Any],
        leaves: Tensors,
        run: Run | None = None,
    ) -> None:
        self._pull = Pullback(flat, leaves, order=2, run=run)
        place = Primals((flat.output(self._pull.outputs),), 0, flat.primals.who)
        self._push = transposed(self._pull)
        self._loss = Gradient(place.flat(loss), place.leaves)
        self.value, self.aux = self._loss.value, self._pull.aux

    @property
    def grads(self) -> Tensors:
        """The gradient of the loss in the leaves."""
        return self._pull(self._loss.grads)

    def product(
        self, tangents: Tensors, *, is_last: bool = False, is_block: bool = False
    ) -> Tensors:
        """Multiply; see :class:`.Pullback`."""
        pushed = self._push(tangents, is_block=is_block)
        weighed = self._loss.product(pushed, is_last=is_last, is_block=is_block)
        return self._pull(weighed, is_last=is_last, is_block=is_block)

    def pushed(self, tangents: Tensors) -> Tensors | None:
        """Return None: there is no other way."""
        return None

    def bytes_of_a_product(self) -> int:
        """Estimate, from above, what one more vector in a block needs."""
        parts = (self._push, self._pull, self._loss)
        return max(part.bytes_of_a_product() for part in parts)


def _by_dual_numbers(
    flat: Flat, loss: Callable[[Any], Any], leaves: Tensors, vectors: Tensors
) -> tuple[Tensors, Tensors] | None:
    """Multiply with a Gauss-Newton matrix once; None where that would not do."""
    if is_within_transforms() or is_under_way((*leaves, *vectors)):
        return None
    try:
        with in_both_modes() as running:
            inputs = [usable(leaf).detach().requires_grad_() for leaf in leaves]
            moves = [usable(vector).detach() for vector in vectors]
            duals = [*map(dual, inputs, moves)]
            with running():
                outputs, aux = flat(*duals)
            pairs = [forward_ad.unpack_dual(out) for out in outputs]
            aux = [forward_ad.unpack_dual(tensor).primal for tensor in aux]
    except RuntimeError:  # it has no forward mode, or fails in the other way as well
        return None
    outputs = [pair.primal for pair in pairs]
    run = Run(inputs, outputs, aux, False, partial(plainly, 1))
    if not outputs:
        return None
    if torch.is_grad_enabled() and captures(run):
        return _by_graphs(flat, loss, leaves, vectors, run)
    pushed = [
        torch.zeros_like(primal) if tangent is None else tangent.detach()
        for primal, tangent in pairs
    ]
    del pairs, duals
    graph = Graph(run, outputs)
    place = Primals((flat.output(graph.shown(outputs)),), 0, flat.primals.who)
    weighed = Gradient(place.flat(loss), place.leaves).product(pushed, is_last=True)
    try:
        return graph.pulled_back(weighed, is_last=True), graph.shown(aux)
    except RuntimeError:  # a checkpoint, which counts what is saved, of tangents too
        return None


def _by_graphs(
    flat: Flat,
    loss: Callable[[Any], Any],
    leaves: Tensors,
    vectors: Tensors,
    run: Run | None = None,
) -> tuple[Tensors, Tensors]:
    matrix = GaussNewton(flat, loss, leaves, run)
    return matrix.product(vectors, is_last=True), matrix.aux


_MODES = ("auto", "reverse-over-reverse", "forward-over-reverse")


def _forward_over_reverse(
    flat: Flat, leaves: Tensors, vectors: Tensors
) -> tuple[Tensors, Tensors]:
    numbers = tuple(range(len(leaves)))
    gradient = torch.func.grad(flat.scalar, argnums=numbers, has_aux=True)
    with in_forward_mode():
        found: Any = torch.func.jvp(
            gradient, tuple(leaves), tuple(vectors), has_aux=True
        )
    return found[1], found[2]
