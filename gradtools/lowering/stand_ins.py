"""Likenesses, outside of a trace, of the values that Dynamo has in it."""

from __future__ import annotations

from typing import Any

import torch

from gradtools import torch_compat

__all__ = ["Known", "Unknown"]


class Known:
    """What Dynamo knows of the arguments of the call that it follows.

    Args:
        variables: Those of the frame of the call, by name.

    Attributes:
        wanting: Stand-ins of tensors that need a gradient.
        examples: Dynamo's own tensors.
    """

    def __init__(self, variables: dict[str, Any]) -> None:
        self.variables = variables
        self.wanting: list[torch.Tensor] = []
        self.examples: list[torch.Tensor] = []

    def object(self, name: str) -> Any:
        """Return the object that a variable of the frame holds."""
        return self.variables[name].realize().value

    def objects(self, name: str) -> list[Any]:
        """Return the objects in a list of the frame; None for what is none."""
        items = self.variables[name].realize().items
        found = (getattr(item.realize(), "value", None) for item in items)
        return [None if isinstance(x, torch.Tensor) else x for x in found]

    def stand_in(self, name: str) -> Any:
        """Return what a variable of the frame stands for, tensors without values."""
        return _stand_in(self.variables[name], self.wanting, self.examples)

    def wants(self, leaf: Any) -> bool:
        """Whether the gradient of a value is wanted."""
        return isinstance(leaf, torch.Tensor) and (
            leaf.requires_grad or any(leaf is tensor for tensor in self.wanting)
        )


class Unknown(Exception):  # noqa: N818 (caught above)
    """Dynamo holds a value that has no likeness outside of a trace."""


def _stand_in(
    variable: Any, wanting: list[torch.Tensor], examples: list[torch.Tensor]
) -> Any:
    """Return what a variable of Dynamo's stands for, tensors without their values.

    Those that need a gradient are added to ``wanting``, Dynamo's to ``examples``.
    """
    variable = variable.realize()
    proxy = getattr(variable, "proxy", None)
    if proxy is not None and "example_value" in proxy.node.meta:
        example = proxy.node.meta["example_value"]
        if not isinstance(example, torch.Tensor):
            return torch_compat.hint(example)
        examples.append(example)
        shape = [torch_compat.hint(size) for size in example.shape]
        one = torch.empty((), dtype=example.dtype, device=example.device)
        tensor = one.expand(shape)  # no memory for what has no values
        if example.requires_grad:
            wanting.append(tensor)
        return tensor
    if variable.is_python_constant():
        return variable.as_python_constant()
    items = getattr(variable, "items", None)
    if isinstance(items, list):
        kind = variable.python_type()
        values = [_stand_in(item, wanting, examples) for item in items]
        return kind(*values) if hasattr(kind, "_fields") else kind(values)
    if isinstance(items, dict):
        pairs = [(key.vt.as_python_constant(), item) for key, item in items.items()]
        return {key: _stand_in(item, wanting, examples) for key, item in pairs}
    for name in ("value", "fn"):
        if hasattr(variable, name) and variable.source is not None:
            return getattr(variable, name)
    raise Unknown  # made in the trace: there is nothing outside yet
