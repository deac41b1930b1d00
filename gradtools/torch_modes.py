"""Who looks on when torch computes, and what has no memory of its own.

A part of :mod:`.torch_compat`: private names of torch's that kernels need to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gradtools.torch_compat import is_foreign_subclass, is_wrapped

__all__ = [
    "asks_for_values",
    "dispatch_modes",
    "edited_outputs_lose_gradients",
    "function_modes",
    "is_intercepted",
    "version_of",
]

dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many modes see every operation: in a trace at least one."""

function_modes: Callable[[], int] = torch._C._len_torch_function_stack
"""How many modes see every call of a function of torch's."""

edited_outputs_lose_gradients: bool = torch.__version__ < "2.13"
"""In a trace of Dynamo's, of a Function whose forward edits in place what it returns.

The gradient is zero then, without a sign. A view of the output has it.
"""

_USUAL = (torch.Tensor, torch.nn.Parameter)


def is_intercepted(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors have no memory of their own, or a mode wants to see operations.

    True in traces (fake tensors), under transforms, for meta tensors and DTensors.
    """
    if dispatch_modes():
        return True
    for tensor in tensors:
        if (
            is_wrapped(tensor)
            or tensor.is_meta
            or (type(tensor) not in _USUAL and is_foreign_subclass(tensor))
        ):
            return True
    return False


def version_of(tensor: torch.Tensor) -> int:
    """Return how often torch has edited a tensor in place; 0 where nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def asks_for_values(error: Exception) -> bool:
    """Whether code has raised because tensors of a trace have no values."""
    return type(error).__name__ in _ASKS_FOR_VALUES  # two of them are slow to import


_ASKS_FOR_VALUES = {
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "GuardOnDataDependentSymNode",
}
