"""Tensors to test a rule on: like those of a call, random in no one's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = [
    "dense",
    "detached",
    "equal",
    "floating",
    "moved",
    "off_zero",
    "pattern",
    "tracked",
]


def floating(tensor: Any) -> bool:
    """Whether a value is a tensor that has derivatives."""
    return isinstance(tensor, torch.Tensor) and (
        tensor.is_floating_point() or tensor.is_complex()
    )


def detached(values: Sequence[Any]) -> list[Any]:
    """Take the tensors among the values out of their graphs."""
    return [v.detach() if isinstance(v, torch.Tensor) else v for v in values]


def tracked(values: Sequence[Any]) -> list[Any]:
    """Make leaves of a new graph of the tensors that have derivatives."""
    return [v.detach().requires_grad_() if floating(v) else v for v in values]


def off_zero(values: Sequence[Any]) -> list[Any]:
    """Put other numbers in the place of zeros, which do not move when multiplied."""
    return [
        torch.where(v == 0, pattern(v), v.detach()) if floating(v) else v
        for v in detached(values)
    ]


def moved(values: Sequence[Any]) -> list[Any]:
    """Move every number a little, and no number across zero."""
    return [v.detach() * _near_one(v) if floating(v) else v for v in values]


def _near_one(tensor: torch.Tensor) -> torch.Tensor:
    step = 16 * torch.finfo(tensor.dtype).eps
    return 1 + step * (0.5 + _fractions(tensor))


def pattern(tensor: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    """Return values between 0.5 and 1.5 in the shape of ``tensor``, drawing nothing."""
    return 0.5 + _fractions(tensor, offset)


def _fractions(tensor: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    count = torch.arange(tensor.numel(), device=tensor.device, dtype=torch.float64)
    values = (offset + 0.618033988749895 * (count + 1)) % 1
    return values.reshape(tensor.shape).to(tensor.dtype)


def equal(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Whether two results are the same, NaN for NaN, None for None."""
    if first is None or second is None:
        return first is second
    if first.shape != second.shape:
        return False
    first, second = dense(first.detach()), dense(second.detach())
    return torch.equal(torch.nan_to_num(first), torch.nan_to_num(second))


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with strides."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()
