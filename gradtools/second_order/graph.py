"""A run of a function that autograd records, and the graph that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.overrides import has_torch_function

from gradtools import torch_compat
from gradtools.errors import TransformError
from gradtools.gradcheck.surroundings import buffers_kept
from gradtools.lowering.forward_mode import alias
from gradtools.second_order.primals import Tensors
from gradtools.second_order.sound import plainly, usable, within_transforms
from gradtools.second_order.stand_ins import wrong_at

__all__ = ["Function", "Graph", "Run", "captures", "pulled_back", "recorded"]

Function = Callable[..., tuple[Tensors, Tensors]]

_around: ContextVar[int] = ContextVar("_around", default=0)
"""How many derivatives are taken, by what is here, of what runs now."""


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


def recorded(
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
        with buffers_kept([function]):  # the first run has updated them
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
                found = pulled_back(
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


def pulled_back(
    outputs: Tensors,
    inputs: Tensors,
    cotangents: Tensors,
    *,
    create_graph: bool,
    retain_graph: bool = True,
) -> Sequence[torch.Tensor | None]:
    """Call ``torch.autograd.grad`` for cotangents that are known to fit.

    It compares each with its output by symbolic shapes, 5 us a time.
    """
    if has_torch_function((*outputs, *inputs)):  # of a subclass, or of a mode
        return torch.autograd.grad(
            outputs,
            inputs,
            cotangents,
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    return torch_compat.run_backward(
        tuple(outputs),
        tuple(cotangents),
        retain_graph,
        create_graph,
        tuple(inputs),
        True,  # an input that nothing depends on gets None
        accumulate_grad=False,
    )


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
