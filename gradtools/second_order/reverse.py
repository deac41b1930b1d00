"""Reverse mode with its graph kept: the piece that every product is made of.

Outside of transforms by ``torch.autograd.grad``, which costs less than torch.func and
takes what that refuses (checkpoint, saved-tensor hooks, buffers, old Functions); within
them, and where torch.compile traces, by ``torch.func.vjp``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from gradtools import torch_compat
from gradtools.errors import TransformError
from gradtools.lowering.boundary import is_tracing
from gradtools.lowering.forward_mode import alias
from gradtools.second_order.primals import Flat, Tensors
from gradtools.second_order.sound import (
    is_within_transforms,
    plainly,
    usable,
    within_transforms,
)
from gradtools.second_order.stand_ins import wrong_at

__all__ = ["Gradient", "Products", "Pullback"]

Function = Callable[..., tuple[Tensors, Tensors]]

_around: ContextVar[int] = ContextVar("_around", default=0)
"""How many derivatives are taken, by what is here, of what runs now."""


class Pullback:
    """A function at a point: its outputs, and its cotangents pulled back.

    Args:
        function: Of tensors, to ``(outputs, aux)``.
        leaves: Where it is differentiated.
        order: How many derivatives are going to be taken, 2 if cotangents are
            differentiated as well.
        upon: Whose pullback the function is made of, if it is.

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
    ) -> None:
        self.graph: _Graph | None = None
        if is_within_transforms():
            with within_transforms():
                found = _vjp(function, leaves)
            self.outputs, self._pull, self.aux = found
            return
        if upon is None or upon.graph is None:
            run = _recorded(function, leaves, order)
        else:
            before = upon.graph
            run = _Run.of(function, leaves, 0, before.goes_on, before.surroundings)
        graph = self.graph = _Graph(run, run.outputs)
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
        grads: One tensor per leaf.
        aux: Tensors.
    """

    def __init__(self, flat: Flat, leaves: Tensors) -> None:
        self.graph: _Graph | None = None
        if is_within_transforms():
            gradient: Any = torch.func.grad_and_value(
                flat.scalar, argnums=tuple(range(len(leaves))), has_aux=True
            )
            with within_transforms():
                found = _vjp(gradient, leaves)
            self.grads, self._pull, (self.value, self.aux) = found
            return
        run = _recorded(flat.scalar_as_tuple, leaves, 2)
        with run.surroundings():  # a checkpoint runs the function again
            grads = _gradient(run.outputs[0], run.inputs)
        graph = self.graph = _Graph(run, grads)
        (self.value,) = graph.shown(run.outputs)
        self.aux = graph.shown(run.aux)
        self.grads = graph.shown(grads)

    def product(
        self, tangents: Tensors, *, is_last: bool = False, is_block: bool = False
    ) -> Tensors:
        """Return the Hessian times one tangent per leaf; see :class:`Pullback`."""
        if self.graph is None:
            return _by_torch_func(self._pull, tangents, is_block=is_block)
        return self.graph.pulled_back(tangents, is_last=is_last, is_block=is_block)

    def bytes_of_a_product(self) -> int:
        """Estimate, from above, what one more vector in a block needs."""
        return 0 if self.graph is None else self.graph.bytes_of_a_product()


class _Run(NamedTuple):
    """One run of a function with autograd looking on.

    Attributes:
        inputs: The tensors that it was given.
        outputs: What it returned.
        aux: What it returned beside.
        goes_on: Whether a derivative of what is computed from it may be asked outside.
        surroundings: The context that it ran in; a checkpoint runs it again.
    """

    inputs: Tensors
    outputs: Tensors
    aux: Tensors
    goes_on: bool
    surroundings: Callable[[], AbstractContextManager[Any]]

    @classmethod
    def of(
        cls,
        function: Function,
        leaves: Tensors,
        order: int,
        goes_on: bool,
        surroundings: Callable[[], AbstractContextManager[Any]],
    ) -> _Run:
        """Run it, to be differentiated so many times."""
        outside = _around.set(_around.get() + order)
        try:
            with surroundings(), torch.enable_grad():
                inputs = [alias(usable(leaf)) for leaf in leaves]
                outputs, aux = function(*inputs)
        finally:
            _around.reset(outside)
        return cls(inputs, outputs, aux, goes_on, surroundings)


def _recorded(function: Function, leaves: Tensors, order: int) -> _Run:
    """Run a function; again with stand-ins, if its graph is not to be relied on."""
    can_go_on = torch.is_grad_enabled()
    goes_on = can_go_on and any(leaf.requires_grad for leaf in leaves)
    total = order + max(_around.get(), goes_on)
    run = _Run.of(function, leaves, order, goes_on, partial(plainly, total))
    nodes = list(_nodes(run.outputs))
    goes_on = goes_on or (can_go_on and _leads_elsewhere(nodes, run))
    total = max(total, order + goes_on)
    run = run._replace(goes_on=goes_on)
    if _wrong(nodes, total):
        run = _Run.of(function, leaves, order, goes_on, within_transforms)
        remain = _wrong(_nodes(run.outputs), total)
        if remain:
            raise TransformError(
                "torch has no right derivative of this order of "
                + ", ".join(sorted(remain)),
                fix="Compute it by other operators, or state its derivative as a rule.",
            )
    return run


class _Graph:
    """A graph of autograd's, from the inputs of a run to outputs."""

    def __init__(self, run: _Run, outputs: Tensors) -> None:
        self.inputs, self.goes_on = run.inputs, run.goes_on
        self.surroundings = run.surroundings
        self.reached = [i for i, out in enumerate(outputs) if out.requires_grad]
        self.outputs = [outputs[i] for i in self.reached]

    def shown(self, tensors: Iterable[torch.Tensor]) -> Tensors:
        """Return tensors for the world outside: with a graph only if it goes on."""
        if self.goes_on:
            return tuple(tensors)
        return tuple(tensor.detach() for tensor in tensors)

    def pulled_back(
        self, cotangents: Tensors, *, is_last: bool = False, is_block: bool = False
    ) -> Tensors:
        """Return one cotangent per input."""
        given = [cotangents[i] for i in self.reached]
        if not given:
            return _zeros(self.inputs, cotangents[0], is_block=is_block)
        again = torch.is_grad_enabled() and (
            self.goes_on or any(tensor.requires_grad for tensor in given)
        )
        with self.surroundings():
            found = torch.autograd.grad(
                self.outputs,
                self.inputs,
                given,
                create_graph=again,
                retain_graph=again or not is_last,
                allow_unused=True,
                is_grads_batched=is_block,
            )
        values: list[torch.Tensor | None] = [*found]
        if any(value is None for value in values):
            zeros = _zeros(self.inputs, given[0], is_block=is_block)
            return [z if v is None else v for v, z in zip(values, zeros, strict=True)]
        return found

    def bytes_of_a_product(self) -> int:
        """Add up the gradients that flow along the graph's edges."""
        return sum(map(torch_compat.bytes_of_gradients, _nodes(self.outputs)))


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
        return torch.autograd.grad(
            value, inputs, create_graph=True, allow_unused=True, materialize_grads=True
        )


def _zeros(inputs: Tensors, given: torch.Tensor, *, is_block: bool) -> Tensors:
    leading = given.shape[:1] if is_block else ()
    return [x.new_zeros((*leading, *x.shape)) for x in inputs]


def _wrong(nodes: Iterable[Any], order: int) -> set[str]:
    """Return which nodes of a graph are wrong or missing at an order."""
    return {kind.__name__ for kind in set(map(type, nodes))} & wrong_at(order)


def _leads_elsewhere(nodes: Iterable[Any], run: _Run) -> bool:
    """Whether a graph has leaves that are none of its inputs: captured parameters."""
    own = {id(tensor) for tensor in run.inputs}
    if any(
        out.requires_grad and out.grad_fn is None and id(out) not in own
        for out in run.outputs
    ):
        return True
    ends = (node for node in nodes if not node.next_functions)
    leaves = (getattr(node, "variable", None) for node in ends)
    return any(leaf is not None and id(leaf) not in own for leaf in leaves)


def _nodes(outputs: Tensors) -> Iterator[Any]:
    """Yield the nodes of a graph, each once."""
    stack: list[Any] = [out.grad_fn for out in outputs if out.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)
