"""Derivatives of a kernel by central differences, as kernels themselves.

Along one number the derivative is ``(f(x + h) - f(x - h)) / 2h``. With the step
``h = eps**(1/3) * max(|x|, rms(x))``, eps being the argument's machine precision, the
errors of rounding and of truncation are about equal, some ``eps**(2/3)`` of the
function: 4e-11 in float64, 2e-5 in float32 (Press et al., Numerical Recipes, 5.7). A
gradient takes two runs for every number; a tangent two for every argument that moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gradtools import trees
from gradtools.rules.signature import is_differentiable

__all__ = ["bwd_by_differences", "jvp_by_differences"]


def bwd_by_differences(
    kernel: Any, external: Callable[..., Any], **options: Any
) -> Callable[..., Any]:
    """Return the bwd of a kernel by differences.

    Args:
        kernel: What is to be differentiated.
        external: Makes kernels of functions.
        options: Of the kernel that the gradient is.
    """

    def wanted(entries: Any, cotangent: Any, needs: str) -> list[torch.Tensor]:
        leaves = trees.flatten(tuple(entries))[0]
        return [leaf for leaf, need in zip(leaves, needs, strict=True) if need == "1"]

    def gradient(entries: Any, cotangent: Any, needs: str) -> list[torch.Tensor]:
        leaves, spec = trees.flatten(tuple(entries))
        return [
            _gradient(_Moved(kernel, leaves, spec, place), cotangent)
            for place, need in enumerate(needs)
            if need == "1"
        ]

    gradient.__name__ = f"gradient_of_{kernel.name}"
    operator = external(gradient, out=wanted, allow_nan=True, **options)

    def bwd(residuals: Any, cotangent: Any, *, needs: Any) -> Any:
        entries, _ = residuals
        flags, spec = trees.flatten(needs)
        marks = "".join("1" if flag else "0" for flag in flags)
        rest = iter(operator(entries, cotangent, marks))
        return trees.unflatten([next(rest) if f else None for f in flags], spec)

    return bwd


def jvp_by_differences(
    rule: Any, external: Callable[..., Any], **options: Any
) -> Callable[..., Any]:
    """Return the jvp rule of an external by differences; see bwd_by_differences."""
    kernel = rule.kernel

    def moving(primals: Any, tangents: Any) -> list[torch.Tensor]:
        return _floating(kernel.like(primals))

    def tangent(primals: Any, tangents: Any) -> list[torch.Tensor]:
        leaves, spec = trees.flatten(tuple(primals))
        moved = trees.flatten(tuple(tangents))[0]
        total = [torch.zeros_like(x) for x in _floating(kernel.like(primals))]
        for place, move in enumerate(moved):
            if is_differentiable(leaves[place]) and bool(move.any()):
                slopes = _along(_Moved(kernel, leaves, spec, place), move)
                total = [t + s.to(t.dtype) for t, s in zip(total, slopes, strict=True)]
        return total

    tangent.__name__ = f"tangent_of_{kernel.name}"
    operator = external(tangent, out=moving, allow_nan=True, **options)

    def jvp(primals: Any, tangents: Any) -> Any:
        out = kernel.parameters.call(rule, primals)
        rest = iter(operator(primals, tangents))
        leaves, spec = trees.flatten(out)
        slopes = [next(rest) if is_differentiable(x) else None for x in leaves]
        return out, trees.unflatten(slopes, spec)

    return jvp


class _Moved:
    """A kernel as a function of one of its arguments."""

    def __init__(
        self, kernel: Any, leaves: Sequence[Any], spec: trees.Spec, place: int
    ) -> None:
        self.kernel = kernel
        self.leaves = leaves
        self.spec = spec
        self.place = place
        self.at: torch.Tensor = leaves[place]
        eps = torch.finfo(self.at.dtype).eps
        self.relative = eps ** (1 / 3)
        size = self.at.abs().to(torch.float64)
        mean = size.square().mean().sqrt() if size.numel() else size.new_ones(())
        self.scale = torch.where(mean > 0, mean, 1.0)
        self.steps = self.relative * size.clamp(min=self.scale.item())

    def __call__(self, value: torch.Tensor) -> list[torch.Tensor]:
        """Return the floating outputs."""
        leaves = list(self.leaves)
        leaves[self.place] = value
        entries = trees.unflatten(leaves, self.spec)
        return _floating(self.kernel.run_entries(entries))

    def difference(self, move: torch.Tensor) -> list[torch.Tensor]:
        """Return the change of the outputs from one side to the other, widened."""
        ahead, behind = self(self.at + move), self(self.at - move)
        return [_wide(a) - _wide(b) for a, b in zip(ahead, behind, strict=True)]


def _gradient(moved: _Moved, cotangent: Any) -> torch.Tensor:
    """Return the gradient, number by number: the conjugate derivative, as torch's."""
    given = [c for c in trees.flatten(cotangent)[0] if is_differentiable(c)]
    found = torch.zeros_like(moved.at).flatten()
    units = (1.0, 1j) if found.is_complex() else (1.0,)
    for number, step in enumerate(moved.steps.flatten().tolist()):
        for unit in units:
            move = torch.zeros_like(moved.at).flatten()
            move[number] = step * unit
            move = move.reshape(moved.at.shape)
            width = (moved.at + move - (moved.at - move)).abs().max().item()
            parts = zip(given, moved.difference(move), strict=True)
            slope = sum(_inner(g, change) for g, change in parts) / width
            found[number] += slope * unit
    return found.reshape(moved.at.shape)


def _along(moved: _Moved, tangent: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the slope of each output along a tangent of the argument."""
    size = _wide(tangent).abs().square().mean().sqrt()
    step = (moved.relative * moved.scale / size).item()
    for change in moved.difference(step * tangent):
        yield change / (2 * step)


def _inner(first: torch.Tensor, second: torch.Tensor) -> float:
    product = _wide(first).conj() * second
    return (product.real if product.is_complex() else product).sum().item()


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _floating(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in trees.flatten(tree)[0] if is_differentiable(leaf)]
