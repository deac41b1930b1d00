"""Outputs that a Function class marks as non-differentiable."""

from __future__ import annotations

from typing import Any

import torch

from gradtools.lowering.residuals import Remark

__all__ = ["Bits"]


class Bits(Remark):
    """Floating outputs that are marked non-differentiable, travelling as integers.

    A rule's floating outputs all have a derivative. An integer has none, for torch and
    for the check, so such an output crosses as its bits, which costs a view.

    Attributes:
        dtypes: By position of the output: its dtype.
        is_tuple: Forward returned a tuple.
    """

    __slots__ = ("dtypes", "is_tuple")

    def __init__(self, dtypes: dict[int, torch.dtype], is_tuple: bool) -> None:
        self.dtypes = dtypes
        self.is_tuple = is_tuple

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Bits)
            and self.dtypes == other.dtypes
            and self.is_tuple == other.is_tuple
        )

    def __hash__(self) -> int:
        return hash(self.is_tuple)

    @classmethod
    def hide(cls, out: Any, marked: tuple[Any, ...]) -> Any:
        """Return the outputs with such ones among them as integers."""
        if not marked:
            return out
        outs = out if isinstance(out, tuple) else (out,)
        dtypes = {
            index: value.dtype
            for index, value in enumerate(outs)
            if isinstance(value, torch.Tensor)
            and (value.is_floating_point() or value.is_complex())
            and any(value is tensor for tensor in marked)
        }
        if not dtypes:
            return out
        hidden = [
            _to_bits(value) if index in dtypes else value
            for index, value in enumerate(outs)
        ]
        return (*hidden, cls(dtypes, isinstance(out, tuple)))

    def undone(self, outs: tuple[Any, ...]) -> Any:
        """Return the outputs as forward returned them."""
        shown = tuple(
            _from_bits(value, self.dtypes[index]) if index in self.dtypes else value
            for index, value in enumerate(outs)
        )
        return shown if self.is_tuple else shown[0]


def _to_bits(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.view(_INTEGERS[tensor.dtype.itemsize])


def _from_bits(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_complex:
        return torch.view_as_complex(tensor.view(dtype.to_real()))
    return tensor.view(dtype)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
