"""Reverse mode with its graph kept: the piece that every product is made of.

Outside of transforms by ``torch.autograd.grad``, which costs less than torch.func and
takes what that refuses (checkpoint, saved-tensor hooks, buffers, old Functions); within
them, and where torch.compile traces, by ``torch.func.vjp``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from gradtools import torch_compat
from gradtools.lowering.boundary import is_tracing
from gradtools.second_order.graph import (
    Function,
    Graph,
    Run,
    pulled_back,
    recorded,
)
from gradtools.second_order.primals import Flat, Tensors
from gradtools.second_order.sound import (
    in_forward_mode,
    is_under_way,
    is_within_transforms,
    within_transforms,
)

__all__ = ["Gradient", "Products", "Pullback"]


class Pullback:
    """A function at a point: its outputs, and its cotangents pulled back.

    Args:
        function: Of tensors, to ``(outputs, aux)``.
        leaves: Where it is differentiated.
        order: How many derivatives are going to be taken, 2 if cotangents are
            differentiated as well.
        upon: Whose pullback the function is made of, if it is.
        run: A run of the function, if it has been run there.

    Attributes:
        outputs: Tensors; with a graph if a derivative in the leaves, or in what the
            function captures, is under way outside.
        aux: Tensors.
    """

    def __init__(
        self,
        function: Function,
        leaves: Tensors,
        *,
        order: int = 1,
        upon: Pullback | None = None,
        run: Run | None = None,
    ) -> None:
        self.graph: Graph | None = None
        if is_within_transforms():
            with within_transforms():
                found = _vjp(function, leaves)
            self.outputs, self._pull, self.aux = found
            return
        if upon is None or upon.graph is None:
            run = recorded(function, leaves, order, run)
        else:
            before = upon.graph
            run = Run.of(function, leaves, 0, before.goes_on, before.surroundings)
        graph = self.graph = Graph(run, run.outputs)
        self.outputs = graph.shown(run.outputs)
        self.aux = graph.shown(run.aux)

    def __call__(
        self, cotangents: Tensors, *, is_last: bool = False, is_block: bool = False
    ) -> Tensors:
        """Return one cotangent per leaf.

        Args:
            cotangents: One per output.
            is_last: Whether the graph may be freed on the way.
            is_block: Whether the cotangents have a leading dimension, of vectors.
        """
        if self.graph is None:
            return _by_torch_func(self._pull, cotangents, is_block=is_block)
        return self.graph.pulled_back(cotangents, is_last=is_last, is_block=is_block)

    def bytes_of_a_product(self) -> int:
        """Estimate, from above, what one more vector in a block needs."""
        return 0 if self.graph is None else self.graph.bytes_of_a_product()


class Products(Protocol):
    """What an operator is made of: a graph at a point that gives products."""

    value: torch.Tensor
    aux: Tensors

    @property
    def grads(self) -> Tensors:
        """The gradient, one tensor per leaf."""
        ...

    def product(
        self, tangents: Tensors, *, is_last: bool = False, is_block: bool = False
    ) -> Tensors:
        """Multiply; see :class:`.Pullback`."""
        ...

    def pushed(self, tangents: Tensors) -> Tensors | None:
        """Multiply with a block in another way; None where there is none."""
        ...

    def bytes_of_a_product(self) -> int:
        """Estimate what one more vector in a block needs."""
        ...


class Gradient:
    """The gradient of a scalar function at a point, with the graph that made it.

    Args:
        flat: The function.
        leaves: Where it is differentiated.

    Attributes:
        value: A real scalar.
        aux: Tensors.
    """

    def __init__(self, flat: Flat, leaves: Tensors) -> None:
        self.graph: Graph | None = None
        self._flat, self._leaves = flat, leaves
        if is_within_transforms():
            gradient: Any = torch.func.grad_and_value(
                flat.scalar, argnums=tuple(range(len(leaves))), has_aux=True
            )
            with within_transforms():
                found = _vjp(gradient, leaves)
            self._grads, self._pull, (self.value, self.aux) = found
            return
        run = recorded(flat.scalar_as_tuple, leaves, 2)
        with run.surroundings():  # a checkpoint runs the function again
            self._grads = _gradient(run.outputs[0], run.inputs)
        graph = self.graph = Graph(run, self._grads)
        (self.value,) = graph.shown(run.outputs)
        self.aux = graph.shown(run.aux)

    @property
    def grads(self) -> Tensors:
        """The gradient, one tensor per leaf."""
        return self._grads if self.graph is None else self.graph.shown(self._grads)

    def product(
        self, tangents: Tensors, *, is_last: bool = False, is_block: bool = False
    ) -> Tensors:
        """Return the Hessian times one tangent per leaf; see :class:`Pullback`."""
        if self.graph is None:
            return _by_torch_func(self._pull, tangents, is_block=is_block)
        return self.graph.pulled_back(tangents, is_last=is_last, is_block=is_block)

    def pushed(self, tangents: Tensors) -> Tensors | None:
        """Multiply with a block by forward over reverse, which runs the function again.

        None where that would not do: see :class:`.CurvatureOperator`, which compares
        what comes out with a product.
        """
        if self.graph is None or self.graph.goes_on or is_under_way(tangents):
            return None
        leaves = tuple(self._leaves)
        gradient = torch.func.grad(
            self._flat.scalar, tuple(range(len(leaves))), has_aux=True
        )

        def product(*vectors: torch.Tensor) -> Any:
            return torch.func.jvp(gradient, leaves, vectors, has_aux=True)[1]

        try:
            with in_forward_mode():
                return torch.func.vmap(product)(*tangents)
        except RuntimeError:  # it has no forward mode, or cannot be vectorized
            return None

    def bytes_of_a_product(self) -> int:
        """Estimate, from above, what one more vector in a block needs."""
        return 0 if self.graph is None else self.graph.bytes_of_a_product()


def _vjp(function: Callable[..., tuple[Tensors, Any]], leaves: Tensors) -> Any:
    """Return outputs, pullback and aux by torch.func.

    Under forward mode torch's pullback fails for an input that nothing depends on, with
    an internal assertion (it asks the tensor of a transform that is over for zeros). So
    there something depends on each, by a sum of no elements.
    """

    def touching(*inputs: torch.Tensor) -> tuple[Tensors, Any]:
        outputs, aux = function(*inputs)
        if not outputs:
            return outputs, aux
        first, *others = outputs
        for tensor in inputs:
            nothing = tensor.reshape(-1)[:0].abs().sum()
            first = first + nothing.to(first.dtype)
        return (first, *others), aux

    is_moving = not is_tracing() and torch_compat.forward_ad_active()
    return torch.func.vjp(touching if is_moving else function, *leaves, has_aux=True)


def _by_torch_func(
    pull: Callable[[Any], Tensors], cotangents: Tensors, *, is_block: bool
) -> Tensors:
    if is_block:
        return torch.func.vmap(lambda *given: pull(given))(*cotangents)
    return pull(tuple(cotangents))


def _gradient(value: torch.Tensor, inputs: Tensors) -> Tensors:
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    with torch.enable_grad():
        found = pulled_back(
            [value], inputs, [torch.ones_like(value)], create_graph=True
        )
        return [
            torch.zeros_like(tensor) if grad is None else grad
            for grad, tensor in zip(found, inputs, strict=True)
        ]
