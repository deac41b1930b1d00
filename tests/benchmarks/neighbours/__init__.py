"""Function classes of other libraries, with arguments for them.

Each module has ``CASES``: by name, a function of a device that returns a :class:`Case`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Case", "harvest"]


@dataclasses.dataclass
class Case:
    """A class, the arguments of a call, and what a user would tell ``lift``.

    Attributes:
        function: The class.
        args: What ``apply`` is given; gradients are wanted of what requires one.
        options: Of ``lift``.
    """

    function: type[torch.autograd.Function]
    args: tuple[Any, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def harvest(
    function: type[torch.autograd.Function], run: Callable[[], Any]
) -> tuple[Any, ...]:
    """Run a library's own code; return what it calls ``function.apply`` with."""
    found: list[tuple[Any, ...]] = []
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is function:
            found.append(args)
        return original.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)
    try:
        run()
    finally:
        torch.autograd.Function.apply = original
    if not found:
        raise LookupError(f"{function.__name__}.apply was not called")
    return tuple(map(_leaf, found[0]))


def _leaf(value: Any) -> Any:
    if isinstance(value, torch.nn.Parameter) or not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)
