"""Products by central differences of autograd's first derivative: the reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

STEPS = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4)


def floating(tree: Any) -> list[torch.Tensor]:
    """Return the tensors of a tree that are differentiated."""
    return [x for x in pytree.tree_leaves(tree) if is_floating(x)]


def is_floating(value: Any) -> bool:
    """Whether a leaf is differentiated."""
    return isinstance(value, torch.Tensor) and (
        value.dtype.is_floating_point or value.dtype.is_complex
    )


def directions(primals: Any, seed: int) -> Any:
    """Return random tangents, None for what has none."""
    generator = torch.Generator().manual_seed(seed)
    return pytree.tree_map(
        lambda x: (
            torch.randn(x.shape, dtype=x.dtype, generator=generator)
            if is_floating(x)
            else None
        ),
        primals,
    )


def product(
    f: Callable[..., torch.Tensor], primals: Any, tangents: Any
) -> tuple[list[torch.Tensor], float]:
    """Return the Hessian times tangents, and the error of that by its own measure."""
    moves = floating(tangents)

    def gradient(step: float) -> list[torch.Tensor]:
        rest = iter(moves)
        args = pytree.tree_map(
            lambda x: (
                (x + step * next(rest)).detach().requires_grad_()
                if is_floating(x)
                else x
            ),
            primals,
        )
        return list(
            torch.autograd.grad(f(*args), floating(args), materialize_grads=True)
        )

    def central(step: float) -> list[torch.Tensor]:
        pairs = zip(gradient(step), gradient(-step), strict=True)
        return [(a - b) / (2 * step) for a, b in pairs]

    def extrapolated(step: float) -> list[torch.Tensor]:
        near, far = central(step / 2), central(step)
        return [(4 * a - b) / 3 for a, b in zip(near, far, strict=True)]

    tries = [extrapolated(step) for step in STEPS]
    gaps = [distance(a, b) for a, b in itertools.pairwise(tries)]
    best = min(range(len(gaps)), key=gaps.__getitem__)
    return tries[best + 1], gaps[best]


def distance(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Return how far two lists are apart, relative to the second."""
    far = norm([a - b for a, b in zip(found, wanted, strict=True)])
    return far / max(norm(wanted), 1e-6)


def norm(tensors: list[torch.Tensor]) -> float:
    """Return the length of all together."""
    return math.sqrt(sum(float(t.abs().square().sum()) for t in tensors))
