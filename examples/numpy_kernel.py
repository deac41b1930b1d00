"""Functions of numpy and scipy under rules: a banded solver and an interpolator.

The gradient of a solution of ``A x = b`` is a solve with the transposed matrix:
``b_bar = A^-T g``, and ``A_bar = -b_bar x^T``, of which the bands are kept. Made of the
solver itself, it has derivatives of every order.
"""

import numpy as np
import scipy.linalg
import torch

import gradtools as gt


@gt.external(out=lambda bands, b: torch.empty_like(b), numpy=True)
def solve_tridiagonal(bands, b):
    """Solve with the bands above, on and below the diagonal, one a row."""
    return scipy.linalg.solve_banded((1, 1), bands, b)


def transposed(bands):
    """Return the bands of the transposed matrix, as solve_banded counts them."""
    return torch.stack([bands[2].roll(1), bands[1], bands[0].roll(-1)])


def bands_of_outer_product(left, right):
    pad = torch.nn.functional.pad
    above, below = left[:-1] * right[1:], left[1:] * right[:-1]
    return torch.stack([pad(above, (1, 0)), left * right, pad(below, (0, 1))])


@solve_tridiagonal.def_bwd
def _(residuals, g):
    (bands, _), x = residuals
    b_bar = solve_tridiagonal(transposed(bands), g)
    return -bands_of_outer_product(b_bar, x), b_bar


@gt.external(out=lambda x, xs, ys: torch.empty_like(x), numpy=True)
def interpolated(x, xs, ys):
    return np.interp(x, xs, ys)


@interpolated.def_bwd
def _(residuals, g):
    (x, xs, ys), _ = residuals
    right = torch.searchsorted(xs, x.detach()).clamp(1, len(xs) - 1)
    left = right - 1
    width = xs[right] - xs[left]
    share = ((x - xs[left]) / width).clamp(0, 1)
    slope = (ys[right] - ys[left]) / width * ((x > xs[0]) & (x < xs[-1]))
    part = lambda index, g: torch.zeros_like(ys).index_add(0, index, g)
    to_points = lambda g: part(left, g * (1 - share)) + part(right, g * share)
    return g * slope, to_points(-g * slope), to_points(g)


def dense(bands):
    return bands[1].diag() + bands[0, 1:].diag(1) + bands[2, :-1].diag(-1)


def main(n=6):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)
    bands, b = draw(3, n) + torch.tensor([[0.0], [3.0], [0.0]]), draw(n)
    by_torch = lambda bands, b: torch.linalg.solve(dense(bands), b).pow(3).sum()
    by_rule = lambda bands, b: solve_tridiagonal(bands, b).pow(3).sum()
    found = {}
    for name in ("grad", "hessian"):
        take = getattr(torch.func, name)
        gap = take(by_rule)(bands, b) - take(by_torch)(bands, b)
        found[f"{name}, gap to the dense solver"] = gap.abs().max().item()
    report = interpolated.gradcheck(draw(4), draw(5).sort().values, draw(5))
    found["interpolation"] = report.outcome
    print(found)
    return found


if __name__ == "__main__":
    main()
