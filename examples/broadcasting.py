"""Sums and products that broadcast, and products of matrices with batch dimensions.

An argument that was broadcast gets the sum over what it was broadcast along, and
``sum_to_size`` takes it, whatever the shapes.
"""

import torch

import gradtools as gt


@gt.custom_vjp
def add(a, b):
    return a + b


@add.def_bwd
def _(residuals, g):
    (a, b), _ = residuals
    return g.sum_to_size(a.shape), g.sum_to_size(b.shape)


@gt.custom_vjp
def mul(a, b):
    return a * b


@mul.def_bwd
def _(residuals, g):
    (a, b), _ = residuals
    return (g * b).sum_to_size(a.shape), (g * a).sum_to_size(b.shape)


@gt.custom_vjp
def matmul(a, b):
    return a @ b


@matmul.def_bwd
def _(residuals, g):
    (a, b), _ = residuals
    return (g @ b.mT).sum_to_size(a.shape), (a.mT @ g).sum_to_size(b.shape)


torch.manual_seed(0)
cases = {
    add: [((4, 3), (3,)), ((2, 1, 3), (4, 1)), ((), (5,))],
    mul: [((4, 1), (1, 3)), ((2, 4, 3), ()), ((0, 3), (3,))],
    matmul: [((4, 3), (3, 2)), ((2, 5, 4, 3), (5, 3, 2)), ((2, 1, 4, 3), (5, 3, 2))],
}
loss = lambda f: lambda *args: f(*args).sin().sum()
gaps = {}
for rule, shapes in cases.items():
    for pair in shapes:
        a, b = map(torch.randn, pair)
        mine = gt.grad(loss(rule), (0, 1))(a, b)
        theirs = gt.grad(loss(getattr(torch, rule.__name__)), (0, 1))(a, b)
        differences = [
            (p - q).abs().flatten() for p, q in zip(mine, theirs, strict=True)
        ]
        gaps[rule.__name__, pair] = torch.cat(differences).max().item()
for (name, (one, two)), gap in gaps.items():
    print(f"{name:<6} {one!s:<12} with {two!s:<9} gradients off by {gap:.1e}")
