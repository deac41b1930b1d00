"""Tensors as numpy arrays and back, without a copy where that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gradtools.errors import DefinitionError
from gradtools.rules.signature import Meta

__all__ = ["array_of", "is_shared", "tensor_of"]


def array_of(tensor: torch.Tensor, where: str) -> np.ndarray:
    """Return a tensor as an array that cannot be written to.

    The memory is the tensor's own on the CPU, a copy of it from elsewhere.

    Args:
        tensor: Without a graph.
        where: The kernel, for the message.
    """
    try:
        array = tensor.cpu().numpy()
    except TypeError:  # bfloat16, float8
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise DefinitionError(
            f"numpy has no {dtype}, and the kernel takes arrays",
            rule=where,
            fix="Convert the argument with .to(torch.float32), or take tensors: leave "
            "out numpy=True.",
        ) from None
    array.flags.writeable = False
    return array


def tensor_of(value: Any, meta: Meta) -> Any:
    """Return an array, or a number of numpy's, as a tensor; anything else as it is.

    Args:
        value: What a kernel returned.
        meta: What it should be like; its device is where the tensor goes.
    """
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    array = np.asarray(value)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()  # torch knows neither
    try:
        return torch.from_numpy(array).to(meta.device)
    except (TypeError, ValueError):  # strings, objects; another byte order
        return value


def is_shared(value: Any, given: Sequence[torch.Tensor]) -> bool:
    """Whether a returned array is memory of an argument, which tensor_of would copy."""
    if not isinstance(value, np.ndarray) or value.flags.writeable:
        return False
    return any(t.is_cpu and np.may_share_memory(value, t.numpy()) for t in given)
