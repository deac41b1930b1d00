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
    in_forward_mode,
    is_under_way,
    is_within_transforms,
    plainly,
    usable,
    within_transforms,
)
from gradtools.second_order.stand_ins import wrong_at

__all__ = ["Gradient", "Graph", "Products", "Pullback", "Run", "captures"]

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
            run = _recorded(function, leaves, order, run)
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
        run = _recorded(flat.scalar_as_tuple, leaves, 2)
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


class Run(NamedTuple):
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
    ) -> Run:
        """Run it, to be differentiated so many times."""
        outside = _around.set(_around.get() + order)
        try:
            with surroundings(), torch.enable_grad():
                inputs = [_input(leaf) for leaf in leaves]
                outputs, aux = function(*inputs)
        finally:
            _around.reset(outside)
        return cls(inputs, outputs, aux, goes_on, surroundings)


def _input(leaf: torch.Tensor) -> torch.Tensor:
    leaf = usable(leaf)
    return alias(leaf) if leaf.requires_grad else leaf.detach().requires_grad_()


def _recorded(
    function: Function, leaves: Tensors, order: int, run: Run | None = None
) -> Run:
    """Run a function; again with stand-ins, if its graph is not to be relied on."""
    can_go_on = torch.is_grad_enabled()
    goes_on = can_go_on and any(leaf.requires_grad for leaf in leaves)
    total = order + max(_around.get(), goes_on)
    if run is None:
        run = Run.of(function, leaves, order, goes_on, partial(plainly, total))
    kinds, ends = _looked_through(run)
    if can_go_on and not goes_on and _are_elsewhere(ends, run):
        total = max(total, order + 1)
        run = run._replace(goes_on=True)
    if _wrong(kinds, total):
        run = Run.of(function, leaves, order, run.goes_on, within_transforms)
        remain = _wrong(_looked_through(run)[0], total)
        if remain:
            raise TransformError(
                "torch has no right derivative of this order of "
                + ", ".join(sorted(remain)),
                fix="Compute it by other operators, or state its derivative as a rule.",
            )
    return run


class Graph:
    """A graph of autograd's, from the inputs of a run to outputs.

    Args:
        run: The run.
        outputs: What it returned, or what has been computed from that.
    """

    def __init__(self, run: Run, outputs: Tensors) -> None:
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
        """Return one cotangent per input; see :class:`Pullback`."""
        given = [cotangents[i] for i in self.reached]
        if not given:
            return _zeros(self.inputs, cotangents[0], is_block=is_block)
        again = torch.is_grad_enabled() and (
            self.goes_on or any(tensor.requires_grad for tensor in given)
        )
        found: Any
        with self.surroundings():
            if is_block:
                found = torch.autograd.grad(
                    self.outputs,
                    self.inputs,
                    given,
                    create_graph=again,
                    retain_graph=again or not is_last,
                    allow_unused=True,
                    is_grads_batched=True,
                )
            else:
                found = torch_compat.pulled_back(
                    self.outputs,
                    self.inputs,
                    given,
                    create_graph=again,
                    retain_graph=again or not is_last,
                )
        missing = [place for place, value in enumerate(found) if value is None]
        if missing:
            unused = [self.inputs[place] for place in missing]
            zeros = _zeros(unused, given[0], is_block=is_block)
            found = list(found)
            for place, zero in zip(missing, zeros, strict=True):
                found[place] = zero
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
        found = torch_compat.pulled_back(
            [value], inputs, [torch.ones_like(value)], create_graph=True
        )
        return [
            torch.zeros_like(tensor) if grad is None else grad
            for grad, tensor in zip(found, inputs, strict=True)
        ]


def _zeros(inputs: Tensors, given: torch.Tensor, *, is_block: bool) -> Tensors:
    leading = given.shape[:1] if is_block else ()
    return [x.new_zeros((*leading, *x.shape)) for x in inputs]


def _wrong(kinds: set[type], order: int) -> set[str]:
    """Return which nodes of a graph are wrong or missing at an order."""
    return {kind.__name__ for kind in kinds} & wrong_at(order)


def captures(run: Run) -> bool:
    """Whether a graph has leaves that are none of its inputs: captured parameters."""
    return _are_elsewhere(_looked_through(run)[1], run)


def _are_elsewhere(ends: list[Any], run: Run) -> bool:
    own = set(map(id, run.inputs))
    return any(id(leaf) not in own for leaf in ends)


def _looked_through(run: Run) -> tuple[set[type], list[Any]]:
    """Return the kinds of nodes in the graph of a run, and its leaves.

    What is before the inputs is no part of it: whoever made that has looked there.
    """
    seen = {tensor.grad_fn for tensor in run.inputs if tensor.grad_fn is not None}
    stack: list[Any] = []
    kinds: set[type] = set()
    leaves: list[Any] = []
    for out in run.outputs:
        if out.grad_fn is not None:
            stack.append(out.grad_fn)
        elif out.requires_grad:
            leaves.append(out)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        kinds.add(type(node))
        below = node.next_functions
        for other, _ in below:
            if other is not None and other not in seen:
                stack.append(other)
        if not below and (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
    return kinds, leaves


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
