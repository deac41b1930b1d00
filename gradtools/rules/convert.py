"""closure_convert: captured tensors become arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gradtools import torch_compat, trees
from gradtools.errors import DefinitionError
from gradtools.lowering.captures import is_without_gradient, needs_gradient
from gradtools.lowering.contents import Converted, name_of
from gradtools.probing import probing

__all__ = ["Exchange", "closure_convert"]


def closure_convert(
    fn: Callable[..., Any], *example_args: Any
) -> tuple[Converted, tuple[torch.Tensor, ...]]:
    """Turn the tensors that a function captures into arguments of it.

    A rule gives a gradient to its arguments and to nothing else. Where a function holds
    tensors that need one, in a closure, a global, or as an nn.Module's parameters, this
    finds them, so that they can be handed to a rule (``jax.closure_convert``).

    Args:
        fn: A function, or an nn.Module.
        example_args: Arguments to run it on, once, to see what it uses.

    Returns:
        A pair ``(converted, captured)`` with ``converted(*args, *captured)`` equal to
        ``fn(*args)``. ``captured`` are the tensors that require a gradient, or belong
        to an active transform, and are no arguments, in the order of their first use.

    Raises:
        DefinitionError: A captured tensor is used where it cannot be exchanged, such as
            inside a hand-written ``autograd.Function``.

    Example:
        >>> scale = torch.tensor(2.0, requires_grad=True)
        >>> converted, captured = gt.closure_convert(lambda x: scale * x, torch.ones(3))
        >>> converted(torch.ones(3), *captured)
        tensor([2., 2., 2.], grad_fn=<MulBackward0>)
    """
    captured = tuple(_captured_by(fn, example_args))
    count = len(example_args)

    def exchanged(*args: Any) -> Any:
        given = args[count:]
        if len(given) != len(captured):
            raise DefinitionError(
                f"the converted function takes {count} arguments and then the "
                f"{len(captured)} captured tensors; got {len(args)} in all",
                fix="Call converted(*args, *captured).",
            )
        with Exchange(captured, given):
            return fn(*args[:count])

    converted = Converted(exchanged)
    if not torch_compat.transforms_active():  # there, Functions are exchanged as well
        _refuse_remaining(fn, converted, example_args, captured)
    return converted, captured


class _Collect(TorchFunctionMode):
    """Collect the tensors that torch functions meet and that did not come from them."""

    def __init__(self, arguments: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {id(tensor): tensor for tensor in arguments}
        self.found: dict[int, torch.Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        produced = {id(tensor): tensor for tensor in _tensors(result)}
        is_metadata = getattr(func, "__name__", "") == "__get__" and not produced
        if not (is_metadata or is_without_gradient(func)):
            for tensor in _tensors((args, kwargs)):
                if id(tensor) not in self.known and needs_gradient(tensor):
                    self.found[id(tensor)] = self.known[id(tensor)] = tensor
        self.known |= produced
        return result


class Exchange(TorchFunctionMode):
    """Put other tensors in the place of the captured ones."""

    def __init__(
        self, captured: tuple[torch.Tensor, ...], given: tuple[Any, ...]
    ) -> None:
        super().__init__()
        self.given = {id(old): new for old, new in zip(captured, given, strict=True)}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = _exchanged((args, kwargs or {}), self.given)
        return func(*args, **kwargs)


def _exchanged(value: Any, given: dict[int, Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return given.get(id(value), value)
    if type(value) in (tuple, list):
        return type(value)(_exchanged(item, given) for item in value)
    if type(value) is dict:
        return {key: _exchanged(item, given) for key, item in value.items()}
    return value


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in trees.flatten(tree)[0] if isinstance(leaf, torch.Tensor))


def _captured_by(fn: Callable[..., Any], args: tuple[Any, ...]) -> list[torch.Tensor]:
    with probing(), _Collect(list(_tensors(args))) as collected:
        fn(*args)
    # What a transform within fn has made of its own is none of what it captures.
    return [
        tensor
        for tensor in collected.found.values()
        if torch_compat.is_at_open_level(tensor)
    ]


def _refuse_remaining(
    fn: Callable[..., Any],
    converted: Converted,
    args: tuple[Any, ...],
    captured: tuple[torch.Tensor, ...],
) -> None:
    """Raise where the converted function's graph still leads to a captured leaf."""
    fresh = [t.detach().requires_grad_(t.requires_grad) for t in captured]
    with probing(), torch.enable_grad():
        plain = trees.map_tensors(torch.Tensor.detach, args)
        out = converted(*plain, *fresh)
    allowed = {id(tensor) for tensor in fresh}
    for leaf in _leaves_of_graph(_tensors(out)):
        if id(leaf) not in allowed:
            raise DefinitionError(
                "closure_convert: a captured tensor reaches the result past torch's "
                f"functions: {name_of(leaf, fn)}",
                fix="Pass it as an argument by hand; inside a hand-written "
                "autograd.Function it cannot be exchanged.",
            )


def _leaves_of_graph(tensors: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    stack: list[Any] = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            stack.append(tensor.grad_fn)
        elif tensor.requires_grad:
            yield tensor
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack += [below for below, _ in node.next_functions if below is not None]
