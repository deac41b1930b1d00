"""Directional derivatives by differences, whose own error is known.

With a cotangent u and a direction v, the derivative of <u, fun(x)> along v is
<bwd(u), v> if bwd is right. The difference is central, taken with two step sizes and
extrapolated (Richardson), so that the tolerance follows from what the differences
themselves are wrong by.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradtools.gradcheck.probes import Probe, scale_of

__all__ = [
    "Comparison",
    "Slope",
    "compare",
    "dense",
    "difference",
    "direction",
    "products",
    "signs",
    "slope",
]

FLAT = 1e-8  # to this part of the function a derivative of zero is known
COARSE_FLAT = 1e-4  # likewise by a function that takes nothing finer than float32

Tensors = Sequence[torch.Tensor]
Optional = Sequence[torch.Tensor | None]
Function = Callable[[Sequence[Any]], Tensors]
Moves = dict[int, torch.Tensor]


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
        if not math.isfinite(self.analytic):
            return math.inf
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

    @property
    def vanishes(self) -> bool:
        """Whether nothing moves at all, as far as numbers of single precision tell.

        In double precision such a zero is conclusive.
        """
        still = self.analytic == self.numeric == 0
        return still and 0 < self.noise <= COARSE_FLAT * self.size


@dataclasses.dataclass(frozen=True)
class Slope:
    """How the outputs move along a direction.

    Attributes:
        moves: The direction, per leaf.
        value: The derivative of each output along it.
        doubt: How wrong each number may be, from the two step sizes.
        rounding: How wrong it may be for each unit of the output, from rounding.
    """

    moves: Moves
    value: Tensors
    doubt: Tensors
    rounding: float


def slope(
    fun: Function,
    probe: Probe,
    moves: Moves,
    dtypes: Sequence[torch.dtype],
    *,
    closely: bool = False,
    finely: bool = False,
) -> Slope:
    """Return the slope of a function along a direction; in four evaluations.

    Where the function bends too much for a large step, a kink or the edge of its
    domain is near: a small step is taken then, in four more.

    Args:
        fun: From leaves to floating tensors.
        probe: Where.
        moves: The direction.
        dtypes: Those of the numbers that come in and out.
        closely: Take a step between the two as well, for the last digits.
        finely: Take the small step only, in which nothing has room to oscillate.
    """
    epsilon = max(torch.finfo(dtype).eps for dtype in dtypes)
    coarse = epsilon ** (1 / 5)  # best for the extrapolated difference
    steps = [] if finely else [coarse, coarse / 8] if closely else [coarse]
    best: Slope | None = None
    for step in steps:
        found = _extrapolated(fun, probe, moves, step, 10 * epsilon / step)
        best = _better(found, best)
        if _norm(found.doubt) <= (1e-6 if closely else 1e-4) * _norm(found.value):
            return best
    fine = epsilon ** (1 / 3) / 10
    wide = difference(fun, probe, moves, fine)
    narrow = difference(fun, probe, moves, fine / 2)
    doubt = [n - w for n, w in zip(narrow, wide, strict=True)]
    return _better(Slope(moves, narrow, doubt, 10 * epsilon / fine), best)


def _extrapolated(
    fun: Function, probe: Probe, moves: Moves, step: float, rounding: float
) -> Slope:
    wide = difference(fun, probe, moves, step)
    narrow = difference(fun, probe, moves, step / 2)
    pairs = list(zip(narrow, wide, strict=True))
    value = [(4 * n - w) / 3 for n, w in pairs]
    return Slope(moves, value, [(n - w) / 3 for n, w in pairs], rounding)


def _better(found: Slope, best: Slope | None) -> Slope:
    """Return the slope whose numbers are known better."""
    if best is None or not math.isfinite(_norm(best.doubt)):
        return found
    return found if _norm(found.doubt) < _norm(best.doubt) else best


def difference(fun: Function, probe: Probe, moves: Moves, step: float) -> Tensors:
    """Return the central difference of each output along a direction."""
    ahead, behind = (
        fun(_shifted(probe, moves, step)),
        fun(_shifted(probe, moves, -step)),
    )
    return [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]


def _norm(tensors: Tensors) -> float:
    squares = [torch.linalg.vector_norm(t).item() ** 2 for t in tensors]
    return math.sqrt(sum(squares))


def _shifted(probe: Probe, moves: Moves, step: float) -> list[Any]:
    leaves = list(probe.leaves)
    for place, move in moves.items():
        leaves[place] = leaves[place] + step * move
    return leaves


def compare(
    found: Slope, outs: Tensors, cotangents: Tensors, values: Optional
) -> Comparison:
    """Compare what bwd returned for some cotangents with a slope.

    Args:
        found: The slope.
        outs: The floating outputs of the function.
        cotangents: Theirs.
        values: What bwd returned, one per leaf.
    """
    parts = [
        products(dense(value), move)
        for place, move in found.moves.items()
        if (value := values[place]) is not None
    ]
    analytic = float(sum(part.sum() for part in parts))
    spread = math.sqrt(float(sum(part.square().sum() for part in parts)))
    numeric = _inner(cotangents, found.value)
    doubts = [products(c, d) for c, d in zip(cotangents, found.doubt, strict=True)]
    doubt = max(
        abs(float(sum(part.sum() for part in doubts))),
        math.sqrt(float(sum(part.square().sum() for part in doubts))),
    )
    parts = [products(c, o).square() for c, o in zip(cotangents, outs, strict=True)]
    size = math.sqrt(float(sum(part.sum() for part in parts)))
    scale = max(spread if math.isfinite(spread) else 0.0, abs(numeric))
    return Comparison(analytic, numeric, scale, doubt + found.rounding * size, size)


def _inner(first: Tensors, second: Tensors) -> float:
    return float(sum(products(a, b).sum() for a, b in zip(first, second, strict=True)))


def signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw numbers of random sign and of sizes between 0.5 and 1.5, none near zero."""
    shape = (*like.shape, 2) if like.is_complex() else like.shape
    values = torch.rand(  # a generator draws on its own device, not on the default one
        shape, generator=generator, dtype=torch.float64, device=generator.device
    )
    values = values * 2 - 1
    values += 0.5 * values.sign()
    if like.is_complex():
        values = torch.view_as_complex(values)
    return values.to(device=like.device, dtype=like.dtype)


def direction(
    probe: Probe,
    places: Sequence[int],
    generator: torch.Generator,
    values: Sequence[Optional] = (),
    *,
    part: float = 1.0,
    relative: bool = False,
) -> Moves:
    """Draw a direction in which the leaves at some places move.

    Args:
        probe: The leaves.
        places: Those that move.
        generator: Where random numbers come from.
        values: What bwd returned; an argument with much to say moves less then, so
            that it does not drown the others.
        part: Move this part of the numbers only.
        relative: Move every number in proportion to its size, so that hardly one
            crosses zero, where logarithms and the like end.
    """
    moves: Moves = {}
    for place in places:
        leaf = probe.leaves[place]
        scale = scale_of(leaf)
        move = signs(leaf, generator) * (
            leaf.abs() + 1e-3 * scale if relative else scale
        )
        if part < 1:
            drawn = torch.rand(leaf.shape, generator=generator, device=generator.device)
            move = move * (drawn < part).to(leaf.device)
        moves[place] = move
    said = {p: _said(values, p, move) for p, move in moves.items()}
    least = min((s for s in said.values() if s > 0), default=0.0)
    return {
        place: move * max(least / said[place], 1e-3) if said[place] > least else move
        for place, move in moves.items()
    }


def _said(values: Sequence[Optional], place: int, move: torch.Tensor) -> float:
    spoken = [dense(v) for some in values if (v := some[place]) is not None]
    size = sum(float(products(value, move).square().sum()) for value in spoken)
    return math.sqrt(size) if math.isfinite(size) else 0.0


def products(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Elementwise terms of the real inner product, in double precision."""
    product = first.conj() * second if first.is_complex() else first * second
    return (product.real if product.is_complex() else product).to(torch.float64)


def dense(tensor: torch.Tensor | None) -> torch.Tensor:
    """Return a tensor as a strided one."""
    assert tensor is not None
    return tensor if tensor.layout is torch.strided else tensor.to_dense()
