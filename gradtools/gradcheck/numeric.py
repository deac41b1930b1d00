"""Directional derivatives: bwd against central differences.

With a random cotangent u and a random direction v, the derivative of <u, fun(x)> along
v is <bwd(u), v> if bwd is right. The difference is taken with two step sizes and
extrapolated, so that its own error is known and the tolerance follows from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradtools.gradcheck.probes import Probe, scale_of

__all__ = ["Comparison", "compare", "random_like"]

FLAT = 1e-8  # to this part of the function a derivative of zero is known

Tensors = Sequence[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An analytic and a numeric derivative along one direction.

    Attributes:
        analytic: By bwd.
        numeric: By differences.
        scale: Typical size of the derivative along a random direction.
        noise: How wrong the numeric value may be.
        size: Typical size of the function itself.
    """

    analytic: float
    numeric: float
    scale: float
    noise: float
    size: float

    @property
    def error(self) -> float:
        """Relative error, beyond what the differences themselves are wrong by."""
        beyond = max(abs(self.analytic - self.numeric) - self.noise, 0.0)
        return beyond / self.scale if self.scale else beyond

    @property
    def precision(self) -> float:
        """How well the differences are known, relative to the derivative."""
        return self.noise / self.scale if self.scale else 0.0

    @property
    def is_conclusive(self) -> bool:
        """Whether the differences mean anything."""
        fine = max(0.1 * self.scale, FLAT * self.size)
        return math.isfinite(self.numeric) and self.noise <= fine


def compare(
    fun: Callable[[Sequence[Any]], Tensors],
    bwd: Callable[[Tensors], Sequence[torch.Tensor | None]],
    probe: Probe,
    outs: Tensors,
    places: Sequence[int],
    generator: torch.Generator,
) -> Comparison:
    """Compare the derivative along one random direction of the given leaves.

    Args:
        fun: From leaves to the floating output tensors.
        bwd: From their cotangents to one cotangent per leaf.
        probe: Where the derivative is taken.
        outs: The outputs there.
        places: The leaves that move.
        generator: Where random numbers come from.
    """
    cotangents = [random_like(out, generator) for out in outs]
    directions = {
        place: random_like(probe.leaves[place], generator)
        * scale_of(probe.leaves[place])
        for place in places
    }
    values = bwd(cotangents)
    parts = [
        _products(_dense(values[place]), direction)
        for place, direction in directions.items()
        if values[place] is not None
    ]
    analytic = float(sum(part.sum() for part in parts))
    spread = math.sqrt(float(sum(part.square().sum() for part in parts)))

    def along(step: float) -> float:
        return sum(
            float(_products(cotangent, (ahead - behind) / (2 * step)).sum())
            for cotangent, ahead, behind in zip(
                cotangents,
                fun(_shifted(probe, directions, step)),
                fun(_shifted(probe, directions, -step)),
                strict=True,
            )
        )

    epsilon = max(torch.finfo(out.dtype).eps for out in (*outs, *directions.values()))
    size = math.sqrt(
        sum(
            float(_products(c, o).square().sum())
            for c, o in zip(cotangents, outs, strict=True)
        )
    )
    coarse = epsilon ** (1 / 5)  # best for the extrapolated difference
    far, near = along(coarse), along(coarse / 2)
    numeric = (4 * near - far) / 3
    noise = abs(near - far) / 3 + 10 * epsilon * size / coarse
    if not math.isfinite(numeric) or noise > 1e-4 * max(spread, abs(analytic)):
        fine = epsilon ** (1 / 3) / 10  # a kink, or the edge of the domain, is near
        far, near = along(fine), along(fine / 2)
        numeric, noise = near, abs(near - far) + 10 * epsilon * size / fine
    return Comparison(analytic, numeric, max(spread, abs(numeric)), noise, size)


def random_like(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a tensor of normal numbers in the shape of another."""
    dtype = torch.complex128 if like.is_complex() else torch.float64
    values = torch.randn(like.shape, generator=generator, dtype=dtype)
    return values.to(device=like.device, dtype=like.dtype)


def _shifted(
    probe: Probe, directions: dict[int, torch.Tensor], step: float
) -> list[Any]:
    leaves = list(probe.leaves)
    for place, direction in directions.items():
        leaves[place] = leaves[place] + step * direction
    return leaves


def _products(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Elementwise terms of the real inner product, in double precision."""
    product = first.conj() * second if first.is_complex() else first * second
    return (product.real if product.is_complex() else product).to(torch.float64)


def _dense(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor if tensor.layout is torch.strided else tensor.to_dense()
