"""Arguments of a Function class that say whether a gradient is wanted of them.

torch hands forward its inputs as they are, so ``x.requires_grad`` tells a class whether
to compute a gradient on the way. A rule runs on bare tensors as well, in a check and
below a transform. There aliases of them say it, which costs a view. Where gradients are
on, an alias would have a graph of its own, and a mode answers for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gradtools import torch_compat, trees

__all__ = ["Aliases", "answered", "marked"]


class Aliases:
    """Tensors that stand for others while a class runs.

    Attributes:
        pairs: By id of the alias: the alias, which so stays alive, and the tensor.
    """

    __slots__ = ("pairs",)

    def __init__(self) -> None:
        self.pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def __contains__(self, tensor: Any) -> bool:
        return id(tensor) in self.pairs

    def undone(self, value: Any) -> Any:
        """Return a value with the tensors themselves; one without aliases as it is."""
        if not self.pairs:
            return value
        if isinstance(value, torch.Tensor):
            return self.pairs.get(id(value), (value, value))[1]
        if trees.is_leaf(value):
            return value
        if type(value) in (list, tuple):
            return type(value)([self.undone(x) for x in value])
        if type(value) is dict:
            return {key: self.undone(x) for key, x in value.items()}
        leaves, spec = trees.flatten(value)  # which makes a plain tuple of torch.Size
        if not any(isinstance(x, torch.Tensor) and x in self for x in leaves):
            return value
        return trees.unflatten(map(self.undone, leaves), spec)


def marked(
    args: Sequence[Any], wanted: Sequence[bool]
) -> tuple[tuple[Any, ...], Aliases]:
    """Return arguments that require a gradient where, and only where, it is wanted.

    Where an alias would not do they are returned as they are, for :func:`answered`.
    """
    aliases, given = Aliases(), list(args)
    if _is_followed():
        return tuple(given), aliases
    moving = torch_compat.forward_ad_active()
    for place, (arg, want) in enumerate(zip(args, wanted, strict=True)):
        if not isinstance(arg, torch.Tensor) or arg.requires_grad is want:
            continue
        if want or not moving:  # without the flag it would lose its tangent
            given[place] = alias = _alias(arg) if want else arg.detach()
            aliases.pairs[id(alias)] = alias, arg
    return tuple(given), aliases


def _is_followed() -> bool:
    """Whether an alias would get a graph, or a transform forbid its flag."""
    return torch.is_grad_enabled() or torch_compat.transforms_active()


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same memory, requiring a gradient; a view does not lose a tangent."""
    is_strided = tensor.layout is torch.strided
    other = tensor.view_as(tensor) if is_strided else tensor.detach()
    return other.requires_grad_()


def answered(
    args: Sequence[Any], wanted: Sequence[bool]
) -> contextlib.AbstractContextManager[Any]:
    """Have arguments say so where gradients are on, or a transform is.

    A class that runs again for a second derivative must keep what it kept the first
    time, whichever of its arguments are being differentiated now.
    """
    if not _is_followed():
        return contextlib.nullcontext()
    answers = {
        id(arg): want
        for arg, want in zip(args, wanted, strict=True)
        if isinstance(arg, torch.Tensor) and arg.requires_grad is not want
    }
    return _Answers(answers) if answers else contextlib.nullcontext()


class _Answers(TorchFunctionMode):
    """Says of tensors, by id, whether they require a gradient."""

    def __init__(self, answers: dict[int, bool]) -> None:
        super().__init__()
        self.answers = answers

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func == _FLAG.__get__ and id(args[0]) in self.answers:
            return self.answers[id(args[0])]
        return func(*args, **(kwargs or {}))


_FLAG: Any = torch.Tensor.requires_grad
